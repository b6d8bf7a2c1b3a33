"""Sampling options → one value per scale: ramps, presets, and that each scale's value is the one that is used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import var_deploy
from var_deploy import Pipeline, schedules
from var_deploy.bundle import Bundle, Manifest
from var_deploy.sampling import Settings


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    """Four scales."""
    return Bundle.open(tiny_bundle).manifest


@pytest.fixture(scope="module", params=["onnx", "torch"])
def pipe(request: pytest.FixtureRequest, tiny_bundle: Path) -> Pipeline:
    return var_deploy.load(tiny_bundle, engine=request.param, device="cpu", precision="fp32")


def test_one_guidance_is_a_ramp_and_every_other_option_constant(manifest):
    made = schedules.settings(manifest, guidance=3.0, temperature=0.5, top_k=7, top_p=0.25, smooth=True)
    assert made == Settings(
        strengths=(0.0, 1.0, 2.0, 3.0),
        temperatures=(0.5,) * 4,
        top_ks=(7,) * 4,
        top_ps=(0.25,) * 4,
        smooths=(True,) * 4,
    )


@pytest.mark.parametrize(
    ("preset", "last_strength", "top_p", "smooth"),
    [("paper-fid", 1.5, 0.96, False), ("paper-visual", 4.0, 0.95, False), ("paper-edit", 3.0, 0.95, True)],
)
def test_presets_and_what_a_request_says_beside_them(manifest, preset, last_strength, top_p, smooth):
    made = schedules.settings(manifest, preset=preset)
    assert made.strengths == tuple(last_strength * manifest.var.ratio(k) for k in range(4))
    assert (made.top_ks, made.top_ps, made.smooths) == ((900,) * 4, (top_p,) * 4, (smooth,) * 4)
    said = schedules.settings(manifest, preset=preset, guidance=[1, 0, 0, 2], smooth=not smooth)
    assert (said.strengths, said.smooths) == ((1, 0, 0, 2), (not smooth,) * 4)
    assert said.top_ps == made.top_ps


scales = st.integers(0, 3)
options = st.fixed_dictionaries(
    {
        "guidance": st.lists(st.floats(0, 10), min_size=4, max_size=4),
        "temperature": st.lists(st.floats(0.5, 2), min_size=4, max_size=4),
        "top_k": st.lists(st.integers(0, 2000), min_size=4, max_size=4),
        "top_p": st.lists(st.floats(0, 1), min_size=4, max_size=4),
        "smooth": st.lists(st.booleans(), min_size=4, max_size=4),
    }
)


@given(asked=options)
def test_options_of_settings_give_the_settings_again(manifest, asked):
    made = schedules.settings(manifest, **asked)
    assert schedules.settings(manifest, **schedules.options_of(made)) == made
    assert made.smooth == any(asked["smooth"])


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": [1, 1, 0.3, 1]},
        {"top_k": [900, 900, 1, 900]},
        {"top_p": [0.96, 0.96, 0.01, 0.96]},
        {"smooth": [False, False, True, False]},
        {"guidance": [0, 0.5, 9.0, 1.5]},
    ],
    ids=lambda option: next(iter(option)),
)
def test_a_value_of_one_scale_changes_that_scale_and_those_after_it(pipe, option):
    base, changed = pipe.generate([3, 5], seeds=4), pipe.generate([3, 5], seeds=4, **option)
    for k in range(2):
        np.testing.assert_array_equal(changed.tokens[k], base.tokens[k])
    assert np.abs(changed.pixels - base.pixels).max() > 0.01
    constant = {name: [values[2]] * 4 for name, values in option.items()}
    assert not np.array_equal(pipe.generate([3, 5], seeds=4, **constant).pixels, changed.pixels)


def test_mixing_at_the_first_scale_alone_is_mixing_there(pipe):
    """What is drawn at scale 1 then rests on a mixture, though nothing later is mixed."""
    mixed = pipe.generate([3], seeds=4, smooth=[True, False, False, False])
    again = pipe.generate([3], seeds=4, smooth=[True, False, False, False])
    np.testing.assert_array_equal(mixed.pixels, again.pixels)
    everywhere = pipe.generate([3], seeds=4, smooth=True)
    np.testing.assert_array_equal(mixed.tokens[1], everywhere.tokens[1])
    assert not np.array_equal(mixed.pixels, everywhere.pixels)
