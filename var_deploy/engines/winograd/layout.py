"""Which weights the decoder of a configuration has, by name and shape: what a bundle's file is checked against."""

from __future__ import annotations

from ...config import VQVAEConfig

#: A weight's name → its shape.
Shapes = dict[str, tuple[int, ...]]


def decoder_shapes(vqvae: VQVAEConfig) -> Shapes:
    """All weights from f_hat to pixels, in the order they are used; all are float32."""
    widths = [vqvae.ch * m for m in vqvae.ch_mult]
    deepest, width = len(widths) - 1, widths[-1]
    found = _convolution("post_quant_conv", vqvae.z_channels, vqvae.z_channels)
    found |= _convolution("decoder.conv_in", width, vqvae.z_channels)
    found |= _residual("decoder.mid.block_1", width, width)
    found |= _attention("decoder.mid.attn_1", width)
    found |= _residual("decoder.mid.block_2", width, width)
    for level in reversed(range(deepest + 1)):
        for j in range(vqvae.num_res_blocks + 1):
            found |= _residual(f"decoder.up.{level}.block.{j}", widths[level], width)
            width = widths[level]
            if level == deepest:
                found |= _attention(f"decoder.up.{level}.attn.{j}", width)
        if level > 0:
            found |= _convolution(f"decoder.up.{level}.upsample.conv", width, width)
    return found | _norm("decoder.norm_out", width) | _convolution("decoder.conv_out", 3, width)


def finer_convolutions(vqvae: VQVAEConfig) -> list[str]:
    """Every 3×3 convolution above the deepest level, in the order they run."""
    deepest = f"decoder.up.{len(vqvae.ch_mult) - 1}.block."
    return [
        name.removesuffix(".weight")
        for name, shape in decoder_shapes(vqvae).items()
        if shape[2:] == (3, 3)
        and name.startswith(("decoder.up.", "decoder.conv_out."))
        and not name.startswith(deepest)
    ]


def _convolution(name: str, outputs: int, inputs: int, side: int = 3) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, side, side), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _residual(name: str, outputs: int, inputs: int) -> Shapes:
    found = _norm(f"{name}.norm1", inputs) | _convolution(f"{name}.conv1", outputs, inputs)
    found |= _norm(f"{name}.norm2", outputs) | _convolution(f"{name}.conv2", outputs, outputs)
    return found if outputs == inputs else found | _convolution(f"{name}.nin_shortcut", outputs, inputs, side=1)


def _attention(name: str, width: int) -> Shapes:
    found = _norm(f"{name}.norm", width) | _convolution(f"{name}.qkv", 3 * width, width, side=1)
    return found | _convolution(f"{name}.proj_out", width, width, side=1)
