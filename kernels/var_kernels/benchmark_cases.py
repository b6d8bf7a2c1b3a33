"""What the benchmark runs: every operation's buffers and traffic, and the sizes in the order of what they tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import benchmark_eager as eager
from . import reference
from .benchmark_setup import FP32, GUIDANCE, TOP_K, TOP_P, Case, Inputs, Results, Setup
from .reference import HEAD_DIM, resampling_taps
from .sizes import PLAIN_SCALE, SCALES, WIDTH, C, V, positions

SMALL_SCALE, LAST_SCALE = 3, 9
SMOOTH_ERROR = 1e-2  # of a smooth weight: scores reach thousands, of which float32 keeps a few in ten thousand
MAPS = ((256, 160), (64, 320), (16, 640))  # side and channels of the decoder's feature maps


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """All cases in one storage type, every operation's most telling first: one image, then 64, last scale, the rest."""
    grid = [
        ("d16", 1, LAST_SCALE),
        ("d30", 64, LAST_SCALE),
        ("d16", 1, SMALL_SCALE),
        ("d16", 64, LAST_SCALE),
        ("d30", 1, LAST_SCALE),
        ("d30", 1, SMALL_SCALE),
        ("d16", 64, SMALL_SCALE),
        ("d30", 64, SMALL_SCALE),
    ]
    seen = set()
    for i, (model, batch, k) in enumerate(grid):
        for case in _cases_of(model, batch, k, dtype, MAPS if i >= 2 else MAPS[:1], unused=i == 0):
            if case.name not in seen:
                seen.add(case.name)
                yield case


def quick_cases(dtype: torch.dtype) -> Iterator[Case]:
    """The first case of each operation and variant."""
    seen = set()
    for case in cases(dtype):
        if (case.operation, case.variant) not in seen:
            seen.add((case.operation, case.variant))
            yield case


def _cases_of(
    model: str, batch: int, k: int, dtype: torch.dtype, maps: tuple[tuple[int, int], ...], unused: bool
) -> Iterator[Case]:
    """`unused`: also products that the engine leaves to the library, to see what they would take."""
    scales = SCALES[model]
    D, R, n, L = WIDTH[model], 2 * batch, scales[k] ** 2, positions(scales)
    M, begin = R * n, positions(scales[:k])
    H = depth = D // HEAD_DIM  # of all published models
    yield linear(M=M, K=4 * D, N=D, variant="int8", dtype=dtype)
    yield cached_attention(R=R, H=H, n=n, begin=begin, L=L, dtype=dtype)
    yield adaln(R=R, n=n, D=D, dtype=dtype)
    yield draw(B=batch, n=n, V=V, C=C)
    before = min(k, len(scales) - 2)
    yield next_scale(B=batch, p=scales[before], q=scales[before + 1], h=scales[-1], C=C, D=D)
    for side, channels in maps:
        yield groupnorm_silu(B=batch, side=side, C=channels, dtype=dtype, variant="sum")
        yield groupnorm_silu(B=batch, side=side, C=channels, dtype=dtype)
    yield upsample_sum(B=batch, side=128, C=160, dtype=dtype)
    yield linear(M=M, K=D, N=V, variant="head", dtype=dtype)
    yield linear(M=R, K=D, N=(6 * depth + 2) * D, variant="modulation", dtype=dtype)
    yield quantize_rows(M=M, K=D, dtype=dtype)
    yield to_pixels(B=batch, side=256, dtype=dtype)
    yield uniforms(B=batch, L=L)
    if k == LAST_SCALE:  # variants that tell nothing more elsewhere
        yield cached_attention(R=R, H=H, n=n, begin=begin, L=L, dtype=dtype, variant="plain")
        yield draw(B=batch, n=n, V=V, C=C, variant="unguided")
        yield draw(B=batch, n=n, V=V, C=C, variant="smooth", begin=begin, ratio=k / (len(scales) - 1))
        yield mix_codes(B=batch, n=n, V=V, C=C)
        yield keep_given(B=batch, n=n, V=V, C=C)
    if unused:
        yield linear(M=M, K=D, N=4 * D, variant="gelu", dtype=dtype)
        yield linear(M=M, K=D, N=3 * D, variant="", dtype=dtype)


def adaln(*, R: int, n: int, D: int, dtype: torch.dtype) -> Case:
    def build(new: Inputs) -> Setup:
        x_MD, y_MD = new.normal(R * n, D), new.normal(R * n, D, dtype=dtype)
        out_MD = new.unwritten(R * n, D, dtype=dtype)
        modulation_R6D = new.normal(R, 6, D)
        gamma_RD, scale_RD, shift_RD = (modulation_R6D[:, i] for i in (0, 2, 4))

        def ours(op: Callable[..., Any]) -> Results:
            op(x_MD, y_MD, gamma_RD, scale_RD, shift_RD, out_MD=out_MD)
            return x_MD, out_MD

        rows_R1D = (m.unsqueeze(1).to(dtype) for m in (gamma_RD, scale_RD, shift_RD))
        arguments = (x_MD.view(R, n, D).to(dtype), y_MD.view(R, n, D), *rows_R1D)
        return Setup(ours=ours, eager=eager.adaln, arguments=arguments)

    traffic = R * n * D * (4 + dtype.itemsize + 4 + dtype.itemsize) + 3 * 4 * R * D
    shape = {"R": R, "n": n, "D": D}
    return Case(operation="adaln", shape=shape, dtype=dtype, bytes=traffic, build=build)


def cached_attention(*, R: int, H: int, n: int, begin: int, L: int, dtype: torch.dtype, variant: str = "") -> Case:
    """`variant`: empty or "plain", which normalises nothing."""
    D, end = H * HEAD_DIM, begin + n
    scale = PLAIN_SCALE if variant == "plain" else 1.0

    def build(new: Inputs) -> Setup:
        qkv_MN, out_MD = new.normal(R * n, 3 * D, dtype=dtype), new.unwritten(R * n, D, dtype=dtype)
        q_scale_H = None if variant == "plain" else 4 + new.normal(H).abs()
        caches = [new.unwritten(R, H, L, HEAD_DIM, dtype=dtype) for _ in range(2)]
        caches[0][:, :, :begin] = F.normalize(new.normal(R, H, begin, HEAD_DIM), dim=-1)
        caches[1][:, :, :begin] = new.normal(R, H, begin, HEAD_DIM)

        def ours(op: Callable[..., Any]) -> Results:
            return (op(qkv_MN, q_scale_H, *caches, begin=begin, softmax_scale=scale, out_MD=out_MD),)

        def comparable(results: Results) -> Results:
            new_ones = [cache[:, :, begin:end] for cache in caches]
            return *results, *new_ones, *(cache[:, :, :begin] for cache in caches)

        q_scale_H11 = None if q_scale_H is None else q_scale_H.view(H, 1, 1).to(dtype)
        arguments = (qkv_MN, q_scale_H11, *caches, begin, scale)
        return Setup(ours=ours, eager=eager.cached_attention, arguments=arguments, comparable=comparable)

    # Queries, keys and values read, the result written; the cache's past read, keys and values written.
    traffic = dtype.itemsize * (R * n * 4 * D + 2 * R * D * (begin + n))
    shape = {"R": R, "H": H, "n": n, "begin": begin}
    flops = 4 * R * n * end * D
    return Case(
        operation="cached_attention",
        variant=variant,
        shape=shape,
        dtype=dtype,
        bytes=traffic,
        flops=flops,
        build=build,
    )


def linear(*, M: int, K: int, N: int, variant: str, dtype: torch.dtype) -> Case:
    """`variant`: empty, "gelu", "int8", or "head" and "modulation", whose bias and result are float32."""
    gelu, int8 = variant == "gelu", variant == "int8"
    out_dtype = FP32 if variant in ("head", "modulation") else dtype

    def build(new: Inputs) -> Setup:
        x_MK, bias_N = new.normal(M, K, dtype=dtype), new.normal(N, dtype=out_dtype)
        out_MN = new.unwritten(M, N, dtype=out_dtype)
        weight_KN = new.integers(K, N) if int8 else (new.normal(K, N) / math.sqrt(K)).to(dtype)
        column_scale_N = (1 + new.uniform(N).float()) / (127 * math.sqrt(K)) if int8 else None

        def ours(op: Callable[..., Any]) -> Results:
            return (op(x_MK, weight_KN, bias_N, column_scale_N=column_scale_N, gelu=gelu, out_MN=out_MN),)

        def library() -> Results:
            if gelu:
                return (torch._addmm_activation(bias_N, x_MK, weight_KN, use_gelu=True),)
            return (torch.addmm(bias_N, x_MK, weight_KN, out_dtype=FP32, out=out_MN),)

        # On a CPU the one computes the exact GELU instead, and the other does not exist.
        has_library = (gelu or out_dtype != dtype) and new.device.type == "cuda"
        scale_N = None if column_scale_N is None else column_scale_N.to(dtype)
        provider = eager.linear_gelu if gelu else eager.linear
        arguments = (x_MK, weight_KN, bias_N.to(dtype), scale_N)
        return Setup(ours=ours, eager=provider, arguments=arguments, library=library if has_library else None)

    item, wide = dtype.itemsize, out_dtype.itemsize
    traffic = item * M * K + wide * (N + M * N) + K * N * (1 if int8 else item) + (4 * N if int8 else 0)
    return Case(
        operation="linear",
        variant=variant,
        shape={"M": M, "K": K, "N": N},
        dtype=dtype,
        bytes=traffic,
        flops=2 * M * K * N,
        build=build,
    )


def quantize_rows(*, M: int, K: int, dtype: torch.dtype) -> Case:
    def build(new: Inputs) -> Setup:
        x_MK = new.normal(M, K, dtype=dtype)
        out_MK = new.unwritten(M, K, dtype=torch.float8_e4m3fn)
        scale_out_M1 = new.unwritten(M, 1)

        def ours(op: Callable[..., Any]) -> Results:
            op(x_MK, out_MK=out_MK, scale_out_M1=scale_out_M1)
            return out_MK, scale_out_M1

        def comparable(results: Results) -> Results:
            return results[0].float() * results[1], results[1]

        return Setup(ours=ours, eager=eager.quantize_rows, arguments=(x_MK,), comparable=comparable)

    traffic = M * K * (dtype.itemsize + 1) + 4 * M
    # A number between two float8 may go either way, a sixteenth of itself apart.
    tolerance = (1e-2, 8e-2)
    shape = {"M": M, "K": K}
    return Case(operation="quantize_rows", shape=shape, dtype=dtype, bytes=traffic, build=build, tolerance=tolerance)


def uniforms(*, B: int, L: int) -> Case:
    def build(new: Inputs) -> Setup:
        seeds_B, out_BL = new.seeds(B), new.unwritten(B, L, dtype=torch.float64)

        def ours(op: Callable[..., Any]) -> Results:
            return (op(seeds_B, out_BL=out_BL),)

        def comparable(results: Results) -> Results:
            return (results[0].view(torch.int64),)  # every bit counts

        return Setup(ours=ours, eager=eager.uniforms, arguments=(seeds_B, L), comparable=comparable)

    traffic = 8 * B + 8 * B * L
    return Case(operation="uniforms", shape={"B": B, "L": L}, dtype=torch.float64, bytes=traffic, build=build)


def draw(*, B: int, n: int, V: int, C: int, variant: str = "", begin: int = 0, ratio: float = 0.0) -> Case:
    """With the sampling defaults, on normally distributed logits.

    `variant`: empty, "unguided", or "smooth", which is guided too and takes the scale's first position and its ratio.
    """
    guided, smooth = variant != "unguided", variant == "smooth"

    def build(new: Inputs) -> Setup:
        logits_RnV = new.normal(2 * B if guided else B, n, V)
        uniforms_Bn, codebook_VC = new.uniform(B, n), new.normal(V, C)
        strength_B, one_B = new.full((B,), GUIDANCE), new.full((B,), 1.0)
        top_k_B, top_p_B = new.full((B,), TOP_K, torch.int32), new.full((B,), TOP_P)
        settings = (strength_B, one_B, top_k_B, top_p_B, codebook_VC)
        outputs = {
            "tokens_out_Bn": new.unwritten(B, n, dtype=torch.int64),
            "codes_out_BnC": new.unwritten(B, n, C),
            "invalid_out_B": new.full((B,), 0, torch.int32),
        }
        gumbel_BnV, seeds_B = None, None
        if smooth:
            seeds_B = new.seeds(B)
            gumbel_BnV = new.counted(reference.gumbels(seeds_B, begin, n, V))
            outputs["smooth_weights_out_BnV"] = new.unwritten(B, n, V)

        def run(op: Callable[..., Any], outputs: dict[str, Tensor]) -> Results:
            op(
                logits_RnV,
                uniforms_Bn,
                *settings,
                guided=guided,
                **outputs,
                seeds_B=seeds_B,
                begin=begin,
                ratio=ratio,
            )
            return tuple(tensor for name, tensor in outputs.items() if name != "invalid_out_B")

        def comparable(results: Results) -> Results:
            tokens, codes, *weights = results
            inside = tokens.clamp(0, V - 1)
            right = (tokens, (codes == codebook_VC[inside]).all(-1), outputs["invalid_out_B"])
            if not weights:
                return right
            # By position: where rounding decides whether a token is kept, all weights of its position may change.
            *_, expected_BnV = run(reference.draw, {name: tensor.clone() for name, tensor in outputs.items()})
            return *right, ((weights[0] - expected_BnV).abs() <= SMOOTH_ERROR).all(-1)

        return Setup(
            ours=lambda op: run(op, outputs),
            eager=eager.draw,
            arguments=(logits_RnV, uniforms_Bn, codebook_VC, gumbel_BnV, ratio),
            comparable=comparable,
        )

    # Logits, numbers and settings read; tokens written; codes looked up and written; seeds read, weights written.
    traffic = (8 if guided else 4) * B * n * V + 8 * B * n + (16 if guided else 12) * B + 8 * B * n + 2 * 4 * B * n * C
    traffic += 8 * B + 4 * B * n * V if smooth else 0
    shape = {"B": B, "n": n, "V": V}
    return Case(operation="draw", variant=variant, shape=shape, dtype=FP32, bytes=traffic, build=build)


def mix_codes(*, B: int, n: int, V: int, C: int) -> Case:
    def build(new: Inputs) -> Setup:
        weights_BnV, codebook_VC = new.normal(B, n, V).softmax(-1), new.normal(V, C)
        codes_BnC = new.unwritten(B, n, C)

        def ours(op: Callable[..., Any]) -> Results:
            op(weights_BnV, codebook_VC, codes_out_BnC=codes_BnC)
            return (codes_BnC,)

        return Setup(ours=ours, eager=eager.mix_codes, arguments=(weights_BnV, codebook_VC))

    traffic, flops = 4 * B * n * V + 4 * V * C + 4 * B * n * C, 2 * B * n * V * C
    shape = {"B": B, "n": n, "V": V}
    return Case(operation="mix_codes", shape=shape, dtype=FP32, bytes=traffic, flops=flops, build=build)


def keep_given(*, B: int, n: int, V: int, C: int) -> Case:
    def build(new: Inputs) -> Setup:
        given_Bn, given_BnC = new.seeds(B * n).view(B, n) % V, new.normal(B, n, C)  # everywhere: the most to copy
        tokens_Bn, codes_BnC = new.unwritten(B, n, dtype=torch.int64), new.unwritten(B, n, C)

        def ours(op: Callable[..., Any]) -> Results:
            op(given_Bn, given_BnC, tokens_out_Bn=tokens_Bn, codes_out_BnC=codes_BnC)
            return tokens_Bn, codes_BnC

        arguments = given_Bn, given_BnC, tokens_Bn.clone(), codes_BnC.clone()
        return Setup(ours=ours, eager=eager.keep_given, arguments=arguments)

    traffic = 2 * (8 + 4 * C) * B * n
    shape = {"B": B, "n": n, "C": C}
    return Case(operation="keep_given", shape=shape, dtype=FP32, bytes=traffic, build=build)


def next_scale(*, B: int, p: int, q: int, h: int, C: int, D: int) -> Case:
    def build(new: Inputs) -> Setup:
        codes_BnC, f_hat_BlC = new.normal(B, p * p, C), new.normal(B, h * h, C)
        f_hat_out_BlC, x_out_RmD = new.unwritten(B, h * h, C), new.unwritten(2 * B, q * q, D)
        phi_weight_9CC, phi_bias_C = new.normal(9, C, C) / math.sqrt(9 * C), new.normal(C)
        word_weight_CD, position_mD = new.normal(C, D) / math.sqrt(C), new.normal(q * q, D)
        enlarge_hp, area_qh = (resampling(*sides, new.device) for sides in ((p, h, "bicubic"), (h, q, "area")))
        resamplings = {
            "cell_taps_3hp": resampling_taps(enlarge_hp),
            "token_taps_3qp": resampling_taps(enlarge_hp, area_qh),
            "area_qh": area_qh,
        }

        def ours(op: Callable[..., Any]) -> Results:
            op(
                codes_BnC,
                f_hat_BlC,
                phi_weight_9CC,
                phi_bias_C,
                **resamplings,
                f_hat_out_BlC=f_hat_out_BlC,
                word_weight_CD=word_weight_CD,
                position_mD=position_mD,
                x_out_RmD=x_out_RmD,
            )
            return f_hat_out_BlC, x_out_RmD

        def comparable(results: Results) -> Results:
            f_hat, x = results
            return (f_hat.flatten(2).transpose(1, 2) if f_hat.ndim == 4 else f_hat), x

        f_hat_BChh = f_hat_BlC.transpose(1, 2).reshape(B, C, h, h).contiguous()
        weight_CC33 = phi_weight_9CC.view(3, 3, C, C).permute(3, 2, 0, 1).contiguous()
        arguments = (codes_BnC, f_hat_BChh, weight_CC33, phi_bias_C, word_weight_CD, position_mD)
        return Setup(ours=ours, eager=eager.next_scale, arguments=arguments, comparable=comparable)

    maps = B * p * p * C + 2 * B * h * h * C + 2 * B * q * q * D
    weights = 9 * C * C + C + 3 * h * p + 3 * q * p + q * h + C * D + q * q * D
    flops = 2 * B * (h * h * 9 * C * C + q * q * C * D)
    shape = {"B": B, "p": p, "q": q, "D": D}
    return Case(operation="next_scale", shape=shape, dtype=FP32, bytes=4 * (maps + weights), flops=flops, build=build)


def resampling(from_side: int, to_side: int, mode: str, device: torch.device) -> Tensor:
    """One axis of a separable resampling as a matrix [to, from]: columns are what it makes of unit vectors."""
    units = torch.eye(from_side, device=device).view(from_side, 1, from_side, 1).expand(-1, -1, -1, from_side)
    return F.interpolate(units, size=(to_side, to_side), mode=mode)[:, 0, :, 0].T.contiguous()


def groupnorm_silu(*, B: int, side: int, C: int, dtype: torch.dtype, variant: str = "") -> Case:
    """`variant`: empty, or "sum", which first adds a branch and a bias in the memory of x."""

    def build(new: Inputs) -> Setup:
        x_BlC, out_BlC = new.normal(B, side**2, C, dtype=dtype), new.unwritten(B, side**2, C, dtype=dtype)
        weight_C, bias_C = 1 + 0.1 * new.normal(C), new.normal(C)
        arguments: tuple[Tensor, ...] = (_map(x_BlC), weight_C.to(dtype), bias_C.to(dtype))
        added: dict[str, Tensor] = {}
        if variant == "sum":
            branch_BlC, conv_bias_C = new.normal(B, side**2, C, dtype=dtype), new.normal(C, dtype=dtype)
            added = {"branch_BlC": branch_BlC, "conv_bias_C": conv_bias_C, "sum_out_BlC": x_BlC}
            arguments += (_map(branch_BlC), conv_bias_C.view(C, 1, 1))

        def ours(op: Callable[..., Any]) -> Results:
            op(x_BlC, weight_C, bias_C, silu=True, **added, out_BlC=out_BlC)
            return (out_BlC, x_BlC) if added else (out_BlC,)

        def comparable(results: Results) -> Results:
            return tuple(y.flatten(2).transpose(1, 2) if y.ndim == 4 else y for y in results)

        return Setup(ours=ours, eager=eager.groupnorm_silu, arguments=arguments, comparable=comparable)

    maps, vectors = (4, 2 * 4 + dtype.itemsize) if variant == "sum" else (2, 2 * 4)
    traffic = maps * dtype.itemsize * B * side**2 * C + vectors * C
    shape = {"B": B, "side": side, "C": C}
    return Case(operation="groupnorm_silu", variant=variant, shape=shape, dtype=dtype, bytes=traffic, build=build)


def upsample_sum(*, B: int, side: int, C: int, dtype: torch.dtype) -> Case:
    def build(new: Inputs) -> Setup:
        x_BhwC, branch_BhwC = (new.normal(B, side, side, C, dtype=dtype) for _ in range(2))
        conv_bias_C, out_BHWC = new.normal(C, dtype=dtype), new.unwritten(B, 2 * side, 2 * side, C, dtype=dtype)

        def ours(op: Callable[..., Any]) -> Results:
            op(x_BhwC, branch_BhwC=branch_BhwC, conv_bias_C=conv_bias_C, out_BHWC=out_BHWC)
            return (out_BHWC.permute(0, 3, 1, 2),)

        arguments = (x_BhwC.permute(0, 3, 1, 2), branch_BhwC.permute(0, 3, 1, 2), conv_bias_C.view(C, 1, 1))
        return Setup(ours=ours, eager=eager.upsample_sum, arguments=arguments)

    traffic = dtype.itemsize * (6 * B * side**2 * C + C)
    shape = {"B": B, "side": side, "C": C}
    return Case(operation="upsample_sum", shape=shape, dtype=dtype, bytes=traffic, build=build)


def _map(x_BlC: Tensor) -> Tensor:
    """As a square map, channels-last in memory."""
    side = math.isqrt(x_BlC.shape[1])
    return x_BlC.unflatten(1, (side, side)).permute(0, 3, 1, 2)


def to_pixels(*, B: int, side: int, dtype: torch.dtype) -> Case:
    def build(new: Inputs) -> Setup:
        x_Bl3, bias_3 = new.normal(B, side**2, 3, dtype=dtype), new.normal(3, dtype=dtype)
        pixels, image = new.unwritten(B, 3, side, side), new.unwritten(B, side, side, 3, dtype=torch.uint8)

        def ours(op: Callable[..., Any]) -> Results:
            op(x_Bl3, bias_3, pixels_out_B3RR=pixels, bytes_out_BRR3=image)
            return pixels, image

        return Setup(ours=ours, eager=eager.to_pixels, arguments=(x_Bl3, bias_3, side))

    traffic = B * side**2 * 3 * (dtype.itemsize + 4 + 1) + 3 * dtype.itemsize
    shape = {"B": B, "side": side}
    return Case(operation="to_pixels", shape=shape, dtype=dtype, bytes=traffic, build=build)
