"""What the plugins of TensorRT compute, by the references of the kernels that they are made of.

Same signatures as `var_kernels.plugins`, so that each can stand in for the other.
"""

from __future__ import annotations

from torch import Tensor

from var_kernels import reference


def adaln(
    x_RnD: Tensor,
    y_RnD: Tensor | None,
    gates_RgD: Tensor | None,
    norms_RsD: Tensor,
    *,
    gamma_at: int | None,
    scale_at: int,
    shift_at: int,
    x_out_RnD: Tensor | None,
    out_RnD: Tensor,
) -> Tensor:
    x_MD = x_RnD.flatten(0, 1).clone()
    y_MD = None if y_RnD is None else y_RnD.flatten(0, 1)
    gamma_RD = None if gates_RgD is None else gates_RgD[:, gamma_at].float()
    scale_RD, shift_RD = norms_RsD[:, scale_at].float(), norms_RsD[:, shift_at].float()
    reference.adaln(x_MD, y_MD, gamma_RD, scale_RD, shift_RD, out_MD=out_RnD.view(x_MD.shape))
    if x_out_RnD is not None:
        x_out_RnD.copy_(x_MD.view(x_RnD.shape))
    return out_RnD


def cached_attention(
    qkv_RnN: Tensor,
    q_scale_H: Tensor | None,
    cache_k_RHLd: Tensor,
    cache_v_RHLd: Tensor,
    *,
    begin: int,
    softmax_scale: float,
    out_RnD: Tensor,
    k_new_RHnd: Tensor,
    v_new_RHnd: Tensor,
) -> Tensor:
    caches, own = (cache_k_RHLd.clone(), cache_v_RHLd.clone()), slice(begin, begin + qkv_RnN.shape[1])
    qkv_MN, out_MD = qkv_RnN.flatten(0, 1), out_RnD.flatten(0, 1)
    reference.cached_attention(qkv_MN, q_scale_H, *caches, begin=begin, softmax_scale=softmax_scale, out_MD=out_MD)
    for new_RHnd, cache_RHLd in zip((k_new_RHnd, v_new_RHnd), caches, strict=True):
        new_RHnd.copy_(cache_RHLd[:, :, own])
    return out_RnD
