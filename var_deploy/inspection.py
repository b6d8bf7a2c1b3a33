"""What a bundle holds, as one JSON-ready object: configuration, parameters, files, memory plan by batch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from .bundle import Bundle
from .config import config_to_dict
from .memory import memory_plan


def inspect_bundle(path: Path, batches: list[int]) -> dict[str, Any]:
    """Opens and checks a bundle and describes it. Raises BundleError."""
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    parameters = {"condition": 0, "scales": 0, "decoder": 0, "encoder": 0}
    for name, size in bundle.weight_sizes().items():
        parameters[_part(name)] += size
    loaded = 4 * (sum(parameters.values()) - parameters["encoder"])  # the encoder is loaded when first used
    plans = [memory_plan(manifest.var, manifest.vqvae, loaded, batch) for batch in batches]
    return {
        "kind": "bundle",
        "path": str(path),
        "precision": manifest.precision,
        "var": config_to_dict(manifest.var),
        "vqvae": config_to_dict(manifest.vqvae),
        "image_size": manifest.vqvae.image_size,
        "class_names": manifest.class_names,
        "sampling": asdict(manifest.sampling),
        "license": manifest.license,
        "source": dict(manifest.source),
        "parameters": parameters,
        "files": {name: seal.size for name, seal in manifest.files.items()},
        "memory": [{**asdict(plan), "total": plan.total} for plan in plans],
    }


def _part(name: str) -> str:
    """Which stage reads a weight."""
    if name.startswith(("encoder.", "quant_conv.")):
        return "encoder"
    if name.startswith(("decoder.", "post_quant_conv.")):
        return "decoder"
    if "ada_lin" in name or name in ("class_emb.weight", "start_position", "ada_gss"):
        return "condition"
    return "scales"
