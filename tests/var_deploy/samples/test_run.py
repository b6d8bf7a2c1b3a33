"""Sampling as users run it: killed, cut into shards, in other batches, on a full disk; it is the undisturbed run's."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import var_deploy
from var_deploy.errors import RequestError
from var_deploy.pipeline import Pipeline
from var_deploy.recipe import recipes_from_png
from var_deploy.samples.maker import Maker, Order
from var_deploy.samples.plan import Batch, SamplePlan, Shard

COMMAND = [sys.executable, "-m", "var_deploy.cli", "sample"]


def _command(bundle: Path, out: Path, *options: str) -> list[str]:
    """As `plan` is made."""
    asked = ["--count", "31", "--seed", "7", "--engine", "onnx", "--device", "cpu", "--no-cache"]
    return [*COMMAND, str(bundle), "--out", str(out), *asked, *options]


def _wait_for(count: int, out: Path, process: subprocess.Popen[str]) -> None:
    """Until so many images are there."""
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.png"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{len(list(out.glob('*.png')))} images after a minute"
        time.sleep(0.002)


# ---- killed ----------------------------------------------------------------------------------------------------------


def test_killed_and_started_again_it_is_the_undisturbed_run(tiny_bundle, undisturbed, assert_same_samples, tmp_path):
    moments, out = random.Random(), tmp_path / "out"
    seed = moments.randrange(2**32)
    moments.seed(seed)
    there = 0
    for number, status, batch in ((signal.SIGTERM, 143, 2), (signal.SIGKILL, -signal.SIGKILL, 3)):
        command = _command(tiny_bundle, out, "--batch", str(batch), "--threads", "1")
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            _wait_for(there + moments.randint(1, 8), out, process)
            time.sleep(moments.uniform(0, 0.05))
            process.send_signal(number)
            said = process.communicate()
        assert process.returncode == status, (seed, said)
        assert "Traceback" not in said[1]
        found = list(out.glob("*.png"))
        assert there < len(found) < 31, seed
        assert all(path.read_bytes() == (undisturbed / path.name).read_bytes() for path in found), seed
        there = len(found)
    done = subprocess.run(_command(tiny_bundle, out, "--npz"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{out}: 31 images, {31 - there} of them made now", str(out / "samples.npz")]
    told = done.stderr.splitlines()
    assert (told[0], told[-1].split(",")[0]) == (f"{there}/31 images", "31/31 images")
    assert_same_samples(out)
    assert (out / "samples.npz").read_bytes() == (undisturbed / "samples.npz").read_bytes()


def test_what_a_kill_or_a_copy_cut_off_is_made_again(undisturbed, run_sample, assert_same_samples, tmp_path):
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    whole = (out / "000003.png").read_bytes()
    (out / "000003.png").write_bytes(whole[:-1])
    (out / "000004.png").write_bytes(b"")
    (out / "000005.png").rename(out / ".partial-000005.png")
    (out / ".partial-samples.npz").write_bytes(b"half")
    assert run_sample(out).made == 3
    assert_same_samples(out)


# ---- shards, batches -------------------------------------------------------------------------------------------------


def test_shards_and_other_batches_are_the_undisturbed_run(undisturbed, run_sample, assert_same_samples, tmp_path):
    first = run_sample(tmp_path / "out", shard=Shard(index=2, total=2), batch=5, npz=True)
    assert (first.made, first.archive, first.missing) == (16, None, 15)
    last = run_sample(tmp_path / "out", shard=Shard(index=1, total=2), batch=1, npz=True)
    assert (last.made, last.archive, last.missing) == (15, tmp_path / "out" / "samples.npz", 0)
    assert_same_samples(tmp_path / "out")
    assert last.archive.read_bytes() == (undisturbed / "samples.npz").read_bytes()
    assert (tmp_path / "out" / "samples.json").read_bytes() == (undisturbed / "samples.json").read_bytes()


def test_an_image_is_that_of_generate_and_says_how_it_was_made(tiny_bundle, plan, undisturbed):
    index = 12
    (label,), (seed,) = plan.labels([index]).tolist(), plan.seeds([index])
    alone = var_deploy.load(tiny_bundle, engine="onnx", device="cpu", cache=False).generate([label], seeds=seed)
    with Image.open(undisturbed / f"{index:06d}.png") as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(alone.images[0]))
    assert recipes_from_png(undisturbed / f"{index:06d}.png") == list(alone.recipes)


def test_nothing_is_loaded_where_nothing_is_missing(undisturbed, run_sample, monkeypatch):
    monkeypatch.setattr("var_deploy.samples.maker.load", None)
    assert run_sample(undisturbed).made == 0


def test_where_the_batch_size_may_change_the_rounding_there_is_only_one(tiny_bundle, tiny, plan, monkeypatch):
    sizes: list[int] = []
    generate = Pipeline.generate

    def noted(pipe: Pipeline, labels: list[int], **options: object) -> object:
        sizes.append(len(labels))
        return generate(pipe, labels, **options)

    monkeypatch.setattr(Pipeline, "generate", noted)
    for engine, expected in (("onnx", [2, 1]), ("torch", [2, 2])):
        load = {"engine": engine, "device": "cpu", "cache": False}
        order = Order(bundle=str(tiny_bundle), digest=tiny.digest, load=load, settings=plan.settings, batch=2)
        maker = Maker(order)
        made = [*maker.make(_batch(plan, [4, 5])), *maker.make(_batch(plan, [6]))]
        assert sizes == expected
        assert [(image.index, image.recipe.seed) for image in made] == [(4, 11), (5, 12), (6, 13)]
        assert [image.recipe.engine for image in made] == [engine] * 3
        sizes.clear()


def _batch(plan: SamplePlan, indices: list[int]) -> Batch:
    return Batch(indices=tuple(indices), labels=tuple(plan.labels(indices).tolist()), seeds=tuple(plan.seeds(indices)))


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, "began with another plan: seed 7, now 8; choose another directory, or the options it began with"),
        ({"count": 30, "balanced": True}, "began with another plan: count 31, now 30, balanced false, now true;"),
        ({"classes": (1, 2)}, "classes null, now [1, 2];"),
        ({"bundle": "0" * 64}, "…, now 000000000000…;"),
        ({"settings": {"guidance": 2.0, "top_k": 900}}, "guidance 1.5, now 2.0"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_another_plan_does_not_go_on_there(plan, undisturbed, run_sample, change, message):
    with pytest.raises(RequestError) as caught:
        run_sample(undisturbed, plan=replace(plan, **change))
    assert str(undisturbed) in str(caught.value)
    assert message in str(caught.value)


def test_another_engine_does_not_go_on_there(run_sample, undisturbed, tmp_path):
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    (out / "000000.png").unlink()
    with pytest.raises(RequestError, match='another plan: engine "onnx", now "torch"; choose another directory'):
        run_sample(out, load={"engine": "torch", "device": "cpu"})
    assert not (out / "000000.png").exists()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda out: out.write_text("x"), "out: is a file, expected a directory"),
        (
            lambda out: (out.mkdir(), (out / "mine.png").touch()),
            "out: holds mine.png but no samples.json; choose a new",
        ),
        (lambda out: _notes(out, "{"), "samples.json: cannot be read ("),
        (lambda out: _notes(out, "[]"), "samples.json: got list, expected an object"),
        (lambda out: _notes(out, '{"version": 2}'), "samples.json: version 2, this program makes 1; go on with the"),
        (lambda out: _notes(out, "{}"), "samples.json: version None, this program makes 1"),
    ],
    ids=["a file", "other things", "no JSON", "a list", "a later version", "no version"],
)
def test_a_place_that_is_no_directory_of_samples_is_refused_and_left_alone(run_sample, tmp_path, prepare, message):
    out = tmp_path / "out"
    prepare(out)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RequestError) as caught:
        run_sample(out)
    assert message in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def _notes(out: Path, text: str) -> None:
    out.mkdir()
    (out / "samples.json").write_text(text)


def test_a_bundle_that_changed_meanwhile_is_refused(tiny, plan, run_sample, tmp_path):
    with pytest.raises(var_deploy.BundleError, match="expected ffffffffffff…; copy the bundle to this machine"):
        run_sample(tmp_path / "out", plan=replace(plan, bundle="f" * 64))


def test_batches_that_cannot_be_are_refused(tiny_bundle, tiny, plan, run_sample, tmp_path, monkeypatch):
    with pytest.raises(RequestError, match="batch: got 0, expected at least 1"):
        run_sample(tmp_path / "out", batch=0)
    monkeypatch.setattr("var_deploy.engines.onnx.OnnxEngine.max_batch", 4)  # as engines with plans have
    order = Order(
        bundle=str(tiny_bundle),
        digest=tiny.digest,
        load={"engine": "onnx", "device": "cpu", "cache": False},
        settings={},
        batch=5,
    )
    with pytest.raises(RequestError, match="batch: got 5, engine 'onnx' takes at most 4 images here"):
        Maker(order)


# ---- as a command ----------------------------------------------------------------------------------------------------


def _fail(command: list[str], **options: Callable[[], None]) -> str:
    """The one line of error, behind lines of progress."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, **options)
    assert result.returncode == 1, result.stdout + result.stderr
    *before, line = result.stderr.splitlines()
    assert all(told.endswith("images") for told in before), result.stderr
    assert line.startswith("error: ")
    return line


@pytest.mark.skipif(os.name != "posix", reason="no limit of file sizes")
def test_what_the_disk_refuses_ends_the_run_with_one_line(tiny_bundle, tmp_path):
    def few_bytes() -> None:  # a PNG file of noise has several thousand
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    line = _fail(_command(tiny_bundle, tmp_path / "out"), preexec_fn=few_bytes)
    assert line.startswith(f"error: {tmp_path}/out/0000")
    assert line.endswith("png: cannot write (File too large); choose another place")
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")] == ["samples.json"]


def test_options_that_do_not_fit_together_are_refused(tiny_bundle, tmp_path):
    line = _fail(_command(tiny_bundle, tmp_path / "out", "--workers", "2"))
    assert "--workers and --gpus-per-worker are for Ray; give --ray ADDRESS, or leave them out" in line
    assert list(tmp_path.iterdir()) == []
