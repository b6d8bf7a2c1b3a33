"""A bundle that is loaded: class ids → images, pictures → tokens, edits; all checked here, then run by the engine.

The loop itself is in `decode_loop.py`, or on the engine's side. Axes: B images, K scales, n tokens of a scale, L
positions of all scales, C code width, h side of the feature map, R side of an image in pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from PIL import Image

from . import decode_loop, request, schedules
from .bundle import Bundle
from .collaboration import check_partners
from .editing import Mode, composited, kept_positions, region
from .engines import DeviceLoop, Engine, EngineOptions, LoopResult, Planned, engine_for
from .errors import RequestError
from .given import DRAWN, Given
from .images import picture_sizes, pixels_from_images
from .memory import anonymous_size
from .memory_budget import MemoryBudget
from .prepared import default_cache
from .quantizer import Quantizer
from .recipe import Recipe, check_recipes
from .results import Generation, Preview
from .sampling import Settings
from .schedules import Sampling

#: Pictures of any size, or one array of floats [B, 3, R, R] in [0, 1].
Pictures = Sequence[Image.Image] | Image.Image | np.ndarray
OnScale = Callable[[Preview], None]


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


class Pipeline:
    """A loaded bundle. Requests may run side by side from several threads."""

    def __init__(self, bundle: Bundle, engine: Engine, budget: MemoryBudget | None = None) -> None:
        """budget: what a request may take; None runs every batch as a whole."""
        self.bundle = bundle
        self.engine = engine
        self._budget = budget
        self._var = bundle.manifest.var
        self.quantizer = Quantizer(bundle)

    # ---- requests ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        labels: int | str | Sequence[int | str],
        *,
        seeds: int | Sequence[int] = 0,
        prefix_tokens: Sequence[np.ndarray] | None = None,
        refine: Pipeline | None = None,
        draft_scales: int | None = None,
        on_scale: OnScale | None = None,
        **sampling: Unpack[Sampling],
    ) -> Generation:
        """Generates one image per label.

        labels: class ids or class names of the bundle. seeds: one integer (the images take s, s + 1, …) or one per
        image; in float32 and in int8 bundles an image depends on its class, seed and settings, not on the batch it came
        in, while the torch engine's lower precisions round otherwise in another batch size, which may change a token.
        guidance: strength at the last scale, growing linearly from 0 at the first as published; a sequence gives the
        strength of every scale; 0 runs half the rows, as do all scales after the last whose strength is not 0.
        temperature divides the mixed logits. top_k, top_p: 0 turns a filter off. smooth: mix codes instead of taking
        the drawn one. Each may be one value per scale. preset: published settings by name, see `schedules`.
        on_scale: called after every scale.

        prefix_tokens: tokens of the first few scales, K' arrays [B, n_k], which are taken as they are; the finer
        scales are drawn. refine, draft_scales: collaborative decoding (arXiv 2411.17787): this model draws the first
        scales, the other one the rest, from the same codes; both have to have the same quantiser. Raises RequestError.

        On a CPU a batch whose memory plan exceeds what is free (or `memory_limit`) runs in equal parts one after the
        other, with the same images; `timings` are summed, and a Preview is of one part and says which. Requests that
        run side by side are planned each for itself. Raises EngineError where not even one image fits.
        """
        labels_B = request.label_ids(labels, self.bundle.manifest)
        seed_list = request.seed_list(seeds, len(labels_B))
        settings = schedules.settings(self.bundle.manifest, **sampling)
        if (refine is None) != (draft_scales is None):
            raise RequestError("generate: refine and draft_scales belong together; give both, or neither")
        given = None
        if prefix_tokens is not None:
            prefix_BL = request.prefix(prefix_tokens, len(labels_B), self.bundle.manifest.vqvae)
            given = Given.of_tokens(prefix_BL, self.quantizer.codebook_VC)
        if refine is None or draft_scales is None:
            return self._request(labels_B, seed_list, settings, given, on_scale)
        if given is not None:
            raise RequestError("generate: prefix_tokens with refine; give the tokens to the refiner alone")
        self._check_partner(refine, draft_scales)
        return self._refined(refine, draft_scales, labels_B, seed_list, settings, on_scale)

    def edit(
        self,
        images: Pictures,
        labels: int | str | Sequence[int | str] | None = None,
        *,
        box: Sequence[float] | None = None,
        mask: Any | None = None,
        mode: str = "inpaint",
        seeds: int | Sequence[int] = 0,
        composite: bool = False,
        on_scale: OnScale | None = None,
        **sampling: Unpack[Sampling],
    ) -> Generation:
        """Redraws a part of pictures; the rest keeps its tokens (VAR paper, section 5.3, zero-shot).

        images: as `encode` takes them, or one picture; labels: class ids or names, None for no class; one picture, one
        mask and one label serve for all images, and seeds count up from one integer. box: (y0, x0, y1, x1), parts of
        the picture's sides from 0 to 1. mask: instead of a box, one or one per picture, set where the box would be (see
        `editing.region`). mode: "inpaint" redraws that region, "outpaint" keeps it and redraws the rest. composite: put
        the original's pixels back where it was kept, with a seam of one token's width; else all pixels come from the
        decoder, which also changes those that were kept, as `reconstruct` does. preset="paper-edit" are the published
        settings. Without a class guidance has nothing to do and is left out. Raises RequestError.
        """
        config = self.bundle.manifest.vqvae
        outpaint = Mode.parse(mode) is Mode.OUTPAINT
        pictures = [images] if isinstance(images, Image.Image) else images
        region_Bhh = region(box, mask, picture_sizes(pictures), config)
        pixels_B3RR = pixels_from_images(pictures, config.image_size)
        counts = {"images": len(pixels_B3RR), "masks": len(region_Bhh)}
        B = request.common_count(**counts, labels=request.count_of(labels), seeds=request.count_of(seeds))
        keep_Bhh = request.repeated(region_Bhh if outpaint else 1 - region_Bhh, B)
        kept_BL = kept_positions(keep_Bhh, config)
        tokens_BL = request.repeated(np.concatenate(self._tokens(pixels_B3RR), axis=1), B)
        given = Given.of_tokens(np.where(kept_BL, tokens_BL, DRAWN), self.quantizer.codebook_VC)
        made = self._edited(labels, seeds, given, on_scale, sampling)
        if not composite:
            return made
        n, h = config.tokens_per_scale[-1], config.latent_size
        kept_Bhh = kept_BL[:, -n:].reshape(B, h, h)
        pixels = composited(made.pixels, request.repeated(pixels_B3RR, B), kept_Bhh)
        recipes = tuple(replace(recipe, composite=True) for recipe in made.recipes)
        return replace(made, _pixels=lambda: pixels, _bytes_BRR3=None, recipes=recipes)

    def vary(
        self,
        images: Pictures,
        labels: int | str | Sequence[int | str] | None = None,
        *,
        from_scale: int,
        seeds: int | Sequence[int] = 0,
        on_scale: OnScale | None = None,
        **sampling: Unpack[Sampling],
    ) -> Generation:
        """Keeps the coarse scales of pictures and redraws scale `from_scale` and all finer ones.

        from_scale: from 1 to K − 1, counted from 0 at the coarsest. One picture and one label serve for all images, and
        seeds count up from one integer; labels: None for no class. Raises RequestError.
        """
        var = self.bundle.manifest.var
        if not request.is_integer(from_scale) or not 1 <= from_scale < var.num_scales:
            raise RequestError(f"from_scale: got {from_scale!r}, expected a scale from 1 to {var.num_scales - 1}")
        tokens = self.encode([images] if isinstance(images, Image.Image) else images)
        counts = {"labels": request.count_of(labels), "seeds": request.count_of(seeds)}
        B = request.common_count(images=len(tokens[0]), **counts)
        tokens_BL = request.repeated(np.concatenate(tokens, axis=1), B)
        tokens_BL[:, var.span(from_scale)[0] :] = DRAWN
        given = Given.of_tokens(tokens_BL, self.quantizer.codebook_VC)
        return self._edited(labels, seeds, given, on_scale, sampling)

    def remake(self, recipes: Sequence[Recipe], *, refine: Pipeline | None = None) -> Generation:
        """The images of recipes again, which must have the same settings; refine: the refiner, where they had one.

        Equal to the bit where an image does not depend on its batch (see `generate`) and engine, its options, device
        and library versions are the same; else up to rounding, which may change a token. Raises RequestError.
        """
        check_recipes(recipes, self.bundle, None if refine is None else refine.bundle)
        first = recipes[0]
        if refine is not None:
            self._check_partner(refine, first.draft_scales)
        labels_B = np.array([recipe.label for recipe in recipes], dtype=np.int64)
        seeds = [recipe.seed for recipe in recipes]
        if refine is not None and first.draft_scales is not None:
            return self._refined(refine, first.draft_scales, labels_B, seeds, first.settings, None)
        given = None
        if first.given is not None:
            tokens_BL = np.array([recipe.given for recipe in recipes], dtype=np.int64)
            given = Given.of_tokens(tokens_BL, self.quantizer.codebook_VC)
        return self._request(labels_B, seeds, first.settings, given, None)

    def _check_partner(self, refiner: Pipeline, draft_scales: int | None) -> None:
        if not isinstance(refiner, Pipeline):
            raise RequestError(f"refine: got {type(refiner).__name__}, expected a loaded bundle")
        check_partners(self.bundle, self.quantizer, refiner.bundle, refiner.quantizer, draft_scales)

    # ---- how they run ------------------------------------------------------------------------------------------------

    def _edited(
        self,
        labels: int | str | Sequence[int | str] | None,
        seeds: int | Sequence[int],
        given: Given,
        on_scale: OnScale | None,
        sampling: Sampling,
    ) -> Generation:
        B, manifest = len(given.tokens_BL), self.bundle.manifest
        settings = schedules.settings(manifest, **sampling)
        if labels is None:  # both kinds of rows would be of the null class: guidance changes nothing
            labels_B = np.full(B, manifest.var.null_class, dtype=np.int64)
            settings = replace(settings, strengths=(0.0,) * manifest.var.num_scales)
        else:
            labels_B = request.repeated(request.label_ids(labels, manifest), B)
        seed_list = request.seed_list(seeds, B)
        return self._request(labels_B, seed_list, settings, given, on_scale)

    def _request(
        self,
        labels_B: np.ndarray,
        seeds: list[int],
        settings: Settings,
        given: Given | None,
        on_scale: OnScale | None,
    ) -> Generation:
        """A checked request, in as many parts as it takes."""
        done: list[LoopResult] = []
        for part in self._parts(len(labels_B), settings):
            given_part = None if given is None else given.part(part)
            listener = None if on_scale is None else partial(self._preview, on_scale, part.start)
            asked = labels_B[part], seeds[part], settings, listener, given_part
            if isinstance(self.engine, DeviceLoop):
                done.append(self.engine.generate(*asked))
            else:
                done.append(decode_loop.generate(self.engine, self._var, self.quantizer, *asked, first=part.start))
        timings: dict[str, float] = {}
        for stage, seconds in (pair for part in done for pair in part.timings.items()):
            timings[stage] = timings.get(stage, 0.0) + seconds
        if len(done) == 1:
            tokens, pixels, bytes_BRR3 = done[0].tokens, done[0].pixels, done[0].bytes_BRR3
        else:
            tokens = [np.concatenate(scale) for scale in zip(*(part.tokens for part in done), strict=True)]
            pixels, bytes_BRR3 = (lambda: np.concatenate([part.pixels() for part in done])), None
        recipes = (
            Recipe(
                bundle=self.bundle.digest,
                label=int(label),
                seed=seed,
                settings=settings,
                engine=self.engine.name,
                precision=str(self.engine.precision),
                given=None if given is None else tuple(given.tokens_BL[index].tolist()),
            )
            for index, (label, seed) in enumerate(zip(labels_B, seeds, strict=True))
        )
        return Generation(tokens, timings, pixels, bytes_BRR3, parts=len(done), recipes=tuple(recipes))

    def _refined(
        self,
        refiner: Pipeline,
        scales: int,
        labels_B: np.ndarray,
        seeds: list[int],
        settings: Settings,
        on_scale: OnScale | None,
    ) -> Generation:
        """The first scales by this model, the rest by the other."""
        began = time.perf_counter()
        draft = self._draft(labels_B, seeds, settings, scales)
        seconds = time.perf_counter() - began
        made = refiner._request(labels_B, seeds, settings, draft, on_scale)
        recipes = (
            replace(
                recipe,
                bundle=self.bundle.digest,
                refiner=refiner.bundle.digest,
                draft_scales=scales,
                given=None,
                engine=f"{self.engine.name}+{recipe.engine}",
                precision=f"{self.engine.precision}+{recipe.precision}",
            )
            for recipe in made.recipes
        )
        return replace(made, timings={"draft": seconds} | made.timings, recipes=tuple(recipes))

    def _draft(self, labels_B: np.ndarray, seeds: list[int], settings: Settings, scales: int) -> Given:
        """Tokens and codes of the first scales."""
        parts: list[Given] = []
        for part in self._parts(len(labels_B), settings):
            asked = labels_B[part], seeds[part], settings, scales
            if isinstance(self.engine, DeviceLoop):
                parts.append(self.engine.draft(*asked))
            else:
                parts.append(decode_loop.draft(self.engine, self._var, self.quantizer, *asked, first=part.start))
        return Given.joined(parts)

    def _parts(self, B: int, settings: Settings) -> list[slice]:
        """Images that run at the same time: as many as the engine takes, and as fit in memory."""
        most = self.engine.max_batch or B
        sizes = [min(most, B - first) for first in range(0, B, most)]
        if self._budget is not None:
            sizes = self._budget.chunks(B, settings.guided_scales > 0)
        ends = np.cumsum(sizes).tolist()
        return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    def _preview(
        self,
        on_scale: OnScale,
        first: int,
        k: int,
        tokens_Bn: np.ndarray,
        f_hat_BChh: np.ndarray,
    ) -> None:
        on_scale(Preview(k, self._var.num_scales, tokens_Bn, f_hat_BChh, self.engine, first))

    # ---- tokens ------------------------------------------------------------------------------------------------------

    def encode(self, images: Sequence[Image.Image] | np.ndarray) -> list[np.ndarray]:
        """Token pyramid of images: K arrays int64 [B, n_k].

        Pictures of any size are scaled and centre-cropped; an array is float [B, 3, R, R] in [0, 1]. Raises
        RequestError.
        """
        return self._tokens(pixels_from_images(images, self.bundle.manifest.vqvae.image_size))

    def _tokens(self, pixels_B3RR: np.ndarray) -> list[np.ndarray]:
        return self.quantizer.tokens_from_features(self.engine.encode(pixels_B3RR))

    def decode(self, tokens: Sequence[np.ndarray]) -> np.ndarray:
        """Pixels [B, 3, R, R] in [0, 1] of a token pyramid (all scales, or the first few). Raises RequestError."""
        checked = request.token_pyramid(tokens, self.bundle.manifest.vqvae)
        return self.engine.decode(self.quantizer.features_from_tokens(checked))

    def reconstruct(self, images: Sequence[Image.Image] | np.ndarray) -> np.ndarray:
        """What `encode` takes, through all scales of the quantiser and the decoder: pixels [B, 3, R, R] in [0, 1]."""
        return self.decode(self.encode(images))
