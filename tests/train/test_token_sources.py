"""Tokens of images that are encoded as they come, and of a store: the same, whoever asks for which part of them."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic")

from var_train import VQVAE, image_data
from var_train.image_data import Crop, GlobalBatches, evaluation_batches, training_batches
from var_train.image_files import ImageFiles, open_images
from var_train.setup import digest_of, frozen_vqvae
from var_train.token_files import open_tokens
from var_train.token_sources import EncodedImages, StoredTokens, Tokens, TokenSource
from var_train.token_writer import store_tokens

CPU = torch.device("cpu")
SEED, PASSES, G = 11, 2, 10
CROP = Crop(side=8, random=True, flip=True, enlarge=1.5)
BATCHES = GlobalBatches(count=72, size=G, seed=SEED)
ALL_ROWS = slice(0, G)


@pytest.fixture(scope="module")
def images(small_images: Path) -> ImageFiles:
    return open_images(small_images)


@pytest.fixture(scope="module")
def vqvae(small_vqvae: Path) -> VQVAE:
    return frozen_vqvae(small_vqvae, None, CPU)


@pytest.fixture(scope="module")
def store(images: ImageFiles, vqvae: VQVAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two passes of all images, encoded seven at a time, in three shards each."""
    out = tmp_path_factory.mktemp("store") / "tokens"
    sha256 = digest_of(vqvae)
    options = {"passes": PASSES, "batch": 7, "workers": 0, "seed": SEED, "shard_images": 30}
    store_tokens(images, vqvae, out, crop=CROP, vqvae_sha256=sha256, device=CPU, **options)
    return out


@pytest.fixture
def encoded(images: ImageFiles, vqvae: VQVAE) -> EncodedImages:
    return EncodedImages(images, CROP, vqvae, device=CPU, at_once=3, workers=0, seed=SEED)


@pytest.fixture
def stored(store: Path) -> StoredTokens:
    return StoredTokens(open_tokens(store), CPU)


def first(source: TokenSource, count: int, *, rows: slice = ALL_ROWS, start: int = 0) -> list[Tokens]:
    return list(itertools.islice(source.training(BATCHES, rows, start), count))


def test_an_image_has_the_tokens_of_its_crop_in_this_epoch(encoded, images, vqvae):
    made = training_batches(images, CROP, BATCHES, rows=ALL_ROWS, start=6, workers=0, seed=SEED)
    for batch, tokens in zip(itertools.islice(made, 3), first(encoded, 3, start=6), strict=True):
        image_B3RR = batch.images_BCRR.float() / 127.5 - 1
        assert torch.equal(tokens.tokens_BL, torch.cat(vqvae.tokens(image_B3RR), dim=1))
        assert torch.equal(tokens.labels_B, batch.labels_B)
        assert (tokens.iteration, tokens.corrupt, tokens.tokens_BL.shape) == (batch.iteration, (), (G, 21))
        assert tokens.tokens_BL.dtype == tokens.labels_B.dtype == torch.int64


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_how_many_images_are_encoded_at_once_changes_nothing(encoded, images, vqvae, at_once):
    other = EncodedImages(images, CROP, vqvae, device=CPU, at_once=at_once, workers=0, seed=SEED)
    for ours, theirs in zip(first(encoded, 2), first(other, 2), strict=True):
        assert torch.equal(ours.tokens_BL, theirs.tokens_BL)


def test_stored_tokens_are_those_of_the_images_for_as_many_epochs_as_there_are_passes(encoded, stored):
    for number, (ours, theirs) in enumerate(zip(first(encoded, 3 * 7), first(stored, 3 * 7), strict=True)):
        assert ours.iteration == theirs.iteration == number
        assert torch.equal(ours.labels_B, theirs.labels_B)
        same = torch.equal(ours.tokens_BL, theirs.tokens_BL)
        assert same is (number < PASSES * 7)  # 7 whole batches of 72 images; then come the crops of pass 0 again


def test_every_process_has_its_rows_of_the_same_batches(encoded, stored):
    for source in (encoded, stored):
        (whole,) = first(source, 1, start=9)
        parts = [first(source, 1, rows=slice(begin, begin + 5), start=9)[0] for begin in (0, 5)]
        assert torch.equal(torch.cat([part.tokens_BL for part in parts]), whole.tokens_BL)
        assert torch.equal(torch.cat([part.labels_B for part in parts]), whole.labels_B)


@pytest.mark.parametrize(("world", "size"), [(1, 72), (1, 50), (3, 7), (4, 71)])
def test_every_image_is_measured_on_once_by_all_processes_together(
    encoded, stored, images, vqvae, store, monkeypatch, world, size
):
    centre = Crop(side=8, random=False, enlarge=1.5)
    (batch,) = evaluation_batches(images, centre, 72)
    expected = {
        "encoded": torch.cat(vqvae.tokens(batch.images_BCRR.float() / 127.5 - 1), dim=1),
        "stored": open_tokens(store).read(0, np.arange(72))[0],
    }
    for name, source in (("encoded", encoded), ("stored", stored)):
        rows: list[list[int]] = []
        batches_of = []
        for rank in range(world):
            monkeypatch.setattr(image_data, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(image_data, "world", lambda: world)
            made = list(source.evaluation(size))
            batches_of.append(len(made))
            assert all(0 <= tokens.counted <= len(tokens.labels_B) for tokens in made)
            assert min(len(tokens.labels_B) for tokens in made) >= 1  # so that every process takes part in every batch
            for tokens in made:
                rows += torch.cat([tokens.labels_B[:, None], tokens.tokens_BL], dim=1)[: tokens.counted].tolist()
        assert set(batches_of) == {-(-72 // size)}
        wanted = torch.cat([batch.labels_B[:, None], expected[name]], dim=1).tolist()
        assert sorted(rows) == sorted(wanted)


def test_a_source_says_what_it_holds(encoded, stored, images, store):
    for source in (encoded, stored):
        assert (len(source), source.class_names) == (72, ("across", "down", "slanting"))
    assert encoded.name(25) == images.name(25)
    assert encoded.name(25).endswith("down/01.png")
    assert stored.name(25) == f"tokens {store}: image 25"


def test_images_that_cannot_be_decoded_are_named(small_images, vqvae, tmp_path):
    folder = Path(shutil.copytree(small_images / "train", tmp_path / "images"))
    index = int(BATCHES.indices(2)[1][4])
    source = EncodedImages(open_images(folder), CROP, vqvae, device=CPU, at_once=8, workers=0, seed=SEED)
    damaged = source.name(index)
    Path(damaged).write_bytes(b"no image")
    assert [tokens.corrupt for tokens in first(source, 4)] == [(), (), (damaged,), ()]
    assert [name for tokens in source.evaluation(G) for name in tokens.corrupt] == [damaged]
    (tokens,) = source.evaluation(72)
    assert torch.equal(tokens.tokens_BL[index], tokens.tokens_BL[(index + 1) % 72])  # the next image stands for it
