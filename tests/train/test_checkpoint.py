"""Checkpoint files of every published kind are read; anything else is refused on one line that says what is wrong."""

from __future__ import annotations

import json
import logging
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from golden import GOLDEN_NAMES, Golden, golden_config, rule_state_dicts
from var_deploy.config import VARConfig, VQVAEConfig
from var_deploy.errors import CheckpointError
from var_train import VAR, VQVAE, run_checkpoints
from var_train.checkpoint import (
    class_names_of,
    kind_of,
    load_pair,
    load_var,
    load_vqvae,
    patch_nums_of,
    read_state_dict,
)
from var_train.run_checkpoints import RunCheckpoints
from var_train.run_state import RunState

USAGE = "quantize.ema_vocab_hit_SV"
LEGACY = {"_use_new_zipfile_serialization": False}


def golden_states(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    var, vqvae = rule_state_dicts(Golden.load(name))
    return ({k: torch.from_numpy(v) for k, v in s.items()} for s in (var, vqvae))


@pytest.fixture(scope="module")
def tiny() -> tuple[VARConfig, VQVAEConfig, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return *golden_config(Golden.load("tiny")), *golden_states("tiny")


def training_checkpoint(var_state, vqvae_state):
    """The layout of ar-ckpt-last.pth."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    return {
        "epoch": 3,
        "iter": 41,
        "args": {"depth": 2, "patch_nums": (1, 2, 3, 4), "saln": False, "anorm": True, "exp_name": "text"},
        "trainer": {
            "config": {"patch_nums": (1, 2, 3, 4), "label_smooth": 0.0, "prog_it": 0, "last_prog_si": None},
            "var_wo_ddp": var_state,
            "vae_local": vqvae_state,
            "var_opt": {"scaler": None, "optimizer": optimizer.state_dict()},
        },
    }


# What is read ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_configuration_of_the_golden_models_is_inferred(name, golden_pair, tmp_path):
    golden = Golden.load(name)
    pair = load_pair(*golden_pair(tmp_path, name))
    assert (pair.var, pair.vqvae) == golden_config(golden)
    assert {k: list(v.shape) for k, v in pair.var_state.items()} == golden.keys["var"]


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_saved_state_dict_has_exactly_the_published_keys_shapes_and_types(name, write_pth):
    golden = Golden.load(name)
    for model, keys in zip((VAR, VQVAE), (golden.keys["var"], golden.keys["vae"]), strict=True):
        config = golden_config(golden)[model is VQVAE]
        saved = torch.load(write_pth(model(config).state_dict()), weights_only=True)
        assert {key: list(tensor.shape) for key, tensor in saved.items()} == keys
        types = {tensor.dtype for key, tensor in saved.items() if key != "lvl_1L"}
        assert types == {torch.float32}
        assert "lvl_1L" not in saved or saved["lvl_1L"].dtype == torch.int64


def test_every_odd_configuration_is_inferred_from_its_files(odd_names, odd_states, write_pth):
    for name in odd_names:
        var, vqvae, var_state, vqvae_state = odd_states(name)
        pair = load_pair(write_pth(var_state, "var.pth"), write_pth(vqvae_state, "vae.pth"))
        assert pair.var == var, name
        assert pair.vqvae == vqvae, name


def test_published_scales_and_1000_classes_are_inferred(write_pth):
    config = VARConfig(
        patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        vocab_size=4096,
        num_classes=1000,
        depth=5,
        embed_dim=64,
        ffn_dim=256,
    )
    model = VAR(config)
    model.init_weights()
    assert load_var(write_pth(model.state_dict()))[0] == config


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_training_checkpoint_gives_both_models(tiny, write_pth, options):
    var, vqvae, var_state, vqvae_state = tiny
    path = write_pth(training_checkpoint(var_state, vqvae_state), "ar-ckpt-last.pth", **options)
    pair = load_pair(path, path)
    assert (pair.var, pair.vqvae) == (var, vqvae)
    assert kind_of(path) == ["VAR", "VQVAE"]
    for got, expected in ((pair.var_state, var_state), (pair.vqvae_state, vqvae_state)):
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_plain_state_dict_of_every_file_form_holds_the_same_values(tiny, write_pth, tmp_path, form):
    _, _, state, _ = tiny
    if form == "safetensors":
        path = tmp_path / "var.safetensors"
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        path = write_pth(state, **({} if form == "zip" else LEGACY))
    got = read_state_dict(path, "VAR")
    assert got.keys() == state.keys()
    assert all(torch.equal(got[key], state[key]) for key in state)
    assert kind_of(path) == ["VAR"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_float_types_become_float32_models(tiny, write_pth, dtype):
    var, vqvae, *states = tiny
    cast = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()} for state in states]
    pair = load_pair(write_pth(cast[0], "var.pth"), write_pth(cast[1], "vae.pth"))
    assert (pair.var, pair.vqvae) == (var, vqvae)
    model, _ = pair.models()
    key = "blocks.1.ffn.fc2.weight"
    assert model.state_dict()[key].dtype == torch.float32
    assert torch.equal(model.state_dict()[key], states[0][key].to(dtype).float())


@pytest.mark.parametrize("usage_scales", [1, 10])
def test_usage_statistics_of_another_number_of_scales_are_ignored(tiny, write_pth, usage_scales):
    var, vqvae, var_state, vqvae_state = tiny
    vqvae_state = {**vqvae_state, USAGE: torch.rand(usage_scales, vqvae.vocab_size)}
    pair = load_pair(write_pth(var_state, "var.pth"), write_pth(vqvae_state, "vae.pth"))
    assert pair.vqvae == vqvae
    _, model = pair.models()
    assert torch.equal(model.quantize.ema_vocab_hit_SV, torch.zeros(var.num_scales, vqvae.vocab_size))


def test_vqvae_alone_takes_placeholder_scales_from_its_usage_statistics(tiny, write_pth):
    _, vqvae, _, state = tiny
    config, _ = load_vqvae(write_pth(state))
    assert config.patch_nums == tuple(range(1, vqvae.num_scales + 1))


def test_znorm_is_taken_from_the_caller_since_no_key_shows_it(tiny, write_pth):
    _, _, var_state, vqvae_state = tiny
    paths = write_pth(var_state, "var.pth"), write_pth(vqvae_state, "vae.pth")
    assert load_pair(*paths, using_znorm=True).vqvae.using_znorm
    assert not load_pair(*paths).vqvae.using_znorm


def test_weights_whose_sum_overflows_are_still_finite(tiny, write_pth):
    _, _, state, _ = tiny
    big = torch.full_like(state["head.weight"], 3e38)
    assert torch.isinf(big.sum())
    load_var(write_pth({**state, "head.weight": big}))


# Checkpoints of our own runs ------------------------------------------------------------------------------------------

NAMES = [f"Ziffer {i} – ä" for i in range(10)]


def saved(place: Path, models: dict[str, torch.nn.Module], step: int = 7, **state) -> Path:
    """A checkpoint of a run in `place`."""
    place.mkdir(exist_ok=True)
    (place / "run.json").write_text("{}")
    return RunCheckpoints(place / "checkpoints").save(step, RunState(models=models, **state))


def filled(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    model.load_state_dict(state)
    return model


@pytest.fixture
def var_run(tiny, tmp_path) -> Path:
    """Checkpoint of a VAR run without averaging."""
    return saved(tmp_path / "var_run", {"var": filled(VAR(tiny[0]), tiny[2])}, values={"class_names": NAMES})


@pytest.fixture
def vqvae_run(tiny, tmp_path) -> Path:
    """Checkpoint of a VQVAE run, with its discriminator."""
    models = {"vqvae": filled(VQVAE(tiny[1]), tiny[3]), "discriminator": torch.nn.Linear(2, 3)}
    values = {"class_names": NAMES[:3], "patch_nums": [1, 2, 3, 4], "step": 7}
    return saved(tmp_path / "vqvae_run", models, values=values)


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in expected)


def test_checkpoints_of_runs_are_read_like_files(tiny, var_run, vqvae_run, caplog):
    caplog.set_level(logging.INFO)
    var, vqvae, var_state, vqvae_state = tiny
    pair = load_pair(var_run, vqvae_run)
    assert (pair.var, pair.vqvae) == (var, vqvae)
    assert same(pair.var_state, var_state)
    assert same(pair.vqvae_state, vqvae_state)
    assert (kind_of(var_run), kind_of(vqvae_run)) == (["VAR"], ["VQVAE"])
    assert caplog.messages == []  # nothing was averaged


def test_averaged_weights_go_before_those_of_the_last_step(tiny, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    var, _, state, _ = tiny
    model = filled(VAR(var), state)
    ema = {name: weight.detach() * 0.5 for name, weight in model.named_parameters() if name != "head.bias"}
    path = saved(tmp_path / "run", {"var": model}, ema=ema)
    verified, plain = [], run_checkpoints.damages
    monkeypatch.setattr(run_checkpoints, "damages", lambda *a: (verified.append(a[0]), plain(*a))[1])
    config, got = load_var(path)
    assert verified == [path]  # once
    assert config == var
    assert same(got, {key: ema.get(key, tensor) for key, tensor in state.items()})
    assert not torch.equal(got["head.weight"], state["head.weight"])
    assert torch.equal(got["head.bias"], state["head.bias"])
    assert caplog.messages == [f"{path}: of {len(state)} tensors, the averaged weights of {len(ema)} are taken"]


def flip_last_byte(checkpoint: Path) -> None:
    shard = next(checkpoint.glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def cut(checkpoint: Path) -> None:
    shard = next(checkpoint.glob("shard-*"))
    os.truncate(shard, 1000)


def empty_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text("")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            flip_last_byte,
            r"damaged \(shard-\S+ is altered: its sha256 is not the sealed one\); take another checkpoint",
        ),
        (cut, r"damaged \(.+\); take another checkpoint of the run"),
        (lambda path: next(path.glob("shard-*")).unlink(), r"damaged \(shard-\S+ is missing\)"),
        (empty_manifest, r"damaged \(manifest.json is altered or truncated\)"),
        (
            lambda path: (path / "manifest.json").unlink(),
            r"a directory, expected a file, or a checkpoint of a training",
        ),
    ],
    ids=["flipped", "cut", "missing", "manifest", "no_manifest"],
)
def test_damaged_checkpoint_of_a_run_is_refused_on_one_line(var_run, damage, expected):
    damage(var_run)
    with pytest.raises(CheckpointError, match=expected) as refusal:
        load_var(var_run)
    assert str(refusal.value).startswith(f"{var_run}: ")
    assert "\n" not in str(refusal.value)


def test_bad_weights_in_a_checkpoint_of_a_run_are_named(tiny, tmp_path):
    model = filled(VAR(tiny[0]), tiny[2])
    model.head.bias.data[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"step_00000007: .* 1 problem\(s\): head\.bias holds NaN or infinite"):
        load_var(saved(tmp_path / "run", {"var": model}))


def test_swapped_checkpoints_of_runs_are_recognised(var_run, vqvae_run):
    with pytest.raises(CheckpointError, match="this is a VQVAE checkpoint, expected a VAR; are the two checkpoints sw"):
        load_pair(vqvae_run, var_run)
    with pytest.raises(CheckpointError, match="this is a VAR checkpoint, expected a VQVAE; are the two checkpoints sw"):
        load_vqvae(var_run)


def test_checkpoint_of_another_run_says_what_it_holds(tmp_path):
    path = saved(tmp_path / "run", {"net": torch.nn.Linear(2, 3)}, ema={"weight": torch.zeros(3, 2)})
    assert kind_of(path) == []
    with pytest.raises(CheckpointError, match=r"holds nothing under 'models\.var\.'; known: ema\., models\.net\."):
        load_var(path)


READERS = {
    "load_var": load_var,
    "load_vqvae": load_vqvae,
    "kind_of": kind_of,
    "class_names_of": class_names_of,
    "patch_nums_of": patch_nums_of,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_directory_of_a_run_says_which_checkpoint_to_give(var_run, read):
    run = var_run.parents[1]

    def refusal() -> str:
        with pytest.raises(CheckpointError) as caught:
            read(run)
        return str(caught.value).removeprefix(f"{run}: the directory of a training run, expected a checkpoint; ")

    var_run.rename(var_run.with_name("step_00000900"))
    (var_run.with_name("step_00001200")).mkdir()
    assert refusal() == f"give {run / 'checkpoints' / 'step_00001200'}"
    for name in ("vqvae.safetensors", "var.safetensors"):
        (run / name).touch()
        assert refusal() == f"give {run / name}"


def test_directory_of_a_run_without_a_checkpoint_says_so(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"expected a checkpoint; it has none yet, wait for its first$"):
        load_var(tmp_path)


# What travels with the weights ----------------------------------------------------------------------------------------


def with_header(path: Path, state: dict[str, torch.Tensor], **notes: object) -> Path:
    """A safetensors file; notes that are no text become JSON."""
    texts = {key: note if isinstance(note, str) else json.dumps(note) for key, note in notes.items()}
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, metadata=texts)
    return path


def test_class_names_of_files_and_runs(tiny, var_run, vqvae_run, tmp_path):
    file = with_header(tmp_path / "var.safetensors", tiny[2], class_names=NAMES, format="pt")
    for path in (file, var_run, str(file)):
        assert class_names_of(path) == tuple(NAMES)
    assert class_names_of(vqvae_run) == tuple(NAMES[:3])  # of the images; a VQVAE has no classes
    assert load_var(file)[0] == tiny[0]


def test_published_files_carry_no_class_names(tiny, tiny_pair, write_pth, tmp_path):
    for path in (*tiny_pair[1:], write_pth(tiny[2]), with_header(tmp_path / "a.safetensors", tiny[2], format="pt")):
        assert class_names_of(path) is None
        assert patch_nums_of(path) is None
    with pytest.raises(CheckpointError, match="no such file"):
        class_names_of(tmp_path / "none.safetensors")


BAD_NAMES = {
    "no_json": ("cat, dog", r"got 'cat, dog', expected a list of texts; give the names in a file, or save"),
    "deep_json": ("[" * 10**5, r"got '\[+\.\.\., expected a list of texts"),
    "dict": ({"cat": 0}, r"got \{'cat': 0\}, expected a list of texts"),
    "numbers": (list(range(10)), r"got \[0, 1, 2, 3, 4, 5, 6, 7, 8, 9\], expected a list of texts"),
    "nine": (NAMES[1:], r"got 9, expected one for each of the model's 10 classes; give the names in a file, or save"),
    "eleven": ([*NAMES, "null"], r"got 11, expected one for each of the model's 10 classes"),
    "none": ([], r"got 0, expected one for each"),
}


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("form", ["file", "run"])
def test_bad_class_names_are_refused(tiny, tmp_path, form, name):
    names, expected = BAD_NAMES[name]
    if form == "file":
        path = with_header(tmp_path / "var.safetensors", tiny[2], class_names=names)
    else:
        path = saved(tmp_path / "run", {"var": VAR(tiny[0])}, values={"class_names": names})
    with pytest.raises(CheckpointError, match=f"^{path}: its class_names: {expected}") as refusal:
        class_names_of(path)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300 + len(str(path))


@pytest.mark.parametrize("values", [{}, {"class_names": None}, "text", [1]], ids=repr)
def test_runs_without_class_names(tiny, tmp_path, values):
    path = saved(tmp_path / "run", {"var": VAR(tiny[0])}, values=values)
    assert class_names_of(path) is None


def test_vqvae_alone_takes_the_scales_that_it_carries_and_those_of_a_var_win(tiny, vqvae_run, tmp_path):
    _, vqvae, _, state = tiny
    file = with_header(tmp_path / "vqvae.safetensors", state, patch_nums=[1, 3, 4])
    assert load_vqvae(file)[0].patch_nums == (1, 3, 4)
    assert load_vqvae(vqvae_run)[0] == vqvae
    assert load_vqvae(file, (1, 2, 6))[0].patch_nums == (1, 2, 6)


BAD_SCALES = {
    "no_json": ("1_2_3", r"got '1_2_3', expected a tuple of at least two positive integers"),
    "one": ([4], r"got \(4,\), expected a tuple of at least two positive integers"),
    "texts": (["1", "2"], r"got \('1', '2'\), expected a tuple of at least two"),
    "fractions": ([1.0, 2.0], r"got \(1\.0, 2\.0\), expected a tuple of at least two"),
    "shrinking": ([1, 3, 2], r"got \(1, 3, 2\), expected strictly growing sides"),
    "number": (4, r"got 4, expected a tuple"),
}


@pytest.mark.parametrize("name", BAD_SCALES)
def test_bad_scales_that_a_vqvae_carries_are_refused(tiny, tmp_path, name):
    scales, expected = BAD_SCALES[name]
    path = with_header(tmp_path / "vqvae.safetensors", tiny[3], patch_nums=scales)
    with pytest.raises(CheckpointError, match=f"^{path}: its patch_nums: {expected}.*; save the checkpoint again with"):
        patch_nums_of(path)


def test_bad_scales_matter_only_where_they_are_needed(tiny, tmp_path):
    path = with_header(tmp_path / "vqvae.safetensors", tiny[3], patch_nums="all")
    assert load_vqvae(path, (1, 2, 3, 4))[0] == tiny[1]
    with pytest.raises(CheckpointError, match="its patch_nums: got 'all'"):
        load_vqvae(path)


# What is refused: the file as such ------------------------------------------------------------------------------------


def text_file(path: Path) -> None:
    path.write_text("epoch,loss\n1,7.2\n")


def png_file(path: Path) -> None:
    Image.new("RGB", (5, 3)).save(path, format="PNG")


def zip_of_something_else(path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")


def pickled_list(path: Path) -> None:
    torch.save([torch.zeros(2)], path)


def truncated(keep: float, **options) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        torch.save({f"key.{i}": torch.rand(50, 7) for i in range(20)}, path, **options)
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])

    return write


def truncated_safetensors(keep: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        save_file({f"key.{i}": torch.rand(50, 7) for i in range(20)}, path)
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])

    return write


def safetensors_with_header_past_the_end(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 40) + b'{"a":{"dtype":"F32"')


def optimizer_only(path: Path) -> None:
    torch.save({"trainer": {"var_opt": {}, "config": {}}, "epoch": 1}, path)


BAD_FILES = {
    "missing": (lambda path: None, "no such file"),
    "directory": (Path.mkdir, "a directory, expected a file"),
    "empty": (Path.touch, "empty file"),
    "text": (text_file, r"not a checkpoint: starts with b'epoc', expected a PyTorch .pth or a .safetensors file"),
    "png": (png_file, r"not a checkpoint: starts with b'\\x89PNG'"),
    "other_zip": (zip_of_something_else, "damaged or truncated .*; copy the file again"),
    "list": (pickled_list, "holds a list, expected a dict"),
    "half_a_pth": (truncated(0.5), "truncated: the archive's end is missing; copy the file again"),
    "pth_without_its_last_bytes": (truncated(0.999), "truncated"),
    "ten_bytes_of_pth": (truncated(0.001), "truncated"),
    "half_a_legacy_pth": (truncated(0.5, **LEGACY), "damaged or truncated .*copy the file again"),
    "start_of_a_legacy_pth": (truncated(0.01, **LEGACY), "damaged or truncated|refused"),
    "half_a_safetensors": (truncated_safetensors(0.6), "damaged or truncated safetensors file .*copy it again"),
    "header_of_a_safetensors": (truncated_safetensors(0.02), "damaged or truncated safetensors file"),
    "safetensors_header_length": (safetensors_with_header_past_the_end, "damaged or truncated safetensors file"),
    "neither_model": (
        optimizer_only,
        r"a training checkpoint without trainer\.var_wo_ddp; trainer holds \['config', 'v",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_on_one_line(tmp_path, name):
    make, expected = BAD_FILES[name]
    path = tmp_path / "var.pth"
    make(path)
    with pytest.raises(CheckpointError, match=expected) as refusal:
        load_var(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)


def test_file_that_may_not_be_read_is_refused_on_one_line(tiny_pair, monkeypatch):
    def denied(*_):  # permission bits do not stop a superuser, under whom tests may run
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(CheckpointError, match=r"cannot read it \(Permission denied\)$"):
        load_var(tiny_pair[1])


def test_impossible_file_name_is_refused_on_one_line():
    with pytest.raises(CheckpointError, match=r"cannot read it \(File name too long\)$"):
        load_var(Path("x" * 5000))


class RunsACommand:
    """Unpickles by running a command that leaves a marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare_pickle", "inside_trainer"])
def test_pickle_with_code_is_refused_and_never_run(tmp_path, write_pth, form):
    marker, state = tmp_path / "marker", {"word_embed.weight": torch.zeros(4, 4)}
    bad = {**state, "extra": RunsACommand(marker)}
    if form == "bare_pickle":
        path = tmp_path / "file.pth"
        path.write_bytes(pickle.dumps(bad, protocol=2))
    elif form == "inside_trainer":
        path = write_pth({"trainer": {"var_wo_ddp": state, "vae_local": state}, "args": RunsACommand(marker)})
    else:
        path = write_pth(bad, **(LEGACY if form == "legacy" else {}))
    for read in (load_var, load_vqvae, kind_of):
        with pytest.raises(CheckpointError) as refusal:
            read(path)
        assert "\n" not in str(refusal.value)
        assert not marker.exists()
    if form != "bare_pickle":  # that one has no PyTorch header, so it ends before its objects are reached
        assert "refused: PyTorch's safe reader finds objects other than tensors" in str(refusal.value)
        assert "save a plain state dict with torch.save(model.state_dict(), path)" in str(refusal.value)


def test_marker_pickle_really_runs_where_it_is_allowed_to(tmp_path):
    """The refusals above prove something only if this file is dangerous."""
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(RunsACommand(marker)))
    assert marker.exists()


# What is refused: the content -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["var_wo_ddp", "vae_local"])
def test_training_checkpoint_without_the_needed_part_names_it(tiny, write_pth, part):
    content = training_checkpoint(tiny[2], tiny[3])
    del content["trainer"][part]
    path = write_pth(content)
    with pytest.raises(CheckpointError, match=f"a training checkpoint without trainer.{part}; trainer holds"):
        load_pair(path, path)


@pytest.mark.parametrize("trainer", [None, [1, 2], torch.zeros(2)], ids=["none", "list", "tensor"])
def test_trainer_that_is_no_dict_is_refused(write_pth, trainer):
    with pytest.raises(CheckpointError, match=r"a training checkpoint without trainer\.var_wo_ddp"):
        load_var(write_pth({"trainer": trainer}))


def test_keys_that_are_no_text_are_refused(write_pth):
    with pytest.raises(CheckpointError, match="no state dict found"):
        load_var(write_pth({1: torch.zeros(2), "word_embed.weight": torch.zeros(2, 2)}))


def test_well_formed_pickle_with_wrong_arguments_is_refused(tmp_path):
    path = tmp_path / "ordered.pth"
    # collections.OrderedDict(5): a global that the safe reader allows, called in a way that fails.
    path.write_bytes(b"\x80\x02ccollections\nOrderedDict\nK\x05\x85R.")
    with pytest.raises(CheckpointError, match=r"ordered\.pth: damaged or truncated"):
        load_var(path)


def test_usage_statistics_without_axes_are_a_problem_of_the_file(tiny, write_pth):
    _, _, _, vqvae_state = tiny
    vqvae_state = {**vqvae_state, "quantize.ema_vocab_hit_SV": torch.tensor(1.0)}
    with pytest.raises(CheckpointError, match=r"ema_vocab_hit_SV has shape \(\)"):
        load_vqvae(write_pth(vqvae_state))


def test_dict_without_tensors_says_what_it_holds(write_pth):
    with pytest.raises(
        CheckpointError, match=r"no state dict found; got \['lr', 'steps'\], expected a dict of tensors"
    ):
        load_var(write_pth({"steps": 3, "lr": 0.1}))


def test_swapped_files_are_recognised(tiny_pair):
    _, var, vqvae = tiny_pair
    with pytest.raises(CheckpointError, match=r"a VQVAE checkpoint, expected a VAR; are the two files swapped\?"):
        load_pair(vqvae, var)
    with pytest.raises(CheckpointError, match=r"a VAR checkpoint, expected a VQVAE; are the two files swapped\?"):
        load_vqvae(var)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("vocab_size", 100, "the VAR expects 256 codebook entries, the VQVAE has 100"),
        ("z_channels", 24, "the VAR expects 32 code width, the VQVAE has 24"),
    ],
)
def test_models_that_do_not_fit_each_other_are_refused(tiny, write_pth, field, value, expected):
    _, vqvae, var_state, _ = tiny
    fields = {name: getattr(vqvae, name) for name in vqvae.__dataclass_fields__}
    other = VQVAE(VQVAEConfig(**{**fields, field: value}))
    paths = write_pth(var_state, "var.pth"), write_pth(other.state_dict(), "vae.pth")
    with pytest.raises(CheckpointError, match=expected) as refusal:
        load_pair(*paths)
    assert all(str(path) in str(refusal.value) for path in paths)
    assert "give the VQVAE that this VAR was trained on" in str(refusal.value)


def test_missing_unexpected_misshaped_and_mistyped_keys_are_listed_together(tiny, write_pth):
    state = dict(tiny[2])
    del state["blocks.1.ffn.fc2.bias"], state["head.bias"]
    state |= {
        "blocks.0.attn.extra": torch.zeros(3),
        "pos_start": torch.zeros(1, 1, 64),
        "blocks.0.attn.q_bias": torch.zeros(128, dtype=torch.int64),
    }
    with pytest.raises(CheckpointError) as refusal:
        load_var(write_pth(state))
    for problem in (
        "5 problem(s)",
        "missing blocks.1.ffn.fc2.bias (128,)",
        "missing head.bias (256,)",
        "unexpected blocks.0.attn.extra (3,)",
        "pos_start has shape (1, 1, 64), expected (1, 1, 128)",
        "blocks.0.attn.q_bias is torch.int64, expected torch.float32",
    ):
        assert problem in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_vqvae_problems_are_listed_together(tiny, write_pth):
    state = dict(tiny[3])
    del state["decoder.conv_out.weight"]
    state |= {"quant_conv.bias": torch.zeros(5), "loss.discriminator.weight": torch.zeros(2)}
    with pytest.raises(CheckpointError) as refusal:
        load_vqvae(write_pth(state), (1, 2, 3, 4))
    for problem in (
        "3 problem(s)",
        "missing decoder.conv_out.weight (3, 32, 3, 3)",
        "unexpected loss.discriminator.weight (2,)",
        "quant_conv.bias has shape (5,), expected (32,)",
    ):
        assert problem in str(refusal.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_that_are_not_finite_are_named(tiny, write_pth, value, dtype):
    var_state, vqvae_state = dict(tiny[2]), dict(tiny[3])
    for state, key in ((var_state, "blocks.1.attn.mat_qkv.weight"), (vqvae_state, "encoder.mid.block_2.conv1.weight")):
        state[key] = state[key].to(dtype, copy=True)
        state[key].view(-1)[17] = value
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.mat_qkv\.weight holds NaN or infinite values"):
        load_var(write_pth(var_state))
    with pytest.raises(CheckpointError, match=r"encoder\.mid\.block_2\.conv1\.weight holds NaN or infinite values"):
        load_vqvae(write_pth(vqvae_state))


def level(change: Callable[[torch.Tensor], None]) -> Callable[[dict], None]:
    def apply(state: dict) -> None:
        state["lvl_1L"] = state["lvl_1L"].clone()
        change(state["lvl_1L"])

    return apply


def swap_two_positions(lvl_1L: torch.Tensor) -> None:
    lvl_1L[0, [0, 1]] = lvl_1L[0, [1, 0]]


def one_more_of_scale_two(lvl_1L: torch.Tensor) -> None:
    lvl_1L[0, -1] = 2


def absurdly_large(lvl_1L: torch.Tensor) -> None:
    lvl_1L[0, -1] = 1 << 45


def all_negative(lvl_1L: torch.Tensor) -> None:
    lvl_1L.fill_(-3)


def open_mask(state: dict) -> None:
    state["attn_bias_for_masking"] = torch.zeros_like(state["attn_bias_for_masking"])


def flat_level(state: dict) -> None:
    state["lvl_1L"] = state["lvl_1L"][0]


def no_level(state: dict) -> None:
    del state["lvl_1L"]


def no_rows_of_level(state: dict) -> None:
    state["lvl_1L"] = state["lvl_1L"][:0]


def three_heads(state: dict) -> None:
    state["blocks.0.attn.scale_mul_1H11"] = torch.zeros(1, 4, 1, 1)


def width_of_100(state: dict) -> None:
    state["word_embed.weight"] = torch.zeros(100, 32)


def plain_width_of_100(state: dict) -> None:
    width_of_100(state)
    for block in range(2):
        del state[f"blocks.{block}.attn.scale_mul_1H11"]


def no_blocks(state: dict) -> None:
    for key in [key for key in state if key.startswith("blocks.")]:
        del state[key]


def only_the_null_class(state: dict) -> None:
    state["class_emb.weight"] = state["class_emb.weight"][:1]


def flat_head(state: dict) -> None:
    state["head.weight"] = state["head.weight"].reshape(-1)


def block_of_a_million(state: dict) -> None:
    state["blocks.999999.ffn.fc1.weight"] = torch.zeros(1)


BAD_VAR_STATES = {
    "absurd_block": (block_of_a_million, "a key numbers part 999999 of a state dict with"),
    "positions_swapped": (level(swap_two_positions), "lvl_1L does not hold the block-causal layout of scales"),
    "not_square": (level(one_more_of_scale_two), r"lvl_1L counts \[1, 4, 10, 15\] tokens per scale, expected square"),
    "absurd_level": (level(absurdly_large), "lvl_1L does not hold the scale index of each token"),
    "negative_level": (level(all_negative), "lvl_1L does not hold the scale index of each token"),
    "level_of_one_axis": (flat_level, r"lvl_1L has shape \(30,\), expected 2 axes"),
    "level_without_rows": (no_rows_of_level, "lvl_1L does not hold the scale index of each token"),
    "no_level": (no_level, "missing key 'lvl_1L', needed to infer the configuration of a VAR"),
    "mask_all_open": (open_mask, "attn_bias_for_masking does not hold the block-causal layout of scales"),
    "head_width_32": (three_heads, r"4 heads at width 128, expected head width 64 \(2 heads\)"),
    "width_100": (width_of_100, r"2 heads at width 100, expected head width 64"),
    "plain_width_100": (plain_width_of_100, "embed_dim: got 100, expected a multiple of the head width 64"),
    "no_blocks": (no_blocks, "missing key 'blocks.0.ffn.fc1.weight'"),
    "null_class_only": (only_the_null_class, "num_classes: got 0, expected a positive integer"),
    "head_of_one_axis": (flat_head, r"head.weight has shape \(32768,\), expected 2 axes"),
}


@pytest.mark.parametrize("name", BAD_VAR_STATES)
def test_bad_var_state_is_refused_with_its_reason(tiny, write_pth, name):
    change, expected = BAD_VAR_STATES[name]
    state = dict(tiny[2])
    change(state)
    with pytest.raises(CheckpointError, match=expected) as refusal:
        load_var(write_pth(state))
    assert "\n" not in str(refusal.value)


def drop(prefix: str) -> Callable[[dict], None]:
    def apply(state: dict) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            del state[key]

    return apply


def narrow_base(state: dict) -> None:
    state["encoder.conv_in.weight"] = state["encoder.conv_in.weight"][:20]


BAD_VQVAE_STATES = {
    "no_encoder": (drop("encoder.conv_in"), "missing key 'encoder.conv_in.weight'"),
    "no_levels": (drop("encoder.down"), "ch_mult|num_res_blocks"),
    "no_phi": (drop("quantize.quant_resi"), r"missing quantize.quant_resi.qresi.weight \(32, 32, 3, 3\)"),
    "no_codebook": (drop("quantize.embedding"), "missing key 'quantize.embedding.weight'"),
    "a_gap_in_the_levels": (drop("encoder.down.1"), "missing key 'encoder.down.1.block.0.conv1.weight'"),
    "width_20": (narrow_base, "ch: got 20, expected a multiple of 32"),
}


@pytest.mark.parametrize("name", BAD_VQVAE_STATES)
def test_bad_vqvae_state_is_refused_with_its_reason(tiny, write_pth, name):
    change, expected = BAD_VQVAE_STATES[name]
    state = dict(tiny[3])
    change(state)
    with pytest.raises(CheckpointError, match=expected) as refusal:
        load_vqvae(write_pth(state), (1, 2, 3, 4))
    assert "\n" not in str(refusal.value)
