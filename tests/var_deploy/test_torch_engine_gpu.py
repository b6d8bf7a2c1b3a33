"""The torch engine on a GPU: captured graphs do what their stages do, again and again, and nothing grows or leaks.

The oracle is the onnx engine on a CPU in float32, and for graphs the same stages launched one by one.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import var_deploy
from var_deploy.config import VARConfig, VQVAEConfig
from var_deploy.engines.engine import LoopForm
from var_deploy.engines.torch import TorchEngine
from var_deploy.errors import EngineError
from var_deploy.images import images_from_pixels
from var_deploy.pipeline import Generation, Pipeline, Preview
from var_deploy.precision import Precision
from var_deploy.schedules import settings as checked_settings
from var_deploy.static_buffers import decode_specs, decoder_activation_bytes, generation_bytes, nbytes
from var_export.bundle import bundle_from_checkpoint, write_bundle
from var_export.verify import verify_bundle
from var_train import VAR, VQVAE, digits
from var_train.checkpoint import CheckpointPair
from var_train.presets import SCALES_256, randomise

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
K = 4  #: scales of the tiny model
CHECKPOINTS = Path(__file__).parents[2] / "train" / "checkpoints"

#: Pixels of two float32 implementations, which add up in different orders; golden vectors agree to the same bound.
PIXELS = 1e-4
#: The smooth mixture divides logits by τ ≥ 0.0135, which magnifies their rounding.
SMOOTH_PIXELS = 1e-3
#: Logits on two kinds of processors: what `verify` allows.
LOGITS = 1e-3


Load = Callable[..., Pipeline]


@pytest.fixture(scope="module")
def load(tiny_bundle: Path) -> Iterator[Load]:
    """`load(precision)`: the tiny model on the GPU, loaded once; `fresh=True` loads it anew."""
    loaded: dict[Any, Pipeline] = {}

    def get(precision: str = "fp32", *, fresh: bool = False, **options: Any) -> Pipeline:
        def new() -> Pipeline:
            return var_deploy.load(tiny_bundle, engine="torch", device="cuda", precision=precision, **options)

        if fresh:
            return new()
        key = precision, tuple(sorted(options.items()))
        if key not in loaded:
            loaded[key] = new()
        return loaded[key]

    yield get
    loaded.clear()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def onnx(tiny_bundle: Path) -> Pipeline:
    return var_deploy.load(tiny_bundle, engine="onnx", device="cpu")


def _engine(pipe: Pipeline) -> TorchEngine:
    assert isinstance(pipe.engine, TorchEngine)
    return pipe.engine


def _tokens(out: Generation) -> np.ndarray:
    return np.concatenate(out.tokens, axis=1)


def _pictures(out: Generation) -> np.ndarray:
    return np.stack([np.asarray(image) for image in out.images])


def _ask(pipe: Pipeline, request: dict[str, Any], **more: Any) -> Generation:
    arguments = {**request, **more}
    return pipe.generate(arguments.pop("labels"), **arguments)


def _assert_same(got: Generation, expected: Generation) -> None:
    """Bit for bit."""
    np.testing.assert_array_equal(_tokens(got), _tokens(expected))
    np.testing.assert_array_equal(got.pixels, expected.pixels)
    np.testing.assert_array_equal(_pictures(got), _pictures(expected))


def _memory() -> tuple[int, int]:
    """(allocated, reserved) bytes of PyTorch on the GPU, everything in flight done and garbage collected."""
    gc.collect()
    torch.cuda.synchronize(GPU)
    return torch.cuda.memory_allocated(GPU), torch.cuda.memory_reserved(GPU)


# ---- float32 on the GPU is float32 -----------------------------------------------------------------------------------

REQUESTS: dict[str, dict[str, Any]] = {
    "defaults": {"labels": [1, 2, 3], "seeds": 5},
    "alone": {"labels": [7], "seeds": 2**64 - 1},
    "largest-seeds": {"labels": [7, 0, 7], "seeds": [2**64 - 1, 2**63, 2**32]},
    "greedy": {"labels": [9, 0, 4], "top_k": 1, "top_p": 0},
    "unguided": {"labels": [3, 3, 8, 1, 0], "seeds": 11, "guidance": 0},
    "ends-in-zeros": {"labels": [4, 1, 5], "seeds": 21, "guidance": [0.5, 2.0, 0, 0]},
    "begins-with-zeros": {"labels": [4, 1], "seeds": 23, "guidance": [0, 0, 0, 4.0]},
    "cool": {"labels": [1, 8], "seeds": 31, "temperature": 0.7},
    "warm": {"labels": [1, 8, 2], "seeds": 32, "temperature": 1.5, "top_k": 0, "top_p": 0},
    "filtered": {"labels": [6, 6], "seeds": 41, "top_k": 20, "top_p": 0.8},
    "smooth": {"labels": [9, 2, 4], "seeds": 51, "smooth": True},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_every_request_gets_the_tokens_of_the_onnx_engine(load, onnx, name):
    got, expected = _ask(load(), REQUESTS[name]), _ask(onnx, REQUESTS[name])
    np.testing.assert_array_equal(_tokens(got), _tokens(expected))
    atol = SMOOTH_PIXELS if name == "smooth" else PIXELS
    np.testing.assert_allclose(got.pixels, expected.pixels, atol=atol, rtol=0)
    assert got.pixels.dtype == np.float32
    for ours, rounded in zip(got.images, images_from_pixels(got.pixels), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(rounded))


@pytest.mark.parametrize("name", ["tiny", "shared_aln"])
def test_logits_of_every_scale_are_the_golden_ones(name, request):
    golden = request.getfixturevalue(f"{name}_pair")[0]
    bundle: Path = request.getfixturevalue(f"{name}_bundle")
    pipe = var_deploy.load(bundle, engine="torch", device="cuda", precision="fp32")
    config, engine, labels = pipe.bundle.manifest.var, pipe.engine, golden.config["labels"]
    codebook_VC = pipe.bundle.weight("quantize.embedding.weight")
    state, codes_RnC = engine.begin(np.array(labels + [config.null_class] * len(labels))), None
    for k in range(config.num_scales):
        logits_RnV = engine.step(state, k, codes_RnC)
        np.testing.assert_allclose(logits_RnV, golden[f"logits.{k}"], atol=LOGITS, rtol=0, err_msg=f"scale {k}")
        codes_RnC = np.tile(codebook_VC[golden[f"tokens.{k}"]], (2, 1, 1))
    pixels = engine.decode(engine.finish(state, codes_RnC[: len(labels)]))
    np.testing.assert_allclose(pixels, golden["image"], atol=LOGITS, rtol=0)
    out = pipe.generate(labels, guidance=golden.config["cfg"], top_k=1, top_p=0)
    for k, tokens_Bn in enumerate(out.tokens):
        np.testing.assert_array_equal(tokens_Bn, golden[f"tokens.{k}"], err_msg=f"scale {k}")
    encoded = pipe.encode((golden.test_image() + 1) / 2)
    np.testing.assert_array_equal(np.concatenate(encoded, axis=1), golden["encoded_tokens"])


def test_dropped_rows_leave_the_others_alone(load):
    pipe = load()
    engine, config = _engine(pipe), pipe.bundle.manifest.var
    dropping, keeping = (engine.begin(np.array([1, 2, 3, 10, 10, 10])) for _ in range(2))
    codes_6nC = None
    for k, rows in enumerate([6, 6, 3, 1]):
        got = engine.step(dropping, k, None if codes_6nC is None else codes_6nC[:rows])
        expected = engine.step(keeping, k, codes_6nC)
        # Products of fewer rows may add up in another order: float32 rounding of logits up to 5.
        np.testing.assert_allclose(got, expected[:rows], atol=1e-4, rtol=0, err_msg=f"scale {k}")
        shape = (6, config.tokens_per_scale[k], config.z_channels)
        codes_6nC = np.random.default_rng(k).standard_normal(shape, dtype=np.float32)
    f_hats = engine.finish(dropping, codes_6nC[:1]), engine.finish(keeping, codes_6nC)[:1]
    np.testing.assert_allclose(*f_hats, atol=1e-5, rtol=0)


def test_a_gpu_is_taken_where_one_is_there(tiny_bundle):
    engine = _engine(var_deploy.load(tiny_bundle))
    assert (engine.name, engine.precision, engine.device) == ("torch", Precision.BF16, GPU)
    assert engine._ops.name == "triton"


@pytest.mark.parametrize("M", [1, 2, 16, 100, 680])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_the_librarys_gelu_is_the_tanh_form(dtype, M):
    """Which the exact form is not: the two differ by 5·10⁻⁴ around ±2."""
    D, N = 128, 512
    x, weight, bias = (torch.randn(*shape, device=GPU) for shape in ((M, D), (D, N), (N,)))
    x, weight, bias = x.to(dtype), (weight / D**0.5).to(dtype), bias.to(dtype)
    out = torch.full((M, N), torch.nan, dtype=dtype, device=GPU)
    with torch.inference_mode():
        torch._addmm_activation(bias, x, weight, use_gelu=True, out=out)
    product = torch.addmm(bias.double(), x.double(), weight.double())
    expected, exact = F.gelu(product, approximate="tanh"), F.gelu(product)
    error = (out.double() - expected).abs().max().item()
    # float32: rounding of 128 products. Lower: one rounding of values up to 6, and the product's rounding before it.
    limit = {torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}[dtype]
    assert error <= limit, f"largest difference {error:.1e}"
    if dtype is torch.float32:
        assert (exact - expected).abs().max() > 10 * limit  # so the two forms are told apart
        assert (out.double() - exact).abs().max() > 10 * limit


# ---- graphs ----------------------------------------------------------------------------------------------------------

GRAPH_REQUESTS = ["defaults", "alone", "unguided", "ends-in-zeros", "begins-with-zeros", "warm", "smooth"]


def _eager(pipe: Pipeline, request: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, pictures, pixels) of the stages launched one by one on the buffers that the graphs were captured on."""
    engine, manifest, B = _engine(pipe), pipe.bundle.manifest, len(request["labels"])
    names = ("guidance", "top_k", "top_p", "smooth", "temperature")
    settings = checked_settings(manifest, **{name: request.get(name) for name in names})
    seeds = var_deploy.request.seed_list(request.get("seeds", 0), B)
    with engine._running():
        slot, _ = engine._slots.ready(B, LoopForm.of(settings))
        buffers, decode = slot.buffers, slot.decode
        buffers.tokens_BL.fill_(-1)
        decode.pixels_B3RR.fill_(torch.nan)
        buffers.fill(np.array(request["labels"]), seeds, settings)
        buffers.inputs.upload()
        for stage in engine._program.stages(buffers, decode, LoopForm.of(settings)):
            stage.launch()
        torch.cuda.synchronize(GPU)
        return (
            buffers.tokens_BL[:B].cpu().numpy(),
            decode.bytes_BRR3[:B].cpu().numpy(),
            decode.pixels_B3RR[:B].cpu().numpy(),
        )


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("name", GRAPH_REQUESTS)
def test_a_replay_equals_its_stages_launched_one_by_one(load, name, precision):
    pipe, request = load(precision), REQUESTS[name]
    replayed = _ask(pipe, request)
    tokens, pictures, pixels = _eager(pipe, request)
    np.testing.assert_array_equal(_tokens(replayed), tokens)
    np.testing.assert_array_equal(_pictures(replayed), pictures)
    np.testing.assert_array_equal(replayed.pixels, pixels)
    _assert_same(_ask(pipe, request), replayed)


def test_given_tokens_drafts_and_schedules_are_captured_too(load, onnx):
    """On a batch that a bucket pads, after and before requests that give nothing, with and without previews."""
    pipe = load(Precision.FP32)
    images = np.random.default_rng(0).random((3, 3, 64, 64), dtype=np.float32)
    edit: dict[str, Any] = {"box": (0, 0, 0.5, 1), "labels": [1, 2, 3], "seeds": 3, "guidance": [0, 1, 2, 0]}
    scheduled: dict[str, Any] = {
        "labels": [1, 2, 3],
        "seeds": 3,
        "top_k": [1, 5, 900, 3],
        "temperature": [1, 2, 0.5, 1],
    }
    for _ in range(2):
        np.testing.assert_array_equal(_tokens(pipe.edit(images, **edit)), _tokens(onnx.edit(images, **edit)))
        np.testing.assert_array_equal(_tokens(pipe.generate(**scheduled)), _tokens(onnx.generate(**scheduled)))
    heard: list[Preview] = []
    staged = pipe.edit(images, **edit, on_scale=heard.append)
    np.testing.assert_array_equal(_tokens(staged), _tokens(onnx.edit(images, **edit)))
    assert [preview.scale for preview in heard] == list(range(K))
    for smooth in (False, [True, True, False, False]):
        both = pipe.generate([1, 2, 3], seeds=3, refine=pipe, draft_scales=2, smooth=smooth)
        _assert_same(both, pipe.generate([1, 2, 3], seeds=3, smooth=smooth))


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("name", GRAPH_REQUESTS)
def test_a_graph_per_stage_gives_the_picture_of_the_whole_graph(load, name, precision):
    pipe, request = load(precision), REQUESTS[name]
    heard: list[Preview] = []
    whole, staged = _ask(pipe, request), _ask(pipe, request, on_scale=heard.append)
    _assert_same(staged, whole)
    assert [preview.scale for preview in heard] == list(range(K))
    for k, preview in enumerate(heard):
        np.testing.assert_array_equal(preview.tokens_Bn, whole.tokens[k])
        assert np.isfinite(preview.f_hat_BChh).all()
    for image, last in zip(whole.images, heard[-1].images, strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(last))
    assert list(whole.timings) == ["upload", "replay", "download"]
    later = [f"scale_{k:02d}" for k in range(1, K)]
    assert list(staged.timings) == ["upload", "condition", "scale_00", "draw", *later, "finish", "decode", "download"]
    assert all(seconds >= 0 for out in (whole, staged) for seconds in out.timings.values())
    assert whole.timings["replay"] > 0


def test_previews_are_those_of_the_onnx_engine(load, onnx):
    ours: list[Preview] = []
    theirs: list[Preview] = []
    _ask(load(), REQUESTS["ends-in-zeros"], on_scale=ours.append)
    _ask(onnx, REQUESTS["ends-in-zeros"], on_scale=theirs.append)
    for got, expected in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(got.tokens_Bn, expected.tokens_Bn)
        np.testing.assert_allclose(got.f_hat_BChh, expected.f_hat_BChh, atol=PIXELS, rtol=0)


@pytest.mark.parametrize("staged", [False, True], ids=["whole", "staged"])
def test_every_number_of_guided_scales_has_its_graph(load, onnx, staged):
    pipe = load(fresh=True)
    for guided in range(K + 1):
        request = {"labels": [1, 4], "seeds": 3, "guidance": [1.5] * guided + [0] * (K - guided), "top_k": 60}
        heard: list[Preview] = []
        got = _ask(pipe, request, on_scale=heard.append if staged else None)
        expected = _ask(onnx, request)
        np.testing.assert_array_equal(_tokens(got), _tokens(expected), err_msg=f"{guided} guided scales")
        np.testing.assert_allclose(got.pixels, expected.pixels, atol=PIXELS, rtol=0)
    graphs = {key for slot in _engine(pipe)._slots._slots.values() for key in slot.graphs}
    assert graphs == {(guided, staged, True) for guided in range(K + 1)}


# ---- buckets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["greedy", "defaults"])
def test_an_image_alone_equals_itself_in_a_padded_batch(load, name):
    """Three images run in a bucket of four; the spare one must not matter."""
    pipe = load(fresh=True)
    request = REQUESTS[name]
    batch = _ask(pipe, request)
    assert {slot.buffers.batch for slot in _engine(pipe)._slots._slots.values()} == {4}
    assert [t.shape[0] for t in batch.tokens] == [3] * K
    assert batch.pixels.shape == (3, 3, 64, 64)
    assert len(batch.images) == 3
    for i, label in enumerate(request["labels"]):
        alone = _ask(pipe, {**request, "labels": [label], "seeds": [request.get("seeds", 0) + i]})
        np.testing.assert_array_equal(_tokens(alone)[0], _tokens(batch)[i])
        # Another number of rows may add up in another order, and convolutions take another algorithm.
        np.testing.assert_allclose(alone.pixels[0], batch.pixels[i], atol=PIXELS, rtol=0)


def test_what_ran_in_the_spare_rows_before_does_not_matter(load):
    pipe = load("bf16", fresh=True)
    first = pipe.generate([1, 2, 3], seeds=1, guidance=3.0)
    full = pipe.generate([9, 8, 7, 6], seeds=50, guidance=8.0, temperature=2.0, top_k=0, top_p=0)
    assert full.pixels.shape[0] == 4
    _assert_same(pipe.generate([1, 2, 3], seeds=1, guidance=3.0), first)


def test_batches_run_in_the_next_bucket(load):
    slots = _engine(load())._slots
    assert {batch: slots._bucket(batch) for batch in (1, 3, 65)} == {1: 1, 3: 4, 65: 128}


def test_a_batch_beyond_the_last_bucket_is_drawn_alike(load):
    pipe = load()
    labels = [i % 10 for i in range(65)]
    batch = pipe.generate(labels, seeds=100, top_k=1, top_p=0)
    for i in (0, 63, 64):
        alone = pipe.generate([labels[i]], seeds=100 + i, top_k=1, top_p=0)
        np.testing.assert_array_equal(_tokens(alone)[0], _tokens(batch)[i])
    _engine(pipe).release()


@pytest.mark.parametrize("decode_slice", [1, 3])
def test_a_sliced_decoder_gives_the_same_pictures(load, decode_slice):
    whole, sliced = load(), load(fresh=True, decode_slice=decode_slice)
    got, expected = (_ask(pipe, REQUESTS["unguided"]) for pipe in (sliced, whole))
    np.testing.assert_array_equal(_tokens(got), _tokens(expected))
    np.testing.assert_allclose(got.pixels, expected.pixels, atol=PIXELS, rtol=0)


# ---- a thousand requests ---------------------------------------------------------------------------------------------


def _changing_request(i: int) -> dict[str, Any]:
    """Request i of a long run: all combinations of two batch sizes and two graphs come within the first ten."""
    draw = np.random.default_rng(i)
    return {
        "labels": draw.integers(0, 10, (1, 3)[i % 2]).tolist(),
        "seeds": int(draw.integers(0, 2**63)),
        "guidance": (0.0, float(draw.uniform(0.1, 6)))[i // 2 % 2],
        "top_k": int(draw.integers(0, 300)),
        "top_p": float(draw.uniform(0, 1)),
        "temperature": float(draw.uniform(0.3, 3)),
    }


def test_a_thousand_changing_requests_leave_no_memory_and_no_trace(load):
    pipe = load("bf16", fresh=True)
    kept: dict[int, tuple[dict[str, Any], np.ndarray, np.ndarray]] = {}
    after_ten = _memory()
    for i in range(1000):
        request = _changing_request(i)
        out = _ask(pipe, request)
        if i % 77 == 7:
            kept[i] = request, _tokens(out), _pictures(out)
        del out
        if i == 9:
            after_ten = _memory()
        elif i > 9 and i % 100 == 0:
            assert _memory() == after_ten, f"after {i} requests"
    assert _memory() == after_ten
    assert len({tokens.tobytes() for _, tokens, _ in kept.values()}) == len(kept) == 13
    fresh = load("bf16", fresh=True)
    for i, (request, tokens, pictures) in kept.items():
        out = _ask(fresh, request)
        np.testing.assert_array_equal(_tokens(out), tokens, err_msg=f"request {i}")
        # The library times its convolution algorithms anew, and may settle on another: bfloat16 rounding of pixels.
        difference = np.abs(_pictures(out).astype(int) - pictures)
        assert difference.max() <= 16, f"request {i}: largest difference {difference.max()}"


def test_staged_requests_leave_no_memory_either(load):
    pipe = load("bf16", fresh=True)

    def listen(preview: Preview) -> None:
        assert len(preview.images) == 2

    sizes = []
    for seed in range(30):
        pipe.generate([1, 2], seeds=seed, on_scale=listen)
        sizes.append(_memory())
    assert len(set(sizes[5:])) == 1


def test_release_gives_everything_back(load):
    pipe = load("bf16", fresh=True)
    engine, sizes = _engine(pipe), []
    first = pipe.generate([1, 2, 3], seeds=4)
    expected = _tokens(first), _pictures(first)
    del first
    for _ in range(3):
        used = _memory()[0]
        engine.release()
        sizes.append(_memory()[0])
        assert sizes[-1] < used
        again = pipe.generate([1, 2, 3], seeds=4)
        np.testing.assert_array_equal(_tokens(again), expected[0])
        del again
    assert len(set(sizes)) == 1


def test_buffers_are_what_the_plan_says(load):
    pipe = load("bf16")
    engine, manifest = _engine(pipe), pipe.bundle.manifest

    def requested() -> int:
        return torch.cuda.memory_stats(GPU)["requested_bytes.all.current"]  # before the allocator rounds up

    with engine._running():
        before = requested()
        buffers = engine._slots.buffers(8, guided=True, smooth=True)
        allocated = requested() - before
    planned = generation_bytes(manifest.var, manifest.vqvae, 8, Precision.BF16, smooth=True)
    planned -= decoder_activation_bytes(manifest.vqvae, 8, Precision.BF16)
    planned -= nbytes(decode_specs(manifest.vqvae, 8))  # which a slot shares with `decode`
    assert buffers.rows == 16
    assert planned <= allocated < planned + 16 * 8  # eight packed tensors, each aligned to 16 bytes


def test_device_seconds(load):
    engine = _engine(load("bf16"))
    settings = checked_settings(load("bf16").bundle.manifest)
    request = np.array([1, 2]), [1, 2], settings
    assert list(engine.device_seconds(*request)) == ["replay"]
    assert list(engine.device_seconds(*request, decode=False)) == ["replay"]
    staged = engine.device_seconds(*request, staged=True)
    assert list(staged) == ["condition", "scale_00", "draw", "scale_01", "scale_02", "scale_03", "finish", "decode"]
    assert "decode" not in engine.device_seconds(*request, staged=True, decode=False)
    assert all(seconds > 0 for seconds in staged.values())


# ---- listeners and errors --------------------------------------------------------------------------------------------


def test_a_listener_may_decode_and_encode_what_it_likes(load):
    """Also what captures new graphs in the middle of a generation."""
    pipe = load("fp32", fresh=True)
    request = REQUESTS["defaults"]
    expected = _ask(pipe, request)
    shown: list[Any] = []

    def look(preview: Preview) -> None:
        shown.append(preview.images)
        pipe.decode([np.full((2 + preview.scale, n), preview.scale) for n in (1, 4, 9, 16)])  # other batch sizes
        pipe.encode(np.full((1, 3, 64, 64), 0.5, np.float32))
        state = pipe.engine.begin(np.array([1, 2, 3]))
        pipe.engine.step(state, 0, None)

    _assert_same(_ask(pipe, request, on_scale=look), expected)
    for image, last in zip(expected.images, shown[-1], strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(last))
    _assert_same(_ask(pipe, request), expected)


def test_generating_inside_a_listener_is_refused_and_harms_nothing(load):
    pipe = load()
    expected = _ask(pipe, REQUESTS["defaults"])

    def generate(preview: Preview) -> None:
        pipe.generate([1])

    with pytest.raises(EngineError, match=r"^generate: called from the on_scale of another generation"):
        _ask(pipe, REQUESTS["defaults"], on_scale=generate)
    _assert_same(_ask(pipe, REQUESTS["defaults"]), expected)


@pytest.mark.parametrize("scale", range(K))
def test_an_error_in_the_listener_leaves_the_engine_usable(load, scale):
    pipe = load()
    expected = pipe.generate([2], seeds=7)

    def fail(preview: Preview) -> None:
        if preview.scale == scale:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe.generate([5], seeds=1, on_scale=fail)
    _assert_same(pipe.generate([2], seeds=7), expected)


def test_a_result_is_the_callers_to_keep(load):
    """Pixels stay on the GPU until they are read, which may be after other requests and in another thread."""
    pipe = load()
    expected = pipe.generate([1, 2], seeds=3)
    kept = _tokens(expected).copy(), expected.pixels.copy(), _pictures(expected).copy()
    unread = pipe.generate([1, 2], seeds=3)
    other = pipe.generate([8, 9], seeds=77)
    assert (_tokens(other) != kept[0]).any()
    _engine(pipe).release()
    pipe.generate([4, 5], seeds=78)
    with ThreadPoolExecutor(1) as pool:
        pixels = pool.submit(lambda: unread.pixels).result()
    np.testing.assert_array_equal(_tokens(unread), kept[0])
    np.testing.assert_array_equal(pixels, kept[1])
    np.testing.assert_array_equal(_pictures(unread), kept[2])


@pytest.mark.parametrize("staged", [False, True], ids=["whole", "staged"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bad_logits_are_an_error_and_the_next_request_works(load, precision, staged):
    pipe = load(precision)
    listen = (lambda preview: None) if staged else None
    expected = pipe.generate([1, 2, 3], seeds=4, on_scale=listen)
    embedding = _engine(pipe)._program.transformer._class_embedding
    torch.cuda.synchronize(GPU)
    with torch.inference_mode():
        kept = embedding[2].clone()
        embedding[2, 5] = torch.nan
    torch.cuda.synchronize(GPU)
    try:
        with pytest.raises(EngineError) as caught:
            pipe.generate([1, 2, 3], seeds=4, on_scale=listen)
    finally:
        with torch.inference_mode():
            embedding[2] = kept
        torch.cuda.synchronize(GPU)
    assert str(caught.value) == "scale 0: logits of image 1 hold NaN or infinity; check the bundle with verify"
    _assert_same(pipe.generate([1, 2, 3], seeds=4, on_scale=listen), expected)


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_two_engines_in_two_threads_do_what_they_do_alone(load):
    pipes = load("fp32", fresh=True), load("bf16", fresh=True)
    requests = [_changing_request(i) for i in range(50)]

    def run(pipe: Pipeline) -> list[tuple[np.ndarray, np.ndarray]]:
        results = []
        for i, request in enumerate(requests):
            out = _ask(pipe, request, on_scale=(lambda preview: None) if i % 7 == 3 else None)
            results.append((_tokens(out), _pictures(out)))
        return results

    alone = [run(pipe) for pipe in pipes]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, pipes))
    for one_by_one, beside in zip(alone, together, strict=True):
        for i, (expected, got) in enumerate(zip(one_by_one, beside, strict=True)):
            np.testing.assert_array_equal(got[0], expected[0], err_msg=f"request {i}")
            np.testing.assert_array_equal(got[1], expected[1], err_msg=f"request {i}")


def test_engines_may_start_in_two_threads_at_once(load):
    """Captures wait for each other, and for nothing else."""
    expected = _ask(load(), REQUESTS["defaults"])

    def start(_: int) -> list[Generation]:
        pipe = load(fresh=True)
        listened = _ask(pipe, REQUESTS["defaults"], on_scale=lambda preview: preview.images)
        return [listened, _ask(pipe, REQUESTS["defaults"])]

    with ThreadPoolExecutor(2) as pool:
        results = [out for started in pool.map(start, range(2)) for out in started]
    for out in results:
        np.testing.assert_array_equal(_tokens(out), _tokens(expected))
        np.testing.assert_allclose(out.pixels, expected.pixels, atol=PIXELS, rtol=0)


def test_one_engine_serves_two_threads(load):
    pipe = load()
    names = ["defaults", "alone", "ends-in-zeros", "unguided", "smooth", "cool"] * 3
    one_by_one = [_ask(pipe, REQUESTS[name]) for name in names]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda name: _ask(pipe, REQUESTS[name]), names))
    for alone, beside in zip(one_by_one, together, strict=True):
        _assert_same(beside, alone)


# ---- precisions ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_pair() -> tuple[Path, Path]:
    return CHECKPOINTS / digits.VAR_FILE, CHECKPOINTS / digits.VQVAE_FILE


@pytest.fixture(scope="module")
def digits_bundle(digits_pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_from_checkpoint(*digits_pair, tmp_path_factory.mktemp("digits") / "bundle")


@pytest.mark.parametrize("precision", Precision)
def test_trained_weights_keep_parity_or_pass_the_fidelity_gate(digits_bundle, digits_pair, precision):
    labels = list(range(10))
    parity = verify_bundle(
        digits_bundle, *digits_pair, labels=labels, engine="torch", device="cuda", precision=precision
    )
    rows = parity.scales[precision]
    found = f"mean KL {max(row.mean_kl for row in rows):.1e}, decoder {parity.decoder_psnr[precision]:.1f} dB"
    assert parity.passed, found
    assert parity.exact is (precision is Precision.FP32)
    assert parity.encoded_token_agreement >= (1.0 if parity.exact else 0.9)  # of one smooth picture of 30 tokens


@pytest.mark.parametrize("precision", [precision for precision in Precision if not precision.exact])
def test_lower_precisions_give_the_digits_asked_for(digits_bundle, precision):
    """Most greedy tokens are the exact ones: of the first scale all ten, later ones follow from those before."""
    options = {"engine": "torch", "device": "cuda"}
    exact, lower = (var_deploy.load(digits_bundle, precision=p, **options) for p in ("fp32", precision))
    ours, theirs = (pipe.generate(list(range(10)), top_k=1, top_p=0) for pipe in (lower, exact))
    np.testing.assert_array_equal(ours.tokens[0], theirs.tokens[0])
    assert (_tokens(ours) == _tokens(theirs)).mean() > 0.5
    assert np.isfinite(ours.pixels).all()
    assert 0 <= ours.pixels.min() < ours.pixels.max() <= 1


@pytest.mark.parametrize(("precision", "atol"), [("fp32", PIXELS), ("bf16", 0.08)])
def test_a_compiled_decoder_gives_the_same_pictures(load, precision, atol):
    plain, compiled = load(precision), load(precision, fresh=True, compile_decoder=True)
    for name in ("alone", "defaults"):  # two batch sizes, each compiled for itself
        got, expected = (_ask(pipe, REQUESTS[name]) for pipe in (compiled, plain))
        np.testing.assert_array_equal(_tokens(got), _tokens(expected))
        # bfloat16 has steps of 4·10⁻³ near 1, and fused operations round less often.
        np.testing.assert_allclose(got.pixels, expected.pixels, atol=atol, rtol=0)
    np.testing.assert_allclose(compiled.decode(got.tokens), plain.decode(got.tokens), atol=atol, rtol=0)


# ---- too little memory -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def heavy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few weights, but pictures of 256 px: its batches need gigabytes."""
    both: dict[str, Any] = {"patch_nums": SCALES_256, "vocab_size": 4096, "z_channels": 32}
    var = VARConfig(**both, num_classes=10, depth=2, embed_dim=256, ffn_dim=1024)
    vqvae = VQVAEConfig(**both, ch=160, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1)
    models = VAR(var), VQVAE(vqvae)
    for model in models:
        randomise(model)
        model.eval().requires_grad_(False)
    pair = CheckpointPair(var, vqvae, models[0].state_dict(), models[1].state_dict())
    return write_bundle(pair, tmp_path_factory.mktemp("heavy") / "bundle")


@pytest.fixture
def fill_memory() -> Iterator[Callable[[int], None]]:
    """`fill_memory(spare)`: takes all of the GPU's memory but `spare` bytes; 0 gives it back, as does the end."""
    held: list[torch.Tensor] = []

    def fill(spare: int) -> None:
        held.clear()
        gc.collect()
        torch.cuda.synchronize(GPU)
        torch.cuda.empty_cache()
        if spare:
            free = torch.cuda.mem_get_info(GPU)[0]
            held.append(torch.empty(free - spare, dtype=torch.uint8, device=GPU))

    yield fill
    fill(0)


def _needed(pipe: Pipeline, batch: int) -> int:
    manifest = pipe.bundle.manifest
    return generation_bytes(manifest.var, manifest.vqvae, batch, pipe.engine.precision)


def test_too_large_a_batch_is_told_what_fits_and_that_fits(heavy_bundle, fill_memory):
    pipe = var_deploy.load(heavy_bundle, engine="torch", device="cuda", precision="bf16")
    labels = [i % 10 for i in range(64)]
    expected = _tokens(pipe.generate(labels[:8], seeds=1))
    _engine(pipe).release()
    # Room for a batch of 8 and some for the libraries, but not for 16.
    spare = int(1.4 * _needed(pipe, 8)) + 2**28
    assert spare < 0.95 * _needed(pipe, 16)
    fill_memory(spare)
    for staged in (False, True):
        with pytest.raises(EngineError) as caught:
            pipe.generate(labels, seeds=1, on_scale=(lambda preview: None) if staged else None)
        told = re.fullmatch(
            r"batch 64: needs about ([\d.]+) GB beside the weights, ([\d.]+) GB are free on cuda:0; "
            r"batch (\d+) should fit; decode_slice=1 takes less for the decoder",
            str(caught.value),
        )
        assert told, str(caught.value)
        assert float(told[1]) == pytest.approx(_needed(pipe, 64) / 1e9, abs=0.06)
        assert 0 < float(told[2]) <= spare / 1e9 + 0.06
        fits = int(told[3])
        assert fits == 8
        fitting = pipe.generate(labels[:fits], seeds=1)
        np.testing.assert_array_equal(_tokens(fitting), expected)
        del fitting
    fill_memory(0)
    # With memory again there, the engine and the process work.
    batch = pipe.generate(labels, seeds=1)
    assert batch.pixels.shape == (64, 3, 256, 256)
    assert torch.ones(3, device=GPU).sum().item() == 3
    _engine(pipe).release()


def test_a_batch_that_fits_only_alone_drives_the_others_out(heavy_bundle, fill_memory):
    pipe = var_deploy.load(heavy_bundle, engine="torch", device="cuda", precision="bf16")
    labels = [i % 10 for i in range(16)]
    expected = _tokens(pipe.generate(labels, seeds=1))
    _engine(pipe).release()
    fill_memory(int(1.4 * _needed(pipe, 16)) + 2**28)
    for _ in range(2):
        assert pipe.generate(labels[:8], seeds=1).pixels.shape[0] == 8
        np.testing.assert_array_equal(_tokens(pipe.generate(labels, seeds=1)), expected)
    _engine(pipe).release()


def test_not_even_one_image_fits(heavy_bundle, fill_memory):
    pipe = var_deploy.load(heavy_bundle, engine="torch", device="cuda", precision="bf16")
    fill_memory(2**25)
    with pytest.raises(EngineError, match="GB are free on cuda:0; not even batch 1 fits: free memory on the GPU; "):
        pipe.generate([1, 2], seeds=1)
    fill_memory(0)
    assert pipe.generate([1, 2], seeds=1).pixels.shape[0] == 2


@pytest.mark.parametrize("call", ["load", "begin", "decode", "encode"])
def test_every_call_says_so_where_memory_does_not_suffice(heavy_bundle, fill_memory, call):
    """`load` promises an EngineError; the calls of a loaded engine are held to the same."""
    pipe = var_deploy.load(heavy_bundle, engine="torch", device="cuda", precision="fp32")
    images = np.zeros((64, 3, 256, 256), np.float32)
    calls: dict[str, Callable[[], object]] = {
        "load": lambda: var_deploy.load(heavy_bundle, engine="torch", device="cuda", precision="fp32"),
        "begin": lambda: pipe.engine.begin(np.zeros(256, np.int64)),
        "decode": lambda: pipe.engine.decode(np.zeros((64, 32, 16, 16), np.float32)),
        "encode": lambda: pipe.engine.encode(images),
    }
    fill_memory(2**23)
    with pytest.raises(EngineError):
        calls[call]()
    fill_memory(0)
    assert pipe.generate([1], seeds=1).pixels.shape[0] == 1
