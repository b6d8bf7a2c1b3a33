"""One PyTorch thread: these tensors are tiny, and a second thread costs more than it gives. And what runs train on.

`small_images` and `small_vqvae` are read only. `var_toml(DIR, **{"data.batch": 4})` writes DIR/var.toml: the small run,
with these options changed, and those that are None left out. `vqvae_toml` does the same. `warm.start("var", CONFIG,
"--out", DIR)` runs `python -m var_train` in a process of its own, without the seconds of imports.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from var_deploy.config import VQVAEConfig

torch.set_num_threads(1)

WriteToml = Callable[..., Path]

CLASSES = ("across", "down", "slanting")
SCALES = (1, 2, 4)
SMALL_VQVAE = VQVAEConfig(
    patch_nums=SCALES, vocab_size=61, z_channels=8, ch=32, ch_mult=(1, 2), num_res_blocks=1
)  # images of 8 pixels


@pytest.fixture(scope="session")
def small_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and val/: 3 classes of 24 and 6 PNGs of 24×24 pixels, coloured gradients with noise."""
    root = tmp_path_factory.mktemp("small_images")
    random = np.random.default_rng(5)
    rising = np.linspace(0, 1, 24)
    slopes_3HW = np.stack(np.broadcast_arrays(rising, rising[:, None], (rising + rising[:, None]) / 2))
    for split, count in (("train", 24), ("val", 6)):
        for name, slope_HW in zip(CLASSES, slopes_3HW, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                low_3, high_3 = random.uniform(0, 255, (2, 3))
                image_HW3 = low_3 + slope_HW[..., None] * (high_3 - low_3) + random.normal(0, 12, (24, 24, 3))
                Image.fromarray(image_HW3.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02d}.png")
    return root


@pytest.fixture(scope="session")
def small_vqvae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a VQVAE of `SMALL_VQVAE` as a run leaves it, with random weights."""
    pytest.importorskip("pydantic")  # what trains needs it
    from var_train.presets import randomise
    from var_train.run_folder import write_finished
    from var_train.vqvae import VQVAE

    vqvae = VQVAE(SMALL_VQVAE)
    randomise(vqvae)
    path = tmp_path_factory.mktemp("small_vqvae") / "vqvae.safetensors"
    write_finished(path, vqvae.state_dict(), {"class_names": list(CLASSES), "patch_nums": list(SCALES)})
    return path


@pytest.fixture(scope="session")
def var_toml(small_images: Path, small_vqvae: Path) -> WriteToml:
    """`var_toml(directory, **changes)` → configuration file of a VAR run: 20 iterations, well below a second each."""
    options: dict[str, Any] = {
        "seed": 3,
        "data.path": str(small_images),
        "data.batch": 8,
        "data.workers": 0,
        "model.vqvae": str(small_vqvae),
        "model.depth": 2,
        "model.heads": 1,
        "model.drop_path": 0.2,
        "model.label_dropout": 0.2,
        **_common(learning_rate=3e-3),
    }
    return lambda directory, **changes: _written(directory / "var.toml", options | changes)


@pytest.fixture(scope="session")
def vqvae_toml(small_images: Path) -> WriteToml:
    """`vqvae_toml(directory, **changes)` → configuration file of a VQVAE run; a discriminator joins in half-way."""
    options: dict[str, Any] = {
        "seed": 3,
        "data.path": str(small_images),
        "data.batch": 8,
        "data.workers": 0,
        "model.patch_nums": list(SCALES),
        "model.vocab_size": 61,
        "model.z_channels": 8,
        "model.ch": 32,
        "model.ch_mult": [1, 2],
        "model.num_res_blocks": 1,
        "loss.perceptual": 0.0,
        "loss.discriminator_width": 8,
        "loss.discriminator_layers": 1,
        "loss.revive_every": 5,
        **_common(learning_rate=1e-3),
    }
    return lambda directory, **changes: _written(directory / "vqvae.toml", options | changes)


RUNS = 1000  #: the server's answer about a process that has not ended
SECONDS = 240  #: after which a process is taken to hang


class WarmProcesses:
    """The other side of the server in `warm_processes.py`."""

    def __init__(self, folder: Path) -> None:
        """`folder`: where the processes' output goes."""
        self._folder, self._started = folder, 0
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm_processes.py"))],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def environment(self) -> dict[str, str]:
        """For processes that are started anew, too."""
        root = Path(__file__).parents[2]
        paths = os.pathsep.join([str(root), str(root / "train")])
        return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    def start(self, *arguments: object, **environment: str) -> Process:
        """Starts `python -m var_train ARGUMENTS`, with some variables of the environment changed."""
        self._started += 1
        output = self._folder / f"{self._started:03d}"
        words = [str(argument) for argument in arguments]
        pid = self.ask({"arguments": words, "environment": environment, "output": str(output)})
        return Process(self, pid, output)

    def run(self, *arguments: object, **environment: str) -> Process:
        """Does so, and waits for its end."""
        process = self.start(*arguments, **environment)
        process.wait()
        return process

    def ask(self, request: dict[str, Any]) -> int:
        """The server's answer."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def close(self) -> None:
        """Ends the server and what it started."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


class Process:
    """A process of the server, the first of its session."""

    def __init__(self, processes: WarmProcesses, pid: int, output: Path) -> None:
        self._processes, self.pid, self._output = processes, pid, output
        self.status: int | None = None  #: once it was waited for

    def wait(self) -> int:
        """Its exit status; negative for a signal."""
        if not self.ended(SECONDS):
            self.send(signal.SIGKILL, group=True)
            raise TimeoutError(f"it hangs; until then it said: {self.stderr[-3000:]}")
        assert self.status is not None
        return self.status

    def ended(self, within: float = 0) -> bool:
        """Whether it has ended, or does so within some seconds."""
        if self.status is None:
            status = self._processes.ask({"wait": self.pid, "seconds": within})
            self.status = None if status == RUNS else status
        return self.status is not None

    def send(self, number: signal.Signals, *, group: bool = False) -> None:
        """A signal, to it alone or to its workers too, as a terminal does."""
        (os.killpg if group else os.kill)(self.pid, number)

    @property
    def stdout(self) -> str:
        return self._output.with_suffix(".out").read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self._output.with_suffix(".err").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmProcesses]:
    """Starts processes that train; see `WarmProcesses.start` and `Process`."""
    pytest.importorskip("pydantic")
    processes = WarmProcesses(tmp_path_factory.mktemp("warm"))
    yield processes
    processes.close()


def _common(learning_rate: float) -> dict[str, Any]:
    return {
        "optimiser.iterations": 20,
        "optimiser.learning_rate": learning_rate,
        "optimiser.precision": "fp32",
        "optimiser.ema": 0.9,
        "keeping.log_every": 1,
        "keeping.evaluate_every": 10,
        "keeping.checkpoint_every": 3,
        "keeping.pictures": 4,
    }


def _written(path: Path, options: dict[str, Any]) -> Path:
    """Dotted options as TOML; JSON's numbers, texts and lists are TOML's too."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in options.items() if value is not None]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")  # TOML has dotted keys
    return path
