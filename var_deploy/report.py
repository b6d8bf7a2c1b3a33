"""Tables for people: how the command line lays out what `inspect`, `verify` and `bench` return."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .precision import Precision


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
        columns = ("batch", "rows", "weights", "caches", "logits", "acts*", "rest*", "total")
        title = "onnx engine: memory while generating (MB; * estimates: activations, and the rest of the process)"
        table = Table(*columns, title=title)
        here = "images_at_once" in data["memory"][0]
        if here:
            table.add_column("runs here")
        for plan in data["memory"]:
            sizes = (plan[part] for part in ("weights", "caches", "logits", "activations", "process", "total"))
            cells = [_runs(plan["batch"], plan["images_at_once"])] if here else []
            table.add_row(str(plan["batch"]), str(plan["rows"]), *(f"{size / 1e6:,.0f}" for size in sizes), *cells)
        console.print(table)

    if "torch" in data:
        _torch_plan(console, data["torch"])


def _runs(batch: int, at_once: int) -> str:
    """How a batch runs in the memory that is free here."""
    if at_once == 0:
        return "not at all"
    return "whole" if at_once >= batch else f"{-(-batch // at_once)} parts"


def _torch_plan(console: Console, plan: dict[str, Any]) -> None:
    """The torch engine on a GPU: memory by batch, and what one CUDA graph replays."""
    columns = ("batch", "runs as", "weights", "caches", "buffers", "decoder (estimate)", "total", "launches")
    options = "".join(f", {name} {plan[name]}" for name in ("smooth", "decode_slice") if plan[name])
    table = Table(*columns, title=f"torch engine, {plan['precision']}, guided{options}: memory on the GPU (MB)")
    for row in plan["memory"]:
        sizes = (row[part] for part in ("weights", "caches", "buffers", "decoder", "total"))
        launches = sum(row["launches"].values())
        table.add_row(str(row["batch"]), str(row["runs_as"]), *(_mega(size) for size in sizes), str(launches))
    console.print(table)
    for row in plan["memory"][:1]:
        parts = ", ".join(f"{stage} {count}" for stage, count in row["launches"].items())
        console.print(f"launches in the graph of one generation, batch {row['batch']}: {parts}", soft_wrap=True)


def _bundle_parts(console: Console, data: dict[str, Any]) -> None:
    rest = ("image_size", "precision", "sampling", "license", "source", "class_names")
    shown = {key: data[key] for key in rest}
    if not data["exact"]:
        shown["precision"] = f"{data['precision']}, approximate: {_fidelity(data['fidelity'], data['precision'])}"
    _key_values(console, "bundle", shown)
    _key_values(console, "parameters", {part: f"{count:,}" for part, count in data["parameters"].items()})
    _key_values(console, "files (MB)", {name: _mega(size) for name, size in data["files"].items()})


def precision_plan(precision: str, plan: dict[str, Any]) -> None:
    """What `export --precision auto` measured and chose."""
    console = Console()
    if plan["alone"]:
        table = Table("in int8 alone", "mean KL", "times as fast as float32")
        for part, trial in plan["alone"].items():
            ratio = trial["float32_seconds"] / trial["seconds"]
            table.add_row(part, _divergence(trial), f"{ratio:.2f}")
        console.print(table)
    kept = ", ".join(plan["float32"]) or "nothing"
    choice = f" ({kept} kept in float32, channels {'' if plan['smoothing'] else 'not '}smoothed)"
    console.print(
        f"{precision}{choice if precision == 'int8' else ''}: {plan['reason']}; "
        f"mean KL {_divergence(plan['trial'])}, measured on {plan['calibration']}",
        soft_wrap=True,
    )


def _divergence(trial: dict[str, Any]) -> str:
    """Its mean KL; a manifest has null for what is not a number."""
    return "NaN" if trial["mean_kl"] is None else f"{trial['mean_kl']:.1e}"


def _fidelity(found: dict[str, Any] | None, precision: str) -> str:
    """What `verify` noted in the manifest; a number that it could not measure is left out."""
    if found is None:
        runs = Precision(precision) is not Precision.BF16
        return "not measured yet, run verify" if runs else "not measured: no engine here runs it yet"
    parts = ["passed the fidelity gate" if found.get("passed") else "FAILED the fidelity gate"]
    measures = (
        ("mean_kl", "mean KL {:.1e}"),
        ("token_agreement", "tokens {:.1%} equal"),
        ("decoder_psnr", "decoder {:.1f} dB"),
        ("decoder_ssim", "SSIM {:.4f}"),
    )
    parts += [form.format(found[key]) for key, form in measures if isinstance(found.get(key), int | float)]
    digits = found.get("digits")
    shares = [digits.get(key) for key in ("accuracy", "reference_accuracy")] if isinstance(digits, dict) else [None]
    if all(isinstance(share, int | float) for share in shares):
        parts.append("digits {:.1%}, of the reference's {:.1%}".format(*shares))
    return ", ".join(parts)


def parity(data: dict[str, Any]) -> None:
    """What `verify` found."""
    console = Console()
    table = Table(
        "scale",
        title=f"{data['engine']} engine, {data['precision']}, against the reference: greedy, classes {data['labels']}, "
        f"guidance {data['guidance']}",
    )
    kinds = list(data["scales"])
    for kind in kinds:
        table.add_column(f"{kind}: logit error", justify="right")
        table.add_column("tokens equal", justify="right")
        table.add_column("mean KL", justify="right")
    for rows in zip(*data["scales"].values(), strict=True):
        cells = [
            cell
            for row in rows
            for cell in (f"{row['logit_error']:.1e}", f"{row['token_agreement']:.2%}", f"{row['mean_kl']:.1e}")
        ]
        table.add_row(str(rows[0]["scale"]), *cells)
    console.print(table)
    every_row = [row for rows in data["scales"].values() for row in rows]
    logit_error = np.max([row["logit_error"] for row in every_row])  # keeps a NaN
    pixel_error = np.max(list(data["pixel_error"].values()))
    loop = ""
    if data["loop"]:
        loop = (
            f"; whole images: {data['loop']['token_agreement']:.2%} of tokens the best, "
            f"{data['loop']['clear_disagreements']} clearly not, pictures {data['loop']['pixel_psnr']:.1f} dB"
        )
    outcome = "passed" if data["passed"] else "[bold red]FAILED[/bold red]"
    if data["digits"]:
        console.print("digits: " + _digits(data["digits"]), soft_wrap=True)
    if not data["exact"]:
        mean_kl = np.max([row["mean_kl"] for row in every_row])
        psnr, ssim = (np.min(list(data[name].values())) for name in ("decoder_psnr", "decoder_ssim"))
        console.print(
            f"fidelity gate {outcome}: largest mean KL of a scale {mean_kl:.1e} (limit {data['max_mean_kl']:g}), "
            f"decoder {psnr:.1f} dB (limit {data['min_decoder_psnr']:g}), "
            f"SSIM {ssim:.4f}, reconstruction "
            f"{max(data['reconstruction_loss'], 0):.2f} dB worse (limit {data['max_reconstruction_loss']:g}){loop}; "
            f"{data['precision']} is approximate: logits {logit_error:.1e}, "
            f"encoder tokens {data['encoded_token_agreement']:.2%} equal",
            soft_wrap=True,
        )
        return
    console.print(
        f"parity {outcome}: logits {logit_error:.1e}, "
        f"pixels {pixel_error:.1e}, encoder tokens {data['encoded_token_agreement']:.2%} equal, "
        f"reconstruction {data['reconstruction_error']:.1e} (tolerance {data['tolerance']:g}){loop}",
        soft_wrap=True,
    )


def _digits(found: dict[str, Any]) -> str:
    return (
        f"{found['accuracy']:.1%} of {found['images']} samples seen as their digit, of the reference's "
        f"{found['reference_accuracy']:.1%}; feature distance {found['feature_distance']:.3f}, "
        f"between two draws of the reference {found['reference_distance']:.3f}"
    )


def bench(data: dict[str, Any]) -> None:
    """What `bench` timed: a column per row of the record, a line per measure that one of them has."""
    console, rows = Console(), data["rows"]
    factor, unit = (1e3, "ms") if rows and min(row["seconds"]["median"] for row in rows) < 0.1 else (1.0, "s")
    several = len({row["precision"] for row in rows}) > 1
    table = Table("batch", title=f"{data['engine']}, {data['precision']}: per request, median (p10–p90), {unit}")
    for row in rows:
        table.add_column(f"{row['batch']} {row['precision']}" if several else str(row["batch"]), justify="right")
    for title, cells in _bench_lines(rows, factor):
        if any(cells):
            table.add_row(title, *cells)
    console.print(table)
    for row in rows:
        if row["stages"]:
            stages = ", ".join(f"{name} {seconds * factor:.3f}" for name, seconds in row["stages"].items())
            name = f"batch {row['batch']}" + (f" {row['precision']}" if several else "")
            console.print(f"{name}, median {'seconds' if unit == 's' else unit} per stage: {stages}", soft_wrap=True)
        for what, why in row["failed"].items():
            console.print(f"batch {row['batch']}: {what} not timed: {escape(why)}", soft_wrap=True)
    console.print(
        "PSS after the warm-up and peak RSS in MB, before a row's own reference was built"
        + ("; peak RSS holds what earlier precisions took" if several else ""),
        soft_wrap=True,
    )
    for key, name in (("reference_how", "reference"), ("half_reference_how", "reference in bf16")):
        for how in sorted({row[key] for row in rows if row[key]}):
            console.print(f"{name}: {how}", soft_wrap=True)
    console.print(f"timed: {data['timed']}", soft_wrap=True)
    for name in ("machine", "gpu"):
        if data[name]:
            console.print(
                f"{name}: " + ", ".join(f"{key} {value}" for key, value in data[name].items()), soft_wrap=True
            )


def _bench_lines(rows: list[dict[str, Any]], factor: float) -> list[tuple[str, list[str]]]:
    def spread(key: str) -> list[str]:
        return [_spread(row[key], factor) if row[key] else "" for row in rows]

    def number(key: str, form: str, scale: float = 1.0) -> list[str]:
        return ["" if row[key] is None else form.format(row[key] * scale) for row in rows]

    return [
        ("generate", spread("seconds")),
        ("p99", [f"{row['seconds']['p99'] * factor:.3f}" for row in rows]),
        ("images/s", number("images_per_second", "{:.2f}")),
        ("in parts", [str(row["parts"]) if row["parts"] > 1 else "" for row in rows]),
        ("on the device", spread("device_seconds")),
        ("without decoder", spread("without_decoder")),
        ("floor", number("floor_seconds", "{:.3f}", factor)),
        ("share of floor", number("share_of_floor", "{:.0%}")),
        ("MFU", number("flops_share", "{:.0%}")),
        ("reference", [cell or "not run" for cell in spread("reference")]),
        ("ratio", number("speedup", "{:.2f}×")),
        ("reference in bf16", spread("half_reference")),
        ("ratio", number("half_speedup", "{:.2f}×")),
        ("compiled reference", spread("compiled")),
        ("ratio", number("compiled_speedup", "{:.2f}×")),
        ("J/image", number("joules_per_image", "{:.2f}")),
        ("device peak MB", number("device_peak_bytes", "{:,.1f}", 1e-6)),
        ("reserved MB", number("device_reserved_bytes", "{:,.1f}", 1e-6)),
        ("PSS MB", number("pss_bytes", "{:,.1f}", 1e-6)),
        ("peak RSS MB", number("peak_rss_bytes", "{:,.1f}", 1e-6)),
    ]


def _key_values(console: Console, title: str, data: dict[str, Any]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    for key, value in data.items():
        table.add_row(key, escape(str(value)))
    console.print(table)


def _spread(spread: dict[str, float], factor: float) -> str:
    median, p10, p90 = (spread[name] * factor for name in ("median", "p10", "p90"))
    return f"{median:.3f} ({p10:.3f}–{p90:.3f})"


def _mega(size: int) -> str:
    return f"{size / 1e6:,.1f}"
