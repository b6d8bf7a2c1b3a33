"""The bundle on disk: a directory whose bundle.json describes and seals everything in it.

`Bundle.open` checks format, files, sizes and digests before anything is used. Loading runs no code from a file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from .config import VARConfig, VQVAEConfig, config_from_dict, config_to_dict, require
from .errors import BundleError, VarDeployError
from .output_file import write_text
from .precision import BUNDLE_PRECISIONS, Precision
from .signature import GraphSpec, TensorSpec, graph_specs

log = logging.getLogger("var_deploy")

MANIFEST = "bundle.json"
WEIGHTS = "weights.safetensors"
FORMAT = "var-deploy bundle"
FORMAT_VERSION = 1
_CHUNK = 1 << 22

#: Bytes of an element, by the name that safetensors has for its type.
_DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingDefaults:
    """What `generate` uses where a request is silent: the paper's settings for FID."""

    guidance: float = 1.5
    top_k: int = 900
    top_p: float = 0.96

    def __post_init__(self) -> None:
        for field in ("guidance", "top_p"):
            value = getattr(self, field)
            most = 1 if field == "top_p" else sys.float_info.max
            ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most
            require(ok, field, value, f"a number from 0 to {most:g}")
        require(type(self.top_k) is int and self.top_k >= 0, "top_k", self.top_k, "an integer of at least 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSeal:
    """Size in bytes and sha256 of one file."""

    size: int
    sha256: str

    def __post_init__(self) -> None:
        require(type(self.size) is int and self.size >= 0, "size", self.size, "a number of bytes")
        ok = isinstance(self.sha256, str) and re.fullmatch("[0-9a-f]{64}", self.sha256) is not None
        require(ok, "sha256", self.sha256, "64 hexadecimal digits")


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """bundle.json as data."""

    var: VARConfig
    vqvae: VQVAEConfig
    precision: Precision
    graphs: Mapping[str, GraphSpec]
    sampling: SamplingDefaults
    class_names: tuple[str, ...] | None
    license: str
    source: Mapping[str, Any]
    files: Mapping[str, FileSeal]
    #: What `verify` last measured of an inexact precision; None: nothing yet, or there is nothing to measure.
    fidelity: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """Stable text: the same manifest always gives the same bytes."""
        data = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": {"var": config_to_dict(self.var), "vqvae": config_to_dict(self.vqvae)},
            "precision": self.precision,
            "sampling": asdict(self.sampling),
            "class_names": None if self.class_names is None else list(self.class_names),
            "license": self.license,
            "source": _finite(self.source),
            "graphs": {name: asdict(spec) for name, spec in self.graphs.items()},
            "files": {name: asdict(seal) for name, seal in self.files.items()},
        }
        if self.fidelity is not None:
            data["fidelity"] = dict(self.fidelity)
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path) -> Manifest:
        """Parses and checks. Raises BundleError."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{where}: not valid JSON ({error}); export the bundle again") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise BundleError(f'{where}: not a bundle manifest: expected "format": {FORMAT!r}')
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            step = "update var-deploy" if isinstance(version, int) and version > FORMAT_VERSION else "export it again"
            raise BundleError(f"{where}: format version {version!r}, this program reads {FORMAT_VERSION}; {step}")
        try:
            manifest = cls(
                var=config_from_dict(VARConfig, data["model"]["var"]),
                vqvae=config_from_dict(VQVAEConfig, data["model"]["vqvae"]),
                precision=_precision(data["precision"], where),
                graphs={name: _graph_spec(graph) for name, graph in data["graphs"].items()},
                sampling=SamplingDefaults(**data["sampling"]),
                class_names=_names(data["class_names"]),
                license=data["license"],
                source=data["source"],
                files={name: FileSeal(**seal) for name, seal in data["files"].items()},
                fidelity=data.get("fidelity"),
            )
        except BundleError:
            raise
        except VarDeployError as error:
            raise BundleError(f"{where}: {error}") from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise BundleError(f"{where}: incomplete or malformed ({error!r}); export the bundle again") from error
        manifest._check(where)
        return manifest

    def _check(self, where: Path) -> None:
        if not isinstance(self.license, str) or not isinstance(self.source, dict):
            raise BundleError(f"{where}: license must be a text and source an object; export the bundle again")
        if self.fidelity is not None and not isinstance(self.fidelity, dict):
            raise BundleError(f"{where}: fidelity must be an object; run verify, or export the bundle again")
        for field in ("patch_nums", "vocab_size", "z_channels"):
            ours, theirs = getattr(self.var, field), getattr(self.vqvae, field)
            if ours != theirs:
                raise BundleError(f"{where}: {field} is {ours} for the VAR, {theirs} for the VQVAE; export it again")
        for name in self.files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name:
                raise BundleError(f"{where}: file name {name!r} leaves the bundle; expected a plain relative path")
        inputs = sum(len(spec.inputs) for spec in self.graphs.values())
        if self.var.depth > inputs:  # said before a signature of that many caches is built
            raise BundleError(f"{where}: depth {self.var.depth}, but the graphs have {inputs} inputs; export it again")
        expected = graph_specs(self.var, self.vqvae, self.precision)
        if dict(self.graphs) != expected:
            wrong = sorted(n for n in expected.keys() | self.graphs.keys() if self.graphs.get(n) != expected.get(n))
            raise BundleError(f"{where}: graph signatures differ from what the model needs: {wrong}; export it again")
        needed = {WEIGHTS, *(spec.file for spec in self.graphs.values())}
        if missing := sorted(needed - self.files.keys()):
            raise BundleError(f"{where}: lists no {', '.join(missing)}; export the bundle again")
        if self.class_names is not None:
            if len(self.class_names) != self.var.num_classes:
                raise BundleError(f"{where}: {len(self.class_names)} class names for {self.var.num_classes} classes")
            if not all(isinstance(name, str) for name in self.class_names):
                raise BundleError(f"{where}: class names must be texts; export the bundle again")


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: manifest read, files present and unchanged."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, *, verify_digests: bool = True) -> Bundle:
        """Opens a bundle directory.

        `verify_digests=False` skips the sha256 of the files (sizes are still compared), for a caller that checked
        them before. Raises BundleError.
        """
        path = Path(path)
        manifest_path = path / MANIFEST
        if not path.is_dir() or not manifest_path.is_file():
            raise BundleError(f"{path}: no bundle here: expected a directory with {MANIFEST}; make one with export")
        try:
            text = manifest_path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{manifest_path}: cannot read it ({error}); copy or export the bundle again") from error
        bundle = cls(path, Manifest.from_json(text, manifest_path))
        bundle._check_files(verify_digests)
        return bundle

    def file(self, name: str) -> Path:
        """Path of a file of the bundle."""
        return self.path / name

    def weight(self, name: str) -> np.ndarray:
        """A copy of one weight. Raises BundleError."""
        with self._weights() as weights:
            return weights.get_tensor(name)

    def weight_sizes(self) -> dict[str, int]:
        """Number of elements of every weight. Raises BundleError."""
        with self._weights() as weights:
            return {name: math.prod(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118

    def weight_bytes(self) -> dict[str, int]:
        """Number of bytes of every weight, as stored. Raises BundleError."""
        with self._weights() as weights:
            dtypes = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        if foreign := sorted(set(dtypes.values()) - _DTYPE_BYTES.keys()):
            raise BundleError(
                f"{self.file(WEIGHTS)}: holds {', '.join(foreign)}, known: {', '.join(_DTYPE_BYTES)}; export it again"
            )
        return {name: size * _DTYPE_BYTES[dtypes[name]] for name, size in self.weight_sizes().items()}

    @contextmanager
    def _weights(self) -> Iterator[Any]:
        try:
            with safe_open(self.file(WEIGHTS), framework="np") as weights:
                yield weights
        except SafetensorError as error:
            raise BundleError(f"{self.file(WEIGHTS)}: {error}; export the bundle again") from error

    @property
    def digest(self) -> str:
        """sha256 of graphs and weights, by their names and digests; what verify notes in the manifest is no part."""
        files = sorted((name, seal.sha256) for name, seal in self.manifest.files.items())
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()

    def _check_files(self, verify_digests: bool) -> None:
        problems = []
        root = self.path.resolve()
        for name, seal in self.manifest.files.items():
            file = self.file(name)
            try:
                if not file.is_file():
                    problems.append(f"{name} is missing")
                elif not file.resolve().is_relative_to(root):
                    problems.append(f"{name} is a link that leaves the bundle")
                elif (size := file.stat().st_size) != seal.size:
                    problems.append(f"{name} has {size} bytes, expected {seal.size}")
                elif verify_digests and (digest := sha256_of(file)) != seal.sha256:
                    problems.append(f"{name} has sha256 {digest[:12]}…, expected {seal.sha256[:12]}…")
            except OSError as error:
                problems.append(f"{name} cannot be read ({error.strerror})")
        if problems:
            raise BundleError(f"{self.path}: changed since export: {'; '.join(problems)}; copy or export it again")


def _precision(value: Any, where: Path) -> Precision:
    if value not in BUNDLE_PRECISIONS:
        known = ", ".join(BUNDLE_PRECISIONS)
        raise BundleError(f"{where}: precision {value!r} is unknown, known: {known}; update var-deploy")
    return Precision(value)


def note_fidelity(bundle: Bundle, fidelity: Mapping[str, Any]) -> None:
    """Puts what `verify` measured into the manifest, in one step; a bundle that cannot be written stays as it is."""
    path = bundle.file(MANIFEST)
    try:
        write_text(path, replace(bundle.manifest, fidelity=_finite(fidelity)).to_json())
    except VarDeployError as error:
        log.warning("%s: the measured fidelity could not be noted (%s)", path, error)


def _finite(value: Any) -> Any:
    """The same data with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _names(value: Any) -> tuple[str, ...] | None:
    if value is not None and not isinstance(value, list):
        raise TypeError(f"class_names is a {type(value).__name__}, not a list")
    return None if value is None else tuple(value)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _graph_spec(data: Mapping[str, Any]) -> GraphSpec:
    def tensors(entries: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(e["name"], e["dtype"], tuple(e["shape"])) for e in entries)

    return GraphSpec(data["file"], tensors(data["inputs"]), tensors(data["outputs"]))
