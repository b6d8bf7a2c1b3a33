"""The decoder by minimal filtering, against PyTorch in float64 and against the bundle's own graph."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file
from threadpoolctl import ThreadpoolController

import var_deploy
from var_deploy.bundle import WEIGHTS, Bundle
from var_deploy.cpus import UsableCpus
from var_deploy.engines import choice
from var_deploy.engines.winograd import convolution, kernels
from var_deploy.engines.winograd.convolution import Convolution, Doubled, Normed, Residual, transformed
from var_deploy.engines.winograd.decoder import WinogradDecoder
from var_deploy.engines.winograd.kernels import normed_rows
from var_deploy.engines.winograd.workers import Workers
from var_deploy.errors import BundleError, EngineError
from var_deploy.mapped_weights import mapped_weights
from var_deploy.pipeline import Preview

#: Of values around 1. Lavin and Gray's transforms cancel: their rounding is some ten times that of a plain sum, whose
#: float32 error over 9·96 products is 1e-6.
TOLERANCE = 5e-5


def convolved(x_HWC: torch.Tensor, weight_OC33: torch.Tensor, bias_O: torch.Tensor) -> torch.Tensor:
    """Float64 reference: [H, W, O]."""
    out = F.conv2d(x_HWC.double().permute(2, 0, 1)[None], weight_OC33.double(), bias_O.double(), padding=1)
    return out[0].permute(1, 2, 0)


def parameters(C: int, O: int) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: E741
    return torch.randn(O, C, 3, 3) / (9 * C) ** 0.5, torch.randn(O)


def convolution_of(workers: Workers, weight: torch.Tensor, bias: torch.Tensor) -> Convolution:
    return Convolution(workers, transformed(workers, weight.numpy()), bias.numpy())


@pytest.mark.parametrize(
    ("H", "W", "C", "O", "workers", "strip_tiles"),
    [
        (4, 4, 32, 32, 1, 512),
        (8, 8, 32, 64, 2, 512),
        (5, 7, 96, 32, 1, 512),  # tiles reach over both edges
        (1, 3, 32, 16, 4, 512),  # less rows than a tile, more workers than rows
        (22, 13, 32, 32, 3, 4),  # several strips of a worker, the last of them short
        (9, 9, 64, 3, 2, 1),  # a width that is filled up
    ],
)
def test_convolution_of_a_normed_map(H, W, C, O, workers, strip_tiles, monkeypatch):  # noqa: E741
    monkeypatch.setattr(convolution, "STRIP_TILES", strip_tiles)
    weight, bias = parameters(C, O)
    x_HWC, scale_C, shift_C = torch.randn(H, W, C), torch.randn(C), torch.randn(C)
    conv = convolution_of(Workers(workers), weight, bias)
    out = np.full((H, W, conv.width), np.nan, dtype=np.float32)
    sums = conv(Normed(x_HWC.numpy(), scale_C.numpy(), shift_C.numpy()), out)
    expected = convolved(F.silu(x_HWC.double() * scale_C + shift_C), weight, bias).numpy()
    np.testing.assert_allclose(out[..., :O], expected, atol=TOLERANCE, rtol=0)
    assert (out[..., O:] == 0).all()
    np.testing.assert_allclose(sums[0], out.sum(axis=(0, 1), dtype=np.float64), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(sums[1], np.square(out, dtype=np.float64).sum(axis=(0, 1)), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("side", [2, 5])
def test_convolution_of_a_doubled_map(side):
    weight, bias = parameters(32, 48)
    x_HWC = torch.randn(side, side, 32)
    out = np.empty((2 * side, 2 * side, 48), dtype=np.float32)
    convolution_of(Workers(2), weight, bias)(Doubled(x_HWC.numpy()), out)
    doubled = x_HWC.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1)
    np.testing.assert_allclose(out, convolved(doubled, weight, bias).numpy(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("shortcut", [False, True])
def test_residual_is_added_and_a_map_may_be_written_over(shortcut):
    C = 64 if shortcut else 32
    weight, bias = parameters(32, 32)
    y_HWC, x_HWC = torch.randn(11, 6, 32), torch.randn(11, 6, C)
    weight_CO = torch.randn(32, C).T / 8 if shortcut else None
    ones, zeros = np.ones(32, dtype=np.float32), np.zeros(32, dtype=np.float32)
    added = x_HWC.double() @ weight_CO.double() if shortcut else x_HWC.double()
    expected = convolved(F.silu(y_HWC.double()), weight, bias) + added
    residual = x_HWC.numpy().copy()
    out = np.empty((11, 6, 32), dtype=np.float32) if shortcut else residual
    conv = convolution_of(Workers(2), weight, bias)
    conv(Normed(y_HWC.numpy(), ones, zeros), out, Residual(residual, weight_CO.numpy() if shortcut else None))
    np.testing.assert_allclose(out, expected.numpy(), atol=TOLERANCE, rtol=0)


def test_silu_over_the_whole_range():
    x = np.concatenate([np.linspace(-120, 120, 4801), [-1e4, 1e4, 0.0]]).astype(np.float32)
    padded = np.zeros((1, len(x) + 2, 1), dtype=np.float32)
    one, zero = np.ones(1, dtype=np.float32), np.zeros(1, dtype=np.float32)
    normed_rows(x.reshape(1, -1, 1), one, zero, 0, 1, padded, 0)
    expected = F.silu(torch.from_numpy(x).double()).numpy()
    # The exponent of e^−x is rounded at its own size, up to 126: some 1e-7 of that.
    np.testing.assert_allclose(padded[0, 1:-1, 0], expected, rtol=1e-5, atol=1e-33)


def test_a_nan_does_not_vanish():
    x = np.full((4, 4, 32), np.nan, dtype=np.float32)
    weight, bias = parameters(32, 32)
    out = np.zeros((4, 4, 32), dtype=np.float32)
    ones = np.ones(32, dtype=np.float32)
    convolution_of(Workers(1), weight, bias)(Normed(x, ones, ones), out)
    assert np.isnan(out).all()


@pytest.fixture(params=["tiny_bundle", "shared_aln_bundle"])
def bundle_path(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("threads", [1, 2])
def test_decoder_equals_the_graph(bundle_path, threads, monkeypatch):
    monkeypatch.setattr(choice, "usable_cpus", lambda: UsableCpus(cpus=2, cores=2, quota=None))  # on one CPU too
    graph, ours = (var_deploy.load(bundle_path, decoder=decoder, threads=threads) for decoder in ("graph", "winograd"))
    config = graph.bundle.manifest.vqvae
    shape = (2, config.z_channels, config.latent_size, config.latent_size)
    f_hat = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    # Pixels of 0…1 after some ten convolutions; `verify` allows 1e-3.
    np.testing.assert_allclose(ours.engine.decode(f_hat), graph.engine.decode(f_hat), atol=5e-5, rtol=0)


def test_odd_models(odd_states, odd_names, tmp_path):
    """Sides that are no multiple of a tile, one level, other widths: against the reference model."""
    from var_train import VQVAE

    for name in odd_names:
        _, config, _, state = odd_states(name)
        weights = {key: np.ascontiguousarray(value.float().numpy()) for key, value in state.items()}
        save_file(weights, tmp_path / WEIGHTS)
        model = VQVAE(config).eval()
        model.load_state_dict(state)
        f_hat = torch.randn(1, config.z_channels, config.latent_size, config.latent_size)
        with torch.no_grad():
            expected = model.decode(f_hat).add(1).mul(0.5).numpy()
        got = WinogradDecoder(config, tmp_path / WEIGHTS, 2)(f_hat.numpy())
        np.testing.assert_allclose(got, expected, atol=5e-5, rtol=0, err_msg=name)


def test_side_by_side_and_the_matrix_library_gets_its_threads_back(tiny_bundle):
    pipe = var_deploy.load(tiny_bundle, decoder="winograd")
    config = pipe.bundle.manifest.vqvae
    rng = np.random.default_rng(1)
    inputs = [rng.standard_normal((1, config.z_channels, *[config.latent_size] * 2)).astype(np.float32) for _ in "1234"]
    alone = [pipe.engine.decode(f_hat) for f_hat in inputs]
    before = [(lib["filepath"], lib["num_threads"]) for lib in ThreadpoolController().info()]
    together: list[np.ndarray] = [np.empty(0)] * len(inputs)

    def decode(i: int) -> None:
        together[i] = pipe.engine.decode(inputs[i])

    threads = [threading.Thread(target=decode, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [(lib["filepath"], lib["num_threads"]) for lib in ThreadpoolController().info()] == before


def test_an_error_in_a_worker_reaches_the_caller():
    def fail(_worker: int, first: int, _last: int) -> None:
        if first:
            raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        Workers(2).share(4, fail)


@pytest.mark.parametrize(
    ("changed", "got"),
    [
        ({"decoder.conv_in.bias": None}, "none"),
        ({"decoder.mid.attn_1.qkv.weight": np.zeros((3, 3), np.float32)}, r"float32 \(3, 3\)"),
        ({"decoder.norm_out.weight": np.zeros(32, np.float16)}, r"float16 \(32,\)"),
        ({"decoder.up.0.block.0.conv1.weight": np.zeros((1, 1, 3, 3), np.float32)}, r"float32 \(1, 1, 3, 3\)"),
    ],
)
def test_weights_that_do_not_fit_the_configuration(tiny_bundle, tmp_path, changed, got):
    weights = {**mapped_weights(tiny_bundle / WEIGHTS), **changed}
    save_file({name: value for name, value in weights.items() if value is not None}, tmp_path / WEIGHTS)
    (name,) = changed
    with pytest.raises(BundleError, match=rf"{name}: got {got}, expected float32 \(.*\); export it again"):
        WinogradDecoder(Bundle.open(tiny_bundle).manifest.vqvae, tmp_path / WEIGHTS, 1)


@pytest.mark.parametrize("offset", [0.0, 30.0, -300.0])
def test_norm_of_a_map_far_from_zero(tiny_bundle, offset):
    """Of the mean of squares less the square of the mean all but a few digits cancel, so the sums have to be exact."""
    decoder = WinogradDecoder(Bundle.open(tiny_bundle).manifest.vqvae, tiny_bundle / WEIGHTS, 1)
    weights = mapped_weights(tiny_bundle / WEIGHTS)
    name = next(name for name in weights if name.startswith("decoder.up.0.") and name.endswith("norm2.weight"))
    name, C = name.removesuffix(".weight"), len(weights[name])
    weight, bias = parameters(C, C)
    x_HWC, ones, zeros = torch.randn(24, 17, C), np.ones(C, np.float32), np.zeros(C, np.float32)
    out = np.empty((24, 17, C), dtype=np.float32)
    sums = convolution_of(Workers(2), weight, bias + offset)(Normed(x_HWC.numpy(), ones, zeros), out)
    normed = decoder._normed(out, sums, name)
    gamma, beta = (torch.from_numpy(weights[f"{name}.{part}"].copy()).double() for part in ("weight", "bias"))
    expected = F.group_norm(torch.from_numpy(out).double().permute(2, 0, 1)[None], 32, gamma, beta, eps=1e-6)[0]
    got = out * normed.scale_C.astype(np.float64) + normed.shift_C
    # The shift is float32, and about as large as the offset in standard deviations.
    np.testing.assert_allclose(got, expected.permute(1, 2, 0).numpy(), atol=2e-6 + 2e-7 * abs(offset), rtol=0)


def test_a_full_disk_for_machine_code_is_no_failure(monkeypatch):
    """numba writes what it has compiled before it runs it."""
    compile_for = kernels.numba.njit

    def njit(function=None, **options):
        if not options.pop("cache", False):
            return compile_for(function, **options)

        def full(*_: object) -> None:
            tried.append(1)
            raise OSError(28, "No space left on device")

        return full

    tried: list[int] = []
    monkeypatch.setattr(kernels.numba, "njit", njit)

    def twice(x_N):  # type: ignore[no-untyped-def]
        for i in range(len(x_N)):
            x_N[i] *= 2

    compiled = kernels._compiled(twice)
    x_N = np.array([1.0, 2.0], dtype=np.float32)
    compiled(x_N)
    compiled(x_N)
    assert x_N.tolist() == [4, 8]
    assert len(tried) == 1


class TestChoice:
    @pytest.mark.parametrize(
        ("asked", "size", "missing", "expected"),
        [
            ("auto", 256, False, ("winograd", "a quarter of the multiplications")),
            ("auto", 32, False, ("graph", "the faster one for 32 px")),
            ("auto", 256, True, ("graph", "numba and threadpoolctl not installed: pip install 'var-deploy[cpu]'")),
            ("graph", 256, False, ("graph", "as asked for")),
            ("winograd", 32, False, ("winograd", "as asked for")),
        ],
    )
    def test_decoder_and_reason(self, asked, size, missing, expected, tiny_bundle, monkeypatch):
        bundle = Bundle.open(tiny_bundle)
        monkeypatch.setattr(choice, "MIN_WINOGRAD_SIZE", bundle.manifest.vqvae.image_size * 128 // size)
        if missing:
            monkeypatch.setattr(choice, "find_spec", lambda package: None)
        decoder, why = choice._decoder(bundle, asked)
        assert decoder == expected[0]
        assert why.startswith(expected[1].replace("32 px", f"{bundle.manifest.vqvae.image_size} px"))

    def test_errors(self, tiny_bundle, monkeypatch):
        with pytest.raises(EngineError, match="unknown decoder 'fast'; known: auto, graph, winograd"):
            var_deploy.load(tiny_bundle, decoder="fast")
        with pytest.raises(EngineError, match="engine 'torch' has no option decoder; leave it out"):
            var_deploy.load(tiny_bundle, engine="torch", decoder="graph")
        monkeypatch.setattr(choice, "find_spec", lambda package: None if package == "numba" else sys)
        with pytest.raises(EngineError, match=r"decoder 'winograd' needs numba; pip install 'var-deploy\[cpu\]'"):
            var_deploy.load(tiny_bundle, decoder="winograd")


class TestInterrupted:
    """Ctrl-C, or a time limit's signal, in the middle of a step: nobody gets memory that a worker still writes to."""

    def test_share_ends_after_its_workers_do(self):
        ended: list[int] = []

        def slow(worker: int, _first: int, _last: int) -> None:
            time.sleep(0.3)
            ended.append(worker)

        def interrupted(*_: object) -> None:
            raise InterruptedError

        before = signal.signal(signal.SIGALRM, interrupted)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            with pytest.raises(InterruptedError):
                Workers(2).share(2, slow)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert sorted(ended) == [0, 1]

    def test_a_block_is_let_go_rather_than_given_on(self, tiny_bundle, monkeypatch):
        pipe = var_deploy.load(tiny_bundle, decoder="winograd")
        config = pipe.bundle.manifest.vqvae
        f_hat = np.zeros((1, config.z_channels, *[config.latent_size] * 2), np.float32)
        given: list[object] = []
        monkeypatch.setattr(pipe.engine._workspace, "give", given.append)

        def interrupted(*_: object) -> np.ndarray:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(WinogradDecoder, "_image", interrupted)
            with pytest.raises(KeyboardInterrupt):
                pipe.engine.decode(f_hat)
        assert given == []
        pipe.engine.decode(f_hat)
        assert len(given) == 1


FORKED = """
import os, sys, numpy as np, var_deploy
from var_deploy.errors import EngineError
from var_deploy.products import single_threaded
pipe = var_deploy.load(sys.argv[1], decoder="winograd", cache=False)
config = pipe.bundle.manifest.vqvae
f_hat = np.zeros((1, config.z_channels, config.latent_size, config.latent_size), np.float32)
pipe.engine.decode(f_hat)
with single_threaded():
    child = os.fork()
if child == 0:
    try:
        pipe.engine.decode(f_hat)
    except EngineError as error:
        print(error)
    with single_threaded():
        os._exit(0 if single_threaded._inside == 1 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_is_told_instead_of_waiting_for_threads_that_are_not_there(tiny_bundle):
    done = subprocess.run([sys.executable, "-c", FORKED, str(tiny_bundle)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "decoder: this process was forked after the bundle was loaded; load it after the fork\n"


@pytest.mark.parametrize("smooth", [False, True])
def test_requests_side_by_side_give_the_pictures_of_one_by_one(tiny_bundle, smooth):
    """Caches and maps come from one workspace, the matrix library has one number of threads: nothing of it shows."""
    pipe = var_deploy.load(tiny_bundle, decoder="winograd")
    image = pipe.generate([0], seeds=9).pixels

    def request(seed: int) -> tuple[np.ndarray, ...]:
        previews: list[np.ndarray] = []

        def on_scale(preview: Preview) -> None:
            if preview.scale % 3 == seed % 3:
                previews.append(np.asarray(preview.images[0]))

        out = pipe.generate([seed % 3, 1], seeds=seed, smooth=smooth, on_scale=on_scale)
        return out.pixels, *previews, pipe.reconstruct(image)

    alone = [request(seed) for seed in range(6)]
    with ThreadPoolExecutor(4) as pool:
        for seed, found in enumerate(pool.map(request, list(range(6)) * 2)):
            for ours, theirs in zip(found, alone[seed % 6], strict=True):
                np.testing.assert_array_equal(ours, theirs)
