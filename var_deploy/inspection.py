"""What a bundle holds, as one JSON-ready object: configuration, parameters, files, memory plan by batch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from .bundle import Bundle, Manifest
from .config import config_to_dict
from .cpus import usable_cpus
from .engines.choice import default_decoder
from .errors import RequestError
from .launch_counts import launch_counts
from .memory import FLOAT_BYTES
from .memory_budget import MemoryBudget, onnx_plan
from .precision import COLUMN_SCALE, Precision
from .static_buffers import (
    bucket_of,
    decoded_at_once,
    decoder_activation_bytes,
    generation_bytes,
    nbytes,
    work_specs,
)


def inspect_bundle(
    path: Path,
    batches: list[int],
    precision: Precision | None = None,
    *,
    smooth: bool = False,
    decode_slice: int | None = None,
) -> dict[str, Any]:
    """Opens, checks and describes a bundle. Raises BundleError and RequestError.

    precision, smooth, decode_slice: those of the torch engine's plan, which is for a GPU and guided images; None is
    bf16. A bundle gets the plans of the engines that run it: fp32 both, int8 and fp16 that of the onnx engine.
    """
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    for option, value in (("precision", precision), ("smooth", smooth), ("decode-slice", decode_slice)):
        if value and manifest.precision is not Precision.FP32:
            raise RequestError(
                f"{path}: the torch engine's plan needs an fp32 bundle, got {manifest.precision}; leave out --{option}"
            )
    parameters = {"condition": 0, "scales": 0, "decoder": 0, "encoder": 0}
    sizes = bundle.weight_sizes()
    for name, size in sizes.items():
        parameters[_part(name)] += 0 if name.endswith(COLUMN_SCALE) else size
    plans: dict[str, Any] = {}
    if manifest.precision is not Precision.BF16:
        plans["memory"] = _onnx_plan(bundle, batches)
    if manifest.precision is Precision.FP32:
        plans["torch"] = _torch_plan(manifest, sizes, batches, precision or Precision.BF16, smooth, decode_slice)
    return {
        "kind": "bundle",
        "path": str(path),
        "precision": manifest.precision,
        "exact": manifest.precision.exact,
        "fidelity": None if manifest.fidelity is None else dict(manifest.fidelity),
        "var": config_to_dict(manifest.var),
        "vqvae": config_to_dict(manifest.vqvae),
        "image_size": manifest.vqvae.image_size,
        "class_names": manifest.class_names,
        "sampling": asdict(manifest.sampling),
        "license": manifest.license,
        "source": dict(manifest.source),
        "parameters": parameters,
        "files": {name: seal.size for name, seal in manifest.files.items()},
        **plans,
    }


def _onnx_plan(bundle: Bundle, batches: list[int]) -> list[dict[str, Any]]:
    """What the onnx engine holds for a guided batch on a CPU, in bytes, and how many of its images fit here at once."""
    budget = MemoryBudget(plan=onnx_plan(bundle, default_decoder(bundle), usable_cpus().threads))
    plans = [budget.plan(batch, True) for batch in batches]
    return [
        {**asdict(plan), "total": plan.total, "images_at_once": budget.images_at_once(plan.batch, True)}
        for plan in plans
    ]


def _torch_plan(
    manifest: Manifest,
    sizes: dict[str, int],
    batches: list[int],
    precision: Precision,
    smooth: bool,
    decode_slice: int | None,
) -> dict[str, Any]:
    """What the torch engine holds and replays for a guided batch on a GPU, in bytes and launches."""
    var, vqvae = manifest.var, manifest.vqvae
    weights = sum(size * _device_bytes(name, precision) for name, size in sizes.items() if _part(name) != "encoder")
    memory = []
    for batch in batches:
        bucket = bucket_of(batch)
        work = work_specs(var, bucket, 2 * bucket, precision, smooth)
        caches = nbytes([spec for spec in work if spec.name.startswith("caches")])
        images = decoded_at_once(vqvae, bucket, decode_slice)
        decoder = decoder_activation_bytes(vqvae, images, precision)
        generation = generation_bytes(var, vqvae, bucket, precision, smooth=smooth, decode_slice=decode_slice)
        memory.append(
            {
                "batch": batch,
                "runs_as": bucket,
                "weights": weights,
                "caches": caches,
                "buffers": generation - caches - decoder,
                "decoder": decoder,
                "total": weights + generation,
                "launches": launch_counts(var, vqvae, precision, smooth=smooth, decode_slices=-(-bucket // images)),
            }
        )
    options = {"precision": str(precision), "smooth": smooth, "decode_slice": decode_slice}
    return {**options, "memory": memory}


def _device_bytes(name: str, precision: Precision) -> int:
    """Bytes of an element of a weight on the device."""
    if name.startswith("blocks.") and ".ada_lin" not in name and name.endswith(".weight"):
        return precision.weight_bytes
    kept = name.startswith(("quantize.", "position", "start_position", "ada_gss", "word_embed.", "head.bias"))
    if kept or ".norm" in name or name.endswith(("q_scale", "ada_lin.bias")):
        return FLOAT_BYTES
    return precision.activation_bytes


def _part(name: str) -> str:
    """Which stage reads a weight."""
    if name.startswith(("encoder.", "quant_conv.")):
        return "encoder"
    if name.startswith(("decoder.", "post_quant_conv.")):
        return "decoder"
    if "ada_lin" in name or name in ("class_emb.weight", "start_position", "ada_gss"):
        return "condition"
    return "scales"
