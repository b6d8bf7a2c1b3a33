"""What `make test-gpu` and `make sanitize` run of the kernels' tests, collected as on a machine with CUDA."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from var_kernels.ops import OPERATIONS

ROOT = Path(__file__).parents[2]
KERNEL_TESTS = {f"test_{operation}.py" for operation in OPERATIONS}


def arguments_of(target: str) -> list[str]:
    """What a target of the Makefile hands to pytest."""
    recipe = re.search(rf"^{target}:\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert recipe is not None
    return shlex.split(recipe[1].replace("\\\n", " ").rpartition("-m pytest ")[2])


@cache
def collected(*arguments: str, cuda: bool = True) -> list[tuple[str, str]]:
    """(file, test) of what would run, in a process that believes in a GPU or in none."""
    program = (
        f"import sys, pytest, torch; torch.cuda.is_available = lambda: {cuda}; sys.exit(pytest.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "--collect-only", "-q", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [line.partition("::") for line in done.stdout.splitlines() if "::" in line]
    return [(Path(file).name, test) for file, _, test in lines]


def test_with_cuda_every_test_of_a_kernel_on_the_device_is_selected():
    every, selected = collected("tests/kernels"), collected(*arguments_of("test-gpu"), "tests/kernels")
    left_out = {(file, test) for file, test in every if file in KERNEL_TESTS} - set(selected)
    # What is left out stops at wrong input, launches nothing and needs no device.
    assert {test.partition("[")[0] for _, test in left_out} == {
        "test_wrong_input_is_named",
        "test_the_feature_map_must_not_be_overwritten_while_it_is_read",
    }
    draws = {entry for entry in every if entry[0] in ("test_draw.py", "test_uniforms.py")}
    assert draws <= set(selected)
    assert not {"test_reference.py", "test_resources.py"} & {file for file, _ in selected}


def test_without_cuda_the_interpreter_runs_them_unmarked():
    selected = collected("-m", "not gpu", "tests/kernels", cuda=False)
    assert {file for file, _ in selected} >= KERNEL_TESTS
    for operation in OPERATIONS:
        assert any(file == f"test_{operation}.py" and "against_the_reference" in test for file, test in selected)


def test_the_sanitizer_sees_every_kernel_at_small_sizes_and_nothing_slow():
    selected = collected(*arguments_of("sanitize"))
    plugins = {"test_plugins.py"}  # the same kernels as TensorRT calls them
    for kind, files in (("against_the_reference", KERNEL_TESTS | plugins), ("nothing_outside", KERNEL_TESTS)):
        assert {file for file, test in selected if kind in test} == files
    assert {file for file, _ in selected} == KERNEL_TESTS | plugins
    assert [test for _, test in selected if re.search("chi_square|published|many|more_than|beyond|gpu", test)] == []


@pytest.mark.parametrize("target", ["test-gpu", "sanitize"])
def test_both_ask_for_what_needs_a_gpu(target):
    arguments = arguments_of(target)
    assert arguments[arguments.index("-m") + 1] == "gpu"
