"""What a checkpoint holds, as one JSON-ready object: kind, inferred configuration, class names, parameters, size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from var_deploy.config import config_to_dict
from var_deploy.errors import CheckpointError
from var_deploy.memory import memory_plan
from var_train.checkpoint import StateDict, class_names_of, kind_of, load_var, load_vqvae, patch_nums_of

#: State-dict entries that are computed, not trained.
_BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")


def inspect_checkpoint(path: Path, batches: Sequence[int] = (1, 8, 64)) -> dict[str, Any]:
    """Reads, checks and describes a checkpoint: a file or a directory of a training run. Raises CheckpointError.

    The memory plan needs the transformer; it counts the decoder too where the file holds the VQVAE as well.
    """
    kinds = kind_of(path)
    if not kinds:
        raise CheckpointError(f"{path}: neither a VAR nor a VQVAE state dict, nor a training checkpoint of them")
    data: dict[str, Any] = {"kind": "checkpoint", "path": str(path), "size": _size(path)}
    var, vqvae, parameters = None, None, 0
    patch_nums: tuple[int, ...] | None = None
    if "VAR" in kinds:
        var, state = load_var(path)
        patch_nums = var.patch_nums
        parameters += _parameters(state)
        names = class_names_of(path)
        data["var"] = {**config_to_dict(var), "parameters": _parameters(state), "dtypes": _dtypes(state)}
        data["var"]["class_names"] = None if names is None else list(names)
    if "VQVAE" in kinds:
        patch_nums = patch_nums or patch_nums_of(path)
        vqvae, state = load_vqvae(path, patch_nums)
        # The encoder is loaded when first used; the plan is one of generating.
        parameters += _parameters({k: v for k, v in state.items() if not k.startswith(("encoder.", "quant_conv."))})
        described = {**config_to_dict(vqvae), "parameters": _parameters(state), "dtypes": _dtypes(state)}
        if patch_nums is None:  # a published VQVAE file alone does not say its scales
            described["patch_nums"] = None
        data["vqvae"] = described
    if var is not None:
        plans = [memory_plan(var, vqvae, 4 * parameters, batch) for batch in batches]
        data["memory"] = [{**asdict(plan), "total": plan.total} for plan in plans]
    return data


def _size(path: Path) -> int:
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _parameters(state: StateDict) -> int:
    return sum(tensor.numel() for key, tensor in state.items() if not key.endswith(_BUFFERS))


def _dtypes(state: StateDict) -> list[str]:
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})
