"""A model repository holds to the server's own schema and to the bundle, and is there whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from var_deploy.bundle import Bundle, note_fidelity
from var_deploy.cli import app
from var_deploy.errors import BundleError, EngineError, RequestError
from var_deploy.precision import Precision
from var_deploy.triton_repository import ServedModel, config_text, write_repository
from var_deploy.triton_server import INPUTS, outputs_of

NUMPY = {
    "TYPE_BOOL": np.bool_,
    "TYPE_UINT8": np.uint8,
    "TYPE_UINT64": np.uint64,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP32": np.float32,
}


@pytest.fixture(scope="module")
def manifest(tiny_bundle):
    return Bundle.open(tiny_bundle).manifest


# ---- config.pbtxt ----------------------------------------------------------------------------------------------------


def test_the_configuration_is_what_the_schema_reads(manifest, parsed_config, server_schema):
    model = ServedModel(name="var-d16.1", engine="torch", precision="fp8", max_batch=5, queue_delay_us=7, instances=3)
    config = parsed_config(config_text(manifest, model))
    assert (config.name, config.backend, config.max_batch_size) == ("var-d16.1", "python", 5)
    assert list(config.dynamic_batching.preferred_batch_size) == [5]
    assert config.dynamic_batching.max_queue_delay_microseconds == 7
    assert {key: value.string_value for key, value in config.parameters.items()} == {
        "engine": "torch",
        "precision": "fp8",
    }
    (group,) = config.instance_group
    assert (group.count, group.kind) == (3, server_schema.ModelInstanceGroup.KIND_AUTO)
    assert config.IsInitialized()


def test_tensors_of_the_configuration_are_those_that_the_model_reads_and_answers(
    manifest, parsed_config, server_schema
):
    config = parsed_config(config_text(manifest, ServedModel()))
    for entries, specs in ((config.input, INPUTS), (config.output, outputs_of(manifest))):
        for entry, spec in zip(entries, specs, strict=True):
            assert entry.name == spec.name
            assert NUMPY[server_schema.DataType.Name(entry.data_type)] == np.dtype(spec.dtype)
            assert tuple(entry.dims) == spec.shape
    assert [entry.name for entry in config.input if not entry.optional] == ["label", "seed"]
    assert {entry.name: tuple(entry.dims) for entry in config.output} == {
        "image": (64, 64, 3),
        "tokens": (1 + 4 + 9 + 16,),
    }


@pytest.mark.parametrize(
    ("engine", "device", "precision", "kind", "gpus"),
    [
        ("auto", "auto", Precision.FP32, "KIND_AUTO", []),
        ("torch", "auto", Precision.FP32, "KIND_AUTO", []),
        ("onnx", "auto", Precision.FP32, "KIND_CPU", []),
        ("auto", "auto", Precision.INT8, "KIND_CPU", []),
        ("auto", "auto", Precision.FP16, "KIND_AUTO", []),
        ("onnx", "auto", Precision.BF16, "KIND_GPU", []),
        ("tensorrt", "auto", Precision.FP16, "KIND_GPU", []),
        ("auto", "cpu", Precision.FP32, "KIND_CPU", []),
        ("auto", "cuda", Precision.FP32, "KIND_GPU", []),
        ("auto", "cuda:0", Precision.FP32, "KIND_GPU", [0]),
        ("torch", "cuda:13", Precision.FP32, "KIND_GPU", [13]),
    ],
)
def test_instances_go_where_the_engine_runs(
    manifest, parsed_config, server_schema, engine, device, precision, kind, gpus
):
    of_precision = dataclasses.replace(manifest, precision=precision)
    (group,) = parsed_config(config_text(of_precision, ServedModel(engine=engine, device=device))).instance_group
    assert server_schema.ModelInstanceGroup.Kind.Name(group.kind) == kind
    assert list(group.gpus) == gpus


# ---- the repository --------------------------------------------------------------------------------------------------


def _files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def _with_plans(bundle: Path) -> Path:
    """Adds whole plans, and one that is still being written."""
    plans = bundle / "plans" / "gpu-sm90-11.4" / "per-scale-1-1-8"
    plans.mkdir(parents=True)
    for name in ("plans.json", "scale_00.plan", ".partial-scale_01.plan"):
        (plans / name).write_bytes(name.encode())
    return bundle


@pytest.mark.parametrize("link", [False, True])
def test_a_repository_holds_configuration_model_and_bundle_with_plans(tiny_copy, tmp_path, link):
    bundle = _with_plans(tiny_copy)
    (bundle / "notes.txt").write_text("not of the bundle")
    out = tmp_path / "a" / "models"
    assert write_repository(bundle, out, ServedModel(name="digits"), link=link) == out
    served = out / "digits" / "1" / "bundle"
    of_bundle = _files(bundle) - {"notes.txt", "plans/gpu-sm90-11.4/per-scale-1-1-8/.partial-scale_01.plan"}
    assert _files(served) == of_bundle
    assert _files(out) - {f"digits/1/bundle/{name}" for name in of_bundle} == {
        "digits/config.pbtxt",
        "digits/1/model.py",
    }
    assert Bundle.open(served).manifest == Bundle.open(bundle).manifest
    for name in of_bundle:
        assert (served / name).samefile(bundle / name) is link
        assert (served / name).read_bytes() == (bundle / name).read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["models"]
    assert out.stat().st_mode & 0o777 == 0o755


def test_what_verify_notes_later_does_not_reach_a_linked_repository(tiny_copy, tmp_path):
    write_repository(tiny_copy, tmp_path / "models", ServedModel(), link=True)
    note_fidelity(Bundle.open(tiny_copy), {"kl": 0.5})
    assert Bundle.open(tiny_copy).manifest.fidelity == {"kl": 0.5}
    assert Bundle.open(tmp_path / "models" / "var" / "1" / "bundle").manifest.fidelity is None


def test_the_command_passes_every_option(tiny_copy, tmp_path, parsed_config):
    out = tmp_path / "models"
    options = ["--name", "d", "--engine", "torch", "--device", "cuda:1", "--precision", "int8", "--link"]
    options += ["--max-batch", "6", "--queue-delay", "0", "--instances", "2", "--out", str(out)]
    result = CliRunner().invoke(app, ["triton-repo", str(tiny_copy), *options], catch_exceptions=False)
    assert result.output == f"{out / 'd'}\n"
    asked = ServedModel(
        name="d", engine="torch", device="cuda:1", precision="int8", max_batch=6, queue_delay_us=0, instances=2
    )
    text = (out / "d" / "config.pbtxt").read_text(encoding="utf-8")
    assert text == config_text(Bundle.open(tiny_copy).manifest, asked)
    assert (out / "d" / "1" / "bundle" / "bundle.json").samefile(tiny_copy / "bundle.json")


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"name": "a/b"}, RequestError, "name: got 'a/b', expected letters, digits, _, . and -, like var-d16"),
        ({"name": ".hidden"}, RequestError, "name: got '.hidden', expected letters, digits"),
        ({"name": 'x" }'}, RequestError, "name: got 'x\" }', expected letters, digits"),
        ({"name": "x\n"}, RequestError, "name: got 'x\\n', expected letters, digits"),
        ({"name": ""}, RequestError, "name: got '', expected letters, digits"),
        ({"engine": "warp"}, EngineError, "unknown engine 'warp'; known: auto, "),
        ({"device": "tpu"}, EngineError, "unknown device 'tpu'; known: auto, cpu, cuda, cuda:N"),
        ({"device": "cuda:-1"}, EngineError, "unknown device 'cuda:-1'; known: auto, cpu, cuda, cuda:N"),
        ({"precision": "fp4"}, EngineError, "unknown precision 'fp4'; known: auto, fp32, fp16, bf16, int8, fp8"),
        ({"max_batch": 0}, RequestError, "max_batch: got 0, expected an integer from 1 to 2147483647"),
        ({"max_batch": 2**31}, RequestError, "max_batch: got 2147483648, expected an integer from 1 to 2147483647"),
        ({"queue_delay_us": -1}, RequestError, "queue_delay_us: got -1, expected an integer from 0 to 2147483647"),
        ({"instances": 0}, RequestError, "instances: got 0, expected an integer from 1 to 2147483647"),
    ],
)
def test_a_wrong_setting_is_refused(given, error, message):
    with pytest.raises(error) as raised:
        ServedModel(**given)
    assert str(raised.value).startswith(message)


def test_a_directory_that_exists_is_left_alone(tiny_bundle, tmp_path):
    (tmp_path / "models").mkdir()
    with pytest.raises(BundleError, match="models: exists already; nothing is overwritten, choose another name or rem"):
        write_repository(tiny_bundle, tmp_path / "models", ServedModel())
    assert [path.name for path in tmp_path.rglob("*")] == ["models"]


def test_a_bundle_that_was_altered_is_refused(tiny_copy, tmp_path):
    file = tiny_copy / "decoder.onnx"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"changed since export: decoder\.onnx has sha256"):
        write_repository(tiny_copy, tmp_path / "models", ServedModel())
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("function", "link", "step"),
    [
        ("shutil.copyfile", False, "choose another place"),
        ("os.link", True, "leave out --link, or choose a place on the bundle's disk"),
    ],
)
def test_what_is_killed_or_fails_half_way_leaves_nothing(tiny_bundle, tmp_path, monkeypatch, function, link, step):
    real = {"shutil.copyfile": shutil.copyfile, "os.link": os.link}[function]
    left = 3
    raised: BaseException

    def stops(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            assert any(tmp_path.rglob("bundle.json"))  # it was half there
            raise raised
        real(source, target)

    monkeypatch.setattr(f"var_deploy.triton_repository.{function}", stops)
    raised = SystemExit(143)  # what the command line makes of SIGTERM
    with pytest.raises(SystemExit):
        write_repository(tiny_bundle, tmp_path / "new" / "models", ServedModel(), link=link)
    assert list(tmp_path.iterdir()) == []
    left, raised = 3, OSError(18, "Invalid cross-device link")
    with pytest.raises(BundleError) as error:
        write_repository(tiny_bundle, tmp_path / "new" / "models", ServedModel(), link=link)
    out = tmp_path / "new" / "models"
    assert str(error.value) == f"{out}: writing failed (Invalid cross-device link); {step}; nothing is left behind"
    assert list(tmp_path.iterdir()) == []
