"""Checkpoint pair → bundle directory, written beside its final name and renamed into place when whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import Tensor

import var_deploy
from var_deploy.bundle import MANIFEST, WEIGHTS, Bundle, FileSeal, Manifest, SamplingDefaults, sha256_of
from var_deploy.errors import BundleError, CheckpointError, RequestError
from var_deploy.precision import Precision
from var_deploy.signature import GraphSpec, graph_specs
from var_deploy.staging import put_in_place, require_absent, staging_directory
from var_train.checkpoint import CheckpointPair, class_names_of, load_pair
from var_train.checkpoint_files import MANIFEST as CHECKPOINT_MANIFEST

from .calibration import calibration as calibration_of
from .deploy_view import deploy_weights
from .importer_rules import importer_problems
from .int8_plan import Int8Plan, int8_plan
from .precision import AUTO, bundle_precision, stored_weights
from .smoothing import smoothed_weights
from .transformer_graphs import condition_graph, finish_graph, scale_graph
from .vqvae_graphs import decoder_graph, encoder_graph
from .weights_file import WeightsLayout, weights_layout, write_weights

#: Hears of progress: what is being written, bytes done, bytes in all.
Progress = Callable[[str, int, int], None]


def bundle_from_checkpoint(
    var_path: str | Path,
    vqvae_path: str | Path,
    out: str | Path,
    *,
    class_names: list[str] | None = None,
    license_note: str = "not stated",
    using_znorm: bool = False,
    precision: str = Precision.FP32,
    calibration: str | None = None,
    progress: Progress = lambda *_: None,
) -> Path:
    """Exports a checkpoint pair to a new bundle directory `out` and returns its path.

    Without `class_names` the bundle takes those that the VAR's checkpoint carries, if any. precision: fp32, int8 (for
    CPUs), fp16 or bf16 (for GPUs), see `precision`; "auto" measures on this machine which products int8 makes faster
    without harm, see `int8_plan`, on what `calibration` says: class ids like "0,5,9" or a folder per class. Raises
    CheckpointError for what is wrong with the checkpoints, also where they do not fit the precision, BundleError for
    what is wrong with `out` or no precision of bundles, RequestError for a wrong calibration, and EngineError where
    there is no engine to measure with; in every case nothing is left behind.
    """
    out = Path(out)
    if precision != AUTO:
        bundle_precision(precision)
        if calibration is not None:
            raise RequestError(f"calibration: precision {precision} needs none; leave it out, or give precision auto")
    require_absent(out, BundleError)
    pair = load_pair(Path(var_path), Path(vqvae_path), using_znorm=using_znorm)
    if class_names is None and (carried := class_names_of(Path(var_path))) is not None:
        class_names = list(carried)
    if class_names is not None and len(class_names) != pair.var.num_classes:
        raise CheckpointError(
            f"{len(class_names)} class names for a checkpoint of {pair.var.num_classes} classes; give one per class"
        )
    source = {
        "var": _origin(Path(var_path)),
        "vqvae": _origin(Path(vqvae_path)),
        "exporter": f"var-deploy {var_deploy.__version__}",
    }
    described: dict[str, Any] = {"class_names": class_names, "license_note": license_note, "progress": progress}
    if precision != AUTO:
        return write_bundle(pair, out, source=source, precision=bundle_precision(precision), **described)
    plan = _measured_plan(pair, out, calibration, class_names, progress)
    source["precision"] = plan.to_dict()
    described |= {"precision": plan.precision, "kept": plan.kept, "factors": plan.factors}
    return write_bundle(pair, out, source=source, **described)


def _measured_plan(
    pair: CheckpointPair, out: Path, given: str | None, class_names: list[str] | None, progress: Progress
) -> Int8Plan:
    """Calibrates and measures, with a float32 bundle beside `out` that is deleted afterwards."""
    measured_on = calibration_of(pair, given, class_names, lambda what: progress(what, 0, 0))
    try:
        with staging_directory(out, "trials") as directory:
            path = write_bundle(pair, directory / "float32", progress=progress)
            float32 = Bundle.open(path, verify_digests=False)
            return int8_plan(pair, float32, measured_on, progress=lambda what: progress(f"trial: {what}", 0, 0))
    except OSError as error:
        reason = error.strerror or error
        raise BundleError(f"{out}: trials cannot be written ({reason}); choose another place") from error


def write_bundle(
    pair: CheckpointPair,
    out: Path,
    *,
    class_names: list[str] | None = None,
    license_note: str = "not stated",
    source: Mapping[str, Any] | None = None,
    precision: Precision = Precision.FP32,
    kept: Collection[str] = (),
    factors: Mapping[str, Tensor] | None = None,
    progress: Progress = lambda *_: None,
) -> Path:
    """Writes the bundle of checked checkpoints; see `bundle_from_checkpoint`.

    kept: parts that int8 leaves in float32. factors: of `smoothing_factors`, to smooth outlier channels with.
    """
    precision = bundle_precision(precision)
    assert precision.graph_dtype == "float32" or (not kept and factors is None)  # halves do not mix
    view = deploy_weights(pair)
    if factors is not None:
        view = smoothed_weights(view, pair.var, factors, kept)
    weights = stored_weights(view, precision, kept)
    layout = weights_layout(weights)
    specs = graph_specs(pair.var, pair.vqvae, precision)
    with _atomic_directory(out, layout.size) as staging:
        done = 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            progress(WEIGHTS, done, layout.size)

        digests = {WEIGHTS: write_weights(staging / WEIGHTS, weights, layout, on_bytes)}
        for name, spec in specs.items():
            progress(spec.file, layout.size, layout.size)
            path = staging / spec.file
            model = ir.to_proto(_graph(name, pair, spec, layout, precision))
            path.write_bytes(model.SerializeToString(deterministic=True))
            onnx.checker.check_model(path)
            _check_importer(spec.file, model, precision)
            digests[spec.file] = sha256_of(path)
        manifest = Manifest(
            var=pair.var,
            vqvae=pair.vqvae,
            precision=precision,
            graphs=specs,
            sampling=SamplingDefaults(),
            class_names=None if class_names is None else tuple(class_names),
            license=license_note,
            source=source or {},
            files={f: FileSeal(size=(staging / f).stat().st_size, sha256=digest) for f, digest in digests.items()},
        )
        (staging / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return out


def _graph(name: str, pair: CheckpointPair, spec: GraphSpec, layout: WeightsLayout, precision: Precision) -> ir.Model:
    if name == "condition":
        return condition_graph(pair.var, spec, layout, precision)
    if name == "finish":
        return finish_graph(pair.vqvae, spec, layout)
    if name == "decoder":
        return decoder_graph(pair.vqvae, spec, layout, precision)
    if name == "encoder":
        return encoder_graph(pair.vqvae, spec, layout, precision)
    k = None if name == "scales" else int(name.removeprefix("scale_"))
    return scale_graph(pair.var, pair.vqvae, k, layout, spec, precision)


def _check_importer(file: str, model: onnx.ModelProto, precision: Precision) -> None:
    """Float graphs are for TensorRT too; one that its importer would refuse is an error of this package."""
    if precision is Precision.INT8:
        return
    axes = {"R", "B", "n", "n_prev"} if file == "scales.onnx" else {"R", "B"}
    problems = importer_problems(model, free_axes=frozenset(axes))
    if problems:
        raise BundleError(
            f"{file}: breaks a rule of TensorRT's importer: {problems[0]}; report the checkpoint's shapes"
        )


def _origin(path: Path) -> dict[str, Any]:
    if path.is_dir():  # of a training run: its manifest holds the digests of all its files
        manifest = path.resolve() / CHECKPOINT_MANIFEST
        return {"file": f"{manifest.parent.name}/{manifest.name}", "sha256": sha256_of(manifest)}
    return {"file": path.name, "sha256": sha256_of(path)}


@contextmanager
def _atomic_directory(out: Path, size: int) -> Iterator[Path]:
    """A staging directory beside `out` that becomes `out` if the block succeeds and vanishes if it does not.

    `size` is the least that will be written, in bytes; too little free space is said before writing.
    """
    require_absent(out, BundleError)
    try:
        with staging_directory(out) as staging:
            free = shutil.disk_usage(staging).free
            if free < size:
                raise BundleError(
                    f"{out}: needs {size / 1e6:.0f} MB, {free / 1e6:.0f} MB are free on that disk; free space"
                )
            yield staging
            for file in [*staging.iterdir(), staging]:
                _flush_to_disk(file)
            put_in_place(staging, out, BundleError)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        step = "free space and export again" if full else "choose another place"
        raise BundleError(
            f"{out}: writing failed ({error.strerror or error}); {step}; nothing is left behind"
        ) from error


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
