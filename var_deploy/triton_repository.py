"""A bundle → a model repository of NVIDIA's Triton Inference Server, which `triton_server` runs there.

DIR/<name>/config.pbtxt   what the server reads: tensors, batching, instances
DIR/<name>/1/model.py     imports the model from the installed var_deploy
DIR/<name>/1/bundle/      the bundle, with its plans
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .bundle import MANIFEST, Bundle, Manifest
from .engines.choice import ENGINES
from .errors import BundleError, EngineError, RequestError
from .precision import Precision
from .staging import put_in_place, require_absent, staging_directory
from .triton_server import BUNDLE_DIRECTORY, INPUTS, PARAMETERS, ServerTensor, outputs_of

#: Directory of a bundle's TensorRT plans, which its manifest does not list.
PLANS = "plans"

_MOST = 2**31 - 1  # the schema's int32
_MODEL = """\
from var_deploy.triton_server import TritonPythonModel

__all__ = ["TritonPythonModel"]
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """How the server runs a bundle."""

    name: str = "var"  #: the model's name in requests
    engine: str = "auto"
    device: str = "auto"  #: auto: every GPU of the server, or its CPU where it has none; cpu, cuda (every GPU), cuda:N
    precision: str = "auto"
    max_batch: int = 8  #: images of one dynamic batch, and of one request
    queue_delay_us: int = 5_000  #: microseconds that a request waits for others
    instances: int = 1  #: per GPU, or on the CPU; each holds its own weights

    def __post_init__(self) -> None:
        if not re.fullmatch("[A-Za-z0-9_][A-Za-z0-9_.-]*", self.name):
            raise RequestError(f"name: got {self.name!r}, expected letters, digits, _, . and -, like var-d16")
        if self.engine not in ("auto", *ENGINES):
            raise EngineError(f"unknown engine {self.engine!r}; known: auto, {', '.join(ENGINES)}")
        if not re.fullmatch("auto|cpu|cuda(:(0|[1-9][0-9]{0,5}))?", self.device):
            raise EngineError(f"unknown device {self.device!r}; known: auto, cpu, cuda, cuda:N")
        if self.precision not in ("auto", *Precision):
            raise EngineError(f"unknown precision {self.precision!r}; known: auto, {', '.join(Precision)}")
        for field, least in (("max_batch", 1), ("queue_delay_us", 0), ("instances", 1)):
            value = getattr(self, field)
            if not isinstance(value, int) or not least <= value <= _MOST:
                raise RequestError(f"{field}: got {value}, expected an integer from {least} to {_MOST}")


def write_repository(bundle_path: str | Path, out: str | Path, model: ServedModel, *, link: bool = False) -> Path:
    """Writes a repository of one model, whole or not at all, and returns its directory.

    link: hard links instead of copies of the bundle's files, on the same disk. Raises BundleError for a bundle that is
    not whole, an `out` that exists or cannot be written.
    """
    out = Path(out)
    require_absent(out, BundleError)
    bundle = Bundle.open(bundle_path)
    try:
        with staging_directory(out) as staging:
            version = staging / model.name / "1"
            version.mkdir(parents=True)
            (staging / model.name / "config.pbtxt").write_text(config_text(bundle.manifest, model), encoding="utf-8")
            (version / "model.py").write_text(_MODEL, encoding="utf-8")
            for name in _files_of(bundle):
                target = version / BUNDLE_DIRECTORY / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if link:
                    os.link(bundle.file(name).resolve(), target)
                else:
                    shutil.copyfile(bundle.file(name), target)
            put_in_place(staging, out, BundleError)
    except OSError as error:
        step = "leave out --link, or choose a place on the bundle's disk" if link else "choose another place"
        raise BundleError(
            f"{out}: writing failed ({error.strerror or error}); {step}; nothing is left behind"
        ) from error
    return out


def _files_of(bundle: Bundle) -> Iterator[str]:
    """Names of all that belongs to a bundle: what its manifest seals, and whole plans."""
    yield from (MANIFEST, *bundle.manifest.files)
    for path in sorted(bundle.file(PLANS).rglob("*")):
        if path.is_file() and not path.name.startswith("."):  # those are still being written
            yield path.relative_to(bundle.path).as_posix()


def config_text(manifest: Manifest, model: ServedModel) -> str:
    """config.pbtxt: the server's ModelConfig as protobuf text."""
    kind, gpus = _instance_kind(manifest, model)
    lines = [
        f'name: "{model.name}"',
        'backend: "python"',
        f"max_batch_size: {model.max_batch}",
        *(_tensor("input", spec) for spec in INPUTS),
        *(_tensor("output", spec) for spec in outputs_of(manifest)),
        "# Requests of one batch may differ in every input.",
        "dynamic_batching {",
        f"  preferred_batch_size: [ {model.max_batch} ]",
        f"  max_queue_delay_microseconds: {model.queue_delay_us}",
        "}",
        "# Per GPU, or on the CPU; every instance holds its own weights.",
        f"instance_group [ {{ count: {model.instances} kind: {kind}{gpus} }} ]",
        *(_parameter(name, getattr(model, name)) for name in PARAMETERS),
    ]
    return "\n".join(lines) + "\n"


def _instance_kind(manifest: Manifest, model: ServedModel) -> tuple[str, str]:
    """Where the server puts instances. KIND_AUTO is its GPUs, or the CPU where it has none."""
    if model.device == "auto":
        if model.engine == "tensorrt":
            return "KIND_GPU", ""
        if manifest.precision is Precision.BF16:  # no engine runs it on a CPU
            return "KIND_GPU", ""
        on_cpu = model.engine == "onnx" or (model.engine == "auto" and manifest.precision is Precision.INT8)
        return ("KIND_CPU" if on_cpu else "KIND_AUTO"), ""
    if model.device == "cpu":
        return "KIND_CPU", ""
    number = model.device.partition(":")[2]
    return "KIND_GPU", f" gpus: [ {number} ]" if number else ""


def _tensor(side: str, spec: ServerTensor) -> str:
    optional = " optional: true" if spec.optional else ""
    dims = ", ".join(map(str, spec.shape))
    return f'{side} [ {{ name: "{spec.name}" data_type: {spec.data_type} dims: [ {dims} ]{optional} }} ]'


def _parameter(name: str, value: str) -> str:
    return f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}'
