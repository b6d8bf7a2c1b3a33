"""Floating-point operations of VAR's training, counted from its configuration: the compute C of a scaling law.

A multiplication and its addition are two operations. Counted: the matrix products of word embedding, AdaLN projections,
q, k and v, attention's scores and values over the positions that a token may see, attention's output, FFN and head. Not
counted: look-ups, biases, norms, softmax, GELU, optimiser, VQVAE, what dense attention computes above the block-causal
mask for nothing, and blocks that are computed twice to save memory.
"""

from __future__ import annotations

from bisect import bisect_left

from var_deploy.config import VARConfig

from .recipe import Progressive, Schedule

#: Forward and backward in units of forward: the backward pass has two products for each, by input and by weight.
#: The word embedding's input needs no gradient; as usual, that is not subtracted.
PASSES = 3


def forward_flops(config: VARConfig, scales: int | None = None) -> int:
    """Teacher forcing of one image over all scales, or the first few.

    With l tokens in them, n_0 in the first: 2·(l − n_0)·C·D + AdaLN's 2·(6·depth + 2)·D² (6 + 2 where it is shared) +
    depth·(2·l·(4·D² + 2·D·F) + 4·D·Σ_k n_k·(n_0 + … + n_k)) + 2·l·D·V, where F is the width of the FFN.
    """
    scales = config.num_scales if scales is None else scales
    D, tokens = config.embed_dim, config.tokens_per_scale[:scales]
    length = sum(tokens)
    visible = sum(n * config.span(k)[1] for k, n in enumerate(tokens))  # pairs of a position and one that it sees
    word_embed = 2 * (length - tokens[0]) * config.z_channels * D
    adaln = 2 * (6 * (1 if config.shared_aln else config.depth) + 2) * D * D
    block = 2 * length * (4 * D * D + 2 * D * config.ffn_dim) + 4 * D * visible
    head = 2 * length * D * config.vocab_size
    return word_embed + adaln + config.depth * block + head


def training_flops(config: VARConfig, schedule: Schedule, *, batch: int, progressive: Progressive | None = None) -> int:
    """All iterations of a run with `batch` images each: iterations·batch·3·forward.

    With progressive training an iteration counts the scales that it trains.
    What a fine-tuned run started from is not counted.
    """

    def added_at(scales: int) -> int:
        """The first iteration that trains more than so many scales."""
        if progressive is None:
            return 0
        return bisect_left(
            range(schedule.iterations),
            True,
            key=lambda i: progressive.at(i, scales=config.num_scales, schedule=schedule)[0] > scales,
        )

    ends = [*(added_at(scales) for scales in range(1, config.num_scales)), schedule.iterations]
    begins = [0, *ends[:-1]]
    images = [batch * (end - begin) for begin, end in zip(begins, ends, strict=True)]  # by the number of scales
    return sum(PASSES * forward_flops(config, k) * count for k, count in enumerate(images, 1) if count)
