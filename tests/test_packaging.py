"""The wheel installs exactly four packages, whole, with the command and without tests or weights."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"var_deploy": ".", "var_export": "export", "var_kernels": "kernels", "var_train": "train"}
NOT_COPIED = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "out")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since building writes beside the sources."""
    directory = tmp_path_factory.mktemp("wheel")
    copy = shutil.copytree(ROOT, directory / "source", ignore=NOT_COPIED)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(directory / "dist"),
        str(copy),
    ]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (directory / "dist").iterdir()
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def content(wheel: Path, name: str) -> str:
    """Text of a file in the .dist-info directory."""
    archive = zipfile.ZipFile(wheel)
    (path,) = [entry for entry in archive.namelist() if entry.endswith(f".dist-info/{name}")]
    return archive.read(path).decode()


def test_wheel_is_pure_python_and_named_after_the_distribution(wheel):
    assert wheel.name.startswith("var_deploy-")
    assert wheel.name.endswith("-py3-none-any.whl")


def test_top_level_is_exactly_the_four_packages(names):
    top = {name.split("/")[0] for name in names}
    (info,) = [name for name in top if name.endswith(".dist-info")]
    assert top - {info} == set(PACKAGES)


def test_every_module_is_inside_and_nothing_else_of_python(names):
    expected = {
        path.relative_to(ROOT / folder).as_posix()
        for package, folder in PACKAGES.items()
        for path in (ROOT / folder / package).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == expected


def test_the_template_of_the_quality_report_is_inside(names):
    assert [name for name in names if name.endswith(".jinja")] == ["var_deploy/quality_report/page.html.jinja"]


def test_no_tests_and_no_weights_are_inside(names):
    assert not [name for name in names if "test" in name or "golden" in name or name.endswith((".safetensors", ".pth"))]


def test_command_is_installed(wheel):
    assert "[console_scripts]\nvar-deploy = var_deploy.cli:main" in content(wheel, "entry_points.txt")


def test_metadata_names_python_licence_and_light_requirements(wheel):
    metadata = Parser().parsestr(content(wheel, "METADATA"))
    assert metadata["Name"] == "var-deploy"
    assert metadata["License-Expression"] == "MIT"
    assert "MIT License" in content(wheel, "licenses/LICENSE")
    requirements = metadata.get_all("Requires-Dist")
    plain = {r.split(">")[0].strip() for r in requirements if "extra ==" not in r}
    assert plain == {"numpy", "pillow", "safetensors", "typer", "rich"}
    assert {"cpu", "gpu", "tensorrt", "export", "train", "dev"} <= set(metadata.get_all("Provides-Extra"))


def test_unpacked_wheel_imports_on_its_own(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import var_deploy, var_export, var_kernels, var_train
import var_deploy.cli, var_export.bundle, var_train.presets
for module in (var_deploy, var_export, var_kernels, var_train):
    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__
print(var_deploy.__version__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == wheel.name.split("-")[1]
