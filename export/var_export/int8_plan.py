"""Which products of a model int8 may take, by measurement on this machine: is it faithful, and is it faster?

Every trial is the symbolic graph itself, run by the onnx engine on calibration tokens. All trials read the same two
files, the float32 bundle and the int8 forms of its products; only graphs are written again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from var_deploy.bundle import Bundle
from var_deploy.engines import Engine, EngineOptions, engine_for
from var_deploy.precision import Precision
from var_deploy.signature import graph_specs
from var_train.checkpoint import CheckpointPair

from .calibration import Calibration
from .deploy_view import LazyWeight, deploy_weights
from .precision import parts_of, stored_weights
from .smoothing import SMOOTHING, smoothed_weights
from .teacher_forcing import guided, mean_kl, teacher_forced
from .transformer_graphs import condition_graph, scale_graph
from .weights_file import WeightsLayout, WeightSlot, weights_layout, write_weights

#: Half of what the fidelity gate allows: calibration sees a few images, use sees others.
MAX_MEAN_KL = 0.005

#: Smoothing is used where it leaves at most this share of the divergence.
WORTHWHILE = 0.9

#: int8 has to take at most this share of float32's time; closer than that is noise.
FASTER = 0.97

#: Times that a trial is run; the shortest counts.
REPEATS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One graph on the calibration's tokens."""

    mean_kl: float  #: largest over the scales, of the guided distributions, in nats
    seconds: float  #: of all steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Plan:
    """What was found; `precision` is FP32 where int8 is refused."""

    precision: Precision
    reason: str
    kept: tuple[str, ...]  #: parts left in float32
    smoothing: bool
    float32_seconds: float
    seconds: float
    mean_kl: float
    sensitivity: dict[str, Trial]  #: part → it alone in int8
    calibration: str

    def to_dict(self) -> dict[str, Any]:
        """For the manifest: JSON-ready."""
        return {
            "reason": self.reason,
            "float32": list(self.kept),
            "smoothing": self.smoothing,
            "calibration": self.calibration,
            "mean_kl": self.mean_kl,
            "seconds": self.seconds,
            "float32_seconds": self.float32_seconds,
            "alone": {part: [trial.mean_kl, trial.seconds] for part, trial in self.sensitivity.items()},
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

    def plan(precision: Precision, reason: str, kept: Collection[str] = ()) -> Int8Plan:
        ordered = tuple(part for part in parts if part in kept)
        return Int8Plan(
            precision=precision,
            reason=reason,
            kept=ordered,
            smoothing=smoothing and precision is Precision.INT8,
            float32_seconds=exact.seconds,
            seconds=trial.seconds,
            mean_kl=trial.mean_kl,
            sensitivity=sensitivity,
            calibration=calibration.source,
        )

    progress("float32")
    exact = trials.run(Precision.FP32)
    progress("int8")
    sensitivity: dict[str, Trial] = {}
    smoothing, trial = False, trials.run(Precision.INT8)
    if trial.seconds > FASTER * exact.seconds:
        return plan(Precision.FP32, f"int8 is not faster here: {trial.seconds:.2f} s, float32 {exact.seconds:.2f} s")
    progress("int8, smoothed")
    smooth = trials.run(Precision.INT8, smoothing=True)
    if smooth.mean_kl < WORTHWHILE * trial.mean_kl:
        smoothing, trial = True, smooth
    for part in parts:
        progress(f"int8 in {part} alone")
        others = [other for other in parts if other != part]
        sensitivity[part] = trials.run(Precision.INT8, others, smoothing=smoothing)
    # The most sensitive parts go back to float32, one by one, until the rest is faithful.
    by_sensitivity = sorted(parts, key=lambda part: sensitivity[part].mean_kl, reverse=True)
    kept: list[str] = []
    while not trial.mean_kl <= MAX_MEAN_KL:  # a NaN is not faithful either
        if len(kept) == len(parts):
            return plan(Precision.FP32, f"int8 is not faithful: mean KL {trial.mean_kl:.1e}, limit {MAX_MEAN_KL:g}")
        kept.append(by_sensitivity[len(kept)])
        progress(f"int8 without {', '.join(kept)}")
        trial = trials.run(Precision.INT8, kept, smoothing=smoothing)
    if trial.seconds > FASTER * exact.seconds:
        return plan(
            Precision.FP32,
            f"what int8 may take is not faster here: {trial.seconds:.2f} s, float32 {exact.seconds:.2f} s",
        )
    return plan(Precision.INT8, f"{exact.seconds / trial.seconds:.2f} times as fast as float32", kept)


class _Trials:
    """Runs graphs that mix float32 and int8 products."""

    def __init__(self, pair: CheckpointPair, float32: Bundle, calibration: Calibration, threads: int | None) -> None:
        self._pair, self._bundle, self._calibration, self._threads = pair, float32, calibration, threads
        self._view = deploy_weights(pair)
        self._codebook_VC = float32.weight("quantize.embedding.weight")
        self._float32 = weights_layout(stored_weights(self._view, Precision.FP32)).slots
        smoothed = smoothed_weights(self._view, pair.var, calibration.peaks)
        self._int8 = {
            smoothing: self._written(stored_weights(view, Precision.INT8), f"int8_{smoothing}.safetensors")
            for smoothing, view in ((False, self._view), (True, smoothed))
        }

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

    def run(self, precision: Precision, kept: Collection[str] = (), *, smoothing: bool = False) -> Trial:
        """kept: parts that int8 leaves in float32."""
        var, peaks = self._pair.var, self._calibration.peaks
        view = smoothed_weights(self._view, var, peaks, kept) if smoothing else self._view
        slots = dict(self._float32)
        for name, weight in stored_weights(view, precision, kept).items():
            if name == SMOOTHING:
                slots |= self._written({SMOOTHING: weight}, "smoothing.safetensors")
            elif weight.dtype == "int8" or name not in slots:
                slots[name] = self._int8[smoothing][name]
        specs = graph_specs(var, self._pair.vqvae, precision)
        layout = WeightsLayout(b"", slots)
        for model, spec in (
            (condition_graph(var, specs["condition"], layout, precision), specs["condition"]),
            (scale_graph(var, self._pair.vqvae, None, layout, specs["scales"], precision), specs["scales"]),
        ):
            self._bundle.file(spec.file).write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        options = EngineOptions(graphs="symbolic", decoder="graph", threads=self._threads)
        engine = engine_for(self._bundle, "onnx", "cpu", options)
        runs = [self._forced(engine) for _ in range(REPEATS)]
        return Trial(mean_kl=runs[0].mean_kl, seconds=min(run.seconds for run in runs))

    def _forced(self, engine: Engine) -> Trial:
        config, calibration = self._pair.var, self._calibration
        reference, guidance = calibration.reference, calibration.guidance
        tokens = [tokens_Bn.numpy() for tokens_Bn in reference.tokens]
        divergence, seconds = [], 0.0
        for forced in teacher_forced(engine, config, self._codebook_VC, tokens, calibration.labels, copies=2):
            t = guidance * config.ratio(forced.k)
            expected, got = guided(reference.logits[forced.k].numpy(), t, 2), guided(forced.logits_RnV, t, 2)
            divergence.append(mean_kl(expected, got))
            seconds += forced.seconds
        return Trial(mean_kl=float(np.max(divergence)), seconds=seconds)  # NumPy's maximum keeps a NaN
