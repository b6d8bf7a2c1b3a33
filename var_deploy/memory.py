"""What a bundle needs in memory, computed from its configuration, and what this process really has.

Sizes are in bytes unless the name says otherwise.
"""

from __future__ import annotations

import ctypes
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .config import HEAD_DIM, VARConfig, VQVAEConfig

FLOAT_BYTES = 4

#: ONNX Runtime's arena takes memory in pieces that double, so it holds more than is alive. Measured at d16's last scale
#: with four guided images: 211 MB in float32 and 224 MB in int8, where the plan counts 184 MB.
ARENA_SLACK = 1.25

#: What a process holds besides: Python, NumPy, ONNX Runtime and what allocators keep; and the winograd decoder's
#: compiler. With them the plan of d16 is above the measured peak: 2,470 MB for 2,434 of one guided image, 2,714 for
#: 2,632 of two, 3,203 for 3,094 of four; with the decoder's graph 2,176 for 1,839, 2,420 for 2,136, 2,909 for 2,737.
PROCESS_BYTES = 180_000_000
COMPILER_BYTES = 100_000_000

#: Floats per logit while one image draws: logits mixed and sorted, and weights and sums in double precision.
DRAW_FLOATS = 10

#: Floats per channel of the widest map that one worker of the winograd decoder holds: a strip's tiles in 36 planes,
#: before and after the product, and its padded rows.
WORKER_FLOATS = 3 * 36 * 256


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Memory of one generation on the CPU engine; activations and process are estimates, the rest is counted."""

    batch: int
    rows: int
    weights: int
    caches: int
    logits: int
    activations: int
    process: int

    @property
    def request(self) -> int:
        """What the request itself takes, and gives back."""
        return self.caches + self.logits + self.activations

    @property
    def total(self) -> int:
        return self.process + self.weights + self.request


def memory_plan(
    var: VARConfig,
    vqvae: VQVAEConfig | None,
    weights: int,
    batch: int,
    *,
    guided: bool = True,
    cache_bytes: int = FLOAT_BYTES,
    workers: int = 0,
) -> MemoryPlan:
    """Plan for a batch; `weights` is the size of those that are loaded, `cache_bytes` that of an element of the caches.

    workers: threads of the winograd decoder, 0 for the decoder's graph. Without a VQVAE: transformer alone.
    """
    rows = 2 * batch if guided else batch
    n, L, D = var.tokens_per_scale[-1], var.num_tokens, var.embed_dim
    # Live at once in the widest places of a block: residual and both sides of the GELU; or residual, q, k and v, their
    # result, the valid part of both caches, and the scores.
    mlp = n * (D + 2 * var.ffn_dim)
    attention = n * 6 * D + 2 * L * D + var.num_heads * n * L
    transformer = int(ARENA_SLACK * rows * max(mlp, attention))
    decoder = 0
    if vqvae is not None:
        sides = [vqvae.image_size // 2**level for level in range(len(vqvae.ch_mult))]
        widest = max(vqvae.ch * mult * side**2 for mult, side in zip(vqvae.ch_mult, sides, strict=True))
        # Image by image. The graph: shortcut, map, its norm, its sigmoid, their product and the convolution's result;
        # measured with d16: 252 MB, six maps. The winograd decoder keeps three maps, and buffers of each worker.
        decoder = 6 * widest
        if workers:
            decoder = 3 * widest + workers * WORKER_FLOATS * vqvae.ch * max(vqvae.ch_mult[:-1], default=0)
    # They do not run at the same time, but what one of them frees may stay with the allocator. Images are drawn one by
    # one.
    activations = max(transformer, DRAW_FLOATS * n * var.vocab_size) + decoder
    return MemoryPlan(
        batch=batch,
        rows=rows,
        weights=weights,
        caches=cache_bytes * 2 * var.depth * rows * var.num_heads * L * HEAD_DIM,
        logits=FLOAT_BYTES * rows * n * var.vocab_size,
        activations=FLOAT_BYTES * activations,
        process=PROCESS_BYTES + (COMPILER_BYTES if workers else 0),
    )


def proportional_set_size() -> int | None:
    """PSS of this process: private memory plus its share of shared pages. None where the system does not tell."""
    return _kilobytes(Path("/proc/self/smaps_rollup"), "Pss")


def anonymous_size() -> int | None:
    """Memory of this process that no file backs."""
    return _kilobytes(Path("/proc/self/status"), "RssAnon")


def peak_resident_size() -> int | None:
    """Highest resident size so far; it counts a file page once per mapping."""
    return _kilobytes(Path("/proc/self/status"), "VmHWM")


def release_freed_memory() -> None:
    """Has the C library give back what was freed, where it can be asked to: it keeps large blocks for the next."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _kilobytes(path: Path, field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(found.group(1)) if found else None
