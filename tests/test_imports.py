"""Imports between the four packages point one way: exporter → trainer and kernels → the runtime's configuration."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "var_deploy": ROOT / "var_deploy",
    "var_export": ROOT / "export" / "var_export",
    "var_kernels": ROOT / "kernels" / "var_kernels",
    "var_train": ROOT / "train" / "var_train",
}

#: Package → what it may import of ours, anywhere in a file. A name allows the module and all that is in it.
ALLOWED = {
    "var_deploy": ("var_deploy",),
    "var_export": ("var_export", "var_train", "var_kernels", "var_deploy"),
    "var_kernels": ("var_kernels",),
    "var_train": (
        "var_train",
        "var_deploy.config",
        "var_deploy.errors",
        "var_deploy.staging",
        "var_deploy.evaluation.metrics",
    ),
}

#: Files that start what needs more, and may import it inside a function only.
ALLOWED_LAZILY = {
    "var_deploy/cli.py": ("var_train",),
    "var_deploy/commands/bundles.py": ("var_export",),
    "var_deploy/commands/evaluate.py": ("var_export",),
    "var_deploy/commands/measure.py": ("var_export",),
    "var_deploy/commands/report.py": ("var_export",),
    "var_deploy/bench/device.py": ("var_kernels",),
    "var_deploy/bench/gpu.py": ("var_kernels",),
    "var_deploy/bench/suite.py": ("var_export", "var_kernels", "var_train"),
    "var_deploy/engines/cuda/kernels.py": ("var_kernels",),
    "var_deploy/engines/onnx_cuda.py": ("var_kernels",),
    "var_deploy/bench/reference.py": ("var_train",),
}

#: The PyTorch engine is built on the kernels.
TORCH_ENGINE = "var_deploy/engines/torch/"

#: Loaded when an engine starts, images are evaluated, or a cluster is used.
ENGINES_ONLY = (
    "var_deploy/engines/onnx.py",
    "var_deploy/engines/onnx_cuda.py",
    "var_deploy/engines/winograd/",
    "var_deploy/evaluation/features.py",
    "var_deploy/evaluation/inception.py",
    "var_deploy/samples/on_ray.py",
    TORCH_ENGINE,
)

#: Imported by the runtime only where an engine or a command starts, or not at all.
HEAVY = (
    "torch",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "triton",
    "tensorrt",
    "sklearn",
    "tensorboard",
    "numba",
    "cuda",
    "ray",
)


@dataclass(frozen=True)
class Import:
    module: str  #: absolute name of what is imported
    line: int
    lazy: bool  #: inside a function


def imports_of(source: str, package: str) -> Iterator[Import]:
    """All imports of a module in `package` (dotted), by statement or by a string that names a module of ours."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import name` may import a module of that name
            yield from (Import(f"{stem}.{alias.name}", node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.Call):
            for argument in node.args:
                if isinstance(argument, ast.Constant) and str(argument.value).split(".")[0] in PACKAGES:
                    yield Import(str(argument.value), node.lineno, lazy)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(source), False)


def within(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def violations(package: str, file: str, imports: list[Import]) -> list[str]:
    """Imports of ours that `file` ("package/…/module.py") of a package may not have."""
    found = []
    for entry in imports:
        if entry.module.split(".")[0] not in PACKAGES:
            continue
        allowed = ALLOWED[package] + (("var_kernels",) if file.startswith(TORCH_ENGINE) else ())
        if entry.lazy:
            allowed += ALLOWED_LAZILY.get(file, ())
        if not within(entry.module, allowed):
            found.append(f"{file}:{entry.line} imports {entry.module}")
    return found


def modules(package: str) -> Iterator[tuple[str, str, list[Import]]]:
    """(path below the root, dotted package, imports) of each file of a package."""
    folder = PACKAGES[package]
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder.parent)
        yield (
            relative.as_posix(),
            (dotted := ".".join(relative.parent.parts)),
            list(imports_of(path.read_text(), dotted)),
        )


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_it_may(package):
    files = list(modules(package))
    assert files
    assert [line for file, _, imports in files for line in violations(package, file, imports)] == []


@pytest.mark.parametrize("package", ["var_export", "var_kernels", "var_train"])
def test_no_import_of_ours_hides_in_a_function(package):
    """That would dodge a cycle; only where a command or an engine starts is it meant."""
    hidden = [
        f"{file}:{entry.line} {entry.module}"
        for file, _, imports in modules(package)
        for entry in imports
        if entry.lazy and entry.module.split(".")[0] in PACKAGES
    ]
    assert hidden == []


def test_the_runtime_imports_heavy_packages_in_its_engines_or_functions_only():
    eager = [
        f"{file}:{entry.line} {entry.module}"
        for file, _, imports in modules("var_deploy")
        for entry in imports
        if not entry.lazy and entry.module.split(".")[0] in HEAVY
    ]
    assert [line for line in eager if not line.startswith(ENGINES_ONLY)] == []


@pytest.mark.parametrize(
    ("package", "file", "source", "allowed"),
    [
        ("var_deploy", "var_deploy/commands/bundles.py", "import var_export", False),
        ("var_deploy", "var_deploy/commands/bundles.py", "def f():\n    import var_export.bundle", True),
        (
            "var_deploy",
            "var_deploy/commands/bundles.py",
            "def f():\n    importlib.import_module('var_export.bundle')",
            True,
        ),
        ("var_deploy", "var_deploy/commands/bundles.py", "importlib.import_module('var_export.bundle')", False),
        ("var_deploy", "var_deploy/pipeline.py", "def f():\n    from var_train import VAR", False),
        ("var_deploy", "var_deploy/pipeline.py", "from .sampling import draw_scale", True),
        ("var_deploy", "var_deploy/engines/torch/program.py", "from var_kernels import Ops", True),
        ("var_deploy", "var_deploy/engines/onnx.py", "from var_kernels.adaln import adaln", False),
        ("var_train", "var_train/var.py", "from var_deploy.config import VARConfig", True),
        ("var_train", "var_train/var.py", "from var_deploy import config", True),
        ("var_train", "var_train/digits_quality.py", "from var_deploy.evaluation.metrics import Gaussian", True),
        ("var_train", "var_train/digits_quality.py", "from var_deploy.evaluation.evaluate import evaluate", False),
        ("var_train", "var_train/var.py", "import var_deploy", False),
        ("var_train", "var_train/var.py", "from var_deploy.bundle import Bundle", False),
        ("var_train", "var_train/var.py", "from var_export.verify import verify_bundle", False),
        ("var_train", "var_train/var.py", "from var_training_tools import x", True),  # not a package of ours
        ("var_kernels", "var_kernels/adaln.py", "from var_deploy.config import HEAD_DIM", False),
        ("var_kernels", "var_kernels/adaln.py", "import torch", True),
    ],
)
def test_the_rule_itself(package, file, source, allowed):
    dotted = ".".join(Path(file).parent.parts)
    assert (violations(package, file, list(imports_of(source, dotted))) == []) is allowed


def test_relative_imports_are_resolved():
    source = (
        "from . import sampling\nfrom .bundle import Bundle\nfrom ..errors import EngineError\nfrom .. import config"
    )
    assert [entry.module for entry in imports_of(source, "var_deploy.engines")] == [
        "var_deploy.engines.sampling",
        "var_deploy.engines.bundle.Bundle",
        "var_deploy.errors.EngineError",
        "var_deploy.config",
    ]
