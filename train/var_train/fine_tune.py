"""A VAR checkpoint → the start of another model, of other classes or other scales.

Scales are known by their side, classes by their names where both sides have names; what the checkpoint lacks keeps the
new model's fresh initialisation and is named. Axes: N classes and the null class, L positions, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from var_deploy.config import VARConfig
from var_deploy.errors import CheckpointError

from .checkpoint import StateDict, class_names_of, load_var
from .var import VAR

#: What has to agree: without it no block could take the other's weights.
_SIZES = {
    "depth": "depth",
    "embed_dim": "width",
    "num_heads": "heads",
    "ffn_dim": "FFN width",
    "vocab_size": "codebook entries",
    "z_channels": "code width",
    "shared_aln": "shared AdaLN",
    "attn_l2_norm": "L2-normalised attention",
}

#: What depends on classes or scales and is not copied as a whole; the last two are the new model's layout.
_CLASSES = "class_emb.weight"
_SCALES = ("pos_start", "pos_1LC", "lvl_embed.weight", "lvl_1L", "attn_bias_for_masking")


@torch.no_grad()
def start_from(var: VAR, path: Path, *, class_names: Sequence[str] | None = None) -> list[str]:
    """Fills a freshly initialised model from a checkpoint; a line for each thing that keeps its initialisation.

    `class_names` are the new model's. Where the checkpoint has names too, a class that both know keeps its embedding;
    else equal numbers of classes are taken to be the same ones, in order. The null class is always kept. Raises
    CheckpointError, before anything is filled, where the sizes differ.
    """
    here = var.config
    if class_names is not None and len(class_names) != here.num_classes:
        raise ValueError(f"class_names: got {len(class_names)}, expected {here.num_classes}")
    there, state = load_var(path)
    _require_same_sizes(here, there, path)
    names_there = class_names_of(path)
    own = var.state_dict()  # the model's own tensors: filling them fills it
    for key in own.keys() - {_CLASSES, *_SCALES}:
        own[key].copy_(state[key])
    return [
        *_fill_classes(own, state, class_names, names_there),
        *_fill_scales(own, state, here, there),
    ]


def _require_same_sizes(here: VARConfig, there: VARConfig, path: Path) -> None:
    pairs = {name: (getattr(there, field), getattr(here, field)) for field, name in _SIZES.items()}
    differences = [f"{name} {_said(a)} there, {_said(b)} here" for name, (a, b) in pairs.items() if a != b]
    if differences:
        raise CheckpointError(
            f"{path}: does not fit this model: {'; '.join(differences)}; give this model the checkpoint's sizes, or "
            "start from another checkpoint"
        )


def _fill_classes(
    own: StateDict, state: StateDict, names_here: Sequence[str] | None, names_there: Sequence[str] | None
) -> list[str]:
    own_ND, stored_ND = own[_CLASSES], state[_CLASSES]
    here, there = len(own_ND) - 1, len(stored_ND) - 1
    if names_here is not None and names_there is not None:
        row_there = {name: row for row, name in enumerate(_numbered(names_there))}
        rows = [row_there.get(name) for name in _numbered(names_here)]
        new = [name for name, row in zip(names_here, rows, strict=True) if row is None]
        fresh = f"{len(new)} of {here} classes ({_listed(new)}) are not among the {there} there"
    else:
        rows = [row if here == there else None for row in range(here)]
        fresh = f"{there} classes there, {here} here"
    rows.append(there)  # the null class
    for row, row_of_stored in enumerate(rows):
        if row_of_stored is not None:
            own_ND[row].copy_(stored_ND[row_of_stored])
    if None in rows:
        return [f"{_CLASSES}: {fresh}; new, the null class kept"]
    if names_here is not None and names_there is None:
        return [f"{_CLASSES}: {there} classes on both sides, without names there; taken to be the same, in order"]
    return []


def _fill_scales(own: StateDict, state: StateDict, here: VARConfig, there: VARConfig) -> list[str]:
    fresh: list[str] = []
    if here.patch_nums[0] == there.patch_nums[0]:
        own["pos_start"].copy_(state["pos_start"])
    else:
        fresh.append(f"pos_start: side {there.patch_nums[0]} there, {here.patch_nums[0]} here; new")
    scale_there = {side: k for k, side in enumerate(there.patch_nums)}
    for k, side in enumerate(here.patch_nums):
        if side in scale_there:
            (begin, end), (begin_there, end_there) = here.span(k), there.span(scale_there[side])
            own["pos_1LC"][:, begin:end].copy_(state["pos_1LC"][:, begin_there:end_there])
            own["lvl_embed.weight"][k].copy_(state["lvl_embed.weight"][scale_there[side]])
    new = {k: side for k, side in enumerate(here.patch_nums) if side not in scale_there}
    if new:
        scales, sides = (", ".join(map(str, part)) for part in (new.keys(), new.values()))
        which = f"scales {scales} (sides {sides})" if len(new) > 1 else f"scale {scales} (side {sides})"
        fresh += [f"{key} of {which}: new" for key in ("pos_1LC", "lvl_embed.weight")]
    return fresh


def _numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    """Each name with how often it came before: ImageNet has two cranes, and the first is the first."""
    seen: dict[str, int] = {}
    numbered = []
    for name in names:
        numbered.append((name, seen.get(name, 0)))
        seen[name] = seen.get(name, 0) + 1
    return numbered


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(repr(name) for name in names[:5]) + more


def _said(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
