"""Every kernel compiles for every capability within the hardware's limits, without a GPU; and a breach is reported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import typer

from var_kernels import resources
from var_kernels.launch import Launch
from var_kernels.ops import OPERATIONS
from var_kernels.resource_cases import Case
from var_kernels.resources import Row

ROOT = Path(__file__).parents[2]


@pytest.fixture(
    scope="module", params=[[90], pytest.param([80, 100], marks=pytest.mark.slow)], ids=["hopper", "the-others"]
)
def report(request, tmp_path_factory):
    """The quick table, made in a process that compiles: the interpreter of this one was chosen before Triton loaded."""
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("resources") / "table.json"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "var_kernels.resources", "--quick", "--json", str(path)]
    command += [word for capability in request.param for word in ("--capability", str(capability))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stderr[-4000:]}"
    return {"capabilities": request.param, **json.loads(path.read_text())}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_is_compiled_for_every_capability(operation, report):
    assert {row["capability"] for row in report["rows"]} == set(report["capabilities"])
    for capability in report["capabilities"]:
        rows = [row for row in report["rows"] if (row["operation"], row["capability"]) == (operation, capability)]
        assert rows, f"{operation} missing on capability {capability}"
        for row in rows:
            if operation == "quantize_rows" and capability < 89:
                assert row["note"] == "not for this capability: float8 e4m3 needs 89"
                assert row["registers"] is None
                continue
            assert row["note"] == ""
            assert 8 <= row["registers"] <= 255
            assert row["spill_bytes"] == 0
            assert 0 <= row["shared_bytes"] <= resources.SHARED_LIMIT[capability]
            assert row["warps"] in (1, 2, 4, 8, 16, 32)


def test_nothing_breaks_a_limit(report):
    assert report["violations"] == []


def test_the_quick_cases_cover_every_type_and_branch():
    def kinds(cases):
        marked = re.compile(r"bf16|fp16|fp32|\w+=(?:True|False)")
        return {(case.operation, kind) for case in cases for kind in ["any", *marked.findall(case.name)]}

    assert kinds([case for case in resources.CASES if case.quick]) == kinds(resources.CASES)
    assert {case.operation for case in resources.CASES} == set(OPERATIONS)


GOOD = Row(operation="adaln", case="d16", kernel="k", capability=80, warps=4, registers=255, spill_bytes=0)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, None),
        ({"shared_bytes": 99 * 1024}, None),
        ({"shared_bytes": 227 * 1024, "capability": 90}, None),
        ({"note": "not for this capability", "registers": None, "spill_bytes": None}, None),
        ({"shared_bytes": 99 * 1024 + 1}, "adaln (d16) k on capability 80: 101377 shared bytes, limit 101376"),
        (
            {"shared_bytes": 240000, "capability": 100},
            "adaln (d16) k on capability 100: 240000 shared bytes, limit 232448",
        ),
        ({"registers": 256}, "adaln (d16) k on capability 80: 256 registers, limit 255"),
        ({"spill_bytes": 4}, "adaln (d16) k on capability 80: 4 spill bytes, limit 0"),
        ({"tensor_memory": 1024}, "adaln (d16) k on capability 80: 1024 tensor memory, limit 512"),
        ({"note": "PTXASError: no", "failed": True}, "adaln (d16) k on capability 80: PTXASError: no"),
    ],
)
def test_limits(change, line):
    fields = {name: getattr(GOOD, name) for name in Row.__slots__}
    assert list(Row(**{**fields, **change}).violations()) == ([line] if line else [])


LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_kernel' for 'sm_90a'
ptxas info    : Function properties for _kernel
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, {stack} bytes cumulative stack size
"""


def test_what_the_assembler_says_is_read():
    assert resources.registers_and_spills(LOG.format(stack=0, stores=0, loads=0, registers=40)) == (40, 0)
    assert resources.registers_and_spills(LOG.format(stack=16, stores=12, loads=20, registers=255)) == (255, 32)
    with pytest.raises(ValueError, match="ptxas -v: expected registers and spills, got 'ptxas fatal'"):
        resources.registers_and_spills("ptxas fatal")


def test_arguments_are_specialised_as_the_launcher_does():
    Parameter = namedtuple("Parameter", "name do_not_specialize do_not_specialize_on_alignment")
    memory = torch.empty(64, dtype=torch.bfloat16)
    arguments = {"x": memory, "y": memory[1:], "z": None, "one": 1, "n": 48, "odd": 7, "long": 2**31, "t": 1.0}
    fixed = {"begin": 1, "rows": 32}
    names = (*arguments, *fixed, "BLOCK")
    kernel = namedtuple("Kernel", "params")([Parameter(name, name in fixed, False) for name in names])
    signature, constants, attributes = resources.specialised(
        Launch(kernel, (1,), {**arguments, **fixed}, {"BLOCK": 64}, num_warps=4, num_stages=2)
    )
    types = ["*bf16", "*bf16", "constexpr", "constexpr", "i32", "i32", "i64", "fp32", "i32", "i32", "constexpr"]
    assert signature == dict(zip(names, types, strict=True))
    assert constants == {"z": None, "one": 1, "BLOCK": 64}
    assert {names[index] for (index,) in attributes} == {"x", "n", "long"}


def seven_tokens_of_two_rows():
    rows = {name: torch.zeros(2, 64) for name in ("scale_RD", "shift_RD")}
    return {"x_MD": torch.zeros(7, 64), "y_MD": None, "gamma_RD": None, **rows, "out_MD": torch.zeros(7, 64)}


@pytest.fixture
def in_this_process(monkeypatch):
    """`main` without interpreter and pool, for what fails before anything is compiled."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def status(**options):
    with pytest.raises(typer.Exit) as exit_:
        resources.main(**{"json_file": None, "markdown": None, "quick": False, "jobs": 1, **options})
    return exit_.value.exit_code


def test_a_case_that_fails_and_a_missing_operation_are_reported(in_this_process, monkeypatch, capsys, tmp_path):
    cases = (Case("adaln", "seven", seven_tokens_of_two_rows, True), Case("absent", "any", dict, True))
    monkeypatch.setattr(resources, "CASES", cases)
    monkeypatch.setattr(resources, "OPERATIONS", ("adaln", "absent", "forgotten"))
    assert status(markdown=tmp_path / "table.md") == 1
    error = capsys.readouterr().err
    assert "adaln (seven) – on capability 90: ValueError: x_MD: 7 tokens do not divide into 2 rows\n" in error
    assert "absent (any) – on capability 80: ModuleNotFoundError: No module named 'var_kernels.absent'\n" in error
    assert error.endswith("forgotten: no case\n")
    assert error.count("\n") == 7
    page = (tmp_path / "table.md").read_text()
    assert "| adaln | seven | – | – | – / – / – | – / – / – | – / – / – | 80: failed; 90: failed; 100: failed |" in page
    assert "Broken: adaln (seven) – on capability 80" in page
    assert "None is broken" not in page


@pytest.mark.parametrize("option", ["json_file", "markdown"])
def test_a_path_that_cannot_be_written_is_refused_before_anything_compiles(option, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(resources, "rows_of", lambda *_: pytest.fail("compiled"))
    assert status(**{option: tmp_path}) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}: got a directory, expected a file name; add one\n"


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert status() == 2
    assert capsys.readouterr().err == "TRITON_INTERPRET is set, so no kernel can be compiled; unset it\n"


def test_triton_is_needed(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(resources, "find_spec", lambda name: None)
    assert status() == 2
    assert capsys.readouterr().err == "Triton is not installed; get it with: pip install triton\n"
