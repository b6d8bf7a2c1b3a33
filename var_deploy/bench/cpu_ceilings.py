"""This machine's matrix products → operations per second in three arithmetics, and how near a model comes to them.

A product is sampled between the repeats of a benchmark, so that ceiling and model saw the same machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EngineError
from ..precision import Precision
from .floor import Floor
from .rows import Spread

#: x[M, K]·w[K, N] of every product: d16's `fc1` on two images' largest scales under guidance.
M, K, N = 512, 1024, 4096
WEIGHT_MAX = 63  # of the 8-bit weights that a bundle has
SAMPLE_SECONDS = 0.2


#: As the kernel calls them: without instructions for bf16 or 8 bits such products take longer than others would.
INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "amx_bf16",
    "avx_vnni",
    "avx512_vnni",
    "amx_int8",
    "bf16",
    "asimddp",
    "i8mm",
)


def instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Which of them the CPU has; none where the system does not tell."""
    if not cpuinfo.is_file():
        return []
    lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))]
    known = set(lines[0].split()) if lines else set()
    return [name for name in INSTRUCTIONS if name in known]


class Arithmetic(StrEnum):
    """Operands of a product."""

    FLOAT32 = "float32"
    BF16 = "bf16"
    INT8 = "u8×s8"


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """One matrix product, timed whenever it is sampled."""

    arithmetic: Arithmetic
    how: str
    run: Callable[[], object]
    seconds: list[float] = field(default_factory=list)  #: of every call so far

    def sample(self, limit_seconds: float = SAMPLE_SECONDS) -> None:
        """Runs it once to wake what sleeps, then for so long, at least once."""
        self.run()
        begin = time.perf_counter()
        while True:
            start = time.perf_counter()
            self.run()
            end = time.perf_counter()
            self.seconds.append(end - start)
            if end - begin >= limit_seconds:
                return

    def record(self) -> dict[str, Any]:
        """Median rate over the samples since the last record, which starts anew."""
        spread = Spread.of(self.seconds)
        self.seconds.clear()
        return {"how": self.how, "flops_per_second": 2 * M * K * N / spread.median, "seconds": asdict(spread)}


def products(threads: int) -> list[Product]:
    """The three products, by the libraries that multiply like that here. Raises EngineError."""
    try:
        import onnx  # noqa: F401  what builds the graphs
        import torch
    except ImportError as error:
        raise EngineError(f"the ceilings need {error.name}; pip install 'var-deploy[export]'") from error
    torch.set_num_threads(threads)
    random = np.random.default_rng(0)
    x_MK, w_KN = random.standard_normal((M, K), np.float32), random.standard_normal((K, N), np.float32)
    bytes_MK = random.integers(0, 256, (M, K), np.uint8)
    integers_KN = random.integers(-WEIGHT_MAX, WEIGHT_MAX + 1, (K, N), np.int8)
    # Weights as a model has them: without bf16 instructions the other layout takes thirty times as long.
    a_MK, b_NK = torch.from_numpy(x_MK).bfloat16(), torch.from_numpy(w_KN.T.copy()).bfloat16()
    shape = f"{M}×{K}×{N}"
    return [
        Product(
            arithmetic=Arithmetic.FLOAT32,
            how=f"ONNX Runtime, MatMul {shape}",
            run=_onnx_product("MatMul", x_MK, w_KN, threads),
        ),
        Product(
            arithmetic=Arithmetic.BF16,
            how=f"PyTorch, linear {shape}",
            run=lambda: torch.nn.functional.linear(a_MK, b_NK),
        ),
        Product(
            arithmetic=Arithmetic.INT8,
            how=f"ONNX Runtime, MatMulInteger {shape}, weights within ±{WEIGHT_MAX}",
            run=_onnx_product("MatMulInteger", bytes_MK, integers_KN, threads),
        ),
    ]


def _onnx_product(operator: str, x_MK: np.ndarray, w_KN: np.ndarray, threads: int) -> Callable[[], object]:
    """x·w with a constant w, as a session of its own, run as the engine runs its sessions."""
    import onnx
    import onnxruntime as ort

    kinds = onnx.helper.np_dtype_to_tensor_dtype
    result = onnx.TensorProto.FLOAT if operator == "MatMul" else onnx.TensorProto.INT32
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(operator, ["x", "w"], ["y"])],
        "product",
        [onnx.helper.make_tensor_value_info("x", kinds(x_MK.dtype), x_MK.shape)],
        [onnx.helper.make_tensor_value_info("y", result, (len(x_MK), w_KN.shape[1]))],
        [onnx.numpy_helper.from_array(w_KN, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", x_MK)
    binding.bind_output("y")
    return lambda: session.run_with_iobinding(binding)


def counted_flops(counted: Floor, vocab_size: int, width: int) -> dict[str, int]:
    """Operations of one generation by part: blocks and AdaLN, attention, head, decoder."""
    head = sum(2 * scale.rows * scale.tokens * width * vocab_size for scale in counted.scales)
    return {
        "blocks": sum(scale.product_flops for scale in counted.scales) - head + counted.condition.flops,
        "attention": sum(scale.attention_flops for scale in counted.scales),
        "head": head,
        "decode": counted.decoder_flops,
    }


#: Precision → arithmetic of the parts that `counted_flops` tells apart, where it is not float32. Autocast leaves the
#: head in float32, as published.
ARITHMETIC = {
    Precision.BF16: dict.fromkeys(("blocks", "attention", "decode"), Arithmetic.BF16),
    Precision.INT8: dict.fromkeys(("blocks", "head"), Arithmetic.INT8),
}


def shares(
    flops: dict[str, int],
    precision: Precision,
    rates: dict[str, float],
    transformer_seconds: float,
    decoder_seconds: float,
) -> dict[str, float]:
    """Time that the operations take at the ceilings over the time taken, for "transformer" and "decode"."""
    chosen = ARITHMETIC.get(precision, {})

    def least(parts: Sequence[str]) -> float:
        return sum(flops[part] / rates[chosen.get(part, Arithmetic.FLOAT32)] for part in parts)

    return {
        "transformer": least(("blocks", "attention", "head")) / transformer_seconds,
        "decode": least(("decode",)) / decoder_seconds,
    }
