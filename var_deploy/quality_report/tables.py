"""Facts of a report → its tables, as text: what stands in every cell, and in which unit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..signature import scale_graph_name
from .facts import Facts
from .numbers import NBSP, by_scale, count, megabytes, share, size, small

Cells = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """The first cell of a row names it. Without columns: names and values."""

    caption: str
    columns: Cells = ()
    rows: tuple[Cells, ...]


# ---- what the bundle is ----------------------------------------------------------------------------------------------


def origin(facts: Facts) -> Table:
    """Which bundle it is, and what it came from."""
    found = facts.inspection
    rows = (
        ("Name", facts.name),
        ("Digest of its files", facts.digest),
        ("Precision", _precision(found["precision"], found["exact"])),
        ("Licence of the weights", found["license"]),
        *_source(found["source"]),
    )
    return Table(caption="Identity and origin", rows=rows)


def model(facts: Facts) -> Table:
    """The two configurations, and how it samples by default."""
    found, var, vqvae = facts.inspection, facts.inspection["var"], facts.inspection["vqvae"]
    sides, sampling = var["patch_nums"], found["sampling"]
    rows = (
        ("Image", f"{found['image_size']} × {found['image_size']} px"),
        ("Classes", f"{count(var['num_classes'])}, {'named' if found['class_names'] else 'by number'}"),
        ("Depth", f"{var['depth']} blocks"),
        ("Width", f"{count(var['embed_dim'])}, feed-forward {count(var['ffn_dim'])}"),
        ("AdaLN", "one for all blocks" if var["shared_aln"] else "one per block"),
        ("Attention", "unit-length queries and keys" if var["attn_l2_norm"] else "plain"),
        ("Scales, side in tokens", ", ".join(map(str, sides))),
        ("Tokens of an image", count(sum(side * side for side in sides))),
        ("Codebook", f"{count(vqvae['vocab_size'])} codes of width {vqvae['z_channels']}"),
        ("Autoencoder", f"{vqvae['ch']} channels × {', '.join(map(str, vqvae['ch_mult']))}"),
        ("Default guidance", f"{sampling['guidance']:g}"),
        ("Default top-k, top-p", f"{sampling['top_k'] or 'off'}, {sampling['top_p'] or 'off'}"),
    )
    return Table(caption="Model", rows=rows)


def _precision(name: str, exact: bool) -> str:
    return name if exact else f"{name}, approximate"


def _source(source: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the exporter noted; a manifest may hold anything else there."""
    rows = []
    for key, name in (("var", "VAR"), ("vqvae", "VQVAE")):
        entry = source.get(key)
        if isinstance(entry, dict) and "file" in entry:
            digest = f" (SHA-256 {str(entry['sha256'])[:16]}…)" if "sha256" in entry else ""
            rows.append((f"{name} checkpoint", f"{entry['file']}{digest}"))
    if isinstance(source.get("exporter"), str):
        rows.append(("Exported by", source["exporter"]))
    return rows


def parameters(facts: Facts) -> Table:
    """By the stage that reads them."""
    parts = facts.inspection["parameters"]
    rows = [(part.capitalize(), count(number)) for part, number in parts.items()]
    total = ("All", count(sum(parts.values())))
    return Table(caption="Parameters by stage", columns=("Stage", "Parameters"), rows=(*rows, total))


def files(facts: Facts) -> Table:
    """By role."""
    sizes: dict[str, list[int]] = {}
    for name, nbytes in facts.inspection["files"].items():
        sizes.setdefault(_role(name), []).append(nbytes)
    rows = [(role, count(len(group)), count(sum(group))) for role, group in sizes.items()]
    everything = [nbytes for group in sizes.values() for nbytes in group]
    total = ("All", count(len(everything)), count(sum(everything)))
    return Table(caption="Files by role", columns=("Role", "Files", "Bytes"), rows=(*rows, total))


def _role(file: str) -> str:
    if file == "weights.safetensors":
        return "Weights"
    stem = file.removesuffix(".onnx")
    if re.fullmatch(r"scale_\d+", stem):
        return "Graphs of one scale each"
    known = {"scales": "Graph of all scales"}
    known |= {name: f"Graph: {name}" for name in ("condition", "finish", "decoder", "encoder")}
    return known.get(stem, "Others")


# ---- what ran --------------------------------------------------------------------------------------------------------


def engine(facts: Facts) -> Table:
    """What ran."""
    ran = facts.engine
    rows = [("Engine", ran.name), ("Device", ran.device), ("Precision", _precision(ran.precision, ran.exact))]
    if ran.decoder is not None:
        rows.append(("Decoder", ran.decoder))
    if ran.threads is not None:
        rows.append(("Threads", count(ran.threads)))
    return Table(caption="What ran", rows=tuple(rows))


def machine(facts: Facts) -> Table:
    """What it ran on, without the machine's own name."""
    found, gpu = facts.bench["machine"], facts.bench["gpu"] or {}
    rows = [
        ("Processor", found["processor"] or "not known"),
        ("Cores", count(found["cores"]) if found["cores"] else "not known"),
        ("System", found["system"]),
    ]
    if facts.load is not None:
        rows.append(("Load before the start", f"{facts.load:.1f} processes"))
    titles = {"name": "GPU", "memory_bytes": "GPU memory", "driver": "Driver", "cuda_runtime": "CUDA"}
    for key, title in titles.items():
        if gpu.get(key) is not None:
            rows.append((title, size(gpu[key]) if key == "memory_bytes" else str(gpu[key])))
    return Table(caption="Machine", rows=tuple(rows))


def versions(facts: Facts) -> Table:
    """Of what took part."""
    found = {**facts.bench["machine"], "var-deploy": facts.version}
    packages = [package for package in found if package not in ("processor", "cores", "system")]
    return Table(caption="Versions", rows=tuple((package, found[package]) for package in packages))


def settings(facts: Facts) -> Table:
    """How the pictures of the page were drawn."""
    drawn = facts.settings
    rows = (
        ("Guidance strength by scale", by_scale(drawn.strengths)),
        ("Temperature", by_scale(drawn.temperatures)),
        ("Top-k (0 is off)", by_scale(drawn.top_ks)),
        ("Top-p (0 is off)", by_scale(drawn.top_ps)),
        ("Mixtures of codes", by_scale(["yes" if smooth else "no" for smooth in drawn.smooths])),
    )
    return Table(caption="Settings of all pictures here", rows=rows)


# ---- parity and fidelity ---------------------------------------------------------------------------------------------


def parity(found: Mapping[str, Any], sides: Sequence[int]) -> Table:
    """Scale by scale, for every variant that was run."""
    several = len(found["scales"]) > 1
    columns = ["Scale"]
    for variant in found["scales"]:
        columns += [f"{f'{variant}: ' if several else ''}{name}" for name in ("logit error", "equal tokens", "mean KL")]
    rows = []
    for k, entries in enumerate(zip(*found["scales"].values(), strict=True)):
        cells = [scale_name(k, sides)]
        for row in entries:
            cells += [small(row["logit_error"]), share(row["token_agreement"]), small(row["mean_kl"])]
        rows.append(tuple(cells))
    return Table(caption="Scale by scale", columns=tuple(columns), rows=tuple(rows))


def parity_images(found: Mapping[str, Any]) -> Table:
    """What is no logit: pixels, encoder, and the engine's own loop."""
    rows = [
        (f"Largest pixel difference, {variant} (0 to 1)", small(error))
        for variant, error in found["pixel_error"].items()
    ]
    rows += [
        ("Encoder: equal tokens", share(found["encoded_token_agreement"])),
        ("Reconstruction: largest pixel difference (0 to 1)", small(found["reconstruction_error"])),
    ]
    if loop := found["loop"]:
        rows += [
            ("Whole images: tokens that are the best", share(loop["token_agreement"])),
            ("Whole images: tokens that clearly are not", count(loop["clear_disagreements"])),
            ("Whole images: pictures beside the steps' (dB)", f"{loop['pixel_psnr']:.1f}"),
        ]
    return Table(caption="Pixels and encoder", columns=("Measure", "Found"), rows=tuple(rows))


def fidelity(facts: Facts) -> Table | None:
    """The gate of an inexact precision, with its limits where it was run in this call; None: nothing is known."""
    if (found := facts.parity) is not None and not found["exact"]:
        rows = [row for variant in found["scales"].values() for row in variant]
        measured = {
            "mean_kl": _worst(max, [row["mean_kl"] for row in rows]),
            "token_agreement": _worst(min, [row["token_agreement"] for row in rows]),
            "decoder_psnr": _worst(min, found["decoder_psnr"].values()),
            "decoder_ssim": _worst(min, found["decoder_ssim"].values()),
            "reconstruction_loss": found["reconstruction_loss"],
        }
        limits = {
            "mean_kl": f"at most {found['max_mean_kl']:g}",
            "decoder_psnr": f"at least {found['min_decoder_psnr']:g}",
            "reconstruction_loss": f"at most {found['max_reconstruction_loss']:g}",
        }
        digits = found["digits"]
    elif facts.fidelity is not None:
        measured, limits, digits = dict(facts.fidelity), {}, facts.fidelity.get("digits")
    else:
        return None
    forms: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("mean_kl", "Largest mean KL of a scale (nats)", small),
        ("token_agreement", "Least share of equal tokens", share),
        ("decoder_psnr", "Decoder (dB)", "{:.1f}".format),
        ("decoder_ssim", "Decoder, structural similarity", "{:.4f}".format),
        ("reconstruction_loss", "Reconstruction worse by (dB)", "{:.2f}".format),
    )
    cells = [
        (title, form(measured[key]), limits.get(key, "none" if limits else "not noted"))
        for key, title, form in forms
        if _is_number(measured.get(key))
    ]
    if isinstance(digits, dict) and all(_is_number(digits.get(key)) for key in ("accuracy", "reference_accuracy")):
        said = f"reference {share(digits['reference_accuracy'], 1)}"
        cells.append(("Samples seen as their digit", share(digits["accuracy"], 1), said))
    return Table(caption="Fidelity gate", columns=("Measure", "Found", "Limit"), rows=tuple(cells))


def _worst(pick: Callable[..., float], values: Any) -> float:
    """The extreme one; a NaN where there is any."""
    listed = list(values)
    return math.nan if any(math.isnan(value) for value in listed) else pick(listed)


def _is_number(value: Any) -> bool:
    """What a float can hold; infinite decibels are a number."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


# ---- latency and memory ----------------------------------------------------------------------------------------------


def latency(record: Mapping[str, Any]) -> Table:
    """A column per batch size, a line per measure that one of them has."""
    rows, (factor, unit, digits) = record["rows"], time_unit(record)

    def line(title: str, values: Iterable[float | None], form: Callable[[float], str]) -> list[Cells]:
        cells = tuple("" if value is None else form(value) for value in values)
        return [(title, *cells)] if any(cells) else []

    def time(seconds: float) -> str:
        return f"{seconds * factor:,.{digits}f}"

    def spread(title: str, key: str) -> list[Cells]:
        ranges = tuple(f"{time(row[key]['p10'])}–{time(row[key]['p90'])}" if row[key] else "" for row in rows)
        medians = line(f"{title}, median ({unit})", (row[key] and row[key]["median"] for row in rows), time)
        return [*medians, (f"{title}, 10–90 % ({unit})", *ranges)] if medians else []

    def measure(title: str, key: str, form: str, scale: float = 1.0) -> list[Cells]:
        return line(title, (row[key] for row in rows), lambda value: form.format(value * scale))

    lines = spread("A request", "seconds")
    lines += line(f"An image ({unit})", (row["seconds"]["median"] / row["batch"] for row in rows), time)
    lines += measure("Images per second", "images_per_second", "{:,.2f}")
    lines += line("Repeats", (row["seconds"]["count"] for row in rows), "{:,}".format)
    if any(row["parts"] > 1 for row in rows):
        lines += line("Parts that the batch ran in", (row["parts"] for row in rows), "{:,}".format)
    lines += spread("On the device", "device_seconds")
    for key, ratio in (("reference", "speedup"), ("half_reference", "half_speedup")):
        title = f"Eager PyTorch, {', '.join(sorted({row[f'{key}_how'] for row in rows if row[f'{key}_how']}))}"
        lines += spread(title, key)
        lines += measure(f"{title}: times ours (×)", ratio, "{:.2f}")
    lines += measure("Memory of the process, PSS (MB)", "pss_bytes", "{:,.1f}", 1e-6)
    lines += measure("Memory of the process, peak RSS (MB)", "peak_rss_bytes", "{:,.1f}", 1e-6)
    lines += measure("Memory on the device, peak (MB)", "device_peak_bytes", "{:,.1f}", 1e-6)
    lines += measure("Energy of the GPU for an image (J)", "joules_per_image", "{:.2f}")
    return Table(caption="Whole images", columns=("", *_batches(rows)), rows=tuple(lines))


def stages(record: Mapping[str, Any], sides: Sequence[int]) -> Table | None:
    """Where the time goes; None where it was not split."""
    rows, (factor, unit, digits) = record["rows"], time_unit(record)
    names = list(dict.fromkeys(name for row in rows for name in row["stages"]))
    if not names:
        return None
    if "draw" in names:  # noted after the first scale, but taken at every one
        names.remove("draw")
        last_scale = max((place for place, name in enumerate(names) if name.startswith("scale")), default=-1)
        names.insert(last_scale + 1, "draw")
    totals = [sum(row["stages"].values()) for row in rows]
    scales = {scale_graph_name(k): scale_name(k, sides) for k in range(len(sides))}
    columns = [text for batch in _batches(rows) for text in (f"{batch} ({unit})", "share")]
    lines = []
    for name in names:
        cells = []
        for row, total in zip(rows, totals, strict=True):
            taken = row["stages"].get(name, 0.0)
            cells += [f"{taken * factor:,.{digits + 1}f}", share(taken / total, 1)]
        lines.append((scales.get(name, name).capitalize(), *cells))
    caption = "Median of every stage, and its share of their sum"
    return Table(caption=caption, columns=("Stage", *columns), rows=tuple(lines))


def memory_plan(facts: Facts) -> Table | None:
    """What `inspect` counts for the engine that ran; None where it has no plan for it."""
    on_gpu = facts.engine.device != "cpu"
    if facts.engine.name == "onnx" and not on_gpu and "memory" in facts.inspection:
        plans = facts.inspection["memory"]
        parts = {"weights": "Weights", "caches": "Caches", "logits": "Logits"}
        parts |= {"activations": "Activations (estimate)", "process": "The rest of the process (estimate)"}
    elif facts.engine.name == "torch" and on_gpu and "torch" in facts.inspection:
        plans = facts.inspection["torch"]["memory"]
        parts = {"weights": "Weights", "caches": "Caches", "buffers": "Buffers", "decoder": "Decoder (estimate)"}
    else:
        return None
    rows = [(title, *(megabytes(plan[key]) for plan in plans)) for key, title in (*parts.items(), ("total", "All"))]
    caption = "Memory as planned for guided images (MB)"
    return Table(caption=caption, columns=("", *_batches(plans)), rows=tuple(rows))


def time_unit(record: Mapping[str, Any]) -> tuple[float, str, int]:
    """One unit for the whole table: what seconds are multiplied by, its name, and digits behind the point."""
    quick = min(row["seconds"]["median"] for row in record["rows"]) < 1
    return (1e3, "ms", 1) if quick else (1.0, "s", 2)


def scale_name(k: int, sides: Sequence[int]) -> str:
    """As the page calls a scale: its number from 0, and its side in tokens."""
    return f"scale{NBSP}{k}, {sides[k]}{NBSP}×{NBSP}{sides[k]}"


def _batches(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"batch{NBSP}{row['batch']}" for row in rows]
