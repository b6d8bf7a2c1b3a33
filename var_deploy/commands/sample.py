"""The command that makes many images: sample."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RequestError
from .console import needs, stderr
from .options import BundlePath, EngineChoice, SamplingChoice, class_labels, with_engine_options, with_sampling_options


@with_engine_options
@with_sampling_options
def sample(
    bundle: BundlePath,
    count: Annotated[int, typer.Option(help="Images in all.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory of PNG files; started again it goes on there.")],
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Every class equally often; else classes are drawn.")
    ] = False,
    classes: Annotated[
        list[str] | None, typer.Option("--class", metavar="CLASS", help="Only these, by id or name; default all.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first image; image i has seed + i.")] = 0,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images at a time; default 8 on a CPU, up to 64 on a GPU.")
    ] = None,
    npz: Annotated[bool, typer.Option("--npz", help="Then write DIR/samples.npz, as evaluators read it.")] = False,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Make the I-th of N parts, beside the others.")] = "1/1",
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="On a Ray cluster: HOST:PORT, auto, or local to start one here."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --ray; default one per GPU, or per machine without any.")
    ] = None,
    gpus_per_worker: Annotated[float | None, typer.Option(min=0, help="With --ray; default 1 where there are.")] = None,
    *,
    sampling: SamplingChoice,
    run: EngineChoice,
) -> None:
    """Make thousands of images of all classes; killed and started again, it goes on."""
    from ..bundle import Bundle
    from ..samples.plan import SamplePlan, Shard
    from ..samples.progress import shown
    from ..samples.run import here
    from ..samples.run import sample as sample_into

    source: Callable[..., Any] = here
    if ray is not None:
        cluster = needs("var_deploy.samples.on_ray", "ray")
        asked = cluster.Cluster(address=ray, workers=workers, gpus_per_worker=gpus_per_worker)
        source = partial(cluster.on_ray, cluster=asked)
    elif workers is not None or gpus_per_worker is not None:
        raise RequestError("sample: --workers and --gpus-per-worker are for Ray; give --ray ADDRESS, or leave them out")
    opened = Bundle.open(bundle, verify_digests=False)  # it is verified where it is loaded
    part = Shard.parse(shard)
    plan = SamplePlan.of(
        opened,
        count=count,
        balanced=balanced,
        seed=seed,
        classes=class_labels(opened.manifest, classes) if classes else None,
        **sampling.options(opened.manifest.var.num_scales),
    )
    # Ray prints what befalls its workers, and standard output is for the result.
    with redirect_stdout(sys.stderr), shown(stderr()) as progress:
        found = sample_into(
            opened,
            out,
            plan,
            load=run.arguments(),
            batch=batch,
            shard=part,
            npz=npz,
            source=source,
            progress=progress,
        )
    print(f"{out}: {len(part.of(count)):,} images, {found.made:,} of them made now")
    if found.archive is not None:
        print(found.archive)
    elif npz:
        stderr().print(f"{found.missing:,} images of other shards are missing: the last to end writes the .npz")
