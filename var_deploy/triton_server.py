"""A bundle as a model of NVIDIA's Triton Inference Server: requests of one dynamic batch → images by class and seed.

The server's Python backend imports `TritonPythonModel` from the repository that `triton_repository` writes. One model
holds a whole pipeline, because its engine owns the caches and, on a GPU, one CUDA graph per generation: a loop between
models of the server would copy caches at every scale. `triton_python_backend_utils` exists in the server alone.

Axes: B images of a request, R side of the image in pixels, L all tokens.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .bundle import Bundle, Manifest
from .errors import BundleError, EngineError, RequestError, VarDeployError
from .pipeline import load
from .request import label_ids
from .sampling import Settings
from .schedules import options_of, settings
from .static_buffers import BUCKETS

log = logging.getLogger("var_deploy")

#: Directory of the bundle, beside model.py.
BUNDLE_DIRECTORY = "bundle"

#: What the configuration passes to `var_deploy.load`. The device comes from the instance group.
PARAMETERS = ("engine", "precision")

_DATA_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "uint64": "TYPE_UINT64",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float32": "TYPE_FP32",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerTensor:
    """One input or output of the model; the server puts the axis B before `shape`."""

    name: str
    dtype: str  #: as NumPy names it
    shape: tuple[int, ...] = (1,)
    optional: bool = False

    @property
    def data_type(self) -> str:
        """The type as the server names it."""
        return _DATA_TYPES[self.dtype]


INPUTS = (
    ServerTensor(name="label", dtype="int64"),
    ServerTensor(name="seed", dtype="uint64"),
    ServerTensor(name="guidance", dtype="float32", optional=True),
    ServerTensor(name="temperature", dtype="float32", optional=True),
    ServerTensor(name="top_k", dtype="int32", optional=True),
    ServerTensor(name="top_p", dtype="float32", optional=True),
    ServerTensor(name="smooth", dtype="bool", optional=True),
)

#: Optional inputs, which are the sampling settings of an image.
SAMPLING = tuple(spec.name for spec in INPUTS if spec.optional)


def outputs_of(manifest: Manifest) -> tuple[ServerTensor, ...]:
    """What the model answers for a bundle."""
    R = manifest.vqvae.image_size
    return (
        ServerTensor(name="image", dtype="uint8", shape=(R, R, 3)),
        ServerTensor(name="tokens", dtype="int64", shape=(manifest.var.num_tokens,)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class WantedImage:
    """Row `row` of request number `request` of a dynamic batch, checked."""

    request: int
    row: int
    label: int
    seed: int
    settings: Settings


def groups_of(images: Sequence[WantedImage]) -> list[list[WantedImage]]:
    """Images that one call can make: those of equal settings, in the order they came in."""
    groups: dict[Settings, list[WantedImage]] = {}
    for image in images:
        groups.setdefault(image.settings, []).append(image)
    return list(groups.values())


def wanted_images(request: int, inputs: Mapping[str, np.ndarray], manifest: Manifest) -> list[WantedImage]:
    """The images that a request asks for, by its inputs [B, 1]. Raises RequestError."""
    B = len(inputs["label"]) if "label" in inputs and inputs["label"].ndim else 1
    for spec in INPUTS:
        if spec.name not in inputs:
            if not spec.optional:
                raise RequestError(f"{spec.name}: missing; every request has one, {spec.dtype} [images, 1]")
            continue
        found = inputs[spec.name]
        if found.dtype != spec.dtype or found.shape != (B, *spec.shape) or B == 0:
            raise RequestError(
                f"{spec.name}: got {found.dtype} {list(found.shape)}, expected {spec.dtype} [{B or 1}, 1]"
            )
    rows = [{name: column_B1[row, 0].item() for name, column_B1 in inputs.items()} for row in range(B)]
    labels_B = label_ids([given["label"] for given in rows], manifest)
    return [
        WantedImage(
            request=request,
            row=row,
            label=int(labels_B[row]),
            seed=given["seed"],
            settings=settings(manifest, **{name: given.get(name) for name in SAMPLING}),
        )
        for row, given in enumerate(rows)
    ]


def device_of(kind: str, device_id: str) -> str:
    """Device of `var_deploy.load` for an instance of the model, whose kind and number the server gives."""
    return {"GPU": f"cuda:{device_id}", "CPU": "cpu"}.get(kind, "auto")


def warm_up_batches(device: str, max_batch: int) -> list[int]:
    """Batches to run before the first request: on a GPU each that has a CUDA graph of its own, elsewhere one image."""
    if not device.startswith("cuda"):
        return [1]
    return [*(size for size in BUCKETS if size < max_batch), max_batch]


class TritonPythonModel:
    """What the Python backend calls: `initialize`, `execute` for every dynamic batch, `finalize`.

    An image depends on its class, seed and settings, not on the batch it came in, with the caveat of
    `Pipeline.generate` for the torch engine's lower precisions.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Loads the bundle beside model.py and makes a first image of every batch size that needs preparation.

        What is raised here (BundleError, EngineError) the server reports as the reason why the model does not load.
        """
        self._server: Any = importlib.import_module("triton_python_backend_utils")
        self._log = _ServerLog(self._server.Logger)
        log.addHandler(self._log)
        log.setLevel(logging.INFO)
        config = json.loads(args["model_config"])
        options = _options(config)
        path = Path(args["model_repository"]) / args["model_version"] / BUNDLE_DIRECTORY
        _check_tensors(config, Bundle.open(path, verify_digests=False))
        device = device_of(args["model_instance_kind"], args["model_instance_device_id"])
        self.pipe = load(path, device=device, **options)
        for batch in warm_up_batches(device, int(config["max_batch_size"])):
            seconds = sum(self.pipe.generate([0] * batch).timings.values())
            log.info("warmed up: batch %d in %.2f s", batch, seconds)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in their order; a request that fails does not touch the others.

        Images of equal settings are made by one call, whichever request they are of.
        """
        responses: list[Any] = [None] * len(requests)
        wanted: list[WantedImage] = []
        rows: list[list[WantedImage]] = [[] for _ in requests]
        for index, request in enumerate(requests):
            if request.is_cancelled():
                responses[index] = self._error("the client has cancelled it", "CANCELLED")
                continue
            try:
                rows[index] = wanted_images(index, self._inputs(request), self.pipe.bundle.manifest)
            except RequestError as error:
                responses[index] = self._error(error, "INVALID_ARG")
            wanted += rows[index]

        made: dict[WantedImage, tuple[np.ndarray, np.ndarray]] = {}
        for group in groups_of(wanted):
            images = [image for image in group if responses[image.request] is None]
            if not images:
                continue
            try:
                made |= self._generated(images)
            except VarDeployError as error:
                for index in {image.request for image in images}:
                    responses[index] = self._error(error, "INTERNAL")
        for index, of_request in enumerate(rows):
            if responses[index] is None:
                responses[index] = self._response([made[image] for image in of_request])
        return responses

    def finalize(self) -> None:
        """Lets go of the pipeline."""
        log.removeHandler(self._log)
        log.setLevel(logging.NOTSET)
        del self.pipe

    def _inputs(self, request: Any) -> dict[str, np.ndarray]:
        tensors = {spec.name: self._server.get_input_tensor_by_name(request, spec.name) for spec in INPUTS}
        return {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}

    def _generated(self, images: list[WantedImage]) -> dict[WantedImage, tuple[np.ndarray, np.ndarray]]:
        """uint8 [R, R, 3] and int64 [L] of images that have equal settings."""
        shared = images[0].settings
        done = self.pipe.generate(
            [image.label for image in images],
            seeds=[image.seed for image in images],
            **options_of(shared),
        )
        tokens_BL = np.concatenate(done.tokens, axis=1)
        pictures = map(np.asarray, done.images)
        return dict(zip(images, zip(pictures, tokens_BL, strict=True), strict=True))

    def _response(self, rows: list[tuple[np.ndarray, np.ndarray]]) -> Any:
        outputs = zip(outputs_of(self.pipe.bundle.manifest), zip(*rows, strict=True), strict=True)
        tensors = [self._server.Tensor(spec.name, np.stack(column)) for spec, column in outputs]
        return self._server.InferenceResponse(output_tensors=tensors)

    def _error(self, error: VarDeployError | str, code: str) -> Any:
        message = " ".join(str(error).split())
        triton_error = self._server.TritonError(message, getattr(self._server.TritonError, code))
        return self._server.InferenceResponse(output_tensors=[], error=triton_error)


class _ServerLog(logging.Handler):
    """Passes what the runtime logs (engine, device and why) to the server's log."""

    def __init__(self, logger: Any) -> None:
        super().__init__()
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        write = self._logger.log_warn if record.levelno >= logging.WARNING else self._logger.log_info
        write(f"{record.name}: {self.format(record)}")


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration asks of `load`. Names in capitals are the server's own. Raises EngineError."""
    given = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
    if unknown := [name for name in given if name not in PARAMETERS and name != name.upper()]:
        raise EngineError(f"config.pbtxt: unknown parameter {unknown[0]!r}; known: {', '.join(PARAMETERS)}")
    return {name: given[name] for name in PARAMETERS if name in given}


def _check_tensors(config: Mapping[str, Any], bundle: Bundle) -> None:
    """Refuses a configuration that was written for another bundle. Raises BundleError."""
    for side, specs in (("input", INPUTS), ("output", outputs_of(bundle.manifest))):
        entries = {entry["name"]: entry for entry in config[side]}
        for spec in specs:
            entry = entries.get(spec.name)
            got = None if entry is None else (entry["data_type"], [int(size) for size in entry["dims"]])
            if got != (expected := (spec.data_type, list(spec.shape))):
                found = "nothing" if got is None else f"{got[0]} {got[1]}"
                raise BundleError(
                    f"config.pbtxt: {side} {spec.name} is {found}, {bundle.path} needs {expected[0]} {expected[1]}; "
                    "write the repository again with triton-repo"
                )
