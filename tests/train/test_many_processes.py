"""Runs in two processes, by DDP and by FSDP2, are the run in one process up to rounding.

A global batch is the same images with the same random numbers in any number of processes; what differs is the order in
which a sum over it is taken.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("pydantic")
pytest.importorskip("tensorboard")

from var_train.run_checkpoints import manifest_of, newest_of
from var_train.watch import BOARD_FOLDER, read_metrics

VAR = {"execution.attention": "dense", "keeping.checkpoint_every": 10}  # "auto" warns of taking it
VQVAE = {"loss.adversarial_start": 0.3, "keeping.checkpoint_every": 10}
NO_CRITIC = {"loss.adversarial": 0.0, "keeping.checkpoint_every": 10}


def start_two(warm: Any, *arguments: object) -> list[Any]:
    """The same command in two processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [warm.start(*arguments, RANK=str(i), LOCAL_RANK=str(i), **common) for i in range(2)]


def wait_for(iteration: int, out: Path, is_alive: Any) -> None:
    deadline = time.monotonic() + 120
    while not any(line["iteration"] >= iteration for line in read_metrics(out)):
        assert is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def told(out: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in read_metrics(out)]


def processes_about(out: Path) -> list[str]:
    """Those that have a path in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            if str(out).encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


@pytest.fixture(scope="module")
def alone(warm: Any, var_toml: Any, vqvae_toml: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`alone("var")`: folder of a run in one process."""
    folders: dict[str, Path] = {}

    def run(kind: str, **changes: Any) -> Path:
        key = json.dumps([kind, changes])
        if key not in folders:
            folder = tmp_path_factory.mktemp(kind)
            toml = (var_toml if kind == "var" else vqvae_toml)(folder, **changes)
            process = warm.run(kind, toml, "--out", folder / "run")
            assert process.status == 0, process.stderr
            folders[key] = folder / "run"
        return folders[key]

    return run


@pytest.mark.parametrize(
    ("kind", "changes", "how", "tolerance", "of_weights"),
    [
        # Adam divides by the root of a running square: where a gradient is nearly 0, its rounding becomes a step.
        ("var", VAR, {"execution.parallel": "ddp", "optimiser.accumulate": 2}, 1e-5, 1e-4),
        ("var", VAR, {"execution.parallel": "fsdp", "optimiser.accumulate": 2}, 1e-5, 1e-4),
        ("vqvae", NO_CRITIC, {"optimiser.accumulate": 2}, 1e-5, 1e-4),
        # The weight of the adversarial term is a ratio of two gradients' norms, which enlarges their rounding.
        ("vqvae", VQVAE, {}, 1e-4, 1e-3),
    ],
    ids=["VAR, DDP", "VAR, FSDP2", "VQVAE", "VQVAE with a discriminator"],
)
def test_losses_and_weights_are_those_of_one_process(
    alone, warm, var_toml, vqvae_toml, tmp_path, kind, changes, how, tolerance, of_weights
):
    one, two = alone(kind, **changes), tmp_path / "run"
    toml = (var_toml if kind == "var" else vqvae_toml)(tmp_path, **changes, **how)
    first, second = start_two(warm, kind, toml, "--out", two)
    assert (first.wait(), second.wait()) == (0, 0), first.stderr + second.stderr
    assert (first.stderr, second.stderr) == ("", "")
    assert (first.stdout, second.stdout) == (f"{two / f'{kind}.safetensors'}\n", "")

    ours, theirs = told(two), told(one)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]  # told by one process only
    assert [line["iteration"] for line in ours if "loss" in line] == list(range(1, 21))
    assert len(list((two / BOARD_FOLDER).iterdir())) == 1
    for our, their in zip(ours, theirs, strict=True):
        for name in our.keys() & {"loss", "validation_loss", "validation_rpsnr", "validation_rssim"}:
            assert our[name] == pytest.approx(their[name], abs=tolerance, rel=0), (our["iteration"], name)
    revived = [[line.get("revived", 0.0) for line in lines] for lines in (ours, theirs)]
    assert revived[0] == revived[1]
    assert (sum(revived[0]) > 61) == (kind == "vqvae")  # some were placed anew later than all were at the start

    finished = [load_file(out / f"{kind}.safetensors") for out in (two, one)]
    if kind == "vqvae":  # GroupNorm of single channels takes these away, so their gradients are nothing but rounding
        finished = [{key: w for key, w in state.items() if not key.endswith(".bias")} for state in finished]
    torch.testing.assert_close(*finished, rtol=0, atol=of_weights)


def test_torchrun_stopped_under_fsdp_goes_on_in_one_process_under_ddp(alone, warm, var_toml, tmp_path):
    """The launcher gets SIGTERM, as from a scheduler; the shards that two processes leave are one process's start."""
    toml, out = var_toml(tmp_path, **VAR, **{"execution.parallel": "fsdp"}), tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "var_train", "var", str(toml), "--out", str(out)]
    with subprocess.Popen(command, env=warm.environment, stderr=subprocess.PIPE, text=True) as process:
        wait_for(5, out, lambda: process.poll() is None)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "UserWarning" not in said
    assert processes_about(out) == []
    done = max(line["iteration"] for line in read_metrics(out))
    assert 5 <= done < 20
    assert said.count(f"{out}: stopped after iteration {done} of 20; the same command goes on from there") == 1
    newest = newest_of(out / "checkpoints")
    assert newest is not None
    assert newest.name == f"step_{done:08d}"
    assert len({name.split("-model")[0] for name in manifest_of(newest)["files"]}) == 2  # both wrote
    process = warm.run("var", toml, "--out", out, "--set", "execution.parallel=ddp")
    assert process.status == 0, process.stderr
    one = alone("var", **VAR)
    assert [line["loss"] for line in told(out) if "loss" in line] == pytest.approx(
        [line["loss"] for line in told(one) if "loss" in line], abs=1e-5, rel=0
    )
    torch.testing.assert_close(
        load_file(out / "var.safetensors"), load_file(one / "var.safetensors"), rtol=0, atol=1e-4
    )


def test_a_signal_that_comes_directly_and_through_the_launcher_is_one(warm, var_toml, tmp_path):
    """Slurm sends it to all processes of a job, and torchrun sends it on."""
    toml, out = var_toml(tmp_path, **VAR, **{"optimiser.iterations": 1000}), tmp_path / "run"
    processes = start_two(warm, "var", toml, "--out", out)
    wait_for(2, out, lambda: not processes[0].ended())
    for _ in range(2):
        for process in processes:
            process.send(signal.SIGTERM)
        time.sleep(0.01)
    assert [process.wait() for process in processes] == [143, 143]
    newest = newest_of(out / "checkpoints")
    assert newest is not None
    assert newest.name == f"step_{told(out)[-1]['iteration']:08d}"
    assert [process.stderr.count("stopped after iteration") for process in processes] == [1, 0]
