"""What a bundle needs in memory, computed from its configuration, and what this process really has.

Sizes are in bytes unless the name says otherwise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .config import HEAD_DIM, VARConfig, VQVAEConfig

FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Memory of one generation on the CPU engine; activations are an estimate, the rest is counted."""

    batch: int
    rows: int
    weights: int
    caches: int
    logits: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.caches + self.logits + self.activations


def memory_plan(
    var: VARConfig,
    vqvae: VQVAEConfig | None,
    weights: int,
    batch: int,
    *,
    guided: bool = True,
    cache_bytes: int = FLOAT_BYTES,
) -> MemoryPlan:
    """Plan for a batch; `weights` is the size of those that are loaded, `cache_bytes` that of an element of the caches.

    Without a VQVAE: transformer alone.
    """
    rows = 2 * batch if guided else batch
    n, L, D = var.tokens_per_scale[-1], var.num_tokens, var.embed_dim
    # Live at once in the widest place: residual, normed input and qkv, or residual and both sides of the GELU; and the
    # scores of one block's attention.
    tokens = rows * n * (D + max(4 * D, 2 * var.ffn_dim))
    scores = rows * var.num_heads * n * L
    decoder = 0
    if vqvae is not None:
        sides = [vqvae.image_size // 2**level for level in range(len(vqvae.ch_mult))]
        # The decoder runs image by image: shortcut, normed map, its sigmoid and the convolution's result.
        decoder = max(4 * vqvae.ch * mult * side**2 for mult, side in zip(vqvae.ch_mult, sides, strict=True))
    return MemoryPlan(
        batch=batch,
        rows=rows,
        weights=weights,
        caches=cache_bytes * 2 * var.depth * rows * var.num_heads * L * HEAD_DIM,
        logits=FLOAT_BYTES * rows * n * var.vocab_size,
        activations=FLOAT_BYTES * max(tokens + scores, decoder),
    )


def proportional_set_size() -> int | None:
    """PSS of this process: private memory plus its share of shared pages. None where the system does not tell."""
    return _kilobytes(Path("/proc/self/smaps_rollup"), "Pss")


def peak_resident_size() -> int | None:
    """Highest resident size so far; it counts a file page once per mapping."""
    return _kilobytes(Path("/proc/self/status"), "VmHWM")


def _kilobytes(path: Path, field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(found.group(1)) if found else None
