"""Two models in one image: a draft draws the coarse scales, a refiner the fine ones, over one quantiser.

Collaborative decoding (arXiv 2411.17787). What crosses is every code of the draft's scales, so the refiner starts from
the draft's feature map, also where codes are mixtures.
"""

from __future__ import annotations

from .bundle import Bundle
from .errors import RequestError
from .quantizer import Quantizer
from .request import is_integer


def check_partners(
    draft: Bundle, drafts: Quantizer, refiner: Bundle, refiners: Quantizer, draft_scales: int | None
) -> None:
    """Refuses models that do not speak of the same codes, scales and classes. Raises RequestError."""
    ours, theirs = draft.manifest, refiner.manifest
    K = ours.var.num_scales
    for what, a, b in (
        ("scales", ours.var.patch_nums, theirs.var.patch_nums),
        ("classes", ours.var.num_classes, theirs.var.num_classes),
        ("class names", ours.class_names, theirs.class_names),
    ):
        if a != b and None not in (a, b):
            raise RequestError(
                f"refine: {what} of {draft.path} and {refiner.path} differ; take models of the same data"
            )
    if differs := drafts.difference(refiners):
        raise RequestError(
            f"refine: {differs} of {draft.path} and {refiner.path} differ; take models of the same VQVAE"
        )
    if draft_scales is None or not is_integer(draft_scales) or not 1 <= draft_scales < K:
        raise RequestError(f"draft_scales: got {draft_scales!r}, expected a number from 1 to {K - 1}")
