"""What every graph of a bundle takes and returns, as data: exporter, runtime and tests all read it from here.

Axes: R rows (B, or 2B under guidance), B images, n_k tokens of scale k, L all tokens, V codebook entries, C code
width, D width, H heads, h side of the feature map. A string in a shape is an axis that is known at run time only.
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import HEAD_DIM, VARConfig, VQVAEConfig
from .precision import Precision

FLOAT, INT64 = "float32", "int64"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output: name, numpy dtype name, shape."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """One graph: its file in the bundle, its inputs and outputs in order."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def cache_names(depth: int) -> list[str]:
    """Names of the cache inputs, keys and values of block 0 first."""
    return [f"cache_{kv}.{i}" for i in range(depth) for kv in ("k", "v")]


def scale_graph_name(k: int) -> str:
    """Name of the static graph of scale k."""
    return f"scale_{k:02d}"


def graph_specs(var: VARConfig, vqvae: VQVAEConfig, precision: Precision = Precision.FP32) -> dict[str, GraphSpec]:
    """Signatures of all graphs of a bundle, by graph name.

    In half precision start, modulations and caches are halves; pixels, features, codes, f_hat and logits never are.
    """
    D, C, h, R_px = var.embed_dim, var.z_channels, var.latent_size, vqvae.image_size
    n = var.tokens_per_scale

    def f(name: str, *shape: int | str) -> TensorSpec:
        return TensorSpec(name, FLOAT, shape)

    def activation(name: str, *shape: int | str) -> TensorSpec:
        return TensorSpec(name, precision.graph_dtype, shape)

    start = activation("start", "R", n[0], D)
    modulations = (activation("modulation", "R", var.depth, 6, D), activation("head_modulation", "R", 2, D))
    cache_shape = ("R", var.num_heads, var.num_tokens, HEAD_DIM)
    caches = tuple(activation(name, *cache_shape) for name in cache_names(var.depth))
    caches_out = tuple(activation(spec.name + ".out", *cache_shape) for spec in caches)
    f_hat, f_hat_out = f("f_hat", "R", C, h, h), f("f_hat.out", "R", C, h, h)
    f_hat_B, pixels = f("f_hat", "B", C, h, h), f("pixels", "B", 3, R_px, R_px)

    specs = {"condition": GraphSpec("condition.onnx", (TensorSpec("labels", INT64, ("R",)),), (*modulations, start))}
    for k in range(var.num_scales):
        source = (start,) if k == 0 else (f("codes", "R", n[k - 1], C), f_hat)
        result = (f("logits", "R", n[k], var.vocab_size),) + (() if k == 0 else (f_hat_out,))
        name = scale_graph_name(k)
        specs[name] = GraphSpec(f"{name}.onnx", (*source, *modulations, *caches), (*result, *caches_out))
    # The symbolic graph serves every scale. At scale 0, which has no previous codes, it takes zeros [R, n_0, C].
    specs["scales"] = GraphSpec(
        "scales.onnx",
        (TensorSpec("scale", INT64, (1,)), f("codes", "R", "n_prev", C), f_hat, start, *modulations, *caches),
        (f("logits", "R", "n", var.vocab_size), f_hat_out, *caches_out),
    )
    last_codes = f("codes", "B", n[-1], C)
    specs["finish"] = GraphSpec("finish.onnx", (last_codes, f_hat_B), (f("f_hat.out", "B", C, h, h),))
    specs["decoder"] = GraphSpec("decoder.onnx", (f_hat_B,), (pixels,))
    specs["encoder"] = GraphSpec("encoder.onnx", (pixels,), (f("features", "B", C, h, h),))
    return specs
