"""The PyTorch reference: VAR, its multi-scale VQVAE, and the loops that train them.

It loads and saves published checkpoints key for key and is the oracle of every parity test: written to be read,
never optimised.
"""

from .generate import Generation, generate
from .quantizer import MultiScaleQuantizer
from .var import VAR, KVCache
from .vqvae import VQVAE

__all__ = ["VAR", "VQVAE", "Generation", "KVCache", "MultiScaleQuantizer", "generate"]
