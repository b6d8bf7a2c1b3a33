"""Tables for people: how the command line lays out what `inspect`, `verify` and `bench` return."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def inspection(data: dict[str, Any]) -> None:
    """A bundle or a checkpoint."""
    console = Console()
    console.print(f"[bold]{data['kind']}[/bold] {escape(data['path'])}")
    for name in ("var", "vqvae"):
        if name in data:
            _key_values(console, name, data[name])
    if data["kind"] == "checkpoint":
        console.print(f"file {_mega(data['size'])} MB")
    else:
        _bundle_parts(console, data)
    if "memory" in data:
        columns = ("batch", "rows", "weights", "caches", "logits", "activations (estimate)", "total")
        table = Table(*columns, title="memory while generating (MB)")
        for plan in data["memory"]:
            sizes = (plan[part] for part in ("weights", "caches", "logits", "activations", "total"))
            table.add_row(str(plan["batch"]), str(plan["rows"]), *(_mega(size) for size in sizes))
        console.print(table)


def _bundle_parts(console: Console, data: dict[str, Any]) -> None:
    rest = ("image_size", "precision", "sampling", "license", "source", "class_names")
    _key_values(console, "bundle", {key: data[key] for key in rest})
    _key_values(console, "parameters", {part: f"{count:,}" for part, count in data["parameters"].items()})
    _key_values(console, "files (MB)", {name: _mega(size) for name, size in data["files"].items()})


def parity(data: dict[str, Any]) -> None:
    """What `verify` found."""
    console = Console()
    table = Table(
        "scale", title=f"against the reference, greedy, classes {data['labels']}, guidance {data['guidance']}"
    )
    kinds = list(data["scales"])
    for kind in kinds:
        table.add_column(f"{kind}: logit error", justify="right")
        table.add_column("tokens equal", justify="right")
    for rows in zip(*data["scales"].values(), strict=True):
        cells = [cell for row in rows for cell in (f"{row['logit_error']:.1e}", f"{row['token_agreement']:.2%}")]
        table.add_row(str(rows[0]["scale"]), *cells)
    console.print(table)
    logit_error = max(row["logit_error"] for rows in data["scales"].values() for row in rows)
    pixel_error = max(data["pixel_error"].values())
    console.print(
        f"parity {'passed' if data['passed'] else '[bold red]FAILED[/bold red]'}: logits {logit_error:.1e}, "
        f"pixels {pixel_error:.1e}, encoder tokens {data['encoded_token_agreement']:.2%} equal, "
        f"reconstruction {data['reconstruction_error']:.1e} (tolerance {data['tolerance']:g})",
        soft_wrap=True,
    )


def bench(data: dict[str, Any]) -> None:
    """What `bench` timed."""
    console = Console()
    table = Table("batch", title=f"{data['engine']}, {data['precision']}: seconds per request, median (min–max)")
    for title in ("generate", "images/s", "reference", "ratio", "PSS", "peak RSS"):
        table.add_column(title, justify="right")
    for row in data["rows"]:
        table.add_row(
            str(row["batch"]),
            _spread(row["seconds"]),
            f"{row['images_per_second']:.2f}",
            _spread(row["reference"]) if row["reference"] else "not run",
            f"{row['speedup']:.2f}×" if row["speedup"] else "",
            *(_mega(row[size]) if row[size] else "" for size in ("pss_bytes", "peak_rss_bytes")),
        )
    console.print(table)
    for row in data["rows"]:
        stages = ", ".join(f"{name} {seconds:.3f}" for name, seconds in row["stages"].items())
        console.print(f"batch {row['batch']}, median seconds per stage: {stages}", soft_wrap=True)
    console.print("PSS after the warm-up and peak RSS in MB, both before the reference was built", soft_wrap=True)
    console.print(f"timed: {data['timed']}", soft_wrap=True)
    console.print("machine: " + ", ".join(f"{key} {value}" for key, value in data["machine"].items()), soft_wrap=True)


def _key_values(console: Console, title: str, data: dict[str, Any]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    for key, value in data.items():
        table.add_row(key, escape(str(value)))
    console.print(table)


def _spread(spread: dict[str, float]) -> str:
    return f"{spread['median']:.3f} ({spread['minimum']:.3f}–{spread['maximum']:.3f})"


def _mega(size: int) -> str:
    return f"{size / 1e6:,.1f}"
