"""Checkpoints of a run: bit for bit, in any number of processes, whole after any kill, refused where they cannot be.

Run as a script, this file is the other processes: `torchrun` starts `two_processes` and `one_of_two_is_killed`, the
kill tests start a process that forks runs and kills them.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from var_deploy.errors import CheckpointError
from var_train import run_checkpoints
from var_train.checkpoint_files import MANIFEST, checked_manifest, damages
from var_train.run_checkpoints import RunCheckpoints, newest_of, stored_tensors, weights
from var_train.run_state import RunState, checkpoint_bytes, saved_form

ROOT = Path(__file__).parents[2]


class Net(nn.Module):
    """Odd widths, one output that two processes cannot share, dropout, and a counter as 0-dimensional buffer."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width), nn.Dropout(0.3), nn.Linear(width, 1))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x_B3: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x_B3)


def new_state(seed: int, kind: str = "plain", width: int = 5) -> RunState:
    """A run at its start; `kind` is "plain", "ddp" or "fsdp". Generators differ between processes."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(seed)
    net: nn.Module = Net(width)
    if kind == "ddp":
        net = DistributedDataParallel(net)
    if kind == "fsdp":
        fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    for set_seed in (torch.manual_seed, random.seed, np.random.seed):
        set_seed(seed + 100 + rank)
    decayed = [p for p in net.parameters() if p.ndim > 1]
    plain = [p for p in net.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr=0.05)
    ema = {name.removeprefix("module."): p.detach().clone() for name, p in net.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    return RunState(
        models={"net": net}, optimizers={"net": optimizer}, ema=ema, scaler=scaler, values={"step": 0, "losses": []}
    )


def train(state: RunState, until: int) -> None:
    """Steps that draw from all generators and change all that a checkpoint holds."""
    net, optimizer, scaler = state.models["net"], state.optimizers["net"], state.scaler
    assert scaler is not None
    while state.values["step"] < until:
        factor = 1 + random.random() + float(np.random.rand())
        loss = (net(torch.randn(4, 3)) * factor - 1).square().mean()
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            for average, weight in zip(state.ema.values(), net.parameters(), strict=True):
                average.mul_(0.75).add_(weight, alpha=0.25)
        total = loss.detach().clone()  # values are the same in all processes
        if dist.is_initialized():
            dist.all_reduce(total)
        state.values = {"step": state.values["step"] + 1, "losses": [*state.values["losses"], total.item()]}


def content(state: RunState) -> tuple[dict[str, Tensor], str]:
    """All that a checkpoint of it would hold, sharded tensors made whole, and the record as text."""
    tensors, record = saved_form(state, dist.get_rank() if dist.is_initialized() else 0)
    whole = {key: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for key, tensor in tensors.items()}
    return {key: tensor.clone() for key, tensor in whole.items()}, json.dumps(record)


def assert_same(got: tuple[dict[str, Tensor], str], expected: tuple[dict[str, Tensor], str]) -> None:
    assert got[1] == expected[1]
    assert got[0].keys() == expected[0].keys()
    assert [key for key in got[0] if not torch.equal(got[0][key], expected[0][key])] == []


def content_at(step: int, kind: str = "plain") -> tuple[dict[str, Tensor], str]:
    """What a run with seed 1 holds after so many steps, never interrupted. Changes the generators."""
    state = new_state(1, kind)
    train(state, step)
    return content(state)


def without_generators(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if not key.startswith("generators.")}


def flip_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def shard_of(checkpoint: Path) -> Path:
    return next(checkpoint.glob("shard-*"))


# ---- the other processes -------------------------------------------------------------------------------------------


def two_processes(directory: Path, kind: str) -> None:
    """Continues from a checkpoint of its own and from one of a single process."""
    whole = content_at(6, kind)
    first = new_state(1, kind)
    train(first, 3)
    at_3 = content(first)
    RunCheckpoints(directory / "two").save(3, first, score=0.5)
    resumed = new_state(2, kind)
    assert RunCheckpoints(directory / "two").load_newest(resumed) == 3
    assert_same(content(resumed), at_3)
    train(resumed, 6)
    assert_same(content(resumed), whole)

    of_one = new_state(3, kind)
    own = content(of_one)[0].get("generators.00001")
    assert RunCheckpoints(directory / "one").load_newest(of_one) == 4
    tensors, _ = content(of_one)
    if dist.get_rank() == 0:
        save_file(without_generators(at_3[0]), directory / "two.safetensors")
        save_file(without_generators(tensors), directory / "one.safetensors")
    else:
        assert own is not None
        assert torch.equal(tensors["generators.00001"], own)  # as there is none for it, it goes on with its own

    assert checkpoint_bytes(of_one) == checkpoint_bytes(new_state(1))  # of the whole, also when sharded
    with pytest.raises(CheckpointError, match="Not a directory"):
        RunCheckpoints(Path(__file__) / "run").check_space(1)
    if dist.get_rank() == 1:
        FileSystem.create_stream = no_space  # type: ignore[method-assign,assignment]
    with pytest.raises(CheckpointError, match=r"step_00000004: cannot write \(No space left on device\)"):
        RunCheckpoints(directory / "two").save(4, first)
    dist.barrier()  # the first process has removed what was written
    assert names_in(directory / "two") == ["step_00000003"]


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def one_of_two_is_killed(directory: Path, kind: str) -> None:
    """The second process dies in the middle of its file of the second checkpoint."""
    checkpoints, state = RunCheckpoints(directory / "two"), new_state(1, kind)
    assert checkpoints.load_newest(state) is None
    train(state, 1)
    checkpoints.save(1, state)
    train(state, 2)
    if dist.get_rank() == 1:
        kill_in_the_middle_of_a_file()
    checkpoints.save(2, state)


def kill_in_the_middle_of_a_file() -> None:
    """The next shard that this process writes is cut off after 100 bytes by a SIGKILL."""

    def create_stream(self: FileSystem, path: Any, mode: str) -> Any:
        class Cut(io.BytesIO):
            def write(self, data: Any) -> int:
                Path(path).write_bytes(bytes(data)[:100])
                os.kill(os.getpid(), signal.SIGKILL)
                return 100

        return Cut()

    FileSystem.create_stream = create_stream  # type: ignore[method-assign]


def warm_up() -> None:
    """Imports all that PyTorch imports late, so that forks need not."""
    state = new_state(0)
    train(state, 1)
    saved_form(state, 0)


def forked(action: Callable[[], object], *, kill_after: Callable[[], object] | None = None) -> int:
    """Runs an action in a fork; its exit status, negative for a signal. Kills it when the given wait returns."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except SystemExit as error:
            os._exit(int(error.code or 0))
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        kill_after()
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after_events(directory: Path, count: int) -> None:
    """SIGKILL at the count-th time from now that this process opens, renames, makes or removes something in there."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.listdir"):
            # removing a tree names files within a directory that is open already
            within = str(directory) in str(arguments[0]) or event in ("os.remove", "os.rmdir", "os.scandir")
            seen += within
            if within and seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed_at_every_event(directory: Path, kind: str) -> None:
    """Kills the saving of a third checkpoint, over a damaged one, at every event; checks what is there each time."""

    def start() -> None:  # steps 1 and 2, and a damaged third
        state, checkpoints = new_state(1), RunCheckpoints(directory, keep=3)
        for step in (1, 2, 3):
            train(state, step)
            checkpoints.save(step, state)
        flip_byte(shard_of(directory / "step_00000003"), -1)

    def save(count: int) -> None:
        state, checkpoints = new_state(2), RunCheckpoints(directory, keep=1)
        assert checkpoints.load_newest(state) == 2
        train(state, 3)
        kill_after_events(directory, count)
        checkpoints.save(3, state)

    def check() -> None:
        expected = {step: content_at(step) for step in (2, 3)}
        state = new_state(3)
        step = RunCheckpoints(directory, keep=1).load_newest(state)
        assert step in expected, step
        assert_same(content(state), expected[step])
        for path in directory.iterdir():  # what a kill left half deleted does not look like a checkpoint
            manifest, problem = checked_manifest(path)
            assert not problem, path
            assert bool(damages(path, manifest, manifest["files"])) == (step == 2 and path.name == "step_00000003")
        assert all(name.startswith("step_") for name in names_in(directory)), names_in(directory)
        sys.exit(40 + step)  # says which

    warm_up()
    assert forked(start) == 0
    pristine = directory.with_name("pristine")
    shutil.copytree(directory, pristine)
    outcomes = []
    for count in range(1, 200):
        status = forked(lambda count=count: save(count))  # type: ignore[misc]
        assert status in (0, -signal.SIGKILL), status
        outcomes.append(forked(check) - 40)
        assert outcomes[-1] in (2, 3), outcomes
        if status == 0:
            break
        shutil.rmtree(directory)
        shutil.copytree(pristine, directory)
    print(json.dumps({"outcomes": outcomes, "left": names_in(directory)}))


def killed_at_random(directory: Path, kind: str) -> None:
    """A run with a checkpoint after each step, killed ten times from outside; then it goes on for five steps."""

    def run(until: int) -> None:
        state, checkpoints = new_state(random.SystemRandom().randrange(1000)), RunCheckpoints(directory)
        if checkpoints.load_newest(state) is None:
            state = new_state(1)
        for step in range(state.values["step"] + 1, until + 1):
            train(state, step)
            checkpoints.save(step, state, score=state.values["losses"][-1])

    warm_up()
    drawn, steps = random.Random(5), [0]

    def newest() -> int:
        return max([int(path.name[5:]) for path in directory.glob("step_*")], default=0)

    def wait() -> None:  # a short time: while it starts, or, every second time, after it has come forward
        deadline = time.monotonic() + 60
        while len(steps) % 2 and newest() == steps[-1] and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(drawn.uniform(0, 0.08))

    for _ in range(10):
        assert forked(lambda: run(10**6), kill_after=wait) == -signal.SIGKILL, steps
        steps.append(newest())
    steps.append(steps[-1] + 5)
    assert forked(lambda: run(steps[-1])) == 0
    print(json.dumps({"steps": steps}))


def disk_full(directory: Path, kind: str) -> None:
    """The kernel refuses to let files grow beyond 2 kB while the second checkpoint is written."""
    state, checkpoints = new_state(1), RunCheckpoints(directory)
    train(state, 1)
    checkpoints.save(1, state)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        checkpoints.save(2, state)
    except CheckpointError as error:
        print(json.dumps({"error": str(error), "left": names_in(directory)}))


def terminated(directory: Path, kind: str) -> None:
    """SIGTERM while a shard is written, with a handler that exits."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    plain = FileSystem.create_stream

    def create_stream(self: FileSystem, path: Any, mode: str) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, path, mode)

    FileSystem.create_stream = create_stream  # type: ignore[method-assign]
    state = new_state(1)
    train(state, 1)
    RunCheckpoints(directory).save(1, state)


def start(action: Callable[[Path, str], None], directory: Path, kind: str = "plain", *, processes: int = 1) -> Any:
    """Runs an action of this file in other processes; with several, under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    paths = os.pathsep.join([str(ROOT), str(ROOT / "train")])
    return subprocess.run(
        [sys.executable, *launcher, __file__, action.__name__, str(directory), kind],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


# ---- bit for bit ---------------------------------------------------------------------------------------------------


def test_continuing_equals_not_interrupting(tmp_path):
    whole, at_3 = content_at(6), content_at(3)
    first = new_state(1)
    train(first, 3)
    RunCheckpoints(tmp_path).save(3, first)
    assert_same(content(first), at_3)  # saving changes nothing, no generator either
    resumed = new_state(2)
    assert RunCheckpoints(tmp_path).load_newest(resumed) == 3
    assert_same(content(resumed), at_3)
    train(resumed, 6)
    assert_same(content(resumed), whole)
    assert resumed.optimizers["net"].param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_processes_and_other_numbers_of_them(tmp_path, kind):
    alone = new_state(5)
    train(alone, 4)
    expected = without_generators(content(alone)[0])
    RunCheckpoints(tmp_path / "one").save(4, alone)
    ran = start(two_processes, tmp_path, kind, processes=2)
    assert ran.returncode == 0, ran.stderr[-3000:]

    of_one = load_file(tmp_path / "one.safetensors")
    assert of_one.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(of_one[key], expected[key])] == []
    assert "no random generators of process 1" in ran.stderr

    checkpoint = tmp_path / "two" / "step_00000003"
    of_two = load_file(tmp_path / "two.safetensors")
    loaded = new_state(6)
    assert RunCheckpoints(tmp_path / "two").load_newest(loaded) == 3
    tensors = content(loaded)[0]
    assert [key for key in of_two if not torch.equal(of_two[key], tensors[key])] == []
    shards = [load_file(path) for path in sorted(checkpoint.glob("shard-*"))]
    assert len(shards) == 2  # both processes wrote
    elements = sum(tensor.numel() for shard in shards for tensor in without_generators(shard).values())
    assert elements == sum(tensor.numel() for tensor in of_two.values())  # and everything once
    net = weights(checkpoint, "models.net.")
    assert net.keys() == Net().state_dict().keys()
    assert all(torch.equal(tensor, of_two[f"models.net.{key}"]) for key, tensor in net.items())
    assert {f"ema.{key}" for key in weights(checkpoint, "ema.")} == {key for key in of_two if key.startswith("ema.")}


def test_large_states_are_split_into_files_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr("var_train.checkpoint_files.FILE_BYTES", 200)
    state = new_state(1)
    train(state, 2)
    expected = content(state)
    path = RunCheckpoints(tmp_path).save(2, state)
    assert len(list(path.glob("shard-*"))) > 2
    loaded = new_state(2)
    assert RunCheckpoints(tmp_path).load_newest(loaded) == 2
    assert_same(content(loaded), expected)


def test_before_the_first_step_and_parameters_without_gradient(tmp_path):
    """The optimizer has no state for them; asking for it would count a step that was none."""

    def state(seed: int) -> RunState:
        torch.manual_seed(seed)
        nets = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("used", "unused", "frozen")})
        nets["frozen"].requires_grad_(False)
        conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return RunState(
            models={"nets": nets, "conv": conv},
            optimizers={"nets": torch.optim.AdamW(nets.parameters()), "conv": torch.optim.AdamW(conv.parameters())},
        )

    def step(run: RunState) -> None:
        run.optimizers["nets"].zero_grad()
        run.models["nets"]["used"](torch.ones(1, 2)).square().sum().backward()
        run.optimizers["nets"].step()

    first, loaded, again = state(1), state(2), state(3)
    RunCheckpoints(tmp_path / "a").save(0, first)
    assert not first.optimizers["nets"].state
    step(loaded)  # what it has is forgotten
    assert RunCheckpoints(tmp_path / "a").load_newest(loaded) == 0
    assert not loaded.optimizers["nets"].state
    for run in (first, loaded):
        step(run)
    assert_same(content(loaded), content(first))
    RunCheckpoints(tmp_path / "b").save(1, first)
    assert RunCheckpoints(tmp_path / "b").load_newest(again) == 1
    assert len(again.optimizers["nets"].state) == 2
    assert not again.optimizers["conv"].state
    assert again.models["conv"].weight.is_contiguous(memory_format=torch.channels_last)
    for run in (first, again):
        step(run)
    assert_same(content(again), content(first))


def test_values_come_back_as_json_has_them(tmp_path):
    values = {"schedule": {10: 0.5, 9: 0.25}, "crops": (1, 2), "metric": float("inf"), "name": "Löwe", "none": None}
    RunCheckpoints(tmp_path).save(1, RunState(models={"net": Net()}, values=values))
    loaded = RunState(models={"net": Net()})
    assert RunCheckpoints(tmp_path).load_newest(loaded) == 1
    assert loaded.values == values | {"schedule": {"10": 0.5, "9": 0.25}, "crops": [1, 2]}


# ---- kills ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_kill_at_any_event_leaves_a_whole_checkpoint(tmp_path):
    ran = start(killed_at_every_event, tmp_path / "checkpoints")
    assert ran.returncode == 0, ran.stderr[-3000:]
    result = json.loads(ran.stdout)
    outcomes = result["outcomes"]
    assert len(outcomes) > 15  # events of one save
    assert outcomes == sorted(outcomes)  # the old one up to some event, the new one after it
    assert outcomes[0] == 2
    assert outcomes[-1] == 3
    assert result["left"] == ["step_00000003"]


def test_ten_kills_at_random_times_change_nothing(tmp_path):
    ran = start(killed_at_random, tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    steps = json.loads(ran.stdout)["steps"]
    assert len(steps) == 12
    assert steps == sorted(steps)
    assert len(set(steps)) > 5  # it did come forward between the kills
    whole, killed = content_at(steps[-1]), new_state(2)
    assert RunCheckpoints(tmp_path).load_newest(killed) == steps[-1]
    assert_same(content(killed), whole)


@pytest.mark.slow
def test_one_of_two_processes_killed_in_the_middle_of_its_file(tmp_path):
    ran = start(one_of_two_is_killed, tmp_path, "fsdp", processes=2)
    assert ran.returncode != 0
    partial = tmp_path / "two" / ".partial-step_00000002"
    assert [path.stat().st_size for path in partial.glob("shard-00002-*")] == [100]
    state = new_state(1)
    assert RunCheckpoints(tmp_path / "two").load_newest(state) == 1
    assert names_in(tmp_path / "two") == ["step_00000001"]


def test_sigterm_while_saving_still_exits(tmp_path):
    """PyTorch collects even SystemExit into an exception of its own; it must come out as it was."""
    ran = start(terminated, tmp_path)
    assert ran.returncode == 143, ran.stderr[-2000:]


# ---- damage --------------------------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Checkpoints of steps 1, 2 and 3."""
    state, checkpoints = new_state(1), RunCheckpoints(tmp_path / "checkpoints", keep=3)
    for step in (1, 2, 3):
        train(state, step)
        checkpoints.save(step, state)
    return checkpoints.directory


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    "truncated shard": (lambda path: truncate(shard_of(path)), r"shard-\S+ has \d+ bytes, expected \d+"),
    "empty shard": (lambda path: os.truncate(shard_of(path), 0), r"shard-\S+ has 0 bytes"),
    "missing shard": (lambda path: shard_of(path).unlink(), r"shard-\S+ is missing"),
    "flipped byte of data": (lambda path: flip_byte(shard_of(path), -1), r"shard-\S+ is altered: its sha256"),
    "flipped byte of header": (lambda path: flip_byte(shard_of(path), 20), r"shard-\S+ is altered: its sha256"),
    "missing manifest": (lambda path: (path / MANIFEST).unlink(), "manifest.json is missing"),
    "truncated manifest": (lambda path: truncate(path / MANIFEST), "manifest.json is altered or truncated"),
    "empty manifest": (lambda path: os.truncate(path / MANIFEST, 0), "manifest.json is altered or truncated"),
    "deep manifest": (lambda path: (path / MANIFEST).write_text("[" * 10**5), "manifest.json is altered or truncated"),
    "manifest is a list": (lambda path: (path / MANIFEST).write_text("[]"), "manifest.json is altered or truncated"),
    "other step": (
        lambda path: shutil.rmtree(path) or shutil.copytree(path.with_name("step_00000001"), path),
        "step 1",
    ),
    "stray file": (lambda path: save_file({"a": torch.ones(1)}, path / "x.safetensors"), "x.safetensors is not in"),
    "nothing in it": (lambda path: shutil.rmtree(path) or path.mkdir(), "manifest.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_passed_over_and_said(three, caplog, damage):
    action, message = DAMAGES[damage]
    action(three / "step_00000003")
    state, expected = new_state(2), content_at(2)
    assert RunCheckpoints(three).load_newest(state) == 2
    assert_same(content(state), expected)
    lines = [record.getMessage() for record in caplog.records if record.name == "var_train"]
    assert len(lines) == 1
    assert re.search(rf"step_00000003 is damaged \(.*{message}.*\); falling back to the checkpoint before", lines[0])


def test_every_flipped_bit_of_a_manifest_is_noticed_or_means_the_same(three):
    path = three / "step_00000003" / MANIFEST
    original, (sealed, problem) = path.read_bytes(), checked_manifest(path.parent)
    assert problem == ""
    noticed = 0
    for place in range(0, len(original), 5):
        path.write_bytes(original)
        flip_byte(path, place)
        got, problem = checked_manifest(path.parent)
        noticed += bool(problem)
        assert problem or got == sealed, place
    assert noticed > len(original) // 5 * 0.6  # all but the indentation


def test_two_damaged_ones_then_the_oldest_and_none_at_last(three, caplog):
    for step in (3, 2):
        truncate(shard_of(three / f"step_0000000{step}"))
    assert RunCheckpoints(three).load_newest(new_state(2)) == 1
    assert len([record for record in caplog.records if record.name == "var_train"]) == 2
    truncate(shard_of(three / "step_00000001"))
    with pytest.raises(CheckpointError, match=r"all 3 checkpoints are damaged; restore one, or remove them"):
        RunCheckpoints(three).load_newest(new_state(2))
    with pytest.raises(CheckpointError, match=r"step_00000001: damaged \(shard-.*\); take another checkpoint"):
        weights(three / "step_00000001", "models.net.")


def test_a_damaged_one_never_counts_as_kept_and_goes_when_a_good_one_is_there(three):
    flip_byte(shard_of(three / "step_00000003"), -1)
    state, checkpoints = new_state(2), RunCheckpoints(three, keep=2)
    assert checkpoints.load_newest(state) == 2
    assert names_in(three) == ["step_00000001", "step_00000002", "step_00000003"]  # loading deletes none
    train(state, 3)
    checkpoints.save(3, state)
    assert names_in(three) == ["step_00000002", "step_00000003"]
    assert RunCheckpoints(three).load_newest(new_state(3)) == 3


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_loading_runs_no_code_of_a_forger(three):
    """Everything is sealed again, as a forger would; PyTorch's own reader would unpickle `.metadata`."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(three / "executed"),)

    newest = three / "step_00000003"
    (newest / ".metadata").write_bytes(pickle.dumps(Bomb()))
    content = json.loads((newest / MANIFEST).read_text())
    sealed = {key: value for key, value in content.items() if key != "sha256"}
    sealed["files"][".metadata"] = seal_of(newest / ".metadata")
    (newest / MANIFEST).unlink()
    run_checkpoints.write_manifest(newest, sealed)
    assert RunCheckpoints(three).load_newest(new_state(2)) == 3
    assert not (three / "executed").exists()
    with pytest.raises(CheckpointException):
        torch.distributed.checkpoint.load({}, checkpoint_id=newest, no_dist=True)
    assert (three / "executed").is_dir()  # the bomb was live


def seal_of(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


# ---- what is kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "scores", "kept"),
    [
        (1, [None, None, None], [3]),
        (2, [None, None, None, None], [3, 4]),
        (2, [0.5, 0.1, 0.9, 0.8, 0.7], [2, 4, 5]),
        (2, [0.5, 0.4, 0.3, 0.2], [3, 4]),
        (1, [0.1, float("nan"), 0.2, None], [1, 4]),
        (1, [float("-inf"), 3.0, 4.0], [2, 3]),
    ],
)
def test_the_last_and_the_best_are_kept(tmp_path, keep, scores, kept):
    for step, score in enumerate(scores, start=1):
        RunCheckpoints(tmp_path, keep).save(step, RunState(models={"net": Net()}), score=score)
    assert names_in(tmp_path) == [f"step_{step:08d}" for step in kept]


def test_the_old_ones_are_there_until_the_new_one_is(tmp_path, monkeypatch):
    checkpoints, state = RunCheckpoints(tmp_path, keep=1), RunState(models={"net": Net()})
    checkpoints.save(1, state)
    seen = []
    plain = RunCheckpoints._delete
    monkeypatch.setattr(
        RunCheckpoints, "_delete", lambda self, path: (seen.append(names_in(tmp_path)), plain(self, path))
    )
    checkpoints.save(2, state)
    assert seen == [["step_00000001", "step_00000002"]]
    _, problem = checked_manifest(tmp_path / "step_00000002")
    assert problem == ""


def test_a_step_saved_twice_is_the_later_one(tmp_path):
    checkpoints, state = RunCheckpoints(tmp_path), RunState(models={"net": Net()}, values={"a": 1})
    checkpoints.save(7, state)
    state.values = {"a": 2}
    checkpoints.save(7, state)
    loaded = RunState(models={"net": Net()})
    assert checkpoints.load_newest(loaded) == 7
    assert loaded.values == {"a": 2}


def test_no_checkpoints_yet(tmp_path):
    state = new_state(1)
    before = content(state)
    assert RunCheckpoints(tmp_path / "none" / "yet").load_newest(state) is None
    assert_same(content(state), before)
    assert names_in(tmp_path) == []


def test_other_names_are_left_alone(tmp_path):
    (tmp_path / "step_of_mine").mkdir()
    (tmp_path / "notes.txt").write_text("keep")
    checkpoints = RunCheckpoints(tmp_path, keep=1)
    for step in (1, 2):
        checkpoints.save(step, RunState(models={"net": Net()}))
    assert checkpoints.load_newest(RunState(models={"net": Net()})) == 2
    assert names_in(tmp_path) == ["notes.txt", "step_00000002", "step_of_mine"]


# ---- refusals ------------------------------------------------------------------------------------------------------


def other_groups(state: RunState) -> None:
    state.optimizers["net"] = torch.optim.AdamW(state.models["net"].parameters())


def second_model(state: RunState) -> None:
    state.models["discriminator"] = nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.ema.clear(), r"4 difference|unexpected ema\.body\.0\.bias \(5,\)"),
        (lambda state: state.models["net"].double(), r"models\.net\.body\.0\.bias is \(5,\) torch\.float32, expected"),
        (lambda state: state.models["net"].body.append(nn.Linear(1, 2)), r"missing models\.net\.body\.4\.bias \(2,\)"),
        (second_model, r"2 difference\(s\): missing models\.discriminator\.bias \(1,\)"),
        (other_groups, r"the groups of optimizer net hold other parameters"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_not_passed_over(three, change, message):
    state = new_state(2)
    change(state)
    with pytest.raises(CheckpointError, match=message) as caught:
        RunCheckpoints(three).load_newest(state)
    assert str(three / "step_00000003") in str(caught.value)
    assert "continue with the configuration that it was made with" in str(caught.value)


def test_another_width_and_a_missing_scaler_are_named(three, tmp_path):
    with pytest.raises(CheckpointError, match=r"body\.0\.weight is \(5, 3\) torch\.float32, expected \(7, 3\)"):
        RunCheckpoints(three).load_newest(new_state(2, width=7))
    plain = RunState(models={"net": Net()})
    RunCheckpoints(tmp_path / "plain").save(1, plain)
    plain.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(CheckpointError, match=r"1 difference.*saved without a gradient scaler"):
        RunCheckpoints(tmp_path / "plain").load_newest(plain)


def test_saving_before_a_newer_one_is_refused(three):
    with pytest.raises(CheckpointError, match=r"got step 2 to save, expected one after step_00000003; continue from"):
        RunCheckpoints(three).save(2, new_state(1))


def test_unknown_part_of_a_checkpoint(three):
    with pytest.raises(CheckpointError, match=r"holds nothing under 'models.var.'; known: ema\., models\.net\."):
        weights(three / "step_00000003", "models.var.")


def test_an_earlier_prefix_goes_before_a_later_one_in_one_verified_reading(three, monkeypatch):
    path = three / "step_00000003"
    ema, net = weights(path, "ema."), weights(path, "models.net.")
    assert [key for key in ema if torch.equal(ema[key], net[key])] == []
    read = []
    monkeypatch.setattr(run_checkpoints, "damages", lambda *a: (read.append(a[0]), damages(*a))[1])
    merged = weights(path, "ema.", "models.net.")
    assert read == [path]
    assert merged.keys() == net.keys() == ema.keys() | {"calls"}
    assert all(torch.equal(merged[key], ema.get(key, net[key])) for key in net)
    assert all(torch.equal(tensor, net[key]) for key, tensor in weights(path, "models.net.", "ema.").items())
    assert weights(path, "models.var.", "ema.").keys() == ema.keys()
    with pytest.raises(
        CheckpointError, match=r"nothing under 'models\.a\.' or 'models\.b\.'; known: ema\., models\.net"
    ):
        weights(path, "models.a.", "models.b.")


def test_headers_tell_names_shapes_and_types(three):
    stored = stored_tensors(three / "step_00000003")
    tensors, _ = content_at(3)
    assert {key: (form.size, form.properties.dtype) for key, form in stored.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()
    }


@pytest.mark.parametrize("damage", ["truncated shard", "empty shard", "missing shard", "flipped byte of header"])
def test_headers_that_cannot_be_read_are_damage(three, damage):
    DAMAGES[damage][0](three / "step_00000003")
    with pytest.raises(CheckpointError, match=r"step_00000003: damaged \(.+\); take another checkpoint of") as caught:
        stored_tensors(three / "step_00000003")
    assert "\n" not in str(caught.value)


def test_the_newest_of_a_directory(three):
    (three / "step_of_mine").mkdir()
    (three / ".partial-step_00000004").mkdir()
    assert newest_of(three) == three / "step_00000003"
    assert newest_of(three / "not" / "there") is None


def test_misuse_is_named():
    with pytest.raises(ValueError, match=r"optimizers: got \['vqvae'\], expected names of models: \['net'\]"):
        RunState(models={"net": Net()}, optimizers={"vqvae": torch.optim.AdamW(Net().parameters())})
    with pytest.raises(ValueError, match="keep: got 0, expected at least 1"):
        RunCheckpoints(Path("x"), keep=0)


def test_a_disk_that_fills_up_while_saving(tmp_path):
    ran = start(disk_full, tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    result = json.loads(ran.stdout)
    assert re.search(
        r"step_00000002: cannot write \(File too large\); earlier checkpoints are as they", result["error"]
    )
    assert result["left"] == ["step_00000001"]
    assert RunCheckpoints(tmp_path).load_newest(new_state(2)) == 1


@pytest.mark.parametrize("place", ["shard", "manifest"])
def test_no_space_left_in_any_file(three, monkeypatch, place):
    if place == "shard":
        monkeypatch.setattr(FileSystem, "create_stream", no_space)
    else:
        monkeypatch.setattr(run_checkpoints, "write_manifest", no_space)
    with pytest.raises(CheckpointError, match=r"step_00000004: cannot write \(No space left on device\)"):
        RunCheckpoints(three).save(4, new_state(1))
    assert names_in(three) == ["step_00000001", "step_00000002", "step_00000003"]
    for name in names_in(three):
        manifest, problem = checked_manifest(three / name)
        assert (problem, damages(three / name, manifest, manifest["files"])) == ("", {})


def test_the_estimate_is_the_size_that_comes_out(tmp_path):
    state = RunState(models={"net": nn.Linear(300, 400)})
    state.ema = {name: p.detach().clone() for name, p in state.models["net"].named_parameters()}
    state.optimizers = {"net": torch.optim.AdamW(state.models["net"].parameters())}
    estimate = checkpoint_bytes(state)
    assert estimate == 4 * 4 * (300 * 400 + 400)
    state.models["net"](torch.ones(1, 300)).sum().backward()
    state.optimizers["net"].step()
    assert checkpoint_bytes(state) == estimate
    path = RunCheckpoints(tmp_path).save(1, state)
    written = sum(file.stat().st_size for file in path.iterdir())
    assert estimate < written < estimate * 1.05  # headers, generators, manifest


def test_too_little_disk_is_known_before_training(three, monkeypatch):
    held = sum(file.stat().st_size for file in three.rglob("*") if file.is_file())
    free = 4 * 2**20 - held
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    RunCheckpoints(three, keep=2).check_space(2**20)  # just enough, with those that will be deleted
    with pytest.raises(CheckpointError) as caught:
        RunCheckpoints(three, keep=3).check_space(2**20)
    assert str(caught.value) == (
        f"{three}: too little disk: got 4.00 MiB free, expected 5.00 MiB for 5 checkpoints of 1.00 MiB; "
        "make room or choose another place"
    )
    with pytest.raises(CheckpointError, match=r"expected 8\.00 GiB for 4 checkpoints of 2\.00 GiB"):
        RunCheckpoints(three.parent / "not" / "there", keep=2).check_space(2**31)
    assert not (three.parent / "not").exists()


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/run: cannot write \(Not a directory: .*file\); choose another"):
        RunCheckpoints(tmp_path / "file" / "run").check_space(1)
    with pytest.raises(CheckpointError, match=r"cannot write \(.*\); earlier checkpoints are as they were"):
        RunCheckpoints(tmp_path / "file" / "run").save(1, RunState(models={"net": Net()}))


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc")
def test_a_place_that_refuses_even_root():
    with pytest.raises(CheckpointError, match=r"/proc/self/run: cannot write \(.+: /proc/self\); choose another place"):
        RunCheckpoints(Path("/proc/self/run")).check_space(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    globals()[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
    if dist.is_initialized():
        dist.destroy_process_group()
