"""The walk through decoder and encoder: which passes the library makes over a map, and the decoder as one graph."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from var_deploy.bundle import Bundle
from var_deploy.engines.torch.convolutions import Convolutions
from var_deploy.engines.torch.weights import WeightReader
from var_deploy.precision import Precision
from var_kernels import Ops, reference_ops
from var_kernels.ops import OPERATIONS

CPU = torch.device("cpu")


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def _walk(bundle: Bundle, *, encoder: bool = False, ops: Ops | None = None) -> Convolutions:
    read = WeightReader(bundle, CPU, Precision.FP32, ops or reference_ops())
    return Convolutions(bundle.manifest.vqvae, read, encoder=encoder)


class LibraryCalls(TorchDispatchMode):
    """Notes the library's convolutions, with or without bias, its additions to a map, and what norms keep."""

    def __init__(self) -> None:
        super().__init__()
        self.biased: list[bool] = []
        self.additions = 0
        self.sums_kept: list[bool] = []  #: by the norms, in turn
        self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._inside:
            if func is torch.ops.aten.convolution.default:
                self.biased.append(args[2] is not None)
            self.additions += func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_)
        return func(*args, **(kwargs or {}))

    def ops(self) -> Ops:
        """The references, whose own calls are not noted."""

        def apart(name: str) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                self._inside = True
                if name == "groupnorm_silu":
                    self.sums_kept.append(kwargs["sum_out_BlC"] is not None)
                try:
                    return getattr(reference_ops(), name)(*args, **kwargs)
                finally:
                    self._inside = False

            return call

        return Ops(name="apart", **{name: apart(name) for name in OPERATIONS})


def test_the_library_adds_nothing_to_a_map_of_the_decoder(bundle):
    """But the bias of `post_quant_conv`, on the smallest map: zeros come right after it."""
    calls, h = LibraryCalls(), bundle.manifest.vqvae.latent_size
    walk = _walk(bundle, ops=calls.ops())
    with calls:
        walk.decode(torch.randn(2, h * h, bundle.manifest.vqvae.z_channels))
    assert calls.biased == [True] + [False] * (len(calls.biased) - 1)
    assert len(calls.biased) > 20
    assert calls.additions == 0


def test_a_norm_writes_the_sum_only_where_it_is_read_again(bundle):
    """All do but the second norm of a residual block."""
    calls, vqvae = LibraryCalls(), bundle.manifest.vqvae
    with calls:
        _walk(bundle, ops=calls.ops()).decode(torch.randn(1, vqvae.latent_size**2, vqvae.z_channels))
    blocks = 2 + len(vqvae.ch_mult) * (vqvae.num_res_blocks + 1)
    assert calls.sums_kept.count(False) == blocks
    assert calls.sums_kept[:5] == [True, False, True, True, False]  # residual block, attention, residual block


def test_the_encoder_adds_only_where_zeros_follow(bundle):
    calls, levels = LibraryCalls(), len(bundle.manifest.vqvae.ch_mult)
    walk = _walk(bundle, encoder=True, ops=calls.ops())
    with calls:
        walk.encode(torch.rand(2, 3, *(2 * [bundle.manifest.vqvae.image_size])))
    assert calls.biased == [False] * (len(calls.biased) - 2) + [True, True]  # conv_out and quant_conv
    assert calls.additions == 2 * (levels - 1)  # branch and bias before each downsampling


def test_what_a_caller_hands_over_stays_as_it_is(bundle):
    """Sums are kept in the memory of maps, but of the walk's own."""
    vqvae = bundle.manifest.vqvae
    f_hat_BlC = torch.randn(1, vqvae.latent_size**2, vqvae.z_channels)
    pixels_B3RR = torch.rand(1, 3, vqvae.image_size, vqvae.image_size)
    before = f_hat_BlC.clone(), pixels_B3RR.clone()
    decoder, encoder = _walk(bundle), _walk(bundle, encoder=True)
    weights = {name: weight.clone() for walk in (decoder, encoder) for name, weight in walk._weights.items()}
    results = [(decoder.decode(f_hat_BlC), encoder.encode(pixels_B3RR)) for _ in range(2)]
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert torch.equal(f_hat_BlC, before[0])
    assert torch.equal(pixels_B3RR, before[1])
    for walk in (decoder, encoder):
        assert all(torch.equal(weight, weights[name]) for name, weight in walk._weights.items())


class LiveMaps(TorchDispatchMode):
    """Notes how many tensors of at least `size` elements hold memory whenever a convolution has run."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.most, self._size = 0, size
        self._seen: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self._seen.append(weakref.ref(result))
        if func is torch.ops.aten.convolution.default:
            alive = (found for found in (seen() for seen in self._seen) if found is not None)
            self.most = max(self.most, len({t.untyped_storage().data_ptr() for t in alive if t.numel() >= self._size}))
        return result


@torch.no_grad()
def test_no_map_is_kept_that_nobody_needs(bundle):
    """The residual, the convolution's input and its result; the memory plan counts one more, for its scratch."""
    vqvae, walk = bundle.manifest.vqvae, _walk(bundle)
    with LiveMaps(vqvae.ch * vqvae.image_size**2) as live:
        walk.decode(torch.randn(1, vqvae.latent_size**2, vqvae.z_channels))
    assert live.most == 3


def test_the_decoder_is_one_graph_for_a_compiler(bundle):
    """Sums in place must survive it; `aot_eager` needs no compiler, but makes the graph that one gets."""
    walk, h = _walk(bundle), bundle.manifest.vqvae.latent_size
    compiled = torch.compile(walk.decode, dynamic=False, backend="aot_eager", fullgraph=True)
    f_hat_BlC = torch.randn(2, h * h, bundle.manifest.vqvae.z_channels)
    torch.testing.assert_close(compiled(f_hat_BlC), walk.decode(f_hat_BlC), rtol=0, atol=1e-5)
