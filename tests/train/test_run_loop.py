"""A run from its first iteration to its last: killed, stopped, damaged, refused, gone on with, the bits stay the same.

What is killed or stopped are processes of their own (`warm` of conftest.py); the rest runs in this one. "Told" is what
metrics.jsonl says.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("tensorboard")

from safetensors import safe_open
from safetensors.torch import load_file

from var_deploy.config import ConfigError
from var_deploy.errors import CheckpointError, DataError
from var_train import run_loop, train_var
from var_train.configuration import VARRun, VQVAERun, read_run
from var_train.image_data import GlobalBatches
from var_train.image_files import open_images
from var_train.run_checkpoints import manifest_of, newest_of, weights
from var_train.run_folder import locked, write_finished
from var_train.setup import train_var as run_var
from var_train.setup import train_vqvae as run_vqvae
from var_train.train_var import VARTraining
from var_train.train_vqvae import VQVAETraining
from var_train.watch import METRICS_FILE, read_metrics

CPU = torch.device("cpu")

#: A run that takes part in all that a checkpoint has to hold, with a worker that decodes images.
LONG = {
    "data.workers": 1,
    "execution.attention": "dense",  # else a warning says that it is taken
    "optimiser.iterations": 36,
    "progressive.first": 2,
    "progressive.until": 0.6,
    "keeping.evaluate_every": 12,
}


def train(toml: Path, out: Path, *options: str) -> Path:
    """A VAR run in this process; the file of finished weights."""
    return run_var(read_run(VARRun, toml, options), out, CPU)


def train_pictures(toml: Path, out: Path, *options: str) -> Path:
    """A VQVAE run in this process."""
    return run_vqvae(read_run(VQVAERun, toml, options), out, CPU)


def told(out: Path) -> list[dict[str, Any]]:
    """Everything that the metrics say, but how fast it went."""
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in read_metrics(out)]


def told_iterations(out: Path, key: str = "loss") -> list[int]:
    return [line["iteration"] for line in read_metrics(out) if key in line]


def last_told(out: Path) -> int:
    return max((line["iteration"] for line in read_metrics(out)), default=0)


def steps(out: Path) -> list[int]:
    """Of the checkpoints."""
    return sorted(int(path.name.removeprefix("step_")) for path in (out / "checkpoints").iterdir())


def newest(out: Path) -> Path:
    path = newest_of(out / "checkpoints")
    assert path is not None
    return path


def wait_until(condition: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.002)


def left_of_session(pid: int) -> list[str]:
    """Processes of the session that a process began, the zombies aside."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if fields[3] == str(pid) and fields[0] != "Z":
            found.append(path.parent.name)
    return found


@pytest.fixture(scope="module")
def whole(warm: Any, var_toml: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Configuration and folder of the long VAR run, never interrupted; read only."""
    folder = tmp_path_factory.mktemp("whole")
    toml, out = var_toml(folder, **LONG), folder / "run"
    process = warm.run("var", toml, "--out", out)
    assert process.status == 0, process.stderr
    assert process.stderr == ""
    assert process.stdout == f"{out / 'var.safetensors'}\n"
    return toml, out


def assert_same_run(out: Path, whole_out: Path, kind: str = "var") -> None:
    """The same weights, bit for bit, and every iteration told once, with the same numbers."""
    name = f"{kind}.safetensors"
    assert (out / name).read_bytes() == (whole_out / name).read_bytes()
    assert told(out) == told(whole_out)
    assert told_iterations(out) == list(range(1, last_told(whole_out) + 1))


# ---- killed --------------------------------------------------------------------------------------------------------


def killed(warm: Any, kind: str, toml: Path, out: Path, *, kills: list[int], seed: int) -> None:
    """Runs the same command again and again; kills it soon after it has told of each of these iterations, then not."""
    drawn = random.Random(seed)
    for iteration in kills:
        process = warm.start(kind, toml, "--out", out)
        wait_until(lambda: last_told(out) >= iteration or process.ended())  # noqa: B023 — called at once
        time.sleep(drawn.uniform(0, 0.05))
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr
    process = warm.run(kind, toml, "--out", out)
    assert process.status == 0, process.stderr


def test_ten_kills_at_random_moments_change_no_bit(warm, whole, tmp_path):
    toml, whole_out = whole
    kills = sorted(random.Random(7).sample(range(1, 27), 10))
    killed(warm, "var", toml, tmp_path / "run", kills=kills, seed=8)
    assert_same_run(tmp_path / "run", whole_out)


@pytest.mark.slow
def test_kills_of_a_vqvae_with_its_discriminator_change_no_bit(warm, vqvae_toml, tmp_path):
    toml = vqvae_toml(tmp_path, **{"optimiser.iterations": 14, "loss.adversarial_start": 0.3, "data.workers": 1})
    assert warm.run("vqvae", toml, "--out", tmp_path / "whole").status == 0
    killed(warm, "vqvae", toml, tmp_path / "run", kills=[5, 9], seed=9)
    assert_same_run(tmp_path / "run", tmp_path / "whole", "vqvae")


# ---- stopped -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "group", "status"),
    [(signal.SIGTERM, False, 143), (signal.SIGTERM, True, 143), (signal.SIGINT, True, 130)],
    ids=["SIGTERM", "SIGTERM to its workers too", "Ctrl-C"],
)
def test_a_signal_leaves_a_checkpoint_of_its_iteration_and_the_command_goes_on(
    warm, whole, tmp_path, number, group, status
):
    toml, whole_out = whole
    out = tmp_path / "run"
    process = warm.start("var", toml, "--out", out)
    wait_until(lambda: last_told(out) >= 7)
    process.send(number, group=group)
    assert process.wait() == status, process.stderr
    done = last_told(out)
    assert 7 <= done < 36
    assert newest(out).name == f"step_{done:08d}"
    assert process.stderr == (
        f"var_train: {out}: stopped after iteration {done} of 36; the same command goes on from there\n"
    )
    assert process.stdout == ""
    assert left_of_session(process.pid) == []
    assert not (out / "var.safetensors").exists()
    process = warm.run("var", toml, "--out", out)
    assert process.status == 0, process.stderr
    assert_same_run(out, whole_out)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_iteration_that_a_signal_comes_in_is_the_last(var_toml, tmp_path, monkeypatch, number, status):
    plain, before = VARTraining.step, signal.getsignal(number)

    def step(self: VARTraining, batch: Any, *, measure: bool) -> Any:
        if batch.iteration == 6:
            signal.raise_signal(number)
        return plain(self, batch, measure=measure)

    monkeypatch.setattr(VARTraining, "step", step)
    with pytest.raises(SystemExit) as stopped:
        train(var_toml(tmp_path), tmp_path / "run")
    assert stopped.value.code == status
    assert told_iterations(tmp_path / "run") == [1, 2, 3, 4, 5, 6, 7]
    assert steps(tmp_path / "run") == [6, 7]
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once(var_toml, small_images, tmp_path, number, status, warm):
    """The sixth batch never comes: one of its images is a pipe that nothing is written into."""
    images = Path(shutil.copytree(small_images, tmp_path / "images"))
    toml = var_toml(tmp_path, **{"data.path": str(images), "execution.attention": "dense"})
    hanging = Path(open_images(images).name(GlobalBatches(count=72, size=8, seed=3).indices(5)[1][0]))
    hanging.unlink()
    os.mkfifo(hanging)
    out = tmp_path / "run"
    process = warm.start("var", toml, "--out", out)
    wait_until(lambda: last_told(out) == 5)
    time.sleep(0.5)
    process.send(number)
    time.sleep(0.2)
    process.send(number)  # by a launcher, which had it too
    time.sleep(1.1)
    assert not process.ended()  # it waits for the iteration to end
    process.send(number)
    assert process.wait() == status, process.stderr
    assert "Traceback" not in process.stderr
    assert steps(out) == [3]


def test_ctrl_c_twice_ends_what_was_started_in_the_background_too(monkeypatch):
    """A shell starts that with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        monkeypatch.setattr(run_loop, "ECHO", -1.0)
        with run_loop._Signals() as signals:
            signal.raise_signal(signal.SIGINT)
            assert signals.number == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_process_that_was_started_anew_stops_and_goes_on_as_well(warm, var_toml, tmp_path):
    toml, out = var_toml(tmp_path, **{"optimiser.iterations": 1000, "execution.attention": "dense"}), tmp_path / "run"
    command = [sys.executable, "-m", "var_train", "var", str(toml), "--out", str(out)]
    with subprocess.Popen(command, env=warm.environment, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: last_told(out) >= 2)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert re.fullmatch(r"var_train: .*: stopped after iteration \d+ of 1000; the same command goes on .*\n", said)
    assert newest(out).name == f"step_{last_told(out):08d}"


# ---- damaged -------------------------------------------------------------------------------------------------------


def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before_and_ends_in_the_same_bits(
    var_toml, tmp_path, caplog
):
    toml, whole_out, out = var_toml(tmp_path), tmp_path / "whole", tmp_path / "run"
    train(toml, whole_out)
    shutil.copytree(whole_out, out)
    (out / "var.safetensors").unlink()
    assert steps(out) == [18, 20]
    (shard,) = newest(out).glob("shard-*")
    os.truncate(shard, shard.stat().st_size // 2)
    caplog.clear()
    train(toml, out)
    (said,) = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert re.search(r"step_00000020 is damaged \(shard-\S+ has \d+ bytes, expected \d+\); falling back to", said)
    assert steps(out) == [18, 20]
    assert_same_run(out, whole_out)


# ---- losses that are no numbers ------------------------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`poison(6, 7)`: from now on the losses of the 6th and 7th steps are NaN."""

    plain = train_var.token_loss

    def put(*bad: int) -> None:
        count = itertools.count(1)
        monkeypatch.setattr(
            train_var, "token_loss", lambda *a, **b: plain(*a, **b) * (np.nan if next(count) in bad else 1.0)
        )

    return put


EVERY = {"keeping.checkpoint_every": 1, "keeping.checkpoints": 40, "keeping.evaluate_every": 40}


def names_of_batch(images: Path, iteration: int) -> list[str]:
    files = open_images(images)
    _, indices_B = GlobalBatches(count=len(files), size=8, seed=3).indices(iteration - 1)
    return [files.name(index) for index in indices_B.tolist()]


def warnings_of(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if part in record.getMessage()]


def test_losses_that_are_no_numbers_are_left_out_counted_and_named(var_toml, small_images, tmp_path, poison, caplog):
    toml, out = var_toml(tmp_path, **EVERY, **{"optimiser.nonfinite": 3}), tmp_path / "run"
    poison(6, 7, 9, 10, 12, 13, 14)  # two in a row, and two, and three
    with pytest.raises(DataError) as caught:
        train(toml, out)
    names = names_of_batch(small_images, 14)
    assert str(caught.value) == (
        "iteration 14: loss is nan, for the 3. time in a row (optimiser.nonfinite); images of this batch: "
        f"{', '.join(names)}; look at them, lower the learning rate, or train in bf16 or fp32"
    )
    assert all(Path(name).is_file() for name in names)
    assert warnings_of(caplog, "loss is nan") == [
        f"iteration {i}: loss is nan; left out; its images: {', '.join(names_of_batch(small_images, i))}"
        for i in (6, 7, 9, 10, 12, 13)
    ]
    assert steps(out) == list(range(1, 14))
    kept = {i: weights(out / "checkpoints" / f"step_{i:08d}", "models.var.") for i in steps(out)}
    unchanged = [i for i in range(2, 14) if all(torch.equal(kept[i][key], kept[i - 1][key]) for key in kept[i])]
    assert unchanged == [6, 7, 9, 10, 12, 13]
    moments = [weights(out / "checkpoints" / f"step_{i:08d}", "optimizers.var.") for i in (5, 7)]
    assert all(torch.equal(moments[0][key], moments[1][key]) for key in moments[0])
    assert all(tensor.isfinite().all() for tensor in weights(newest(out), "ema.").values())
    losses = {line["iteration"]: line["loss"] for line in read_metrics(out)}
    assert [i for i in losses if losses[i] is None] == [6, 7, 9, 10, 12, 13]

    poison(1)  # the count went into the checkpoint
    with pytest.raises(DataError, match=r"iteration 14: loss is nan, for the 3\. time in a row"):
        train(toml, out)
    poison()
    train(toml, out)
    assert told_iterations(out) == list(range(1, 21))


def test_a_gradient_that_is_no_number_counts_though_its_loss_is_one(var_toml, tmp_path, monkeypatch, caplog):
    plain = train_var.token_loss

    def poisoned(logits_BlV: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        logits_BlV.register_hook(lambda gradient: gradient * np.inf)
        return plain(logits_BlV, *rest, **options)

    monkeypatch.setattr(train_var, "token_loss", poisoned)
    message = (
        r"^iteration 3: the gradient's norm is (nan|inf), for the 3\. time in a row \(optimiser\.nonfinite\); images"
    )
    with pytest.raises(DataError, match=message):
        train(var_toml(tmp_path, **EVERY, **{"optimiser.nonfinite": 3}), tmp_path / "run")
    first, second = (weights(tmp_path / "run/checkpoints" / f"step_{i:08d}", "") for i in (1, 2))
    assert all(torch.equal(first[key], second[key]) for key in first if not key.startswith("generators."))


def test_a_single_loss_that_is_no_number_is_survived_by_a_vqvae(vqvae_toml, tmp_path, monkeypatch, caplog):
    toml = vqvae_toml(tmp_path, **EVERY, **{"optimiser.iterations": 6, "loss.adversarial_start": 0.0})
    plain, count = VQVAETraining._loss, itertools.count(1)

    def poisoned(self: Any, *arguments: Any) -> Any:
        loss, fake_B3RR, tokens = plain(self, *arguments)
        factor = np.nan if next(count) == 4 else 1.0
        return loss * factor, fake_B3RR * factor, tokens

    monkeypatch.setattr(VQVAETraining, "_loss", poisoned)
    train_pictures(toml, tmp_path / "run")
    states = {i: weights(tmp_path / "run/checkpoints" / f"step_{i:08d}", "models.") for i in (3, 4, 5)}
    changed = [[key for key in states[3] if not torch.equal(states[i][key], states[i - 1][key])] for i in (4, 5)]
    assert changed[0] == []
    assert {key.split(".")[0] for key in changed[1]} == {"vqvae", "discriminator"}
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "run/vqvae.safetensors").values())


# ---- kept and told -------------------------------------------------------------------------------------------------


def test_every_interval_is_kept_to(var_toml, tmp_path):
    options = {"keeping.log_every": 3, "keeping.evaluate_every": 7, "keeping.checkpoint_every": 4}
    out = tmp_path / "run"
    train(var_toml(tmp_path, **options, **{"keeping.checkpoints": 40}), out)
    assert told_iterations(out) == [3, 6, 9, 12, 15, 18, 20]
    assert told_iterations(out, "validation_loss") == [7, 14, 20]
    assert steps(out) == [4, 7, 8, 12, 14, 16, 20]
    assert sorted(path.name for path in (out / "samples").iterdir()) == [f"{i:08d}.png" for i in (7, 14, 20)]


def test_the_checkpoint_of_the_lowest_validation_loss_stays_beside_the_last_two(var_toml, tmp_path, monkeypatch):
    plain, scores = VARTraining.evaluate, iter((3.0, 1.0, 2.0, 2.5, 1.5))
    monkeypatch.setattr(VARTraining, "evaluate", lambda self: dataclasses.replace(plain(self), score=next(scores)))
    train(var_toml(tmp_path, **{"keeping.evaluate_every": 4}), tmp_path / "run")
    assert steps(tmp_path / "run") == [8, 18, 20]
    monkeypatch.undo()
    train(var_toml(tmp_path, **{"keeping.evaluate_every": 4}), tmp_path / "own")
    losses = {
        line["iteration"]: line["validation_loss"] for line in told(tmp_path / "own") if "validation_loss" in line
    }
    kept = {
        step: manifest_of(tmp_path / f"own/checkpoints/step_{step:08d}")["score"] for step in steps(tmp_path / "own")
    }
    assert kept == {step: losses.get(step) for step in kept}
    assert min(losses, key=lambda step: losses[step]) in kept


def test_an_image_that_cannot_be_decoded_is_named_and_another_stands_for_it(var_toml, small_images, tmp_path, caplog):
    images = Path(shutil.copytree(small_images, tmp_path / "images"))
    damaged = images / "train" / "down" / "05.png"
    kept_apart = images / "val" / "across" / "02.png"
    for file in (damaged, kept_apart):
        file.write_bytes(file.read_bytes()[:40])
    epochs = {"optimiser.iterations": 18, "keeping.evaluate_every": 9, "keeping.checkpoint_every": 4}
    epochs["keeping.checkpoints"] = 9
    toml = var_toml(tmp_path, **{"data.path": str(images)}, **epochs)
    train(toml, tmp_path / "run")
    assert warnings_of(caplog, "decoded") == [  # once, though there are two epochs
        f"{file}: cannot be decoded; the next image stands for it" for file in (damaged, kept_apart)
    ]
    counts = [line["skipped_images"] for line in told(tmp_path / "run") if "skipped_images" in line]
    assert counts == sorted(counts)
    assert counts[-1] == 2.0  # in each epoch once
    for later in (12, 16, 18):
        shutil.rmtree(tmp_path / f"run/checkpoints/step_{later:08d}")
    assert steps(tmp_path / "run") == [4, 8, 9]
    train(toml, tmp_path / "run")
    assert [line["skipped_images"] for line in told(tmp_path / "run") if "skipped_images" in line] == counts


def test_a_finished_run_is_not_trained_again(warm, whole, monkeypatch, tmp_path):
    toml, out = whole[0], Path(shutil.copytree(whole[1], tmp_path / "run"))
    names = ("var.safetensors", METRICS_FILE, "run.json")
    before = [(out / name).read_bytes() for name in names], steps(out)
    process = warm.run("var", toml, "--out", out)
    assert process.status == 0, process.stderr
    assert process.stdout == f"{out / 'var.safetensors'}\n"
    assert ([(out / name).read_bytes() for name in names], steps(out)) == before
    monkeypatch.setattr(VARTraining, "step", None)  # calling it would be an error
    train(toml, out)
    assert ([(out / name).read_bytes() for name in names], steps(out)) == before


# ---- gone on with --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(var_toml: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, Path]]:
    """Configuration, folder of a run that has come to iteration 10 of 20, and of the same run uninterrupted."""
    folder = tmp_path_factory.mktemp("half")
    toml, plain, count = var_toml(folder), run_loop.any_process, itertools.count(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_loop, "any_process", lambda flag: plain(flag) or next(count) == 10)
        with pytest.raises(SystemExit) as stopped:
            train(toml, folder / "run")
    assert stopped.value.code == 143
    train(toml, folder / "whole")
    return toml, folder / "run", folder / "whole"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("data.batch=4", r": data\.batch: got 4, this run was started with 8 \(and 1 more\); go on"),
        (
            "seed=4",
            r": seed: got 4, this run was started with 3; go on with that, or choose another",
        ),
        ("optimiser.iterations=30", r": optimiser\.iterations: got 30, this run was started with 20"),
        ("model.depth=3", r": model\.depth: got 3, this run was started with 2"),
        ("progressive.first=1 progressive.until=0.5", r": progressive"),
        (
            "optimiser.precision=fp16",
            r": optimiser\.precision: got 'fp16', this run was started",
        ),
    ],
)
def test_a_changed_configuration_is_refused(half, tmp_path, option, message):
    toml, out = half[0], half[1]
    before = (out / "run.json").read_bytes()
    with pytest.raises(ConfigError, match=message) as caught:
        train(toml, out, *option.split())
    assert str(caught.value).startswith(f"{out}: ")
    assert "\n" not in str(caught.value)
    assert (out / "run.json").read_bytes() == before
    assert steps(out) == [9, 10]


@pytest.mark.parametrize(
    "option",
    [
        "keeping.log_every=2",
        "keeping.checkpoints=1",
        "keeping.evaluate_every=3",
        "data.workers=1",
        "execution.parallel=fsdp",
    ],
)
def test_what_changes_no_result_may_change(half, tmp_path, option):
    toml, run, whole_out = half
    out = Path(shutil.copytree(run, tmp_path / "run"))
    train(toml, out, option)
    assert (out / "var.safetensors").read_bytes() == (whole_out / "var.safetensors").read_bytes()


def test_what_changes_only_rounding_may_change_too(half, tmp_path):
    toml, run, whole_out = half
    out = Path(shutil.copytree(run, tmp_path / "run"))
    train(toml, out, "execution.checkpoint_blocks=true")
    ours, theirs = (load_file(folder / "var.safetensors") for folder in (out, whole_out))
    # Adam turns rounding of a gradient near 0 into steps of the learning rate's size
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-3)


def test_finished_weights_in_half_precision(half, tmp_path):
    toml, run, whole_out = half
    out = Path(shutil.copytree(run, tmp_path / "run"))
    train(toml, out, "keeping.finished=bf16")
    ours, theirs = (load_file(folder / "var.safetensors") for folder in (out, whole_out))
    assert {key for key in ours if ours[key].dtype != torch.bfloat16} == {
        key for key in theirs if not theirs[key].is_floating_point()
    }
    assert all(torch.equal(ours[key], theirs[key].to(ours[key].dtype)) for key in theirs)


# ---- refused -------------------------------------------------------------------------------------------------------


def test_a_second_process_in_the_same_folder_is_refused(warm, whole, tmp_path):
    out = tmp_path / "run"
    with locked(out):
        process = warm.run("var", whole[0], "--out", out)
    assert process.status == 1
    assert process.stderr == f"error: {out}: another process trains here; wait for it or choose another --out\n"
    assert sorted(path.name for path in out.iterdir()) == [".lock"]


def test_too_little_disk_is_refused_before_training(half, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    monkeypatch.setattr(VARTraining, "step", None)
    with pytest.raises(
        CheckpointError, match=r"checkpoints: too little disk: got 0\.95 MiB free, expected \d+\.\d+ MiB for 4"
    ):
        train(half[0], tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "run.json"]


def test_a_place_that_cannot_be_written_is_one_line(warm, whole, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    process = warm.run("var", whole[0], "--out", out)
    assert process.status == 1
    assert process.stderr == f"error: {out}: cannot write (Not a directory); choose another --out\n"


def test_the_same_weights_make_the_same_file(tmp_path):
    state, notes = {"b": torch.ones(3), "a": torch.zeros(2).half()}, {"z": ['"ö"\n'], "a": [1], "m": 3, "k": None}
    for number in range(8):
        write_finished(tmp_path / f"{number}.safetensors", state, notes)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert {key: json.loads(value) for key, value in file.metadata().items()} == notes
        assert all(torch.equal(file.get_tensor(key), tensor) for key, tensor in state.items())
