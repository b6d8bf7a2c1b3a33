"""One slot per batch size: its static buffers and the CUDA graphs captured on them, made when first needed.

A batch runs in the next larger bucket, so that few graphs serve all; the spare images are drawn and thrown away. On a
CPU, where nothing is captured, a batch runs as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from ...errors import EngineError
from ...static_buffers import (
    BUCKETS,
    bucket_of,
    decode_specs,
    decoded_at_once,
    decoder_activation_bytes,
    generation_bytes,
    nbytes,
)
from ..engine import MAX_FORMS, LoopForm
from .buffers import Buffers, DecodeBuffers
from .graphs import Launch, captured, give_back_memory, out_of_memory
from .program import Program, Stage

log = logging.getLogger("var_deploy")

T = TypeVar("T")


@dataclass(slots=True)
class Slot:
    """What serves one batch size: buffers, and the graphs of every form that was asked for."""

    buffers: Buffers
    decode: DecodeBuffers
    graphs: dict[LoopForm, list[Stage]] = field(default_factory=dict)


class Slots:
    """All slots of an engine."""

    def __init__(self, program: Program, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._program, self._device, self._stream = program, device, stream
        self._slots: dict[tuple[int, bool, bool], Slot] = {}  # by bucket, whether guided, whether smooth
        self._decode: dict[int, DecodeBuffers] = {}
        self._decode_replays: dict[int, Launch] = {}
        self._pool = None if stream is None else torch.cuda.graph_pool_handle()

    def ready(self, B: int, form: LoopForm) -> tuple[Slot, list[Stage]]:
        """The slot of a batch and its stages: on a GPU as one graph, or where it is staged a graph for each.

        Raises EngineError, saying what fits, when the GPU's memory does not suffice; the engine stays usable.
        """

        def needed(batch: int) -> int:
            program = self._program
            return generation_bytes(
                program.var,
                program.vqvae,
                batch,
                program.precision,
                guided=form.guided_scales > 0,
                smooth=form.smooth,
                decode_slice=program.decode_slice,
            )

        return self._with_room(lambda: self._ready(B, form), B, needed)

    def _with_room(self, make: Callable[[], T], B: int, needed: Callable[[int], int]) -> T:
        for _ in range(2):  # the second time without other batch sizes, which may have been in the way
            try:
                return make()
            except EngineError:  # of a capture: it may have left the pool in a state that takes no other one
                self._pool = None if self._stream is None else torch.cuda.graph_pool_handle()
                raise
            except RuntimeError as error:  # its trace holds on to tensors until this block is left
                if not out_of_memory(error):
                    raise
            self.release()
        raise EngineError(self._too_large(B, needed))

    def _ready(self, B: int, form: LoopForm) -> tuple[Slot, list[Stage]]:
        bucket, guided = self._bucket(B), form.guided_scales > 0
        key = (bucket, guided, form.smooth)
        if key not in self._slots:
            if self._stream is None:
                self._slots.clear()  # on a CPU nothing but memory is won by keeping other sizes
            buffers = self.buffers(bucket, guided=guided, smooth=form.smooth)
            self._slots[key] = Slot(buffers, self._decode_buffers(bucket))
        slot = self._slots[key]
        if form.given:
            _ = slot.buffers.given  # makes it
        stages = self._program.stages(slot.buffers, slot.decode, form)
        if self._stream is None:
            return slot, stages
        if form in slot.graphs:
            slot.graphs[form] = slot.graphs.pop(form)  # the last asked for is the last in the order
        else:
            if len(slot.graphs) == MAX_FORMS:
                del slot.graphs[next(iter(slot.graphs))]
            log.info("capturing %s for batch %d", "a graph per stage" if form.staged else "one graph", bucket)
            if not form.staged:
                stages = [Stage("replay", partial(_launch_all, stages))]
            replays = captured([stage.launch for stage in stages], self._stream, self._pool)
            slot.graphs[form] = [
                Stage(stage.name, replay, stage.completed) for stage, replay in zip(stages, replays, strict=True)
            ]
        return slot, slot.graphs[form]

    def ready_to_decode(self, B: int) -> tuple[DecodeBuffers, Launch]:
        """Decoder buffers for a batch, and what decodes that which lies in their `f_hat_BlC`; raises as `ready`."""

        def needed(batch: int) -> int:
            program = self._program
            images = decoded_at_once(program.vqvae, batch, program.decode_slice)
            buffers = nbytes(decode_specs(program.vqvae, batch))
            return buffers + decoder_activation_bytes(program.vqvae, images, program.precision)

        return self._with_room(lambda: self._ready_to_decode(B), B, needed)

    def _ready_to_decode(self, B: int) -> tuple[DecodeBuffers, Launch]:
        bucket = self._bucket(B)
        decode = self._decode_buffers(bucket)
        launch: Launch = partial(self._program.decode, decode.f_hat_BlC, decode)
        if self._stream is None:
            return decode, launch
        if bucket not in self._decode_replays:
            (self._decode_replays[bucket],) = captured([launch], self._stream, self._pool)
        return decode, self._decode_replays[bucket]

    def buffers(self, batch: int, *, guided: bool, smooth: bool) -> Buffers:
        """New buffers for exactly this batch."""
        precision = self._program.precision
        return Buffers(
            self._program.var, batch=batch, guided=guided, precision=precision, device=self._device, smooth=smooth
        )

    def release(self) -> None:
        """Gives back all buffers and graphs."""
        self._slots.clear()
        self._decode.clear()
        self._decode_replays.clear()
        if self._stream is not None:
            self._stream.synchronize()
            self._pool = torch.cuda.graph_pool_handle()
            give_back_memory()

    def _decode_buffers(self, bucket: int) -> DecodeBuffers:
        if bucket not in self._decode:
            if self._stream is None:
                self._decode.clear()
            self._decode[bucket] = DecodeBuffers(self._program.vqvae, bucket, self._device)
        return self._decode[bucket]

    def _bucket(self, B: int) -> int:
        return B if self._stream is None else bucket_of(B)

    def _too_large(self, B: int, needed: Callable[[int], int]) -> str:
        free = torch.cuda.mem_get_info(self._device)[0]
        bucket = self._bucket(B)
        fits = [size for size in BUCKETS if size < bucket and needed(size) <= free]
        slices = "" if self._program.decode_slice else "; decode_slice=1 takes less for the decoder"
        step = f"batch {fits[-1]} should fit" if fits else "not even batch 1 fits: free memory on the GPU"
        return (
            f"batch {B}: needs about {needed(bucket) / 1e9:.1f} GB beside the weights, {free / 1e9:.1f} GB are free on "
            f"{self._device}; {step}{slices}"
        )


def _launch_all(stages: list[Stage]) -> None:
    for stage in stages:
        stage.launch()
