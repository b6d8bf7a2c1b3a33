"""Checkpoint files → checked state dicts and the configurations they imply.

Reads plain state dicts (.pth, .safetensors) and training checkpoints (`trainer.var_wo_ddp`, `trainer.vae_local`).
Nothing in a file is ever executed: pickles are read with `weights_only=True`. Tensors stay memory-mapped where the
format allows, so a checkpoint costs no private memory until a tensor is used.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from var_deploy.config import HEAD_DIM, ConfigError, PhiLayout, VARConfig, VQVAEConfig
from var_deploy.errors import CheckpointError

from .var import VAR, scale_index_and_mask
from .vqvae import VQVAE

StateDict = dict[str, Tensor]

#: Keys that only the published training checkpoint has, by what they hold.
_TRAINER_KEYS = {"VAR": "var_wo_ddp", "VQVAE": "vae_local"}
_MARKER_KEYS = {"VAR": "word_embed.weight", "VQVAE": "quantize.embedding.weight"}


@dataclass(frozen=True, slots=True)
class CheckpointPair:
    """A VAR and the VQVAE it was trained on: both state dicts complete, finite and fitting each other."""

    var: VARConfig
    vqvae: VQVAEConfig
    var_state: StateDict
    vqvae_state: StateDict

    def models(self) -> tuple[VAR, VQVAE]:
        """The reference models with these weights, in float32 and evaluation mode."""
        return _filled(VAR(self.var), self.var_state), _filled(VQVAE(self.vqvae), self.vqvae_state)


def load_pair(var_path: Path, vqvae_path: Path, *, using_znorm: bool = False) -> CheckpointPair:
    """Both checkpoints, checked one by one and against each other.

    `using_znorm` (nearest code by cosine) is the one option that no key of a checkpoint shows; it matters to
    encoding only. Raises CheckpointError.
    """
    var, var_state = load_var(var_path)
    vqvae, vqvae_state = load_vqvae(vqvae_path, var.patch_nums, using_znorm=using_znorm)
    for field, meaning in (("vocab_size", "codebook entries"), ("z_channels", "code width")):
        of_var, of_vqvae = getattr(var, field), getattr(vqvae, field)
        if of_var != of_vqvae:
            raise CheckpointError(
                f"{var_path} and {vqvae_path} do not fit each other: the VAR expects {of_var} {meaning}, the VQVAE "
                f"has {of_vqvae}; give the VQVAE that this VAR was trained on"
            )
    return CheckpointPair(var, vqvae, var_state, vqvae_state)


def load_var(path: Path) -> tuple[VARConfig, StateDict]:
    """Configuration and state dict of a VAR checkpoint. Raises CheckpointError."""
    state = read_state_dict(path, "VAR")
    config = infer_var_config(state, path)
    with torch.device("meta"):
        expected = VAR(config).state_dict()
    _check_against(state, expected, path, "VAR")
    for key, computed in zip(("lvl_1L", "attn_bias_for_masking"), scale_index_and_mask(config), strict=True):
        if not torch.equal(state[key].to(computed.dtype), computed):
            raise CheckpointError(
                f"{path}: {key} does not hold the block-causal layout of scales {config.patch_nums}; "
                "the file is damaged or is not a VAR checkpoint"
            )
    return config, state


def load_vqvae(
    path: Path, patch_nums: tuple[int, ...] | None = None, *, using_znorm: bool = False
) -> tuple[VQVAEConfig, StateDict]:
    """Configuration and state dict of a VQVAE checkpoint.

    A VQVAE file does not say its scales: they come from its VAR. Without one (`patch_nums` None, for inspection)
    placeholder scales 1…K of the usage statistics stand in. Raises CheckpointError.
    """
    state = read_state_dict(path, "VQVAE")
    config = infer_vqvae_config(state, patch_nums, path, using_znorm=using_znorm)
    with torch.device("meta"):
        expected = VQVAE(config).state_dict()
    usage = "quantize.ema_vocab_hit_SV"
    if usage in state and state[usage].dim() == 2 and state[usage].shape[1] == config.vocab_size:
        expected[usage] = state[usage]  # any number of scales is fine there
    _check_against(state, expected, path, "VQVAE")
    return config, state


def read_state_dict(path: Path, kind: str) -> StateDict:
    """The state dict of `kind` ("VAR" or "VQVAE") in a file, unwrapped from a training checkpoint if need be."""
    content = _read_file(Path(path))
    if "trainer" in content:
        trainer, key = content["trainer"], _TRAINER_KEYS[kind]
        if not isinstance(trainer, Mapping) or key not in trainer:
            known = sorted(map(str, trainer)) if isinstance(trainer, Mapping) else type(trainer).__name__
            raise CheckpointError(f"{path}: a training checkpoint without trainer.{key}; trainer holds {known}")
        content = trainer[key]
    if not _is_state_dict(content):
        held = sorted(map(str, content))[:8] if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"{path}: no state dict found; got {held}, expected a dict of tensors or a training checkpoint "
            "with 'trainer'"
        )
    other = "VQVAE" if kind == "VAR" else "VAR"
    if _MARKER_KEYS[kind] not in content and _MARKER_KEYS[other] in content:
        raise CheckpointError(f"{path}: this is a {other} checkpoint, expected a {kind}; are the two files swapped?")
    return dict(content)


#: What PyTorch's reader raises for a file whose bytes make no sense.
_DAMAGED = (RuntimeError, EOFError, ValueError, OSError, LookupError, AttributeError, TypeError, AssertionError)


def _is_state_dict(content: object) -> bool:
    if not isinstance(content, Mapping) or not content:
        return False
    return all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())


def kind_of(path: Path) -> list[str]:
    """Which of "VAR" and "VQVAE" a checkpoint file holds (both for a training checkpoint)."""
    content = _read_file(Path(path))
    if isinstance(content.get("trainer"), Mapping):
        return [kind for kind, key in _TRAINER_KEYS.items() if key in content["trainer"]]
    return [kind for kind, key in _MARKER_KEYS.items() if key in content]


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path}: a directory, expected a file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read it ({error.strerror})") from error
    if not head:
        raise CheckpointError(f"{path}: empty file; copy the checkpoint again")
    try:
        if head[8:9] == b"{" and head[:4] != b"PK\x03\x04":
            return load_file(path)
        if zipfile.is_zipfile(path):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        elif head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            content = torch.load(path, map_location="cpu", weights_only=True)
        elif head[:4] == b"PK\x03\x04":
            raise CheckpointError(f"{path}: truncated: the archive's end is missing; copy the file again")
        else:
            raise CheckpointError(
                f"{path}: not a checkpoint: starts with {head[:4]!r}, expected a PyTorch .pth or a .safetensors file"
            )
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "GLOBAL" in str(error) or "Unsupported" in str(error):
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f" ({found.group(1)})" if found else ""
            raise CheckpointError(
                f"{path}: refused: PyTorch's safe reader finds objects other than tensors and plain values{what}, "
                "which could run code; save a plain state dict with torch.save(model.state_dict(), path)"
            ) from error
        raise CheckpointError(f"{path}: damaged or truncated pickle; copy the file again") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged or truncated safetensors file ({error}); copy it again") from error
    except _DAMAGED as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged or truncated ({reason}); copy the file again") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dict")
    return content


def infer_var_config(state: StateDict, path: Path) -> VARConfig:
    """Configuration from keys and shapes alone. Raises CheckpointError."""

    def need(key: str, dims: int) -> Tensor:
        if key not in state:
            raise CheckpointError(f"{path}: missing key {key!r}, needed to infer the configuration of a VAR")
        if state[key].dim() != dims:
            raise CheckpointError(f"{path}: {key} has shape {tuple(state[key].shape)}, expected {dims} axes")
        return state[key]

    lvl_1L = need("lvl_1L", 2).long()
    if not lvl_1L.numel() or lvl_1L.min() < 0 or lvl_1L.max() >= lvl_1L.shape[1]:
        raise CheckpointError(f"{path}: lvl_1L does not hold the scale index of each token; the file is damaged")
    counts = torch.bincount(lvl_1L[0]).tolist()
    patch_nums = tuple(math.isqrt(n) for n in counts)
    if [pn * pn for pn in patch_nums] != counts:
        raise CheckpointError(f"{path}: lvl_1L counts {counts} tokens per scale, expected square numbers")
    embed_dim, z_channels = need("word_embed.weight", 2).shape
    scale_mul = state.get("blocks.0.attn.scale_mul_1H11")
    if scale_mul is not None and scale_mul.dim() == 4 and scale_mul.shape[1] * HEAD_DIM != embed_dim:
        raise CheckpointError(
            f"{path}: {scale_mul.shape[1]} heads at width {embed_dim}, expected head width {HEAD_DIM} "
            f"({embed_dim // HEAD_DIM} heads)"
        )
    try:
        return VARConfig(
            patch_nums=patch_nums,
            vocab_size=need("head.weight", 2).shape[0],
            z_channels=z_channels,
            num_classes=need("class_emb.weight", 2).shape[0] - 1,
            depth=_count(state, path, r"blocks\.(\d+)\."),
            embed_dim=embed_dim,
            ffn_dim=need("blocks.0.ffn.fc1.weight", 2).shape[0],
            shared_aln=any(key.endswith(".ada_gss") for key in state),
            attn_l2_norm=scale_mul is not None,
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def infer_vqvae_config(
    state: StateDict, patch_nums: tuple[int, ...] | None, path: Path, *, using_znorm: bool = False
) -> VQVAEConfig:
    """Configuration from keys and shapes alone, but for the scales. Raises CheckpointError."""

    def need(key: str, dims: int) -> Tensor:
        if key not in state:
            raise CheckpointError(f"{path}: missing key {key!r}, needed to infer the configuration of a VQVAE")
        if state[key].dim() != dims:
            raise CheckpointError(f"{path}: {key} has shape {tuple(state[key].shape)}, expected {dims} axes")
        return state[key]

    ch = need("encoder.conv_in.weight", 4).shape[0]
    widths = [
        need(f"encoder.down.{level}.block.0.conv1.weight", 4).shape[0]
        for level in range(_count(state, path, r"encoder\.down\.(\d+)\."))
    ]
    partial = _count(state, path, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.")
    per_scale = _count(state, path, r"quantize\.quant_resi\.(\d+)\.")
    if partial:
        layout, num_phi = PhiLayout.PARTIAL, partial
    elif per_scale:
        layout, num_phi = PhiLayout.PER_SCALE, per_scale
    else:
        layout, num_phi = PhiLayout.SINGLE, 1
    vocab_size, z_channels = need("quantize.embedding.weight", 2).shape
    if patch_nums is None:
        usage = state.get("quantize.ema_vocab_hit_SV")
        scales = len(usage) if usage is not None and usage.dim() == 2 and len(usage) > 1 else 10
        patch_nums = tuple(range(1, 1 + scales))
    try:
        return VQVAEConfig(
            patch_nums=patch_nums,
            vocab_size=vocab_size,
            z_channels=z_channels,
            ch=ch,
            ch_mult=tuple(width // ch for width in widths),
            num_res_blocks=_count(state, path, r"encoder\.down\.0\.block\.(\d+)\."),
            num_phi=num_phi,
            phi_layout=layout,
            using_znorm=using_znorm,
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _count(state: StateDict, path: Path, pattern: str) -> int:
    """One more than the largest number that a key has where the pattern has its group. Raises CheckpointError."""
    numbers = [int(match.group(1)) for key in state if (match := re.match(pattern, key))]
    count = 1 + max(numbers, default=-1)
    if count > len(state):  # said before a model of that many parts is built
        raise CheckpointError(f"{path}: a key numbers part {count - 1} of a state dict with {len(state)} keys")
    return count


def _check_against(state: StateDict, expected: Mapping[str, Tensor], path: Path, kind: str) -> None:
    """All differences of keys, shapes and types, and all non-finite weights, in one error."""
    problems = [f"missing {key} {tuple(expected[key].shape)}" for key in sorted(expected.keys() - state.keys())]
    problems += [f"unexpected {key} {tuple(state[key].shape)}" for key in sorted(state.keys() - expected.keys())]
    for key in sorted(expected.keys() & state.keys()):
        got, want = state[key], expected[key]
        if got.shape != want.shape:
            problems.append(f"{key} has shape {tuple(got.shape)}, expected {tuple(want.shape)}")
        elif got.is_floating_point() != want.is_floating_point():
            problems.append(f"{key} is {got.dtype}, expected {want.dtype}")
        elif got.is_floating_point() and key != "attn_bias_for_masking" and not _all_finite(got):
            problems.append(f"{key} holds NaN or infinite values")
    if problems:
        raise CheckpointError(
            f"{path}: does not match the {kind} its shapes imply, {len(problems)} problem(s): " + "; ".join(problems)
        )


def _all_finite(tensor: Tensor) -> bool:
    # A sum is NaN or infinite as soon as one element is; it needs no temporary of the tensor's size. A finite tensor
    # whose sum overflows is told apart by the exact test.
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def _filled(model: nn.Module, state: StateDict) -> Any:
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)
