"""How every weight of a bundle is stored and every product of its graphs is computed, in each precision.

fp32: as the reference computes. fp16, bf16: weights, products, attention and caches in the half type; residual stream,
statistics of norms, lengths of q and k, softmax, AdaLN sums, logits, embeddings of codes and positions and quantiser in
float32.

int8, for ONNX Runtime on a CPU: W[K, N] ≈ w·t with integers |w| ≤ 63 and a float32 scale t per column; a row of x ≈
(u − 128)·s with u = round(x / s) + 128, s = max|x| / 127; then x·W + b = ((u − 128)·w)·t·s + b, with an exact sum of
integers. Everything but the transformer's products stays float32.

- Weights have 7 bits. Without VNNI, ONNX Runtime's product of unsigned and signed bytes adds pairs of products in 16
  bits, which saturate; 2 · 255 · 63 = 32,130 fits. So every CPU gets the same integers, and the right ones.
- Every row has its own scale. With one for all rows, which is what ONNX's DynamicQuantizeLinear takes, an image would
  depend on the batch it came in; and rows differ in size, so one scale is less exact.
- Scales are symmetric: the zero point 128 is a constant of the product, and 0 stays 0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir
import torch
from torch import Tensor

from var_deploy.config import VARConfig
from var_deploy.errors import BundleError, CheckpointError
from var_deploy.precision import BUNDLE_PRECISIONS, COLUMN_SCALE, Precision

from .deploy_view import LazyWeight
from .graph_builder import GraphBuilder

#: Largest magnitude of a quantised weight and of a quantised activation, and the activations' zero point.
WEIGHT_MAX, ACTIVATION_MAX, ZERO_POINT = 63, 127, 128

#: Rows no larger than this count as zeros: the scale of a row must not be 0, nor its reciprocal infinite.
SMALLEST_ROW = 1e-30


#: Stands for the precision that measuring finds.
AUTO = "auto"


def bundle_precision(name: str) -> Precision:
    """The precision of that name. Raises BundleError where a bundle cannot have it."""
    if name not in BUNDLE_PRECISIONS:
        step = "; export fp32, which the torch engine converts when it loads" if name == Precision.FP8 else ""
        raise BundleError(f"precision: got {str(name)!r}, expected {', '.join(BUNDLE_PRECISIONS)} or {AUTO}{step}")
    return Precision(name)


# Weights --------------------------------------------------------------------------------------------------------------


def stored_weights(
    weights: dict[str, LazyWeight], precision: Precision, kept: Collection[str] = ()
) -> dict[str, LazyWeight]:
    """The float32 deploy view → the tensors of weights.safetensors, in the same order.

    kept: parts of the model (`parts_of`) whose products int8 leaves in float32. Making a weight raises CheckpointError
    where its values do not fit the precision.
    """
    return {
        key: stored
        for name, weight in weights.items()
        for key, stored in _stored(name, weight, Precision.FP32 if _part(name) in kept else precision)
    }


def parts_of(var: VARConfig) -> list[str]:
    """What int8 is decided for: the four products of each block, the head's, and those of all AdaLN projections."""
    return [*(f"blocks.{i}" for i in range(var.depth)), "head", "condition"]


def _part(name: str) -> str | None:
    """The part whose product reads a weight; None for what is no product."""
    if not _is_product(name):
        return None
    if "ada_lin" in name:
        return "condition"
    return ".".join(name.split(".")[:2]) if name.startswith("blocks.") else "head"


def _stored(name: str, weight: LazyWeight, precision: Precision) -> Iterator[tuple[str, LazyWeight]]:
    if precision is Precision.INT8 and _is_product(name):
        quantized = partial(_quantized, name, weight)
        yield name, LazyWeight(weight.shape, lambda: quantized().values_KN, "int8")
        yield name.removesuffix(".weight") + COLUMN_SCALE, LazyWeight(weight.shape[1:], lambda: quantized().scale_N)
    elif precision.graph_dtype != "float32" and not _stays_float32(name):
        yield name, LazyWeight(weight.shape, partial(_half, name, weight, precision), precision.graph_dtype)
    else:
        yield name, weight


def _is_product(name: str) -> bool:
    """Whether it is a matrix of the transformer's blocks, its AdaLN projections or its head."""
    return name.startswith(("blocks.", "shared_ada_lin.", "head.", "head_nm.")) and name.endswith(".weight")


def _stays_float32(name: str) -> bool:
    """Whether a weight is float32 in half precision too: what float32 arithmetic reads, all of it small."""
    return (
        name.startswith(("quantize.", "position", "start_position", "ada_gss", "word_embed.", "head.bias"))
        or ".norm" in name
        or name.endswith(("q_scale", "ada_lin.bias"))
    )


def _half(name: str, weight: LazyWeight, precision: Precision) -> Tensor:
    values = weight.make()
    half = values.to(torch.float16 if precision is Precision.FP16 else torch.bfloat16)
    if not half.isfinite().all():
        largest = f"{values.abs().max().item():g}"
        raise CheckpointError(f"{name}: its largest magnitude is {largest}, beyond {precision}; export as fp32")
    return half


@dataclass(frozen=True, slots=True)
class _Quantized:
    """values·scale ≈ W."""

    values_KN: Tensor
    scale_N: Tensor


def _quantized(name: str, weight: LazyWeight) -> _Quantized:
    weight_KN = weight.make()
    peak_N = weight_KN.abs().amax(0)
    if not peak_N.isfinite().all():
        raise CheckpointError(f"{name}: holds values that are not finite, which int8 has not; export as fp32")
    scale_N = torch.where(peak_N > 0, peak_N / WEIGHT_MAX, torch.ones_like(peak_N))
    values_KN = (weight_KN / scale_N).round_().clamp_(-WEIGHT_MAX, WEIGHT_MAX)
    return _Quantized(values_KN.to(torch.int8), scale_N)


# Graphs ---------------------------------------------------------------------------------------------------------------


def wide(b: GraphBuilder, x: ir.Value) -> ir.Value:
    """An activation as float32, for sums and statistics."""
    return x if b.activation == "float32" else b.cast(x, "float32")


def narrow(b: GraphBuilder, x: ir.Value) -> ir.Value:
    """A float32 value in the type of activations."""
    return x if b.activation == "float32" else b.cast(x, b.activation)


def product_of(b: GraphBuilder, x: ir.Value) -> Callable[[str], ir.Value]:
    """name ↦ x·W + b of that name, with W stored as [K, N]; the input is made ready once for all that read it.

    x has the type of activations. So has the result, but with a float32 bias it is float32.
    """
    if b.precision is not Precision.INT8:
        return partial(_float_product, b, x)
    by_int8: list[Callable[[str], ir.Value]] = []  # made where a first weight needs it

    def times(name: str) -> ir.Value:
        if b.stored(f"{name}.weight") != "int8":
            return _float_product(b, x, name)
        if not by_int8:
            by_int8.append(_int8_product(b, x))
        return by_int8[0](name)

    return times


def product(b: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
    """x·W + b: see `product_of`."""
    return product_of(b, x)(name)


def logits(b: GraphBuilder, x: ir.Value) -> ir.Value:
    """The head's product; x and the result are float32 in every precision."""
    if b.precision is Precision.INT8:
        return product(b, x, "head")
    return b.op("Add", b.op("MatMul", x, wide(b, b.weight("head.weight"))), b.weight("head.bias"))


def _float_product(b: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
    y = b.op("MatMul", x, b.weight(f"{name}.weight"))
    bias_N = b.weight(f"{name}.bias")
    return b.op("Add", wide(b, y) if bias_N.dtype == ir.DataType.FLOAT else y, bias_N)


def _int8_product(b: GraphBuilder, x: ir.Value) -> Callable[[str], ir.Value]:
    """As the file's docstring says.

    [512, 1024]·[1024, 3072] on two Zen cores with AVX2, in ms: 22.3 in float32, 13.9 so, 13.1 with one scale for all
    rows (DynamicQuantizeMatMul), 14.3 in the standard's own operators (MatMulInteger, Cast, a Mul for each scale), 28.9
    as MatMulNBits of 8 bits. MatMulInteger, Cast and one Mul by the product of both scales looks the same, but ONNX
    Runtime 1.32 fuses that into a product with the first row's scale for all rows.
    """
    zero_point = b.constant(ZERO_POINT, "uint8")
    one = b.constant(1, "float32")
    peak = b.op("ReduceMax", b.op("Abs", x), b.ints(-1), keepdims=1)
    scale = b.op("Div", b.op("Max", peak, b.constant(SMALLEST_ROW, "float32")), b.constant(ACTIVATION_MAX, "float32"))
    # In two steps: QuantizeLinear with a scale per row is no faster, and takes two axes and a zero point per row.
    quantized = b.op("QuantizeLinear", b.op("Div", x, scale), one, zero_point)

    def times(name: str) -> ir.Value:
        weight_KN, scale_N = b.weight(f"{name}.weight"), b.weight(f"{name}{COLUMN_SCALE}")
        y = b.op("MatMulIntegerToFloat", quantized, weight_KN, one, scale_N, zero_point, domain="com.microsoft")
        return b.op("Add", b.op("Mul", y, scale), b.weight(f"{name}.bias"))

    return times
