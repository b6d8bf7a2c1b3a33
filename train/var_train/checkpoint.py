"""Checkpoints → checked state dicts, the configurations they imply, and the class names and scales they carry.

Reads plain state dicts (.pth, .safetensors), published training checkpoints (`trainer.var_wo_ddp`,
`trainer.vae_local`) and checkpoint directories of our own runs. Nothing in a file is ever executed: pickles are read
with `weights_only=True`. Tensors of files stay memory-mapped where the format allows, so such a checkpoint costs no
private memory until a tensor is used.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from var_deploy.config import ConfigError, ScalesConfig, VARConfig, VQVAEConfig
from var_deploy.errors import CheckpointError

from .checkpoint_files import MANIFEST
from .infer_config import StateDict, infer_var_config, infer_vqvae_config
from .run_checkpoints import manifest_of, newest_of, stored_tensors, weights
from .run_folder import CHECKPOINTS, RUN_FILE, finished_file
from .var import VAR, scale_index_and_mask
from .vqvae import VQVAE

log = logging.getLogger("var_train")

#: Keys that only the published training checkpoint has, by what they hold; names of models in checkpoints of our runs.
_TRAINER_KEYS = {"VAR": "var_wo_ddp", "VQVAE": "vae_local"}
_RUN_MODELS = {"VAR": "var", "VQVAE": "vqvae"}
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

    No weight shows the scales, and those of a VAR (`patch_nums`) win, as codes serve other scales too. Without one
    they are those that the checkpoint carries; a published one carries none, and for inspection placeholder scales
    1…K of the usage statistics stand in. Raises CheckpointError.
    """
    state = read_state_dict(path, "VQVAE")
    if patch_nums is None:
        patch_nums = patch_nums_of(path)
    config = infer_vqvae_config(state, patch_nums, path, using_znorm=using_znorm)
    with torch.device("meta"):
        expected = VQVAE(config).state_dict()
    usage = "quantize.ema_vocab_hit_SV"
    if usage in state and state[usage].dim() == 2 and state[usage].shape[1] == config.vocab_size:
        expected[usage] = state[usage]  # any number of scales is fine there
    _check_against(state, expected, path, "VQVAE")
    return config, state


def class_names_of(path: Path) -> tuple[str, ...] | None:
    """The class names that a checkpoint of our runs carries, one per class of a VAR; None where it carries none.

    A VQVAE's are those of the images it was trained on. Raises CheckpointError.
    """
    notes, shapes = _heading(Path(path))
    names = notes.get("class_names")
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            f"{path}: its class_names: got {_short(names)}, expected a list of texts; give the names in a file, "
            "or save the checkpoint again with such a list"
        )
    rows = shapes.get("class_emb.weight")
    if rows and len(names) != rows[0] - 1:
        raise CheckpointError(
            f"{path}: its class_names: got {len(names)}, expected one for each of the model's {rows[0] - 1} classes; "
            "give the names in a file, or save the checkpoint again with all of them"
        )
    return tuple(names)


def patch_nums_of(path: Path) -> tuple[int, ...] | None:
    """The scales that a VQVAE checkpoint of our runs carries; None where it carries none. Raises CheckpointError."""
    sides = _heading(Path(path))[0].get("patch_nums")
    if sides is None:
        return None
    try:
        return ScalesConfig(patch_nums=tuple(sides) if isinstance(sides, list) else sides).patch_nums
    except ConfigError as error:
        raise CheckpointError(f"{path}: its {error}; save the checkpoint again with its scales") from error


def read_state_dict(path: Path, kind: str) -> StateDict:
    """The state dict of `kind` ("VAR" or "VQVAE") in a file, unwrapped from a training checkpoint if need be.

    Or in a checkpoint directory of one of our runs: the averaged weights, where it has them, and the rest as it is.
    Raises CheckpointError.
    """
    path = Path(path)
    if os.path.isdir(path):  # unlike Path.is_dir, false for a name that is too long; reading it says so
        return _state_dict_of_run(path, kind)
    content = _read_file(path)
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
    other = _other(kind)
    if _MARKER_KEYS[kind] not in content and _MARKER_KEYS[other] in content:
        raise CheckpointError(f"{path}: this is a {other} checkpoint, expected a {kind}; are the two files swapped?")
    return dict(content)


def _other(kind: str) -> str:
    return "VQVAE" if kind == "VAR" else "VAR"


def _state_dict_of_run(path: Path, kind: str) -> StateDict:
    _require_run_checkpoint(path)
    stored = stored_tensors(path)
    kinds, model = _kinds_of_run(stored), f"models.{_RUN_MODELS[kind]}."
    if kind not in kinds and kinds:
        raise CheckpointError(
            f"{path}: this is a {_other(kind)} checkpoint, expected a {kind}; are the two checkpoints swapped?"
        )
    averaged = sum(name.startswith("ema.") for name in stored)
    if averaged:
        every = sum(name.startswith(model) for name in stored)
        log.info("%s: of %d tensors, the averaged weights of %d are taken", path, every, averaged)
    return weights(path, "ema.", model) if kinds else weights(path, model)


def _kinds_of_run(stored: Iterable[str]) -> list[str]:
    return [kind for kind, name in _RUN_MODELS.items() if any(key.startswith(f"models.{name}.") for key in stored)]


def _require_run_checkpoint(path: Path) -> None:
    """Says what to give instead of a directory that is no checkpoint."""
    if (path / MANIFEST).exists():
        return
    if not (path / RUN_FILE).exists():
        raise CheckpointError(
            f"{path}: a directory, expected a file, or a checkpoint of a training run, which has a {MANIFEST}"
        )
    finished = (finished_file(path, model) for model in _RUN_MODELS.values())
    usable = next((file for file in finished if file.is_file()), None) or newest_of(path / CHECKPOINTS)
    step = f"give {usable}" if usable else "it has none yet, wait for its first"
    raise CheckpointError(f"{path}: the directory of a training run, expected a checkpoint; {step}")


def _heading(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Sequence[int]]]:
    """(what a checkpoint of our runs carries beside its weights, shapes by key), without reading a tensor.

    Both are empty for files that carry nothing but weights.
    """
    if os.path.isdir(path):
        _require_run_checkpoint(path)
        values = manifest_of(path).get("values")
        shapes = {name.removeprefix("models.var."): form.size for name, form in stored_tensors(path).items()}
        return values if isinstance(values, dict) else {}, shapes
    if not _is_safetensors(_head(path)):
        return {}, {}
    try:
        with safe_open(path, framework="pt") as file:
            notes = {key: _parsed(text) for key, text in (file.metadata() or {}).items()}
            return notes, {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _damaged_safetensors(path, error) from error


def _parsed(text: str) -> Any:
    """A text of a header's metadata, which is JSON where we wrote it and anything else elsewhere."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


#: What PyTorch's reader raises for a file whose bytes make no sense.
_DAMAGED = (RuntimeError, EOFError, ValueError, OSError, LookupError, AttributeError, TypeError, AssertionError)


def _is_state_dict(content: object) -> bool:
    if not isinstance(content, Mapping) or not content:
        return False
    return all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())


def kind_of(path: Path) -> list[str]:
    """Which of "VAR" and "VQVAE" a checkpoint holds (both for a published training checkpoint)."""
    path = Path(path)
    if os.path.isdir(path):
        _require_run_checkpoint(path)
        return _kinds_of_run(stored_tensors(path))
    content = _read_file(path)
    if isinstance(content.get("trainer"), Mapping):
        return [kind for kind, key in _TRAINER_KEYS.items() if key in content["trainer"]]
    return [kind for kind, key in _MARKER_KEYS.items() if key in content]


def _head(path: Path) -> bytes:
    """A file's first bytes, which tell its format."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read it ({error.strerror})") from error
    if not head:
        raise CheckpointError(f"{path}: empty file; copy the checkpoint again")
    return head


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and head[:4] != b"PK\x03\x04"


def _damaged_safetensors(path: Path, error: SafetensorError) -> CheckpointError:
    return CheckpointError(f"{path}: damaged or truncated safetensors file ({error}); copy it again")


def _read_file(path: Path) -> Mapping[str, Any]:
    head = _head(path)
    try:
        if _is_safetensors(head):
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
        raise _damaged_safetensors(path, error) from error
    except _DAMAGED as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged or truncated ({reason}); copy the file again") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dict")
    return content


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
