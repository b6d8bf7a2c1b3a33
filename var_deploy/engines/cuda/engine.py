"""The decode loop on a GPU for any library that runs the bundle's graphs there: TensorRT's plans, ONNX Runtime's CUDA.

    condition → for each scale: graph, draw → finish → decode

All on static buffers and one stream. Where launches can be captured they replay as one CUDA graph, or, with a listener,
as a graph for every stage. Draws are compiled kernels; without them the host draws, between steps. Axes as in
`buffers`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import RLock
from typing import TypeVar

import numpy as np

from ...bundle import Bundle
from ...errors import EngineError
from ...given import Given
from ...gpu import OutOfMemoryError
from ...quantizer import Quantizer
from ...sampling import Settings, invalid_logits, smooth_temperature
from ...signature import TensorSpec
from ...static_buffers import (
    bucket_of,
    decode_specs,
    fill_given,
    fill_request,
    given_specs,
    input_specs,
    nbytes,
    output_specs,
)
from ..engine import MAX_FORMS, LoopForm, LoopResult, ScaleListener
from .buffers import Buffers, GraphRunner, Launch, loop_specs
from .device import Device, Packed, Tensor
from .kernels import Kernels

log = logging.getLogger("var_deploy")

T = TypeVar("T")

#: Positions that one program of `uniforms` fills, mixtures of one of `mix_codes`, positions of one of `keep_given`.
_UNIFORMS_BLOCK, _MIX_BLOCK, _GIVEN_BLOCK = 128, 16, 32


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the loop."""

    name: str
    launch: Launch
    completed: int | None = None  #: the scale whose codes are part of f_hat from here on


@dataclass(slots=True, eq=False)
class _Slot:
    """What serves one batch size, and the stages of every form that was asked for."""

    buffers: Buffers
    inputs: Packed
    outputs: Packed
    pixels_B3RR: Tensor
    given: Packed | None = None  # made by the first request that gives tokens
    stages: dict[LoopForm, list[Stage]] = field(default_factory=dict)


@dataclass(slots=True, eq=False, weakref_slot=True)
class CudaState:
    """One step-by-step generation on buffers of its own, every row an image of its own."""

    engine: CudaEngine
    buffers: Buffers
    rows: int
    scales_added: int = 0

    @property
    def f_hat_RChh(self) -> np.ndarray:
        """A copy on the host."""
        with self.engine._running():
            return self.engine.device.download(self.buffers.f_hat(self.scales_added, self.rows))


@dataclass(slots=True, eq=False)
class _Map:
    """Input and output of decoder or encoder for one batch size."""

    source: Tensor
    result: Tensor
    launch: Launch


class CudaEngine:
    """Runs a bundle's graphs on a GPU and draws on the host. Requests of several threads take turns."""

    def __init__(self, name: str, bundle: Bundle, device: Device, runner: GraphRunner) -> None:
        self.name, self.precision = name, bundle.manifest.precision
        self._bundle, self.device, self._runner = bundle, device, runner
        self._manifest, self._var = bundle.manifest, bundle.manifest.var
        self._lock = RLock()
        self._idle: dict[int, list[Buffers]] = {}  # of states that have ended, by rows
        self._maps: dict[tuple[str, int], _Map] = {}

    @property
    def max_batch(self) -> int | None:
        """The most images at a time; None: as many as fit."""
        return self._runner.most_images

    def begin(self, labels_R: np.ndarray) -> CudaState:
        with self._running():
            rows = max(len(labels_R), self._runner.least_rows)
            idle = self._idle.setdefault(rows, [])
            buffers = idle.pop() if idle else self._with_room(rows, partial(self._buffers, rows))
            self.device.upload(buffers.labels, np.resize(labels_R.astype(np.int64), rows))
            buffers.clear()
            buffers.condition(buffers.labels)()
            self.device.synchronize()
            state = CudaState(self, buffers, len(labels_R))
            weakref.finalize(state, idle.append, buffers).atexit = False
            return state

    def _buffers(self, rows: int) -> Buffers:
        return Buffers(self.device, self._runner, self._manifest, rows=rows, images=rows)

    def step(self, state: CudaState, k: int, codes_RnC: np.ndarray | None) -> np.ndarray:
        with self._running():
            buffers = state.buffers
            if codes_RnC is not None:
                state.rows, state.scales_added = len(codes_RnC), k
                self.device.upload(buffers.codes(k - 1, state.rows), codes_RnC)
            rows = max(state.rows, self._runner.least_rows)
            buffers.scale(k, rows)()
            return self.device.download(buffers.logits(k, rows))[: state.rows]

    def finish(self, state: CudaState, codes_BnC: np.ndarray) -> np.ndarray:
        with self._running():
            buffers, K, B = state.buffers, self._var.num_scales, len(codes_BnC)
            self.device.upload(buffers.codes(K - 1, B), codes_BnC)
            rows = max(B, self._runner.least_rows)
            buffers.finish(rows)()
            return self.device.download(buffers.f_hat(K, rows))[:B]

    def decode(self, f_hat_BChh: np.ndarray) -> np.ndarray:
        return self._mapped("decoder", f_hat_BChh)

    def encode(self, pixels_B3RR: np.ndarray) -> np.ndarray:
        return self._mapped("encoder", pixels_B3RR)

    def release(self) -> None:
        """Gives back the buffers of all batch sizes; the next request makes its own again."""
        with self._running():
            self._release()

    def _release(self) -> None:
        self.device.synchronize()
        for idle in self._idle.values():
            idle.clear()
        self._maps.clear()

    def _mapped(self, graph: str, maps: np.ndarray) -> np.ndarray:
        """Decoder or encoder, as many images at a time as the graphs take."""
        most, results = self._runner.most_images or len(maps), []
        with self._running():
            for begin in range(0, len(maps), most):
                part = maps[begin : begin + most]
                batch = max(len(part), self._runner.least_rows)
                held = self._with_room(batch, partial(self._map, graph, batch))
                self.device.upload(held.source, np.resize(part, held.source.shape))
                held.launch()
                results.append(self.device.download(held.result)[: len(part)])
        return np.concatenate(results)

    def _map(self, graph: str, batch: int) -> _Map:
        key = graph, batch
        if key not in self._maps:
            spec = self._manifest.graphs[graph]
            (source,), (result,) = spec.inputs, spec.outputs
            shapes = {t.name: tuple(batch if side == "B" else int(side) for side in t.shape) for t in (source, result)}
            specs = [TensorSpec(t.name, t.dtype, shapes[t.name]) for t in (source, result)]
            tensors = self.device.tensors(specs)
            launch = self._runner.bound(graph, None, tensors)
            self._maps[key] = _Map(tensors[source.name], tensors[result.name], launch)
        return self._maps[key]

    def _with_room(self, rows: int, make: Callable[[], T]) -> T:
        try:
            return make()
        except OutOfMemoryError:
            self._release()  # other batch sizes may have been in the way
        try:
            return make()
        except OutOfMemoryError as error:
            needed = nbytes(loop_specs(self._manifest, rows, rows, smooth=False))
            free = self.device.free_memory()
            raise EngineError(
                f"{rows} rows: need {needed / 1e9:.1f} GB for caches and logits and some for scratch, {free / 1e9:.1f} "
                f"GB are free on the GPU; take fewer images at a time, or free some ({error})"
            ) from error

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Holds the engine: one request at a time, on its device."""
        with self._lock:
            self.device.make_current()
            yield


class CudaLoopEngine(CudaEngine):
    """The same with draws on the device, so that nothing crosses to the host between scales."""

    def __init__(
        self, name: str, bundle: Bundle, device: Device, runner: GraphRunner, kernels: Kernels, *, captures: bool
    ) -> None:
        """captures: whether the runner's launches can be part of a CUDA graph."""
        super().__init__(name, bundle, device, runner)
        self._kernels, self._captures, self._generating = kernels, captures, False
        self._slots: dict[tuple[int, bool, bool], _Slot] = {}  # by bucket, whether guided, whether smooth
        with self._running():
            codebook_VC = Quantizer(bundle).codebook_VC
            spec = TensorSpec("codebook", "float32", codebook_VC.shape)
            self._codebook_VC = device.tensors([spec])["codebook"]
            device.upload(self._codebook_VC, codebook_VC)

    def generate(
        self,
        labels_B: np.ndarray,
        seeds: list[int],
        settings: Settings,
        on_scale: ScaleListener | None,
        given: Given | None = None,
    ) -> LoopResult:
        """See `DeviceLoop`. The first request of a batch size captures its graphs."""
        B = len(labels_B)
        with self._running(), self._once():
            form = LoopForm.of(settings, given=given is not None, staged=on_scale is not None)
            slot, stages = self._ready(B, settings, form)
            device, clock = self.device, self.device.clock()
            fill_request(slot.inputs.host, self._var, slot.buffers.images, labels_B, seeds, settings)
            slot.inputs.upload()
            if given is not None and slot.given is not None:
                fill_given(slot.given.host, given)
                slot.given.upload()
            clock.mark("upload")
            for stage in stages:
                stage.launch()
                clock.mark(stage.name)
                if on_scale is not None and stage.completed is not None:
                    k = stage.completed
                    self._refuse_invalid(device.download(slot.outputs.device["invalid_KB"])[:, :B])
                    tokens_BL = device.download(slot.outputs.device["tokens_BL"])[:B]
                    f_hat_BChh = device.download(slot.buffers.f_hat(k + 1, B))
                    on_scale(k, tokens_BL[:, slice(*self._var.span(k))].copy(), f_hat_BChh)
            slot.outputs.download()
            pixels_B3RR = device.download(slot.pixels_B3RR.front(B, *slot.pixels_B3RR.shape[1:]))
            clock.mark("download")
            device.synchronize()
            self._refuse_invalid(slot.outputs.host["invalid_KB"][:, :B])
            tokens_BL = slot.outputs.host["tokens_BL"][:B]
            tokens = [tokens_BL[:, slice(*self._var.span(k))].copy() for k in range(self._var.num_scales)]
            return LoopResult(tokens=tokens, bytes_BRR3=None, pixels=lambda: pixels_B3RR, timings=clock.seconds())

    def draft(self, labels_B: np.ndarray, seeds: list[int], settings: Settings, scales: int) -> Given:
        """See `DeviceLoop`."""
        B = len(labels_B)
        with self._running(), self._once():
            slot, stages = self._ready(B, settings, LoopForm.of(settings, draft_scales=scales))
            fill_request(slot.inputs.host, self._var, slot.buffers.images, labels_B, seeds, settings)
            slot.inputs.upload()
            for stage in stages:
                stage.launch()
            slot.outputs.download()
            codes = [self.device.download(slot.buffers.codes(k, B)) for k in range(scales)]
            self._refuse_invalid(slot.outputs.host["invalid_KB"][:, :B])
            codes_BlC = np.concatenate(codes, axis=1)
            tokens_Bl = slot.outputs.host["tokens_BL"][:B, : codes_BlC.shape[1]]
            return Given.of_scales(tokens_Bl, codes_BlC, self._var.num_tokens)

    def device_seconds(
        self,
        labels_B: np.ndarray,
        seeds: list[int],
        settings: Settings,
        *,
        staged: bool = False,
        decode: bool = True,
        head_start: bool = True,
    ) -> dict[str, float]:
        """Seconds on the device of one generation whose input lies there already, for benchmarks.

        As one graph ("replay") where launches are captured, or `staged`; without the decoder on request. head_start is
        ignored: a graph is submitted at once, and what a library submits stage by stage waits for the host in earnest.
        """
        with self._running(), self._once():
            form = LoopForm.of(settings, staged=staged, decode=decode)
            slot, stages = self._ready(len(labels_B), settings, form)
            fill_request(slot.inputs.host, self._var, slot.buffers.images, labels_B, seeds, settings)
            slot.inputs.upload()
            clock = self.device.clock()
            for stage in stages:
                stage.launch()
                clock.mark(stage.name)
            self.device.synchronize()
            return clock.seconds()

    def peak_memory(self, run: Callable[[], object]) -> tuple[int, int]:
        """Bytes of the GPU that are taken after `run`, beyond those before the engine was made, for benchmarks.

        What stays is the most: buffers and graphs are kept. Other processes on the GPU are not told apart.
        """
        run()
        with self._running():
            taken = self.device.gpu.free_memory - self.device.free_memory()
        return taken, taken

    def _ready(self, B: int, settings: Settings, form: LoopForm) -> tuple[_Slot, list[Stage]]:
        bucket, most = max(bucket_of(B), self._runner.least_rows), self._runner.most_images
        if most is not None:
            if most < B:
                raise EngineError(f"batch {B}: at most {most} images at a time; give fewer, or build for more")
            bucket = min(bucket, most)
        guided = form.guided_scales > 0
        rows = 2 * bucket if guided else bucket
        key = bucket, guided, form.smooth

        def make() -> tuple[_Slot, list[Stage]]:
            if key not in self._slots:
                self._slots[key] = self._slot(bucket, rows, settings, smooth=form.smooth)
            slot = self._slots[key]
            if form.given and slot.given is None:
                slot.given = self.device.packed(given_specs(self._var, bucket))
            stages = slot.stages.pop(form, None)
            if stages is None:
                stages = self._made(slot, form)
                if len(slot.stages) == MAX_FORMS:
                    del slot.stages[next(iter(slot.stages))]
            slot.stages[form] = stages  # the last asked for is the last in the order
            return slot, stages

        return self._with_room(rows, make)

    def _slot(self, bucket: int, rows: int, settings: Settings, *, smooth: bool) -> _Slot:
        buffers = Buffers(self.device, self._runner, self._manifest, rows=rows, images=bucket, smooth=smooth)
        inputs = self.device.packed(input_specs(self._var, bucket, rows))
        # Graphs are captured before the request's own values are there: what runs then must be able to run.
        fill_request(inputs.host, self._var, bucket, np.zeros(0, np.int64), [], settings)
        inputs.upload()
        outputs = self.device.packed(output_specs(self._var, bucket))
        pixels = self.device.tensors([decode_specs(self._manifest.vqvae, bucket)[1]])["pixels_B3RR"]
        return _Slot(buffers, inputs, outputs, pixels)

    def _made(self, slot: _Slot, form: LoopForm) -> list[Stage]:
        """The stages as they replay: one graph for all, a graph for each, or launches where nothing is captured."""
        stages = self._stages(slot, form)
        if not self._captures:
            return stages
        for stage in stages:  # once as they are: libraries allocate and choose now, which a capture may not
            stage.launch()
        self.device.synchronize()
        log.info("capturing %s for batch %d", "a graph per stage" if form.staged else "one graph", slot.buffers.images)
        if not form.staged:
            stages = [Stage("replay", partial(_launch_all, stages))]
        try:
            return [Stage(stage.name, self.device.captured(stage.launch), stage.completed) for stage in stages]
        except OutOfMemoryError:
            raise
        except EngineError as error:  # a library that launches something which a graph cannot hold
            log.warning("%s; running without CUDA graphs, which takes longer at small batches", error)
            return stages

    def _stages(self, slot: _Slot, form: LoopForm) -> list[Stage]:
        """A whole generation, or its first scales; null-class rows run at the first `guided_scales` scales, which is
        exact: nothing reads their logits or caches later.
        """
        buffers, K, B = slot.buffers, self._var.num_scales, slot.buffers.images
        condition = buffers.condition(slot.inputs.device["labels_R"])
        stages = [Stage("condition", partial(self._condition, slot, condition))]
        for k in range(form.draft_scales or K):
            guided, repeated = k < form.guided_scales, 0 < k < form.guided_scales
            launch = buffers.scale(k, 2 * B if guided else B)
            stages.append(
                Stage(f"scale_{k:02d}", partial(self._scale, buffers, k, launch, repeated), k - 1 if k else None)
            )
            stages.append(Stage("draw", partial(self._draw, slot, k, form)))
        if form.draft_scales is not None:
            return stages
        stages.append(Stage("finish", buffers.finish(B), K - 1))
        if form.decode:
            stages.append(Stage("decode", buffers.decode(B, slot.pixels_B3RR)))
        return stages

    def _condition(self, slot: _Slot, launch: Launch) -> None:
        uniforms, seeds_B = slot.buffers.uniforms, slot.inputs.device["seeds_B"]
        self.device.zero(slot.outputs.device["invalid_KB"])
        slot.buffers.clear()
        B, L = uniforms.shape
        self._kernels.launch(
            "uniforms", (B, -(-L // _UNIFORMS_BLOCK)), seeds_ptr=seeds_B.address, out_ptr=uniforms.address
        )
        launch()

    def _scale(self, buffers: Buffers, k: int, launch: Launch, repeated: bool) -> None:
        if repeated:
            buffers.repeat_codes(k - 1, buffers.images)
        launch()

    def _draw(self, slot: _Slot, k: int, form: LoopForm) -> None:
        """Logits of scale k → tokens and codes, those that are given last."""
        buffers, inputs, outputs = slot.buffers, slot.inputs.device, slot.outputs.device
        B, smooth, guided, begin = buffers.images, form.smooths[k], k < form.guided_scales, self._var.span(k)[0]
        n, L, ratio = self._var.tokens_per_scale[k], self._var.num_tokens, self._var.ratio(k)
        codes = buffers.codes(k, B)
        arguments: dict[str, int | float] = {
            "logits_ptr": buffers.logits(k, 2 * B if guided else B).address,
            "uniforms_ptr": buffers.uniforms.address + 8 * begin,
            "strength_ptr": inputs["strength_KB"][k].address,
            "temperature_ptr": inputs["temperature_KB"][k].address,
            "top_k_ptr": inputs["top_k_KB"][k].address,
            "top_p_ptr": inputs["top_p_KB"][k].address,
            "codebook_ptr": self._codebook_VC.address,
            "tokens_ptr": outputs["tokens_BL"].address + 8 * begin,
            "codes_ptr": codes.address,
            "invalid_ptr": outputs["invalid_KB"][k].address,
            "uniforms_stride": L,
            "tokens_stride": L,
            "begin": begin,
            "sharpening": 1 + ratio,
            "tau": smooth_temperature(ratio),
        }
        name = "draw_guided" if guided else "draw"
        if smooth:
            weights = buffers.smooth(k, B)
            self._kernels.launch(
                f"{name}_smooth", (n, B), smooth_ptr=weights.address, seeds_ptr=inputs["seeds_B"].address, **arguments
            )
            self._kernels.launch(
                "mix_codes",
                (-(-B * n // _MIX_BLOCK),),
                weights_ptr=weights.address,
                codebook_ptr=self._codebook_VC.address,
                codes_ptr=codes.address,
                M=B * n,
            )
        else:
            self._kernels.launch(name, (n, B), **arguments)
        if form.given and slot.given is not None:
            C, given = self._var.z_channels, slot.given.device
            self._kernels.launch(
                "keep_given",
                (-(-n // _GIVEN_BLOCK), B),
                given_tokens_ptr=given["tokens_BL"].address + 8 * begin,
                given_codes_ptr=given["codes_BLC"].address + 4 * C * begin,
                tokens_ptr=arguments["tokens_ptr"],
                codes_ptr=codes.address,
                n=n,
                given_tokens_stride=L,
                given_codes_stride=C * L,
                tokens_stride=L,
            )

    def _refuse_invalid(self, invalid_KB: np.ndarray) -> None:
        if invalid_KB.any():
            k, image = np.argwhere(invalid_KB)[0]
            raise invalid_logits(int(k), int(image))

    def _release(self) -> None:
        super()._release()
        self._slots.clear()

    @contextmanager
    def _once(self) -> Iterator[None]:
        """Refuses a generation inside a generation's listener: both would work on the same buffers."""
        if self._generating:
            raise EngineError("generate: called from the on_scale of another generation; wait until that has returned")
        self._generating = True
        try:
            yield
        finally:
            self._generating = False


def _launch_all(stages: list[Stage]) -> None:
    for stage in stages:
        stage.launch()
