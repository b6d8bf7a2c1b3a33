"""Kernels compiled for a GPU that is not there: machine code, its arguments, and PTX that takes these and no others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from var_kernels.ahead_of_time import Compiled, parameters, signature_of, without_spare_pointers
from var_kernels.launch import recording
from var_kernels.uniforms import uniforms

ROOT = Path(__file__).parents[2]

#: Compiles in a process that was not told to interpret, and assembles the PTX again without its spare pointers.
PROGRAM = """
import json, subprocess, sys, tempfile
from pathlib import Path
import var_kernels
from triton import knobs
from var_kernels.ahead_of_time import draw_kernels, parameters, without_spare_pointers

found, folder = {}, str(Path(var_kernels.__file__).parent)
for capability in map(int, sys.argv[1:]):
    for name, kernel in draw_kernels(64, 8, 30, capability).items():
        ptx = without_spare_pointers(kernel)
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file, tempfile.NamedTemporaryFile() as out:
            file.write(ptx)
            file.flush()
            tool = knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas
            target = f"sm_{capability}{'a' if capability >= 90 else ''}"
            subprocess.run([tool.path, f"--gpu-name={target}", file.name, "-o", out.name], check=True)
        found[f"{name} {capability}"] = {
            "place": folder in kernel.ptx or folder.encode() in kernel.cubin,
            "elf": kernel.cubin[:4].decode("latin1"),
            "arguments": kernel.arguments,
            "parameters": [len(parameters(kernel.ptx)), len(parameters(ptx))],
            "threads": kernel.threads,
        }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", PROGRAM, "80", "90", "100"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_every_kernel_of_the_draw_assembles_with_its_own_arguments_alone(compiled):
    names = {"uniforms", "draw", "draw_guided", "draw_smooth", "draw_guided_smooth", "mix_codes", "keep_given"}
    assert compiled.keys() == {f"{name} {capability}" for name in names for capability in (80, 90, 100)}
    for name, kernel in compiled.items():
        count = len(kernel["arguments"])
        assert kernel["parameters"] == [count + 2, count], name
        assert not kernel["place"], "machine code holds a path of this machine"
        assert kernel["elf"] == "\x7fELF"
        assert kernel["threads"] % 32 == 0


def test_arguments_are_named_with_their_types(compiled):
    assert compiled["uniforms 90"]["arguments"] == [["seeds_ptr", "pointer"], ["out_ptr", "pointer"]]
    types = dict(compiled["draw_guided_smooth 80"]["arguments"])
    assert {name for name, kind in types.items() if kind != "pointer"} == {
        "uniforms_stride",
        "tokens_stride",
        "begin",
        "sharpening",
        "tau",
    }
    assert types["tau"] == "fp32"
    assert types["begin"] == "i32"
    assert "smooth_ptr" not in dict(compiled["draw 80"]["arguments"])


def uniforms_launch():
    with recording() as launches:
        uniforms(torch.empty(2, dtype=torch.int64), out_BL=torch.empty(2, 5, dtype=torch.float64))
    return launches[0]


def test_only_named_pointers_are_taken_for_aligned():
    signature = signature_of(uniforms_launch(), ["out_ptr"])
    assert signature.attributes == {(1,): [["tt.divisibility", 16]]}
    assert signature.types["seeds_ptr"] == "*i64"
    assert signature.constants["L"] == 5
    with pytest.raises(ValueError, match="aligned: x_ptr is no pointer of _uniforms_kernel"):
        signature_of(uniforms_launch(), ["x_ptr"])


PTX = """
.visible .entry _k(
	.param .u64 .ptr .global .align 1 _k_param_0,
	.param .u32 _k_param_1,
	.param .u64 _k_param_2,
	.param .u64 _k_param_3
)
{ ld.param.b64 %rd1, [_k_param_0]; }
"""


def kernel_of(ptx: str) -> Compiled:
    arguments = (("x_ptr", "pointer"), ("n", "i32"))
    return Compiled(entry="_k", capability=90, cubin=b"", ptx=ptx, arguments=arguments, threads=32, shared_bytes=0)


def test_spare_pointers_are_taken_out_of_ptx():
    assert [text.split()[-1] for text in parameters(PTX)] == [f"_k_param_{i}" for i in range(4)]
    ptx = without_spare_pointers(kernel_of(PTX))
    assert [text.split()[-1] for text in parameters(ptx)] == ["_k_param_0", "_k_param_1"]
    assert "_k_param_2" not in ptx
    assert ptx.endswith("{ ld.param.b64 %rd1, [_k_param_0]; }\n")
    with pytest.raises(ValueError, match="_k: reads _k_param_3, which nobody passes"):
        without_spare_pointers(kernel_of(PTX.replace("[_k_param_0]", "[_k_param_3]")))
