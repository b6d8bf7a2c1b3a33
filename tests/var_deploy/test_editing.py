"""Editing, variations, prefixes and two models in one image: golden vectors, limits, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file

import var_deploy
from golden import HERE, Golden
from var_deploy import Pipeline
from var_deploy.config import VQVAEConfig
from var_deploy.editing import kept_positions, region
from var_deploy.errors import RequestError

ENGINES: dict[str, dict[str, Any]] = {
    "onnx": {"engine": "onnx"},
    "onnx-static": {"engine": "onnx", "graphs": "static"},
    "torch": {"engine": "torch", "device": "cpu", "precision": "fp32"},
}
EDITS: dict[str, dict[str, Any]] = {
    "inpaint": {"box": (0.25, 0.25, 0.75, 0.75)},
    "outpaint": {"labels": [0, 19, 5], "box": (0.2, 0.3, 0.9, 0.8), "mode": "outpaint"},
    "class_edit": {"labels": [0, 19, 5], "box": (0, 0.4, 0.6, 1)},
}
#: The scale lists of published models and of the golden ones.
SCALES = [(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 3, 4, 6, 9, 13, 18, 24, 32), (1, 2, 3, 5, 8), (1, 2, 4)]
GREEDY: dict[str, Any] = {"top_k": 1, "top_p": 0, "guidance": 4.0}


@pytest.fixture(scope="module", params=ENGINES)
def any_pipe(request: pytest.FixtureRequest, tiny_bundle: Path) -> Pipeline:
    """Images of 64 px, tokens of 4×4, on every engine."""
    return var_deploy.load(tiny_bundle, **ENGINES[request.param])


@pytest.fixture(scope="module")
def small_images() -> np.ndarray:
    return (Golden.load("tiny").test_image() + 1) / 2


@pytest.fixture(scope="module")
def pipe(shared_aln_bundle: Path) -> Pipeline:
    """Images of 128 px, tokens of 8×8."""
    return var_deploy.load(shared_aln_bundle, engine="onnx")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return (Golden.load("shared_aln").test_image() + 1) / 2


def _tokens(made: var_deploy.Generation) -> np.ndarray:
    return np.concatenate(made.tokens, axis=1)


# ---- golden vectors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "name"), [*(("onnx", name) for name in EDITS), ("onnx-static", "outpaint"), ("torch", "class_edit")]
)
def test_edits_of_the_published_code(shared_aln_bundle, images, engine, name):
    golden = load_file(HERE / "shared_aln_edit.safetensors")
    pipe = var_deploy.load(shared_aln_bundle, **ENGINES[engine])
    made = pipe.edit(images, **EDITS[name], **GREEDY)
    for k, tokens_Bn in enumerate(made.tokens):
        np.testing.assert_array_equal(tokens_Bn, golden[f"{name}.tokens.{k}"], err_msg=f"scale {k}")
    np.testing.assert_allclose(made.pixels, golden[f"{name}.image"], atol=1e-4, rtol=0)  # of another build


def test_the_masks_of_the_published_code_say_what_is_kept(pipe, images):
    golden = load_file(HERE / "shared_aln_edit.safetensors")
    made = pipe.edit(images, [0, 19, 5], mask=golden["class_edit.mask"], mode="outpaint", **GREEDY)
    for k, tokens_Bn in enumerate(made.tokens):
        np.testing.assert_array_equal(tokens_Bn, golden[f"class_edit.tokens.{k}"], err_msg=f"scale {k}")


@given(
    patch_nums=st.sampled_from(SCALES),
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["box", "binary", "soft", "halves"]),
)
def test_masks_shrink_as_pytorch_resizes_them(patch_nums, seed, kind):
    """The published rule, in the published library: also where a resized value is a half."""
    config, rng = (
        VQVAEConfig(patch_nums=patch_nums, vocab_size=64, ch=32, ch_mult=(1, 1, 2, 2, 4)),
        np.random.default_rng(seed),
    )
    h = patch_nums[-1]
    keep_hh = rng.random((h, h)).astype(np.float32)
    if kind == "binary":
        keep_hh = keep_hh.round()
    elif kind == "halves":
        keep_hh = (2 * keep_hh).round() / 2
    elif kind == "box":
        y, x = np.sort(rng.random((2, 2)), axis=1) * 0.75 + [0, 0.25]  # a fourth of a side at least: a token
        keep_hh = 1 - region((y[0], x[0], y[1], x[1]), None, None, config)[0]
    expected = []
    for p in patch_nums:
        resized = F.interpolate(torch.from_numpy(keep_hh)[None, None], size=(p, p), mode="bilinear")
        expected.append((resized > 0.5).flatten() | (p * p <= 3))
    kept_L = kept_positions(keep_hh[None], config)[0]
    if not expected[-1].any():
        assert not kept_L.any()
    elif kind in ("box", "binary") or kind == "soft":
        np.testing.assert_array_equal(kept_L, torch.cat(expected).numpy())
    else:  # a sum of halves that is a half may be rounded to either side of it
        assert (kept_L != torch.cat(expected).numpy()).mean() < 0.02


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_an_empty_mask_gives_the_reconstruction_and_a_full_one_what_is_generated(any_pipe, small_images):
    reconstruction = any_pipe.reconstruct(small_images)
    kept = any_pipe.edit(small_images, [0, 9], mask=np.zeros((4, 4)), seeds=3)
    np.testing.assert_array_equal(_tokens(kept), np.concatenate(any_pipe.encode(small_images), axis=1))
    np.testing.assert_allclose(kept.pixels, reconstruction, atol=1e-4, rtol=0)  # f_hat is summed in another order
    generated = any_pipe.generate([0, 9], seeds=3)
    for full in ({"mask": np.ones((64, 64), bool)}, {"box": (0, 0, 1, 1)}, {"box": (0, 0, 0, 0), "mode": "outpaint"}):
        drawn = any_pipe.edit(small_images, [0, 9], seeds=3, **full)
        np.testing.assert_array_equal(_tokens(drawn), _tokens(generated))
        np.testing.assert_array_equal(drawn.pixels, generated.pixels)


def test_what_is_kept_stays_and_what_is_drawn_depends_on_the_seed(any_pipe, small_images):
    mask = np.zeros((4, 4), bool)
    mask[1:, 2:] = True
    kept_L = kept_positions(
        1 - region(None, mask, None, any_pipe.bundle.manifest.vqvae), any_pipe.bundle.manifest.vqvae
    )[0]
    encoded_BL = np.concatenate(any_pipe.encode(small_images), axis=1)
    first, second = (_tokens(any_pipe.edit(small_images, [1, 2], mask=mask, seeds=seed)) for seed in (0, 100))
    np.testing.assert_array_equal(first[:, kept_L], encoded_BL[:, kept_L])
    np.testing.assert_array_equal(second[:, kept_L], encoded_BL[:, kept_L])
    assert (first[:, ~kept_L] != second[:, ~kept_L]).mean() > 0.5


def test_every_engine_edits_alike(any_pipe, tiny_bundle, small_images):
    asked: dict[str, Any] = {"labels": [4, 5], "box": (0, 0, 0.5, 1), "seeds": 9, "preset": "paper-edit"}
    expected = var_deploy.load(tiny_bundle, engine="onnx").edit(small_images, **asked)
    got = any_pipe.edit(small_images, **asked)
    np.testing.assert_array_equal(_tokens(got), _tokens(expected))
    # τ of the mixtures magnifies a sum in another order.
    np.testing.assert_allclose(got.pixels, expected.pixels, atol=1e-2, rtol=0)


def test_without_a_class_guidance_has_nothing_to_do(pipe, images, monkeypatch):
    rows = []
    begin = pipe.engine.begin
    monkeypatch.setattr(pipe.engine, "begin", lambda labels_R: rows.append(labels_R.tolist()) or begin(labels_R))
    made = pipe.edit(images[:2], box=(0, 0, 1, 0.5), guidance=7.0)
    assert rows == [[20, 20]]  # the null class, once
    assert made.recipes[0].label == 20


def test_one_picture_serves_for_all_classes_and_seeds(pipe, images):
    asked: dict[str, Any] = {"box": (0.5, 0, 1, 1), **GREEDY}
    many = pipe.edit(images[:1], [3, 4, 5], seeds=[7, 8, 9], **asked)
    for i, (label, seed) in enumerate(zip([3, 4, 5], [7, 8, 9], strict=True)):
        alone = pipe.edit(images[:1], label, seeds=seed, **asked)
        np.testing.assert_array_equal(_tokens(alone)[0], _tokens(many)[i])
    picture = Image.fromarray(np.rint(images[0].transpose(1, 2, 0) * 255).astype(np.uint8))
    several = pipe.edit(picture, 3, seeds=[1, 2], box=(0, 0, 0.5, 1))
    assert len(several.images) == 2


def test_previews_come_after_every_scale(any_pipe, small_images):
    heard: list[Any] = []
    made = any_pipe.edit(small_images, [1, 2], box=(0, 0, 0.5, 1), seeds=4, on_scale=heard.append)
    assert [preview.scale for preview in heard] == [0, 1, 2, 3]
    for preview, tokens_Bn in zip(heard, made.tokens, strict=True):
        np.testing.assert_array_equal(preview.tokens_Bn, tokens_Bn)


# ---- composite -------------------------------------------------------------------------------------------------------


def test_a_composite_has_the_originals_pixels_but_for_the_region_and_a_seam(pipe, images):
    mask = np.zeros((8, 8), bool)
    mask[2:5, 1:6] = True
    asked: dict[str, Any] = {"labels": [0, 1, 2], "mask": mask, "seeds": 5}
    plain, composite = pipe.edit(images, **asked), pipe.edit(images, composite=True, **asked)
    seam = 16 // 2  # half a token
    inside = np.zeros((128, 128), bool)
    inside[32 - seam : 80 + seam, 16 - seam : 96 + seam] = True
    np.testing.assert_array_equal(composite.pixels[:, :, ~inside], images[:, :, ~inside])
    core = np.zeros((128, 128), bool)
    core[32 + seam : 80 - seam, 16 + seam : 96 - seam] = True
    np.testing.assert_array_equal(composite.pixels[:, :, core], plain.pixels[:, :, core])
    between = composite.pixels[:, :, inside & ~core]
    low = np.minimum(images, plain.pixels)[:, :, inside & ~core]
    high = np.maximum(images, plain.pixels)[:, :, inside & ~core]
    assert (between >= low - 1e-6).all()
    assert (between <= high + 1e-6).all()
    np.testing.assert_array_equal(
        np.asarray(composite.images[1]), np.rint(composite.pixels[1].transpose(1, 2, 0) * 255)
    )
    assert composite.recipes[0].composite


# ---- masks -----------------------------------------------------------------------------------------------------------


def test_masks_of_every_kind_say_the_same(pipe, images):
    mask_hh = np.zeros((8, 8), bool)
    mask_hh[1:4, 2:] = True
    mask_RR = mask_hh.repeat(16, 0).repeat(16, 1)
    kinds = [
        mask_hh,
        mask_hh.astype(float),
        mask_RR,
        (mask_RR * 255).astype(np.uint8),
        Image.fromarray((mask_RR * 255).astype(np.uint8)),
        Image.fromarray(mask_RR),
        [mask_hh] * 3,
        np.stack([mask_RR] * 3),
    ]
    config = pipe.bundle.manifest.vqvae
    for mask in kinds:
        got = region(None, mask, None, config)
        np.testing.assert_array_equal(got, np.broadcast_to(mask_hh.astype(np.float32), got.shape))


def test_masks_that_are_no_plain_grey_picture(pipe):
    config = pipe.bundle.manifest.vqvae
    dim = Image.fromarray(np.full((128, 128), 20_000, np.uint16))
    dim.putpixel((0, 0), 65535)
    with pytest.raises(RequestError, match="sets less than half of every token"):
        region(None, dim, None, config)
    ink = Image.new("RGBA", (128, 128), (255, 255, 255, 0))
    ink.paste((255, 255, 255, 255), (0, 64, 128, 128))
    (region_hh,) = region(None, ink, None, config)
    np.testing.assert_array_equal(region_hh, np.repeat([0.0, 1.0], 4)[:, None] * np.ones((8, 8)))


def test_one_picture_with_two_masks(pipe, images):
    picture = Image.fromarray(np.rint(images[0].transpose(1, 2, 0) * 255).astype(np.uint8))
    masks = [np.eye(8), np.ones((8, 8))]
    for source in (picture, images[:1]):
        assert len(pipe.edit(source, 3, mask=masks, seeds=1).images) == 2


def test_a_mask_of_the_pictures_size_is_cut_as_the_picture_is(pipe):
    """A wide picture with a white square at its centre, and a mask of the same."""
    picture = Image.new("RGB", (300, 200))
    picture.paste((255, 255, 255), (100, 50, 200, 150))
    mask = picture.convert("L")
    config = pipe.bundle.manifest.vqvae
    (region_hh,) = region(None, mask, [picture.size], config)
    np.testing.assert_allclose(region_hh[2:6, 2:6], 1, atol=0.05)
    np.testing.assert_allclose(region_hh[:, [0, 7]], 0, atol=0.05)
    made = pipe.edit([picture], mask=mask, seeds=1)
    assert made.pixels.shape == (1, 3, 128, 128)
    turned = picture.copy()
    turned.getexif()[274] = 6  # stored lying on its side
    with pytest.raises(RequestError, match="mask: got 300×200, expected the picture's 200×300"):
        pipe.edit([turned], mask=mask)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({}, "edit: got neither, expected either a box or a mask"),
        ({"box": (0, 0, 1, 1), "mask": np.ones((8, 8))}, "edit: got both, expected either a box or a mask"),
        ({"box": (0, 0, 1)}, "box: got (0, 0, 1), expected (y0, x0, y1, x1), parts of the sides from 0 to 1"),
        ({"box": (0, 0, 1, 128)}, "box: got (0, 0, 1, 128), expected (y0, x0, y1, x1), parts of the sides from 0 to 1"),
        ({"box": (0.5, 0, 0.4, 1)}, "box: got (0.5, 0, 0.4, 1), expected y0 ≤ y1 and x0 ≤ x1"),
        ({"box": 0.5}, "box: got 0.5, expected (y0, x0, y1, x1), parts of the sides from 0 to 1"),
        ({"mask": np.ones((8, 9))}, "mask: got 9×8, expected 128×128, or 8×8, one value per token"),
        (
            {"mask": np.ones((1, 2, 8, 8))},
            "mask: array of shape (1, 2, 8, 8), expected two axes, or three for one mask per image",
        ),
        ({"mask": np.full((8, 8), 255)}, "mask: values outside [0, 1]; scale 8-bit values by 1/255, or give uint8"),
        ({"mask": np.full((8, 8), np.nan)}, "mask: values outside [0, 1]; scale 8-bit values by 1/255, or give uint8"),
        ({"mask": np.full((8, 8), "x")}, "mask: array of <U1, expected bool, uint8, or numbers in [0, 1]"),
        ({"mask": [np.ones((8, 8))] * 2}, "got 2 masks and 3 images; give one, or as many as there are images"),
        ({"mask": []}, "mask: got none, expected one, or one per image"),
        ({"mask": [[1, 0], [1]]}, None),
        ({"mask": 0.4 * np.ones((128, 128))}, "mask: sets less than half of every token of 8×8; make it larger"),
        (
            {"box": (0.51, 0.51, 0.53, 0.53)},
            "box: got (0.51, 0.51, 0.53, 0.53), which covers no token of 8×8; make it larger",
        ),
        ({"box": (0, 0, 1, 1), "preset": []}, "preset [] is unknown; known: paper-fid, paper-visual, paper-edit"),
        ({"box": (0, 0, 1, 1), "mode": "paint"}, "mode: got 'paint', expected inpaint or outpaint"),
        (
            {"box": (0, 0, 1, 1), "labels": [1, 2]},
            "got 2 labels and 3 images; give one, or as many as there are images",
        ),
        ({"box": (0, 0, 1, 1), "labels": 20}, "class 20 is out of range; expected an id from 0 to 19"),
        ({"box": (0, 0, 1, 1), "seeds": [1, 2]}, "got 2 seeds and 3 images; give one, or as many as there are images"),
        ({"box": (0, 0, 1, 1), "top_p": 2}, "top_p: got 2, expected a number from 0 to 1 (0 is off)"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_a_wrong_edit_is_told_what_would_be_right(pipe, images, given_, message):
    with pytest.raises(RequestError) as caught:
        pipe.edit(images, **given_)
    assert message is None or str(caught.value) == message


# ---- variations and prefixes -----------------------------------------------------------------------------------------


def test_a_variation_keeps_the_coarse_scales_alone(any_pipe, small_images):
    encoded = any_pipe.encode(small_images[:1])
    made = any_pipe.vary(small_images[:1], 3, from_scale=2, seeds=[1, 2, 3])
    for k in range(4):
        same = (made.tokens[k] == encoded[k]).mean()
        assert same == 1 if k < 2 else same < 0.5
    assert len(np.unique(_tokens(made), axis=0)) == 3


@pytest.mark.parametrize("scales", [1, 3])
def test_an_image_goes_on_from_its_own_coarse_scales(any_pipe, scales):
    """What the image would have drawn anyway: the same to the bit."""
    whole = any_pipe.generate([1, 2], seeds=8, guidance=2.0)
    from_prefix = any_pipe.generate([1, 2], seeds=8, guidance=2.0, prefix_tokens=whole.tokens[:scales])
    np.testing.assert_array_equal(_tokens(from_prefix), _tokens(whole))
    np.testing.assert_array_equal(from_prefix.pixels, whole.pixels)


def test_one_prefix_serves_for_all_images(pipe):
    prefix = [tokens_Bn[0] for tokens_Bn in pipe.generate([4], seeds=1).tokens[:2]]
    made = pipe.generate([1, 2, 3], prefix_tokens=prefix)
    for k in range(2):
        np.testing.assert_array_equal(made.tokens[k], np.tile(prefix[k], (3, 1)))


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ([], "tokens: 0 scales, expected 1 to 5"),
        ([[1]], None),
        ([[[1], [2], [3]]], "prefix_tokens: of 3 images, expected 2, or 1 for all"),
        ([[1], [1, 2, 3]], "tokens: scale 1 has shape (1, 3), expected (1, 4)"),
        ([[512]], "tokens: scale 0 leaves the codebook's 0 to 511"),
        ([[0.5]], "tokens: scale 0 is float64, expected integers"),
        (
            [np.zeros((1, n), int) for n in (1, 4, 9, 25, 64)],
            "prefix_tokens: all scales are given, so there is nothing to draw; use decode",
        ),
    ],
    ids=str,
)
def test_a_wrong_prefix_is_told_what_would_be_right(pipe, prefix, message):
    if message is None:
        assert pipe.generate([1, 2], prefix_tokens=prefix).tokens[0].tolist() == [[1], [1]]
        return
    with pytest.raises(RequestError) as caught:
        pipe.generate([1, 2], prefix_tokens=prefix)
    assert str(caught.value) == message


@pytest.mark.parametrize("from_scale", [0, 5, -1, 1.0, True, None])
def test_a_wrong_scale_to_vary_from(pipe, images, from_scale):
    with pytest.raises(RequestError) as caught:
        pipe.vary(images, from_scale=from_scale)
    assert str(caught.value) == f"from_scale: got {from_scale!r}, expected a scale from 1 to 4"


# ---- two models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_bundle(shared_aln_pair, shared_aln_bundle, tmp_path_factory) -> Path:
    """Another transformer over the same VQVAE."""
    from var_export.bundle import bundle_from_checkpoint

    directory = tmp_path_factory.mktemp("other")
    state = load_file(shared_aln_pair[1])
    state["head.weight"] = state["head.weight"][:, ::-1].copy()
    save_file(state, directory / "var.safetensors")
    return bundle_from_checkpoint(directory / "var.safetensors", shared_aln_pair[2], directory / "bundle")


@pytest.mark.parametrize("smooth", [False, [True, True, False, True]], ids=["drawn", "mixed"])
def test_a_model_that_refines_itself_changes_no_bit(any_pipe, smooth):
    asked: dict[str, Any] = {"labels": [1, 2], "seeds": 5, "smooth": smooth, "guidance": [0.5, 1.0, 0, 0]}
    whole = any_pipe.generate(**asked)
    for scales in (1, 3):
        both = any_pipe.generate(**asked, refine=any_pipe, draft_scales=scales)
        np.testing.assert_array_equal(_tokens(both), _tokens(whole))
        np.testing.assert_array_equal(both.pixels, whole.pixels)


def test_the_draft_draws_the_coarse_scales_and_the_refiner_the_rest(pipe, other_bundle):
    asked: dict[str, Any] = {"labels": [3, 9], "seeds": 5, "guidance": 3.0, "smooth": True}
    refiner = var_deploy.load(other_bundle, engine="onnx")
    heard: list[Any] = []
    both = pipe.generate(**asked, refine=refiner, draft_scales=3, on_scale=heard.append)
    draft = pipe.generate(**asked)
    for k in range(3):
        np.testing.assert_array_equal(both.tokens[k], draft.tokens[k])
    assert (both.tokens[4] != draft.tokens[4]).mean() > 0.5
    # The refiner starts from the draft's map: that of all its scales' codes, mixtures included.
    of_draft: list[Any] = []
    pipe.generate(**asked, on_scale=of_draft.append)
    np.testing.assert_allclose(heard[2].f_hat_BChh, of_draft[2].f_hat_BChh, atol=1e-4, rtol=0)
    assert [preview.scale for preview in heard] == [0, 1, 2, 3, 4]
    assert "draft" in both.timings


def test_partners_that_do_not_fit_are_refused(pipe, tiny_bundle, shared_aln_bundle, tmp_path, reseal):
    altered = Path(shutil.copytree(shared_aln_bundle, tmp_path / "altered"))
    weights = altered / "weights.safetensors"
    content, codebook = bytearray(weights.read_bytes()), pipe.bundle.weight("quantize.embedding.weight")
    at = content.find(codebook.tobytes())
    content[at : at + 4] = np.float32(codebook.flat[0] + 1).tobytes()
    weights.write_bytes(content)
    reseal(altered, weights.name)
    other, tiny = var_deploy.load(altered, engine="onnx"), var_deploy.load(tiny_bundle, engine="onnx")
    where = f"{pipe.bundle.path} and"
    for arguments, message in [
        (
            {"refine": other, "draft_scales": 2},
            f"refine: codebooks of {where} {altered} differ; take models of the same VQVAE",
        ),
        (
            {"refine": tiny, "draft_scales": 2},
            f"refine: scales of {where} {tiny_bundle} differ; take models of the same data",
        ),
        ({"refine": pipe}, "generate: refine and draft_scales belong together; give both, or neither"),
        ({"draft_scales": 2}, "generate: refine and draft_scales belong together; give both, or neither"),
        ({"refine": pipe, "draft_scales": 5}, "draft_scales: got 5, expected a number from 1 to 4"),
        ({"refine": pipe, "draft_scales": 0}, "draft_scales: got 0, expected a number from 1 to 4"),
        (
            {"refine": pipe, "draft_scales": 2, "prefix_tokens": [[1]]},
            "generate: prefix_tokens with refine; give the tokens to the refiner alone",
        ),
    ]:
        with pytest.raises(RequestError) as caught:
            pipe.generate([1], **arguments)
        assert str(caught.value) == message
