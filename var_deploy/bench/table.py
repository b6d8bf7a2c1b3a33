"""The GPU suite's record → targets beside results, and a page of tables; whatever is missing says "not measured"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

NOT_MEASURED = "not measured"


class Goal(StrEnum):
    """What a target asks of a whole image: class id in, 8-bit picture on the host out, by the wall clock."""

    FLOOR = "time over floor"  #: at most so many times the floor, transformer and decoder
    MFU = "MFU"  #: at least this share of the ceiling of matrix products
    EAGER = "over eager PyTorch"  #: at least so many times as fast as the reference of the same run


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One number to beat, in bf16 with guidance."""

    model: str
    batch: int
    goal: Goal
    limit: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A target beside what was measured."""

    target: str
    limit: str
    result: str
    met: bool | None  #: None: not measured


TARGETS = (
    Target(model="d16", batch=1, goal=Goal.FLOOR, limit=1.8),
    Target(model="d30", batch=1, goal=Goal.FLOOR, limit=1.4),
    Target(model="d16", batch=64, goal=Goal.MFU, limit=0.5),
    Target(model="d16", batch=1, goal=Goal.EAGER, limit=8),
    Target(model="d30", batch=1, goal=Goal.EAGER, limit=8),
    Target(model="d16", batch=64, goal=Goal.EAGER, limit=2),
)


def outcome(target: Target, rows: Sequence[dict[str, Any]]) -> Outcome:
    """Looks the target's row up among those of a record; the floor is the one counted in that run."""
    wanted = {"model": target.model, "batch": target.batch, "precision": "bf16"}
    row = next((row for row in rows if wanted.items() <= row.items() and row.get("seconds")), {})
    name = f"{target.model}, batch {target.batch}: {target.goal}"
    value = _value(target.goal, row)
    if target.goal is Goal.FLOOR:
        limit, met = f"≤ {target.limit:g} × floor", None if value is None else value <= target.limit
        if value is None:
            return Outcome(target=name, limit=limit, result=NOT_MEASURED, met=met)
        seconds, least = row["seconds"]["median"], row["floor_seconds"]
        limit += f" = {_ms(target.limit * least)} ms"
        return Outcome(target=name, limit=limit, result=f"{value:.2f} × floor = {_ms(seconds)} ms", met=met)
    form = "{:.0%}" if target.goal is Goal.MFU else "{:.3g}×"
    return Outcome(
        target=name,
        limit=f"≥ {form.format(target.limit)}",
        result=NOT_MEASURED if value is None else form.format(value),
        met=None if value is None else value >= target.limit,
    )


def outcomes(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All targets, as they go into a record."""
    return [asdict(outcome(target, rows)) for target in TARGETS]


def _value(goal: Goal, row: dict[str, Any]) -> float | None:
    if goal is Goal.EAGER:
        return row.get("speedup")
    if not row.get("floor_seconds"):
        return None
    seconds = row["seconds"]["median"]
    if goal is Goal.FLOOR:
        return float(seconds / row["floor_seconds"])
    # The row's share is of the time on the device; the target is of the whole.
    on_device = row["device_seconds"]["median"] if row.get("device_seconds") else seconds
    return float(row["flops_share"] * on_device / seconds)


#: Model, engine, precision, batch: what tells rows apart.
RowKey = tuple[str, str, str, int]


def row_key(row: dict[str, Any]) -> RowKey:
    """Of a row, also of one that failed and names no engine but the first."""
    return row["model"], row.get("engine", "torch"), row["precision"], row["batch"]


def page(record: dict[str, Any] | None, planned: Sequence[RowKey]) -> str:
    """Markdown of a record (None: nothing was measured); `planned`: the suite's rows."""
    rows = record["rows"] if record else []
    parts = ["# Whole images on a GPU", _about(record)]
    lines = [
        f"| {o['target']} | {o['limit']} | {o['result']} | {_yes(o['met'])} |"
        for o in (record.get("targets") or outcomes(rows) if record else outcomes(()))
    ]
    parts += ["## Targets", "\n".join(["| whole image, bf16, guidance on | target | result | met |", _rule(4), *lines])]
    parts += ["## Rows", _rows_table(rows, planned)]
    for how in sorted({row["reference_how"] for row in rows if row.get("reference_how")}):
        parts.append(f"Eager and compiled PyTorch: {how}.")
    stages = [f"- {_name(row)}: {_stages(row['stages'])}" for row in rows if row.get("stages")]
    if stages:
        parts += ["## Milliseconds by stage", "Each stage a graph of its own, medians.", "\n".join(stages)]
    problems = [f"- {_name(row)}: {row['error']}" for row in rows if row.get("error")]
    problems += [f"- {_name(row)}, {what}: {why}" for row in rows for what, why in row.get("failed", {}).items()]
    if problems:
        parts += ["## Failed", "\n".join(problems)]
    if record and record["left_out"]:
        parts += ["## Left out", "\n".join(f"- {entry}" for entry in record["left_out"])]
    return "\n\n".join(parts) + "\n"


def _about(record: dict[str, Any] | None) -> str:
    again = "`make bench-gpu` on a machine with an NVIDIA GPU"
    how = (
        "Published sizes with random weights made on the spot, default sampling; class ids in, 8-bit pictures on the "
        "host out."
    )
    if record is None:
        return (
            f"{how} Nothing is measured yet: {again} fills this page and writes `gpu-<name>.json` and a plot beside it."
        )
    gpu, rates = record.get("gpu") or {}, record.get("ceilings") or {}
    facts = [str(gpu.get("name"))]
    facts += [f"{label} {gpu[key]}" for key, label in _GPU_FACTS.items() if gpu.get(key) is not None]
    ceilings = ""
    if rates:
        products = ", ".join(f"{k} {v / 1e12:.0f}" for k, v in rates["flops_per_second"].items() if v)
        ceilings = (
            f" Ceilings measured in this run: copy {rates['bytes_per_second'] / 1e12:.2f} TB/s; "
            f"matrix products in TFLOP/s: {products}."
        )
    return f"{how} {', '.join(facts)}.{ceilings} Written by {again}."


_GPU_FACTS = {
    "driver": "driver",
    "cuda_runtime": "CUDA",
    "torch": "torch",
    "triton": "triton",
    "sm_clock_limit_mhz": "SM clock limit in MHz",
    "power_limit_watts": "power limit in W",
}
_COLUMNS = (
    "model",
    "engine",
    "precision",
    "batch",
    "ms, median (p10–p90)",
    "p99",
    "images/s",
    "on the device",
    "without decoder",
    "floor",
    "share of floor",
    "MFU",
    "eager",
    "ratio",
    "compiled",
    "ratio",
    "J/image",
    "peak GB",
    "SM MHz",
)


def _rows_table(rows: Sequence[dict[str, Any]], planned: Sequence[RowKey]) -> str:
    found = {row_key(row): row for row in rows}
    names = list(dict.fromkeys([*planned, *found]))
    lines = [f"| {' | '.join(_COLUMNS)} |", _rule(len(_COLUMNS))]
    for key in names:
        cells = [*map(str, key), *_cells(found.get(key))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(row: dict[str, Any] | None) -> list[str]:
    if row is None or not row.get("seconds"):
        nothing = NOT_MEASURED if row is None else "failed"
        return [nothing] + [""] * (len(_COLUMNS) - 5)
    seconds = row["seconds"]

    def median(key: str) -> str:
        return _ms(row[key]["median"]) if row.get(key) else ""

    def number(key: str, form: str, scale: float = 1.0) -> str:
        return "" if row.get(key) is None else form.format(row[key] * scale)

    clock = (row.get("gpu") or {}).get("sm_clock_mhz")
    return [
        f"{_ms(seconds['median'])} ({_ms(seconds['p10'])}–{_ms(seconds['p90'])})",
        _ms(seconds["p99"]),
        number("images_per_second", "{:.1f}"),
        median("device_seconds"),
        median("without_decoder"),
        number("floor_seconds", "{:.2f}", 1e3),
        number("share_of_floor", "{:.0%}"),
        number("flops_share", "{:.0%}"),
        median("reference"),
        number("speedup", "{:.2f}×"),
        median("compiled"),
        number("compiled_speedup", "{:.2f}×"),
        number("joules_per_image", "{:.2f}"),
        number("device_peak_bytes", "{:.2f}", 1e-9),
        "" if clock is None else str(clock),
    ]


def _name(row: dict[str, Any]) -> str:
    model, engine, precision, batch = row_key(row)
    return f"{model}{'' if engine == 'torch' else f' {engine}'} {precision} batch {batch}"


def _stages(stages: dict[str, float]) -> str:
    return ", ".join(f"{name} {_ms(seconds)}" for name, seconds in stages.items())


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _yes(met: bool | None) -> str:
    return NOT_MEASURED if met is None else "yes" if met else "no"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns
