"""A new VAR starts from a checkpoint: what both have is copied exactly, all else stays as initialised and is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from var_deploy.config import VARConfig
from var_deploy.errors import CheckpointError
from var_train import VAR
from var_train.fine_tune import start_from
from var_train.presets import randomise
from var_train.run_checkpoints import RunCheckpoints
from var_train.run_state import RunState

#: Three classes 0, 1, 2 and the null class 3; scales of sides 1, 2 and 4.
CONFIG = VARConfig(patch_nums=(1, 2, 4), vocab_size=11, z_channels=5, num_classes=3, depth=2, embed_dim=64, ffn_dim=70)
NAMES = ("ant", "bee", "cat")
CLASSES, LAYOUT = "class_emb.weight", ("lvl_1L", "attn_bias_for_masking")
BY_SCALE = ("pos_start", "pos_1LC", "lvl_embed.weight")

Write = Callable[..., tuple[VAR, Path]]


@pytest.fixture
def written(tmp_path: Path) -> Write:
    """`written(config, names, dtype)` → a trained model, so to speak, and its file."""

    def write(
        config: VARConfig = CONFIG, names: Sequence[str] | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[VAR, Path]:
        model = VAR(config)
        randomise(model)
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
        notes = None if names is None else {"class_names": json.dumps(names)}
        save_file(state, tmp_path / "var.safetensors", metadata=notes)
        return model, tmp_path / "var.safetensors"

    return write


def fresh(config: VARConfig = CONFIG, seed: int = 1) -> tuple[VAR, dict[str, Tensor]]:
    """A new model, and a copy of what it holds."""
    torch.manual_seed(seed)
    model = VAR(config)
    model.init_weights()
    return model, {key: tensor.clone() for key, tensor in model.state_dict().items()}


def changed(model: VAR, before: dict[str, Tensor]) -> set[str]:
    """Keys of which no element is as before."""
    state = model.state_dict()
    return {key for key in state if (state[key] != before[key]).all()}


def assert_rows(got_ND: Tensor, expected: list[Tensor]) -> None:
    assert len(got_ND) == len(expected)
    assert [row for row, tensor in enumerate(expected) if not torch.equal(got_ND[row], tensor)] == []


def logits_of(model: VAR) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    features_BlC = torch.randn(4, 20, 5, generator=generator)
    with torch.no_grad():
        return model.eval()(torch.tensor([0, 2, 1, 3]), features_BlC)


# What is copied -------------------------------------------------------------------------------------------------------

VARIANTS = {
    "own": CONFIG,
    "shared_adaln": replace(CONFIG, shared_aln=True),
    "plain_attention": replace(CONFIG, attn_l2_norm=False, embed_dim=128),
    "first_scale_of_four": replace(CONFIG, patch_nums=(2, 4), num_classes=1),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_differs_so_the_new_model_is_the_old_one(written, name):
    there, path = written(VARIANTS[name])
    here, before = fresh(VARIANTS[name])
    assert start_from(here, path) == []
    old, new = there.state_dict(), here.state_dict()
    assert [key for key in old if not torch.equal(new[key], old[key])] == []
    assert "blocks.1.ffn.fc1.weight" in changed(here, before)
    assert all(parameter.requires_grad for parameter in here.parameters())


def test_the_same_logits_come_out_when_nothing_differs(written):
    there, path = written()
    here, _ = fresh()
    assert not torch.equal(logits_of(here), logits_of(there))
    start_from(here, path)
    assert torch.equal(logits_of(here), logits_of(there))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sources_of_half_precision_fill_float32(written, dtype):
    config = replace(CONFIG, patch_nums=(1, 4), num_classes=2)
    there, path = written(names=NAMES, dtype=dtype)
    here, _ = fresh(config)
    assert start_from(here, path, class_names=["cat", "ant"]) == []
    state = here.state_dict()
    assert {tensor.dtype for key, tensor in state.items() if key != "lvl_1L"} == {torch.float32}
    rounded = {key: tensor.to(dtype).float() for key, tensor in there.state_dict().items()}
    for key in state.keys() - {CLASSES, "pos_1LC", "lvl_embed.weight", *LAYOUT}:
        assert torch.equal(state[key], rounded[key]), key
    assert torch.equal(state[CLASSES], rounded[CLASSES][[2, 0, 3]])
    assert torch.equal(state["lvl_embed.weight"], rounded["lvl_embed.weight"][[0, 2]])


def test_the_averaged_weights_of_a_run_are_a_start_too(tmp_path):
    there, _ = fresh(seed=5)
    ema = {name: weight.detach() * 2 for name, weight in there.named_parameters()}
    values = {"class_names": list(NAMES)}
    path = RunCheckpoints(tmp_path).save(9, RunState(models={"var": there}, ema=ema, values=values))
    here, before = fresh(replace(CONFIG, num_classes=4))
    assert start_from(here, path, class_names=["bee", "dog", "ant", "cat"]) == [
        "class_emb.weight: 1 of 4 classes ('dog') are not among the 3 there; new, the null class kept"
    ]
    assert torch.equal(here.head.weight, ema["head.weight"])
    old = ema[CLASSES]
    assert_rows(here.class_emb.weight, [old[1], before[CLASSES][1], old[0], old[2], old[3]])


# Classes --------------------------------------------------------------------------------------------------------------

N = "new"  # row of the new model's own
BY_CLASS: dict[str, tuple[Sequence[str] | None, Sequence[str] | None, int, list[int | str], str | None]] = {
    # names there, names here, classes here, rows of the source, what is said
    "no_names_same_count": (None, None, 3, [0, 1, 2], None),
    "no_names_fewer": (None, None, 2, [N, N], "3 classes there, 2 here"),
    "no_names_more": (None, None, 5, [N] * 5, "3 classes there, 5 here"),
    "names_there_only": (NAMES, None, 3, [0, 1, 2], None),
    "names_there_only_fewer": (NAMES, None, 2, [N, N], "3 classes there, 2 here"),
    "names_here_only": (
        None,
        ["x", "y", "z"],
        3,
        [0, 1, 2],
        "3 classes on both sides, without names there; taken to be the same, in order",
    ),
    "names_here_only_more": (None, ["x", "y", "z", "cat"], 4, [N] * 4, "3 classes there, 4 here"),
    "same_names": (NAMES, NAMES, 3, [0, 1, 2], None),
    "other_order": (NAMES, ["cat", "ant", "bee"], 3, [2, 0, 1], None),
    "some": (NAMES, ["cat"], 1, [2], None),
    "one_new": (NAMES, ["cat", "dog", "ant"], 3, [2, N, 0], "1 of 3 classes ('dog') are not among the 3 there"),
    "none": (NAMES, ["Cat", "dog"], 2, [N, N], "2 of 2 classes ('Cat', 'dog') are not among the 3 there"),
    "many_new": (
        NAMES,
        [*"abcdefg", "bee"],
        8,
        [*[N] * 7, 1],
        "7 of 8 classes ('a', 'b', 'c', 'd', 'e' and 2 more) are not among the 3 there",
    ),
    "a_name_twice": (["crane", "owl", "crane"], ["owl", "crane", "crane"], 3, [1, 0, 2], None),
    "a_name_twice_here": (
        NAMES,
        ["bee", "ant", "bee"],
        3,
        [1, 0, N],
        "1 of 3 classes ('bee') are not among the 3 there",
    ),
}


@pytest.mark.parametrize("name", BY_CLASS)
def test_classes(written, name):
    names_there, names_here, count, rows, said = BY_CLASS[name]
    there, path = written(names=names_there)
    here, before = fresh(replace(CONFIG, num_classes=count))
    lines = start_from(here, path, class_names=names_here)
    kept = "" if N not in rows else "; new, the null class kept"
    assert lines == ([] if said is None else [f"class_emb.weight: {said}{kept}"])
    old = there.state_dict()
    expected = [before[CLASSES][i] if row == N else old[CLASSES][row] for i, row in enumerate(rows)]
    assert_rows(here.class_emb.weight, [*expected, old[CLASSES][3]])
    assert all(torch.equal(tensor, old[key]) for key, tensor in here.state_dict().items() if key != CLASSES)


@given(
    st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6),
    st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6),
)
def test_every_matched_row_is_one_of_its_name_and_no_row_serves_twice(tmp_path_factory, names_there, names_here):
    small = replace(CONFIG, patch_nums=(1, 2), depth=1, ffn_dim=1, vocab_size=2, z_channels=1)
    there = VAR(replace(small, num_classes=len(names_there)))
    torch.nn.init.normal_(there.class_emb.weight)
    path = tmp_path_factory.getbasetemp() / "named.safetensors"
    save_file(there.state_dict(), path, metadata={"class_names": json.dumps(names_there)})
    here, before = fresh(replace(small, num_classes=len(names_here)))
    lines = start_from(here, path, class_names=names_here)
    source = {tuple(row.tolist()): i for i, row in enumerate(there.class_emb.weight)}
    rows = [source.get(tuple(row.tolist())) for row in here.class_emb.weight]
    assert rows.pop() == len(names_there)
    taken = [row for row in rows if row is not None]
    assert len(set(taken)) == len(taken)
    for i, row in enumerate(rows):
        if row is None:
            assert torch.equal(here.class_emb.weight[i], before[CLASSES][i])
        else:
            assert names_there[row] == names_here[i]
    for name in set(names_here):
        matched = sum(row is not None for i, row in enumerate(rows) if names_here[i] == name)
        assert matched == min(names_here.count(name), names_there.count(name))
    assert bool(lines) == (None in rows)


# Scales ---------------------------------------------------------------------------------------------------------------

BY_SIDE: dict[str, tuple[tuple[int, ...], dict[int, int], list[str]]] = {
    # scales here, scale there by scale here, what is said; there are sides 1, 2, 4
    "finer": ((1, 2, 4, 7), {0: 0, 1: 1, 2: 2}, ["pos_1LC of scale 3 (side 7): new"]),
    "fewer": ((1, 2), {0: 0, 1: 1}, []),
    "without_the_middle": ((1, 4), {0: 0, 1: 2}, []),
    "between": ((1, 2, 3, 4, 5), {0: 0, 1: 1, 3: 2}, ["pos_1LC of scales 2, 4 (sides 3, 5): new"]),
    "other_first": ((2, 4), {0: 1, 1: 2}, ["pos_start: side 1 there, 2 here; new"]),
    "new_first": (
        (3, 4),
        {1: 2},
        ["pos_start: side 1 there, 3 here; new", "pos_1LC of scale 0 (side 3): new"],
    ),
    "nothing_in_common": (
        (3, 5),
        {},
        ["pos_start: side 1 there, 3 here; new", "pos_1LC of scales 0, 1 (sides 3, 5): new"],
    ),
}


@pytest.mark.parametrize("name", BY_SIDE)
def test_scales(written, name):
    sides, matched, said = BY_SIDE[name]
    there, path = written()
    config = replace(CONFIG, patch_nums=sides)
    here, before = fresh(config)
    lines = start_from(here, path)
    levels = [line.replace("pos_1LC", "lvl_embed.weight") for line in said if line.startswith("pos_1LC")]
    assert lines == said + levels
    old, new = there.state_dict(), here.state_dict()
    for k in range(len(sides)):
        source = old if k in matched else before
        (begin, end), (from_begin, from_end) = config.span(k), config.span(k)
        if k in matched:
            from_begin, from_end = CONFIG.span(matched[k])
        assert torch.equal(new["pos_1LC"][:, begin:end], source["pos_1LC"][:, from_begin:from_end]), k
        assert torch.equal(new["lvl_embed.weight"][k], source["lvl_embed.weight"][matched.get(k, k)]), k
    assert torch.equal(new["pos_start"], (old if sides[0] == 1 else before)["pos_start"])
    for key in LAYOUT:
        assert torch.equal(new[key], before[key])
    assert all(torch.equal(new[key], old[key]) for key in new.keys() - {*BY_SCALE, *LAYOUT})


def test_other_classes_and_scales_at_once(written):
    _, path = written(names=NAMES)
    here, _ = fresh(replace(CONFIG, patch_nums=(2, 3), num_classes=2))
    assert start_from(here, path, class_names=["bee", "eel"]) == [
        "class_emb.weight: 1 of 2 classes ('eel') are not among the 3 there; new, the null class kept",
        "pos_start: side 1 there, 2 here; new",
        "pos_1LC of scale 1 (side 3): new",
        "lvl_embed.weight of scale 1 (side 3): new",
    ]
    assert torch.isfinite(here.eval()(torch.tensor([1, 2]), torch.zeros(2, 9, 5))).all()


# What is refused ------------------------------------------------------------------------------------------------------

BAD_SIZES = {
    "depth": ({"depth": 3}, "depth 2 there, 3 here"),
    "width": ({"embed_dim": 128}, "width 64 there, 128 here; heads 1 there, 2 here"),
    "ffn": ({"ffn_dim": 256}, "FFN width 70 there, 256 here"),
    "codebook": ({"vocab_size": 12}, "codebook entries 11 there, 12 here"),
    "code_width": ({"z_channels": 4}, "code width 5 there, 4 here"),
    "adaln": ({"shared_aln": True}, "shared AdaLN no there, yes here"),
    "attention": ({"attn_l2_norm": False}, "L2-normalised attention yes there, no here"),
    "several": (
        {"depth": 1, "vocab_size": 9, "shared_aln": True, "num_classes": 9, "patch_nums": (1, 5)},
        "depth 2 there, 1 here; codebook entries 11 there, 9 here; shared AdaLN no there, yes here",
    ),
}


@pytest.mark.parametrize("name", BAD_SIZES)
def test_other_sizes_are_refused_and_nothing_is_filled(written, name):
    fields, expected = BAD_SIZES[name]
    _, path = written()
    here, before = fresh(replace(CONFIG, **fields))
    with pytest.raises(CheckpointError) as refusal:
        start_from(here, path)
    assert str(refusal.value) == (
        f"{path}: does not fit this model: {expected}; give this model the checkpoint's sizes, or start from another "
        "checkpoint"
    )
    assert all(torch.equal(tensor, before[key]) for key, tensor in here.state_dict().items())


def test_bad_class_names_are_refused_before_anything_is_filled(written):
    _, path = written(names=NAMES[:2])
    here, before = fresh()
    with pytest.raises(CheckpointError, match="its class_names: got 2, expected one for each of the model's 3"):
        start_from(here, path, class_names=NAMES)
    with pytest.raises(ValueError, match="class_names: got 2, expected 3"):
        start_from(here, path, class_names=NAMES[:2])
    with pytest.raises(CheckpointError, match="no such file"):
        start_from(here, path.with_name("none.pth"))
    assert all(torch.equal(tensor, before[key]) for key, tensor in here.state_dict().items())
