"""VAR transformer: next-scale prediction over a token pyramid (paper section 3), with the published state-dict keys.

Axes: B rows, D width, H heads, d = 64 head width, L all tokens, n = n_k tokens of scale k, l tokens seen so far,
C code width, V codebook entries. Everything that depends on the class alone enters through AdaLN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache as cached
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from var_deploy.config import HEAD_DIM, PLAIN_SCALE, VARConfig

#: Keys and values of the scales so far: per block (k_BHld, v_BHld); empty before the first scale.
KVCache = list[tuple[Tensor, Tensor]]

#: What a token may attend to: everything, where −inf is not added, or as blocks of positions.
Mask = Tensor | BlockMask | None

MAX_SCALE_MUL = math.log(100.0)  # cap of the learned attention scale, in log space
LN_EPS = 1e-6


class DropPath(nn.Module):
    """Stochastic depth: while training, drops the residual branch of a row with the given probability."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x_BLD: Tensor, uniform_B: Tensor | None) -> Tensor:
        """`uniform_B` in [0, 1) decides, one number per row; not needed outside training."""
        if not self.training or self.probability == 0.0 or uniform_B is None:
            return x_BLD
        kept_B = (uniform_B >= self.probability).to(x_BLD.dtype) / (1.0 - self.probability)
        return x_BLD * kept_B.view(-1, 1, 1)


class SelfAttention(nn.Module):
    """Multi-head attention; q and k L2-normalised per head with a learned scale, or plain at 0.25/√64."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        D = config.embed_dim
        self.l2_norm = config.attn_l2_norm
        if self.l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, config.num_heads, 1, 1), math.log(4.0)))
        self.mat_qkv = nn.Linear(D, 3 * D, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(D))
        self.v_bias = nn.Parameter(torch.zeros(D))
        self.zero_k_bias: Tensor
        self.register_buffer("zero_k_bias", torch.zeros(D))
        self.proj = nn.Linear(D, D)

    def forward(
        self, x_BnD: Tensor, past: tuple[Tensor, Tensor] | None, mask: Mask
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Output [B, n, D] and the keys and values of past and present."""
        B, n, D = x_BnD.shape
        bias_3D = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv_Bn3Hd = F.linear(x_BnD, self.mat_qkv.weight, bias_3D).view(B, n, 3, -1, HEAD_DIM)
        q_BHnd, k_BHnd, v_BHnd = qkv_Bn3Hd.permute(2, 0, 3, 1, 4).unbind(0)
        if self.l2_norm:
            scale = 1.0
            q_BHnd = F.normalize(q_BHnd, dim=-1) * self.scale_mul_1H11.clamp_max(MAX_SCALE_MUL).exp()
            k_BHnd = F.normalize(k_BHnd, dim=-1)
        else:
            scale = PLAIN_SCALE
        if past is not None:
            k_BHnd = torch.cat([past[0], k_BHnd], dim=2)
            v_BHnd = torch.cat([past[1], v_BHnd], dim=2)
        if isinstance(mask, BlockMask):
            compiled_here = x_BnD.is_cuda and not torch.compiler.is_compiling()
            attend: Any = _compiled_flex_attention() if compiled_here else flex_attention
            q_BHnd, k_BHnd = q_BHnd.to(v_BHnd.dtype), k_BHnd.to(v_BHnd.dtype)  # autocast does not know this operation
            y_BHnd = attend(q_BHnd, k_BHnd, v_BHnd, block_mask=mask, scale=scale)
        else:
            y_BHnd = F.scaled_dot_product_attention(q_BHnd, k_BHnd, v_BHnd, attn_mask=mask, scale=scale)
        return self.proj(y_BHnd.transpose(1, 2).reshape(B, n, D)), (k_BHnd, v_BHnd)


@cached
def _compiled_flex_attention() -> Callable[..., Any]:
    """Without compilation FlexAttention computes every score, and slowly.

    PyTorch gives compiling up after eight shapes, and progressive training alone may have more.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention, dynamic=False)


def flex_attention_fails(device: torch.device) -> str:
    """Why FlexAttention cannot train on a device, from a trial; "" where it can."""
    mask = create_block_mask(lambda b, h, query, key: query >= key, None, None, 128, 128, device=str(device))
    q_BHld = torch.zeros(1, 1, 128, HEAD_DIM, device=device, requires_grad=True)
    try:
        _compiled_flex_attention()(q_BHld, q_BHld, q_BHld, block_mask=mask).sum().backward()
    except Exception as error:  # the compiler raises nearly anything where Triton or the card does not serve
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ""


class FFN(nn.Module):
    """fc2(GELU_tanh(fc1(x)))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BnD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BnD), approximate="tanh"))


class AdaLNBlock(nn.Module):
    """Transformer block modulated by the class: gamma1, gamma2, scale1, scale2, shift1, shift2, in this order."""

    ada_gss: nn.Parameter  # with a projection shared by all blocks
    ada_lin: nn.Sequential  # with one of its own

    def __init__(self, config: VARConfig, drop_path: float) -> None:
        super().__init__()
        D = config.embed_dim
        self.attn = SelfAttention(config)
        self.ffn = FFN(D, config.ffn_dim)
        self.drop_path = DropPath(drop_path)
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, D))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def modulation(self, cond_BD: Tensor, shared_B16D: Tensor | None) -> Tensor:
        """The six modulations: [B, 1, 6, D]."""
        if shared_B16D is not None:
            return self.ada_gss + shared_B16D
        return self.ada_lin(cond_BD).view(len(cond_BD), 1, 6, -1)

    def forward(
        self,
        x_BnD: Tensor,
        cond_BD: Tensor,
        shared_B16D: Tensor | None,
        past: tuple[Tensor, Tensor] | None,
        mask: Mask,
        uniforms_2B: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`uniforms_2B` decides on the two residual branches of every row while training.

        A block uses its own parameters here alone, so they can be sharded between calls.
        """
        uniform_B, other_B = (None, None) if uniforms_2B is None else uniforms_2B.unbind(0)
        modulation_B16D = self.modulation(cond_BD, shared_B16D)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation_B16D.unbind(2)  # each [B, 1, D]
        y_BnD, present = self.attn(_layer_norm(x_BnD) * (1 + scale1) + shift1, past, mask)
        x_BnD = x_BnD + self.drop_path(y_BnD * gamma1, uniform_B)
        y_BnD = self.ffn(_layer_norm(x_BnD) * (1 + scale2) + shift2)
        return x_BnD + self.drop_path(y_BnD * gamma2, other_B), present


class AdaLNBeforeHead(nn.Module):
    """LN(x)·(1 + scale) + shift ahead of the head, modulated by the class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BnD: Tensor, cond_BD: Tensor) -> Tensor:
        scale, shift = self.ada_lin(cond_BD).view(len(cond_BD), 1, 2, -1).unbind(2)
        return _layer_norm(x_BnD) * (1 + scale) + shift


def _layer_norm(x_BnD: Tensor) -> Tensor:
    return F.layer_norm(x_BnD, x_BnD.shape[-1:], eps=LN_EPS)


class VAR(nn.Module):
    """Class label and coarser scales → logits of the next scale's tokens."""

    def __init__(self, config: VARConfig, *, label_dropout: float = 0.1, drop_path: float | None = None) -> None:
        """`drop_path` is the last block's stochastic depth (linear from 0); None takes 0.1·depth/24."""
        super().__init__()
        self.config = config
        self.label_dropout = label_dropout
        self.flex_attention = False  #: teacher forcing through FlexAttention, which skips what lies above the blocks
        self.checkpoint_blocks = False  #: while training, keep no activations within a block but compute them again
        self._block_masks: dict[tuple[int, torch.device], BlockMask] = {}
        D, L = config.embed_dim, config.num_tokens
        self.word_embed = nn.Linear(config.z_channels, D)
        self.class_emb = nn.Embedding(config.num_classes + 1, D)
        self.pos_start = nn.Parameter(torch.zeros(1, config.tokens_per_scale[0], D))
        self.pos_1LC = nn.Parameter(torch.zeros(1, L, D))
        self.lvl_embed = nn.Embedding(config.num_scales, D)
        if config.shared_aln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        last = 0.1 * config.depth / 24 if drop_path is None else drop_path
        rates = [last * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(AdaLNBlock(config, rate) for rate in rates)
        self.head_nm = AdaLNBeforeHead(D)
        self.head = nn.Linear(D, config.vocab_size)
        self.lvl_1L: Tensor
        self.attn_bias_for_masking: Tensor
        lvl_1L, bias_11LL = scale_index_and_mask(config)
        self.register_buffer("lvl_1L", lvl_1L)
        self.register_buffer("attn_bias_for_masking", bias_11LL)

    def condition(self, labels_B: Tensor) -> Tensor:
        """Class embedding [B, D]; the null class is `config.null_class`."""
        return self.class_emb(labels_B)

    def embed_start(self, cond_BD: Tensor) -> Tensor:
        """Input of the first scale: [B, n_0, D]."""
        n_0 = self.config.tokens_per_scale[0]
        return cond_BD.unsqueeze(1) + self.pos_start + self._level_and_position(0, n_0)

    def embed_scale(self, k: int, features_BnC: Tensor) -> Tensor:
        """Input of scale k > 0 from `MultiScaleQuantizer.next_features`: [B, n_k, D]."""
        return self.word_embed(features_BnC) + self._level_and_position(*self.config.span(k))

    def forward_scale(self, x_BnD: Tensor, cond_BD: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        """One scale given the cache of all scales before: logits [B, n_k, V] in float32, and the grown cache."""
        return self._blocks_and_head(x_BnD, cond_BD, cache, None, [None] * self.config.depth)

    @property
    def num_uniforms(self) -> int:
        """Random numbers that training takes per row: one for its label, two for every block."""
        return 1 + 2 * self.config.depth

    def forward(self, labels_B: Tensor, features_BlC: Tensor, uniforms_UB: Tensor | None = None) -> Tensor:
        """Teacher forcing over all scales at once, or the first few: logits [B, n_0 + l, V] in float32.

        `features_BlC` is `MultiScaleQuantizer.teacher_forcing_input`, all L − n_0 positions or the first scales'.
        While training, each label is replaced by the null class with probability `label_dropout`, and rows leave out
        residual branches; `uniforms_UB` [num_uniforms, B] in [0, 1) decides, so that a row fares alike in whichever
        process it is trained; None draws them.
        """
        blocks_uniforms: Sequence[Tensor | None] = [None] * self.config.depth
        if self.training:
            if uniforms_UB is None:
                uniforms_UB = torch.rand(self.num_uniforms, len(labels_B), device=labels_B.device)
            labels_B = labels_B.masked_fill(uniforms_UB[0] < self.label_dropout, self.config.null_class)
            blocks_uniforms = uniforms_UB[1:].unflatten(0, (self.config.depth, 2)).unbind(0)
        cond_BD = self.condition(labels_B)
        n_0 = self.config.tokens_per_scale[0]
        end = n_0 + features_BlC.shape[1]
        later_BlD = self.word_embed(features_BlC) + self._level_and_position(n_0, end)
        x_BlD = torch.cat([self.embed_start(cond_BD), later_BlD], dim=1)
        mask = self._block_mask(end) if self.flex_attention else self.attn_bias_for_masking[:, :, :end, :end]
        return self._blocks_and_head(x_BlD, cond_BD, None, mask, blocks_uniforms)[0]

    def _block_mask(self, length: int) -> BlockMask:
        """A token attends to its own scale and all coarser ones, for the first `length` positions."""
        key = length, self.lvl_1L.device
        if key not in self._block_masks:
            lvl_L = self.lvl_1L[0]

            def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return lvl_L[query] >= lvl_L[key]

            self._block_masks[key] = create_block_mask(visible, None, None, length, length, device=str(key[1]))
        return self._block_masks[key]

    def _blocks(self) -> list[AdaLNBlock]:
        return [block for block in self.blocks if isinstance(block, AdaLNBlock)]

    def _level_and_position(self, begin: int, end: int) -> Tensor:
        return self.lvl_embed(self.lvl_1L[:, begin:end]) + self.pos_1LC[:, begin:end]

    def _blocks_and_head(
        self,
        x_BnD: Tensor,
        cond_BD: Tensor,
        cache: KVCache | None,
        mask: Mask,
        blocks_uniforms: Sequence[Tensor | None],
    ) -> tuple[Tensor, KVCache]:
        """`cache` None: none is wanted, so keys and values are let go block by block."""
        shared_B16D = None
        if self.config.shared_aln:
            shared_B16D = self.shared_ada_lin(cond_BD).view(len(cond_BD), 1, 6, -1)
        grown: KVCache = []
        for i, block in enumerate(self._blocks()):
            past = cache[i] if cache else None
            arguments = x_BnD, cond_BD, shared_B16D, past, mask, blocks_uniforms[i]
            if self.checkpoint_blocks and self.training:
                x_BnD, _ = checkpoint(block, *arguments, use_reentrant=False)
                continue
            x_BnD, present = block(*arguments)
            if cache is not None:
                grown.append(present)
            del present
        with torch.autocast(x_BnD.device.type, enabled=False):  # the head stays in float32
            return self.head(self.head_nm(x_BnD.float(), cond_BD.float())), grown

    @torch.no_grad()
    def init_weights(self, *, gamma_scale: float = 1e-3) -> None:
        """Initialisation of the public release; `gamma_scale` is its `alng`: 1e-3 at d16, down to 1e-5 at d30."""
        D, depth = self.config.embed_dim, self.config.depth
        std = math.sqrt(1 / (3 * D))

        def truncated(tensor: Tensor) -> None:
            nn.init.trunc_normal_(tensor, std=std, a=-2.0, b=2.0)

        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                truncated(module.weight)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        truncated(self.pos_start)
        truncated(self.pos_1LC)
        self.head.weight.mul_(0.02)
        _projection(self.head_nm.ada_lin).weight.mul_(0.5)
        for block in self._blocks():
            block.attn.proj.weight.div_(math.sqrt(2 * depth))
            block.ffn.fc2.weight.div_(math.sqrt(2 * depth))
            if self.config.shared_aln:
                block.ada_gss.normal_(std=D**-0.5)
                block.ada_gss[:, :, 2:].mul_(0.5)
                block.ada_gss[:, :, :2].mul_(gamma_scale)
            else:
                weight_6DD = _projection(block.ada_lin).weight
                weight_6DD[2 * D :].mul_(0.5)
                weight_6DD[: 2 * D].mul_(gamma_scale)


def _projection(ada_lin: nn.Sequential) -> nn.Linear:
    linear = ada_lin[1]
    assert isinstance(linear, nn.Linear)
    return linear


def scale_index_and_mask(config: VARConfig) -> tuple[Tensor, Tensor]:
    """`lvl_1L` int64 [1, L], the scale of each position, and the block-causal bias [1, 1, L, L] of 0 and −inf."""
    lvl_L = torch.cat([torch.full((n,), k) for k, n in enumerate(config.tokens_per_scale)])
    later_LL = lvl_L[None, :] > lvl_L[:, None]
    bias_LL = torch.zeros(later_LL.shape).masked_fill(later_LL, -torch.inf)
    return lvl_L[None], bias_LL[None, None]
