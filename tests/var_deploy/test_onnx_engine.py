"""The ONNX Runtime engine: caches written in place, independent states, and what it says when it cannot load."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import var_deploy
from var_deploy.cpus import UsableCpus
from var_deploy.engines import Graphs, choice
from var_deploy.engines.onnx import OnnxEngine
from var_deploy.errors import EngineError

IN_PLACE_WARNING = "in-place optimization not activated"


@pytest.fixture(scope="module", params=list(Graphs))
def pipe(request: pytest.FixtureRequest, tiny_bundle: Path) -> var_deploy.Pipeline:
    return var_deploy.load(tiny_bundle, engine="onnx", graphs=request.param)


# ---- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_row_gets_the_same_logits_whatever_the_number_of_rows(pipe, rows):
    engine, config = pipe.engine, pipe.bundle.manifest.var
    few, many = engine.begin(np.arange(rows)), engine.begin(np.arange(8))
    codes_8nC = None
    for k in range(config.num_scales):
        codes_RnC = None if codes_8nC is None else codes_8nC[:rows]
        logits_RnV, expected_8nV = engine.step(few, k, codes_RnC), engine.step(many, k, codes_8nC)
        # Packed products (symbolic) add up in one order; unpacked ones in an order that depends on how many rows the
        # threads share, which is float32 rounding.
        atol = 0 if engine._symbolic else 1e-5
        np.testing.assert_allclose(logits_RnV, expected_8nV[:rows], atol=atol, rtol=0, err_msg=f"scale {k}")
        shape = (8, config.tokens_per_scale[k], config.z_channels)
        codes_8nC = np.random.default_rng(k).standard_normal(shape, dtype=np.float32)


def test_dropped_rows_leave_the_others_alone(pipe):
    """Codes for fewer rows drop the rows behind them, one by one down to a single row; f_hat and caches follow."""
    engine, config = pipe.engine, pipe.bundle.manifest.var
    dropping, keeping = (engine.begin(np.array([1, 2, 3, 10, 10, 10])) for _ in range(2))
    codes_6nC = None
    for k, rows in enumerate([6, 5, 3, 1]):
        codes_RnC = None if codes_6nC is None else codes_6nC[:rows]
        logits_RnV, expected_6nV = engine.step(dropping, k, codes_RnC), engine.step(keeping, k, codes_6nC)
        assert logits_RnV.shape == (rows, config.tokens_per_scale[k], config.vocab_size)
        atol = 0 if engine._symbolic else 1e-5  # as above
        np.testing.assert_allclose(logits_RnV, expected_6nV[:rows], atol=atol, rtol=0, err_msg=f"scale {k}")
        np.testing.assert_array_equal(dropping.f_hat_RChh, keeping.f_hat_RChh[:rows])
        shape = (6, config.tokens_per_scale[k], config.z_channels)
        codes_6nC = np.random.default_rng(k).standard_normal(shape, dtype=np.float32)
    f_hat_1Chh, f_hat_6Chh = engine.finish(dropping, codes_6nC[:1]), engine.finish(keeping, codes_6nC)
    np.testing.assert_allclose(f_hat_1Chh, f_hat_6Chh[:1], atol=1e-5, rtol=0)  # sums of one image or six


def test_no_cache_is_copied_when_null_rows_end_early(pipe, capfd):
    pipe.generate([1, 2, 3], guidance=[1.0, 2.0, 0, 0])
    pipe.generate([4], guidance=[2.0, 0, 0, 0])
    assert IN_PLACE_WARNING not in capfd.readouterr().err


# ---- caches ----------------------------------------------------------------------------------------------------------


def test_no_cache_is_copied_while_generating(pipe, capfd):
    pipe.generate([1, 2, 3], guidance=2.0)
    pipe.generate([4], guidance=0)
    assert IN_PLACE_WARNING not in capfd.readouterr().err


def test_the_warning_about_copies_would_be_seen(pipe, capfd):
    # The control of the test above: a cache output that is not bound to its input.
    engine = pipe.engine
    state = engine.begin(np.array([1]))
    other = engine.begin(np.array([1]))
    session, spec = engine._scales[0], pipe.bundle.manifest.graphs["scales" if engine._symbolic else "scale_00"]
    symbolic = {
        "scale": np.zeros(1, np.int64),
        "codes": np.zeros((2, 1, 32), np.float32),
        "f_hat": state.f_hat[0],
    }
    feeds = {**state.conditions, **state.caches, **symbolic}
    binding = session.io_binding()
    for tensor in spec.inputs:
        binding.bind_ortvalue_input(tensor.name, ort.OrtValue.ortvalue_from_numpy(feeds[tensor.name]))
    for tensor in spec.outputs:
        cache = other.caches.get(tensor.name.removesuffix(".out"))
        if cache is not None:
            binding.bind_ortvalue_output(tensor.name, ort.OrtValue.ortvalue_from_numpy(cache))
        else:
            binding.bind_output(tensor.name)
    session.run_with_iobinding(binding)
    assert IN_PLACE_WARNING in capfd.readouterr().err


def test_a_step_fills_its_span_of_the_same_buffers_and_no_other(pipe):
    config, engine = pipe.bundle.manifest.var, pipe.engine
    state = engine.begin(np.array([3, 10]))
    for cache in state.caches.values():
        cache[...] = 7.25  # a marker no key or value has
    addresses = {name: cache.ctypes.data for name, cache in state.caches.items()}
    codes_RnC = None
    before = {name: cache.copy() for name, cache in state.caches.items()}
    for k in range(config.num_scales):
        begin, end = config.span(k)
        engine.step(state, k, codes_RnC)
        for name, cache in state.caches.items():
            assert cache.ctypes.data == addresses[name]
            now_RHLd = cache
            assert (now_RHLd[:, :, begin:end] != 7.25).all(), f"{name} after scale {k}"
            np.testing.assert_array_equal(now_RHLd[:, :, :begin], before[name][:, :, :begin])
            assert (now_RHLd[:, :, end:] == 7.25).all(), f"{name} after scale {k}"
            before[name] = now_RHLd.copy()
        codes_RnC = np.zeros((2, config.tokens_per_scale[k], config.z_channels), np.float32)


def test_states_do_not_disturb_each_other(pipe):
    engine, codes_1nC = pipe.engine, np.full((1, 1, 32), 0.5, np.float32)

    def two_steps(label: int) -> np.ndarray:
        state = engine.begin(np.array([label]))
        engine.step(state, 0, None)
        return engine.step(state, 1, codes_1nC)

    alone = two_steps(4)
    first, second = engine.begin(np.array([4])), engine.begin(np.array([8]))
    engine.step(first, 0, None)
    engine.step(second, 0, None)
    other = engine.step(second, 1, codes_1nC)
    between = engine.step(first, 1, codes_1nC)
    np.testing.assert_array_equal(between, alone)
    assert np.abs(other - alone).max() > 1e-3  # another class gives other logits


def test_two_threads_get_the_pictures_they_would_get_one_by_one(pipe):
    requests = [([1, 2], 5), ([7], 9), ([3, 3, 0], 1), ([2, 1], 5)]

    def run(request: tuple[list[int], int]) -> np.ndarray:
        return pipe.generate(request[0], seeds=request[1], guidance=2.0, top_k=50, top_p=0.9).pixels

    one_by_one = [run(request) for request in requests]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, requests))
    for alone, beside in zip(one_by_one, together, strict=True):
        np.testing.assert_array_equal(alone, beside)


# ---- choosing and loading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "cuda"}, "unknown engine 'cuda'; known: auto, onnx, torch, tensorrt"),
        ({"device": "tpu"}, "unknown device 'tpu'; known: auto, cpu, cuda, cuda:N"),
        ({"graphs": "both"}, "unknown graphs 'both'; known: symbolic, static"),
        ({"threads": 0}, "threads: got 0, expected at least 1, or none for one per core"),
    ],
)
def test_an_unknown_choice_lists_the_known_ones(tiny_bundle, options, message):
    with pytest.raises(EngineError) as caught:
        var_deploy.load(tiny_bundle, **options)
    assert str(caught.value) == message


def test_a_missing_library_names_the_extra_to_install(tiny_bundle, monkeypatch):
    monkeypatch.delitem(sys.modules, "var_deploy.engines.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=r"^engine 'onnx' needs onnxruntime .*; pip install 'var-deploy\[cpu\]'$"):
        var_deploy.load(tiny_bundle, engine="onnx")


def test_the_choice_is_logged_with_its_reason(tiny_bundle, caplog):
    with caplog.at_level("INFO", logger="var_deploy"):
        var_deploy.load(tiny_bundle, engine="onnx", graphs="static")
    assert "engine onnx on cpu (asked for), static graphs" in caplog.text


def test_one_thread_gives_the_same_tokens(tiny_bundle, pipe):
    out = var_deploy.load(tiny_bundle, engine="onnx", threads=1).generate([5], seeds=3, top_k=60)
    expected = pipe.generate([5], seeds=3, top_k=60)
    np.testing.assert_array_equal(np.concatenate(out.tokens, 1), np.concatenate(expected.tokens, 1))


def test_a_graph_that_is_no_graph_is_named(tiny_copy, reseal):
    (tiny_copy / "decoder.onnx").write_bytes(b"not a graph")
    reseal(tiny_copy, "decoder.onnx")
    with pytest.raises(EngineError, match=r"decoder\.onnx: ONNX Runtime [\d.]+ failed: "):
        var_deploy.load(tiny_copy, engine="onnx")


@pytest.mark.parametrize("kind", ["relative", "absolute", "hidden", "link"])
@pytest.mark.parametrize("graph", ["scales", "condition", "encoder"])
def test_weights_outside_the_bundle_are_never_read(tiny_copy, reseal, graph, kind):
    """A forged, resealed graph whose external data lies outside: refused even though the bytes would fit."""
    outside = tiny_copy.parent / "outside.bin"
    os.link(tiny_copy / "weights.safetensors", outside)
    (tiny_copy / "inside").mkdir()
    (tiny_copy / "link.bin").symlink_to("../outside.bin")
    location = {
        "relative": "../outside.bin",
        "absolute": str(outside),
        "hidden": "inside/../../outside.bin",
        "link": "link.bin",
    }[kind]
    file = tiny_copy / f"{graph}.onnx"
    model = onnx.load(file, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    file.write_bytes(model.SerializeToString())
    reseal(tiny_copy, file.name)
    with pytest.raises(EngineError, match=rf"{graph}\.onnx: ONNX Runtime [\d.]+ failed: .*[Pp]ath"):
        _load_all(tiny_copy)


def test_a_graph_altered_in_another_way_loads(tiny_copy, reseal):
    # The control of the test above: it is the location that is refused, not the rewriting.
    for graph in ("scales", "condition", "encoder"):
        file = tiny_copy / f"{graph}.onnx"
        model = onnx.load(file, load_external_data=False)
        model.doc_string = "written again"
        file.write_bytes(model.SerializeToString())
        reseal(tiny_copy, file.name)
    _load_all(tiny_copy)


def _load_all(bundle: Path) -> None:
    """Loads a bundle with all its sessions; the encoder's is made when it is first used."""
    engine = var_deploy.load(bundle, engine="onnx").engine
    assert isinstance(engine, OnnxEngine)
    engine.encode(np.zeros((1, 3, 64, 64), np.float32))


def test_threads_rest_once_a_request_is_answered(tiny_bundle, monkeypatch):
    """Threads that wait at full load take time from the next session and from everything else."""
    monkeypatch.setattr(choice, "usable_cpus", lambda: UsableCpus(cpus=4, cores=4, quota=None))
    pipe = var_deploy.load(tiny_bundle, engine="onnx", threads=4)
    pipe.generate([1], seeds=0)
    resting = []
    for _ in range(3):  # the least: what else a process does now and then is not meant
        pipe.generate([1], seeds=0)
        before = time.process_time()
        time.sleep(0.05)
        resting.append(time.process_time() - before)
    assert min(resting) < 0.02
