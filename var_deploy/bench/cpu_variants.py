"""Ways to make the same pictures on a CPU → their seconds in turn, whole and by part, and the ratios between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from ..bundle import Manifest
from ..pipeline import Pipeline
from ..precision import Precision
from ..schedules import settings as settings_of
from .cpu_ceilings import Product, counted_flops, shares
from .device import counted_floor
from .reference import Reference
from .rows import Spread, one_line
from .run import in_turn

#: Names of the references.
EAGER, HALF, COMPILED, HALF_COMPILED = "eager", "half", "compiled", "half_compiled"

#: What a generation is made of; "rest" is the last scale's codes and the pictures.
PARTS = ("transformer", "draw", "decode", "rest")

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way: a bundle of ours, by its precision, or a reference."""

    name: str
    how: str
    ours: bool
    precision: Precision  #: of its products
    run: Callable[[int], dict[str, float]]  #: a batch size → seconds by stage of class ids → 8-bit pictures
    batches: tuple[int, ...] | None = None  #: at which it runs; None: at all
    may_fail: bool = False  #: a failure is a result, as of a compiler

    def record(self) -> dict[str, Any]:
        return {"how": self.how, "ours": self.ours, "precision": str(self.precision)}


def ours(pipe: Pipeline, guidance: float | None) -> Variant:
    """A bundle on its engine."""
    num_classes, precision = pipe.bundle.manifest.var.num_classes, pipe.engine.precision

    def run(batch: int) -> dict[str, float]:
        begin = time.perf_counter()
        done = pipe.generate([i % num_classes for i in range(batch)], seeds=0, guidance=guidance)
        assert len(done.images) == batch  # pictures are part of what is timed
        seconds = time.perf_counter() - begin
        return {**done.timings, "rest": seconds - sum(done.timings.values())}

    return Variant(name=str(precision), how=f"bundle {precision}, engine onnx", ours=True, precision=precision, run=run)


def references(manifest: Manifest, *, half: bool, compiled: Sequence[int], **options: Any) -> list[Variant]:
    """PyTorch as published, eager; under bf16 autocast with `half`; both through torch.compile at some batch sizes.

    options: of `Reference`. Raises EngineError.
    """
    eager = Reference(manifest, "cpu", Precision.FP32, **options)
    models = {EAGER: eager}
    if half:
        models[HALF] = eager.variant(Precision.BF16, channels_last=True)
    found = [_theirs(name, model) for name, model in models.items()]
    if compiled:
        for name, of in ((COMPILED, EAGER), (HALF_COMPILED, HALF)):
            if of in models:
                model = models[of].variant(_precision(of), channels_last=of == HALF)
                model.compile()
                found.append(_theirs(name, model, tuple(compiled)))
    return found


def _precision(name: str) -> Precision:
    return Precision.BF16 if name in (HALF, HALF_COMPILED) else Precision.FP32


def _theirs(name: str, model: Reference, compiled: tuple[int, ...] | None = None) -> Variant:
    def run(batch: int) -> dict[str, float]:
        model.run(batch)
        return model.stages

    kind = "eager PyTorch" if compiled is None else "torch.compile"
    return Variant(
        name=name,
        how=f"{kind}, {model.how}",
        ours=False,
        precision=_precision(name),
        run=run,
        batches=compiled,
        may_fail=compiled is not None,
    )


def parts(stages: Mapping[str, float]) -> dict[str, float]:
    """Seconds by part of seconds by stage."""
    found = dict.fromkeys(PARTS, 0.0)
    for stage, seconds in stages.items():
        if stage == "condition" or stage.startswith("scale_"):
            stage = "transformer"
        found[stage if stage in found else "rest"] += seconds
    return found


def time_batch(
    variants: Sequence[Variant],
    products: Sequence[Product],
    manifest: Manifest,
    batch: int,
    *,
    guidance: float | None,
    repeats: int,
    warmup: int,
    limit_seconds: float | None,
    progress: Progress,
) -> dict[str, Any]:
    """The record of one batch size: every variant and every product in turn, repeat by repeat."""
    running, first, failed = _warmed(
        [v for v in variants if v.batches is None or batch in v.batches], batch, warmup, progress
    )
    stages: dict[str, list[dict[str, float]]] = {variant.name: [] for variant in running}

    def timed(variant: Variant) -> None:
        stages[variant.name].append(variant.run(batch))

    found = in_turn(
        [*(partial(timed, variant) for variant in running), *(product.sample for product in products)],
        repeats,
        limit_seconds=limit_seconds,
        on_repeat=lambda repeat: progress(f"batch {batch}, repeat {repeat + 1} of {repeats}"),
    )
    seconds = {variant.name: taken for variant, taken in zip(running, found, strict=False)}
    ceilings = {str(product.arithmetic): product.record() for product in products}
    settings = settings_of(manifest, guidance=guidance)
    counted = counted_floor(manifest.var, manifest.vqvae, batch, settings, Precision.FP32)
    flops = counted_flops(counted, manifest.var.vocab_size, manifest.var.embed_dim)
    rates = {name: ceiling["flops_per_second"] for name, ceiling in ceilings.items()}
    rows = {}
    for variant in running:
        split = _medians([parts(of) for of in stages[variant.name]])
        rows[variant.name] = {
            "seconds": asdict(Spread.of(seconds[variant.name])),
            "first_seconds": first[variant.name],
            "stages": _medians(stages[variant.name]),
            "parts": split,
            "share_of_ceiling": shares(flops, variant.precision, rates, split["transformer"], split["decode"]),
        }
    return {
        "batch": batch,
        "flops": flops,
        "ceilings": ceilings,
        "variants": rows,
        "ratios": {
            mine.name: {
                their.name: asdict(Spread.of(list(np.divide(seconds[their.name], seconds[mine.name]))))
                for their in running
                if not their.ours
            }
            for mine in running
            if mine.ours
        },
        "failed": failed,
    }


def _warmed(
    variants: Sequence[Variant], batch: int, warmup: int, progress: Progress
) -> tuple[list[Variant], dict[str, float], dict[str, str]]:
    """Those that run, the seconds of their first run, and why the others do not."""
    running, first, failed = [], {}, {}
    for variant in variants:
        progress(f"batch {batch}, warm-up: {variant.how}")
        begin = time.perf_counter()
        try:
            variant.run(batch)
            first[variant.name] = time.perf_counter() - begin
            for _ in range(warmup - 1):
                variant.run(batch)
        except Exception as error:
            if not variant.may_fail:
                raise
            failed[variant.name] = one_line(error)
        else:
            running.append(variant)
    return running, first, failed


def _medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
