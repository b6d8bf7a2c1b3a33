"""The torch engine on a CPU, with the kernels' references: the pictures of the onnx engine, and what makes it its own.

It draws on its own side, works on buffers that stay where they are, takes turns between threads and knows lower
precisions. The last test runs the kernels themselves through it, in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

import var_deploy
from var_deploy import schedules
from var_deploy.config import VARConfig, VQVAEConfig
from var_deploy.engines import DeviceLoop
from var_deploy.engines.torch import TorchEngine
from var_deploy.engines.torch.engine import float8_problem
from var_deploy.engines.torch.weights import WeightReader
from var_deploy.errors import EngineError
from var_deploy.images import images_from_pixels
from var_deploy.pipeline import Generation, Pipeline, Preview
from var_deploy.precision import Precision
from var_export.bundle import bundle_from_checkpoint, write_bundle
from var_export.verify import verify_bundle
from var_kernels import reference_ops
from var_train import VAR, VQVAE, digits
from var_train.checkpoint import CheckpointPair
from var_train.presets import randomise

#: Pixels of two float32 implementations, which add up in different orders; golden vectors agree to the same bound.
PIXELS = 1e-4
#: The smooth mixture divides logits by τ ≥ 0.0135, which magnifies their rounding.
SMOOTH_PIXELS = 1e-3

ROOT = Path(__file__).parents[2]
#: PyTorch below 2.12 has no float8 product by rows and columns on a CPU.
NEEDS_FLOAT8 = pytest.mark.skipif(float8_problem(torch.device("cpu")) is not None, reason="no float8 product here")
INEXACT = [
    pytest.param(precision, marks=NEEDS_FLOAT8 if precision is Precision.FP8 else ())
    for precision in Precision
    if not precision.exact
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """These tensors are tiny: a second thread costs more than it gives, several times over where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _load(bundle: Path, **options: Any) -> Pipeline:
    return var_deploy.load(bundle, engine="torch", device="cpu", **options)


def _onnx(bundle: Path) -> Pipeline:
    return var_deploy.load(bundle, engine="onnx", threads=1)


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Pipeline:
    """Four scales, 10 classes, 256 codes; float32."""
    return _load(tiny_bundle)


@pytest.fixture(scope="module")
def onnx(tiny_bundle: Path) -> Pipeline:
    return _onnx(tiny_bundle)


@pytest.fixture(scope="module")
def wide(shared_aln_bundle: Path) -> tuple[Pipeline, Pipeline]:
    """(torch, onnx) of five scales, 20 classes, 512 codes and shared AdaLN."""
    return _load(shared_aln_bundle), _onnx(shared_aln_bundle)


def _tokens(out: Generation) -> np.ndarray:
    return np.concatenate(out.tokens, axis=1)


def _engine(pipe: Pipeline) -> TorchEngine:
    assert isinstance(pipe.engine, TorchEngine)
    return pipe.engine


def _assert_same(got: Generation, expected: Generation) -> None:
    """Bit for bit."""
    np.testing.assert_array_equal(_tokens(got), _tokens(expected))
    np.testing.assert_array_equal(got.pixels, expected.pixels)
    for ours, theirs in zip(got.images, expected.images, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


# ---- the pictures of the onnx engine ---------------------------------------------------------------------------------

#: Requests that the two engines must answer alike.
REQUESTS: dict[str, dict[str, Any]] = {
    "defaults": {"labels": [1, 2, 3], "seeds": 5},
    "alone": {"labels": [7], "seeds": 2**64 - 1},
    "largest-seeds": {"labels": [7, 0, 7], "seeds": [2**64 - 1, 2**63, 2**32]},
    "greedy": {"labels": [9, 0, 4], "top_k": 1, "top_p": 0},
    "unguided": {"labels": [3, 3, 8], "seeds": 11, "guidance": 0},
    "unguided-alone": {"labels": [3], "seeds": 12, "guidance": 0.0},
    "strong": {"labels": [2, 6], "seeds": 1, "guidance": 8.0},
    "ends-in-zeros": {"labels": [4, 1, 5], "seeds": 21, "guidance": [0.5, 2.0, 0, 0]},
    "one-guided-scale": {"labels": [4], "seeds": 22, "guidance": [3.0, 0, 0, 0]},
    "begins-with-zeros": {"labels": [4, 1, 5], "seeds": 23, "guidance": [0, 0, 0, 4.0]},
    "a-zero-between": {"labels": [4, 1], "seeds": 24, "guidance": [2.0, 0, 3.0, 0]},
    "cool": {"labels": [1, 8, 2], "seeds": 31, "temperature": 0.7},
    "warm": {"labels": [1, 8, 2], "seeds": 32, "temperature": 1.5, "top_k": 0, "top_p": 0},
    "coldest": {"labels": [5], "seeds": 33, "temperature": 1e-3},
    "top-k-alone": {"labels": [6, 6], "seeds": 41, "top_k": 7, "top_p": 0},
    "top-p-alone": {"labels": [6, 6], "seeds": 42, "top_k": 0, "top_p": 0.5},
    "top-k-beyond-all": {"labels": [6], "seeds": 43, "top_k": 10**12, "top_p": 1},
    "smooth": {"labels": [9, 2, 4], "seeds": 51, "smooth": True},
    "smooth-filtered": {
        "labels": [9],
        "seeds": 2**64 - 1,
        "smooth": True,
        "temperature": 1.5,
        "top_k": 20,
        "top_p": 0.9,
        "guidance": [1.0, 1.0, 0, 0],
    },
}


def _ask(pipe: Pipeline, request: dict[str, Any], **more: Any) -> Generation:
    arguments = {**request, **more}
    return pipe.generate(arguments.pop("labels"), **arguments)


def _assert_near(got: Generation, expected: Generation, *, smooth: bool = False) -> None:
    """The same tokens, and pixels up to rounding."""
    assert [t.dtype for t in got.tokens] == [np.dtype(np.int64)] * len(got.tokens)
    assert [t.shape for t in got.tokens] == [t.shape for t in expected.tokens]
    np.testing.assert_array_equal(_tokens(got), _tokens(expected))
    assert got.pixels.dtype == np.float32
    np.testing.assert_allclose(got.pixels, expected.pixels, atol=SMOOTH_PIXELS if smooth else PIXELS, rtol=0)


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_every_request_gets_the_tokens_of_the_onnx_engine(pipe, onnx, request_):
    _assert_near(_ask(pipe, request_), _ask(onnx, request_), smooth=request_.get("smooth", False))


@pytest.mark.parametrize(
    "request_",
    [
        {"labels": [19, 0, 7], "seeds": 2**64 - 3},
        {"labels": [5], "seeds": 3, "temperature": 1.5, "smooth": True},
        {"labels": [11, 2], "seeds": 8, "guidance": [2.0, 1.0, 0.5, 0, 0], "temperature": 0.7},
        {"labels": [4], "top_k": 1, "guidance": [0, 0, 0, 0, 3.0]},
    ],
    ids=["defaults", "smooth", "ends-in-zeros", "begins-with-zeros"],
)
def test_shared_aln_gets_the_tokens_of_the_onnx_engine(wide, request_):
    ours, theirs = wide
    _assert_near(_ask(ours, request_), _ask(theirs, request_), smooth=request_.get("smooth", False))


def test_pictures_are_the_pixels_rounded(pipe):
    out = pipe.generate([1, 2, 3], seeds=9)
    assert [(image.size, image.mode) for image in out.images] == [((64, 64), "RGB")] * 3
    for ours, rounded in zip(out.images, images_from_pixels(out.pixels), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(rounded))


def test_stages_are_timed_in_order(pipe):
    timings = pipe.generate([1, 2], seeds=9).timings
    later = ["scale_01", "scale_02", "scale_03", "finish", "decode", "download"]
    assert list(timings) == ["upload", "condition", "scale_00", "draw", *later]
    assert all(seconds >= 0 for seconds in timings.values())
    assert timings["decode"] > 0


class Stepwise:
    """An engine's step-by-step calls alone, so that the pipeline runs its own loop on the host."""

    def __init__(self, engine: TorchEngine) -> None:
        self.name, self.precision, self.max_batch = engine.name, engine.precision, None
        self.begin, self.step, self.finish = engine.begin, engine.step, engine.finish
        self.decode, self.encode = engine.decode, engine.encode


@pytest.mark.parametrize("name", ["defaults", "alone", "ends-in-zeros", "begins-with-zeros", "warm", "smooth"])
def test_step_by_step_equals_the_whole_loop(pipe, name):
    stepwise = Stepwise(_engine(pipe))
    assert isinstance(pipe.engine, DeviceLoop)
    assert not isinstance(stepwise, DeviceLoop)
    by_step = _ask(Pipeline(pipe.bundle, stepwise), REQUESTS[name])
    assert next(iter(by_step.timings)) == "condition"  # the loop of the pipeline
    _assert_near(_ask(pipe, REQUESTS[name]), by_step, smooth=name == "smooth")


# ---- step by step ----------------------------------------------------------------------------------------------------


def _random_codes(pipe: Pipeline, k: int, rows: int) -> np.ndarray:
    config = pipe.bundle.manifest.var
    shape = (rows, config.tokens_per_scale[k], config.z_channels)
    return np.random.default_rng(k).standard_normal(shape, dtype=np.float32)


def test_dropped_rows_leave_the_others_alone(pipe):
    engine, config = _engine(pipe), pipe.bundle.manifest.var
    dropping, keeping = (engine.begin(np.array([1, 2, 3, 10, 10, 10])) for _ in range(2))
    for k, rows in enumerate([6, 6, 3, 1]):
        all_codes = None if k == 0 else _random_codes(pipe, k - 1, 6)
        got = engine.step(dropping, k, None if all_codes is None else all_codes[:rows])
        expected = engine.step(keeping, k, all_codes)
        assert got.shape == (rows, config.tokens_per_scale[k], config.vocab_size)
        # Products of fewer rows may add up in another order: float32 rounding of logits up to 5.
        np.testing.assert_allclose(got, expected[:rows], atol=1e-5, rtol=0, err_msg=f"scale {k}")
        np.testing.assert_array_equal(dropping.f_hat_RChh, keeping.f_hat_RChh[:rows])
    codes = _random_codes(pipe, 3, 6)
    np.testing.assert_array_equal(engine.finish(dropping, codes[:1]), engine.finish(keeping, codes)[:1])


def test_f_hat_of_a_state_lags_one_scale_and_is_a_copy(pipe, onnx):
    ours, theirs = _engine(pipe).begin(np.array([3, 5])), onnx.engine.begin(np.array([3, 5]))
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    for k in range(4):
        codes = None if k == 0 else _random_codes(pipe, k - 1, 2)
        pipe.engine.step(ours, k, codes)
        onnx.engine.step(theirs, k, codes)
        seen.append((ours.f_hat_RChh, theirs.f_hat_RChh.copy()))
    assert not seen[0][0].any()
    for k, (got, expected) in enumerate(seen):
        # Sums of codes through one convolution, in another order.
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0, err_msg=f"scale {k}")
    codes = _random_codes(pipe, 3, 2)
    complete = onnx.engine.finish(theirs, codes)
    np.testing.assert_allclose(pipe.engine.finish(ours, codes), complete, atol=1e-5, rtol=0)


def test_states_and_requests_do_not_disturb_each_other(pipe):
    engine = _engine(pipe)

    def two_steps(label: int) -> np.ndarray:
        state = engine.begin(np.array([label]))
        engine.step(state, 0, None)
        return engine.step(state, 1, _random_codes(pipe, 0, 1))

    alone, request = two_steps(4), pipe.generate([6], seeds=1)
    first, second = engine.begin(np.array([4])), engine.begin(np.array([8]))
    engine.step(first, 0, None)
    engine.step(second, 0, None)
    _assert_same(pipe.generate([6], seeds=1), request)
    other = engine.step(second, 1, _random_codes(pipe, 0, 1))
    np.testing.assert_array_equal(engine.step(first, 1, _random_codes(pipe, 0, 1)), alone)
    assert np.abs(other - alone).max() > 1e-3  # another class gives other logits


def test_codes_need_not_lie_in_order(pipe):
    engine, codes = _engine(pipe), _random_codes(pipe, 0, 4)
    plain, strided = engine.begin(np.array([1, 2])), engine.begin(np.array([1, 2]))
    engine.step(plain, 0, None)
    engine.step(strided, 0, None)
    expected = engine.step(plain, 1, np.ascontiguousarray(codes[::2]))
    np.testing.assert_array_equal(engine.step(strided, 1, codes[::2]), expected)


# ---- buffers that stay where they are --------------------------------------------------------------------------------


def test_requests_on_the_same_buffers_leave_nothing_behind(tiny_bundle):
    """Classes, seeds and all settings change between requests of one batch size, in two orders."""
    three = [name for name, request in REQUESTS.items() if len(request["labels"]) == 3]
    assert len(three) >= 6
    forward, backward = _load(tiny_bundle), _load(tiny_bundle)
    first = {name: _ask(forward, REQUESTS[name]) for name in three}
    second = {name: _ask(backward, REQUESTS[name]) for name in reversed(three)}
    for name in three:
        _assert_same(first[name], second[name])
    assert len({_tokens(out).tobytes() for out in first.values()}) == len(three)


@pytest.mark.parametrize("read_before", [True, False], ids=["read-before", "read-after"])
def test_a_result_is_the_callers_to_keep(pipe, read_before):
    expected = pipe.generate([1, 2], seeds=3)
    kept = _tokens(expected).copy(), expected.pixels.copy(), [np.array(image) for image in expected.images]
    previews: list[Preview] = []
    first = pipe.generate([1, 2], seeds=3, on_scale=previews.append)
    heard = [(preview.tokens_Bn.copy(), preview.f_hat_BChh.copy()) for preview in previews]
    if read_before:
        assert first.pixels is first.pixels
        assert first.images is first.images
    other = pipe.generate([8, 9], seeds=77, on_scale=lambda preview: None)
    assert (_tokens(other) != kept[0]).any()
    pipe.decode(other.tokens)
    np.testing.assert_array_equal(_tokens(first), kept[0])
    np.testing.assert_array_equal(first.pixels, kept[1])
    for image, before in zip(first.images, kept[2], strict=True):
        np.testing.assert_array_equal(np.asarray(image), before)
    for preview, (tokens, f_hat) in zip(previews, heard, strict=True):
        np.testing.assert_array_equal(preview.tokens_Bn, tokens)
        np.testing.assert_array_equal(preview.f_hat_BChh, f_hat)


def test_writing_into_a_result_changes_no_other(pipe):
    previews: list[Preview] = []
    out = pipe.generate([1, 2], seeds=3, on_scale=previews.append)
    expected = _tokens(out).copy(), out.pixels.copy()
    for array in (*out.tokens, out.pixels, *(preview.tokens_Bn for preview in previews)):
        array[...] = 0
    for preview in previews:
        preview.f_hat_BChh[...] = np.nan
    again = pipe.generate([1, 2], seeds=3)
    np.testing.assert_array_equal(_tokens(again), expected[0])
    np.testing.assert_array_equal(again.pixels, expected[1])


def test_arrays_that_are_decoded_and_encoded_are_the_callers(pipe):
    state = pipe.engine.begin(np.array([1]))
    logits = pipe.engine.step(state, 0, None)
    kept = logits.copy()
    pipe.engine.step(state, 1, _random_codes(pipe, 0, 1))
    np.testing.assert_array_equal(logits, kept)
    f_hats = np.random.default_rng(0).standard_normal((2, 1, 32, 4, 4), dtype=np.float32)
    first = pipe.engine.decode(f_hats[0])
    kept = first.copy()
    assert (pipe.engine.decode(f_hats[1]) != kept).any()
    np.testing.assert_array_equal(first, kept)


def test_one_batch_size_is_kept_on_a_cpu_and_release_gives_it_back(tiny_bundle):
    pipe = _load(tiny_bundle)
    slots = _engine(pipe)._slots
    alone = pipe.generate([1], seeds=1)
    for labels in ([1, 2], [1, 2, 3], [4]):
        pipe.generate(labels, seeds=1)
        assert [slot.buffers.batch for slot in slots._slots.values()] == [len(labels)]
        assert list(slots._decode) == [len(labels)]
    _engine(pipe).release()
    assert (slots._slots, slots._decode) == ({}, {})
    _assert_same(pipe.generate([1], seeds=1), alone)


@pytest.mark.parametrize("decode_slice", [1, 2, 5])
def test_a_sliced_decoder_gives_the_same_pictures(pipe, tiny_bundle, decode_slice):
    sliced, labels = _load(tiny_bundle, decode_slice=decode_slice), [1, 2, 3]
    got, expected = (p.generate(labels, seeds=3) for p in (sliced, pipe))
    _assert_near(got, expected)  # one image takes another convolution algorithm than three
    np.testing.assert_allclose(sliced.decode(expected.tokens), pipe.decode(expected.tokens), atol=PIXELS, rtol=0)
    for ours, theirs in zip(sliced.encode(expected.pixels), pipe.encode(expected.pixels), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_map_too_large_to_count_is_decoded_in_slices(pipe, tiny_bundle, monkeypatch):
    """As 512-pixel images at a batch of 64 would be; here the limit is lowered to a map of two images."""
    limited, labels = _load(tiny_bundle), [1, 2, 3, 4, 5]
    monkeypatch.setattr("var_deploy.static_buffers._MAX_MAP_ELEMENTS", 2 * 32 * 64 * 64)
    taken: list[int] = []
    run = _engine(limited)._program._decode_map
    monkeypatch.setattr(
        _engine(limited)._program, "_decode_map", lambda f_hat_BlC: taken.append(len(f_hat_BlC)) or run(f_hat_BlC)
    )
    _assert_near(limited.generate(labels, seeds=3), pipe.generate(labels, seeds=3))
    assert taken == [2, 2, 1]


@pytest.fixture
def small(tmp_path) -> Path:
    """A bundle whose decoder compiles in seconds."""
    both = {"patch_nums": (1, 2), "vocab_size": 61}
    var = VARConfig(**both, num_classes=5, depth=1, embed_dim=64, ffn_dim=256)
    vqvae = VQVAEConfig(**both, ch=32, ch_mult=(1,), num_res_blocks=1)
    return _random_bundle(var, vqvae, tmp_path / "small")


def _random_bundle(var: VARConfig, vqvae: VQVAEConfig, out: Path) -> Path:
    models = VAR(var), VQVAE(vqvae)
    for model in models:
        randomise(model)
        model.eval().requires_grad_(False)
    return write_bundle(CheckpointPair(var, vqvae, models[0].state_dict(), models[1].state_dict()), out)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_decoder_gives_the_same_pictures(small):
    compiled, plain = (_load(small, compile_decoder=on) for on in (True, False))
    for labels in ([1], [1, 2, 3]):  # each batch size is compiled for itself
        _assert_near(compiled.generate(labels, seeds=3), plain.generate(labels, seeds=3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled:UserWarning")
def test_a_decoder_that_cannot_be_compiled_is_one_line(small, monkeypatch):
    torch.compiler.reset()  # what another test compiled would do
    compiled = _load(small, compile_decoder=True)
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    with pytest.raises(EngineError) as refusal:
        compiled.generate([1], seeds=3)
    assert re.fullmatch(
        r"compile_decoder: torch\.compile failed \(.*no-such-compiler.*\); leave the option out", str(refusal.value)
    )


def test_device_seconds_are_of_the_stages(pipe):
    settings = pipe.generate([1], seeds=1)
    engine = _engine(pipe)
    request = np.array([1]), [1], _settings_of(pipe)
    with_decoder, without = engine.device_seconds(*request), engine.device_seconds(*request, decode=False)
    stages = [name for name in settings.timings if name not in ("upload", "download")]
    assert list(with_decoder) == stages
    assert list(without) == [name for name in stages if name != "decode"]
    assert min(with_decoder.values()) >= 0
    _assert_same(pipe.generate([1], seeds=1), settings)


def _settings_of(pipe: Pipeline) -> Any:
    return schedules.settings(pipe.bundle.manifest)


# ---- previews --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["largest-seeds", "one-guided-scale", "begins-with-zeros", "smooth"])
def test_previews_are_those_of_the_onnx_engine(pipe, onnx, name):
    ours: list[Preview] = []
    theirs: list[Preview] = []
    out = _ask(pipe, REQUESTS[name], on_scale=ours.append)
    _ask(onnx, REQUESTS[name], on_scale=theirs.append)
    assert [preview.scale for preview in ours] == [preview.scale for preview in theirs] == [0, 1, 2, 3]
    assert {preview.num_scales for preview in ours} == {4}
    for k, (got, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert got.tokens_Bn.dtype == np.int64
        np.testing.assert_array_equal(got.tokens_Bn, expected.tokens_Bn, err_msg=f"scale {k}")
        np.testing.assert_array_equal(got.tokens_Bn, out.tokens[k])
        assert got.f_hat_BChh.dtype == np.float32
        # Sums of codes in another order; of a smooth mixture's codes, whose rounding τ magnifies.
        atol = 1e-3 if name == "smooth" else 1e-4
        np.testing.assert_allclose(got.f_hat_BChh, expected.f_hat_BChh, atol=atol, rtol=0, err_msg=f"scale {k}")
    for image, last in zip(out.images, ours[-1].images, strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(last))


def test_a_listener_may_decode_and_encode_what_it_likes(pipe):
    request = REQUESTS["defaults"]
    expected = _ask(pipe, request)
    shown: list[Any] = []

    def look(preview: Preview) -> None:
        shown.append(preview.images)
        pipe.decode([np.full((5, n), preview.scale) for n in (1, 4, 9, 16)])  # another batch size
        pipe.encode(np.full((1, 3, 64, 64), 0.5, np.float32))
        state = pipe.engine.begin(np.array([1, 2, 3]))
        pipe.engine.step(state, 0, None)

    _assert_same(_ask(pipe, request, on_scale=look), expected)
    assert len(shown) == 4
    for image, last in zip(expected.images, shown[-1], strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(last))
    _assert_same(_ask(pipe, request), expected)


def test_a_preview_may_be_looked_at_after_the_request(pipe):
    previews: list[Preview] = []
    out = pipe.generate([4, 2], seeds=6, on_scale=previews.append)
    pipe.generate([1], seeds=7)
    for k, preview in enumerate(previews):
        shown = np.stack([np.asarray(image).transpose(2, 0, 1) for image in preview.images]) / 255
        # Half a step of 1/255, and f_hat summed in another order.
        np.testing.assert_allclose(shown, pipe.decode(out.tokens[: k + 1]), atol=0.5 / 255 + PIXELS, rtol=0)


INSIDE = "generate: called from the on_scale of another generation; wait until that has returned"


def test_generating_inside_a_listener_is_refused(pipe):
    expected = _ask(pipe, REQUESTS["defaults"])
    refusals = []

    def generate(preview: Preview) -> None:
        with pytest.raises(EngineError) as caught:
            pipe.generate([1])
        refusals.append(str(caught.value))

    # Even so the generation that was under way comes out right.
    _assert_same(_ask(pipe, REQUESTS["defaults"], on_scale=generate), expected)
    assert refusals == [INSIDE] * 4
    with pytest.raises(EngineError) as caught:
        _ask(pipe, REQUESTS["defaults"], on_scale=lambda preview: pipe.generate([1]) and None)
    assert str(caught.value) == INSIDE
    _assert_same(_ask(pipe, REQUESTS["defaults"]), expected)


@pytest.mark.parametrize("scale", range(4))
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_in_the_listener_leaves_the_engine_usable(pipe, scale, error):
    expected = pipe.generate([2], seeds=7)
    heard = []

    def fail(preview: Preview) -> None:
        heard.append(preview.scale)
        if preview.scale == scale:
            raise error

    with pytest.raises(error):
        pipe.generate([5], seeds=1, guidance=0, on_scale=fail)
    assert heard == list(range(scale + 1))
    _assert_same(pipe.generate([2], seeds=7), expected)


# ---- threads ---------------------------------------------------------------------------------------------------------

ASKED = ["defaults", "alone", "ends-in-zeros", "unguided-alone", "smooth", "cool"]


def test_one_engine_serves_two_threads(pipe):
    one_by_one = [_ask(pipe, REQUESTS[name]) for name in ASKED]

    def ask(name: str) -> Generation:
        heard: list[Preview] = []
        out = _ask(pipe, REQUESTS[name], on_scale=heard.append if name != "alone" else None)
        pipe.decode(out.tokens)
        return out

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(ask, ASKED))
    for alone, beside in zip(one_by_one, together, strict=True):
        _assert_same(beside, alone)


def test_two_engines_run_in_two_threads(pipe, wide):
    other = wide[0]
    asked: list[tuple[Pipeline, dict[str, Any]]] = []
    for name in ("defaults", "unguided", "cool"):
        asked += [(pipe, REQUESTS[name]), (other, {**REQUESTS[name], "labels": REQUESTS[name]["labels"][:1]})]
    one_by_one = [_ask(*each) for each in asked]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda each: _ask(*each), asked))
    for alone, beside in zip(one_by_one, together, strict=True):
        _assert_same(beside, alone)


@pytest.fixture
def process_flags() -> Iterator[Callable[[], tuple[Any, ...]]]:
    """`process_flags()`: how the library's convolutions run; as PyTorch starts with, and at the end as before."""
    cudnn = torch.backends.cudnn

    def read() -> tuple[Any, ...]:
        return cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision

    kept = read()
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision = True, False, False, "tf32"
    yield read
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision = kept


def test_overlapping_decoders_leave_the_settings_of_the_process(tiny_bundle, process_flags, monkeypatch):
    """How the library's convolutions run is set for the whole process; the decoder that began first also ends first."""
    engines = [_engine(_load(tiny_bundle)) for _ in range(2)]
    inside, done = [Event(), Event()], [Event(), Event()]
    f_hat = np.zeros((1, 32, 4, 4), np.float32)

    def decode_beside(i: int) -> None:
        run = engines[i]._program._decode_map

        def wait_and_run(f_hat_BlC: torch.Tensor) -> torch.Tensor:
            inside[i].set()
            # Where decoders take turns, the other one never comes: then there is nothing to wait for.
            (done[0] if i else inside[1]).wait(2)
            return run(f_hat_BlC)

        monkeypatch.setattr(engines[i]._program, "_decode_map", wait_and_run)
        if i:
            assert inside[0].wait(60)
        engines[i].decode(f_hat)
        done[i].set()

    before = process_flags()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(decode_beside, range(2)))
    assert process_flags() == before


def test_a_request_leaves_the_settings_of_the_process(tiny_bundle, process_flags):
    before, pipe = process_flags(), _load(tiny_bundle)
    out = pipe.generate([1], on_scale=lambda preview: preview.images)
    pipe.reconstruct(out.images)
    assert process_flags() == before


# ---- weights that yield NaN ------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tiny_copy: Path, reseal: Callable[..., None]) -> Callable[[str, int, float], Path]:
    """`broken(name, entry, value)`: the tiny bundle with one entry of a weight replaced, sealed again."""

    def make(name: str, entry: int, value: float) -> Path:
        path = tiny_copy / "weights.safetensors"
        content = bytearray(path.read_bytes())
        end = 8 + int.from_bytes(content[:8], "little")
        begin = end + json.loads(content[8:end])[name]["data_offsets"][0] + 4 * entry
        content[begin : begin + 4] = np.float32(value).tobytes()
        path.write_bytes(content)
        reseal(tiny_copy, path.name)
        return tiny_copy

    return make


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("weight", "entry", "place"),
    [
        ("head.bias", 0, "scale 0: logits of image 0"),
        ("class_emb.weight", 4 * 128, "scale 0: logits of image 1"),  # of class 4, width 128
        ("class_emb.weight", 10 * 128, "scale 0: logits of image 0"),  # of the null class
        ("position", (4 + 2) * 128, "scale 2: logits of image 0"),  # positions after the first scale
    ],
    ids=["bias", "class", "null-class", "scale-2"],
)
def test_bad_weights_are_the_same_error_as_of_the_onnx_engine(broken, weight, entry, place, value):
    bundle = broken(weight, entry, value)
    for pipe in (_load(bundle), _onnx(bundle)):
        with pytest.raises(EngineError) as caught:
            pipe.generate([1, 4, 2])
        assert str(caught.value) == f"{place} hold NaN or infinity; check the bundle with verify"
        with pytest.raises(EngineError, match=place):
            pipe.generate([1, 4, 2], on_scale=lambda preview: None)
        if weight == "class_emb.weight":  # what does not need the bad numbers is drawn
            assert pipe.generate([1, 2, 3], guidance=0).pixels.shape == (3, 3, 64, 64)


def test_a_kernel_that_cannot_run_is_one_line(tiny_bundle, monkeypatch):
    """As Triton says it: its errors are no RuntimeErrors."""

    class TritonError(Exception):
        pass

    class OutOfResources(TritonError):  # noqa: N818 - its name there
        pass

    def too_large(*_: Any) -> None:
        raise OutOfResources("out of resource: shared memory, Required: 110592, Hardware limit: 101376.\nmore")

    pipe = _load(tiny_bundle)
    monkeypatch.setattr(_engine(pipe)._program, "condition", too_large)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    with pytest.raises(EngineError) as refusal:
        pipe.generate([1])
    why = "out of resource: shared memory, Required: 110592, Hardware limit: 101376."
    assert str(refusal.value) == f"cpu (NVIDIA L4): a kernel cannot run here ({why}); report it, and use device 'cpu'"


def test_a_request_after_bad_logits_is_right_again(tiny_bundle):
    pipe = _load(tiny_bundle)
    expected = pipe.generate([1, 2], seeds=4)
    bias_V = _engine(pipe)._program.transformer._head_bias_V
    with torch.inference_mode():
        kept = bias_V[7].clone()
        bias_V[7] = torch.nan
    with pytest.raises(EngineError, match=r"^scale 0: logits of image 0 hold NaN or infinity; check the bundle"):
        pipe.generate([1, 2], seeds=4)
    with torch.inference_mode():
        bias_V[7] = kept
    _assert_same(pipe.generate([1, 2], seeds=4), expected)


# ---- precisions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", INEXACT)
def test_lower_precisions_give_tokens_in_range_and_finite_pixels(pipe, tiny_bundle, precision):
    lower = _load(tiny_bundle, precision=precision)
    assert lower.engine.precision is precision
    out, exact = (p.generate([1, 2, 3], seeds=6) for p in (lower, pipe))
    for ours, theirs in zip(out.tokens, exact.tokens, strict=True):
        assert (ours.dtype, ours.shape) == (np.int64, theirs.shape)
        assert 0 <= ours.min() <= ours.max() < 256
    assert out.pixels.dtype == np.float32
    assert np.isfinite(out.pixels).all()
    assert 0 <= out.pixels.min() < out.pixels.max() <= 1
    for ours, rounded in zip(out.images, images_from_pixels(out.pixels), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(rounded))
    _assert_same(lower.generate([1, 2, 3], seeds=6), out)
    # Logits of every scale are float32 and near the exact ones, which reach 5: see the largest differences below.
    for scale, (ours, theirs) in enumerate(zip(_logits(lower), _logits(pipe), strict=True)):
        assert ours.dtype == np.float32
        limit = LOGITS[precision]
        np.testing.assert_allclose(ours, theirs, atol=limit, rtol=0, err_msg=f"scale {scale}")
        assert np.abs(ours - theirs).max() > limit / 100  # it is not float32 under another name


#: Largest difference of logits of the tiny model from float32's: twice what was measured.
LOGITS = {Precision.FP16: 4e-3, Precision.BF16: 3e-2, Precision.INT8: 4e-2, Precision.FP8: 0.16}


def _logits(pipe: Pipeline) -> list[np.ndarray]:
    """Logits of every scale, two rows, given the same codes."""
    state = pipe.engine.begin(np.array([3, 10]))
    codebook_VC = pipe.bundle.weight("quantize.embedding.weight")
    logits = [pipe.engine.step(state, 0, None)]
    for k in range(1, 4):
        n = pipe.bundle.manifest.var.tokens_per_scale[k - 1]
        codes = np.stack([codebook_VC[7 * k + np.arange(n)]] * 2)
        logits.append(pipe.engine.step(state, k, codes))
    return logits


@pytest.mark.parametrize("precision", INEXACT)
def test_smooth_previews_and_encoding_work_in_lower_precisions(tiny_bundle, precision):
    pipe = _load(tiny_bundle, precision=precision)
    heard: list[Preview] = []
    out = pipe.generate([1, 2], seeds=6, smooth=True, guidance=[1, 0, 0, 0], on_scale=heard.append)
    assert [preview.f_hat_BChh.dtype for preview in heard] == [np.dtype(np.float32)] * 4
    assert np.isfinite(out.pixels).all()
    pyramid = pipe.encode(out.images)
    assert [t.shape for t in pyramid] == [(2, 1), (2, 4), (2, 9), (2, 16)]
    assert np.isfinite(pipe.decode(pyramid)).all()


def test_eight_bit_columns_keep_their_largest_entry(tiny_bundle):
    read = {
        precision: WeightReader(
            var_deploy.bundle.Bundle.open(tiny_bundle), torch.device("cpu"), precision, reference_ops()
        )
        for precision in (Precision.INT8, Precision.FP8)
    }
    weight_KN = read[Precision.INT8].float32("blocks.0.ffn.fc1.weight")
    peak_N = weight_KN.abs().amax(0)
    for precision, reader in read.items():
        product: Any = reader.product("blocks.0.ffn.fc1")
        scale_N = (product.column_scale_N if precision is Precision.INT8 else product.column_scale_1N).flatten()
        error_KN = (product.weight_KN.float() * scale_N - weight_KN).abs()
        if precision is Precision.INT8:  # half a step of 1/127 of the column's largest
            assert (error_KN <= 0.5001 * peak_N / 127).all()
        else:  # three bits of mantissa; below 2⁻⁶ steps of 2⁻⁹, of a column scaled to 448
            assert (error_KN <= torch.maximum(weight_KN.abs() / 16, peak_N / 448 * 2**-10) * 1.0001).all()
        assert ((product.weight_KN.float() * scale_N).abs().amax(0) >= 0.999 * peak_N).all()


@pytest.fixture(scope="module")
def digits_pair() -> tuple[Path, Path]:
    checkpoints = ROOT / "train" / "checkpoints"
    return checkpoints / digits.VAR_FILE, checkpoints / digits.VQVAE_FILE


@pytest.fixture(scope="module")
def digits_bundle(digits_pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_from_checkpoint(*digits_pair, tmp_path_factory.mktemp("digits") / "bundle")


@pytest.mark.parametrize(
    ("precision", "mean_kl", "psnr"),
    [
        # Twice the largest mean KL that was measured (fp16 1e-6, bf16 7e-5, int8 1.4e-4; fp8 6.7e-3: the gate itself)
        # and a few dB less than measured (78, 60, 60, 60).
        (Precision.FP16, 2e-6, 70),
        (Precision.BF16, 1.5e-4, 55),
        (Precision.INT8, 3e-4, 55),
        pytest.param(Precision.FP8, 1e-2, 55, marks=NEEDS_FLOAT8),
    ],
)
def test_trained_weights_pass_the_fidelity_gate(digits_bundle, digits_pair, precision, mean_kl, psnr):
    parity = verify_bundle(
        digits_bundle, *digits_pair, labels=[0, 4, 9], engine="torch", device="cpu", precision=precision
    )
    assert parity.passed
    assert not parity.exact
    (rows,) = parity.scales.values()
    assert max(row.mean_kl for row in rows) <= mean_kl
    assert min(parity.decoder_psnr.values()) >= psnr
    assert parity.encoded_token_agreement == 1.0  # of one smooth picture of 30 tokens


# ---- the kernels, in Triton's interpreter ----------------------------------------------------------------------------

_INTERPRETED = """
import json, sys
import numpy as np, torch
from var_deploy.bundle import Bundle
from var_deploy.engines.torch import TorchEngine
from var_deploy.pipeline import Pipeline
from var_deploy.precision import Precision
from var_kernels import reference_ops, triton_ops

torch.set_num_threads(1)
bundle, cpu = Bundle.open(sys.argv[1]), torch.device("cpu")
for precision, requests in json.loads(sys.argv[2]).items():
    tables = triton_ops(), reference_ops()
    engines = [TorchEngine(bundle, cpu, precision=Precision(precision), ops=ops) for ops in tables]
    for request in requests:
        ours, theirs = (Pipeline(bundle, engine).generate(**request) for engine in engines)
        pixels = ours.pixels
        shown = np.stack([np.asarray(image) for image in ours.images]).transpose(0, 3, 1, 2)
        print(json.dumps({
            "kernels": [engine._ops.name for engine in engines],
            "tokens": [np.concatenate(out.tokens, 1).tolist() for out in (ours, theirs)],
            "finite": bool(np.isfinite(pixels).all()),
            "pixel_error": float(np.abs(pixels - theirs.pixels).max()),
            "rounded": bool((shown == np.rint(pixels * 255)).all()),
        }))
"""


@pytest.mark.slow
def test_the_kernels_draw_what_their_references_draw(tmp_path):
    """Nearly all is one picture at a time: the interpreter takes a second per kernel."""
    var = VARConfig(
        patch_nums=(1, 2, 3), vocab_size=45, z_channels=32, num_classes=5, depth=1, embed_dim=64, ffn_dim=80
    )
    vqvae = VQVAEConfig(
        patch_nums=(1, 2, 3), vocab_size=45, z_channels=32, ch=32, ch_mult=(1,), num_res_blocks=1, num_phi=2
    )
    bundle = _random_bundle(var, vqvae, tmp_path / "bundle")
    drawn = {"labels": [3], "seeds": 2**64 - 1, "guidance": [1.0, 0.5, 0], "top_k": 20, "top_p": 0.9}
    requests = {
        Precision.FP32: [
            {"labels": [1, 4], "top_k": 1, "guidance": 2.0},
            drawn,
            {"labels": [2], "seeds": 5, "smooth": True, "guidance": 0, "temperature": 0.7},
        ],
        Precision.FP16: [drawn],
    }
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "export", "kernels", "train"))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", _INTERPRETED, str(bundle), json.dumps(requests)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert ran.returncode == 0, ran.stderr
    results = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(results) == 4
    # Sums in another order; smooth codes are magnified by τ; float16 has steps of 5e-4 near 1 and several layers.
    for result, limit in zip(results, [PIXELS, PIXELS, SMOOTH_PIXELS, 2e-2], strict=True):
        assert result["kernels"] == ["triton", "reference"]
        assert result["tokens"][0] == result["tokens"][1]
        assert result["finite"]
        assert result["pixel_error"] <= limit
        assert result["rounded"]
    shutil.rmtree(bundle)
