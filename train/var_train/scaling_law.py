"""Finished VAR runs → power laws of test loss and token error rate over model size and compute (paper section 5.1).

    y = (β·x)^α, a line in logarithms: log y = α·log x + α·log β, by ordinary least squares

x is N, all trainable parameters with embeddings and AdaLN, or C, the operations of training (`model_flops`). Every run
given counts alike, and the paper's law over C is one of optimal runs: give runs whose size suits their compute. 95 %
intervals come from Student's t with n − 2 degrees of freedom for n runs, whose log y is taken to scatter independently
and normally. All logarithms are natural.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from var_deploy.config import ConfigError, VARConfig, config_from_dict
from var_deploy.errors import DataError, EngineError, RequestError

from .configuration import VARRun
from .model_flops import training_flops
from .power_law import CONFIDENCE, FEWEST, Interval, PowerLaw, fit_power_law, has_exponential
from .run_folder import FORMAT, RUN_FILE
from .watch import METRICS_FILE, read_metrics

VALIDATION = ("validation_loss", "validation_accuracy")
PLOT_SUFFIXES = (".png", ".svg", ".pdf")


class Size(StrEnum):
    """x of a law, by its name in `RunResult`."""

    PARAMETERS = "parameters"
    COMPUTE = "compute"


class Measure(StrEnum):
    """y of a law, by its name in `RunResult`."""

    LOSS = "loss"
    LOSS_LAST = "loss_last"
    ERROR = "error"
    ERROR_LAST = "error_last"


TITLES = {
    Size.PARAMETERS: "N (parameters)",
    Size.COMPUTE: "C (FLOP)",
    Measure.LOSS: "loss",
    Measure.LOSS_LAST: "loss, last scale",
    Measure.ERROR: "token error",
    Measure.ERROR_LAST: "token error, last scale",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """One run: how large, and how good on the validation images. Losses in nats per token, errors from 0 to 1."""

    name: str
    depth: int
    width: int
    parameters: int
    compute: float  #: operations of the whole training
    loss: float
    loss_last: float  #: of the last scale's tokens alone
    error: float  #: part of the tokens whose most likely entry is not theirs
    error_last: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """One measure over one size."""

    y: Measure
    x: Size
    law: PowerLaw


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingReport:
    """Runs by parameters, and a fit for every measure and size."""

    runs: tuple[RunResult, ...]
    fits: tuple[Fit, ...]

    def values(self, what: Size | Measure) -> list[float]:
        """One number per run."""
        return [getattr(run, what) for run in self.runs]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "confidence": CONFIDENCE,
            "runs": [dataclasses.asdict(run) for run in self.runs],
            "fits": [{"y": fit.y.value, "x": fit.x.value, **fit.law.to_dict()} for fit in self.fits],
        }


def fit_runs(runs: Sequence[Path]) -> ScalingReport:
    """Reads `run.json` and the last validation of every run, and fits. Raises DataError, on one line.

    Some runs may be of the same size, but there must be three sizes, and all must be measured on the same tokens.
    """
    if len(runs) < FEWEST:
        raise DataError(f"got {len(runs)} runs, expected at least {FEWEST} of different sizes; train or name more")
    for i, run in enumerate(runs):
        if run.resolve() in [other.resolve() for other in runs[:i]]:
            raise DataError(f"{run}: got this run twice, which would count as two; name it once")
    names = [run.resolve().name for run in runs]
    found = [
        _read_run(run, name if names.count(name) == 1 else str(run)) for run, name in zip(runs, names, strict=True)
    ]
    for run, (_, other) in zip(runs, found, strict=True):
        for what, expected in found[0][1].items():
            if other[what] != expected:
                raise DataError(
                    f"{run}: got {what} {other[what]!r}, expected {expected!r} as in {runs[0]}, because losses on "
                    "other tokens cannot be compared; leave one of them out"
                )
    report = ScalingReport(runs=tuple(sorted((result for result, _ in found), key=lambda run: run.parameters)), fits=())
    return dataclasses.replace(report, fits=tuple(_fit(report, y, x) for x in Size for y in Measure))


def _fit(report: ScalingReport, y: Measure, x: Size) -> Fit:
    try:
        return Fit(y=y, x=x, law=fit_power_law(report.values(x), report.values(y)))
    except DataError as error:
        raise DataError(f"{TITLES[y]} over {TITLES[x]}: {error}") from error


def print_report(report: ScalingReport, console: Console) -> None:
    """A row per run, and a row per fit."""
    title = "N parameters, C operations; loss per token in nats, wrong tokens"
    table = _table(title, ("run",), ("depth × width", "N", "C", "loss", "last scale", "error", "last scale"))
    for run in report.runs:
        measured = (f"{run.loss:.4f}", f"{run.loss_last:.4f}", f"{run.error:.2%}", f"{run.error_last:.2%}")
        sizes = f"{run.depth} × {run.width}", f"{run.parameters:,}", f"{run.compute:.2e}"
        table.add_row(escape(run.name), *sizes, *measured)
    console.print(table)
    title = f"y = (β·x)^α over {len(report.runs)} runs, {CONFIDENCE:.0%} intervals"
    table = _table(title, ("y", "x"), ("α", "β", "β from … to", "r"))
    for fit in report.fits:
        law, interval = fit.law, fit.law.log_beta_interval
        alpha = f"{law.alpha:.4f} ± {law.alpha_interval[1] - law.alpha:.4f}"
        betas = "no end: α may be 0" if interval is None else " … ".join(_exponential(end) for end in interval)
        x = TITLES[fit.x].split()[0]
        table.add_row(TITLES[fit.y], x, alpha, _exponential(law.log_beta), betas, f"{law.correlation:.4f}")
    console.print(table)


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    """A narrow terminal folds what it cannot show, and never cuts a number."""
    table = Table(title=title)
    for head in words:
        table.add_column(head, overflow="fold")
    for head in numbers:
        table.add_column(head, justify="right", overflow="fold")
    return table


def plot_report(report: ScalingReport, path: Path) -> None:
    """Writes a picture with a panel per fit: runs, law and band. Raises EngineError and RequestError."""
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise RequestError(f"{path}: unknown plot format {path.suffix!r}; use {', '.join(PLOT_SUFFIXES)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EngineError(f"a plot needs {error.name}; pip install 'var-deploy[plot]'") from error
    partial = path.with_name(f".partial-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure = Figure(figsize=(4 * len(Measure), 4 * len(Size)), layout="constrained")
        for fit, axes in zip(report.fits, figure.subplots(len(Size), len(Measure)).flat, strict=True):
            _draw(report, fit, axes)
        figure.savefig(partial, format=path.suffix[1:].lower(), dpi=100)
        partial.replace(path)
    except OSError as error:
        raise RequestError(f"{path}: cannot write ({error.strerror or error}); choose another place") from error
    finally:
        with suppress(OSError):  # it may never have existed
            partial.unlink()


def _draw(report: ScalingReport, fit: Fit, axes: Any) -> None:
    """One panel, on axes of matplotlib."""
    x, y = report.values(fit.x), report.values(fit.y)
    line = np.geomspace(min(x) / 1.2, max(x) * 1.2, 100)
    axes.fill_between(line, *fit.law.band(line), color="C0", alpha=0.2, linewidth=0, label=f"{CONFIDENCE:.0%} interval")
    axes.plot(line, fit.law.at(line), color="C0", label=f"(β·x)^α, α = {fit.law.alpha:.3f}")
    axes.plot(x, y, "o", color="C1", label=f"runs, r = {fit.law.correlation:.4f}")
    for run, *place in zip(report.runs, x, y, strict=True):
        offset = {"xytext": (4, 4), "textcoords": "offset points"}
        axes.annotate(run.name, place, **offset, fontsize="xx-small", parse_math=False)
    axes.set(xlabel=TITLES[fit.x], ylabel=TITLES[fit.y], xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.set_ylim(_limits([*y, *fit.law.at(line)]))  # the band of few runs may be many powers of ten wide
    axes.legend(fontsize="x-small")


def _limits(values: Sequence[float]) -> Interval:
    """Around positive values, with as much room again on a logarithmic axis."""
    room = math.sqrt(max(values) / min(values))
    return min(values) / room, max(values) * room


def _exponential(logarithm: float) -> str:
    """e^logarithm, as a power of ten where a float does not hold it."""
    return f"{math.exp(logarithm):.3g}" if has_exponential(logarithm) else f"10^{logarithm / math.log(10):.0f}"


def _read_run(run: Path, name: str) -> tuple[RunResult, dict[str, object]]:
    """A finished run's result, and what must be the same in all runs that are compared."""
    path = run / RUN_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name the directory of a finished run") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); restore it or leave the run out") from error
    _require(isinstance(data, dict), f"{path}", data, "an object")
    _require(data.get("kind") == "var", f"{path}: kind", data.get("kind"), "'var'", "leave the run out")
    _require(data.get("format") == FORMAT, f"{path}: format", data.get("format"), f"{FORMAT}", "update var_deploy")
    for key in ("parameters", "iterations", "batch", "images"):
        ok = type(data.get(key)) is int and 0 < data[key] < 2**63
        _require(ok, f"{path}: {key}", data.get(key), "a positive integer")
    for key in ("model", "configuration"):
        _require(isinstance(data.get(key), dict), f"{path}: {key}", data.get(key), "an object")
    try:
        config = config_from_dict(VARConfig, data["model"])
        settings = VARRun.model_validate(data["configuration"], strict=False)  # JSON has no tuples
        schedule = dataclasses.replace(settings.schedule(data["images"]), iterations=data["iterations"])
        progressive = None if settings.progressive is None else settings.progressive.schedule()
        compute = float(training_flops(config, schedule, batch=data["batch"], progressive=progressive))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(["configuration", *(str(part) for part in first["loc"])])
        place = " ".join(place.split())  # a key of the file, which may hold anything
        raise DataError(f"{path}: {place}: {first['msg']}; restore it or leave the run out") from error
    except (ConfigError, OverflowError) as error:
        raise DataError(f"{path}: model: {error}; restore it or leave the run out") from error
    losses, accuracies = _validation(run, data["iterations"])
    result = RunResult(
        name=name,
        depth=config.depth,
        width=config.embed_dim,
        parameters=data["parameters"],
        compute=compute,
        loss=losses[0],
        loss_last=losses[1],
        error=1 - accuracies[0],
        error_last=1 - accuracies[1],
    )
    given, vqvae = settings.data.validation, settings.model.vqvae
    images = f"{Path(settings.data.path)} (its own split)" if given is None else str(Path(given))
    return result, {
        "patch_nums": config.patch_nums,
        "vocab_size": config.vocab_size,
        "validation images": images,
        "vqvae": str(Path(vqvae)),
    }


def _validation(run: Path, iterations: int) -> tuple[list[float], list[float]]:
    """Losses and accuracies at the end of a run: over all tokens, and over the last scale's."""
    path = run / METRICS_FILE
    try:
        lines = read_metrics(run)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore it or leave the run out") from error
    lines = [line for line in lines if isinstance(line, dict) and VALIDATION[0] in line]
    if not lines:
        raise DataError(f"{path}: got no validation, expected one at the end; train with validation images")
    last = lines[-1]
    _require(
        last.get("iteration") == iterations,
        f"{run}: last validation",
        last.get("iteration"),
        f"iteration {iterations}, the end of the run",
        "let it finish or leave it out",
    )
    losses, accuracies = ([last.get(f"{name}{part}", "nothing") for part in ("", "_last")] for name in VALIDATION)
    for place, values, ok, expected in (
        ("loss", losses, lambda value: 0 < value < 1e300, "a positive number"),
        ("accuracy", accuracies, lambda value: 0 <= value < 1, "from 0 to below 1, as an error of 0 has no logarithm"),
    ):
        for value in values:
            sound = type(value) in (int, float) and ok(value)
            _require(sound, f"{run}: last validation: {place}", value, expected, "leave the run out")
    return [float(value) for value in losses], [float(value) for value in accuracies]


def _require(
    condition: bool, place: str, got: object, expected: str, then: str = "restore it or leave the run out"
) -> None:
    if not condition:
        raise DataError(f"{place}: got {reprlib.repr(got)}, expected {expected}; {then}")
