"""How an engine stores weights and activations; one enum for the one choice."""

from __future__ import annotations

from enum import StrEnum


class Precision(StrEnum):
    """Storage of the transformer's matrices and of activations.

    Sums, LayerNorm and GroupNorm statistics, softmax, logits, draws and the quantiser are float32 with every choice.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    #: Block weights as 8-bit integers with a scale per column; everything else as with bf16.
    INT8 = "int8"
    #: Block weights as float8 (e4m3) with a scale per column, activations quantised row by row; else as with bf16.
    FP8 = "fp8"

    @property
    def activation(self) -> Precision:
        """Storage of activations, caches and the decoder: fp32, fp16 or bf16."""
        return self if self in (Precision.FP32, Precision.FP16) else Precision.BF16

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
