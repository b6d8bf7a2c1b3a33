"""How many threads compute: the CPUs that this process may use, and why not more.

Matrix products keep a core's multipliers busy, so a second thread on the same core gains nothing, and more threads than
CPUs wait for each other: every step ends when its slowest thread does. Measured with d16 on one CPU: two threads take
5.7 s where one takes 4.7 s.
"""

from __future__ import annotations

import os
import re
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from .cgroups import cpu_quota

TOPOLOGY = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class UsableCpus:
    """cpus: logical CPUs of the scheduler's affinity; cores: physical ones among them, None where not told.

    quota: CPUs' worth of time that the control group allows; None without a limit.
    """

    cpus: int
    cores: int | None
    quota: float | None

    @property
    def most(self) -> int:
        """Threads that can run at the same time."""
        return self.cpus if self.quota is None else min(self.cpus, max(1, int(self.quota)))

    @property
    def threads(self) -> int:
        """Threads that compute best: one per core."""
        return min(self.most, self.cores or self.cpus)

    @property
    def limit(self) -> str:
        """What decides `most`."""
        if self.most < self.cpus:
            return f"the control group allows {self.quota:g} of {_counted(self.cpus, 'CPU')}"
        return f"{_counted(self.cpus, 'CPU')} by affinity"

    @property
    def reason(self) -> str:
        """What decides `threads`."""
        if self.most < min(self.cpus, self.cores or self.cpus):
            return self.limit
        if self.cores is None:
            return f"{_counted(self.cpus, 'CPU')}, whose cores are not known"
        if self.cores < self.cpus:
            return f"{_counted(self.cores, 'core')} of {self.cpus} CPUs: a core's second thread adds no multipliers"
        return f"{_counted(self.cores, 'core')} by affinity"


def usable_cpus() -> UsableCpus:
    """Asked for anew, as affinity and quota may change."""
    if hasattr(os, "sched_getaffinity"):
        cpus: Set[int] = os.sched_getaffinity(0)
    else:
        cpus = frozenset(range(os.cpu_count() or 1))
    return UsableCpus(cpus=len(cpus), cores=physical_cores(cpus), quota=cpu_quota())


def physical_cores(cpus: Set[int], topology: Path = TOPOLOGY) -> int | None:
    """Cores that these CPUs lie on; None where the system does not tell of one of them."""
    cores = set()
    for cpu in cpus:
        try:
            siblings = (topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
        except (OSError, ValueError):
            return None
        if not re.fullmatch("[0-9]+([-,][0-9]+)*", siblings):
            return None
        cores.add(siblings)
    return len(cores)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("s" if count != 1 else "")
