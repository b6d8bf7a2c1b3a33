"""Stored tokens are those that the encoder gives in training; a store is whole after any kill, and checked when opened.

Run as a script, this file is the other processes: one that forks runs and kills them, and one that forks two processes
of one run.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

from var_deploy.config import ConfigError, VQVAEConfig
from var_deploy.errors import DataError
from var_train import VQVAE, token_files, token_manifest
from var_train.image_data import Crop, GlobalBatches, training_batches
from var_train.image_files import ImageFiles, open_images
from var_train.pictures import normalised
from var_train.token_files import TokenFiles, is_token_folder, open_tokens, token_batches
from var_train.token_manifest import MANIFEST, TokenManifest, read_manifest, shard_name
from var_train.token_writer import TokenSummary, store_tokens

ROOT = Path(__file__).parents[2]

CONFIG = VQVAEConfig(
    patch_nums=(1, 2, 4), vocab_size=61, z_channels=4, ch=32, ch_mult=(1, 1), num_res_blocks=1, num_phi=2
)
CROP = Crop(side=8, random=True, flip=True, enlarge=1.5)
SEED, SHA = 11, "0123456789abcdef" * 4
COUNT, CORRUPT = 11, (4, 10)  # the last one too, whose stand-in is the first
PASSES, SHARD = 2, 4


def tiny_vqvae(config: VQVAEConfig = CONFIG) -> VQVAE:
    """Random weights, with codes as small as the features, so that all are near some."""
    torch.manual_seed(3)
    vqvae = VQVAE(config)
    torch.nn.init.normal_(vqvae.quantize.embedding.weight, std=0.3)
    return vqvae


def write_images(root: Path, count: int = COUNT, corrupt: tuple[int, ...] = CORRUPT) -> ImageFiles:
    """Images of three classes and of all shapes."""
    random = np.random.default_rng(0)
    for number in range(count):
        path = root / f"class{number * 3 // count}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (40 - number, 20 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels // 4 * (number % 4 + 1)).save(path)
        if number in corrupt:
            path.write_bytes(b"no image")
    return open_images(root)


def store(images: ImageFiles, out: Path, **options: Any) -> TokenSummary:
    asked = {"crop": CROP, "passes": PASSES, "batch": 3, "seed": SEED, "vqvae_sha256": SHA, "shard_images": SHARD}
    fixed = {"device": torch.device("cpu"), "workers": 0}
    return store_tokens(images, options.pop("vqvae", None) or tiny_vqvae(), out, **asked | fixed | options)


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- the other processes -------------------------------------------------------------------------------------------


def forked(action: Callable[[], object]) -> int:
    """Process id of a fork that does the action."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def status_of(pid: int) -> int:
    """Exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after_events(directory: Path, count: int) -> Callable[[int], None]:
    """SIGKILL at the count-th time that this process opens, renames, makes or removes something in there, or is in the
    middle of a file, or says how far it is by calling what is returned.
    """
    seen, fsync = 0, os.fsync

    def tick(_: int = 0, cut: int | None = None) -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            if cut is not None:
                os.ftruncate(cut, os.fstat(cut).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def fsync_or_half(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            tick(cut=descriptor)
        fsync(descriptor)

    os.fsync = fsync_or_half

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.remove") and str(directory) in str(arguments[0]):
            tick()

    sys.addaudithook(hook)
    return tick


def killed_at_every_event(directory: Path) -> None:
    """A store of four shards killed at every event; each time it is started again and comes out the same."""
    images = write_images(directory / "images", count=5, corrupt=(3,))
    stores, out = directory / "stores", directory / "stores" / "out"

    def run(**options: Any) -> None:
        store(images, out, shard_images=3, batch=2, **options)

    def run_killed(count: int) -> None:
        run(on_progress=kill_after_events(stores, count))

    run()
    expected = content_of(out)
    shutil.rmtree(stores)
    kept_numbers = []
    for count in range(1, 200):
        status = status_of(forked(lambda count=count: run_killed(count)))  # type: ignore[misc]
        assert status in (0, -signal.SIGKILL), status
        if not out.exists():
            kept = {path: path.stat().st_ino for path in stores.glob(".partial-out/shard*")}
            kept_numbers.append(len(kept))
            assert all(path.read_bytes() == expected[path.name] for path in kept)
            counted: list[int] = []
            run(on_progress=counted.append)
            assert sum(counted) == 10
            assert all((out / path.name).stat().st_ino == inode for path, inode in kept.items()), kept
        assert content_of(out) == expected
        assert [path.name for path in stores.iterdir()] == ["out"]
        shutil.rmtree(stores)
        if status == 0:
            break
    print(json.dumps({"kept": kept_numbers}))


def two_processes(directory: Path) -> None:
    """Both store together; then one meets only corrupt images, which both hear of; then both finish what is left."""
    images = open_images(directory / "images")

    def run(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
        counted: list[int] = []
        summary = store(images, directory / "out", on_progress=counted.append)
        with pytest.raises(DataError, match=r"out: exists"):
            store(images, directory / "out")
        broken = open_images(directory / "images")
        if rank == 1:
            broken.read = lambda index: b""  # type: ignore[method-assign]
        with pytest.raises(DataError, match="the first of 11 in a row"):
            store(broken, directory / "second", seed=5)
        first_shard = directory / ".partial-second" / shard_name(0)
        kept = first_shard.stat().st_ino
        dist.barrier()
        store(images, directory / "second", seed=5)
        assert (directory / "second" / shard_name(0)).stat().st_ino == kept
        report = {"done": sum(counted), "shards": summary.shards, "corrupt": len(summary.corrupt)}
        (directory / f"report_{rank}.json").write_text(json.dumps(report))
        dist.destroy_process_group()

    pids = [forked(lambda rank=rank: run(rank)) for rank in range(2)]  # type: ignore[misc]
    assert [status_of(pid) for pid in pids] == [0, 0]


def start(action: Callable[[Path], None], directory: Path) -> subprocess.CompletedProcess[str]:
    """Runs an action of this file in a process that has no threads, which forks would lack."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "train")])
    return subprocess.run(
        [sys.executable, __file__, action.__name__, str(directory)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


# ---- what is stored ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageFiles:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def stored(images, tmp_path_factory) -> tuple[Path, TokenSummary]:
    """Read only; copy it to alter it."""
    out = tmp_path_factory.mktemp("stores") / "digits"
    return out, store(images, out)


@pytest.fixture
def copy(stored, tmp_path) -> Path:
    return Path(shutil.copytree(stored[0], tmp_path / "copy"))


def all_tokens(tokens: TokenFiles, epoch: int) -> torch.Tensor:
    return tokens.read(epoch, np.arange(len(tokens)))[0]


@pytest.mark.parametrize(("rows", "start"), [(slice(None), 0), (slice(3, 5), 1)])
def test_training_takes_the_tokens_that_the_encoder_would_give(images, stored, rows, start):
    """Two whole epochs of random crops and flips, of corrupt images too."""
    batches = GlobalBatches(count=COUNT, size=5, seed=7)
    vqvae = tiny_vqvae()
    from_images = training_batches(images, CROP, batches, rows=rows, start=start, workers=0, seed=SEED)
    from_tokens = token_batches(open_tokens(stored[0]), batches, rows=rows, start=start)
    seen = []
    for ours, theirs in itertools.islice(zip(from_tokens, from_images, strict=True), 4 - start):
        with torch.no_grad():
            expected_BL = torch.cat(vqvae.tokens(normalised(theirs.images_BCRR, torch.device("cpu"))), dim=1)
        assert torch.equal(ours.tokens_BL, expected_BL)
        assert torch.equal(ours.labels_B, theirs.labels_B)
        assert (ours.iteration, ours.epoch) == (theirs.iteration, theirs.epoch)
        assert ours.tokens_BL.dtype == ours.labels_B.dtype == torch.int64
        seen.append(ours.tokens_BL)
    assert len(torch.cat(seen).unique()) > 15  # else equality would say little


def test_passes_come_round_again_and_differ(stored):
    tokens = open_tokens(stored[0])
    first, second, third = (all_tokens(tokens, epoch) for epoch in (0, 1, 2))
    assert (first != second).any(dim=1).sum() > COUNT // 2
    assert torch.equal(first, third)


def test_a_corrupt_image_is_named_and_the_next_one_stands_for_it(images, stored):
    tokens = open_tokens(stored[0])
    expected_N = images.labels_N.copy()
    expected_N[[4, 10]] = images.labels_N[[5, 0]]
    assert tokens.labels_N.tolist() == expected_N.tolist() != images.labels_N.tolist()
    assert stored[1].corrupt == tokens.corrupt == (images.name(4), images.name(10))


def test_what_a_store_says_of_itself(images, stored):
    out, summary = stored
    tokens = open_tokens(out)
    assert (tokens.config, tokens.crop, tokens.seed, tokens.vqvae_sha256) == (CONFIG, CROP, SEED, SHA)
    assert (tokens.passes, len(tokens), tokens.class_names) == (PASSES, COUNT, images.class_names)
    assert tokens.labels_N.dtype == np.int64
    assert tokens.name(7) == f"tokens {out}: image 7"
    assert is_token_folder(out)
    assert not is_token_folder(out.parent)
    assert not is_token_folder(out / MANIFEST)
    files = content_of(out)
    assert list(files) == [*(shard_name(number) for number in range(6)), MANIFEST]
    size = sum(len(content) for name, content in files.items() if name != MANIFEST)
    assert summary == TokenSummary(images=COUNT, passes=PASSES, shards=6, bytes=size, corrupt=summary.corrupt)
    shards = [load_file(out / shard_name(number)) for number in range(6)]  # by safetensors' own reader
    assert [len(shard["labels"]) for shard in shards] == [4, 4, 3, 4, 4, 3]  # none crosses a pass
    assert {shard["tokens"].dtype for shard in shards} == {np.dtype(np.uint16)}
    assert {shard["labels"].dtype for shard in shards} == {np.dtype(np.int32)}
    for place in range(2):
        whole = np.concatenate([shard["tokens"] for shard in shards[3 * place : 3 * place + 3]])
        assert np.array_equal(whole, all_tokens(tokens, place).numpy())


@pytest.mark.parametrize(("shard_images", "workers"), [(1, 0), (11, 0), (100, 2)])
def test_neither_shards_nor_workers_change_the_tokens(images, stored, tmp_path, monkeypatch, shard_images, workers):
    monkeypatch.setattr(token_files, "MAPPED", 2)
    store(images, tmp_path / "out", shard_images=shard_images, workers=workers)
    tokens, others = open_tokens(tmp_path / "out"), open_tokens(stored[0])
    for epoch in range(PASSES):
        assert torch.equal(all_tokens(tokens, epoch), all_tokens(others, epoch))


def test_any_images_are_read_in_the_order_asked_for(stored):
    tokens = open_tokens(stored[0])
    every_NL, indices_B = all_tokens(tokens, 1), np.array([10, 0, 3, 3, 4, 10])
    tokens_BL, labels_B = tokens.read(1, indices_B)
    assert torch.equal(tokens_BL, every_NL[indices_B])
    assert labels_B.tolist() == tokens.labels_N[indices_B].tolist()
    assert tokens.read(0, indices_B[:0])[0].shape == (0, CONFIG.num_tokens)
    for outside in (-1, COUNT):
        with pytest.raises(IndexError, match=rf"^got images {min(0, outside)} to {max(0, outside)}, expected 0 to 10$"):
            tokens.read(0, np.array([0, outside]))


def test_a_large_vocabulary_takes_four_bytes(images, tmp_path):
    config = replace(CONFIG, vocab_size=70_000)
    summary = store(images, tmp_path / "out", vqvae=tiny_vqvae(config), passes=1)
    tokens_nL = load_file(tmp_path / "out" / shard_name(0))["tokens"]
    assert tokens_nL.dtype == np.int32
    assert all_tokens(open_tokens(tmp_path / "out"), 0).max() > 65_535
    assert summary.bytes > COUNT * (4 * CONFIG.num_tokens + 4)


def test_the_encoder_runs_in_float32_whatever_is_around_it(images, stored, tmp_path):
    vqvae = tiny_vqvae().train()
    with torch.autocast("cpu", torch.bfloat16):
        store(images, tmp_path / "out", vqvae=vqvae)
    assert content_of(tmp_path / "out") == content_of(stored[0])
    assert not vqvae.training
    assert all(parameter.grad is None for parameter in vqvae.parameters())


def test_batches_of_another_data_set(stored):
    with pytest.raises(ValueError, match=r"^batches: got 10 images, expected 11$"):
        token_batches(open_tokens(stored[0]), GlobalBatches(count=10, size=5, seed=0), rows=slice(None), start=0)


# ---- interrupted, shared out, refused ------------------------------------------------------------------------------


def test_a_store_killed_at_any_moment_goes_on_with_the_shards_that_are_whole(tmp_path):
    ran = start(killed_at_every_event, tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    report = json.loads(ran.stdout)
    assert set(report["kept"]) == {0, 1, 2, 3, 4}
    assert len(report["kept"]) > 20


@pytest.mark.slow
def test_two_processes_share_the_shards(images, stored, tmp_path):
    write_images(tmp_path / "images")
    store(open_images(tmp_path / "images"), tmp_path / "alone")
    ran = start(two_processes, tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert content_of(tmp_path / "out") == content_of(tmp_path / "alone")
    reports = [json.loads((tmp_path / f"report_{rank}.json").read_text()) for rank in range(2)]
    assert [report["done"] for report in reports] == [4 + 3 + 4, 4 + 4 + 3]
    assert {(report["shards"], report["corrupt"]) for report in reports} == {(6, 2)}


def interrupt(images: ImageFiles, out: Path, after: int = 9, **options: Any) -> None:
    """A run that ends in the middle of its third shard."""
    done = 0

    def stop(count: int) -> None:
        nonlocal done
        done += count
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store(images, out, on_progress=stop, **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 12}, "seed"),
        ({"vqvae_sha256": "f" * 64}, "vqvae_sha256"),
        ({"crop": replace(CROP, flip=False), "passes": 3}, "crop, passes"),
        ({"shard_images": 5}, "shard_images"),
    ],
)
def test_another_plan_starts_over(images, stored, tmp_path, caplog, options, named):
    interrupt(images, tmp_path / "out", **options)
    assert len(list((tmp_path / ".partial-out").glob("shard*"))) >= 1
    with caplog.at_level(logging.WARNING):
        store(images, tmp_path / "out")
    assert caplog.messages == [
        f"{tmp_path}/.partial-out: what an earlier run left has another plan ({named}); starting over"
    ]
    assert content_of(tmp_path / "out") == content_of(stored[0])


def test_another_data_set_starts_over_though_its_labels_are_the_same(images, tmp_path, caplog):
    other = write_images(tmp_path / "other")
    interrupt(other, tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        store(images, tmp_path / "out")
    assert "has another plan (data); starting over" in caplog.text


def test_the_same_plan_goes_on_whatever_the_batch(images, stored, tmp_path, caplog):
    interrupt(images, tmp_path / "out")
    with caplog.at_level(logging.INFO):
        store(images, tmp_path / "out", batch=7, workers=1)
    assert caplog.messages == [f"{tmp_path}/.partial-out: going on after an earlier run; 2 of 6 shards"]
    assert torch.equal(all_tokens(open_tokens(tmp_path / "out"), 1), all_tokens(open_tokens(stored[0]), 1))


@pytest.mark.parametrize("damage", ["flipped", "cut", "header", "empty"])
def test_a_shard_damaged_meanwhile_is_made_again(images, stored, tmp_path, caplog, damage):
    interrupt(images, tmp_path / "out")
    shard = tmp_path / ".partial-out" / shard_name(1)
    content = bytearray(shard.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
    elif damage == "header":
        content[9:12] = b"\xff\xff\xff"
    else:
        content = content[: 0 if damage == "empty" else -1]
    shard.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        store(images, tmp_path / "out")
    assert f"{shard} is damaged, its images are encoded again" in caplog.text
    assert content_of(tmp_path / "out") == content_of(stored[0])


def test_a_disk_that_is_too_small(images, tmp_path, monkeypatch):
    """By one byte; nothing is made. What is there already needs no room."""
    needed = PASSES * COUNT * (2 * CONFIG.num_tokens + 4)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(DataError, match=r"deep/out: too little disk: got 0\.00 MiB free, expected 0\.00 MiB; make roo"):
        store(images, tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    interrupt(images, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed * 14 // 22))
    store(images, tmp_path / "out")


def test_a_disk_that_fills_up(images, stored, tmp_path, monkeypatch):
    fsync, calls = os.fsync, itertools.count()

    def failing(descriptor: int) -> None:
        if next(calls) == 4:  # each file and its folder in turn: the third shard
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(DataError, match=r"out: cannot write \(No space left on device\); make room or"):
        store(images, tmp_path / "out")
    assert sorted(content_of(tmp_path / ".partial-out")) == [shard_name(0), shard_name(1)]
    monkeypatch.undo()
    store(images, tmp_path / "out")
    assert content_of(tmp_path / "out") == content_of(stored[0])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"passes": 0}, ConfigError, "passes: got 0, expected a positive integer"),
        ({"batch": 0}, ConfigError, "batch: got 0, expected a positive integer"),
        ({"shard_images": 0}, ConfigError, "shard_images: got 0, expected a positive integer"),
        ({"seed": -1}, ConfigError, "seed: got -1, expected an integer from 0 to 2^64 - 1"),
        ({"vqvae_sha256": "abc"}, ConfigError, "vqvae_sha256: got 'abc', expected 64 hexadecimal digits"),
        ({"crop": replace(CROP, side=16)}, ConfigError, "crop.side: got 16, expected 8, as the VQVAE takes"),
        ({"crop": replace(CROP, enlarge=0.5)}, ConfigError, "crop.enlarge: got 0.5, expected a number of at least 1"),
        ({"out": "digits"}, DataError, "digits: exists, expected a new name; choose another, or remove it"),
        ({"out": "file/out"}, DataError, "cannot write (Not a directory)"),
    ],
)
def test_what_cannot_be_stored(images, tmp_path, options, error, text):
    (tmp_path / "digits").mkdir()
    (tmp_path / "file").touch()
    out = tmp_path / options.pop("out", "out")
    with pytest.raises(error, match=re.escape(text)):
        store(images, out, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits", "file"]


def test_nothing_but_corrupt_images(tmp_path):
    broken = write_images(tmp_path / "images", count=3, corrupt=(0, 1, 2))
    with pytest.raises(DataError, match=r"cannot be read \(no known image format\), and this is the first of 3"):
        store(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- opening -------------------------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def reseal(folder: Path, **changes: Any) -> None:
    """tokens.json with other values and a sha256 that fits, as a forger would write it."""
    data = json.loads((folder / MANIFEST).read_text()) | changes
    data.pop("sha256", None)
    data["sha256"] = token_manifest._digest_of(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def reseal_shard(folder: Path, number: int) -> None:
    files = json.loads((folder / MANIFEST).read_text())["files"]
    seal = token_files.seal_of(folder / shard_name(number))
    reseal(folder, files=files | {shard_name(number): {"size": seal.size, "sha256": seal.sha256}})


def rewrite_header(folder: Path, old: bytes, new: bytes) -> None:
    path = folder / shard_name(1)
    content = path.read_bytes()
    assert content.count(old) == 1
    length = int.from_bytes(content[:8], "little") + len(new) - len(old)
    path.write_bytes(length.to_bytes(8, "little") + content[8:].replace(old, new))
    reseal_shard(folder, 1)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (
            lambda f: shutil.rmtree(f),
            r"copy/tokens\.json: cannot be read \(No such file or directory\); give",
        ),
        (
            lambda f: (f / MANIFEST).write_text("{"),
            r"tokens\.json: altered or truncated \(JSONDecodeError\); fetch",
        ),
        (
            lambda f: (f / MANIFEST).write_text("[]"),
            r"tokens\.json: altered or truncated \(AttributeError\); fetch",
        ),
        (lambda f: (f / MANIFEST).write_text("[" * 10**5), r"tokens\.json: altered or truncated \(RecursionError\)"),
        (lambda f: flip(f / MANIFEST, 300), r"tokens\.json: altered"),
        (lambda f: reseal(f, format=2), r"tokens\.json: format: got 2, expected 1; fetch or store the tokens again$"),
        (lambda f: reseal(f, more=2), r"tokens\.json: altered or truncated \(TypeError\)"),
        (lambda f: reseal(f, passes=3), r"tokens\.json: files: got 6, expected 9, one for each shard; fetch or store"),
        (lambda f: reseal(f, images=10**30), r"tokens\.json: files: got 6, expected 5\d*, one for each shard"),
        (lambda f: reseal(f, passes=True), r"tokens\.json: passes: got True, expected a positive integer; fetch"),
        (lambda f: reseal(f, class_names=[]), r"tokens\.json: class_names: got \(\), expected at least one; fetch"),
        (lambda f: reseal(f, class_names="abc"), r"tokens\.json: class_names: got 'str', expected a list of texts; f"),
        (lambda f: reseal(f, corrupt=[1]), r"tokens\.json: corrupt: got 1, expected texts; fetch"),
        (
            lambda f: reseal(f, class_names=["a"]),
            r"copy: image 4: got label 1, expected 0 to 0: shard_00001",
        ),
        (
            lambda f: reseal(f, images=9),
            r"shard_00002.*got .*labels: .*shape: \[3\].* expected .*shape: \[1\]",
        ),
        (
            lambda f: (f / shard_name(2)).unlink(),
            r"shard_00002\.safetensors: cannot be read \(No such file",
        ),
        (
            lambda f: (f / shard_name(2)).write_bytes(b""),
            r"shard_00002\.safetensors: no safetensors header; fetch or st",
        ),
        (lambda f: os.truncate(f / shard_name(2), 9), r"shard_00002\.safetensors: no safetensors header; fetch"),
        (
            lambda f: os.truncate(f / shard_name(2), 1500),
            r"shard_00002\.safetensors: got 1500 bytes, expected \d+;",
        ),
        (lambda f: flip(f / shard_name(5), -1), r"shard_00005\.safetensors: altered: its sha256 is not the sealed one"),
        (lambda f: flip(f / shard_name(5), 40), r"shard_00005\.safetensors: (no safetensors header|altered)"),
        (lambda f: rewrite_header(f, b'"U16"', b'"I16"'), r"shard_00001.*got .*tokens: {dtype: I16,.* expected .*U16"),
        (lambda f: rewrite_header(f, b'"shape": [4]', b'"shape": [5]'), r"shard_00001.*got .*\[5\].* expected .*\[4\]"),
        (
            lambda f: rewrite_header(f, b"[0, 16]", b"[0, 9e999]"),
            r"shard_00001.*got .*\[0, Infinity\].* expected .*\[0, 16\]",
        ),
        (lambda f: rewrite_header(f, b'"tokens"', b'"tokans"'), r"shard_00001.*got .*tokans.* expected .*tokens"),
    ],
)
def test_what_is_not_a_whole_store(copy, damage, text):
    damage(copy)
    with pytest.raises(DataError, match=text) as error:
        open_tokens(copy)
    assert "\n" not in str(error.value)


def outside_the_codebook(folder: Path) -> None:
    """The last token of the first pass's image 7 becomes one too many."""
    path = folder / shard_name(1)
    content = path.read_bytes()
    path.write_bytes(content[:-2] + CONFIG.vocab_size.to_bytes(2, "little"))


def test_a_token_outside_the_codebook_is_refused_when_it_is_read(copy):
    outside_the_codebook(copy)
    reseal_shard(copy, 1)
    tokens = open_tokens(copy)
    tokens.read(0, np.arange(7))
    tokens.read(1, np.arange(COUNT))
    with pytest.raises(DataError) as error:
        tokens.read(2, np.array([0, 7]))
    assert str(error.value) == (
        f"tokens {copy}: image 7: got token 61, expected 0 to 60: shard_00001.safetensors is damaged; "
        "fetch or store the tokens again"
    )


def test_a_large_store_is_not_read_whole_when_it_is_opened(copy, caplog, monkeypatch):
    monkeypatch.setattr(token_files, "VERIFIED_BYTES", 3000)
    outside_the_codebook(copy)
    with caplog.at_level(logging.INFO):
        tokens = open_tokens(copy)
    assert "not read now to compare with their sha256" in caplog.text
    with pytest.raises(DataError, match="image 7: got token 61"):
        tokens.read(0, np.array([7]))
    flip(copy / shard_name(0), -1)
    open_tokens(copy)
    (copy / shard_name(5)).write_bytes((copy / shard_name(5)).read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"shard_00005\.safetensors: got \d+ bytes, expected \d+; fetch"):
        open_tokens(copy)


def test_a_shard_that_vanishes_after_opening(copy):
    tokens = open_tokens(copy)
    (copy / shard_name(4)).unlink()
    with pytest.raises(DataError, match=r"shard_00004\.safetensors: cannot be read \(No such file"):
        tokens.read(1, np.array([4]))


# ---- any alteration of tokens.json and of a header -----------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("ab" * 32),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def outcome(action: Callable[[], Any]) -> tuple[Any, str]:
    """Result of an action, or None and what a DataError said; nothing else may be raised."""
    try:
        return action(), ""
    except DataError as error:
        return None, str(error)


def one_line(text: str) -> bool:
    return len(text.splitlines()) == 1


@pytest.fixture(scope="module")
def scratch(stored, tmp_path_factory) -> tuple[Path, dict[str, bytes], TokenManifest]:
    """A folder to alter in every example; what it held; what that means."""
    folder = Path(shutil.copytree(stored[0], tmp_path_factory.mktemp("scratch") / "tokens"))
    return folder, content_of(folder), read_manifest(folder)


@given(
    st.lists(st.tuples(st.integers(0, 10**4), st.binary(max_size=3), st.integers(0, 3)), max_size=3),
    st.integers(0, 10**4) | st.none(),
)
@example([], None)
@example([(0, b" ", 0)], None)
def test_any_bytes_give_the_same_manifest_or_an_error(scratch, changes, end):
    folder, contents, manifest = scratch
    content = bytearray(contents[MANIFEST])
    for place, new, length in changes:
        place %= len(content) + 1
        content[place : place + length] = new
    (folder / MANIFEST).write_bytes(content[:end])
    found, problem = outcome(lambda: read_manifest(folder))
    assert found == manifest or (one_line(problem) and (changes or end is not None))


def places_in(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key and index in nested JSON."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [found for key, inner in entries for found in [(*place, key), *places_in(inner, (*place, key))]]


@settings(max_examples=200)
@given(st.data())
def test_any_values_with_a_seal_that_fits_give_a_store_or_an_error(scratch, data):
    """What is forged and possible is taken as it is, and then reads without any other error."""
    folder, contents, _ = scratch
    content = json.loads(contents[MANIFEST])
    del content["sha256"]
    *above, key = data.draw(st.sampled_from(places_in(content)))
    holder = content
    for step in above:
        holder = holder[step]
    if isinstance(key, str) and data.draw(st.booleans()):
        del holder[key]
    else:
        holder[key] = data.draw(JSON)
    (folder / MANIFEST).write_text(json.dumps(content))
    reseal(folder)
    tokens, problem = outcome(lambda: open_tokens(folder))
    if tokens is None:
        assert one_line(problem)
        return
    tokens_BL, labels_B = tokens.read(tokens.passes, np.arange(len(tokens)))
    assert tokens_BL.shape == (COUNT, CONFIG.num_tokens)
    assert 0 <= tokens_BL.min() <= tokens_BL.max() < tokens.config.vocab_size
    assert 0 <= labels_B.min() <= labels_B.max() < len(tokens.class_names)
    assert Crop(side=8, random=tokens.crop.random, enlarge=tokens.crop.enlarge).side == tokens.config.image_size


@given(
    st.lists(st.tuples(st.integers(0, 10**4), st.binary(max_size=3), st.integers(0, 3)), max_size=3),
    st.integers(0, 2**64 - 1) | st.none(),
)
def test_any_bytes_of_a_shard_give_its_shapes_or_an_error(scratch, changes, length):
    folder, contents, manifest = scratch
    content = bytearray(contents[shard_name(2)])
    for place, new, count in changes:
        place %= len(content) + 1
        content[place : place + count] = new
    if length is not None:
        content[:8] = length.to_bytes(8, "little")
    shard = folder.parent / "shard"
    shard.write_bytes(content)
    mapped, problem = outcome(lambda: token_files.mapped_shard(shard, manifest.plan, 2))
    if mapped is None:
        assert one_line(problem)
        return
    tokens_nL, labels_n = mapped
    assert (tokens_nL.shape, labels_n.shape) == ((3, CONFIG.num_tokens), (3,))
    assert (tokens_nL.sum(), labels_n.sum()) is not None  # every number can be read


if __name__ == "__main__":
    torch.set_num_threads(1)
    {action.__name__: action for action in (killed_at_every_event, two_processes)}[sys.argv[1]](Path(sys.argv[2]))
