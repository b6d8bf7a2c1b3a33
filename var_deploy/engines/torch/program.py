"""The decode loop on the device: class ids → tokens, scale by scale → pixels. The file to read first.

    condition → for each scale: embed, transformer, draw → finish → decode

A `Program` is a bundle's weights on a device and the list of stages that a generation launches on static buffers. The
engine runs that list as it is, or captures it as CUDA graphs. Axes: B images, R rows (B, or 2B under guidance:
conditioned first), n tokens of a scale, C code width, V codebook entries, l = h² cells of the feature map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from var_kernels import Ops, reference_ops

from ...bundle import Bundle
from ...errors import EngineError
from ...precision import Precision
from ...static_buffers import decoded_at_once
from ..engine import LoopForm
from .buffers import Buffers, DecodeBuffers
from .convolutions import Convolutions, library_convolutions
from .graphs import Launch, out_of_memory
from .transformer import Transformer
from .weights import WeightReader


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the loop."""

    name: str
    launch: Launch
    completed: int | None = None  #: the scale whose codes are part of f_hat from here on


class Program:
    """Weights on a device, and what is launched with them; every buffer comes from the caller."""

    def __init__(
        self,
        bundle: Bundle,
        device: torch.device,
        *,
        precision: Precision,
        ops: Ops,
        decode_slice: int | None,
        compile_decoder: bool,
    ) -> None:
        self.var, self.vqvae = bundle.manifest.var, bundle.manifest.vqvae
        self.precision, self.decode_slice = precision, decode_slice
        self._ops = ops
        read = WeightReader(bundle, device, precision, ops)
        self.transformer = Transformer(self.var, self.vqvae, read)
        if compile_decoder:  # the compiler fuses the norms itself, and cannot see into the kernels
            read = WeightReader(bundle, device, precision, reference_ops())
        decoder = Convolutions(self.vqvae, read, encoder=False)
        self._decode_map: Callable[[Tensor], Tensor] = decoder.decode
        self._pixel_bias_3 = decoder.pixel_bias_3
        if compile_decoder:
            self._decode_map = _compiled(self._decode_map)

    def stages(self, b: Buffers, decode: DecodeBuffers, form: LoopForm) -> list[Stage]:
        """A whole generation, or its first scales; null-class rows run at the first `guided_scales` scales, which is
        exact: nothing reads their logits or caches later.
        """
        K, B = self.var.num_scales, b.batch

        def scale(k: int) -> None:
            rows = 2 * B if k < form.guided_scales else B
            if k:
                self.transformer.embed(b, k, rows)
            self.transformer.scale(b, k, rows)

        stages = [Stage("condition", partial(self.condition, b))]
        for k in range(form.draft_scales or K):
            stages.append(Stage(f"scale_{k:02d}", partial(scale, k), k - 1 if k else None))
            stages.append(Stage("draw", partial(self._draw, b, k, form)))
        if form.draft_scales is not None:
            return stages
        stages.append(Stage("finish", partial(self.transformer.embed, b, K, B), K - 1))
        if form.decode:
            stages.append(Stage("decode", partial(self.decode, b.f_hat_BlC(K), decode)))
        return stages

    def condition(self, b: Buffers) -> None:
        """Everything that depends on classes and seeds alone, and a clean start."""
        b.invalid_KB.zero_()
        b.f_hat_BlC(0).zero_()
        self._ops.uniforms(b.seeds_B, out_BL=b.uniforms_BL)
        self.transformer.condition(b)

    def _draw(self, b: Buffers, k: int, form: LoopForm) -> None:
        """Logits of scale k → tokens and codes."""
        begin, end = self.var.span(k)
        guided, codebook_VC = k < form.guided_scales, self.transformer.codebook_VC
        weights_BnV = b.smooth_weights(k) if form.smooths[k] else None
        self._ops.draw(
            b.logits(k, 2 * b.batch if guided else b.batch),
            b.uniforms_BL[:, begin:end],
            b.strength_KB[k],
            b.temperature_KB[k],
            b.top_k_KB[k],
            b.top_p_KB[k],
            codebook_VC,
            guided=guided,
            tokens_out_Bn=b.tokens_BL[:, begin:end],
            codes_out_BnC=b.codes(k),
            invalid_out_B=b.invalid_KB[k],
            smooth_weights_out_BnV=weights_BnV,
            seeds_B=b.seeds_B,
            begin=begin,
            ratio=self.var.ratio(k),
        )
        if weights_BnV is not None:
            self._ops.mix_codes(weights_BnV, codebook_VC, codes_out_BnC=b.codes(k))
        if form.given:
            given = b.given.device
            self._ops.keep_given(
                given["tokens_BL"][:, begin:end],
                given["codes_BLC"][:, begin:end],
                tokens_out_Bn=b.tokens_BL[:, begin:end],
                codes_out_BnC=b.codes(k),
            )

    def decode(self, f_hat_BlC: Tensor, decode: DecodeBuffers) -> None:
        """f_hat → float and 8-bit pixels, all images at once or slice by slice."""
        step = decoded_at_once(self.vqvae, decode.batch, self.decode_slice)
        for begin in range(0, decode.batch, step):
            here = slice(begin, begin + step)
            with library_convolutions():
                x_Bl3 = self._decode_map(f_hat_BlC[here])
            self._ops.to_pixels(
                x_Bl3,
                self._pixel_bias_3,
                pixels_out_B3RR=decode.pixels_B3RR[here],
                bytes_out_BRR3=decode.bytes_BRR3[here],
            )


def _compiled(decode_map: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The decoder through torch.compile, which begins when it first runs; what the compiler cannot do is one line."""
    from torch._dynamo.exc import TorchDynamoException  # a second to import, and few compile

    compiled = torch.compile(decode_map, dynamic=False)

    def run(f_hat_BlC: Tensor) -> Tensor:
        try:
            return compiled(f_hat_BlC)
        except TorchDynamoException as error:
            if out_of_memory(error):
                raise
            why = next(line for line in str(error).splitlines() if line.strip())
            raise EngineError(f"compile_decoder: torch.compile failed ({why}); leave the option out") from error

    return run
