"""Triton kernels of the torch engine, each beside a plain PyTorch reference of the same signature.

`ops.py` is the table that an engine picks from, once: the kernels, or on a machine without a GPU their references.
Callers own every buffer: results go into arguments named `out` or ending in `_out`, so that a CUDA graph can replay.
"""

from .ops import Ops, reference_ops, triton_ops

__all__ = ["Ops", "reference_ops", "triton_ops"]
