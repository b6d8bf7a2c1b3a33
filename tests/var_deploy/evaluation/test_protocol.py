"""What samples say of their making, and how that differs from the paper's protocol."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from var_deploy.errors import RequestError
from var_deploy.evaluation import protocol
from var_deploy.evaluation.protocol import describe, differences_from_paper, read_notes
from var_deploy.evaluation.samples import open_images
from var_deploy.samples.plan import SamplePlan

PAPER = {"guidance": 1.5, "top_k": 900, "top_p": 0.96, "temperature": 1.0, "smooth": False}
PLAN = SamplePlan(
    bundle="12ab", count=4, balanced=True, seed=0, classes=None, num_classes=2, image_size=3, settings=PAPER
)
NOTES = PLAN.to_json() | {"precision": "fp32", "engine": "onnx"}


@pytest.fixture
def samples(tmp_path):
    """`samples(notes)` → a folder of four images with these notes."""

    def make(notes: object):
        for i in range(4):
            Image.new("RGB", (3, 3)).save(tmp_path / f"{i}.png")
        if notes is not None:
            (tmp_path / "samples.json").write_text(notes if isinstance(notes, str) else json.dumps(notes))
        return open_images(tmp_path)

    return make


def test_everything_known_is_told(samples, tmp_path):
    images = samples(NOTES)
    assert describe(images, read_notes(images)) == {
        "path": str(tmp_path),
        "images": 4,
        "size": "3×3",
        "form": "PNG",
        "balance": {"classes": 2, "fewest": 2, "most": 2},
        "bundle": "12ab",
        "precision": "fp32",
        "engine": "onnx",
        "seed": 0,
        "settings": PAPER,
        "balanced": True,
        "classes": None,
        "num_classes": 2,
    }


def test_without_notes_little_is_known(samples):
    images = samples(None)
    found = describe(images, read_notes(images))
    assert found["balance"] is None
    assert differences_from_paper(found) == [
        "4 images, not 50,000",
        "balance of classes not known",
        "sampling settings not known",
    ]


@pytest.mark.parametrize(
    ("notes", "said"),
    [
        (
            NOTES | {"count": 5},
            ": 4 images, samples.json says 5; let sampling finish, or take away what is not part of it",
        ),
        ("[1]", "samples.json: got list, expected an object; sample again, or remove the file"),
        ("{", "samples.json: cannot be read ("),
    ],
)
def test_notes_that_do_not_fit(samples, notes, said):
    images = samples(notes)
    with pytest.raises(RequestError, match=re.escape(said)):
        read_notes(images)


@pytest.mark.parametrize(
    ("changed", "differences"),
    [
        ({}, []),
        ({"images": 49_999}, ["49,999 images, not 50,000"]),
        ({"balance": {"classes": 1000, "fewest": 49, "most": 51}}, ["49 to 51 images of a class, not as many of each"]),
        ({"settings": PAPER | {"guidance": 4.0}}, ["guidance 4.0, not 1.5"]),
        ({"settings": PAPER | {"guidance": [0.0, 0.5, 1.0, 1.5]}}, []),  # the ramp that 1.5 stands for
        ({"settings": PAPER | {"guidance": [1.5] * 4}}, ["guidance [1.5, 1.5, 1.5, 1.5], not 1.5"]),
        ({"settings": PAPER | {"top_k": [900, 900], "smooth": [False, True]}}, ["smooth [False, True], not False"]),
        (
            {"settings": {key: PAPER[key] for key in ("guidance", "top_k", "temperature", "smooth")}},
            ["top_p not known"],
        ),
        ({"settings": PAPER | {"guidance": [], "top_k": []}}, ["guidance [], not 1.5", "top_k [], not 900"]),
        ({"settings": PAPER | {"guidance": [10**400, 1.5]}}, [f"guidance [{'1' + 77 * '0'}…, not 1.5"]),
        ({"classes": [1, 2]}, ["2 chosen classes, not all"]),
        ({"balance": {"classes": 2, "fewest": 25_000, "most": 25_000}}, ["2 classes, not 1,000"]),
        ({"precision": "int8"}, ["precision int8, which is approximate"]),
        ({"settings": None}, ["sampling settings not known"]),
    ],
)
def test_differences_from_the_paper(changed, differences):
    balance = {"classes": 1000, "fewest": 50, "most": 50}
    assert differences_from_paper({"images": 50_000, "balance": balance, "settings": PAPER} | changed) == differences


def test_of_chosen_classes_there_are_as_many_of_each(samples):
    images = samples(NOTES | {"classes": [3, 5, 8], "num_classes": 10})
    assert describe(images, read_notes(images))["balance"] == {"classes": 3, "fewest": 1, "most": 2}


def test_the_archive_of_samples_has_the_notes_beside_it(samples, tmp_path):
    samples(NOTES)
    for name, notes in (("samples.npz", {key: NOTES[key] for key in protocol.KNOWN}), ("other.npz", {})):
        np.savez(tmp_path / name, arr_0=np.zeros((4, 3, 3, 3), np.uint8))
        assert read_notes(open_images(tmp_path / name)) == notes


def test_classes_of_the_images_count_before_what_the_notes_say(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((5, 2, 2, 3), np.uint8), arr_1=[7, 7, 3, 7, 9])
    found = describe(open_images(tmp_path / "x.npz"), NOTES)
    assert found["balance"] == {"classes": 3, "fewest": 1, "most": 3}
    assert protocol.read_notes(open_images(tmp_path / "x.npz")) == {}
