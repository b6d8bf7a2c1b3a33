"""What the control groups of a process allow it: CPU time and memory, of cgroup v1, v2 or both at once.

A limit of any group above counts too, so every function looks at all of them, from the process's own group up to the
one that is mounted. What is missing or unreadable limits nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROCESS = Path("/proc/self")


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryGroup:
    """The group that leaves least, in bytes; what the kernel can drop (page cache) does not count as used."""

    limit: int
    used: int

    @property
    def free(self) -> int:
        return max(0, self.limit - self.used)


def cpu_quota(process: Path = PROCESS) -> float | None:
    """CPUs' worth of time that the process may use; None without a limit."""
    quotas = []
    for group in _groups("cpu", process):
        words = _text(group / "cpu.max").split()  # v2: "max 100000" or "150000 100000"
        if not words:  # v1: −1 without a limit
            words = [_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        quota, period = (*map(_number, words), None, None)[:2]
        if quota and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def memory_group(process: Path = PROCESS) -> MemoryGroup | None:
    """The group above the process that leaves least memory; None where none limits it."""
    found = []
    for group in _groups("memory", process):
        for limit_file, used_file, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            limit, used = (_number(_text(group / name)) for name in (limit_file, used_file))
            # v1 says "none" by the largest multiple of a page.
            if limit is not None and used is not None and limit < 2**62:
                cache = sum(_field(_text(group / "memory.stat"), f"{prefix}{kind}_file") for kind in _PAGES)
                found.append(MemoryGroup(limit=limit, used=max(0, used - cache)))
    return min(found, key=lambda group: group.free, default=None)


_PAGES = ("active", "inactive")


def _groups(controller: str, process: Path) -> Iterator[Path]:
    """Directories of the process's group and of those above it: of the v1 controller, then of v2."""
    paths: dict[str, str] = {}
    for line in _text(process / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, own = rest.partition(":")
        if controller in names.split(","):
            paths["cgroup"] = own
        elif number == "0" and not names:
            paths["cgroup2"] = own
    for line in _text(process / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in paths:
            continue
        if kind[0] == "cgroup" and controller not in kind[2].split(","):
            continue
        root, mounted = (_unescaped(field) for field in fields[3:5])
        # A container may see its own group as the mount's root while its path is told from the host's.
        path = PurePosixPath(paths[kind[0]])
        inside = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
        if ".." in inside.parts:  # a group outside the namespace, of which nothing is seen
            inside = PurePosixPath()
        yield from (Path(mounted) / part for part in (inside, *inside.parents))


def _unescaped(field: str) -> str:
    """mountinfo writes a blank in a path as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found.group(1), 8)), field)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except (OSError, ValueError):  # a path with a null byte is a ValueError
        return ""


def _number(text: str) -> int | None:
    """A count of at least 0; None for "max", −1 and anything else."""
    return int(text) if re.fullmatch("[0-9]{1,20}", text) else None


def _field(text: str, name: str) -> int:
    found = re.search(rf"^{name} ([0-9]{{1,20}})$", text, re.MULTILINE)
    return int(found.group(1)) if found else 0
