"""How many images of a batch run at a time on a CPU: the memory plan against what this process may have.

Without this a batch that is too large would be ended by the system in the middle of a request, with the whole process.
"""

from __future__ import annotations

import bisect
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .bundle import Bundle
from .cgroups import memory_group
from .engines.engine import Decoder
from .engines.winograd.layout import finer_convolutions
from .errors import EngineError
from .memory import FLOAT_BYTES, MemoryPlan, memory_plan

log = logging.getLogger("var_deploy")

#: Share of what is free that is left to everything else on the machine.
MARGIN = 0.05

#: Units of a limit in bytes; a bare number is in MB, as all sizes are printed.
UNITS = {"": 10**6, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that this process could still take: what the machine or its control group has left; None where unknown.

    Page cache counts as left, the mapped weights in it too.
    """
    left = []
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        left.append(1024 * int(found.group(1)))
    if (group := memory_group()) is not None:
        left.append(group.free)
    return min(left, default=None)


def bytes_from_text(text: str) -> int:
    """A size like 4000 (MB), 3.5G, 500MB or 4GiB in bytes. Raises EngineError."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(|[KMGT]i?)B?", text.strip(), re.ASCII)
    size = 0 if found is None else int(float(found.group(1)) * UNITS[found.group(2)])
    if size < 1:
        raise EngineError(f"memory limit: got {text!r}, expected megabytes or a size with its unit: 4000, 4GB, 3.5GiB")
    return size


def onnx_plan(bundle: Bundle, decoder: Decoder, threads: int) -> Callable[[int, bool], MemoryPlan]:
    """plan(batch, guided) of the onnx engine. Raises BundleError."""
    manifest, stored = bundle.manifest, bundle.weight_bytes()
    half = manifest.precision.graph_dtype != "float32"
    if half:  # ONNX Runtime's CPU kernels are float32: it makes float32 of halves when it loads
        stored = {name: FLOAT_BYTES * size for name, size in bundle.weight_sizes().items()}
    if decoder is Decoder.WINOGRAD:
        for name in finer_convolutions(manifest.vqvae):
            if f"{name}.weight" in stored:  # else loading says so
                stored[f"{name}.weight"] *= 4  # 36 planes instead of 9 taps
    # The encoder is loaded when it is first used.
    weights = sum(size for name, size in stored.items() if not name.startswith(("encoder.", "quant_conv.")))

    def plan(batch: int, guided: bool) -> MemoryPlan:
        return memory_plan(
            manifest.var,
            manifest.vqvae,
            weights,
            batch,
            guided=guided,
            cache_bytes=2 if half else FLOAT_BYTES,
            workers=threads if decoder is Decoder.WINOGRAD else 0,
        )

    return plan


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBudget:
    """What one request may have; requests side by side each count what is free when they start, not each other.

    plan: of a batch, guided or not. limit: bytes that the process should stay within, from the user. held: private
    bytes that the engine had when it was loaded, which the plan's weights are part of. reused: bytes of requests that
    run now which the system takes for free, see `workspace`.
    """

    plan: Callable[[int, bool], MemoryPlan]
    limit: int | None = None
    held: int = 0
    reused: Callable[[], int] = lambda: 0
    _told: set[tuple[int, bool, int]] = field(default_factory=set, repr=False)

    def images_at_once(self, batch: int, guided: bool) -> int:
        """The most images of this batch that fit, 0 if not even one does."""
        return self._fitting(batch, guided, self._room())

    def chunks(self, batch: int, guided: bool) -> list[int]:
        """Images of each run, in order and as equal as they can be: [batch] where all fit. Raises EngineError."""
        room = self._room()
        most = self._fitting(batch, guided, room)
        if most == 0:
            raise EngineError(self._too_little(guided, room))
        runs = -(-batch // most)
        chunks = [batch * (run + 1) // runs - batch * run // runs for run in range(runs)]
        if runs > 1 and (shape := (batch, guided, runs)) not in self._told:
            self._told.add(shape)
            log.info(
                "a batch of %d needs %s, %s: it runs in %d parts of at most %d images, one after the other",
                batch,
                _mega(self.plan(batch, guided).total),
                room,
                runs,
                max(chunks),
            )
        return chunks

    def _room(self) -> _Room:
        available = available_memory()
        free = None if available is None else int((1 - MARGIN) * max(0, available - self.reused())) + self.held
        if self.limit is not None and (free is None or self.limit <= free):
            return _Room(size=self.limit, limited=True)
        return _Room(size=free, limited=False)

    def _fitting(self, batch: int, guided: bool, room: _Room) -> int:
        if room.size is None:
            return batch
        return bisect.bisect_right(range(1, batch + 1), room.size, key=lambda size: self.plan(size, guided).total)

    def _too_little(self, guided: bool, room: _Room) -> str:
        plan = self.plan(1, guided)
        steps = ["raise memory_limit" if room.limited else "free memory"]
        steps += ["set guidance=0, which takes half the rows"] if guided else []
        return (
            f"one image needs {_mega(plan.total)} ({_mega(plan.weights)} of weights, {_mega(plan.request)} while it "
            f"runs), {room}; {', '.join(steps)}, or use a smaller or an int8 bundle"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Room:
    """Bytes that the process may have in all; None where the system does not tell."""

    size: int | None
    limited: bool  #: by the user

    def __str__(self) -> str:
        return f"{_mega(self.size or 0)} {'are allowed by memory_limit' if self.limited else 'can be had here'}"


def _mega(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
