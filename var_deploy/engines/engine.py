"""What an engine is: three calls on a state it hands out (begin, step, finish), plus decode and encode.

An engine may also run the whole loop itself, draws included, where its arrays live: see `DeviceLoop`. Axes: R rows (B,
or 2B under guidance), B images, n_k tokens of scale k, C code width, V codebook entries, h side of the feature map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..given import Given
from ..memory import MemoryPlan
from ..precision import Precision
from ..sampling import Settings


class Graphs(StrEnum):
    """Which scale graphs run: the one symbolic graph for all scales, or the static graph of each."""

    SYMBOLIC = "symbolic"
    STATIC = "static"


class Decoder(StrEnum):
    """What turns the feature map into pixels on a CPU: the bundle's graph, or the same network by minimal filtering."""

    GRAPH = "graph"
    WINOGRAD = "winograd"


class Draw(StrEnum):
    """Where tokens are drawn on engines whose logits lie on a GPU: there, by compiled kernels, or on the host."""

    DEVICE = "device"
    HOST = "host"


class Provider(StrEnum):
    """What of ONNX Runtime runs the graphs on a GPU. TensorRT's builds its engines when a shape first comes."""

    CUDA = "cuda"
    TENSORRT = "tensorrt"


class State(Protocol):
    """One generation in flight: the engine's caches and f_hat. States are independent of each other."""

    @property
    def f_hat_RChh(self) -> np.ndarray:
        """f_hat of the scales before the one stepped last; valid until the next step, copy to keep it."""
        ...


class Engine(Protocol):
    """The decode loop's view of a backend. A `state` comes from `begin` of the same engine; arrays are float32."""

    name: str
    precision: Precision

    @property
    def max_batch(self) -> int | None:
        """The most images of one generation; None: as many as fit."""
        ...

    def begin(self, labels_R: np.ndarray) -> State:
        """Computes everything that depends on the classes alone (labels int64 [R])."""
        ...

    def step(self, state: Any, k: int, codes_RnC: np.ndarray | None) -> np.ndarray:
        """Scale k given the codes of scale k − 1 (None for k = 0): raw logits [R, n_k, V].

        Codes for fewer rows than before drop the rows behind them, here and at all later scales. The array belongs
        to the state and is valid until the next step; copy to keep it.
        """
        ...

    def finish(self, state: Any, codes_BnC: np.ndarray) -> np.ndarray:
        """Adds the last scale's codes: complete f_hat [B, C, h, h] of the first B rows."""
        ...

    def decode(self, f_hat_BChh: np.ndarray) -> np.ndarray:
        """Pixels [B, 3, R, R] in [0, 1]."""
        ...

    def encode(self, pixels_B3RR: np.ndarray) -> np.ndarray:
        """Feature map [B, C, h, h], not yet quantised."""
        ...


@runtime_checkable
class Planned(Protocol):
    """An engine that says beforehand what a request takes, so that a batch can be split to fit."""

    def memory_plan(self, batch: int, guided: bool) -> MemoryPlan:
        """Bytes while a batch of images is generated."""
        ...

    def memory_reused(self) -> int:
        """Bytes of the requests that run now which the system takes for free."""
        ...


#: Hears of scale k once its codes were added: k, tokens int64 [B, n_k], f_hat [B, C, h, h]; copies, free to keep.
ScaleListener = Callable[[int, np.ndarray, np.ndarray], None]


@dataclass(frozen=True, eq=False, slots=True)
class LoopResult:
    """What a whole generation on the engine's side brings back; every array is the caller's."""

    tokens: list[np.ndarray]  #: per scale, int64 [B, n_k]
    bytes_BRR3: np.ndarray | None  #: uint8 RGB; None: to be made of the pixels
    pixels: Callable[[], np.ndarray]  #: float32 [B, 3, R, R] in [0, 1], fetched when first called
    timings: dict[str, float]  #: seconds per stage


#: Forms whose graphs are kept for a batch size; another takes the place of the one that was not asked for longest.
MAX_FORMS = 8


@dataclass(frozen=True, slots=True)
class LoopForm:
    """What decides which launches a generation is made of: one CUDA graph, or one list of them, for each."""

    guided_scales: int  #: scales that null-class rows run at
    smooths: tuple[bool, ...]  #: by scale: whether codes are mixed
    given: bool = False  #: whether tokens are given
    staged: bool = False  #: whether something happens between the stages
    draft_scales: int | None = None  #: end after these scales; None: run them all and decode
    decode: bool = True

    @classmethod
    def of(cls, settings: Settings, *, draft_scales: int | None = None, **options: bool) -> LoopForm:
        """Of a request."""
        smooths, guided = settings.smooths[:draft_scales], settings.guided_scales
        guided_scales = guided if draft_scales is None else min(guided, draft_scales)
        return cls(guided_scales, smooths, draft_scales=draft_scales, **options)

    @property
    def smooth(self) -> bool:
        """Whether codes are mixed at any scale."""
        return any(self.smooths)


@runtime_checkable
class DeviceLoop(Protocol):
    """An engine that draws and decodes where its arrays live, so that nothing crosses to the host between scales."""

    @property
    def max_batch(self) -> int | None:
        """As of `Engine`."""
        ...

    def generate(
        self,
        labels_B: np.ndarray,
        seeds: list[int],
        settings: Settings,
        on_scale: ScaleListener | None,
        given: Given | None = None,
    ) -> LoopResult:
        """The whole loop for checked labels int64 [B], seeds and settings. Raises EngineError."""
        ...

    def draft(self, labels_B: np.ndarray, seeds: list[int], settings: Settings, scales: int) -> Given:
        """The first scales of the loop: their tokens and codes, for another engine to go on. Raises EngineError."""
        ...
