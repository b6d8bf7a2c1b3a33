"""What a report was asked for → the commands that make every figure of it again.

Files are named by their last part: no directory of the machine that made the page stands on it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from ..bundle import Manifest
from .facts import Command, Editing, Shot, Strip

#: Columns of a line; an option that does not fit begins the next one.
WIDTH = 80

_EDITS = {"inpaint": "In-painting", "outpaint": "Out-painting", "vary": "Variation"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Spoken:
    """Options as they were given on the command line, to be said again."""

    engine: tuple[str, ...] = ()  #: of `var_deploy.load`, without its engine
    verify: tuple[str, ...] = ()  #: those that verify has
    sampling: tuple[str, ...] = ()
    bench: tuple[str, ...] = ()  #: those that bench has
    checkpoints: tuple[str, ...] = ()  #: --var and --vae, by file name
    report: tuple[str, ...] = ()  #: the report's own that are none of the above


def class_options(labels: Sequence[int], manifest: Manifest) -> list[str]:
    """`--class` once per label, by id; by name where the id is the name of a class."""
    names = manifest.class_names or ()
    return [word for label in labels for word in ("--class", names[label] if str(label) in names else str(label))]


def commands(
    bundle: str,
    manifest: Manifest,
    spoken: Spoken,
    *,
    engine: str,
    samples: Sequence[Sequence[Shot]] | None,
    strips: Sequence[Strip] | None,
    editing: Editing | None,
) -> tuple[Command, ...]:
    """One for every figure that is on the page; engine: the one that ran, by name.

    samples: a row per class, with the same number of seeds.
    """
    loaded = ["--engine", engine, *spoken.engine]
    drawn = [*spoken.sampling, *loaded]
    generate = ["var-deploy", "generate", bundle]
    whole = [*spoken.report, *spoken.checkpoints, *spoken.bench, *drawn]
    found = [
        Command(what="This page", text=_command("var-deploy", "report", bundle, *whole, "--out", "report.html")),
        Command(what="Configuration and memory plan", text=_command("var-deploy", "inspect", bundle)),
    ]
    if spoken.checkpoints:
        asked = [*spoken.checkpoints, "--engine", engine, *spoken.verify]
        found.append(Command(what="Parity and fidelity", text=_command("var-deploy", "verify", bundle, *asked)))
    timed = [*spoken.bench, *loaded]
    found.append(Command(what="Latency and memory", text=_command("var-deploy", "bench", bundle, *timed)))
    if samples:
        labels = [row[0].label for row in samples]
        words = [*generate, *class_options(labels, manifest), *drawn, "--out", "samples", "--seed"]
        seeds = " ".join(str(shot.seed) for shot in samples[0])
        each = "".join(f"    {line}\n" for line in _lines([*map(shlex.quote, words), '"$seed"']))
        found.append(Command(what="Samples", text=f"for seed in {seeds}; do\n{each}done"))
    if strips:
        chosen = class_options([strip.label for strip in strips], manifest)
        words = [*generate, *chosen, "--seed", str(strips[0].seed), *drawn, "--out", "last.png"]
        found.append(Command(what="Coarse to fine", text=_command(*words, "--steps-gif", "steps.gif")))
    if editing is not None:
        found += _editing(bundle, manifest, editing, drawn, loaded)
    return tuple(found)


def _editing(
    bundle: str, manifest: Manifest, editing: Editing, drawn: Sequence[str], loaded: Sequence[str]
) -> list[Command]:
    found, picture = [], editing.given_name
    if picture is None:
        assert editing.label is not None  # one of the two says where the picture came from
        picture = "given.png"
        words = [*class_options([editing.label], manifest), "--seed", str(editing.seed), *drawn, "--out", picture]
        found.append(Command(what="The given picture", text=_command("var-deploy", "generate", bundle, *words)))
    words = [bundle, picture, *loaded, "--out", "reconstructed.png"]
    found.append(Command(what="Its reconstruction", text=_command("var-deploy", "reconstruct", *words)))
    for edit in editing.edits:
        if edit.box is None:
            how = ["vary", bundle, picture, "--from-scale", str(edit.from_scale)]
        else:
            how = ["edit", bundle, picture, "--box", ",".join(f"{part:g}" for part in edit.box), "--mode", edit.kind]
        chosen = class_options([shot.label for shot in edit.shots], manifest)
        words = [*how, *chosen, "--seed", str(edit.shots[0].seed), *drawn, "--out", edit.kind]
        found.append(Command(what=_EDITS[edit.kind], text=_command("var-deploy", *words)))
    return found


def _command(*words: str) -> str:
    return "\n".join(_lines([shlex.quote(word) for word in words]))


def _lines(words: Sequence[str]) -> list[str]:
    """Quoted words as the lines of one command; an option stays with its value."""
    groups: list[str] = []
    for word in words:
        if groups and groups[-1].startswith("--") and " " not in groups[-1] and not word.startswith("--"):
            groups[-1] += f" {word}"
        else:
            groups.append(word)
    lines, line = [], groups[0]
    for group in groups[1:]:
        if len(line) + len(group) + 3 > WIDTH:
            lines.append(f"{line} \\")
            line = f"    {group}"
        else:
            line += f" {group}"
    return [*lines, line]
