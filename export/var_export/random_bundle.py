"""Model sizes → a bundle in memory with random weights made on the spot, so that a benchmark carries no files.

Weights are slices of one pool of random numbers, scaled so that activations keep their size: billions of them take
seconds. They lie in no file, so the torch engine runs them and no other. Axes as in `deploy_view.py`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch

from var_deploy.bundle import Bundle, Manifest, SamplingDefaults
from var_deploy.config import VARConfig, VQVAEConfig
from var_deploy.engines import EngineOptions, engine_for
from var_deploy.errors import EngineError, RequestError
from var_deploy.pipeline import Pipeline
from var_deploy.precision import Precision
from var_deploy.signature import graph_specs
from var_train import VAR, VQVAE
from var_train.checkpoint import CheckpointPair
from var_train.presets import PRESETS, preset_configs

from .deploy_view import deploy_weights

#: Odd, so that the rows of a matrix larger than the pool do not repeat.
POOL_SIZE = (1 << 24) + 43


@dataclass(frozen=True, slots=True)
class RandomBundle(Bundle):
    """What an engine reads of a bundle, for a model that was never trained; `path` is its name."""

    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    @classmethod
    def of(cls, var: VARConfig, vqvae: VQVAEConfig, name: str = "random weights") -> RandomBundle:
        """Weights for any two configurations that fit each other."""
        with torch.device("meta"):  # names and shapes, without memory
            pair = CheckpointPair(var, vqvae, VAR(var).state_dict(), VQVAE(vqvae).state_dict())
            shapes = {key: weight.shape for key, weight in deploy_weights(pair).items()}
        manifest = Manifest(
            var=var,
            vqvae=vqvae,
            precision=Precision.FP32,
            graphs=graph_specs(var, vqvae),
            sampling=SamplingDefaults(),
            class_names=None,
            license="random weights",
            source={"random weights": name},
            files={},
        )
        return cls(Path(name), manifest, shapes)

    @classmethod
    def of_preset(cls, preset: str) -> RandomBundle:
        """A published size. Raises RequestError."""
        if preset not in PRESETS:
            raise RequestError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
        return cls.of(*preset_configs(preset), name=f"random {preset}")

    def file(self, name: str) -> Path:
        """There is none. Raises EngineError."""
        raise EngineError(
            f"{self.path}: has no {name}, its weights are made in memory; use engine 'torch', or export a checkpoint"
        )

    def weight(self, name: str) -> np.ndarray:
        """float32; the same for the same name and shape, in every process."""
        return random_weight(name, self.shapes[name])

    def weight_sizes(self) -> dict[str, int]:
        return {name: math.prod(shape) for name, shape in self.shapes.items()}


def random_pipeline(
    preset: str,
    *,
    engine: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    decode_slice: int | None = None,
    compile_decoder: bool = False,
) -> Pipeline:
    """A published size, ready to run; options as of `var_deploy.load`. Raises RequestError and EngineError."""
    bundle = RandomBundle.of_preset(preset)
    if engine == "onnx":
        raise EngineError("engine 'onnx' runs graphs from files, random weights have none; use engine 'torch'")
    options = EngineOptions(precision=precision, decode_slice=decode_slice, compile_decoder=compile_decoder)
    return Pipeline(bundle, engine_for(bundle, "torch" if engine == "auto" else engine, device, options))


def random_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One weight of the deploy layout, by the rule that `var_train.presets.randomise` has for checkpoints."""
    leaf = name.rsplit(".", 1)[-1]
    x = _slice_of_pool(zlib.crc32(name.encode()) % POOL_SIZE, math.prod(shape)).reshape(shape)
    if leaf == "q_scale":
        return np.exp(math.log(4.0) + 0.1 * x, dtype=np.float32)
    if name == "quantize.phi.weight":  # φ(x) = 0.5·x + 0.5·conv(x)
        x *= 0.5 / math.sqrt(math.prod(shape[1:]))
        x[np.arange(len(x)), np.arange(len(x)) % shape[1], 1, 1] += 0.5
    elif "norm" in name and leaf == "weight":
        x *= 0.1
        x += 1
    elif leaf == "bias":
        x *= 0.1
        _fold_in(name, x)
    elif "emb" in name or "position" in leaf or leaf == "ada_gss":
        x *= 0.3
    else:  # [K, N] matrices, and convolutions [N, K, 3, 3]
        x *= 1 / math.sqrt(shape[0] if len(shape) == 2 else math.prod(shape[1:]))
    return x


def _fold_in(name: str, bias_N: np.ndarray) -> None:
    """What the deploy view folds into biases: the 1 of (1 + scale), and that keys have none."""
    parts = {"head_nm.ada_lin": (2, slice(0, 1)), "ada_lin": (6, slice(2, 4))}
    for layer, (count, scales) in parts.items():
        if name.removesuffix(".bias").endswith(layer):
            bias_N.reshape(count, -1)[scales] += 1
            return
    if name.endswith("attn.qkv.bias") and name.startswith("blocks."):
        bias_N.reshape(3, -1)[1] = 0


def _slice_of_pool(begin: int, size: int) -> np.ndarray:
    """A copy of `size` numbers of the pool from `begin` on, round and round."""
    pool, out, done = _pool(), np.empty(size, dtype=np.float32), 0
    while done < size:
        count = min(size - done, len(pool) - begin)
        out[done : done + count] = pool[begin : begin + count]
        done, begin = done + count, 0
    return out


@cache
def _pool() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(POOL_SIZE, dtype=np.float32)
