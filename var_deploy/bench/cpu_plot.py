"""The CPU suite's record → a picture: seconds by part at the smallest batch size, seconds per image at the largest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import EngineError
from .cpu_table import NAMES
from .cpu_variants import PARTS

LABELS = {"decode": "decoder"}


def plot_cpu(record: dict[str, Any], path: Path) -> None:
    """Writes the picture, a bar per variant; panels without a measurement stay empty. Raises EngineError."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EngineError(f"a plot needs {error.name}; pip install 'var-deploy[plot]'") from error
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    rows = record["batches"]
    for axes, row in zip(panels, (rows[0], rows[-1]) if rows else (), strict=False):
        names = list(row["variants"])
        at = [NAMES.get(name, name) for name in names]
        if axes is panels[0]:
            _stacked(axes, at, [row["variants"][name]["parts"] for name in names])
            axes.set(title=f"batch {row['batch']}", xlabel="seconds, medians")
        else:
            _whole(axes, at, [row["variants"][name]["seconds"] for name in names], row["batch"])
            axes.set(title=f"batch {row['batch']}", xlabel="seconds per image, median and p10–p90")
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    machine = record["machine"]
    figure.suptitle(
        f"d{record['model']['depth']}, {record['model']['image']} px, on {machine['processor']}, "
        f"{machine['threads']} threads",
        fontsize="medium",
    )
    figure.savefig(path, format=path.suffix[1:].lower(), dpi=150)


def _stacked(axes: Any, names: list[str], parts: list[dict[str, float]]) -> None:
    left = [0.0] * len(names)
    for part in PARTS:
        widths = [of[part] for of in parts]
        axes.barh(names, widths, left=left, label=LABELS.get(part, part))
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    axes.legend(fontsize="small")


def _whole(axes: Any, names: list[str], seconds: list[dict[str, float]], batch: int) -> None:
    medians = [of["median"] / batch for of in seconds]
    around = [[abs(of[q] - of["median"]) / batch for of in seconds] for q in ("p10", "p90")]
    axes.barh(names, medians, xerr=around, capsize=3, color="C0")
