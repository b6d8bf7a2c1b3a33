"""State dicts → the weights a deployed graph reads, in float32: transposed to [K, N], merged, constants folded.

Nothing is computed here yet: each weight is a shape and a function, so an 8 GB checkpoint is written tensor by tensor
with one tensor in memory. Exact rewrites of the reference model, up to float32 rounding:

- AdaLN projections keep their place in `condition`; the 1 of (1 + scale) is folded into their biases;
- q, k and v biases become one; exp(min(scale_mul, ln 100)) becomes `q_scale`;
- level, position and word biases become one table per token;
- φ(x) = 0.5·x + 0.5·conv(x) becomes one convolution; all φ are stacked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from var_train.checkpoint import CheckpointPair, StateDict
from var_train.var import MAX_SCALE_MUL

_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
}


@dataclass(frozen=True, slots=True)
class LazyWeight:
    """A tensor that is made when it is written."""

    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    dtype: str = "float32"  #: or float16, bfloat16, int8

    @property
    def itemsize(self) -> int:
        return _DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return self.itemsize * math.prod(self.shape)

    def numpy(self) -> np.ndarray:
        """The values, C-contiguous."""
        made = self.make().detach()
        # PyTorch hands out no bfloat16, but its bits.
        bits = made.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if made.dtype == torch.bfloat16 else made.numpy()
        array = np.ascontiguousarray(bits)
        if array.shape != self.shape or array.dtype != _DTYPES[self.dtype]:
            raise AssertionError(f"made {array.dtype} {array.shape}, declared {self.dtype} {self.shape}")
        return array


def deploy_weights(pair: CheckpointPair) -> dict[str, LazyWeight]:
    """All weights of a bundle by name, float32, in the order the graphs first read them; see `precision`."""
    weights = _condition_weights(pair)
    weights.update(_scale_weights(pair))
    weights.update(_vqvae_weights(pair))
    return weights


def _read(state: StateDict, key: str) -> Tensor:
    return state[key].float()


def _transposed(state: StateDict, key: str) -> Tensor:
    return _read(state, key).T


def _condition_weights(pair: CheckpointPair) -> dict[str, LazyWeight]:
    """What depends on the class alone: embedding, first tokens, AdaLN projections."""
    config, state = pair.var, pair.var_state
    D, depth, n_0 = config.embed_dim, config.depth, config.tokens_per_scale[0]

    def plus(key: str, constant: Tensor) -> Tensor:
        return _read(state, key) + constant

    def start_position() -> Tensor:
        return (_read(state, "pos_start") + _read(state, "lvl_embed.weight")[0] + _read(state, "pos_1LC")[:, :n_0])[0]

    # The six modulations are gamma1, gamma2, scale1, scale2, shift1, shift2: the scales are rows 2 and 3.
    one_6D = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 0.0]).repeat_interleave(D)
    one_2D = torch.tensor([1.0, 0.0]).repeat_interleave(D)

    weights = {
        "class_emb.weight": LazyWeight((config.num_classes + 1, D), partial(_read, state, "class_emb.weight")),
        "start_position": LazyWeight((n_0, D), start_position),
    }
    if config.shared_aln:
        weights["shared_ada_lin.weight"] = LazyWeight(
            (D, 6 * D), partial(_transposed, state, "shared_ada_lin.1.weight")
        )
        weights["shared_ada_lin.bias"] = LazyWeight((6 * D,), partial(plus, "shared_ada_lin.1.bias", one_6D))
        weights["ada_gss"] = LazyWeight(
            (1, depth, 6, D), lambda: torch.cat([_read(state, f"blocks.{i}.ada_gss") for i in range(depth)], dim=1)
        )
    else:
        for i in range(depth):
            key = f"blocks.{i}.ada_lin"
            weights[f"{key}.weight"] = LazyWeight((D, 6 * D), partial(_transposed, state, f"{key}.1.weight"))
            weights[f"{key}.bias"] = LazyWeight((6 * D,), partial(plus, f"{key}.1.bias", one_6D))
    weights["head_nm.ada_lin.weight"] = LazyWeight((D, 2 * D), partial(_transposed, state, "head_nm.ada_lin.1.weight"))
    weights["head_nm.ada_lin.bias"] = LazyWeight((2 * D,), partial(plus, "head_nm.ada_lin.1.bias", one_2D))
    return weights


def _scale_weights(pair: CheckpointPair) -> dict[str, LazyWeight]:
    """What runs at every scale: embedding, blocks, head."""
    config, state = pair.var, pair.var_state
    D, n_0 = config.embed_dim, config.tokens_per_scale[0]

    def position() -> Tensor:
        level_LD = _read(state, "lvl_embed.weight")[state["lvl_1L"][0].long()]
        return (level_LD + _read(state, "pos_1LC")[0] + _read(state, "word_embed.bias"))[n_0:]

    def qkv_bias(attn: str) -> Tensor:
        return torch.cat([_read(state, f"{attn}.{part}") for part in ("q_bias", "zero_k_bias", "v_bias")])

    def q_scale(attn: str) -> Tensor:
        return _read(state, f"{attn}.scale_mul_1H11").clamp_max(MAX_SCALE_MUL).exp()[0]

    weights = {
        "word_embed.weight": LazyWeight((config.z_channels, D), partial(_transposed, state, "word_embed.weight")),
        "position": LazyWeight((config.num_tokens - n_0, D), position),
    }
    for i in range(config.depth):
        attn, ffn = f"blocks.{i}.attn", f"blocks.{i}.ffn"

        weights[f"{attn}.qkv.weight"] = LazyWeight((D, 3 * D), partial(_transposed, state, f"{attn}.mat_qkv.weight"))
        weights[f"{attn}.qkv.bias"] = LazyWeight((3 * D,), partial(qkv_bias, attn))
        if config.attn_l2_norm:
            weights[f"{attn}.q_scale"] = LazyWeight((config.num_heads, 1, 1), partial(q_scale, attn))
        for key, K, N in (
            (f"{attn}.proj", D, D),
            (f"{ffn}.fc1", D, config.ffn_dim),
            (f"{ffn}.fc2", config.ffn_dim, D),
        ):
            weights[f"{key}.weight"] = LazyWeight((K, N), partial(_transposed, state, f"{key}.weight"))
            weights[f"{key}.bias"] = LazyWeight((N,), partial(_read, state, f"{key}.bias"))
    weights["head.weight"] = LazyWeight((D, config.vocab_size), partial(_transposed, state, "head.weight"))
    weights["head.bias"] = LazyWeight((config.vocab_size,), partial(_read, state, "head.bias"))
    return weights


def _vqvae_weights(pair: CheckpointPair) -> dict[str, LazyWeight]:
    """Codebook, stacked φ, and the convolutions as they are."""
    config, state = pair.vqvae, pair.vqvae_state
    C, P = config.z_channels, config.num_phi

    def phi(leaf: str) -> Tensor:
        return torch.cat([state[f"{config.phi_key(i)}.{leaf}"].float() for i in range(P)])

    def phi_weight() -> Tensor:
        identity = torch.zeros(C, C, 3, 3)
        identity[torch.arange(C), torch.arange(C), 1, 1] = 1.0
        return 0.5 * phi("weight") + 0.5 * identity.repeat(P, 1, 1, 1)

    weights = {
        "quantize.embedding.weight": LazyWeight((config.vocab_size, C), state["quantize.embedding.weight"].float),
        "quantize.phi.weight": LazyWeight((P * C, C, 3, 3), phi_weight),
        "quantize.phi.bias": LazyWeight((P * C,), lambda: 0.5 * phi("bias")),
    }
    for key, tensor in state.items():
        if not key.startswith("quantize."):
            weights[key] = LazyWeight(tuple(tensor.shape), tensor.float)
    return weights
