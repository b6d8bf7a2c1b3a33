"""The decode loop: class ids → tokens, scale by scale → image. The file to read first.

    begin(labels) → for each scale: logits = step(codes); tokens = draw(logits); codes = codebook[tokens]
                  → finish(codes) → decode(f_hat)

Axes: B images, R rows (B, or 2B under guidance: conditioned first, then the null class), n tokens of a scale, C code
width, V codebook entries, h side of the feature map.

The torch engine runs this same loop on its own side, as one CUDA graph where there is a GPU: `engines/torch/engine.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from PIL import Image

from . import request, sampling
from .bundle import Bundle
from .engines import DeviceLoop, Engine, EngineOptions, LoopResult, Planned, engine_for
from .images import images_from_pixels, pixels_from_images
from .memory import anonymous_size
from .memory_budget import MemoryBudget
from .prepared import default_cache
from .quantizer import Quantizer


def load(
    path: str | Path,
    *,
    engine: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    graphs: str = "symbolic",
    decoder: str = "auto",
    threads: int | None = None,
    memory_limit: int | None = None,
    decode_slice: int | None = None,
    compile_decoder: bool = False,
    plans: str | None = None,
    draw: str = "device",
    provider: str = "cuda",
    allow_cpu: bool = False,
    cache: bool = True,
    verify_digests: bool = True,
) -> Pipeline:
    """Opens a bundle and makes it ready to run.

    engine: "auto", "onnx" (ONNX Runtime; on a GPU only with device "cuda"), "torch" (PyTorch; with Triton kernels and
    one CUDA graph per generation on a GPU) or "tensorrt" (plans that were built on this machine). device: "auto",
    "cpu", "cuda" or "cuda:N". precision: the onnx and tensorrt engines run a bundle in its own; the torch engine reads
    fp32 bundles and makes fp32 of them on a CPU and bf16 on a GPU ("auto"), or fp16, int8 (weights only) and fp8
    (Hopper). What "auto" takes is logged with its reason.
    onnx on a CPU: graphs "symbolic" (one for all scales) or "static" (one per scale); decoder "graph", "winograd" (the
    same network with a quarter of the multiplications, equal to about 1e-5) or "auto", the faster one; threads, by
    default one per core that affinity and control group leave to this process; memory_limit, bytes that the process
    should stay within, by default what is free when a request starts (see `Pipeline.generate`). Several processes on
    one machine: give each its own cores and as many threads (`taskset -c 0-3` and threads=4).
    torch: decode_slice, images that the decoder takes at a time, for cards with little memory; compile_decoder, run it
    through torch.compile. tensorrt: plans, the name of their directory, by default those for the largest batch.
    tensorrt, and onnx on a GPU: draw, "device" or "host", which is slower and needs no compiled kernels. onnx on a GPU:
    provider, "cuda" or "tensorrt"; allow_cpu, run on the CPU what the provider has no kernel for, instead of refusing.
    cache: onnx only; keep weights in the form that this machine computes with in `~/.cache/var-deploy` (see
    `prepared`), which makes later starts faster and lets processes share the pages; it takes about twice the bundle's
    size on disk. Raises BundleError and EngineError.
    """
    bundle = Bundle.open(path, verify_digests=verify_digests)
    options = EngineOptions(
        precision=precision,
        graphs=graphs,
        decoder=decoder,
        threads=threads,
        memory_limit=memory_limit,
        prepared=default_cache(verify_digests=verify_digests) if cache else None,
        decode_slice=decode_slice,
        compile_decoder=compile_decoder,
        plans=plans,
        draw=draw,
        provider=provider,
        allow_cpu=allow_cpu,
    )
    before = anonymous_size()
    started = engine_for(bundle, engine, device, options)
    if not isinstance(started, Planned):
        return Pipeline(bundle, started)
    held = max(0, (anonymous_size() or 0) - (before or 0))
    plan, reused = started.memory_plan, started.memory_reused
    return Pipeline(bundle, started, MemoryBudget(plan=plan, limit=memory_limit, held=held, reused=reused))


@dataclass(frozen=True, eq=False)
class Preview:
    """What `on_scale` hears after scale `scale` was drawn and added to the feature map."""

    scale: int
    num_scales: int
    tokens_Bn: np.ndarray
    f_hat_BChh: np.ndarray
    _engine: Engine = field(repr=False)
    #: Position in the request of the first image that it covers: 0, but for the later parts of a batch that was split.
    first: int = 0

    @cached_property
    def images(self) -> list[Image.Image]:
        """The images so far; the decoder runs when this is first read, so it costs nothing unless looked at."""
        return images_from_pixels(self._engine.decode(self.f_hat_BChh))


@dataclass(frozen=True, eq=False)
class Generation:
    """The result of one request."""

    #: Per scale, int64 [B, n_k]: the drawn tokens. With `smooth`, the image comes from mixtures of codes instead.
    tokens: list[np.ndarray]
    #: Seconds per stage: condition, scale_00 …, draw, finish, decode; of a CUDA graph: upload, replay, download.
    timings: dict[str, float]
    _pixels: Callable[[], np.ndarray] = field(repr=False)
    _bytes_BRR3: np.ndarray | None = field(default=None, repr=False)
    #: Runs that the batch took, one after the other, to fit in memory.
    parts: int = 1

    @cached_property
    def pixels(self) -> np.ndarray:
        """float32 [B, 3, R, R] in [0, 1]; fetched from a GPU when first read, pictures are a quarter."""
        return self._pixels()

    @cached_property
    def images(self) -> list[Image.Image]:
        """8-bit pictures."""
        if self._bytes_BRR3 is None:
            return images_from_pixels(self.pixels)
        return [Image.fromarray(image) for image in self._bytes_BRR3]


class Pipeline:
    """A loaded bundle. Requests may run side by side from several threads."""

    def __init__(self, bundle: Bundle, engine: Engine, budget: MemoryBudget | None = None) -> None:
        """budget: what a request may take; None runs every batch as a whole."""
        self.bundle = bundle
        self.engine = engine
        self._budget = budget
        self._quantizer = Quantizer(bundle)

    def generate(
        self,
        labels: int | str | Sequence[int | str],
        *,
        seeds: int | Sequence[int] = 0,
        guidance: float | Sequence[float] | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        smooth: bool = False,
        on_scale: Callable[[Preview], None] | None = None,
    ) -> Generation:
        """Generates one image per label.

        labels: class ids or class names of the bundle. seeds: one integer (the images take s, s + 1, …) or one per
        image; in float32 and in int8 bundles an image depends on its class, seed and settings, not on the batch it came
        in, while the torch engine's lower precisions round otherwise in another batch size, which may change a token.
        guidance: strength at the
        last scale, growing linearly from 0 at the first as published; a sequence gives the strength of every scale;
        0 runs half the rows, as do all scales after the last whose strength is not 0. temperature divides the mixed
        logits. top_k, top_p: 0 turns a filter off. None takes the bundle's default. smooth: mix codes
        instead of taking the drawn one. on_scale: called after every scale. Raises RequestError.

        On a CPU a batch whose memory plan exceeds what is free (or `memory_limit`) runs in equal parts one after the
        other, with the same images; `timings` are summed, and a Preview is of one part and says which. Requests that
        run side by side are planned each for itself. Raises EngineError where not even one image fits.
        """
        labels_B = request.label_ids(labels, self.bundle.manifest)
        seed_list = request.seed_list(seeds, len(labels_B))
        settings = request.settings(self.bundle.manifest, guidance, top_k, top_p, smooth, temperature)
        if isinstance(self.engine, DeviceLoop):
            return self._run_on_device(self.engine, labels_B, seed_list, settings, on_scale)

        guided, most = settings.guided_scales > 0, self.engine.max_batch or len(labels_B)
        sizes = [min(most, len(labels_B) - first) for first in range(0, len(labels_B), most)]
        if self._budget is not None:
            sizes = self._budget.chunks(len(labels_B), guided)
        timings: dict[str, float] = {}
        tokens: list[list[np.ndarray]] = []
        pixels: list[np.ndarray] = []
        for first, size in zip(np.cumsum([0, *sizes]).tolist(), sizes, strict=False):
            part = slice(first, first + size)
            tokens_Kn, pixels_B3RR = self._run(labels_B[part], seed_list[part], settings, first, timings, on_scale)
            tokens.append(tokens_Kn)
            pixels.append(pixels_B3RR)
        joined_B3RR = np.concatenate(pixels)
        joined = [np.concatenate(scale) for scale in zip(*tokens, strict=True)]
        return Generation(joined, timings, lambda: joined_B3RR, parts=len(sizes))

    def _run_on_device(
        self,
        engine: DeviceLoop,
        labels_B: np.ndarray,
        seeds: list[int],
        settings: sampling.Settings,
        on_scale: Callable[[Preview], None] | None,
    ) -> Generation:
        """As many images at a time as the engine takes."""
        most = engine.max_batch or len(labels_B)
        done: list[LoopResult] = []
        timings: dict[str, float] = {}
        for first in range(0, len(labels_B), most):
            part = slice(first, first + most)
            listener = None if on_scale is None else partial(self._preview, on_scale, first)
            done.append(engine.generate(labels_B[part], seeds[part], settings, listener))
            for stage, seconds in done[-1].timings.items():
                timings[stage] = timings.get(stage, 0.0) + seconds
        if len(done) == 1:
            return Generation(done[0].tokens, timings, done[0].pixels, done[0].bytes_BRR3)
        tokens = [np.concatenate(scale) for scale in zip(*(part.tokens for part in done), strict=True)]
        return Generation(tokens, timings, lambda: np.concatenate([part.pixels() for part in done]), parts=len(done))

    def _run(
        self,
        labels_B: np.ndarray,
        seeds: list[int],
        settings: sampling.Settings,
        first: int,
        timings: dict[str, float],
        on_scale: Callable[[Preview], None] | None,
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """The loop for images that run at the same time: tokens by scale, and pixels [B, 3, R, R].

        first: position in the request of the first of them. Seconds are added to `timings`.
        """
        config, codebook_VC, B = self.bundle.manifest.var, self._quantizer.codebook_VC, len(labels_B)
        rows_R = np.append(labels_B, np.full(B, config.null_class)) if settings.guided_scales else labels_B
        tokens: list[np.ndarray] = []
        codes_BnC: np.ndarray | None = None

        def report(f_hat_RChh: Callable[[], np.ndarray]) -> None:  # which may have to come from a GPU
            if on_scale is not None and tokens:
                self._preview(on_scale, first, len(tokens) - 1, tokens[-1], f_hat_RChh()[:B].copy())

        with _timed(timings, "condition"):
            state = self.engine.begin(rows_R)
        for k in range(config.num_scales):
            with _timed(timings, f"scale_{k:02d}"):
                codes_RnC = codes_BnC
                if codes_BnC is not None and k < settings.guided_scales:
                    codes_RnC = np.concatenate([codes_BnC, codes_BnC])
                logits_RnV = self.engine.step(state, k, codes_RnC)
            report(partial(getattr, state, "f_hat_RChh"))  # f_hat now holds the scale before this one
            with _timed(timings, "draw"):
                begin = config.span(k)[0]
                drawn = sampling.draw_scale(logits_RnV, k, begin, seeds, settings, codebook_VC, first_image=first)
                tokens_Bn, codes_BnC = drawn
            del logits_RnV  # before the next scale's are allocated
            tokens.append(tokens_Bn)
        assert codes_BnC is not None  # there are at least two scales
        with _timed(timings, "finish"):
            f_hat_BChh = self.engine.finish(state, codes_BnC)
        del state  # the caches, before the decoder takes as much again
        report(lambda: f_hat_BChh)
        with _timed(timings, "decode"):
            pixels_B3RR = self.engine.decode(f_hat_BChh)
        return tokens, pixels_B3RR

    def _preview(
        self,
        on_scale: Callable[[Preview], None],
        first: int,
        k: int,
        tokens_Bn: np.ndarray,
        f_hat_BChh: np.ndarray,
    ) -> None:
        on_scale(Preview(k, self.bundle.manifest.var.num_scales, tokens_Bn, f_hat_BChh, self.engine, first))

    def encode(self, images: Sequence[Image.Image] | np.ndarray) -> list[np.ndarray]:
        """Token pyramid of images: K arrays int64 [B, n_k].

        Pictures of any size are scaled and centre-cropped; an array is float [B, 3, R, R] in [0, 1]. Raises
        RequestError.
        """
        pixels = pixels_from_images(images, self.bundle.manifest.vqvae.image_size)
        return self._quantizer.tokens_from_features(self.engine.encode(pixels))

    def decode(self, tokens: Sequence[np.ndarray]) -> np.ndarray:
        """Pixels [B, 3, R, R] in [0, 1] of a token pyramid (all scales, or the first few). Raises RequestError."""
        checked = request.token_pyramid(tokens, self.bundle.manifest.vqvae)
        return self.engine.decode(self._quantizer.features_from_tokens(checked))

    def reconstruct(self, images: Sequence[Image.Image] | np.ndarray) -> np.ndarray:
        """What `encode` takes, through all scales of the quantiser and the decoder: pixels [B, 3, R, R] in [0, 1]."""
        return self.decode(self.encode(images))


@contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - begin
