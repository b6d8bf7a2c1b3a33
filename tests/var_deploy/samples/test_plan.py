"""What is sampled: shards cut the images into parts, classes are balanced or uniform, all by (seed, index) alone."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from var_deploy.errors import RequestError
from var_deploy.request import MAX_SEED
from var_deploy.samples.plan import SamplePlan, Shard, batches

counts = st.integers(1, 300)
seeds = st.integers(0, MAX_SEED - 10**6)


def _plan(**options: object) -> SamplePlan:
    fixed = {"bundle": "b" * 64, "num_classes": 10, "image_size": 64, "settings": {}, "classes": None, "seed": 0}
    return SamplePlan(**({"count": 40, "balanced": False} | fixed | options))


@given(counts, st.integers(1, 400))
def test_shards_take_every_image_once_and_as_many_each(count, total):
    parts = [Shard(index=index, total=total).of(count) for index in range(1, total + 1)]
    assert [index for part in parts for index in part] == list(range(count))
    sizes = {len(part) for part in parts}
    assert max(sizes) - min(sizes) <= 1


@given(counts, st.integers(1, 9), st.lists(st.integers(0, 9), min_size=1, unique=True).map(sorted))
def test_any_stretch_of_a_balanced_plan_is_nearly_balanced(length, start, classes):
    plan = _plan(balanced=True, classes=tuple(classes))
    taken, seen = np.unique(plan.labels(range(start, start + length)), return_counts=True)
    assert set(taken) <= set(classes)
    assert len(taken) == min(length, len(classes))
    assert seen.max() - (seen.min() if len(taken) == len(classes) else 0) <= 1


@given(seeds, st.lists(st.integers(0, 10**9 - 1), min_size=1, max_size=30), st.booleans())
def test_class_and_seed_depend_on_the_index_alone(seed, indices, balanced):
    plan = _plan(seed=seed, balanced=balanced)
    other = replace(plan, count=7, image_size=32, settings={"guidance": 3.0}, bundle="c" * 64)
    assert plan.labels(indices).tolist() == [int(other.labels([index])[0]) for index in indices]
    assert plan.seeds(indices) == [seed + index for index in indices]


def test_classes_that_are_drawn_are_uniform_and_change_with_the_seed():
    labels = _plan().labels(range(20_000))
    expected, spread = 2000, np.sqrt(20_000 * 0.1 * 0.9)
    assert (np.abs(np.bincount(labels, minlength=10) - expected) < 5 * spread).all()
    assert (labels != _plan(seed=1).labels(range(20_000))).mean() > 0.8  # nine tenths, with a spread of 0.002
    assert set(_plan(classes=(2, 5)).labels(range(50)).tolist()) == {2, 5}


@given(st.integers(1, 60), st.integers(1, 70))
def test_batches_are_full_but_the_last_and_hold_all_in_order(count, size):
    plan, indices = _plan(seed=3), list(range(0, 2 * count, 2))
    made = list(batches(plan, indices, size))
    assert [index for batch in made for index in batch.indices] == indices
    assert {len(batch.indices) for batch in made[:-1]} <= {size}
    assert [label for batch in made for label in batch.labels] == plan.labels(indices).tolist()
    assert [seed for batch in made for seed in batch.seeds] == plan.seeds(indices)


def test_settings_are_noted_in_one_form_however_they_were_asked_for(tiny):
    plain = SamplePlan.of(tiny, count=1)
    assert plain.settings == {"guidance": 1.5, "temperature": 1.0, "top_k": 900, "top_p": 0.96, "smooth": False}
    assert SamplePlan.of(tiny, count=1, preset="paper-fid", top_k=[900] * 4) == plain
    assert SamplePlan.of(tiny, count=1, guidance=[0, 0.5, 1, 1.5]) == plain
    assert SamplePlan.of(tiny, count=1, guidance=[1.5] * 4).settings["guidance"] == [1.5] * 4  # no ramp
    assert SamplePlan.of(tiny, count=1, smooth=[True, False, False, True]).settings["smooth"] == [
        True,
        False,
        False,
        True,
    ]
    assert SamplePlan.of(tiny, count=1, classes=[5, 3, 5]).classes == (3, 5)
    data = plain.to_json()
    assert json.loads(json.dumps(data)) == data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count: got 0, expected 1 to 1,000,000,000 images"),
        ({"count": 25, "balanced": True}, "count: got 25 balanced over 10 classes, expected as many of each: 20 or 30"),
        ({"count": 7, "balanced": True}, "count: got 7 balanced over 10 classes, expected as many of each: 10"),
        (
            {"count": 5, "balanced": True, "classes": [1, 2]},
            "balanced over 2 classes, expected as many of each: 4 or 6",
        ),
        ({"count": 2, "seed": -1}, "seed: got -1, expected 0 to 2⁶⁴ − 2: every image has its own, seed + index"),
        ({"count": 2, "seed": MAX_SEED}, f"seed: got {MAX_SEED}, expected 0 to 2⁶⁴ − 2"),
        ({"count": 2, "classes": [10]}, "class 10 is out of range; expected an id from 0 to 9"),
        ({"count": 2, "top_p": 2}, "top_p: got 2, expected a number from 0 to 1"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_plan_that_cannot_be_is_refused(tiny, options, message):
    with pytest.raises(RequestError) as caught:
        SamplePlan.of(tiny, **options)
    assert message in str(caught.value)


def test_the_last_seed_is_the_largest_there_is(tiny):
    assert SamplePlan.of(tiny, count=2, seed=MAX_SEED - 1).seeds([1]) == [MAX_SEED]


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "-1/2", "1/2/3", "a/b", "1/٣", "1/1000000000"])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(RequestError, match="expected I/N with 1 ≤ I ≤ N, like 1/4"):
        Shard.parse(text)


def test_a_shard_is_read():
    assert Shard.parse("2/3") == Shard(index=2, total=3)
    assert str(Shard.parse("2/3")) == "2 of 3"
