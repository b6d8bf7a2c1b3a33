"""The table of operations an engine runs: all Triton kernels, or all references; never a mixture.

One operation has one name everywhere: its module here, its reference, its test, its row in the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module

from torch import Tensor

from . import reference


@dataclass(frozen=True, kw_only=True, slots=True)
class Ops:
    """One implementation of every operation; `reference` documents arguments and results."""

    name: str
    adaln: Callable[..., Tensor]
    cached_attention: Callable[..., Tensor]
    draw: Callable[..., None]
    groupnorm_silu: Callable[..., Tensor]
    keep_given: Callable[..., None]
    linear: Callable[..., Tensor]
    mix_codes: Callable[..., None]
    next_scale: Callable[..., None]
    quantize_rows: Callable[..., None]
    to_pixels: Callable[..., None]
    uniforms: Callable[..., Tensor]
    upsample_sum: Callable[..., Tensor]


#: Names of the operations, in the order of the table.
OPERATIONS = tuple(field.name for field in fields(Ops) if field.name != "name")


def reference_ops() -> Ops:
    """Plain PyTorch, on any device."""
    return Ops(name="reference", **{name: getattr(reference, name) for name in OPERATIONS})


def triton_ops() -> Ops:
    """The Triton kernels. Raises ImportError where Triton is not installed."""
    functions = {name: getattr(import_module(f".{name}", __package__), name) for name in OPERATIONS}
    return Ops(name="triton", **functions)
