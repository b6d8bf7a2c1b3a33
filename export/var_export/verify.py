"""Parity of a bundle with the reference model, tensor by tensor and scale by scale.

Both run greedily on the same labels; the engine is fed the reference's tokens, so that one differing token does not
hide what comes after it. With the onnx engine every graph of the bundle is run: symbolic and static scales, finish,
decoder, encoder. An engine that runs the whole loop itself is also asked for its own greedy images, every token of
which has to be the best by the logits that it computes step by step. Where an engine computes in float32, errors are
held to rounding; where its precision is lower, to a fidelity gate on what a viewer would notice: the distribution that
tokens are drawn from, and the pixels of decoder and reconstruction.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import var_deploy
from var_deploy.bundle import Bundle, note_fidelity
from var_deploy.engines import DeviceLoop
from var_deploy.engines.choice import ENGINES
from var_deploy.errors import CheckpointError, RequestError
from var_deploy.pipeline import Pipeline
from var_deploy.schedules import MAX_GUIDANCE
from var_deploy.schedules import settings as settings_of
from var_train import Generation, generate
from var_train.checkpoint import load_pair

from .digits_fidelity import DigitsFidelity, digits_fidelity, digits_split
from .teacher_forcing import guided, mean_kl, teacher_forced

#: Largest difference of logits and pixels that float32 rounding explains: the two add up in different orders, through
#: up to 36 blocks. Golden vectors of small models agree to 1e-5.
TOLERANCE = 1e-3

#: The same between two runs of an inexact precision on one device, relative to the largest logit: a few roundings of a
#: number with 8 bits.
HALF_TOLERANCE = 2**-6

#: The fidelity gate of an inexact precision: mean KL divergence of the guided distribution over the tokens of a scale,
#: in nats, and the decoder's peak signal-to-noise ratio on the reference's f_hat, in dB.
MAX_MEAN_KL, MIN_DECODER_PSNR = 0.01, 40.0

#: And how much of the reference's peak signal-to-noise ratio a reconstructed image may lose, in dB. Tokens of the
#: encoder may differ: where two codes are as good, either is.
MAX_RECONSTRUCTION_LOSS = 0.5

Progress = Callable[[str], None]

log = logging.getLogger("var_deploy")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleParity:
    """One scale of one kind of graph."""

    scale: int
    logit_error: float  #: largest absolute difference over rows, tokens and vocabulary
    logit_place: tuple[int, ...]  #: row, token, entry of it
    token_agreement: float  #: share of tokens whose best guided logit is the same entry
    clear_disagreements: int  #: differing tokens whose best two reference logits lie further apart than rounding
    mean_kl: float  #: KL(reference ‖ ours) of the guided distributions, mean over tokens, in nats


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopParity:
    """An engine's whole greedy loop against its own steps, fed with the tokens that the loop drew."""

    token_agreement: float  #: share of tokens that are the best by the logits of the steps
    clear_disagreements: int  #: tokens that fall short of the best by more than the steps' rounding
    pixel_psnr: float  #: of the loop's 8-bit pictures on the steps' pixels, in dB

    @property
    def passed(self) -> bool:
        """Whether every token and the pictures are those of the steps."""
        return not self.clear_disagreements and self.pixel_psnr >= MIN_DECODER_PSNR  # a NaN fails too


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """The whole comparison."""

    tolerance: float
    labels: list[int]
    guidance: float
    engine: str
    precision: str
    exact: bool  #: whether the tolerance decides; else the fidelity gate does
    scales: dict[str, list[ScaleParity]]  #: by variant: the kinds of graphs, or the precision of the torch engine
    pixel_error: dict[str, float]  #: largest difference of pixels in [0, 1], by variant
    decoder_psnr: dict[str, float]  #: of the decoder on the reference's f_hat, in dB, by variant
    decoder_ssim: dict[str, float]  #: and its structural similarity, at most 1
    loop: LoopParity | None  #: None for an engine that leaves the loop to the pipeline
    encoded_token_agreement: float  #: of a test image
    reconstruction_error: float  #: pixels in [0, 1], through the same tokens
    reconstruction_loss: float  #: of the test image through an engine's own tokens, in dB below the reference's
    digits: DigitsFidelity | None  #: of samples, where they were asked for

    @property
    def passed(self) -> bool:
        """Whether every error is within the tolerance and no token differs where it clearly should not; or, for an
        inexact precision, whether the fidelity gate is passed.
        """
        rows = [row for rows in self.scales.values() for row in rows]
        if self.loop is not None and not self.loop.passed:
            return False
        if self.digits is not None and not self.digits.passed:
            return False
        if not self.exact:
            faithful = all(row.mean_kl <= MAX_MEAN_KL for row in rows)  # a NaN fails too
            faithful = faithful and all(psnr >= MIN_DECODER_PSNR for psnr in self.decoder_psnr.values())
            return faithful and self.reconstruction_loss <= MAX_RECONSTRUCTION_LOSS
        errors = [*(row.logit_error for row in rows), *self.pixel_error.values(), self.reconstruction_error]
        return (
            all(error <= self.tolerance for error in errors)  # a NaN fails too
            and not any(row.clear_disagreements for row in rows)
            and self.encoded_token_agreement >= 0.999
        )

    def to_dict(self) -> dict[str, Any]:
        limits = {
            "max_mean_kl": MAX_MEAN_KL,
            "min_decoder_psnr": MIN_DECODER_PSNR,
            "max_reconstruction_loss": MAX_RECONSTRUCTION_LOSS,
        }
        return {"passed": self.passed, **asdict(self), **limits}


def verify_bundle(
    bundle_path: str | Path,
    var_path: str | Path,
    vqvae_path: str | Path,
    *,
    labels: list[int] | None = None,
    guidance: float = 1.5,
    tolerance: float = TOLERANCE,
    engine: str = "onnx",
    device: str = "auto",
    precision: str = "auto",
    digits: bool = False,
    progress: Progress = lambda _: None,
) -> Parity:
    """Compares a bundle, run by an engine, with the checkpoints it should come from.

    digits: also draw 1,000 digits and judge them; for models of the digits example. What is measured on a bundle of an
    inexact precision is noted in its manifest. Raises a VarDeployError for bad input.
    """
    if engine not in ENGINES:
        raise RequestError(f"engine: got {engine!r}, expected one by name: {', '.join(ENGINES)}")
    bundle = Bundle.open(bundle_path)
    pair = load_pair(Path(var_path), Path(vqvae_path), using_znorm=bundle.manifest.vqvae.using_znorm)
    for name, ours, theirs in (("VAR", bundle.manifest.var, pair.var), ("VQVAE", bundle.manifest.vqvae, pair.vqvae)):
        if ours != theirs:
            raise CheckpointError(f"the bundle is of another model: its {name} is {ours}, the checkpoint's is {theirs}")
    if not 0 <= guidance <= MAX_GUIDANCE:
        raise RequestError(f"guidance: got {guidance}, expected a number from 0 to {MAX_GUIDANCE:g}")
    if labels is None:
        labels = [0, pair.var.num_classes - 1]
    if not all(0 <= label < pair.var.num_classes for label in labels):
        raise RequestError(f"labels: got {labels}, expected class ids from 0 to {pair.var.num_classes - 1}")
    split = digits_split(pair.var, pair.vqvae) if digits else None
    progress("reference")
    var, vqvae = pair.models()
    reference = generate(var, vqvae, torch.tensor(labels), guidance=guidance, top_k=1, top_p=0)
    image_B3RR = _test_image(pair.vqvae.image_size)
    with torch.no_grad():
        encoded = [tokens.numpy() for tokens in vqvae.tokens(2 * image_B3RR - 1)]
        reconstruction = vqvae.reconstruct(2 * image_B3RR - 1).add(1).mul(0.5).numpy()

    scales, pixel_error, decoder_psnr, decoder_ssim = {}, {}, {}, {}
    variants: list[dict[str, Any]] = [{}]
    if engine == "onnx" and not device.startswith("cuda"):  # all graphs, and the decoder that "auto" takes
        variants = [{"graphs": "static", "decoder": "graph"}, {"graphs": "symbolic"}]
    for options in variants:
        pipe = var_deploy.load(
            bundle_path, engine=engine, device=device, precision=precision, verify_digests=False, cache=False, **options
        )
        if tolerance != TOLERANCE and not pipe.engine.precision.exact:
            gate = f"mean KL ≤ {MAX_MEAN_KL:g} nats, decoder ≥ {MIN_DECODER_PSNR:g} dB"
            raise RequestError(f"tolerance: precision {pipe.engine.precision} is held to a gate ({gate}); leave it out")
        variant = options.get("graphs", pipe.engine.precision)
        progress(f"{pipe.engine.name} engine, {variant}")
        scales[variant], pixel_error[variant] = _compare(pipe, reference, labels, guidance, tolerance)
        decoded = pipe.engine.decode(reference.f_hat_BChh.numpy())
        decoder_psnr[variant] = _psnr(decoded, reference.image_B3RR.numpy())
        decoder_ssim[variant] = _ssim(decoded, reference.image_B3RR)
    loop = None
    if isinstance(pipe.engine, DeviceLoop):
        progress("whole images")
        loop = _compare_loop(pipe, pipe.engine, labels, guidance, tolerance)
    progress("encoder")
    tokens = pipe.encode(image_B3RR.numpy())
    own_psnr, reference_psnr = (_psnr(pixels, image_B3RR.numpy()) for pixels in (pipe.decode(tokens), reconstruction))
    parity = Parity(
        tolerance=tolerance,
        labels=labels,
        guidance=guidance,
        engine=pipe.engine.name,
        precision=pipe.engine.precision,
        exact=pipe.engine.precision.exact,
        scales=scales,
        pixel_error=pixel_error,
        decoder_psnr=decoder_psnr,
        decoder_ssim=decoder_ssim,
        loop=loop,
        encoded_token_agreement=_agreement(encoded, tokens),
        reconstruction_error=float(np.abs(pipe.decode(encoded) - reconstruction).max()),
        reconstruction_loss=reference_psnr - own_psnr,
        digits=None if split is None else digits_fidelity(pipe, var, vqvae, split, progress=progress),
    )
    if not bundle.manifest.precision.exact:
        note_fidelity(bundle, _noted(parity, bundle.manifest.fidelity))
    return parity


def _noted(parity: Parity, earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the manifest of an inexact bundle says of itself; digits of an earlier run stay where none are judged."""
    rows = [row for variant in parity.scales.values() for row in variant]
    noted: dict[str, Any] = {
        "passed": parity.passed,
        "engine": parity.engine,
        "classes": parity.labels,
        "guidance": parity.guidance,
        "mean_kl": float(np.max([row.mean_kl for row in rows])),  # keeps a NaN
        "token_agreement": float(np.min([row.token_agreement for row in rows])),
        "mean_kl_by_scale": {name: [row.mean_kl for row in variant] for name, variant in parity.scales.items()},
        "decoder_psnr": float(np.min(list(parity.decoder_psnr.values()))),
        "decoder_ssim": float(np.min(list(parity.decoder_ssim.values()))),
        "reconstruction_loss": parity.reconstruction_loss,
    }
    digits = parity.digits
    if digits is None and earlier is not None and earlier.get("digits") is not None:
        try:
            digits = DigitsFidelity(**earlier["digits"])
            noted["passed"] = bool(parity.passed and digits.passed)
            if not digits.passed:
                log.warning("the digits of an earlier run did not pass, so the bundle does not; judge with --digits")
        except TypeError:  # of another version, or edited
            digits = None
    if digits is not None:
        noted["digits"] = asdict(digits)
    return noted


def _compare(
    pipe: Pipeline, reference: Generation, labels: list[int], guidance: float, tolerance: float
) -> tuple[list[ScaleParity], float]:
    """All scales and the final pixels of one kind of graph, fed with the reference's tokens."""
    config, engine = pipe.bundle.manifest.var, pipe.engine
    codebook_VC = pipe.bundle.weight("quantize.embedding.weight")
    copies, tokens = 2 if guidance else 1, [tokens_Bn.numpy() for tokens_Bn in reference.tokens]
    rows: list[ScaleParity] = []
    for forced in teacher_forced(engine, config, codebook_VC, tokens, labels, copies):
        k, logits_RnV = forced.k, forced.logits_RnV
        expected_RnV, t = reference.logits[k].numpy(), guidance * config.ratio(k)
        error_RnV = np.abs(logits_RnV - expected_RnV)
        place = np.unravel_index(error_RnV.argmax(), error_RnV.shape)
        got, expected = guided(logits_RnV, t, copies), guided(expected_RnV, t, copies)
        differs_Bn = got.argmax(-1) != expected.argmax(-1)
        best_two = np.sort(expected, axis=-1)[..., -2:]
        clear_Bn = best_two[..., 1] - best_two[..., 0] > 2 * (1 + 2 * t) * tolerance
        rows.append(
            ScaleParity(
                scale=k,
                logit_error=float(error_RnV[place]),
                logit_place=tuple(int(i) for i in place),
                token_agreement=1.0 - float(differs_Bn.mean()),
                clear_disagreements=int((differs_Bn & clear_Bn).sum()),
                mean_kl=mean_kl(expected, got),
            )
        )
    pixels = engine.decode(engine.finish(forced.state, codebook_VC[tokens[-1]]))
    return rows, float(np.abs(pixels - reference.image_B3RR.numpy()).max())


def _compare_loop(
    pipe: Pipeline, engine: DeviceLoop, labels: list[int], guidance: float, tolerance: float
) -> LoopParity:
    """Whole images as `generate` makes them, draws and all, checked by the steps of the same engine."""
    config, steps = pipe.bundle.manifest.var, pipe.engine
    codebook_VC = pipe.bundle.weight("quantize.embedding.weight")
    settings = settings_of(pipe.bundle.manifest, guidance=guidance, top_k=1, top_p=0, smooth=False)
    done = engine.generate(np.array(labels), [0] * len(labels), settings, None)
    copies = 2 if guidance else 1
    best, clear = 0, 0
    for forced in teacher_forced(steps, config, codebook_VC, done.tokens, labels, copies):
        logits_RnV, tokens_Bn, t = forced.logits_RnV, done.tokens[forced.k], guidance * config.ratio(forced.k)
        guided_BnV = guided(logits_RnV, t, copies)
        drawn_Bn = np.take_along_axis(guided_BnV, tokens_Bn[..., None], axis=-1)[..., 0]
        short_Bn = guided_BnV.max(-1) - drawn_Bn
        # Two runs of one shape may add up in another order, in the type of the activations.
        rounding = tolerance if steps.precision.exact else HALF_TOLERANCE * float(np.abs(logits_RnV).max())
        best += int((short_Bn == 0).sum())
        clear += int((~(short_Bn <= 2 * (1 + 2 * t) * rounding)).sum())  # a NaN counts too
    pixels_B3RR = steps.decode(steps.finish(forced.state, codebook_VC[done.tokens[-1]]))
    pictures_B3RR = done.pixels() if done.bytes_BRR3 is None else done.bytes_BRR3.transpose(0, 3, 1, 2) / 255.0
    tokens = sum(tokens_Bn.size for tokens_Bn in done.tokens)
    return LoopParity(
        token_agreement=best / tokens, clear_disagreements=clear, pixel_psnr=_psnr(pictures_B3RR, pixels_B3RR)
    )


def _psnr(got_B3RR: np.ndarray, expected_B3RR: np.ndarray) -> float:
    """Peak signal-to-noise ratio of pixels in [0, 1], in dB; at most 200, where the two are equal."""
    mean_square = float(np.square(got_B3RR.astype(np.float64) - expected_B3RR).mean())
    return float(-10 * np.log10(max(mean_square, 1e-20)))


def _ssim(got_B3RR: np.ndarray, expected_B3RR: torch.Tensor) -> float:
    """Structural similarity of pixels in [0, 1] (Wang et al. 2004: Gaussian window of 11 pixels, σ = 1.5)."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    found = ssim(torch.from_numpy(got_B3RR), expected_B3RR, data_range=1.0)
    assert isinstance(found, torch.Tensor)  # nothing but the mean was asked for
    return found.item()


def _agreement(expected: list[np.ndarray], got: list[np.ndarray]) -> float:
    return float((np.concatenate(expected, axis=1) == np.concatenate(got, axis=1)).mean())


def _test_image(size: int) -> torch.Tensor:
    """A smooth colour pattern [1, 3, size, size] in [0, 1]."""
    y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    waves = [torch.sin(2 * torch.pi * (x + (c + 1) * y)) for c in range(3)]
    return (torch.stack(waves)[None] + 1) / 2
