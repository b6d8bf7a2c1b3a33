"""The graphs of the transformer and the quantiser: condition, one per scale, the symbolic one, finish.

One function, `scale_graph`, writes a scale of any kind. What differs between a static scale and the symbolic graph
(where tokens begin and end, which φ, which resampling) is behind a `_Geometry`: constants in one, look-ups by the input
`scale` in the other. What a block does between its products is in `transformer_blocks`; where values are float32 and
how products are computed is told in `precision`. Axes as in `var_deploy.signature`.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import onnx_ir as ir

from var_deploy.config import VARConfig, VQVAEConfig
from var_deploy.interpolation import area_matrix, bicubic_matrix
from var_deploy.precision import Precision
from var_deploy.signature import GraphSpec, graph_specs, scale_graph_name

from .graph_builder import GraphBuilder
from .precision import logits, narrow, product, product_of, wide
from .smoothing import SMOOTHING
from .transformer_blocks import Blocks, PlainBlocks, PluginBlocks
from .weights_file import WeightsLayout


def condition_graph(
    var: VARConfig, spec: GraphSpec, layout: WeightsLayout, precision: Precision = Precision.FP32
) -> ir.Model:
    """labels [R] → modulation [R, depth, 6, D], head_modulation [R, 2, D], start [R, n_0, D].

    The scales among the modulations already hold 1 + scale.
    """
    b = GraphBuilder(spec, layout, precision)
    D = var.embed_dim
    cond_RD = wide(b, b.op("Gather", b.weight("class_emb.weight"), b.input("labels"), axis=0))
    projected = product_of(b, narrow(b, b.op("Mul", cond_RD, b.op("Sigmoid", cond_RD))))
    if var.shared_aln:
        shared_R16D = b.reshape(projected("shared_ada_lin"), -1, 1, 6, D)
        modulation = b.op("Add", b.weight("ada_gss"), shared_R16D)
    else:
        per_block = [b.reshape(projected(f"blocks.{i}.ada_lin"), -1, 1, 6, D) for i in range(var.depth)]
        modulation = b.op("Concat", *per_block, axis=1)
    if b.stored(SMOOTHING):
        modulation = b.op("Mul", modulation, b.weight(SMOOTHING))
    head_modulation = b.reshape(projected("head_nm.ada_lin"), -1, 2, D)
    start = b.op("Add", b.op("Unsqueeze", cond_RD, b.ints(1)), b.weight("start_position"))
    results = {"modulation": modulation, "head_modulation": head_modulation, "start": start}
    return b.model({name: narrow(b, value) for name, value in results.items()})


def finish_graph(vqvae: VQVAEConfig, spec: GraphSpec, layout: WeightsLayout) -> ir.Model:
    """codes of the last scale [B, n, C] and f_hat [B, C, h, h] → complete f_hat."""
    b = GraphBuilder(spec, layout)
    last = vqvae.num_scales - 1
    contribution = _StaticScale(b, vqvae, last + 1).contribution(b.input("codes"))
    return b.model({"f_hat.out": b.op("Add", b.input("f_hat"), contribution)})


def scale_graph(
    var: VARConfig,
    vqvae: VQVAEConfig,
    k: int | None,
    layout: WeightsLayout,
    spec: GraphSpec | None = None,
    precision: Precision = Precision.FP32,
    *,
    plugins: bool = False,
) -> ir.Model:
    """The graph of scale `k`, or with None the symbolic one: see `graph_specs` for its signature.

    plugins: a static scale as TensorRT alone reads it, with the plugins of `plugin_nodes` between the products.
    """
    spec = spec or graph_specs(var, vqvae, precision)["scales" if k is None else scale_graph_name(k)]
    b = GraphBuilder(spec, layout, precision)
    scale: _Geometry = _SymbolicScale(b, vqvae) if k is None else _StaticScale(b, vqvae, k)
    outputs: dict[str, ir.Value] = {}
    if k == 0:
        x_RnD = wide(b, b.input("start"))
    else:
        f_hat = b.op("Add", b.input("f_hat"), scale.contribution(b.input("codes")))
        outputs["f_hat.out"] = f_hat
        features_RnC = _tokens_from_map(b, scale.shrink(f_hat))
        words_RnD = b.op("MatMul", features_RnC, b.weight("word_embed.weight"))
        x_RnD = scale.input_tokens(b.op("Add", words_RnD, scale.position()))

    blocks: Blocks
    if plugins:
        assert isinstance(scale, _StaticScale)
        blocks = PluginBlocks(b, var, x_RnD, scale.write_indices(), *scale.tokens())
    else:
        blocks = PlainBlocks(b, var, x_RnD, scale.write_indices(), scale.valid)
    for i in range(var.depth):
        blocks.begin(i)
        qkv_RnN = product(b, blocks.normed(0), f"blocks.{i}.attn.qkv")
        blocks.add(product(b, blocks.attended(qkv_RnN), f"blocks.{i}.attn.proj"), 0)
        hidden = b.op("Gelu", product(b, blocks.normed(1), f"blocks.{i}.ffn.fc1"), approximate="tanh")
        blocks.add(product(b, hidden, f"blocks.{i}.ffn.fc2"), 1)
    outputs |= blocks.caches
    outputs["logits"] = logits(b, blocks.head())
    return b.model(outputs)


def _tokens_from_map(b: GraphBuilder, map_RChw: ir.Value) -> ir.Value:
    """[R, C, h, w] → [R, h·w, C], row-major."""
    return b.op("Transpose", b.reshape(map_RChw, 0, 0, -1), perm=[0, 2, 1])


def _resample(b: GraphBuilder, map_RChw: ir.Value, rows: ir.Value, columns_T: ir.Value) -> ir.Value:
    """rows · map · columnsᵀ."""
    return b.op("MatMul", b.op("MatMul", rows, map_RChw), columns_T)


class _Geometry(Protocol):
    """Everything of a scale graph that depends on which scale it is."""

    def contribution(self, codes_RnC: ir.Value) -> ir.Value:
        """What the previous scale's codes add to f_hat: [R, C, h, h]."""
        ...

    def shrink(self, f_hat: ir.Value) -> ir.Value:
        """f_hat at this scale's resolution: [R, C, pn, pn]."""
        ...

    def position(self) -> ir.Value:
        """Level, position and word bias of this scale's tokens: [n, D]."""
        ...

    def input_tokens(self, words_RnD: ir.Value) -> ir.Value:
        """The block input: the words, or at the first scale the start tokens."""
        ...

    def write_indices(self) -> ir.Value:
        """Where this scale's keys and values go: the same offset for all rows, int64 [R]."""
        ...

    def valid(self, cache_RHLd: ir.Value) -> ir.Value:
        """The part of a cache that is filled after this scale: [R, H, l, 64]."""
        ...


class _StaticScale:
    """A scale fixed at export: every size is a constant."""

    def __init__(self, b: GraphBuilder, vqvae: VQVAEConfig, k: int) -> None:
        """`k` may be K, one past the last scale, for what follows it."""
        self.b, self.vqvae, self.k = b, vqvae, k

    def contribution(self, codes_RnC: ir.Value) -> ir.Value:
        b, config, previous = self.b, self.vqvae, self.k - 1
        C, pn, h = config.z_channels, config.patch_nums[previous], config.latent_size
        map_RChw = b.reshape(b.op("Transpose", codes_RnC, perm=[0, 2, 1]), 0, C, pn, pn)
        if pn != h:
            enlarge = bicubic_matrix(pn, h)
            map_RChw = _resample(b, map_RChw, b.constant(enlarge, "float32"), b.constant(enlarge.T, "float32"))
        phi = config.phi_index(previous)
        rows = (phi * C, (phi + 1) * C)
        weight, bias = b.weight("quantize.phi.weight", rows), b.weight("quantize.phi.bias", rows)
        return b.op("Conv", map_RChw, weight, bias, kernel_shape=[3, 3], pads=[1, 1, 1, 1])

    def shrink(self, f_hat: ir.Value) -> ir.Value:
        pn, h = self.vqvae.patch_nums[self.k], self.vqvae.latent_size
        if pn == h:
            return f_hat
        matrix = area_matrix(h, pn)
        return _resample(self.b, f_hat, self.b.constant(matrix, "float32"), self.b.constant(matrix.T, "float32"))

    def position(self) -> ir.Value:
        n_0 = self.vqvae.tokens_per_scale[0]
        begin, end = self.vqvae.span(self.k)
        return self.b.weight("position", (begin - n_0, end - n_0))

    def input_tokens(self, words_RnD: ir.Value) -> ir.Value:
        return words_RnD

    def write_indices(self) -> ir.Value:
        rows = self.b.op("Shape", self.b.input("modulation"), start=0, end=1)
        begin = ir.tensor(np.array([self.vqvae.span(self.k)[0]], dtype=np.int64))
        return self.b.op("ConstantOfShape", rows, value=begin)

    def tokens(self) -> tuple[int, int]:
        """How many, and the position of the first."""
        begin, end = self.vqvae.span(self.k)
        return end - begin, begin

    def valid(self, cache_RHLd: ir.Value) -> ir.Value:
        end = self.vqvae.span(self.k)[1]
        if end == self.vqvae.num_tokens:
            return cache_RHLd
        return self.b.op("Slice", cache_RHLd, self.b.ints(0), self.b.ints(end), self.b.ints(2))


class _SymbolicScale:
    """A scale chosen at run time by the input `scale` [1]: every size is looked up in a small table."""

    def __init__(self, b: GraphBuilder, vqvae: VQVAEConfig) -> None:
        self.b, self.vqvae = b, vqvae
        self.scales = range(vqvae.num_scales)
        # Scale 0 has no previous scale: it takes its own sizes, and `contribution` is multiplied by 0.
        self.previous = [max(k - 1, 0) for k in self.scales]

    def look_up(self, values: list[int]) -> ir.Value:
        """values[scale], int64 [1]."""
        return self.b.op("Gather", self.b.ints(*values), self.b.input("scale"), axis=0)

    def _resampling(self, matrices: list[np.ndarray], small: ir.Value, axis: int) -> tuple[ir.Value, ir.Value]:
        """The scale's matrix and its transpose out of a padded stack; `axis` is the one of varying size."""
        b, widest = self.b, max(matrix.shape[axis] for matrix in matrices)
        stack = np.zeros((len(matrices), *(widest if a == axis else s for a, s in enumerate(matrices[0].shape))))
        for matrix, padded in zip(matrices, stack, strict=True):
            padded[: matrix.shape[0], : matrix.shape[1]] = matrix
        one = b.op("Squeeze", b.op("Gather", b.constant(stack, "float32"), b.input("scale"), axis=0), b.ints(0))
        cut = b.op("Slice", one, b.ints(0), small, b.ints(axis))
        return cut, b.op("Transpose", cut, perm=[1, 0])

    def contribution(self, codes_RnC: ir.Value) -> ir.Value:
        b, config = self.b, self.vqvae
        C, P, h = config.z_channels, config.num_phi, config.latent_size
        pn = self.look_up([config.patch_nums[p] for p in self.previous])
        shape = b.op("Concat", b.ints(0, C), pn, pn, axis=0)
        map_RChw = b.op("Reshape", b.op("Transpose", codes_RnC, perm=[0, 2, 1]), shape)
        matrices = [bicubic_matrix(config.patch_nums[p], h) for p in self.previous]
        map_RChh = _resample(b, map_RChw, *self._resampling(matrices, pn, axis=1))
        # All φ in one convolution, then the one of the previous scale: they are small, and weights stay constant.
        all_phi = b.reshape(b.conv(map_RChh, "quantize.phi"), 0, P, C, h, h)
        phi = self.look_up([config.phi_index(p) for p in self.previous])
        chosen = b.op("Squeeze", b.op("Gather", all_phi, phi, axis=1), b.ints(1))
        gate = b.op("Cast", b.op("Min", b.input("scale"), b.ints(1)), to=ir.DataType.FLOAT)
        return b.op("Mul", chosen, gate)

    def shrink(self, f_hat: ir.Value) -> ir.Value:
        config = self.vqvae
        matrices = [area_matrix(config.latent_size, pn) for pn in config.patch_nums]
        return _resample(self.b, f_hat, *self._resampling(matrices, self.look_up(list(config.patch_nums)), axis=0))

    def position(self) -> ir.Value:
        b, n_0 = self.b, self.vqvae.tokens_per_scale[0]
        begins = [0 if k == 0 else self.vqvae.span(k)[0] - n_0 for k in self.scales]
        ends = [begin + n for begin, n in zip(begins, self.vqvae.tokens_per_scale, strict=True)]
        return b.op("Slice", b.weight("position"), self.look_up(begins), self.look_up(ends), b.ints(0))

    def input_tokens(self, words_RnD: ir.Value) -> ir.Value:
        b, n = self.b, self.vqvae.tokens_per_scale
        both = b.op("Concat", wide(b, b.input("start")), words_RnD, axis=1)
        begin = self.look_up([0 if k == 0 else n[0] for k in self.scales])
        end = self.look_up([n[0] if k == 0 else n[0] + n[k] for k in self.scales])
        return b.op("Slice", both, begin, end, b.ints(1))

    def write_indices(self) -> ir.Value:
        b = self.b
        begin = self.look_up([self.vqvae.span(k)[0] for k in self.scales])
        return b.op("Expand", begin, b.op("Shape", b.input("modulation"), start=0, end=1))

    def valid(self, cache_RHLd: ir.Value) -> ir.Value:
        end = self.look_up([self.vqvae.span(k)[1] for k in self.scales])
        return self.b.op("Slice", cache_RHLd, self.b.ints(0), end, self.b.ints(2))
