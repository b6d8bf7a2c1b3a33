"""The CPU suite's record → targets beside results, and a page of tables; whatever is missing says "not measured"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from .cpu_variants import COMPILED, EAGER, HALF, HALF_COMPILED
from .table import NOT_MEASURED, Outcome


class Goal(StrEnum):
    """What a target asks of a bundle; whole images, class id in, 8-bit picture out."""

    EAGER = "over eager PyTorch in float32"  #: at least so many times as fast, in the same run
    HALF = "over PyTorch under bf16 autocast"  #: the same, with a channels-last decoder
    MEMORY = "PSS after one image"  #: at most so many times the weights' file, and MEMORY_SPARE
    START = "load to first image"  #: at most so many times a warm image, and START_SPARE


MEMORY_SPARE = 400_000_000  # bytes
START_SPARE = 3.0  # seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One number to beat, of the bundle of a precision."""

    precision: str
    batch: int
    goal: Goal
    limit: float


TARGETS = (
    Target(precision="fp32", batch=1, goal=Goal.EAGER, limit=1.5),
    Target(precision="fp32", batch=8, goal=Goal.EAGER, limit=1.5),
    Target(precision="int8", batch=1, goal=Goal.EAGER, limit=3.5),
    Target(precision="int8", batch=8, goal=Goal.EAGER, limit=3.5),
    Target(precision="int8", batch=1, goal=Goal.HALF, limit=1.6),
    Target(precision="int8", batch=8, goal=Goal.HALF, limit=1.6),
    *(Target(precision=name, batch=1, goal=Goal.MEMORY, limit=1.3) for name in ("fp32", "int8")),
    *(Target(precision=name, batch=1, goal=Goal.START, limit=1.5) for name in ("fp32", "int8")),
)


def outcome(target: Target, record: dict[str, Any]) -> Outcome:
    """The target beside what a record says."""
    name = f"{target.precision}, batch {target.batch}: {target.goal}"
    start = record["starts"].get(target.precision, {}).get("later", {})
    if target.goal is Goal.MEMORY:
        limit = f"≤ {target.limit:g} × weights + {_mega(MEMORY_SPARE)} MB"
        if "pss_bytes" not in start:
            return Outcome(target=name, limit=limit, result=NOT_MEASURED, met=None)
        most = target.limit * record["weights_bytes"][target.precision] + MEMORY_SPARE
        met = start["pss_bytes"] <= most
        return Outcome(
            target=name, limit=f"{limit} = {_mega(most)} MB", result=f"{_mega(start['pss_bytes'])} MB", met=met
        )
    if target.goal is Goal.START:
        limit = f"≤ {target.limit:g} × warm image + {START_SPARE:g} s"
        if not start:
            return Outcome(target=name, limit=limit, result=NOT_MEASURED, met=None)
        most, taken = target.limit * start["warm_seconds"] + START_SPARE, start["first_image_seconds"]
        return Outcome(target=name, limit=f"{limit} = {most:.2f} s", result=f"{taken:.2f} s", met=taken <= most)
    limit = f"≥ {target.limit:g}×"
    reference = EAGER if target.goal is Goal.EAGER else HALF
    found: list[dict[str, Any]] = [row["ratios"] for row in record["batches"] if row["batch"] == target.batch]
    ratio = found[0].get(target.precision, {}).get(reference) if found else None
    if ratio is None:
        return Outcome(target=name, limit=limit, result=NOT_MEASURED, met=None)
    return Outcome(target=name, limit=limit, result=_ratio(ratio), met=ratio["median"] >= target.limit)


def outcomes(record: dict[str, Any]) -> list[dict[str, Any]]:
    """All targets, as they go into a record."""
    return [asdict(outcome(target, record)) for target in TARGETS]


def page(record: dict[str, Any]) -> str:
    """Markdown of a record."""
    sections = [f"# d{record['model']['depth']} on a CPU", _about(record), "![Seconds by part](cpu.png)"]
    lines = [(o["target"], o["limit"], o["result"], _yes(o["met"])) for o in outcomes(record)]
    sections += [
        "## Targets",
        "Ratios: median (min–max) over the repeats.",
        _table(("", "target", "result", "met"), lines),
    ]
    for row in record["batches"]:
        sections += [f"## Batch {row['batch']}", *_batch(row, record["variants"])]
    if record["variants"]:
        sections.append("\n".join(f"- {NAMES.get(name, name)}: {of['how']}" for name, of in record["variants"].items()))
    if record["starts"]:
        sections += ["## Start and memory", START_NOTE, _starts(record)]
    for name, of in record["operators"].items():
        sections += [f"## Milliseconds by operator, {name}", *(_operators(part, ops) for part, ops in of.items())]
    failed = [
        f"- batch {row['batch']}, {NAMES.get(name, name)}: {why}"
        for row in record["batches"]
        for name, why in row["failed"].items()
    ]
    if failed:
        sections += ["## Failed", "\n".join(failed)]
    return "\n\n".join([*sections, FOOTER]) + "\n"


#: How the page calls the references; bundles are called by their precision.
NAMES = {
    EAGER: "PyTorch float32",
    HALF: "PyTorch bf16",
    COMPILED: "compiled float32",
    HALF_COMPILED: "compiled bf16",
}

START_NOTE = (
    "A new process at batch 1, from the start of loading; files in the system's page cache. First start: nothing is "
    "prepared for this machine yet. Later starts: medians."
)

#: What `make bench-cpu` does not measure.
FOOTER = """\
## Export and parity

| | export | peak RSS | weights.safetensors |
|---|---|---|---|
| d16, fp32 | 18.7 s | 2,065 MB | 1,677 MB |
| d30, fp32 | 57.1 s | 8,689 MB | 8,476 MB |

Measured by `make test-full` on 2 cores of an AMD EPYC (Zen 4) virtual machine, onnxruntime 1.32.0, torch 2.13.0. Peak
RSS includes the mapped checkpoint; the exporter itself holds one tensor at a time. `verify` on d16 there, float32,
classes 0 and 999, both kinds of graph, all ten scales: largest logit difference 4.8e-6, pixels 4.3e-6, all greedy and
all encoder tokens equal. Ten sessions of d16's static graphs with ONNX Runtime's default settings take 9,016 MB of PSS
when loaded, 9,675 MB after one image, and 31.1 s to load: the control of `tests/var_deploy/test_memory.py`, which no
target repeats at that size.

## Again

```sh
make bench-cpu    # all but the last section
make test-full    # export, parity and memory, d16 and d30
```"""


def _about(record: dict[str, Any]) -> str:
    machine, sampling = record["machine"], record["sampling"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "onnxruntime", "torch") if name in machine)
    instructions = ", ".join(machine["instructions"]) or "unknown instructions"
    return (
        f"{record['model']['image']} px, guidance {sampling['guidance']:g}, top-k {sampling['top_k']}, top-p "
        f"{sampling['top_p']:g}; class ids in, 8-bit pictures out, loading and warm-up not included. Machine: "
        f"{machine['processor']}, {machine['cores']} cores with {instructions}, {machine['threads']} threads for every "
        f"variant; {versions}. PyTorch has random weights. Every repeat runs all variants in turn. Written by "
        "`make bench-cpu`, whose bundles have random weights too; all numbers: [cpu.json](cpu.json)."
    )


def _batch(row: dict[str, Any], variants: dict[str, Any]) -> list[str]:
    head = (
        "",
        "seconds, median (p10–p90)",
        "per image",
        "transformer",
        "draw",
        "decoder",
        "rest",
        "of ceiling: transformer",
        "decoder",
        f"over {NAMES[EAGER]}",
        f"over {NAMES[HALF]}",
    )
    lines = []
    for name, of in row["variants"].items():
        seconds, parts, share = of["seconds"], of["parts"], of["share_of_ceiling"]
        ratios = row["ratios"].get(name, {})
        lines.append(
            (
                NAMES.get(name, name),
                f"{seconds['median']:.3f} ({seconds['p10']:.3f}–{seconds['p90']:.3f})",
                f"{seconds['median'] / row['batch']:.3f}",
                *(f"{parts[part]:.3f}" for part in ("transformer", "draw", "decode", "rest")),
                f"{share['transformer']:.0%}",
                f"{share['decode']:.0%}",
                *(_ratio(ratios[of]) if of in ratios else "" for of in (EAGER, HALF)),
            )
        )
    flops = row["flops"]
    transformer = sum(count for part, count in flops.items() if part != "decode")
    ceilings = "; ".join(
        f"{name} {of['flops_per_second'] / 1e9:.0f} ({of['how']})" for name, of in row["ceilings"].items()
    )
    count = next(iter(row["variants"].values()))["seconds"]["count"]
    notes = (
        f"Repeats: {count}. Operations: transformer {transformer / 1e9:,.1f} G, decoder {flops['decode'] / 1e9:,.1f} "
        "G, counted as plain products and convolutions, so a decoder that multiplies less can pass its ceiling. "
        f"Ceilings in this run, 10⁹ operations per second: {ceilings}."
    )
    stages = [
        f"- {name}, milliseconds by stage: "
        + ", ".join(f"{stage} {seconds * 1e3:.1f}" for stage, seconds in of["stages"].items())
        for name, of in row["variants"].items()
        if variants[name]["ours"]
    ]
    compiled = [
        f"- {NAMES[name]}: the first run, compilation included, took {of['first_seconds']:.0f} s"
        for name, of in row["variants"].items()
        if name in (COMPILED, HALF_COMPILED)
    ]
    return [_table(head, lines), notes, "\n".join([*stages, *compiled])]


def _starts(record: dict[str, Any]) -> str:
    head = ("", "weights, MB", "load, s", "first image, s", "warm image, s", "PSS after one image, MB")
    lines = []
    for name, start in record["starts"].items():
        for which, of in start.items():
            pss = _mega(of["pss_bytes"]) if "pss_bytes" in of else NOT_MEASURED
            times = (f"{of[key]:.2f}" for key in ("load_seconds", "first_image_seconds", "warm_seconds"))
            lines.append((f"{name}, {which}", _mega(record["weights_bytes"][name]), *times, pss))
    return _table(head, lines)


def _operators(part: str, milliseconds: dict[str, float]) -> str:
    total = sum(milliseconds.values())
    shown = {name: value for name, value in milliseconds.items() if value >= 0.01 * total}
    others = total - sum(shown.values())
    listed = ", ".join(f"{name} {value:.1f}" for name, value in {**shown, "others": others}.items())
    return f"- {part}, {total:.1f} in all: {listed}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(cells)} |" for cells in (head, *lines)]
    return "\n".join([rows[0], "|" + "---|" * len(head), *rows[1:]])


def _ratio(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f}× ({spread['minimum']:.2f}–{spread['maximum']:.2f})"


def _mega(size: float) -> str:
    return f"{size / 1e6:,.0f}"


def _yes(met: bool | None) -> str:
    return NOT_MEASURED if met is None else "yes" if met else "no"
