"""The reference model as a benchmark runs it: plain PyTorch with random weights of the same shapes, eager or compiled.

It computes as the published code does: on the same device, under autocast to the same activation precision, float32
products as TF32 where the precision is a half one, and its pictures come to the host in 8 bits like ours.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ..bundle import Manifest
from ..errors import EngineError
from ..precision import Precision

#: Of torch.compile; tests trace without generating code.
BACKEND = "inductor"


class Reference:
    """Runs `var_train.generate` for a batch size. Raises EngineError where PyTorch is not installed.

    stages: seconds of the last run by the host's clock, so they mean something on a CPU alone: "transformer" (with
    embedding and feature map), "draw" (guidance to code look-up), "decode", "rest" (pictures).
    """

    def __init__(
        self,
        manifest: Manifest,
        device: str,
        precision: Precision,
        *,
        guidance: float | None = None,
        threads: int | None = None,
    ) -> None:
        try:
            import torch

            from var_train import VAR, VQVAE
            from var_train.presets import randomise
        except ImportError as error:
            raise EngineError(f"the reference needs {error.name}; pip install 'var-deploy[train]'") from error
        if threads is not None:
            torch.set_num_threads(threads)
        self._manifest, self._device = manifest, torch.device(device)
        self._guidance = manifest.sampling.guidance if guidance is None else guidance
        with self._device:  # made where they live: on a CPU, two billion weights take minutes
            self._var, self._vqvae = VAR(manifest.var).eval(), VQVAE(manifest.vqvae).eval()
        randomise(self._var)
        randomise(self._vqvae)
        self.stages: dict[str, float] = {}
        self._compute_in(precision)

    def _compute_in(self, precision: Precision) -> None:
        import torch

        self._half = {Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}.get(precision.activation)
        tf32 = ", other float32 products as TF32" if self._half and self._device.type == "cuda" else ""
        self.how = f"autocast to {precision.activation}{tf32}" if self._half else "float32"

    def variant(self, precision: Precision, *, channels_last: bool = False) -> Reference:
        """The same model in another precision, to be compiled or not by itself; weights are there once.

        channels_last: the decoder's maps and weights lie channels last, which costs a copy of its weights.
        """
        import torch

        other = copy.copy(self)
        other.stages = {}
        other._var, other._vqvae = _sharing_weights(self._var), _sharing_weights(self._vqvae)
        other._compute_in(precision)
        if channels_last:
            for name in ("post_quant_conv", "decoder"):
                module = copy.deepcopy(getattr(self._vqvae, name)).to(memory_format=torch.channels_last)
                setattr(other._vqvae, name, module)
            other.how += ", channels-last decoder"
        return other

    def run(self, batch: int) -> Any:
        """Class ids → 8-bit pictures on the host: uint8 [B, R, R, 3]."""
        import torch

        from var_train import generate

        sampling = self._manifest.sampling
        with self._as_published(), self._clocked() as clock:
            labels_B = torch.arange(batch, device=self._device) % self._manifest.var.num_classes
            done = generate(
                self._var, self._vqvae, labels_B, guidance=self._guidance, top_k=sampling.top_k, top_p=sampling.top_p
            )
            clock.enter("rest")
            pictures = done.image_B3RR.float().mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
            on_host = pictures.cpu().numpy()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            return on_host

    def compile(self) -> None:
        """Compiles every block for any shape, and the decoder for each batch size; happens when they first run."""
        for block in self._var.blocks:
            # In place, as the model asks for the blocks' own class. They share their code: one compilation serves all.
            block.compile(backend=BACKEND, dynamic=True)
        self._vqvae.decoder.compile(backend=BACKEND, dynamic=False)

    @contextmanager
    def _clocked(self) -> Iterator[_StageClock]:
        """A clock that the model's own calls turn from stage to stage."""
        clock = _StageClock("transformer")
        handles = [
            self._var.head.register_forward_hook(lambda *_: clock.enter("draw")),
            self._vqvae.quantize.embedding.register_forward_hook(lambda *_: clock.enter("transformer")),
            self._vqvae.post_quant_conv.register_forward_pre_hook(lambda *_: clock.enter("decode")),
        ]
        try:
            yield clock
            self.stages = clock.stop()
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _as_published(self) -> Iterator[None]:
        import torch

        with ExitStack() as stack:
            if self._half is not None:
                # Keeps the cast weights for the whole generation, as autocast does by default.
                stack.enter_context(torch.autocast(self._device.type, dtype=self._half))
            if self._device.type == "cuda":
                stack.enter_context(torch.cuda.device(self._device))
                stack.enter_context(_float32_as("tf32" if self._half is not None else "ieee"))
            yield


class _StageClock:
    """Adds up seconds by stage."""

    def __init__(self, stage: str) -> None:
        self._seconds: dict[str, float] = {}
        self._stage, self._since = stage, time.perf_counter()

    def enter(self, stage: str) -> None:
        """Ends the stage that runs."""
        now = time.perf_counter()
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now

    def stop(self) -> dict[str, float]:
        self.enter("")
        return self._seconds


def _sharing_weights(model: Any) -> Any:
    """A copy with modules of its own and the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


@contextmanager
def _float32_as(precision: str) -> Iterator[None]:
    """How CUDA's libraries compute float32; convolutions time their algorithms."""
    import torch

    cudnn: Any = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    before = cudnn.enabled, cudnn.benchmark, cudnn.conv.fp32_precision, matmul.fp32_precision
    cudnn.enabled, cudnn.benchmark, cudnn.conv.fp32_precision, matmul.fp32_precision = True, True, precision, precision
    try:
        yield
    finally:
        cudnn.enabled, cudnn.benchmark, cudnn.conv.fp32_precision, matmul.fp32_precision = before
