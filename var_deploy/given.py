"""Tokens that a request brings instead of having them drawn: kept by an edit, of coarser scales, of another model.

Axes: B images, L positions of all scales, n positions of one scale, C code width, V codebook entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: In the place of a token that is to be drawn.
DRAWN = -1


@dataclass(frozen=True, eq=False, slots=True)
class Given:
    """What is put in the place of drawn tokens, and of their codes."""

    tokens_BL: np.ndarray  #: int64, DRAWN where none is given
    codes_BLC: np.ndarray  #: float32, anything where no token is given; mixtures, where the giver mixed codes

    @classmethod
    def of_tokens(cls, tokens_BL: np.ndarray, codebook_VC: np.ndarray) -> Given:
        """Given tokens with their entries of the codebook."""
        return cls(tokens_BL.astype(np.int64), codebook_VC[np.maximum(tokens_BL, 0)])

    @classmethod
    def of_scales(cls, tokens_Bl: np.ndarray, codes_BlC: np.ndarray, num_tokens: int) -> Given:
        """Given at the first l of so many positions, drawn at the rest."""
        B, l, C = codes_BlC.shape  # noqa: E741
        given = cls(np.full((B, num_tokens), DRAWN, dtype=np.int64), np.zeros((B, num_tokens, C), dtype=np.float32))
        given.tokens_BL[:, :l], given.codes_BLC[:, :l] = tokens_Bl, codes_BlC
        return given

    @classmethod
    def joined(cls, parts: Sequence[Given]) -> Given:
        """Of all images."""
        tokens, codes = [part.tokens_BL for part in parts], [part.codes_BLC for part in parts]
        return cls(np.concatenate(tokens), np.concatenate(codes))

    def part(self, images: slice) -> Given:
        """Of some of the images."""
        return Given(self.tokens_BL[images], self.codes_BLC[images])

    def everywhere(self, span: tuple[int, int]) -> bool:
        """Whether nothing is drawn at these positions."""
        return bool((self.tokens_BL[:, slice(*span)] != DRAWN).all())

    def at(self, span: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Copies of tokens and codes at these positions."""
        here = slice(*span)
        return self.tokens_BL[:, here].copy(), self.codes_BLC[:, here].copy()

    def put(self, span: tuple[int, int], tokens_Bn: np.ndarray, codes_BnC: np.ndarray) -> None:
        """Takes the place of what was drawn at these positions."""
        tokens_in_Bn, codes_in_BnC = self.tokens_BL[:, slice(*span)], self.codes_BLC[:, slice(*span)]
        given_Bn = tokens_in_Bn != DRAWN
        tokens_Bn[given_Bn] = tokens_in_Bn[given_Bn]
        codes_BnC[given_Bn] = codes_in_BnC[given_Bn]
