"""The model inside the server, run as its Python backend runs it: a stand-in for what exists in the server alone.

Images are compared bit for bit with the pipeline's own, made one at a time.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import var_deploy
from var_deploy.errors import BundleError, EngineError
from var_deploy.triton_repository import ServedModel, write_repository
from var_deploy.triton_server import TritonPythonModel, device_of, warm_up_batches

Row = tuple[np.ndarray, np.ndarray]

# ---- the server's side -----------------------------------------------------------------------------------------------


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert isinstance(array, np.ndarray)
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    INTERNAL, INVALID_ARG, CANCELLED = 1, 3, 7

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class InferenceRequest:
    def __init__(self, inputs: dict[str, np.ndarray], cancelled: bool = False) -> None:
        self._inputs, self._cancelled = [Tensor(name, array) for name, array in inputs.items()], cancelled

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def is_cancelled(self) -> bool:
        return self._cancelled


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        assert type(output_tensors) is list
        self._outputs, self._error = output_tensors, error

    def output_tensors(self) -> list[Tensor]:
        return self._outputs

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class Logger:
    lines: list[str] = []  # noqa: RUF012 - one for the process, as in the server

    @classmethod
    def log_info(cls, message: str) -> None:
        cls.lines.append(message)

    log_warn = log_info


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


@pytest.fixture(scope="module")
def _backend() -> Iterator[None]:
    module: Any = ModuleType("triton_python_backend_utils")
    for part in (Tensor, TritonError, InferenceRequest, InferenceResponse, Logger, get_input_tensor_by_name):
        setattr(module, part.__name__, part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        yield


@pytest.fixture(scope="module")
def repository(tiny_bundle, tmp_path_factory) -> Path:
    """Read only, copy it to alter it."""
    out = tmp_path_factory.mktemp("triton") / "models"
    return write_repository(tiny_bundle, out, ServedModel(engine="onnx", device="cpu", max_batch=4))


@pytest.fixture(scope="module")
def arguments(_backend, parsed_config) -> Callable[..., dict[str, str]]:
    """What the server passes to `initialize` for the model of a repository."""

    def of(repository: Path, kind: str = "CPU") -> dict[str, str]:
        config = parsed_config((repository / "var" / "config.pbtxt").read_text(encoding="utf-8"))
        return {
            "model_config": json.dumps(MessageToDict(config, preserving_proto_field_name=True)),
            "model_instance_kind": kind,
            "model_instance_device_id": "0",
            "model_repository": str(repository / "var"),
            "model_version": "1",
            "model_name": "var",
        }

    return of


def _model_of(repository: Path) -> TritonPythonModel:
    """Imports model.py by its path."""
    spec = spec_from_file_location("served_model", repository / "var" / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    model: TritonPythonModel = module.TritonPythonModel()
    return model


@pytest.fixture(scope="module")
def model(repository, arguments) -> Iterator[TritonPythonModel]:
    model = _model_of(repository)
    Logger.lines.clear()
    model.initialize(arguments(repository))
    yield model
    model.finalize()
    assert not hasattr(model, "pipe")


@pytest.fixture(scope="module")
def alone(tiny_bundle) -> Callable[..., Row]:
    """`alone(label, seed, **settings)`: an image and its tokens as the pipeline makes them by themselves."""
    pipe = var_deploy.load(tiny_bundle, engine="onnx", device="cpu")

    def make(label: int, seed: int, **settings: Any) -> Row:
        done = pipe.generate(label, seeds=seed, **settings)
        return np.asarray(done.images[0]), np.concatenate(done.tokens, axis=1)[0]

    return make


DTYPES = {"label": "int64", "seed": "uint64", "guidance": "float32", "temperature": "float32"}
DTYPES |= {"top_k": "int32", "top_p": "float32", "smooth": "bool"}


def _request(**columns: Any) -> InferenceRequest:
    """A request of one image, or of one per entry of its lists."""
    return InferenceRequest(
        {name: np.array(values, dtype=DTYPES[name]).reshape(-1, 1) for name, values in columns.items()}
    )


def _serve(model: TritonPythonModel, *requests: InferenceRequest) -> list[InferenceResponse]:
    """Runs a dynamic batch and checks what the server demands of any."""
    responses = model.execute(list(requests))
    assert len(responses) == len({id(response) for response in responses}) == len(requests)
    for request, response in zip(requests, responses, strict=True):
        if response.has_error():
            assert response.output_tensors() == []
            continue
        B = len(request.inputs()[0].as_numpy())
        image, tokens = response.output_tensors()
        assert (image.name(), image.as_numpy().dtype, image.as_numpy().shape) == ("image", np.uint8, (B, 64, 64, 3))
        assert (tokens.name(), tokens.as_numpy().dtype, tokens.as_numpy().shape) == ("tokens", np.int64, (B, 30))
    return responses


def _assert_rows(response: InferenceResponse, expected: list[Row]) -> None:
    assert not response.has_error(), response.error().message()  # type: ignore[union-attr]
    for tensor, column in zip(response.output_tensors(), zip(*expected, strict=True), strict=True):
        np.testing.assert_array_equal(tensor.as_numpy(), np.stack(column))


@pytest.fixture
def calls(model, monkeypatch) -> list[int]:
    """Images of every call of the pipeline, in order."""
    sizes: list[int] = []
    generate = model.pipe.generate

    def counted(labels: list[int], **settings: Any) -> Any:
        sizes.append(len(labels))
        return generate(labels, **settings)

    monkeypatch.setattr(model.pipe, "generate", counted)
    return sizes


# ---- images ----------------------------------------------------------------------------------------------------------


def test_requests_of_equal_settings_are_one_call_and_each_has_its_own_image(model, alone, calls):
    asked = [(3, 5), (9, 2**64 - 1), (0, 0), (3, 6)]
    responses = _serve(model, *(_request(label=label, seed=seed) for label, seed in asked))
    assert calls == [4]
    for response, (label, seed) in zip(responses, asked, strict=True):
        _assert_rows(response, [alone(label, seed)])


def test_mixed_settings_and_several_images_in_a_request(model, alone, calls):
    responses = _serve(
        model,
        _request(label=[1, 2, 3], seed=[7, 7, 8], smooth=[False, True, False]),
        _request(label=4, seed=9, guidance=2.5, temperature=1.5, top_k=60, top_p=0.9),
        _request(label=5, seed=10, guidance=0, top_k=0, top_p=0),
        _request(label=[6, 7], seed=[11, 12], guidance=[2.5, 0], temperature=[1.5, 1], top_k=[60, 0], top_p=[0.9, 0]),
    )
    assert sorted(calls) == [1, 2, 2, 2]
    strong = {"guidance": 2.5, "temperature": 1.5, "top_k": 60, "top_p": float(np.float32(0.9))}
    plain = {"guidance": 0, "top_k": 0, "top_p": 0}
    _assert_rows(responses[0], [alone(1, 7), alone(2, 7, smooth=True), alone(3, 8)])
    _assert_rows(responses[1], [alone(4, 9, **strong)])
    _assert_rows(responses[2], [alone(5, 10, **plain)])
    _assert_rows(responses[3], [alone(6, 11, **strong), alone(7, 12, **plain)])
    assert not np.array_equal(alone(4, 9, **strong)[1], alone(4, 9)[1])  # the settings were heard


def test_the_server_hears_what_was_chosen_and_that_it_works(model):
    said = "\n".join(Logger.lines)
    assert "var_deploy: engine onnx on cpu (asked for)" in said
    assert "var_deploy: warmed up: batch 1 in " in said


_settings = st.fixed_dictionaries({"top_k": st.sampled_from([0, 3, 900]), "smooth": st.booleans()})
_rows = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2**64 - 1), _settings), min_size=1, max_size=4)
_wrong = st.sampled_from(["label", "cancelled"])


@given(asked=st.lists(st.tuples(_rows, st.none() | _wrong), max_size=6))
def test_every_image_is_made_once_and_answers_the_request_that_asked_for_it(model, asked):
    made: list[tuple[int, int, int, bool]] = []
    groups: list[tuple[int, bool]] = []

    def generate(labels: list[int], *, seeds: list[int], **by_scale: Any) -> Any:
        """Pictures and tokens that say what they were made of."""
        (top_k,), (smooth,) = set(by_scale["top_k"]), set(by_scale["smooth"])
        groups.append((top_k, smooth))
        made.extend((label, seed, top_k, smooth) for label, seed in zip(labels, seeds, strict=True))
        tokens_B1 = np.array(seeds, dtype=np.uint64).view(np.int64)[:, None]
        shade = 100 * smooth + {0: 0, 3: 10, 900: 20}[top_k]
        images = [Image.new("RGB", (64, 64), (label, shade, 0)) for label in labels]
        return SimpleNamespace(images=images, tokens=[np.repeat(tokens_B1, n, axis=1) for n in (1, 4, 9, 16)])

    fake = TritonPythonModel()
    fake._server = sys.modules["triton_python_backend_utils"]
    fake.pipe = SimpleNamespace(bundle=model.pipe.bundle, generate=generate)  # type: ignore[assignment]
    requests = []
    for rows, wrong in asked:
        labels, seeds, settings = zip(*rows, strict=True)
        columns = {name: [chosen[name] for chosen in settings] for name in ("top_k", "smooth")}
        request = _request(label=[*labels[:-1], 10] if wrong == "label" else labels, seed=seeds, **columns)
        request._cancelled = wrong == "cancelled"
        requests.append(request)
    responses = _serve(fake, *requests)

    expected = []
    for (rows, wrong), response in zip(asked, responses, strict=True):
        assert response.has_error() is (wrong is not None)
        if wrong is not None:
            continue
        image, tokens = (tensor.as_numpy() for tensor in response.output_tensors())
        for row, (label, seed, chosen) in enumerate(rows):
            expected.append((label, seed, chosen["top_k"], chosen["smooth"]))
            shade = 100 * chosen["smooth"] + {0: 0, 3: 10, 900: 20}[chosen["top_k"]]
            assert image[row, 0, 0].tolist() == [label, shade, 0]
            assert set(tokens[row].view(np.uint64).tolist()) == {seed}
    assert sorted(made) == sorted(expected)
    assert len(groups) == len(set(groups))


# ---- errors ----------------------------------------------------------------------------------------------------------


def _column(*values: Any, dtype: str) -> np.ndarray:
    return np.array(values, dtype=dtype).reshape(-1, 1)


LABEL, SEED = _column(1, dtype="int64"), _column(2, dtype="uint64")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"seed": SEED}, "label: missing; every request has one, int64 [images, 1]"),
        ({"label": LABEL}, "seed: missing; every request has one, uint64 [images, 1]"),
        ({"label": LABEL + 9}, "class 10 is out of range; expected an id from 0 to 9"),
        ({"label": -LABEL}, "class -1 is out of range; expected an id from 0 to 9"),
        ({"label": LABEL.astype("int32")}, "label: got int32 [1, 1], expected int64 [1, 1]"),
        ({"label": np.array(1)}, "label: got int64 [], expected int64 [1, 1]"),
        ({"label": LABEL[:0]}, "label: got int64 [0, 1], expected int64 [1, 1]"),
        ({"label": LABEL.repeat(2, axis=1)}, "label: got int64 [1, 2], expected int64 [1, 1]"),
        ({"label": LABEL.repeat(2, axis=0)}, "seed: got uint64 [1, 1], expected uint64 [2, 1]"),
        ({"seed": SEED.astype("int64")}, "seed: got int64 [1, 1], expected uint64 [1, 1]"),
        ({"top_k": _column(-1, dtype="int32")}, "top_k: got -1, expected an integer of at least 0 (0 is off)"),
        ({"top_p": _column(1.5, dtype="float32")}, "top_p: got 1.5, expected a number from 0 to 1 (0 is off)"),
        ({"top_p": _column("nan", dtype="float32")}, "top_p: got nan, expected a number from 0 to 1 (0 is off)"),
        ({"guidance": _column("inf", dtype="float32")}, "guidance: got inf, expected numbers from 0 to 1000"),
        (
            {"temperature": _column(0, dtype="float32")},
            "temperature: got 0.0, expected a number from 0.001 to 1000; top_k=1 is greedy",
        ),
        ({"smooth": _column(1, dtype="uint8")}, "smooth: got uint8 [1, 1], expected bool [1, 1]"),
    ],
)
def test_a_wrong_request_is_one_line_and_spoils_no_other(model, alone, calls, inputs, message):
    if "missing" not in message:
        inputs = {"label": LABEL, "seed": SEED, **inputs}
    before, wrong, after = _serve(
        model, _request(label=3, seed=4), InferenceRequest(inputs), _request(label=[5, 6], seed=[7, 8])
    )
    assert (wrong.error().message(), wrong.error().code()) == (message, TritonError.INVALID_ARG)  # type: ignore[union-attr]
    assert calls == [3]
    _assert_rows(before, [alone(3, 4)])
    _assert_rows(after, [alone(5, 7), alone(6, 8)])


def test_a_cancelled_request_is_not_run(model, alone, calls):
    cancelled = _request(label=1, seed=2)
    cancelled._cancelled = True
    first, second = _serve(model, cancelled, _request(label=3, seed=4))
    assert (first.error().message(), first.error().code()) == ("the client has cancelled it", TritonError.CANCELLED)  # type: ignore[union-attr]
    assert calls == [1]
    _assert_rows(second, [alone(3, 4)])


def test_what_the_engine_cannot_do_answers_its_group_only(model, alone, monkeypatch):
    generate, sizes = model.pipe.generate, []

    def fails_when_smooth(labels: list[int], **settings: Any) -> Any:
        sizes.append(len(labels))
        if any(settings["smooth"]):
            raise EngineError("batch 2: needs more memory;\nmake the batch smaller")
        return generate(labels, **settings)

    monkeypatch.setattr(model.pipe, "generate", fails_when_smooth)
    responses = _serve(
        model,
        _request(label=1, seed=1, smooth=True),
        _request(label=2, seed=2),
        _request(label=[3, 4], seed=[3, 4], smooth=[True, False]),
        _request(label=5, seed=5, smooth=False),
    )
    assert sizes == [2, 2]  # the image of the request that has failed already is not made
    for index in (0, 2):
        error = responses[index].error()
        assert error is not None
        assert error.message() == "batch 2: needs more memory; make the batch smaller"
        assert error.code() == TritonError.INTERNAL
    _assert_rows(responses[1], [alone(2, 2)])
    _assert_rows(responses[3], [alone(5, 5)])


# ---- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "number", "device"), [("GPU", "3", "cuda:3"), ("CPU", "0", "cpu"), ("MODEL", "0", "auto")]
)
def test_the_device_is_the_instance_group_s(kind, number, device):
    assert device_of(kind, number) == device


@pytest.mark.parametrize(
    ("device", "max_batch", "batches"),
    [("cpu", 8, [1]), ("auto", 8, [1]), ("cuda:0", 1, [1]), ("cuda:1", 8, [1, 2, 4, 8]), ("cuda:0", 6, [1, 2, 4, 6])],
)
def test_batches_that_have_a_graph_are_run_before_the_first_request(device, max_batch, batches):
    assert warm_up_batches(device, max_batch) == batches


def _edited(repository: Path, out: Path, old: str, new: str) -> Path:
    copy = shutil.copytree(repository, out / "models")
    config = copy / "var" / "config.pbtxt"
    text = config.read_text(encoding="utf-8")
    assert text.count(old) == 1
    config.write_text(text.replace(old, new), encoding="utf-8")
    return copy


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        (
            'key: "engine"',
            'key: "enigne"',
            EngineError,
            "config.pbtxt: unknown parameter 'enigne'; known: engine, prec",
        ),
        ('"onnx"', '"warp"', EngineError, "unknown engine 'warp'; known: auto, "),
        (
            "dims: [ 64, 64, 3 ]",
            "dims: [ 64, 32, 3 ]",
            BundleError,
            "config.pbtxt: output image is TYPE_UINT8 [64, 32, ",
        ),
        ('name: "seed"', 'name: "sead"', BundleError, "config.pbtxt: input seed is nothing, "),
        ("TYPE_UINT64", "TYPE_INT64", BundleError, "config.pbtxt: input seed is TYPE_INT64 [1], "),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(repository, arguments, tmp_path, old, new, error, message):
    model = TritonPythonModel()
    copy = _edited(repository, tmp_path, old, new)
    with pytest.raises(error) as raised:
        model.initialize(arguments(copy))
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_parameters_of_the_server_itself_are_left_to_it(repository, arguments, tmp_path):
    own = 'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "/env.tar.gz" } }\nparameters { key: "engine"'
    model = TritonPythonModel()
    model.initialize(arguments(_edited(repository, tmp_path, 'parameters { key: "engine"', own)))
    model.finalize()


def test_a_bundle_that_changed_in_the_repository_is_refused(repository, arguments, tmp_path):
    copy = shutil.copytree(repository, tmp_path / "models")
    weights = copy / "var" / "1" / "bundle" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match=r"changed since export: weights\.safetensors has sha256"):
        TritonPythonModel().initialize(arguments(copy))
