"""What a quality report knows: plain data that `gather` fills and `tables` and the page read. Nothing here runs.

A part that could not be made is None, and `missing` says why, by the part's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..sampling import Settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Shot:
    """One image that the bundle made."""

    png: bytes  #: carries its recipe
    label: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Strip:
    """One image from coarse to fine."""

    pngs: tuple[bytes, ...]  #: after every scale, the last one is the image
    label: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """One way to redraw the given picture, once per class."""

    kind: str  #: "inpaint", "outpaint" or "vary"
    box: tuple[float, float, float, float] | None  #: (y0, x0, y1, x1) of the region, in whole tokens, 0 to 1
    from_scale: int | None  #: the first one that was redrawn, of a variation
    shots: tuple[Shot, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Editing:
    """A picture, what the VQVAE makes of it, and its edits."""

    given: bytes  #: PNG, at the model's size
    given_name: str | None  #: of the file; None: the bundle's own image of `label` and `seed`
    label: int | None
    seed: int | None
    reconstruction: bytes  #: PNG
    psnr: float  #: of the reconstruction, in dB
    edits: tuple[Edit, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFacts:
    """What ran."""

    name: str
    device: str
    precision: str
    exact: bool
    threads: int | None
    decoder: str | None  #: of the onnx engine on a CPU


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A line for a shell, and what it makes again."""

    what: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Everything on the page."""

    name: str  #: of the bundle's directory, without the directories above it
    digest: str
    version: str  #: of var_deploy
    inspection: Mapping[str, Any]  #: of `inspect_bundle`, without its path
    engine: EngineFacts
    load: float | None  #: processes that wanted to compute in the minute before; None: the system does not count them
    bench: Mapping[str, Any]  #: of `bench_record`; without rows where nothing was timed
    reference_asked: bool  #: whether eager PyTorch was to be timed beside
    settings: Settings
    samples: tuple[tuple[Shot, ...], ...] | None  #: a row per class
    strips: tuple[Strip, ...] | None
    editing: Editing | None
    parity: Mapping[str, Any] | None  #: of `Parity.to_dict`
    fidelity: Mapping[str, Any] | None  #: what the manifest notes
    missing: Mapping[str, str]  #: part → why it is not there: timing, samples, strips, editing, parity
    commands: tuple[Command, ...]

    def class_name(self, label: int) -> str:
        """As the bundle names it, or "class 207"."""
        names = self.inspection["class_names"]
        return names[label] if names else f"class {label}"
