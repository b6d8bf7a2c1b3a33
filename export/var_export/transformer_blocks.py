"""What a transformer block does between its matrix products, in operators of ONNX or in plugins of TensorRT.

`Blocks` carries the residual stream through all blocks of one scale graph: x ← x + gamma·y, LN(x)·scale + shift, and
attention over the caches. A block has two of each but attention: 0 before and after attention, 1 before and after the
feed-forward part. Axes as in `var_deploy.signature`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from var_deploy.config import HEAD_DIM, PLAIN_SCALE, VARConfig
from var_deploy.signature import cache_names
from var_train.var import LN_EPS

from .graph_builder import GraphBuilder
from .plugin_nodes import ADALN, ADALN_HEAD, ADALN_START, CACHED_ATTENTION, PLAIN_ATTENTION, plugin_node
from .precision import narrow, wide

L2_EPS = 1e-12  # of PyTorch's normalize

#: Vectors of a modulation [R, depth, 6, D]: a block's two gammas, then its scales, then its shifts.
VECTORS, GAMMA, SCALE, SHIFT = 6, 0, 2, 4


class Blocks(Protocol):
    """The residual stream of one scale graph and the caches that its blocks wrote."""

    caches: dict[str, ir.Value]  #: outputs of the graph

    def begin(self, block: int) -> None:
        """What follows is of this block."""
        ...

    def normed(self, which: int) -> ir.Value:
        """LN(x)·scale + shift, in the type of activations: [R, n, D]."""
        ...

    def attended(self, qkv_RnN: ir.Value) -> ir.Value:
        """Attention over all positions up to this scale's last, heads side by side: [R, n, D]."""
        ...

    def add(self, y_RnD: ir.Value, which: int) -> None:
        """x ← x + gamma·y."""
        ...

    def head(self) -> ir.Value:
        """LN(x)·scale + shift of the head, in float32: [R, n, D]."""
        ...


class PlainBlocks:
    """Operators of ONNX, which every engine reads."""

    def __init__(
        self,
        b: GraphBuilder,
        var: VARConfig,
        x_RnD: ir.Value,
        write_indices: ir.Value,
        valid: Callable[[ir.Value], ir.Value],
    ) -> None:
        """valid: cuts a cache to what is filled after this scale."""
        self.caches: dict[str, ir.Value] = {}
        self._b, self._var, self._x = b, var, x_RnD
        self._write_indices, self._valid = write_indices, valid
        self._block = 0
        self._vectors: list[ir.Value] = []  # of this block

    def begin(self, block: int) -> None:
        b = self._b
        block_R6D = wide(b, b.op("Gather", b.input("modulation"), b.constant(block, "int64"), axis=1))
        self._vectors = b.op("Split", block_R6D, outputs=VECTORS, axis=1, num_outputs=VECTORS)
        self._block = block

    def normed(self, which: int) -> ir.Value:
        return narrow(self._b, self._norm(self._vectors[SCALE + which], self._vectors[SHIFT + which]))

    def attended(self, qkv_RnN: ir.Value) -> ir.Value:
        b, var = self._b, self._var
        q, key, value = self._heads(qkv_RnN)
        cached = []
        names = cache_names(var.depth)[2 * self._block : 2 * self._block + 2]
        for name, update_RHnd in zip(names, (key, value), strict=True):
            cache_RHLd = _scattered(b, name, update_RHnd, self._write_indices)
            self.caches[f"{name}.out"] = cache_RHLd
            cached.append(self._valid(cache_RHLd))
        attributes: dict[str, Any] = {"scale": 1.0 if var.attn_l2_norm else PLAIN_SCALE}
        if b.activation != "float32":
            attributes["softmax_precision"] = ir.DataType.FLOAT
        attended = b.op("Attention", q, *cached, **attributes)
        return b.reshape(b.op("Transpose", attended, perm=[0, 2, 1, 3]), 0, -1, var.embed_dim)

    def add(self, y_RnD: ir.Value, which: int) -> None:
        b = self._b
        self._x = b.op("Add", self._x, b.op("Mul", wide(b, y_RnD), self._vectors[GAMMA + which]))

    def head(self) -> ir.Value:
        b = self._b
        scale, shift = b.op("Split", wide(b, b.input("head_modulation")), outputs=2, axis=1, num_outputs=2)
        return self._norm(scale, shift)

    def _norm(self, scale_R1D: ir.Value, shift_R1D: ir.Value) -> ir.Value:
        """LN(x)·scale + shift; `scale` already holds the 1."""
        b = self._b
        ones_D = b.constant(np.ones(self._var.embed_dim), "float32")
        normed = b.op("LayerNormalization", self._x, ones_D, axis=-1, epsilon=LN_EPS)
        return b.op("Add", b.op("Mul", normed, scale_R1D), shift_R1D)

    def _heads(self, qkv_RnN: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Queries, keys, values [R, H, n, 64]; q and k unit length per head and q scaled, where the model does that."""
        b, var = self._b, self._var
        parts = b.op("Split", qkv_RnN, outputs=3, axis=-1, num_outputs=3)
        split = (b.reshape(part, 0, -1, var.num_heads, HEAD_DIM) for part in parts)
        q, k, v = (b.op("Transpose", part, perm=[0, 2, 1, 3]) for part in split)
        if var.attn_l2_norm:
            q, k = self._unit_length(wide(b, q)), self._unit_length(wide(b, k))
            q = b.op("Mul", q, b.weight(f"blocks.{self._block}.attn.q_scale"))
            q, k = narrow(b, q), narrow(b, k)
        return q, k, v

    def _unit_length(self, x_RHnd: ir.Value) -> ir.Value:
        b = self._b
        length = b.op("ReduceL2", x_RHnd, b.ints(-1), keepdims=1)
        return b.op("Div", x_RHnd, b.op("Max", length, b.constant(L2_EPS, "float32")))


class PluginBlocks:
    """Plugins of TensorRT: a sum and the norm after it are one node, and so is attention with all around it.

    The caches are still updated by TensorScatter, from graph input to graph output, so that TensorRT does it in place.
    The plugin reads the input too, before the update, which needs its results; and only positions before `first`.
    """

    def __init__(
        self, b: GraphBuilder, var: VARConfig, x_RnD: ir.Value, write_indices: ir.Value, n: int, first: int
    ) -> None:
        """n: tokens of the scale; first: position of the first of them."""
        self.caches: dict[str, ir.Value] = {}
        self._b, self._var, self._x, self._write_indices = b, var, x_RnD, write_indices
        self._n, self._first, self._block = n, first, 0
        self._branch: tuple[ir.Value, int] | None = None  # not added yet: y, and which vector its gamma is
        self._tokens: tuple[int | str, ...] = ("R", n, var.embed_dim)

    def begin(self, block: int) -> None:
        self._block = block

    def normed(self, which: int) -> ir.Value:
        norms = self._b.input("modulation")
        places = {"scale_at": self._vector(SCALE + which), "shift_at": self._vector(SHIFT + which)}
        if self._branch is None:
            (out,) = plugin_node(self._b, ADALN_START, self._x, norms, shapes=[self._tokens], **places)
            return out
        y_RnD, gamma_at = self._branch
        inputs = (self._x, y_RnD, norms, norms)
        shapes = [self._tokens, self._tokens]
        self._x, out = plugin_node(self._b, ADALN, *inputs, shapes=shapes, gamma_at=gamma_at, **places)
        return out

    def attended(self, qkv_RnN: ir.Value) -> ir.Value:
        b, var = self._b, self._var
        names = cache_names(var.depth)[2 * self._block : 2 * self._block + 2]
        heads = ("R", var.num_heads, self._n, HEAD_DIM)
        shapes: list[tuple[int | str, ...]] = [self._tokens, heads, heads]
        caches = map(b.input, names)
        if var.attn_l2_norm:
            inputs = qkv_RnN, b.weight(f"blocks.{self._block}.attn.q_scale"), *caches
            attended, *updates = plugin_node(b, CACHED_ATTENTION, *inputs, shapes=shapes, begin=self._first)
        else:
            places = {"begin": self._first, "softmax_scale": PLAIN_SCALE}
            attended, *updates = plugin_node(b, PLAIN_ATTENTION, qkv_RnN, *caches, shapes=shapes, **places)
        for name, update_RHnd in zip(names, updates, strict=True):
            self.caches[f"{name}.out"] = _scattered(b, name, update_RHnd, self._write_indices)
        return attended

    def add(self, y_RnD: ir.Value, which: int) -> None:
        self._branch = y_RnD, self._vector(GAMMA + which)

    def head(self) -> ir.Value:
        assert self._branch is not None
        y_RnD, gamma_at = self._branch
        inputs = (self._x, y_RnD, self._b.input("modulation"), self._b.input("head_modulation"))
        places = {"gamma_at": gamma_at, "scale_at": 0, "shift_at": 1}
        (out,) = plugin_node(self._b, ADALN_HEAD, *inputs, shapes=[self._tokens], **places)
        return out

    def _vector(self, which: int) -> int:
        """Number of this block's vector among all of a row's."""
        return self._block * VECTORS + which


def _scattered(b: GraphBuilder, name: str, update_RHnd: ir.Value, write_indices: ir.Value) -> ir.Value:
    scattered: ir.Value = b.op("TensorScatter", b.input(name), update_RHnd, write_indices, axis=2, mode="linear")
    return scattered
