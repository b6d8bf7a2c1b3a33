"""The PyTorch engine: Triton kernels and one CUDA graph per generation; on a CPU the kernels' references.

`program.py` is the file to read first: the decode loop. `engine.py` runs it for requests.
"""

from .engine import TorchEngine, torch_engine

__all__ = ["TorchEngine", "torch_engine"]
