"""A benchmark's rows → a picture: latency and throughput over the batch size, with floor and reference."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import EngineError, RequestError
from ..output_file import check_output

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Says before anything is timed what would fail after it. Raises RequestError and EngineError."""
    if path.suffix.lower() not in SUFFIXES:
        raise RequestError(f"{path}: unknown plot format {path.suffix!r}; use {', '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise EngineError("a plot needs matplotlib; pip install 'var-deploy[plot]'")
    check_output(path)


def plot_bench(rows: list[dict[str, Any]], path: Path, title: str, *, form: str | None = None) -> None:
    """Writes the picture; one colour per model and precision, one point per batch size. Raises EngineError.

    `rows` as in a record; those that failed have no "seconds" and are left out. form: where the name does not tell.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EngineError(f"a plot needs {error.name}; pip install 'var-deploy[plot]'") from error
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    for i, (name, series) in enumerate(_series(rows).items()):
        colour = f"C{i}"
        batches = [row["batch"] for row in series]
        medians = [row["seconds"]["median"] for row in series]
        below, above = ([abs(row["seconds"][q] - row["seconds"]["median"]) * 1e3 for row in series] for q in _RANGE)
        latency.errorbar(
            batches, [s * 1e3 for s in medians], [below, above], color=colour, marker="o", capsize=3, label=name
        )
        throughput.plot(batches, [b / s for b, s in zip(batches, medians, strict=True)], "o-", color=colour, label=name)
        for key, line, label in (
            ("floor_seconds", ":", "floor"),
            ("reference", "--", "eager"),
            ("half_reference", (0, (5, 1, 1, 1, 1, 1)), "eager bf16"),
            ("compiled", "-.", "compiled"),
        ):
            known = [(row["batch"], _seconds(row[key])) for row in series if row.get(key)]
            if known:
                at, seconds = zip(*known, strict=True)
                style = {"color": colour, "linestyle": line, "marker": ".", "alpha": 0.7, "label": f"{name} {label}"}
                latency.plot(at, [s * 1e3 for s in seconds], **style)
                throughput.plot(at, [b / s for b, s in known], **style)
    for axes, measure in ((latency, "ms per request"), (throughput, "images per second")):
        axes.set(xlabel="batch", ylabel=measure, xscale="log", yscale="log")
        ticks = sorted({row["batch"] for row in rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    if rows:
        latency.legend(fontsize="x-small")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, format=form or path.suffix[1:].lower(), dpi=150)


_RANGE = ("p10", "p90")


def _series(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by model and precision, smallest batch first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted((row for row in rows if row.get("seconds")), key=lambda row: row["batch"]):
        found.setdefault(f"{row.get('model', '')} {row['precision']}".strip(), []).append(row)
    return found


def _seconds(value: Any) -> float:
    return float(value["median"] if isinstance(value, dict) else value)
