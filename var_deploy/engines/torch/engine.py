"""The PyTorch engine: requests on static buffers, replayed as CUDA graphs on a GPU, run as they are on a CPU.

The stages of `program.py` are captured once per batch size as one CUDA graph; a request then writes its classes, seeds
and settings into the input buffer and replays it. With a listener, every stage replays as a graph of its own. Axes: B
images, R rows (B, or 2B under guidance), n tokens of a scale, C code width, V codebook entries, h side of the feature
map, l = h² cells.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock

import numpy as np
import torch
from torch import Tensor

from var_kernels import Ops, reference_ops, triton_ops

from ...bundle import Bundle
from ...errors import EngineError
from ...given import Given
from ...precision import Precision
from ...sampling import Settings, invalid_logits
from ..choice import too_old
from ..engine import LoopForm, LoopResult, ScaleListener
from .buffers import Buffers
from .convolutions import Convolutions, library_convolutions
from .graphs import Clock, give_back_memory, out_of_memory, stream_of_its_own
from .program import Program
from .slots import Slots
from .weights import WeightReader, scaled_product

log = logging.getLogger("var_deploy")

#: How long the device is kept waiting while the host submits what is timed: about 5 ms, some hundred launches.
_HEAD_START_CYCLES = 10_000_000


def torch_engine(
    bundle: Bundle,
    device: str,
    *,
    precision: Precision | None,
    decode_slice: int | None = None,
    compile_decoder: bool = False,
    reason: str = "asked for",
) -> TorchEngine:
    """The engine on a device ("auto", "cpu", "cuda", "cuda:N"); None takes the precision for it. Raises EngineError."""
    place, device_reason = _device(device)
    precision_reason = "asked for"
    if precision is None:
        precision = Precision.BF16 if place.type == "cuda" else Precision.FP32
        precision_reason = f"the default on a {'GPU' if place.type == 'cuda' else 'CPU'}"
    if precision is Precision.FP8:
        _require_fp8(bundle, place)
    try:
        ops = triton_ops() if place.type == "cuda" else reference_ops()
    except ImportError as error:
        raise EngineError(f"engine 'torch' on a GPU needs triton ({error}); pip install 'var-deploy[gpu]'") from error
    products = (torch.backends.cuda if place.type == "cuda" else torch.backends.mkldnn).matmul.fp32_precision
    if precision is Precision.FP32 and products not in ("none", "ieee"):
        log.warning("float32 products may round: this process has PyTorch compute them as %r", products)
    log.info(
        "engine torch (%s) on %s (%s), precision %s (%s), %s kernels%s",
        reason,
        place,
        device_reason,
        precision,
        precision_reason,
        ops.name,
        ", decoder by torch.compile" if compile_decoder else "",
    )
    return TorchEngine(
        bundle, place, precision=precision, ops=ops, decode_slice=decode_slice, compile_decoder=compile_decoder
    )


def _device(device: str) -> tuple[torch.device, str]:
    """The device meant, and why it is that one."""
    if device == "cpu":
        return torch.device("cpu"), "asked for"
    index = int(device.partition(":")[2] or 0)  # compared before PyTorch sees it, which keeps 8 bits of it
    problem: str | None
    if not torch.cuda.is_available():
        problem = f"PyTorch {torch.__version__} sees no GPU"
    elif index >= torch.cuda.device_count():
        raise EngineError(f"device {device!r}: this machine has {torch.cuda.device_count()} GPUs, counted from 0")
    else:
        problem = too_old(torch.cuda.get_device_capability(index))
    if problem is None:
        return torch.device("cuda", index), "a GPU is there" if device == "auto" else "asked for"
    if device == "auto":
        return torch.device("cpu"), problem
    raise EngineError(f"device {device!r}: {problem}; use device 'cpu'")


def _require_fp8(bundle: Bundle, place: torch.device) -> None:
    """Refuses sizes and devices without a float8 product."""
    ffn_dim = bundle.manifest.var.ffn_dim
    if ffn_dim % 16:
        raise EngineError(f"precision 'fp8' needs an ffn_dim that is a multiple of 16, got {ffn_dim}; use bf16 or int8")
    if place.type == "cuda" and torch.cuda.get_device_capability(place) < (9, 0):
        raise EngineError("precision 'fp8' needs a Hopper GPU or later (compute capability 9.0); use bf16 or int8")


def float8_problem(place: torch.device) -> str | None:
    """What PyTorch says against a small float8 product on the current stream; None where it runs."""
    try:
        one_16x16 = torch.ones(16, 16, device=place)
        scale_16x1, bias_16 = one_16x16[:, :1].contiguous(), torch.zeros(16, device=place, dtype=torch.bfloat16)
        operand, out = one_16x16.to(torch.float8_e4m3fn), one_16x16.to(torch.bfloat16)
        scaled_product(operand, operand.t(), scale_16x1, scale_16x1.t(), bias_16, out)
        if place.type == "cuda":  # this stream alone: all of the device would break into another engine's capture
            torch.cuda.current_stream(place).synchronize()
    except RuntimeError as error:  # NotImplementedError is one
        if out_of_memory(error):
            raise
        return str(error).strip().splitlines()[0]
    return None


class TorchState:
    """One step-by-step generation: buffers of its own, every row an image of its own."""

    def __init__(self, buffers: Buffers) -> None:
        self.buffers = buffers
        self.rows = buffers.rows
        self.scales_added = 0

    @property
    def f_hat_RChh(self) -> np.ndarray:
        """A copy on the host."""
        return _map_on_host(self.buffers.f_hat_BlC(self.scales_added)[: self.rows])


class TorchEngine:
    """Runs a bundle's weights with PyTorch. Requests of several threads take turns; results are copies."""

    name = "torch"
    max_batch = None

    def __init__(
        self,
        bundle: Bundle,
        device: torch.device,
        *,
        precision: Precision,
        ops: Ops,
        decode_slice: int | None = None,
        compile_decoder: bool = False,
    ) -> None:
        self.device, self.precision = device, precision
        self._bundle, self._ops, self._decode_slice = bundle, ops, decode_slice
        self._lock = RLock()
        self._generating = False
        self._stream = stream_of_its_own(device) if device.type == "cuda" else None
        self._encoder: Convolutions | None = None  # made at the first encode: few callers need it
        with self._running():
            if precision is Precision.FP8 and (why := float8_problem(device)):
                library = f"PyTorch {torch.__version__}"
                raise EngineError(
                    f"precision 'fp8': {library} has no float8 product on {device} ({why}); use bf16 or int8"
                )
            self._program = Program(
                bundle, device, precision=precision, ops=ops, decode_slice=decode_slice, compile_decoder=compile_decoder
            )
            self._slots = Slots(self._program, device, self._stream)
        self._var = self._program.var

    # ---- whole generations -------------------------------------------------------------------------------------------

    def generate(
        self,
        labels_B: np.ndarray,
        seeds: list[int],
        settings: Settings,
        on_scale: ScaleListener | None,
        given: Given | None = None,
    ) -> LoopResult:
        """See `DeviceLoop`. The first request of a batch size captures its graphs, which takes seconds."""
        B = len(labels_B)
        with self._running(), self._once():
            form = LoopForm.of(settings, given=given is not None, staged=on_scale is not None)
            slot, stages = self._slots.ready(B, form)
            b, decode, clock = slot.buffers, slot.decode, Clock(self._stream)
            b.fill(labels_B, seeds, settings)
            b.inputs.upload()
            if given is not None:
                b.fill_given(given)
                b.given.upload()
            clock.mark("upload")
            for stage in stages:
                stage.launch()
                clock.mark(stage.name)
                if on_scale is not None and stage.completed is not None:
                    k = stage.completed
                    self._refuse_invalid(b.invalid_KB[:, :B].to("cpu", copy=True).numpy())
                    tokens_Bn = b.tokens_BL[:B, slice(*self._var.span(k))].to("cpu", copy=True).numpy()
                    on_scale(k, tokens_Bn, _map_on_host(b.f_hat_BlC(k + 1)[:B]))
            b.outputs.download()
            decode.pictures.download()
            pixels_B3RR = decode.pixels_B3RR[:B].clone()
            clock.mark("download")
            self._synchronize()
            self._refuse_invalid(b.outputs.host["invalid_KB"][:, :B])
            tokens_BL = b.outputs.host["tokens_BL"][:B]
            return LoopResult(
                tokens=[tokens_BL[:, slice(*self._var.span(k))].copy() for k in range(self._var.num_scales)],
                bytes_BRR3=decode.pictures.host["bytes_BRR3"][:B].copy(),
                pixels=lambda: pixels_B3RR.cpu().numpy(),
                timings=clock.seconds(),
            )

    def draft(self, labels_B: np.ndarray, seeds: list[int], settings: Settings, scales: int) -> Given:
        """See `DeviceLoop`."""
        B = len(labels_B)
        with self._running(), self._once():
            slot, stages = self._slots.ready(B, LoopForm.of(settings, draft_scales=scales))
            b = slot.buffers
            b.fill(labels_B, seeds, settings)
            b.inputs.upload()
            for stage in stages:
                stage.launch()
            b.outputs.download()
            codes_BlC = torch.cat([b.codes(k)[:B] for k in range(scales)], dim=1).cpu().numpy()
            self._synchronize()
            self._refuse_invalid(b.outputs.host["invalid_KB"][:, :B])
            tokens_Bl = b.outputs.host["tokens_BL"][:B, : codes_BlC.shape[1]]
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

        As one graph ("replay"), or `staged`: every stage as a graph of its own; without the decoder on request. On a
        CPU always by stage. head_start: the device waits until the host has submitted everything, or a short
        generation would be timed by how fast the host is.
        """
        with self._running(), self._once():
            slot, stages = self._slots.ready(len(labels_B), LoopForm.of(settings, staged=staged, decode=decode))
            slot.buffers.fill(labels_B, seeds, settings)
            slot.buffers.inputs.upload()
            if head_start and self._stream is not None:
                torch.cuda._sleep(_HEAD_START_CYCLES)
            clock = Clock(self._stream)
            for stage in stages:
                stage.launch()
                clock.mark(stage.name)
            self._synchronize()
            return clock.seconds()

    def peak_memory(self, run: Callable[[], object]) -> tuple[int, int]:
        """Most bytes that tensors take on the device during `run`, and that PyTorch reserves, for benchmarks."""
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)

    def _refuse_invalid(self, invalid_KB: np.ndarray) -> None:
        if invalid_KB.any():
            k, image = np.argwhere(invalid_KB)[0]
            raise invalid_logits(int(k), int(image))

    # ---- step by step ------------------------------------------------------------------------------------------------

    def begin(self, labels_R: np.ndarray) -> TorchState:
        with self._running():
            b = self._slots.buffers(len(labels_R), guided=False, smooth=False)
            b.inputs.host["labels_R"][:] = labels_R
            b.inputs.upload()
            self._program.condition(b)
            return TorchState(b)

    def step(self, state: TorchState, k: int, codes_RnC: np.ndarray | None) -> np.ndarray:
        with self._running():
            b = state.buffers
            if codes_RnC is not None:
                state.rows, state.scales_added = len(codes_RnC), k
                b.codes(k - 1)[: state.rows] = torch.from_numpy(codes_RnC).to(self.device)
                self._program.transformer.embed(b, k, b.batch)
            self._program.transformer.scale(b, k, state.rows)
            return b.logits(k, state.rows).to("cpu", copy=True).numpy()

    def finish(self, state: TorchState, codes_BnC: np.ndarray) -> np.ndarray:
        with self._running():
            b, K, B = state.buffers, self._var.num_scales, len(codes_BnC)
            b.codes(K - 1)[:B] = torch.from_numpy(codes_BnC).to(self.device)
            self._program.transformer.embed(b, K, b.batch)
            return _map_on_host(b.f_hat_BlC(K)[:B])

    def decode(self, f_hat_BChh: np.ndarray) -> np.ndarray:
        with self._running():
            B = len(f_hat_BChh)
            decode, replay = self._slots.ready_to_decode(B)
            decode.f_hat_BlC[:B] = torch.from_numpy(f_hat_BChh).to(self.device).flatten(2).transpose(1, 2)
            replay()
            return decode.pixels_B3RR[:B].to("cpu", copy=True).numpy()

    def encode(self, pixels_B3RR: np.ndarray) -> np.ndarray:
        with self._running():
            if self._encoder is None:
                read = WeightReader(self._bundle, self.device, self.precision, self._ops)
                self._encoder = Convolutions(self._bundle.manifest.vqvae, read, encoder=True)
            slices = torch.from_numpy(pixels_B3RR).split(self._decode_slice or len(pixels_B3RR))
            with library_convolutions():
                return np.concatenate([self._encoder.encode(part.to(self.device)).cpu().numpy() for part in slices])

    # ---- holding the engine ------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Gives back the buffers and graphs of all batch sizes; the next request makes its own again."""
        with self._running():
            self._slots.release()

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Holds the engine: one request at a time, on its stream, without autograd."""
        with self._lock, ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if self._stream is not None:
                stack.enter_context(torch.cuda.device(self.device))
                stack.enter_context(torch.cuda.stream(self._stream))
            try:
                yield
                return
            except EngineError:
                raise
            except Exception as error:
                if _of_triton(error):
                    why = str(error).strip().splitlines()[0]
                    name = torch.cuda.get_device_name(self.device)
                    raise EngineError(
                        f"{self.device} ({name}): a kernel cannot run here ({why}); report it, and use device 'cpu'"
                    ) from error
                if self._stream is None or not out_of_memory(error):
                    raise
                traceback.clear_frames(error.__traceback__)  # they hold the tensors of what failed
            give_back_memory()
            free = torch.cuda.mem_get_info(self.device)[0]
            raise EngineError(
                f"{self.device}: out of memory with {free / 1e9:.1f} GB free; free some, or take fewer images at a time"
            ) from None

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

    def _synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def _of_triton(error: Exception) -> bool:
    """Whether a kernel could not be compiled or started; Triton is not installed everywhere."""
    return any(base.__name__ == "TritonError" for base in type(error).__mro__)


def _map_on_host(f_hat_BlC: Tensor) -> np.ndarray:
    """f_hat as the other engines give it: a copy, [B, C, h, h]."""
    side = round(f_hat_BlC.shape[1] ** 0.5)
    return f_hat_BlC.transpose(1, 2).unflatten(2, (side, side)).to("cpu", copy=True).contiguous().numpy()
