"""Which products of a model int8 may take, by measurement on this machine: is it faithful, and is it faster?

Every trial is the symbolic graph itself, run by the onnx engine on calibration tokens. All trials read the same two
files, the float32 bundle and the int8 forms of its products; only graphs are written again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from var_deploy.bundle import Bundle
from var_deploy.engines import Engine, EngineOptions, engine_for
from var_deploy.engines.engine import Decoder
from var_deploy.errors import EngineError
from var_deploy.memory_budget import available_memory, onnx_plan
from var_deploy.precision import Precision
from var_deploy.signature import graph_specs
from var_train.checkpoint import CheckpointPair

from .calibration import Calibration
from .deploy_view import LazyWeight, deploy_weights
from .precision import parts_of, stored_weights
from .smoothing import SMOOTHING, smoothed_weights, smoothing_factors
from .teacher_forcing import ForcedScale, guided, mean_kl, teacher_forced
from .transformer_graphs import condition_graph, scale_graph
from .weights_file import WeightsLayout, WeightSlot, weights_layout, write_weights

#: Half of what the fidelity gate allows: calibration sees a few images, use sees others.
MAX_MEAN_KL = 0.005

#: Smoothing is used where it leaves at most this share of the divergence.
WORTHWHILE = 0.9

#: int8 has to take at most this share of float32's time; closer than that is noise.
FASTER = 0.97

#: How often the two are timed in turn: at least, and in all until so many seconds have passed.
REPEATS, AT_LEAST_SECONDS = 3, 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A mixture of int8 and float32 products beside float32 alone."""

    mean_kl: float  #: largest over the scales, of the guided distributions of all images, in nats
    seconds: float  #: of one image's condition and scales, median
    float32_seconds: float  #: the same in float32, in turn with it

    @property
    def faster(self) -> bool:
        """Beyond noise."""
        return self.seconds <= FASTER * self.float32_seconds

    @property
    def slower(self) -> bool:
        """Beyond noise."""
        return self.float32_seconds <= FASTER * self.seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Plan:
    """What was found; `precision` is FP32 where int8 is refused."""

    precision: Precision
    reason: str
    kept: tuple[str, ...]  #: parts left in float32
    factors: Mapping[str, Tensor] | None  #: of `smoothing_factors`, where outlier channels are smoothed
    trial: Trial  #: the last, which decided
    alone: dict[str, Trial]  #: part → it alone in int8
    calibration: str

    def to_dict(self) -> dict[str, Any]:
        """For the manifest: JSON-ready."""
        return {
            "reason": self.reason,
            "float32": list(self.kept),
            "smoothing": self.factors is not None,
            "calibration": self.calibration,
            "trial": asdict(self.trial),
            "alone": {part: asdict(trial) for part, trial in self.alone.items()},
        }


def int8_plan(
    pair: CheckpointPair,
    float32: Bundle,
    calibration: Calibration,
    *,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Int8Plan:
    """float32: a bundle of the pair in a directory that is the caller's to write in. Raises EngineError."""
    trials = _Trials(pair, float32, calibration, threads)
    parts = parts_of(pair.var)
    kept: list[str] = []
    alone: dict[str, Trial] = {}
    factors: Mapping[str, Tensor] | None = None

    def decided(precision: Precision, reason: str) -> Int8Plan:
        chosen = precision is Precision.INT8
        return Int8Plan(
            precision=precision,
            reason=reason,
            kept=tuple(part for part in parts if chosen and part in kept),
            factors=factors if chosen else None,
            trial=trial,
            alone=alone,
            calibration=calibration.source,
        )

    def slower(what: str) -> Int8Plan:
        times = f"{trial.seconds:.3g} s, float32 {trial.float32_seconds:.3g} s"
        return decided(Precision.FP32, f"{what} not faster here: {times}")

    progress("int8")
    trial = trials.run()
    if not trial.faster:
        return slower("int8 is")
    progress("int8, smoothed")
    smooth = trials.run(factors=trials.factors)
    if smooth.mean_kl < WORTHWHILE * np.nan_to_num(trial.mean_kl, nan=np.inf):
        factors, trial = trials.factors, smooth
    for part in parts:
        progress(f"int8 in {part} alone")
        alone[part] = trials.run([other for other in parts if other != part], factors)
    # Parts that are slower go back to float32, then the most sensitive ones, until the rest is faithful.
    kept += [part for part in parts if alone[part].slower]
    if len(kept) == len(parts):
        return decided(Precision.FP32, "every part alone is slower than in float32 here")
    if kept:
        progress(f"int8 without {', '.join(kept)}")
        trial = trials.run(kept, factors)
    others = [part for part in parts if part not in kept]
    by_sensitivity = sorted(others, key=lambda part: np.nan_to_num(alone[part].mean_kl, nan=np.inf))
    while not trial.mean_kl <= MAX_MEAN_KL:  # a NaN is not faithful either
        kept.append(by_sensitivity.pop())
        if not by_sensitivity:
            return decided(Precision.FP32, f"int8 is not faithful: mean KL {trial.mean_kl:.1e}, limit {MAX_MEAN_KL:g}")
        progress(f"int8 without {', '.join(kept)}")
        trial = trials.run(kept, factors)
    if not trial.faster:
        return slower("what int8 may take is")
    return decided(Precision.INT8, f"{trial.float32_seconds / trial.seconds:.2f} times as fast as float32")


class _Trials:
    """Runs graphs that mix float32 and int8 products."""

    def __init__(self, pair: CheckpointPair, float32: Bundle, calibration: Calibration, threads: int | None) -> None:
        self._pair, self._bundle, self._calibration, self._threads = pair, float32, calibration, threads
        self._view = deploy_weights(pair)
        self._codebook_VC = float32.weight("quantize.embedding.weight")
        self._float32 = weights_layout(stored_weights(self._view, Precision.FP32)).slots
        self.factors = smoothing_factors(self._view, calibration.peaks)
        smoothed = smoothed_weights(self._view, pair.var, self.factors)
        self._int8 = {
            smoothing: self._written(stored_weights(view, Precision.INT8), f"int8_{smoothing}.safetensors")
            for smoothing, view in ((False, self._view), (True, smoothed))
        }
        # Two engines are there at a time: float32 is timed in turn with every trial.
        needed = 2 * onnx_plan(float32, Decoder.GRAPH, 1)(1, True).total
        if (available := available_memory()) is not None and available < needed:
            raise EngineError(
                f"precision auto: needs {needed / 1e6:,.0f} MB for two engines, {available / 1e6:,.0f} MB are free; "
                "free memory, or name a precision"
            )
        self._exact = self._engine(Precision.FP32, self._float32)

    def _written(self, weights: dict[str, LazyWeight], file: str) -> dict[str, WeightSlot]:
        """Writes what the float32 file does not have to a file beside it."""
        other = {
            name: weight for name, weight in weights.items() if weight.dtype == "int8" or name not in self._float32
        }
        layout = weights_layout(other)
        path = self._bundle.file(file)
        path.unlink(missing_ok=True)
        write_weights(path, other, layout)
        return {name: replace(slot, file=file) for name, slot in layout.slots.items()}

    def run(self, kept: Collection[str] = (), factors: Mapping[str, Tensor] | None = None) -> Trial:
        """kept: parts that int8 leaves in float32. factors: to smooth with."""
        view = self._view if factors is None else smoothed_weights(self._view, self._pair.var, factors, kept)
        slots = dict(self._float32)
        for name, weight in stored_weights(view, Precision.INT8, kept).items():
            if name == SMOOTHING:
                slots |= self._written({SMOOTHING: weight}, "smoothing.safetensors")
            elif weight.dtype == "int8" or name not in slots:
                slots[name] = self._int8[factors is not None][name]
        engine = self._engine(Precision.INT8, slots)
        divergence = self._divergence(engine)  # and warm
        seconds: list[float] = []
        float32_seconds: list[float] = []
        began = time.perf_counter()
        while len(seconds) < REPEATS or time.perf_counter() - began < AT_LEAST_SECONDS:
            float32_seconds.append(self._seconds(self._exact))
            seconds.append(self._seconds(engine))
        return Trial(mean_kl=divergence, seconds=median(seconds), float32_seconds=median(float32_seconds))

    def _engine(self, precision: Precision, slots: dict[str, WeightSlot]) -> Engine:
        var = self._pair.var
        specs = graph_specs(var, self._pair.vqvae, precision)
        layout = WeightsLayout(b"", slots)
        for model, spec in (
            (condition_graph(var, specs["condition"], layout, precision), specs["condition"]),
            (scale_graph(var, self._pair.vqvae, None, layout, specs["scales"], precision), specs["scales"]),
        ):
            self._bundle.file(spec.file).write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        options = EngineOptions(graphs="symbolic", decoder="graph", threads=self._threads)
        return engine_for(self._bundle, "onnx", "cpu", options)

    def _divergence(self, engine: Engine) -> float:
        """Of all images: the largest mean KL of a scale."""
        config, calibration = self._pair.var, self._calibration
        found = []
        for forced in self._forced(engine, len(calibration.labels)):
            t = calibration.guidance * config.ratio(forced.k)
            expected = guided(calibration.reference.logits[forced.k].numpy(), t, 2)
            found.append(mean_kl(expected, guided(forced.logits_RnV, t, 2)))
        return float(np.max(found))  # NumPy's maximum keeps a NaN

    def _seconds(self, engine: Engine) -> float:
        """Of one image: what a request waits for."""
        return sum(forced.seconds for forced in self._forced(engine, 1))

    def _forced(self, engine: Engine, images: int) -> Iterator[ForcedScale]:
        calibration = self._calibration
        tokens = [tokens_Bn[:images].numpy() for tokens_Bn in calibration.reference.tokens]
        return teacher_forced(engine, self._pair.var, self._codebook_VC, tokens, calibration.labels[:images], copies=2)
