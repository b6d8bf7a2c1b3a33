"""How a bundle or an engine stores weights and activations; one enum for the one choice."""

from __future__ import annotations

from enum import StrEnum


class Precision(StrEnum):
    """Storage of the transformer's matrices and of activations.

    Sums, LayerNorm and GroupNorm statistics, softmax, logits, draws and the quantiser are float32 with every choice.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    #: On the torch engine block weights alone as 8-bit integers with a scale per column, everything else as with bf16.
    #: In a bundle, weights and activations of the transformer's products, everything else as with fp32.
    INT8 = "int8"
    #: Block weights as float8 (e4m3) with a scale per column, activations quantised row by row; else as with bf16.
    FP8 = "fp8"

    @property
    def activation(self) -> Precision:
        """Storage of activations, caches and the decoder: fp32, fp16 or bf16."""
        return self if self in (Precision.FP32, Precision.FP16) else Precision.BF16

    @property
    def graph_dtype(self) -> str:
        """Type of activations and caches in the graphs of a bundle, as NumPy names it."""
        return {Precision.FP16: "float16", Precision.BF16: "bfloat16"}.get(self, "float32")

    @property
    def exact(self) -> bool:
        """Whether only float32 rounding separates the results from the reference model's."""
        return self is Precision.FP32

    @property
    def weight_bytes(self) -> int:
        """Bytes of one element of a block's matrices."""
        return {Precision.FP32: 4, Precision.INT8: 1, Precision.FP8: 1}.get(self, 2)

    @property
    def activation_bytes(self) -> int:
        """Bytes of one element of an activation, a cache, the head's and the decoder's weights."""
        return 4 if self is Precision.FP32 else 2


#: What a bundle may hold; fp8 is made by the torch engine when it loads an fp32 bundle.
BUNDLE_PRECISIONS = (Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8)

#: What the name of an int8 matrix ends in where its scales by column are meant.
COLUMN_SCALE = ".column_scale"
