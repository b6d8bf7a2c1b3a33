"""What importing the runtime costs and what it leaves alone, in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = ["torch", "onnx", "onnxruntime", "onnx_ir", "triton", "tensorrt", "var_train", "var_export", "var_kernels"]


def _fresh(code: str) -> object:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def test_importing_takes_under_half_a_second():
    # Processor time, which other work on the machine does not inflate; nothing here waits for anything but the disk.
    code = "import time; begin = time.process_time(); import var_deploy; print(time.process_time() - begin)"
    assert min(_fresh(code) for _ in range(3)) < 0.5


def test_importing_loads_no_engine_and_no_trainer():
    code = f"import json, sys; import var_deploy; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    assert _fresh(code) == []


def test_the_command_line_loads_no_engine_until_a_command_runs():
    code = f"import json, sys; import var_deploy.cli; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    assert _fresh(code) == []


def test_generating_needs_neither_torch_nor_onnx(tiny_bundle):
    code = f"""
import json, sys
for name in ("torch", "onnx", "onnx_ir", "var_train", "var_export"):
    sys.modules[name] = None  # importing it raises ImportError
import var_deploy
tokens = var_deploy.load({str(tiny_bundle)!r}).generate([1], smooth=True).tokens
print(json.dumps([t.shape for t in tokens]))
"""
    assert _fresh(code) == [[1, 1], [1, 4], [1, 9], [1, 16]]


def test_the_public_names_are_there():
    import var_deploy

    for name in var_deploy.__all__:
        assert getattr(var_deploy, name) is not None
    errors = [getattr(var_deploy, name) for name in var_deploy.__all__ if name.endswith("Error")]
    assert all(issubclass(error, var_deploy.VarDeployError) for error in errors)
