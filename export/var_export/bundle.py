"""Checkpoint pair → bundle directory, written beside its final name and renamed into place when whole."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
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
from var_train.checkpoint import CheckpointPair, class_names_of, load_pair
from var_train.checkpoint_files import MANIFEST as CHECKPOINT_MANIFEST

from .calibration import Calibration
from .calibration import calibration as calibration_of
from .deploy_view import deploy_weights
from .int8_plan import Int8Plan, int8_plan
from .precision import bundle_precision, stored_weights
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
    precision: Precision | None = Precision.FP32,
    calibration: str | None = None,
    progress: Progress = lambda *_: None,
) -> Path:
    """Exports a checkpoint pair to a new bundle directory `out` and returns its path.

    Without `class_names` the bundle takes those that the VAR's checkpoint carries, if any. precision: fp32, int8 (for
    CPUs), fp16 or bf16 (for GPUs), see `precision`; None measures on this machine which products int8 makes faster
    without harm, see `int8_plan`, on what `calibration` says: class ids like "0,5,9" or a folder of images. Raises
    CheckpointError for what is wrong with the checkpoints, also where they do not fit the precision, BundleError for
    what is wrong with `out` or no precision of bundles, RequestError for a wrong calibration, and EngineError where
    there is no engine to measure with; in every case nothing is left behind.
    """
    out = Path(out)
    if precision is not None:
        bundle_precision(precision)
        if calibration is not None:
            raise RequestError(f"calibration: precision {precision} needs none; leave it out, or give precision auto")
    _require_absent(out)
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
    if precision is not None:
        return write_bundle(pair, out, source=source, precision=precision, **described)
    measured_on, plan = _measured_plan(pair, out, calibration, progress)
    source["precision"] = plan.to_dict()
    peaks = measured_on.peaks if plan.smoothing else None
    return write_bundle(pair, out, source=source, precision=plan.precision, kept=plan.kept, peaks=peaks, **described)


def _measured_plan(
    pair: CheckpointPair, out: Path, given: str | None, progress: Progress
) -> tuple[Calibration, Int8Plan]:
    """Calibrates and measures, with a float32 bundle beside `out` that is deleted afterwards."""
    measured_on = calibration_of(pair, given, lambda what: progress(what, 0, 0))
    with _working_directory(out) as directory:
        path = write_bundle(pair, directory / "float32", progress=progress)
        float32 = Bundle.open(path, verify_digests=False)
        plan = int8_plan(pair, float32, measured_on, progress=lambda what: progress(f"trial: {what}", 0, 0))
    return measured_on, plan


@contextmanager
def _working_directory(out: Path) -> Iterator[Path]:
    """Room beside `out`, where there is space for a bundle."""
    made_parents = [parent for parent in out.parents if not os.path.lexists(parent)]  # innermost first
    directory: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix=f".{out.name}.trials-", dir=out.parent))
        yield directory
    except OSError as error:
        reason = error.strerror or error
        raise BundleError(f"{out}: trials cannot be written ({reason}); choose another place") from error
    finally:
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
        for parent in made_parents:
            with suppress(OSError):
                parent.rmdir()


def write_bundle(
    pair: CheckpointPair,
    out: Path,
    *,
    class_names: list[str] | None = None,
    license_note: str = "not stated",
    source: Mapping[str, Any] | None = None,
    precision: Precision = Precision.FP32,
    kept: Collection[str] = (),
    peaks: Mapping[str, Tensor] | None = None,
    progress: Progress = lambda *_: None,
) -> Path:
    """Writes the bundle of checked checkpoints; see `bundle_from_checkpoint`.

    kept: parts that int8 leaves in float32. peaks: of a calibration, to smooth outlier channels with; None does not.
    """
    precision = bundle_precision(precision)
    view = deploy_weights(pair)
    if peaks is not None:
        view = smoothed_weights(view, pair.var, peaks, kept)
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
            path.write_bytes(_serialized(_graph(name, pair, spec, layout, precision)))
            onnx.checker.check_model(path)
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


def _serialized(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def _origin(path: Path) -> dict[str, Any]:
    if path.is_dir():  # of a training run: its manifest holds the digests of all its files
        manifest = path.resolve() / CHECKPOINT_MANIFEST
        return {"file": f"{manifest.parent.name}/{manifest.name}", "sha256": sha256_of(manifest)}
    return {"file": path.name, "sha256": sha256_of(path)}


def _require_absent(out: Path) -> None:
    if os.path.lexists(out):  # unlike Path.exists, false for a name that is too long; making it says so
        raise BundleError(f"{out}: exists already; nothing is overwritten, choose another name or remove it")


@contextmanager
def _atomic_directory(out: Path, size: int) -> Iterator[Path]:
    """A staging directory beside `out` that becomes `out` if the block succeeds and vanishes if it does not.

    `size` is the least that will be written, in bytes; too little free space is said before writing.
    """
    _require_absent(out)
    made_parents = [parent for parent in out.parents if not os.path.lexists(parent)]  # innermost first
    staging: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < size:
            raise BundleError(
                f"{out}: needs {size / 1e6:.0f} MB, {free / 1e6:.0f} MB are free on that disk; free space"
            )
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        yield staging
        for file in [*staging.iterdir(), staging]:
            _flush_to_disk(file)
        staging.chmod(0o755)  # mkdtemp makes it private
        _require_absent(out)
        staging.rename(out)
        made_parents = []
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        step = "free space and export again" if full else "choose another place"
        raise BundleError(
            f"{out}: writing failed ({error.strerror or error}); {step}; nothing is left behind"
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for parent in made_parents:
            with suppress(OSError):
                parent.rmdir()


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
