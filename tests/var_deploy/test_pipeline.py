"""The decode loop: reproducibility of an image, guidance, previews, and what a wrong request is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

import var_deploy
from golden import golden_config, rule_state_dicts
from var_deploy import philox
from var_deploy.errors import EngineError, RequestError
from var_deploy.memory_budget import MemoryBudget
from var_deploy.pipeline import Generation, Pipeline, Preview
from var_deploy.sampling import Settings, draw_scale
from var_train import VAR, VQVAE, generate

SETTINGS = {"guidance": 3.0, "top_k": 60, "top_p": 0.9}
BATCH = [1, 4, 4, 0, 19, 7, 12, 4]
SEEDS = [11, 2, 3, 2**64 - 1, 0, 6, 7, 8]


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Pipeline:
    """Four scales, 10 classes, 256 codes."""
    return var_deploy.load(tiny_bundle, engine="onnx")


@pytest.fixture(scope="module")
def wide(shared_aln_bundle: Path) -> Pipeline:
    """Five scales, 20 classes, 512 codes."""
    return var_deploy.load(shared_aln_bundle, engine="onnx")


def _tokens(out: Generation) -> np.ndarray:
    return np.concatenate(out.tokens, axis=1)


# ---- the same image, whatever is beside it ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [SETTINGS, {**SETTINGS, "guidance": 0}, {**SETTINGS, "smooth": True}, {}],
    ids=["guided", "unguided", "smooth", "defaults"],
)
def test_an_image_alone_equals_itself_in_a_batch_of_eight(wide: Pipeline, settings: dict[str, Any]):
    batch = wide.generate(BATCH, seeds=SEEDS, **settings)
    for position in (0, 3, 7):
        alone = wide.generate(BATCH[position], seeds=[SEEDS[position]], **settings)
        np.testing.assert_array_equal(_tokens(alone)[0], _tokens(batch)[position])
        # Products over 2 rows and over 16 may add up in another order on some processors: float32 rounding, magnified
        # by the smooth mixture's small temperature.
        np.testing.assert_allclose(alone.pixels[0], batch.pixels[position], atol=1e-4, rtol=0)


def test_an_image_equals_itself_at_any_position(wide: Pipeline):
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    batch = wide.generate(BATCH, seeds=SEEDS, **SETTINGS)
    moved = wide.generate([BATCH[i] for i in order], seeds=[SEEDS[i] for i in order], **SETTINGS)
    np.testing.assert_array_equal(_tokens(moved), _tokens(batch)[order])
    np.testing.assert_array_equal(moved.pixels, batch.pixels[order])  # the same number of rows: the same bits


def test_repeating_a_request_repeats_its_bits(wide: Pipeline):
    first, second = (wide.generate([4, 9], seeds=5, **SETTINGS) for _ in range(2))
    np.testing.assert_array_equal(first.pixels, second.pixels)


def test_symbolic_and_static_graphs_draw_the_same_tokens(wide: Pipeline, shared_aln_bundle: Path):
    static = var_deploy.load(shared_aln_bundle, engine="onnx", graphs="static")
    ours, theirs = (p.generate(BATCH, seeds=SEEDS, **SETTINGS) for p in (wide, static))
    np.testing.assert_array_equal(_tokens(ours), _tokens(theirs))
    # Two orders of the same float32 sums.
    np.testing.assert_allclose(ours.pixels, theirs.pixels, atol=1e-4, rtol=0)


def test_one_seed_counts_up_over_the_images(pipe: Pipeline):
    counted = pipe.generate([1, 2, 3], seeds=40, **SETTINGS)
    listed = pipe.generate([1, 2, 3], seeds=[40, 41, 42], **SETTINGS)
    array = pipe.generate(np.array([1, 2, 3]), seeds=np.array([40, 41, 42], dtype=np.uint64), **SETTINGS)
    np.testing.assert_array_equal(counted.pixels, listed.pixels)
    np.testing.assert_array_equal(counted.pixels, array.pixels)


@pytest.mark.parametrize("smooth", [False, True])
def test_every_position_of_the_sequence_has_its_own_random_numbers(pipe: Pipeline, monkeypatch, smooth):
    drawn: dict[str, list[tuple[int, ...]]] = {"uniforms": [], "gumbels": []}
    for name, original in (("uniforms", philox.uniforms), ("gumbels", philox.gumbels)):
        monkeypatch.setattr(philox, name, lambda *at, n=name, f=original: drawn[n].append(at) or f(*at))
    pipe.generate([1, 2], seeds=[30, 20], smooth=smooth)
    spans = [(0, 1), (1, 5), (5, 14), (14, 30)]
    assert drawn["uniforms"] == [(seed, *span) for span in spans for seed in (30, 20)]
    expected = [(seed, *span, 256) for span in spans for seed in (30, 20)] if smooth else []
    assert drawn["gumbels"] == expected


def test_another_seed_gives_another_image(pipe: Pipeline):
    tokens = _tokens(pipe.generate([3] * 6, seeds=[0, 1, 2, 2**32, 2**63, 2**64 - 1], **SETTINGS))
    assert len({tuple(row) for row in tokens}) == 6


def test_the_result_has_the_shapes_it_promises(wide: Pipeline):
    out = wide.generate([1, 2, 3])
    assert [t.shape for t in out.tokens] == [(3, 1), (3, 4), (3, 9), (3, 25), (3, 64)]
    assert out.pixels.shape == (3, 3, 128, 128)
    assert (out.pixels.dtype, out.pixels.min() >= 0, out.pixels.max() <= 1) == (np.float32, True, True)
    assert [(image.size, image.mode) for image in out.images] == [((128, 128), "RGB")] * 3
    later = [f"scale_{k:02d}" for k in range(1, 5)]
    assert list(out.timings) == ["condition", "scale_00", "draw", *later, "finish", "decode"]
    assert all(seconds > 0 for seconds in out.timings.values())


# ---- guidance --------------------------------------------------------------------------------------------------------


def _reference(golden: Any) -> tuple[VAR, VQVAE]:
    var_config, vqvae_config = golden_config(golden)
    var, vqvae = VAR(var_config).eval(), VQVAE(vqvae_config).eval()
    for model, state in zip((var, vqvae), rule_state_dicts(golden), strict=True):
        model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    return var, vqvae


@pytest.mark.parametrize("guidance", [0, 2.5])
def test_greedy_generation_equals_the_reference(pipe: Pipeline, tiny_pair, guidance):
    labels = [9, 0, 4, 4, 1]
    expected = generate(*_reference(tiny_pair[0]), torch.tensor(labels), guidance=guidance, top_k=1, top_p=0)
    out = pipe.generate(labels, guidance=guidance, top_k=1, top_p=0)
    np.testing.assert_array_equal(_tokens(out), torch.cat(expected.tokens, dim=1).numpy())
    # float32 through two implementations; golden vectors agree to the same bound.
    np.testing.assert_allclose(out.pixels, expected.image_B3RR.numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("guidance", "rows"), [(0, 3), (0.0, 3), ([0, 0, 0, 0], 3), (1.5, 6), ([0, 0, 0, 1], 6)])
def test_null_rows_run_only_where_a_scale_is_guided(pipe: Pipeline, monkeypatch, guidance, rows):
    seen = []
    begin = pipe.engine.begin
    monkeypatch.setattr(pipe.engine, "begin", lambda labels_R: seen.append(labels_R.tolist()) or begin(labels_R))
    pipe.generate([1, 2, 3], guidance=guidance)
    assert seen == [[1, 2, 3, 10, 10, 10][:rows]]


def test_a_list_equal_to_the_scalars_schedule_gives_the_same_image(pipe: Pipeline):
    schedule = [3.0 * k / 3 for k in range(4)]
    scalar = pipe.generate([1, 2], seeds=3, guidance=3.0, top_k=50)
    for form in (schedule, tuple(schedule), np.array(schedule)):
        np.testing.assert_array_equal(scalar.pixels, pipe.generate([1, 2], seeds=3, guidance=form, top_k=50).pixels)


def test_every_entry_of_a_guidance_list_counts(pipe: Pipeline):
    def tokens(*guidance: float) -> list[np.ndarray]:
        return pipe.generate([5], seeds=9, guidance=list(guidance), top_k=1).tokens

    base = tokens(0.0, 0.0, 0.0, 1e-6)
    for k in range(4):
        changed = tokens(*(8.0 if scale == k else 1e-6 for scale in range(4)))
        for earlier in range(k):
            np.testing.assert_array_equal(changed[earlier], base[earlier])
        if k:  # the one token of scale 0 may well stay
            assert (changed[k] != base[k]).any()


def test_the_bundles_defaults_are_used_where_a_request_is_silent(pipe: Pipeline):
    defaults = pipe.bundle.manifest.sampling
    assert (defaults.guidance, defaults.top_k, defaults.top_p) == (1.5, 900, 0.96)
    silent = pipe.generate([5, 6], seeds=2)
    said = pipe.generate([5, 6], seeds=2, guidance=1.5, top_k=900, top_p=0.96)
    np.testing.assert_array_equal(silent.pixels, said.pixels)


@pytest.mark.parametrize(
    "setting", [{"guidance": 4.0}, {"top_k": 3}, {"top_p": 0.2}, {"temperature": 0.5}, {"smooth": True}]
)
def test_every_setting_changes_the_image(pipe: Pipeline, setting):
    base = {"guidance": 1.0, "top_k": 200, "top_p": 0.95, "smooth": False}
    pixels = pipe.generate([5], seeds=2, **base).pixels
    assert np.abs(pipe.generate([5], seeds=2, **{**base, **setting}).pixels - pixels).max() > 0.01


# ---- temperature -----------------------------------------------------------------------------------------------------


def test_a_temperature_of_one_is_what_a_silent_request_gets(pipe: Pipeline):
    said = pipe.generate([5, 6], seeds=2, temperature=1)
    np.testing.assert_array_equal(pipe.generate([5, 6], seeds=2).pixels, said.pixels)


def test_the_least_temperature_is_greedy_and_the_largest_forgets_the_class(pipe: Pipeline):
    settings = {"guidance": 2.0, "top_k": 0, "top_p": 0}
    greedy = pipe.generate([5, 6], seeds=2, **{**settings, "top_k": 1})
    cold = pipe.generate([5, 6], seeds=2, temperature=1e-3, **settings)
    # Of two logits that lie within a few thousandths either may be drawn, and what follows differs.
    assert (_tokens(cold) == _tokens(greedy)).mean() > 0.8
    # Logits reach about 5: divided by 1000 all tokens are as likely, and the uniform numbers decide alone.
    hot = _tokens(pipe.generate([5, 6], seeds=[3, 3], temperature=1e3, **settings))
    uniforms = np.floor(256 * philox.uniforms(3, 0, 30))
    assert np.abs(hot - uniforms).max() <= 3
    assert np.abs(hot[0] - hot[1]).max() <= 3


def test_temperature_of_a_number_of_numpy(pipe: Pipeline):
    plain = pipe.generate(3, seeds=4, temperature=1.5)
    np.testing.assert_array_equal(pipe.generate(3, seeds=4, temperature=np.float64(1.5)).pixels, plain.pixels)


# ---- null rows end with the last guided scale, in both engines -------------------------------------------------------

ENGINES = {
    "onnx": {"engine": "onnx"},
    "onnx-static": {"engine": "onnx", "graphs": "static", "threads": 1},
    "torch": {"engine": "torch", "device": "cpu"},
}


@pytest.fixture(scope="module", params=ENGINES)
def any_pipe(request: pytest.FixtureRequest, tiny_bundle: Path) -> Pipeline:
    return var_deploy.load(tiny_bundle, **ENGINES[request.param])


def _with_all_rows(pipe: Pipeline, labels: list[int], seeds: list[int], strengths: list[float]) -> Any:
    """(logits of the conditioned rows, tokens, pixels) of a loop that runs null rows at every scale."""
    config, engine, B = pipe.bundle.manifest.var, pipe.engine, len(labels)
    codebook_VC = pipe.bundle.weight("quantize.embedding.weight")
    settings = Settings.constant(tuple(strengths), top_k=60, top_p=0.9)
    state, codes_BnC = engine.begin(np.array(labels + [config.null_class] * B)), None
    logits, tokens = [], []
    for k in range(config.num_scales):
        codes_RnC = None if codes_BnC is None else np.concatenate([codes_BnC, codes_BnC])
        logits_RnV = engine.step(state, k, codes_RnC)
        logits.append(logits_RnV[:B].copy())
        tokens_Bn, codes_BnC = draw_scale(logits_RnV, k, config.span(k)[0], seeds, settings, codebook_VC)
        tokens.append(tokens_Bn)
    return logits, tokens, engine.decode(engine.finish(state, codes_BnC))


@pytest.mark.parametrize("labels", [[4], [1, 2, 3]], ids=["one", "three"])
@pytest.mark.parametrize("strengths", [[2.0, 0, 0, 0], [1.0, 3.0, 0, 0], [0, 2.0, 0, 0], [0, 0, 2.0, 0]], ids=str)
def test_leaving_out_null_rows_that_nothing_reads_is_exact(any_pipe: Pipeline, strengths, labels):
    """A strength of 0 takes the conditioned logits as they are; rows that ran beside them must not matter."""
    config, engine, B = any_pipe.bundle.manifest.var, any_pipe.engine, len(labels)
    seeds = list(range(30, 30 + B))
    logits, tokens, pixels = _with_all_rows(any_pipe, labels, seeds, strengths)
    out = any_pipe.generate(labels, seeds=seeds, guidance=strengths, top_k=60, top_p=0.9)
    np.testing.assert_array_equal(_tokens(out), np.concatenate(tokens, axis=1))
    # Given the same tokens all else is equal, but for libraries that take another algorithm for another batch.
    np.testing.assert_allclose(out.pixels, pixels, atol=1e-4, rtol=0)
    guided = max(k + 1 for k, t in enumerate(strengths) if t)
    codebook_VC = any_pipe.bundle.weight("quantize.embedding.weight")
    state, codes_RnC = engine.begin(np.array(labels + [config.null_class] * B)), None
    for k in range(config.num_scales):
        logits_RnV = engine.step(state, k, codes_RnC)
        assert len(logits_RnV) == (2 * B if k < guided else B)
        # Packed products add up in one order whatever the number of rows, others need not: float32 rounding.
        atol = 0 if getattr(engine, "_symbolic", False) else 1e-5
        np.testing.assert_allclose(logits_RnV[:B], logits[k], atol=atol, rtol=0, err_msg=f"scale {k}")
        codes_RnC = np.concatenate([codebook_VC[tokens[k]]] * (2 if k + 1 < guided else 1))


def test_a_last_strength_that_is_all_but_zero_runs_all_rows_to_the_same_picture(any_pipe: Pipeline):
    """Its float32 value is 0, so the mixture is the conditioned logits, but null rows run to the end."""
    ended = any_pipe.generate([1, 7], seeds=5, guidance=[1.0, 2.0, 0, 0])
    to_the_end = any_pipe.generate([1, 7], seeds=5, guidance=[1.0, 2.0, 0, 1e-60])
    np.testing.assert_array_equal(_tokens(ended), _tokens(to_the_end))
    # Products of fewer rows may add up in another order.
    np.testing.assert_allclose(ended.pixels, to_the_end.pixels, atol=1e-4, rtol=0)


def test_null_rows_are_left_out_by_the_loop_on_the_host(pipe: Pipeline, monkeypatch):
    rows: list[int] = []
    step = pipe.engine.step
    monkeypatch.setattr(pipe.engine, "step", lambda *at: rows.append(len(logits := step(*at))) or logits)
    for guidance in ([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]):
        pipe.generate([1, 2, 3], guidance=guidance)
    assert rows == [6, 3, 3, 3, 6, 6, 3, 3, 6, 6, 6, 6, 3, 3, 3, 3]


# ---- previews --------------------------------------------------------------------------------------------------------


def test_previews_come_in_order_and_end_at_the_image(wide: Pipeline):
    previews: list[Preview] = []
    out = wide.generate([2, 3], seeds=7, on_scale=previews.append, **SETTINGS)
    assert [preview.scale for preview in previews] == [0, 1, 2, 3, 4]
    assert {preview.num_scales for preview in previews} == {5}
    for k, preview in enumerate(previews):
        np.testing.assert_array_equal(preview.tokens_Bn, out.tokens[k])
        # f_hat is summed in another order than by `decode`: rounding may move a value across half a step of 1/255.
        expected = wide.decode(out.tokens[: k + 1])
        shown = np.stack([np.asarray(image).transpose(2, 0, 1) for image in preview.images]) / 255
        np.testing.assert_allclose(shown, expected, atol=0.5 / 255 + 1e-4, rtol=0)
    for image, last in zip(out.images, previews[-1].images, strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(last))


def test_listening_changes_nothing(pipe: Pipeline):
    silent = pipe.generate([2, 3], seeds=7, **SETTINGS)
    heard = pipe.generate([2, 3], seeds=7, on_scale=lambda preview: preview.images, **SETTINGS)
    np.testing.assert_array_equal(silent.pixels, heard.pixels)


def test_an_error_in_the_callback_reaches_the_caller_and_leaves_the_pipeline_usable(pipe: Pipeline):
    def fail(preview: Preview) -> None:
        raise KeyboardInterrupt

    expected = pipe.generate([2], seeds=7).pixels
    with pytest.raises(KeyboardInterrupt):
        pipe.generate([2], seeds=7, on_scale=fail)
    np.testing.assert_array_equal(pipe.generate([2], seeds=7).pixels, expected)


# ---- batches that do not fit -----------------------------------------------------------------------------------------


@pytest.fixture
def tight(wide: Pipeline) -> Pipeline:
    """`wide` with memory for two guided or four other images at a time."""
    plan = wide.engine.memory_plan
    return Pipeline(wide.bundle, wide.engine, MemoryBudget(plan=plan, limit=plan(2, True).total))


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        (SETTINGS, [2, 4, 4]),
        ({**SETTINGS, "guidance": 0}, [2, 3]),
        ({**SETTINGS, "smooth": True}, [2, 4, 4]),
    ],
    ids=["guided", "unguided", "smooth"],
)
def test_a_batch_in_parts_is_the_whole_batch_bit_for_bit(wide, tight, monkeypatch, settings, rows):
    seen: list[int] = []
    begin = wide.engine.begin
    whole = wide.generate(BATCH[:5], seeds=SEEDS[:5], **settings)
    monkeypatch.setattr(wide.engine, "begin", lambda labels_R: seen.append(len(labels_R)) or begin(labels_R))
    parts = tight.generate(BATCH[:5], seeds=SEEDS[:5], **settings)
    assert seen == rows
    for ours, theirs in zip(parts.tokens, whole.tokens, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(parts.pixels, whole.pixels)
    assert len(parts.images) == 5
    assert list(parts.timings) == list(whole.timings)
    assert (whole.parts, parts.parts) == (1, len(rows))


def test_previews_of_a_batch_in_parts_say_which_images_they_show(tight):
    previews: list[Preview] = []
    out = tight.generate(BATCH[:5], seeds=SEEDS[:5], on_scale=previews.append, **SETTINGS)
    assert [(preview.first, preview.scale) for preview in previews] == [(i, k) for i in (0, 1, 3) for k in range(5)]
    for preview in previews:
        shown = slice(preview.first, preview.first + len(preview.tokens_Bn))
        np.testing.assert_array_equal(preview.tokens_Bn, out.tokens[preview.scale][shown])
    last = [image for preview in previews if preview.scale == 4 for image in preview.images]
    for image, expected in zip(last, out.images, strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_an_error_counts_images_over_all_parts(tight, monkeypatch):
    step = tight.engine.step

    def spoil(state: Any, k: int, codes_RnC: np.ndarray | None) -> np.ndarray:
        logits_RnV = step(state, k, codes_RnC)
        if len(logits_RnV) == 4:  # from the second part on
            logits_RnV[1, 0, 0] = np.nan
        return logits_RnV

    monkeypatch.setattr(tight.engine, "step", spoil)
    with pytest.raises(EngineError, match=r"^scale 0: logits of image 2 hold NaN or infinity; "):
        tight.generate(BATCH[:5], **SETTINGS)


def test_a_memory_limit_is_kept_from_loading_on(tiny_bundle):
    with pytest.raises(EngineError, match=r"^one image needs \d+ MB .*, 1 MB are allowed by memory_limit; raise "):
        var_deploy.load(tiny_bundle, engine="onnx", threads=1, memory_limit=10**6).generate([1])


# ---- class names -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def named(pipe: Pipeline) -> Pipeline:
    """`pipe` with class names, some of which look like ids."""
    names = ("zero", "one", "2", "3", "four", "five", "six", "seven", "eight", "nine")
    manifest = dataclasses.replace(pipe.bundle.manifest, class_names=names)
    return Pipeline(dataclasses.replace(pipe.bundle, manifest=manifest), pipe.engine)


def test_names_and_ids_mean_the_same(named: Pipeline):
    by_name = named.generate(["one", "2", "nine"], seeds=1)
    by_id = named.generate([1, 2, 9], seeds=1)
    np.testing.assert_array_equal(by_name.pixels, by_id.pixels)
    np.testing.assert_array_equal(named.generate("one", seeds=1).pixels, by_id.pixels[:1])


def test_an_unknown_name_lists_the_known_ones(named: Pipeline):
    known = "zero, one, 2, 3, four, five, six, seven, eight, nine (ids 0 to 9)"
    with pytest.raises(RequestError) as caught:
        named.generate("ten")
    assert str(caught.value) == f"class 'ten' is unknown; this bundle knows {known}"


def test_a_name_of_several_classes_is_refused(pipe: Pipeline):
    names = ("crane",) * 2 + tuple(str(i) for i in range(2, 10))
    manifest = dataclasses.replace(pipe.bundle.manifest, class_names=names)
    twice = Pipeline(dataclasses.replace(pipe.bundle, manifest=manifest), pipe.engine)
    with pytest.raises(RequestError) as caught:
        twice.generate("crane")
    assert str(caught.value) == "class 'crane' is the name of several classes; give one of the ids [0, 1]"


def test_scalars_of_numpy_are_scalars(pipe: Pipeline):
    plain = pipe.generate(3, seeds=4, guidance=2.0)
    arrays = pipe.generate(np.array(3), seeds=np.array(4), guidance=np.array(2.0))
    np.testing.assert_array_equal(arrays.pixels, plain.pixels)


# ---- wrong requests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"labels": []}, "labels: got none, expected at least one class"),
        ({"labels": [3, 10]}, "class 10 is out of range; expected an id from 0 to 9"),
        ({"labels": -1}, "class -1 is out of range; expected an id from 0 to 9"),
        ({"labels": 2.0}, "class 2.0 is out of range; expected an id from 0 to 9"),
        ({"labels": [True]}, "class True is out of range; expected an id from 0 to 9"),
        ({"labels": None}, "class None is out of range; expected an id from 0 to 9"),
        ({"labels": "cat"}, "class 'cat' is unknown; this bundle knows ids only (ids 0 to 9)"),
        ({"seeds": -1}, "seeds: got -1, expected integers from 0 to 2⁶⁴ − 1"),
        ({"seeds": 2**64 - 1}, f"seeds: got {2**64}, expected integers from 0 to 2⁶⁴ − 1"),
        ({"seeds": [1]}, "seeds: 1 for 2 images; give one integer, or one per image"),
        ({"seeds": [1, 2, 3]}, "seeds: 3 for 2 images; give one integer, or one per image"),
        ({"seeds": [1, 2.5]}, "seeds: got 2.5, expected integers from 0 to 2⁶⁴ − 1"),
        ({"seeds": [1, False]}, "seeds: got False, expected integers from 0 to 2⁶⁴ − 1"),
        ({"seeds": 1.5}, "seeds: got 1.5, expected one integer or one per image"),
        ({"seeds": None}, "seeds: got None, expected one integer or one per image"),
        ({"seeds": "ab"}, "seeds: got 'ab', expected one integer or one per image"),
        ({"guidance": -0.1}, "guidance: got -0.1, expected numbers from 0 to 1000"),
        ({"guidance": float("nan")}, "guidance: got nan, expected numbers from 0 to 1000"),
        ({"guidance": float("inf")}, "guidance: got inf, expected numbers from 0 to 1000"),
        ({"guidance": [0, 1, -2, 3]}, "guidance: got [0, 1, -2, 3], expected numbers from 0 to 1000"),
        ({"guidance": [0, 1, 2]}, "guidance: 3 values, expected one, or one per scale (4)"),
        ({"guidance": []}, "guidance: 0 values, expected one, or one per scale (4)"),
        ({"guidance": "high"}, "guidance: got 'high', expected numbers from 0 to 1000"),
        ({"guidance": {}}, "guidance: got {}, expected numbers from 0 to 1000"),
        ({"top_k": -1}, "top_k: got -1, expected an integer of at least 0 (0 is off)"),
        ({"top_k": 2.5}, "top_k: got 2.5, expected an integer of at least 0 (0 is off)"),
        ({"top_k": True}, "top_k: got True, expected an integer of at least 0 (0 is off)"),
        ({"top_p": 1.01}, "top_p: got 1.01, expected a number from 0 to 1 (0 is off)"),
        ({"top_p": -0.5}, "top_p: got -0.5, expected a number from 0 to 1 (0 is off)"),
        ({"top_p": float("nan")}, "top_p: got nan, expected a number from 0 to 1 (0 is off)"),
        ({"top_p": "most"}, "top_p: got 'most', expected a number from 0 to 1 (0 is off)"),
        ({"top_k": [900, 60]}, "top_k: 2 values, expected one, or one per scale (4)"),
        ({"top_k": [900, 60, 2.5, 1]}, "top_k: got [900, 60, 2.5, 1], expected an integer of at least 0 (0 is off)"),
        ({"smooth": 1}, "smooth: got 1, expected True or False"),
        ({"smooth": [True] * 5}, "smooth: 5 values, expected one, or one per scale (4)"),
        ({"preset": "paper"}, "preset 'paper' is unknown; known: paper-fid, paper-visual, paper-edit"),
        *(
            ({"temperature": got}, f"temperature: got {got!r}, expected a number from 0.001 to 1000; top_k=1 is greedy")
            for got in (0, -1.0, 9.9e-4, 1000.1, float("nan"), float("inf"), "hot", True, [1.0, 1.0, 0, 1.0])
        ),
    ],
    ids=str,
)
def test_a_wrong_request_is_told_what_would_be_right(pipe: Pipeline, request_: dict[str, Any], message: str):
    arguments = {"labels": [1, 2], **request_}
    with pytest.raises(RequestError) as caught:
        pipe.generate(arguments.pop("labels"), **arguments)
    assert str(caught.value) == message


def _pyramid(B: int = 2) -> list[np.ndarray]:
    return [np.zeros((B, n), np.int64) for n in (1, 4, 9, 16)]


def _with(k: int, value: Any) -> list[Any]:
    return [value if i == k else t for i, t in enumerate(_pyramid())]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "tokens: 0 scales, expected 1 to 4"),
        ([*_pyramid(), np.zeros((2, 25), int)], "tokens: 5 scales, expected 1 to 4"),
        (_with(2, np.zeros((2, 8), int)), "tokens: scale 2 has shape (2, 8), expected (2, 9)"),
        (_with(1, np.zeros((3, 4), int)), "tokens: scale 1 has shape (3, 4), expected (2, 4)"),
        (3, "tokens: scale 0 has shape (), expected (1, 1)"),
        (_with(0, np.zeros(2, int)), "tokens: scale 0 has shape (2,), expected (2, 1)"),
        (_with(0, np.zeros((0, 1), int)), "tokens: scale 0 has shape (0, 1), expected (1, 1)"),
        (_with(3, np.zeros((2, 16))), "tokens: scale 3 is float64, expected integers"),
        (_with(3, np.full((2, 16), 256)), "tokens: scale 3 leaves the codebook's 0 to 255"),
        (_with(1, np.full((2, 4), -1)), "tokens: scale 1 leaves the codebook's 0 to 255"),
    ],
)
def test_wrong_tokens_to_decode(pipe: Pipeline, tokens, message):
    with pytest.raises(RequestError) as caught:
        pipe.decode(tokens)
    assert str(caught.value) == message


def test_tokens_may_be_lists(pipe: Pipeline):
    np.testing.assert_array_equal(pipe.decode([t.tolist() for t in _pyramid()]), pipe.decode(_pyramid()))


def test_the_first_scales_alone_decode(pipe: Pipeline):
    assert pipe.decode(_pyramid()[:2]).shape == (2, 3, 64, 64)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images: got none, expected at least one"),
        (np.zeros((2, 3, 64, 63)), "images: array of shape (2, 3, 64, 63), expected (B, 3, 64, 64) with B ≥ 1"),
        (np.zeros((2, 64, 64, 3)), "images: array of shape (2, 64, 64, 3), expected (B, 3, 64, 64) with B ≥ 1"),
        (np.zeros((3, 64, 64)), "images: array of shape (3, 64, 64), expected (B, 3, 64, 64) with B ≥ 1"),
        (np.zeros((0, 3, 64, 64)), "images: array of shape (0, 3, 64, 64), expected (B, 3, 64, 64) with B ≥ 1"),
        (np.full((1, 3, 64, 64), 255, np.uint8), "images: array values outside [0, 1]; scale 8-bit values by 1/255"),
        (np.full((1, 3, 64, 64), -0.1), "images: array values outside [0, 1]; scale 8-bit values by 1/255"),
        (np.full((1, 3, 64, 64), np.nan), "images: array values outside [0, 1]; scale 8-bit values by 1/255"),
        (np.full((1, 3, 64, 64), "x"), "images: array of <U1, expected numbers in [0, 1]"),
        (Image.new("RGB", (64, 64)), "images: expected a list of PIL images or one array"),
        ([np.zeros((3, 64, 64))], "images: expected a list of PIL images or one array"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_wrong_images_to_encode(pipe: Pipeline, images, message):
    with pytest.raises(RequestError) as caught:
        pipe.encode(images)
    assert str(caught.value) == message


def test_pictures_of_any_size_encode_like_their_fitted_pixels(pipe: Pipeline):
    gradient = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    pixels = np.stack([gradient.transpose(2, 0, 1) / 255] * 2)
    pictures = [Image.fromarray(gradient)] * 2
    for ours, theirs in zip(pipe.encode(pictures), pipe.encode(pixels), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert pipe.reconstruct([Image.new("L", (101, 37), 90)]).shape == (1, 3, 64, 64)


def test_decoding_generated_tokens_gives_the_image(pipe: Pipeline):
    out = pipe.generate([1, 2], seeds=4)
    # f_hat is summed in another order.
    np.testing.assert_allclose(pipe.decode(out.tokens), out.pixels, atol=1e-4, rtol=0)


def test_weights_that_yield_nan_are_an_error_that_names_scale_and_image(tiny_copy: Path, reseal):
    bias = load_file(tiny_copy / "weights.safetensors")["head.bias"].tobytes()
    content = bytearray((tiny_copy / "weights.safetensors").read_bytes())
    at = content.find(bias)
    content[at : at + 4] = np.float32(np.nan).tobytes()
    (tiny_copy / "weights.safetensors").write_bytes(content)
    reseal(tiny_copy, "weights.safetensors")
    with pytest.raises(EngineError, match=r"^scale 0: logits of image 0 hold NaN or infinity; check the bundle"):
        var_deploy.load(tiny_copy, engine="onnx").generate([1])
