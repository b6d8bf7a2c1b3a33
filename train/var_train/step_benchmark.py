"""Seconds and memory of a training step at the published sizes, from images and from stored tokens, one row a process.

    python -m var_train.step_benchmark --preset d16 --batch 1 --out docs/results/training-cpu.json

Inside the timed region: waiting for the batch (decoding and encoding where it starts from images), forward, backward,
update. Random weights and pictures; row after row is written, so a run that is cut short still counts.
"""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from var_deploy.config import ConfigError
from var_deploy.errors import run_command

from .configuration import VARRun, VQVAERun
from .image_data import Crop, GlobalBatches
from .model_flops import PASSES, forward_flops
from .presets import PRESETS, preset_configs
from .token_sources import EncodedImages, Tokens
from .train_var import VARTraining
from .train_vqvae import VQVAETraining
from .updates import DTYPES
from .var import VAR
from .vqvae import VQVAE


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One row."""

    preset: str  #: or "vqvae": the published one
    start: str  #: "tokens" or "images"
    attention: str  #: "dense" or "flex"; "" for the VQVAE
    precision: str
    batch: int
    checkpoint_blocks: bool = False


class RandomImages:
    """JPEG files of 300×280 pixels that lie in memory; see `image_files.ImageFiles`."""

    class_names = tuple(str(label) for label in range(1000))

    def __init__(self, count: int) -> None:
        self.labels_N = np.arange(count, dtype=np.int64) % 1000
        content = io.BytesIO()
        noise_HW3 = np.random.default_rng(0).integers(0, 256, (70, 75, 3), dtype=np.uint8)
        Image.fromarray(noise_HW3).resize((300, 280), Image.Resampling.BICUBIC).save(content, format="JPEG")
        self._content = content.getvalue()

    def __len__(self) -> int:
        return len(self.labels_N)

    def name(self, index: int) -> str:
        return f"random image {index}"

    def read(self, index: int) -> bytes:
        return self._content


class RandomTokens:
    """Tokens that lie in memory; see `token_sources.TokenSource`."""

    class_names = RandomImages.class_names

    def __init__(self, count: int, tokens: int, vocab_size: int, device: torch.device) -> None:
        self._tokens_NL = torch.randint(vocab_size, (count, tokens), device=device)

    def __len__(self) -> int:
        return len(self._tokens_NL)

    def name(self, index: int) -> str:
        return f"random tokens {index}"

    def training(self, batches: GlobalBatches, rows: slice, start: int) -> Iterator[Tokens]:
        for iteration in itertools.count(start):
            indices_B = torch.tensor(batches.indices(iteration)[1][rows])
            tokens_BL = self._tokens_NL[indices_B.to(self._tokens_NL.device)]
            yield Tokens(tokens_BL=tokens_BL, labels_B=indices_B.to(tokens_BL.device) % 1000, iteration=iteration)

    def evaluation(self, size: int) -> Iterator[Tokens]:
        return iter(())


def measure(case: Case, steps: int) -> dict[str, Any]:
    """The row of a case: medians over `steps` steps, after two that are not counted."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = max(16, 2 * case.batch)
    flops = 0
    training: Any
    if case.preset == "vqvae":
        training = _vqvae_training(case, count, device)
    else:
        training = _var_training(case, count, device)
        flops = PASSES * forward_flops(preset_configs(case.preset)[0]) * case.batch
    batches = training.batches(0)
    seconds = []
    for _ in range(2 + steps):
        began = time.perf_counter()
        training.step(next(batches), measure=False)  # it ends with the loss, which waits for the device
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    counted = seconds[2:]
    median = statistics.median(counted)
    row = asdict(case) | {
        "seconds": median,
        "seconds_min": min(counted),
        "seconds_max": max(counted),
        "steps": steps,
        "images_per_second": case.batch / median,
        "memory_bytes": _peak(device),
    }
    if flops:
        row |= {"flops": flops, "flops_per_second": flops / median, "product_flops_per_second": _ceiling(case, device)}
    return row


def _var_training(case: Case, count: int, device: torch.device) -> VARTraining:
    config, vqvae_config = preset_configs(case.preset)
    run = VARRun.model_validate(
        {
            "data": {"path": "", "batch": case.batch, "workers": 0},
            "model": {"vqvae": "", "preset": case.preset},
            "optimiser": {"precision": case.precision},
            "execution": {"attention": case.attention, "checkpoint_blocks": case.checkpoint_blocks},
        }
    )
    with device:
        vqvae = VQVAE(vqvae_config).eval().requires_grad_(False)
        var = VAR(config)
    var.init_weights()
    source: Any = RandomTokens(count, config.num_tokens, config.vocab_size, device)
    if case.start == "images":
        crop = Crop(side=vqvae_config.image_size, random=True)
        source = EncodedImages(RandomImages(count), crop, vqvae, device=device, at_once=case.batch, workers=0, seed=0)
    return VARTraining(run, var, vqvae, source, None, device)


def _vqvae_training(case: Case, count: int, device: torch.device) -> VQVAETraining:
    _, config = preset_configs("d16")
    run = VQVAERun.model_validate(
        {
            "data": {"path": "", "batch": case.batch, "workers": 0},
            "model": {"patch_nums": config.patch_nums},
            "optimiser": {"precision": case.precision, "iterations": 1000},
            "loss": {"adversarial": 0.0, "revive_every": 1000},
        }
    )
    with device:
        vqvae = VQVAE(config)
    return VQVAETraining(run, vqvae, None, None, RandomImages(count), None, device)


def _peak(device: torch.device) -> int:
    """Bytes: of the process on a CPU, PyTorch and all; allocated by PyTorch on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _ceiling(case: Case, device: torch.device) -> float:
    """Operations per second of a matrix product of 2048 rows and columns, the best of five."""
    dtype = DTYPES[case.precision]
    a, b = torch.randn(2, 2048, 2048, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best


def _in_child(case: Case, steps: int, results: Any) -> None:
    torch.manual_seed(0)
    results.put(measure(case, steps))


def measured_apart(case: Case, steps: int) -> dict[str, Any]:
    """`measure` in a process of its own, so that memory is this row's. A row without numbers where it died."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_in_child, args=(case, steps, results))
    process.start()
    while process.is_alive() and results.empty():
        process.join(0.2)
    row = results.get() if not results.empty() else asdict(case) | {"failed": f"exit status {process.exitcode}"}
    process.join()
    return row


def machine() -> dict[str, Any]:
    """Where rows were measured."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    """A table for people."""
    table = Table(
        "preset", "from", "attention", "precision", "batch", "s/step (min–max)", "img/s", "peak GB", "of product"
    )
    for row in rows:
        head = (row["preset"], row["start"], row["attention"], row["precision"], str(row["batch"]))
        if "failed" in row:
            table.add_row(*head, row["failed"], "", "", "")
            continue
        part = f"{row['flops_per_second'] / row['product_flops_per_second']:.0%}" if "flops" in row else ""
        span = f"{row['seconds']:.2f} ({row['seconds_min']:.2f}–{row['seconds_max']:.2f})"
        table.add_row(*head, span, f"{row['images_per_second']:.3g}", f"{row['memory_bytes'] / 1e9:.2f}", part)
    console.print(table)


def cases(presets: list[str], batch: int, precision: str) -> list[Case]:
    """The rows: every preset from tokens, with both kinds of attention on a GPU; one from images; the VQVAE."""
    kinds = ("flex", "dense") if torch.cuda.is_available() else ("dense",)
    both = {"precision": precision, "batch": batch}
    found = [Case(preset=p, start="tokens", attention=kind, **both) for p in presets for kind in kinds]  # type: ignore[arg-type]
    found.insert(1, Case(preset=presets[0], start="images", attention=kinds[0], **both))  # type: ignore[arg-type]
    return [*found, Case(preset="vqvae", start="images", attention="", **both)]  # type: ignore[arg-type]


def main(
    preset: Annotated[list[str], typer.Option(help=f"Of {', '.join(PRESETS)}; repeat for more.")] = ["d12", "d16"],  # noqa: B006
    batch: Annotated[int, typer.Option(min=1)] = 1,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    steps: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON, rewritten after each row.")] = None,
) -> None:
    """Measure training steps."""
    unknown = [name for name in preset if name not in PRESETS]
    if unknown:
        raise ConfigError(f"--preset: got {unknown[0]!r}, expected one of {', '.join(PRESETS)}")
    if precision not in ("fp32", "bf16", "fp16"):
        raise ConfigError(f"--precision: got {precision!r}, expected fp32, bf16 or fp16")
    rows: list[dict[str, Any]] = []
    for case in cases(preset, batch, precision):
        rows.append(measured_apart(case, steps))
        if out is not None:
            partial = out.with_name(f".partial-{out.name}")
            partial.write_text(json.dumps(machine() | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
            partial.replace(out)
    print_rows(rows, Console() if sys.stdout.isatty() else Console(width=120))


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
