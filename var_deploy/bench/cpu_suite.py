"""The measurements of a CPU: bundles of one model beside PyTorch, in one run, repeat by repeat in turn.

    python -m var_deploy.bench.cpu_suite FP32_BUNDLE [INT8_BUNDLE …] [--out docs/results]

Writes cpu.json after every part, so that a run cut short still counts, and in the end, however it comes, a plot beside
it and the page cpu.md. What a run prepares for this machine is kept beside the first bundle until the run ends.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bundle import WEIGHTS, Bundle
from ..cpus import usable_cpus
from ..errors import RequestError, VarDeployError, run_command
from ..output_file import check_output, write_text
from ..pipeline import load
from .cpu_ceilings import instructions, products
from .cpu_plot import plot_cpu
from .cpu_profile import operator_milliseconds
from .cpu_start import measured_starts
from .cpu_table import outcomes, page
from .cpu_variants import ours, references, time_batch
from .rows import machine

TIMED = (
    "seconds: wall clock of class ids in, 8-bit pictures on the host out, top-k and top-p of the bundle; loading and "
    "warm-up not included, except in first_seconds, which is the first run, compilation included. PyTorch has random "
    "weights. Every repeat runs all variants and all products of the ceilings once, in turn. ratios: median over the "
    "repeats of the reference's seconds over ours. stages, parts: medians by the host's clock. share_of_ceiling: time "
    "that the operations of the part would take at the ceilings of the same repeats over the time taken; operations "
    "are those of plain matrix products and convolutions. starts: a new process at batch 1; load_seconds and "
    "first_image_seconds from the start of loading, pss_bytes after the first image, warm_seconds of the second image; "
    "first: nothing prepared for this machine, later: medians of those after it. operators: milliseconds of one image "
    "by ONNX Runtime's profiler, the decoder as a graph"
)

Progress = Callable[[str], None]


class CpuRun:
    """A record that grows part by part."""

    def __init__(self, bundles: dict[str, Path], out: Path, *, threads: int, guidance: float | None) -> None:
        """bundles: precision → directory, of one model, as from `bundles_by_precision`. `out` gets the record."""
        self._bundles, self._out, self._threads, self._guidance = bundles, out, threads, guidance
        self._manifest = Bundle.open(next(iter(bundles.values())), verify_digests=False).manifest
        self._begin = time.monotonic()
        var, sampling = self._manifest.var, self._manifest.sampling
        self.record: dict[str, Any] = {
            "timed": TIMED,
            "model": {"depth": var.depth, "width": var.embed_dim, "image": self._manifest.vqvae.image_size},
            "machine": {**machine(), "instructions": instructions(), "threads": threads},
            "sampling": {
                "guidance": sampling.guidance if guidance is None else guidance,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
            },
            "weights_bytes": {name: (path / WEIGHTS).stat().st_size for name, path in bundles.items()},
            "starts": {},
            "variants": {},
            "batches": [],
            "operators": {},
        }

    @property
    def measured(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.record["starts"] or self.record["batches"])

    def starts(self, cache: Path, repeats: int, progress: Progress) -> None:
        """New processes, before this one maps the same files, which would halve what each is charged for them."""
        for name, path in self._bundles.items():
            progress(f"starting with {name}")
            self.record["starts"][name] = measured_starts(
                path, threads=self._threads, guidance=self._guidance, cache=cache, repeats=repeats
            )
            self.write()

    def batches(
        self,
        batches: Sequence[int],
        *,
        half: bool,
        compiled: Sequence[int],
        repeats: int,
        warmup: int,
        limit_seconds: float | None,
        progress: Progress,
    ) -> None:
        """All variants at each batch size."""
        progress("building the references")
        options = {"guidance": self._guidance, "threads": self._threads}
        variants = references(self._manifest, half=half, compiled=compiled, **options)
        for path in self._bundles.values():
            pipe = load(path, engine="onnx", device="cpu", threads=self._threads)
            variants.append(ours(pipe, self._guidance))
        self.record["variants"] = {variant.name: variant.record() for variant in variants}
        ceilings = products(self._threads)
        for batch in sorted(set(batches)):
            self.record["batches"].append(
                time_batch(
                    variants,
                    ceilings,
                    self._manifest,
                    batch,
                    guidance=self._guidance,
                    repeats=repeats,
                    warmup=warmup,
                    limit_seconds=limit_seconds,
                    progress=progress,
                )
            )
            self.write()

    def operators(self, progress: Progress) -> None:
        """One image of each bundle with the profiler."""
        for name, path in self._bundles.items():
            progress(f"profiling {name}")
            self.record["operators"][name] = operator_milliseconds(path, self._threads, self._guidance)
            self.write()

    def write(self) -> None:
        """Replaces the file by one step, so that it is whole whenever the run is cut short."""
        self.record["targets"] = outcomes(self.record)
        self.record["spent_seconds"] = time.monotonic() - self._begin
        write_text(self._out, json.dumps(self.record, indent=1, ensure_ascii=False) + "\n")


def bundles_by_precision(paths: Sequence[Path]) -> dict[str, Path]:
    """Precision → bundle, in the order given. Raises RequestError unless they hold one model, each precision once."""
    found: dict[str, Path] = {}
    manifests = [Bundle.open(path).manifest for path in paths]
    for path, manifest in zip(paths, manifests, strict=True):
        if (manifest.var, manifest.vqvae) != (manifests[0].var, manifests[0].vqvae):
            raise RequestError(f"{path}: its model is not that of {paths[0]}; give bundles of one checkpoint")
        if (earlier := found.setdefault(str(manifest.precision), path)) is not path:
            raise RequestError(f"{path}: got {manifest.precision}, as {earlier} has; give each precision once")
    return found


@contextmanager
def _cache_beside(bundle: Path) -> Iterator[Path]:
    """A cache for this process and those that it starts, empty at first and gone at the end.

    It takes twice the weights, for which a system's temporary directory may be too small.
    """
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory(prefix=".cache-", dir=bundle.absolute().parent) as directory:
        os.environ["XDG_CACHE_HOME"] = directory
        try:
            yield Path(directory)
        finally:
            del os.environ["XDG_CACHE_HOME"]
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before


def main(
    bundles: Annotated[
        list[Path] | None, typer.Argument(metavar="BUNDLE…", help="Of one model, one for each precision.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where JSON, plot and page go.")] = Path("docs/results"),
    batch: Annotated[list[int], typer.Option(min=1, help="Batch size; repeat for more.")] = [1, 8],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    warmup: Annotated[int, typer.Option(min=1)] = 1,
    limit: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Of a batch size; then three repeats do.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of every variant; default one per core.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0)] = None,
    half_reference: Annotated[bool, typer.Option(help="Time PyTorch under bf16 autocast.")] = True,
    compiled: Annotated[
        list[int], typer.Option(min=0, help="Batch size for torch.compile, minutes; repeat for more, 0 for none.")
    ] = [1],  # noqa: B006
    starts: Annotated[int, typer.Option(min=0, help="Later starts of a new process per bundle; 0: no start.")] = 3,
    profile: Annotated[bool, typer.Option(help="Milliseconds by operator.")] = False,
    table: Annotated[Path | None, typer.Option(metavar="FILE", help="Measure nothing, write the page alone.")] = None,
    record: Annotated[Path | None, typer.Option(metavar="JSON", help="Of --table: what was measured.")] = None,
) -> None:
    """Measure bundles of one model on this machine's CPU, beside PyTorch."""
    if table is not None or record is not None:
        if table is None or record is None or bundles:
            raise RequestError("--table FILE and --record JSON: expected both, and no bundle; add what is missing")
        check_output(table)
        write_text(table, page(_read(record)))
        return
    if not bundles:
        raise RequestError("got no bundle, expected one or more of one model; export one, or use --table")
    found = bundles_by_precision(bundles)
    json_file, page_file, plot_file = (out / f"cpu.{suffix}" for suffix in ("json", "md", "png"))
    for path in (json_file, page_file, plot_file):
        check_output(path)

    def said(what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    run = CpuRun(found, json_file, threads=threads or usable_cpus().threads, guidance=guidance)
    try:
        with _cache_beside(bundles[0]) as cache:
            if starts:
                run.starts(cache, starts, said)
            run.batches(
                batch,
                half=half_reference,
                compiled=[size for size in compiled if size],
                repeats=repeats,
                warmup=warmup,
                limit_seconds=limit,
                progress=said,
            )
            if profile:
                run.operators(said)
    finally:
        if run.measured:
            text = page(run.record)
            write_text(page_file, text)
            print(text)
            _plot(run.record, plot_file)


def _read(record: Path) -> dict[str, Any]:
    """A record written by an earlier run."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{record}: not JSON ({error}); expected what a run of this suite wrote") from error
    if not isinstance(found, dict) or not {"batches", "starts"} <= found.keys():
        raise RequestError(f"{record}: got no batches, expected what a run of this suite wrote; give that file")
    return found


def _plot(record: dict[str, Any], path: Path) -> None:
    try:
        plot_cpu(record, path)
    except VarDeployError as error:  # the numbers are written: without matplotlib they go without a picture
        print(f"no plot: {error}", file=sys.stderr)


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
