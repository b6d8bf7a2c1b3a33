"""ONNX Runtime and TensorRT on a GPU: images of the reference engine, replayed graphs, caches in place.

Each test needs its library, and is skipped where it is missing. The oracle is the onnx engine on a CPU in float32.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import var_deploy
from var_deploy.pipeline import Pipeline
from var_deploy.plans import Batch, Layout
from var_export.bundle import write_bundle
from var_export.verify import verify_bundle
from var_train.checkpoint import load_pair

pytestmark = pytest.mark.gpu

#: Pixels of two float32 implementations, which add up in different orders; golden vectors agree to the same bound.
PIXELS = 1e-4
#: The smooth mixture divides logits by τ ≥ 0.0135, which magnifies their rounding.
SMOOTH_PIXELS = 1e-3

REQUESTS: dict[str, dict[str, Any]] = {
    "defaults": {"labels": [1, 2, 3], "seeds": 7},
    "alone": {"labels": [4], "seeds": 2**64 - 1, "guidance": 0},
    "ends-in-zeros": {"labels": [5, 6], "seeds": 1, "guidance": [1.0, 0.5, 0, 0]},
    "smooth": {"labels": [9, 2, 4], "seeds": 51, "smooth": True},
    "in-parts": {"labels": list(range(9)), "seeds": 11},
}
ENGINES = ["onnx", "tensorrt", "tensorrt-profiles", "tensorrt-plugins"]


def _needed(engine: str) -> None:
    if find_spec("cuda") is None:
        pytest.skip("needs cuda-python")
    if engine == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("needs onnxruntime-gpu")
    else:
        pytest.importorskip("tensorrt")


@pytest.fixture(scope="module")
def loaded(tiny_pair, tmp_path_factory) -> Callable[..., Pipeline]:
    """`loaded(engine, precision)`: the tiny model on the GPU, exported, built and loaded once."""
    pipes: dict[tuple[str, str], Pipeline] = {}
    bundles: dict[str, Path] = {}

    def get(engine: str, precision: str = "fp32") -> Pipeline:
        _needed(engine)
        if precision not in bundles:
            place = tmp_path_factory.mktemp(precision) / "bundle"
            bundles[precision] = write_bundle(load_pair(*tiny_pair[1:]), place, precision=precision)
        if (engine, precision) not in pipes:
            pipes[engine, precision] = _load(bundles[precision], engine)
        return pipes[engine, precision]

    return get


def _load(bundle: Path, engine: str) -> Pipeline:
    name, _, kind = engine.partition("-")
    if name == "onnx":
        return var_deploy.load(bundle, engine="onnx", device="cuda")
    from var_export.tensorrt import build_plans
    from var_export.tensorrt_plugins import register_plugins

    layout = Layout.PROFILES if kind == "profiles" else Layout.PER_SCALE
    plugins = register_plugins if kind == "plugins" else None
    plans = build_plans(bundle, batch=Batch(least=1, tuned=1, most=4), layout=layout, plugins=plugins)
    return var_deploy.load(bundle, engine="tensorrt", device="cuda", plans=plans.name)


@pytest.fixture(scope="module")
def reference(tiny_bundle) -> Pipeline:
    return var_deploy.load(tiny_bundle, engine="onnx", device="cpu")


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_images_are_those_of_the_cpu_engine(loaded, reference, engine, name):
    got, expected = loaded(engine).generate(**REQUESTS[name]), reference.generate(**REQUESTS[name])
    for got_Bn, expected_Bn in zip(got.tokens, expected.tokens, strict=True):
        np.testing.assert_array_equal(got_Bn, expected_Bn)
    atol = SMOOTH_PIXELS if name == "smooth" else PIXELS
    np.testing.assert_allclose(got.pixels, expected.pixels, atol=atol, rtol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_given_tokens_and_drafts(loaded, reference, engine):
    pipe = loaded(engine)
    images = np.random.default_rng(0).random((3, 3, 64, 64), dtype=np.float32)
    edit: dict[str, Any] = {"box": (0, 0, 0.5, 1), "labels": [1, 2, 3], "seeds": 3, "guidance": [0, 1, 2, 0]}
    for got, expected in [
        (pipe.edit(images, **edit), reference.edit(images, **edit)),
        (pipe.generate([1, 2], refine=reference, draft_scales=2), reference.generate([1, 2])),
        (reference.generate([1, 2], refine=pipe, draft_scales=2), reference.generate([1, 2])),
    ]:
        for got_Bn, expected_Bn in zip(got.tokens, expected.tokens, strict=True):
            np.testing.assert_array_equal(got_Bn, expected_Bn)
        np.testing.assert_allclose(got.pixels, expected.pixels, atol=PIXELS, rtol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_replays_give_the_same_again_and_previews_see_every_scale(loaded, engine):
    pipe, heard = loaded(engine), []
    first = pipe.generate([1, 2], seeds=3)
    for _ in range(3):
        again = pipe.generate([1, 2], seeds=3)
        np.testing.assert_array_equal(again.pixels, first.pixels)
        pipe.generate([5], seeds=9)  # another batch size, in between
    staged = pipe.generate([1, 2], seeds=3, on_scale=heard.append)
    assert [preview.scale for preview in heard] == list(range(len(first.tokens)))
    for got_Bn, expected_Bn in zip(staged.tokens, first.tokens, strict=True):
        np.testing.assert_array_equal(got_Bn, expected_Bn)
    np.testing.assert_allclose(heard[-1]._engine.decode(heard[-1].f_hat_BChh), first.pixels, atol=PIXELS, rtol=0)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_halves_draw_nearly_the_same(loaded, reference, engine, precision):
    """Greedy tokens of the coarsest scale, where no rounding has added up yet; pictures that can be told from noise."""
    got = loaded(engine, precision).generate([1, 2, 3], seeds=7, top_k=1)
    expected = reference.generate([1, 2, 3], seeds=7, top_k=1)
    np.testing.assert_array_equal(got.tokens[0], expected.tokens[0])
    assert np.isfinite(got.pixels).all()


@pytest.mark.parametrize("engine", ["onnx", "tensorrt"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_scale_is_within_the_limits_of_verify(loaded, tiny_pair, tmp_path, engine, precision):
    pipe = loaded(engine, precision)
    bundle = Path(shutil.copytree(pipe.bundle.path, tmp_path / "bundle"))
    parity = verify_bundle(bundle, *tiny_pair[1:], engine=engine, device="cuda")
    assert parity.passed
    assert parity.exact == (precision == "fp32")


@pytest.mark.parametrize("engine", ["onnx", "tensorrt"])
def test_draws_on_the_host_are_those_of_the_kernels(loaded, engine):
    pipe = loaded(engine)
    host = var_deploy.load(pipe.bundle.path, engine=engine, device="cuda", draw="host")
    for name in ("defaults", "in-parts"):
        got, expected = host.generate(**REQUESTS[name]), pipe.generate(**REQUESTS[name])
        for got_Bn, expected_Bn in zip(got.tokens, expected.tokens, strict=True):
            np.testing.assert_array_equal(got_Bn, expected_Bn)
