"""Where VAR's training tokens come from: images that a frozen VQVAE encodes as they come, or a store of tokens.

Axes: B images of this process, L tokens of all scales, K scales, C code width, R image side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .image_data import Crop, GlobalBatches, Share, evaluation_shares, share_batches, training_batches
from .image_files import ImageFiles
from .pictures import normalised
from .token_files import TokenFiles, token_batches
from .vqvae import VQVAE


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """A batch of one process, on its device."""

    tokens_BL: Tensor  #: int64
    labels_B: Tensor  #: int64
    iteration: int
    corrupt: tuple[str, ...] = ()  #: names of images that could not be decoded
    counted: int = 0  #: in evaluation, the first rows that count


class TokenSource(Protocol):
    """Tokens of a data set, for training and for measuring."""

    class_names: tuple[str, ...]

    def __len__(self) -> int:
        """Images."""
        ...

    def name(self, index: int) -> str:
        """Of an image, for people."""
        ...

    def training(self, batches: GlobalBatches, rows: slice, start: int) -> Iterator[Tokens]:
        """Endless, from iteration `start` on."""
        ...

    def evaluation(self, size: int) -> Iterator[Tokens]:
        """Every image once, `size` at a time in all processes together."""
        ...


class EncodedImages:
    """Images, through a frozen VQVAE in float32."""

    def __init__(
        self,
        images: ImageFiles,
        crop: Crop,
        vqvae: VQVAE,
        *,
        device: torch.device,
        at_once: int,
        workers: int,
        seed: int,
    ) -> None:
        """`at_once`: images that the encoder takes together."""
        self.class_names = images.class_names
        self._images, self._crop, self._vqvae, self._device = images, crop, vqvae, device
        self._at_once, self._workers, self._seed = at_once, workers, seed

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return self._images.name(index)

    def training(self, batches: GlobalBatches, rows: slice, start: int) -> Iterator[Tokens]:
        for batch in training_batches(
            self._images, self._crop, batches, rows=rows, start=start, workers=self._workers, seed=self._seed
        ):
            yield Tokens(
                tokens_BL=self._encoded(batch.images_BCRR),
                labels_B=batch.labels_B.to(self._device),
                iteration=batch.iteration,
                corrupt=batch.corrupt,
            )

    def evaluation(self, size: int) -> Iterator[Tokens]:
        shares = evaluation_shares(len(self), size)
        centre = Crop(side=self._crop.side, random=False, enlarge=self._crop.enlarge)
        made = share_batches(self._images, centre, shares, workers=self._workers)
        for batch, share in zip(made, shares, strict=True):
            yield Tokens(
                tokens_BL=self._encoded(batch.images_BCRR),
                labels_B=batch.labels_B.to(self._device),
                iteration=batch.iteration,
                corrupt=batch.corrupt,
                counted=share.counted,
            )

    def _encoded(self, images_B3RR: Tensor) -> Tensor:
        parts = [normalised(part_B3RR, self._device) for part_B3RR in images_B3RR.split(self._at_once)]
        with torch.no_grad():
            return torch.cat([torch.cat(self._vqvae.tokens(part_B3RR), dim=1) for part_B3RR in parts])


class StoredTokens:
    """Tokens that `var-deploy train tokens` stored."""

    def __init__(self, files: TokenFiles, device: torch.device) -> None:
        self.class_names = files.class_names
        self._files, self._device = files, device

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return self._files.name(index)

    def training(self, batches: GlobalBatches, rows: slice, start: int) -> Iterator[Tokens]:
        for batch in token_batches(self._files, batches, rows=rows, start=start):
            yield self._moved(batch.tokens_BL, batch.labels_B, batch.iteration)

    def evaluation(self, size: int) -> Iterator[Tokens]:
        for number, share in enumerate(evaluation_shares(len(self), size)):
            yield self._moved(*self._files.read(0, share.indices_B), number, share)

    def _moved(self, tokens_BL: Tensor, labels_B: Tensor, iteration: int, share: Share | None = None) -> Tokens:
        return Tokens(
            tokens_BL=tokens_BL.to(self._device),
            labels_B=labels_B.to(self._device),
            iteration=iteration,
            counted=share.counted if share else 0,
        )
