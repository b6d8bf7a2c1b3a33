"""A bundle → how long a new process takes to load it and to make its first image, and the memory it has then.

    python -m var_deploy.bench.cpu_start BUNDLE [--threads N] [--guidance T]

prints one JSON object. `measured_starts` runs that: once where nothing is prepared for this machine yet, and a few
times after it. Python and the package are there already when the clock starts; files are in the system's page cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..errors import EngineError, run_command
from ..memory import proportional_set_size
from ..pipeline import load


def measured_starts(
    bundle: Path, *, threads: int, guidance: float | None, cache: Path, repeats: int = 3
) -> dict[str, dict[str, float]]:
    """Seconds and bytes of the first start, with an empty `cache`, and medians of `repeats` later ones.

    Raises EngineError where the process fails.
    """
    options = ["--threads", str(threads), *(["--guidance", str(guidance)] if guidance is not None else [])]
    command = [sys.executable, "-m", "var_deploy.bench.cpu_start", str(bundle), *options]
    first, *later = (_started(command, cache) for _ in range(1 + repeats))
    known = [key for key in first if all(start[key] is not None for start in (first, *later))]
    return {
        "first": {key: first[key] for key in known},
        "later": {key: float(np.median([start[key] for start in later])) for key in known},
    }


def _started(command: list[str], cache: Path) -> dict[str, Any]:
    done = subprocess.run(command, env={**os.environ, "XDG_CACHE_HOME": str(cache)}, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("error: ")
        raise EngineError(f"a new process failed with status {done.returncode}: {reason}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def start(bundle: Path, threads: int | None, guidance: float | None) -> dict[str, Any]:
    """Loads and makes two images at batch 1: seconds since the start of loading, and of the second image."""
    begin = time.perf_counter()
    pipe = load(bundle, engine="onnx", device="cpu", threads=threads)
    loaded = time.perf_counter()
    assert pipe.generate(0, guidance=guidance).images  # the picture is part of what is timed
    first = time.perf_counter()
    pss_bytes = proportional_set_size()
    again = time.perf_counter()
    assert pipe.generate(0, guidance=guidance).images
    return {
        "load_seconds": loaded - begin,
        "first_image_seconds": first - begin,
        "warm_seconds": time.perf_counter() - again,
        "pss_bytes": pss_bytes,
    }


def main(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE")],
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    guidance: Annotated[float | None, typer.Option(min=0)] = None,
) -> None:
    """Load a bundle, make an image, and tell seconds and bytes."""
    print(json.dumps(start(bundle, threads, guidance)))


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
