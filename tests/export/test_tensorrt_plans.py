"""Which plans a bundle needs: profiles of every graph, memory of both layouts, the same as trtexec lines."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from var_deploy.bundle import Bundle
from var_deploy.errors import BundleError, RequestError
from var_deploy.plans import Batch, Layout, memory_needed
from var_export.bundle import write_bundle
from var_export.tensorrt_plans import plans_of, trtexec_lines
from var_train.checkpoint import load_pair

BATCH = Batch(least=1, tuned=2, most=5)


@pytest.fixture(scope="module")
def bundle(tiny_bundle) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.mark.parametrize(("text", "expected"), [("1:2:5", (1, 2, 5)), ("4", (4, 4, 4)), ("1:1:999999", (1, 1, 999999))])
def test_batch_of_a_text(text, expected):
    batch = Batch.parse(text)
    assert (batch.least, batch.tuned, batch.most) == expected
    assert Batch.parse(str(batch)) == batch


@pytest.mark.parametrize(
    "text", ["", "0", "1:2", "2:1:3", "1:3:2", "1:2:3:4", "a", "1:-2:3", "1:2:3 ", "٣", "1:1:1000000"]
)
def test_what_is_no_batch(text):
    with pytest.raises(RequestError) as error:
        Batch.parse(text)
    assert str(error.value).startswith(f"batch: got {text!r}, expected MIN:OPT:MAX of images with 1 ≤ MIN ≤ OPT ≤ MAX")


@given(st.text(max_size=12))
def test_any_text_is_a_batch_or_one_line(text):
    try:
        batch = Batch.parse(text)
    except RequestError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert 1 <= batch.least <= batch.tuned <= batch.most


def test_a_plan_per_scale(bundle):
    var = bundle.manifest.var
    plans = plans_of(bundle, BATCH, Layout.PER_SCALE)
    scales = [f"scale_{k:02d}" for k in range(var.num_scales)]
    assert [plan.name for plan in plans] == ["condition", *scales, "finish", "decoder", "encoder"]
    assert all(len(plan.profiles) == 1 and not plan.profiles[0].values for plan in plans)
    shapes = plans[2].profiles[0].shapes
    cache = (var.num_heads, var.num_tokens, 64)
    assert shapes["cache_k.0"] == ((1, *cache), (4, *cache), (10, *cache))  # one unguided image to five guided ones
    assert shapes["codes"] == tuple((rows, var.tokens_per_scale[0], var.z_channels) for rows in (1, 4, 10))
    latent = (var.z_channels, var.latent_size, var.latent_size)
    assert plans[-2].profiles[0].shapes == {"f_hat": tuple((images, *latent) for images in (1, 2, 5))}


def test_a_profile_per_scale(bundle):
    var = bundle.manifest.var
    plans = plans_of(bundle, BATCH, Layout.PROFILES)
    assert [plan.name for plan in plans] == ["condition", "scales", "finish", "decoder", "encoder"]
    profiles = plans[1].profiles
    assert [profile.values for profile in profiles] == [{"scale": k} for k in range(var.num_scales)]
    for k, profile in enumerate(profiles):
        assert profile.shapes["scale"] == ((1,),) * 3
        codes = [shape[1] for shape in profile.shapes["codes"]]
        assert codes == [var.tokens_per_scale[max(k - 1, 0)]] * 3  # pinned, rows alone are open
        assert [shape[0] for shape in profile.shapes["codes"]] == [1, 4, 10]


def test_inputs_are_those_of_the_graphs(bundle):
    for layout in Layout:
        for plan in plans_of(bundle, BATCH, layout):
            names = [tensor.name for tensor in bundle.manifest.graphs[plan.name].inputs]
            assert all(list(profile.shapes) == names for profile in plan.profiles)
            assert plan.graph == bundle.manifest.graphs[plan.name].file


def test_memory_of_the_layouts(bundle):
    """They differ in copies of the weights that the scales read."""
    var, sizes = bundle.manifest.var, bundle.weight_bytes()
    of_one_plan = r"(encoder|decoder|quantize|quant_conv|post_quant_conv|class_emb)\.|.*ada_lin\.|ada_gss"
    once = sum(sizes[name] for name in sizes if re.match(of_one_plan, name))
    transformer = sum(sizes.values()) - once
    per_scale, profiles = (memory_needed(bundle, BATCH, layout) for layout in (Layout.PER_SCALE, Layout.PROFILES))
    assert per_scale - profiles == (var.num_scales - 1) * transformer
    caches = 2 * var.depth * 10 * var.num_tokens * var.embed_dim * 4
    assert profiles == transformer + once + caches


def test_int8_is_refused(tiny_pair, tmp_path):
    bundle = Bundle.open(write_bundle(load_pair(*tiny_pair[1:]), tmp_path / "int8", precision="int8"))
    with pytest.raises(BundleError, match="an int8 bundle has operators of ONNX Runtime alone; export fp16, bf16"):
        plans_of(bundle, BATCH, Layout.PER_SCALE)


def test_lines_for_trtexec(bundle):
    var = bundle.manifest.var
    lines = trtexec_lines(bundle, BATCH, Layout.PER_SCALE)
    assert len(lines) == var.num_scales + 5
    decoder = lines[-2].split()
    assert decoder[:2] == ["trtexec", "--onnx=decoder.onnx"]
    side = var.latent_size
    assert f"--maxShapes=f_hat:5x{var.z_channels}x{side}x{side}" in decoder
    (one,) = [line for line in trtexec_lines(bundle, BATCH, Layout.PROFILES) if "scales.onnx" in line]
    assert one.count("--profile=") == var.num_scales
    assert "--profile=1 --minShapes=scale:1," in one
