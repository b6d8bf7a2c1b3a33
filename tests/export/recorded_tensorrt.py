"""TensorRT's Python API without TensorRT: its real bindings over empty libraries, and a recorder made from them.

The bindings are a package of their own; of the libraries that they load they need ten C functions only. With those
defined as returning nothing they can be imported on any Linux machine: every class, method, argument and enum of the
real API, and no engine. The recorder stands in for objects that only the libraries could make: it takes what the real
signatures take, refuses everything else, and notes the calls. What passes keeps to the API; it has not run.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

#: Library → the functions that the bindings take from it.
FUNCTIONS = {
    "nvinfer": (
        "createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL getBuilderPluginRegistry "
        "getPluginRegistry"
    ),
    "nvonnxparser": "createNvOnnxParser_INTERNAL createNvOnnxParserRefitter_INTERNAL getNvOnnxParserVersion",
    "nvinfer_plugin": "initLibNvInferPlugins",
}


def real_bindings(folder: Path) -> ModuleType:
    """The real bindings, imported from a copy in `folder`; skips the test where they or a C compiler are missing."""
    if "tensorrt_bindings" in sys.modules:
        return sys.modules["tensorrt_bindings"]
    spec = find_spec("tensorrt_bindings")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if spec is None or spec.origin is None or compiler is None:
        pytest.skip("needs tensorrt-cu13-bindings and a C compiler")
    package = folder / "tensorrt_bindings"
    shutil.copytree(Path(spec.origin).parent, package)
    for library, functions in FUNCTIONS.items():
        name = f"lib{library}.so.11"
        source = "".join(f"void *{function}(void) {{ return 0; }}\n" for function in functions.split())
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(package / name), "-x", "c", "-"]
        subprocess.run(command, input=source, text=True, check=True)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("tensorrt_bindings")
    finally:
        sys.path.remove(str(folder))


@dataclass(frozen=True)
class Call:
    """One call, or one attribute that was set."""

    cls: str
    method: str
    arguments: dict[str, Any]


@dataclass
class Recorder:
    """A module like `tensorrt`, whose objects record; `answers` says what methods return, by class and method."""

    trt: ModuleType
    answers: dict[tuple[str, str], Callable[..., Any]] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    #: The same for what depends on the object, which comes first: it may keep anything in its `state`.
    behaviours: dict[tuple[str, str], Callable[..., Any]] = field(default_factory=dict)

    #: Classes that code makes objects of, which only the libraries could.
    MADE = ("Builder", "OnnxParser", "OnnxParserRefitter", "Refitter", "Runtime")

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.trt, name)  # AttributeError for what the API does not have
        if name in self.MADE:
            return lambda *args, **kwargs: self._constructed(name, args, kwargs)
        return value

    def of(self, method: str) -> list[dict[str, Any]]:
        """Arguments of all calls of that method, in order."""
        return [call.arguments for call in self.calls if call.method == method]

    def make(self, cls: str) -> Any:
        """An object of a class, as the libraries would return it."""
        return _Made(self, cls)

    def _constructed(self, cls: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = self.bound(cls, "__init__", args, kwargs)
        self.calls.append(Call(cls, "__init__", arguments))
        if (cls, "__init__") in self.behaviours:
            self.behaviours[cls, "__init__"](made := self.make(cls), **arguments)
            return made
        return self.answers.get((cls, "__init__"), lambda **_: self.make(cls))(**arguments)

    def bound(self, cls: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name, as one of the method's real signatures takes them. Raises TypeError."""
        signatures = _signatures(getattr(getattr(self.trt, cls), method).__doc__, method)
        problems = []
        for parameters, _ in signatures:
            try:
                return self._fitted(parameters, args, kwargs)
            except TypeError as error:
                problems.append(str(error))
        raise TypeError(f"{cls}.{method}: {'; '.join(problems) or 'no signature is known'}")

    def _fitted(
        self, parameters: list[tuple[str, str, bool]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        names = [name for name, _, _ in parameters]
        if len(args) > len(names) or set(kwargs) - set(names[len(args) :]):
            raise TypeError(f"got {len(args)} arguments and {sorted(kwargs)}, expected {names}")
        given = dict(zip(names, args, strict=False)) | kwargs
        for name, annotation, optional in parameters:
            if name not in given:
                if optional:
                    continue
                raise TypeError(f"argument {name} is missing")
            if not self._is(given[name], annotation):
                raise TypeError(f"argument {name}: got {given[name]!r}, expected {annotation}")
        return given

    def _is(self, value: Any, annotation: str) -> bool:
        """Whether a value is of a type as the bindings write it; types that are not told apart pass."""
        name = annotation.removeprefix("tensorrt_bindings.tensorrt.")
        if isinstance(value, _Made):
            cls, wanted = getattr(self.trt, value._cls), getattr(self.trt, name, None)
            return isinstance(wanted, type) and issubclass(cls, wanted)
        if name == "Dims":
            return isinstance(value, tuple | list) and all(isinstance(length, int) for length in value)
        if name.startswith("collections.abc.Sequence[typing.SupportsInt"):
            return isinstance(value, tuple | list) and all(isinstance(item, int) for item in value)
        plain = {"str": str, "int": int, "bool": bool, "typing.SupportsInt": int, "typing_extensions.Buffer": bytes}
        if name in plain:
            return isinstance(value, plain[name])
        wanted: Any = self.trt
        for part in name.split("."):
            wanted = getattr(wanted, part, None)
        return not isinstance(wanted, type) or isinstance(value, wanted)


class _Made:
    """An object that only the libraries could make."""

    def __init__(self, recorder: Recorder, cls: str) -> None:
        self.__dict__.update(_recorder=recorder, _cls=cls, _set={}, state={})

    def __getattr__(self, name: str) -> Any:
        recorder, cls = self._recorder, self._cls
        described = getattr(getattr(recorder.trt, cls), name)  # AttributeError for what the class does not have
        behaviour = recorder.behaviours.get((cls, name))
        if isinstance(described, property):
            if behaviour is not None:
                return behaviour(self)
            answer = recorder.answers.get((cls, name))
            return self._set.get(name) if answer is None else answer()

        def call(*args: Any, **kwargs: Any) -> Any:
            arguments = recorder.bound(cls, name, args, kwargs)
            recorder.calls.append(Call(cls, name, arguments))
            if behaviour is not None:
                return behaviour(self, **arguments)
            if (cls, name) in recorder.answers:
                return recorder.answers[cls, name](**arguments)
            returned = _signatures(described.__doc__, name)[0][1].removeprefix("tensorrt_bindings.tensorrt.")
            if isinstance(getattr(recorder.trt, returned, None), type):
                return recorder.make(returned)
            return {"bool": True, "int": 0, "str": ""}.get(returned)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":  # a base class that the caller knows better
            if not issubclass(value, getattr(self._recorder.trt, self._cls)):
                raise TypeError(f"{value} is no {self._cls}")
            self.__dict__["_cls"] = value.__name__
            return
        described = getattr(getattr(self._recorder.trt, self._cls), name)
        if not isinstance(described, property) or described.fset is None:
            raise AttributeError(f"{self._cls}.{name} cannot be set")
        self._recorder.calls.append(Call(self._cls, name, {"value": value}))
        self._set[name] = value


@cache
def _signatures(doc: str | None, method: str) -> list[tuple[list[tuple[str, str, bool]], str]]:
    """(name, type, optional) of the arguments after self, and the returned type, of every signature in a docstring."""
    found = []
    for line in (doc or "").splitlines():
        match = re.fullmatch(rf"\s*(?:\d+\. )?{re.escape(method)}\((.*)\) -> (.*?)\s*", line)
        if match is None or match.group(1).startswith("*args"):
            continue
        parameters = []
        for part in _split(match.group(1))[1:]:
            name, _, annotation = part.partition(": ")
            annotation, default, _ = annotation.partition(" = ")
            parameters.append((name.strip(), annotation.strip(), bool(default)))
        found.append((parameters, match.group(2)))
    return found


def _split(parameters: str) -> list[str]:
    """At commas that are in no brackets."""
    parts, depth = [""], 0
    for character in parameters:
        depth += (character in "[(<") - (character in "])>")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
