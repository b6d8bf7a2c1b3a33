"""The state of a training run ↔ flat tensors and a JSON record: all that a run needs to go on bit for bit.

Tensors keep their sharding, so a state saved by N processes fills the model of M. What differs between processes (the
random generators) has a key for each; everything else is the same in all of them, or a shard of the same.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from var_deploy.errors import CheckpointError

Tensors = dict[str, Tensor]


@dataclass(kw_only=True, slots=True)
class RunState:
    """What a checkpoint holds. Loading fills it in place.

    Models are plain, compiled, wrapped in DDP or sharded by `fully_shard`; optimizers have the name of the model whose
    parameters they change. `ema` holds averaged weights by name, sharded like the weights. `values` is anything that
    JSON holds (step, data position, schedule, configuration, metrics), the same in all processes: the first one's is
    saved. Loading replaces it; tuples come back as lists.
    """

    models: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    ema: Tensors = field(default_factory=dict)
    scaler: GradScaler | None = None
    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := self.optimizers.keys() - self.models.keys():
            raise ValueError(f"optimizers: got {sorted(unknown)}, expected names of models: {sorted(self.models)}")


def checkpoint_bytes(state: RunState) -> int:
    """Bytes of one checkpoint of all processes, before the first step too: Adam's two averages are counted."""
    sizes = [_bytes(tensor) for model in state.models.values() for tensor in get_model_state_dict(model).values()]
    sizes += [_bytes(tensor) for tensor in state.ema.values()]
    for optimizer in state.optimizers.values():
        sizes += [2 * _bytes(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return sum(sizes)


def saved_form(state: RunState, rank: int) -> tuple[Tensors, dict[str, Any]]:
    """(tensors that this process holds or shares in, record for JSON). The tensors are the state's own, no copies."""
    tensors = _weights(state)
    groups: dict[str, Any] = {}
    for name, optimizer in state.optimizers.items():
        groups[name] = None
        if optimizer.state:  # asking one without state would make it step, and count that step
            held: Any = get_optimizer_state_dict(state.models[name], optimizer)
            tensors |= _moments(name, held)
            groups[name] = held["param_groups"]
    tensors[generators_key(rank)] = generators_now()
    # the safetensors format knows dense row-major tensors only, and channels-last weights are not
    dense = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    scaler = state.scaler.state_dict() if state.scaler is not None else {}
    return dense, {"values": state.values, "optimizers": groups, "scaler": scaler}


class Filling:
    """A state that is about to be filled: `tensors` are to be read, in place; then `finish` sets what is no tensor.

    Raises CheckpointError with all differences where the checkpoint does not fit the state.
    """

    def __init__(self, state: RunState, record: Mapping[str, Any], stored: Metadata, rank: int) -> None:
        self._state, self._record, self._rank = state, record, rank
        known: dict[str, Any] = stored.state_dict_metadata
        expected = _weights(state)
        problems: list[str] = []
        self._optimizers: dict[str, Any] = {}
        for name, optimizer in state.optimizers.items():
            optimizer.zero_grad(set_to_none=True)  # with gradients PyTorch would not make the state that is filled
            if (groups := record["optimizers"].get(name)) is None:
                continue
            held: Any = get_optimizer_state_dict(state.models[name], optimizer)
            if [group["params"] for group in held["param_groups"]] != [group["params"] for group in groups]:
                problems.append(f"the groups of optimizer {name} hold other parameters")
            expected |= _keep_stored(name, held, known)
            held["param_groups"] = [_with_tuples(group) for group in groups]
            self._optimizers[name] = held
        stored_keys = {key for key in known if not key.startswith(_GENERATORS)}
        problems += [f"missing {key} {tuple(expected[key].shape)}" for key in sorted(expected.keys() - stored_keys)]
        problems += [f"unexpected {key} {tuple(known[key].size)}" for key in sorted(stored_keys - expected.keys())]
        problems += [
            f"{key} is {_form(known[key])}, expected {tuple(expected[key].shape)} {expected[key].dtype}"
            for key in sorted(expected.keys() & stored_keys)
            if _form(known[key]) != f"{tuple(expected[key].shape)} {expected[key].dtype}"
        ]
        if state.scaler is not None and state.scaler.is_enabled() and not record["scaler"]:
            problems.append("it was saved without a gradient scaler")
        if problems:
            raise CheckpointError(
                f"does not fit this run, {len(problems)} difference(s): {'; '.join(problems[:8])}; "
                "continue with the configuration that it was made with, or choose another directory"
            )
        self.tensors = expected
        key = generators_key(rank)
        #: Whether this process finds its own random generators; else it keeps those that it was started with.
        self.has_generators = key in known
        if self.has_generators:
            self.tensors[key] = torch.empty(known[key].size, dtype=torch.uint8)

    def finish(self) -> None:
        """To be called once `tensors` are read."""
        state = self._state
        for name, model in state.models.items():
            set_model_state_dict(
                model, {key: self.tensors[f"models.{name}.{key}"] for key in get_model_state_dict(model)}
            )
        for name, optimizer in state.optimizers.items():
            if name in self._optimizers:
                options = StateDictOptions(strict=False)  # a parameter that has had no gradient has no state
                set_optimizer_state_dict(state.models[name], optimizer, self._optimizers[name], options=options)
            else:
                optimizer.state.clear()
        if state.scaler is not None and state.scaler.is_enabled():
            state.scaler.load_state_dict(self._record["scaler"])
        state.values = self._record["values"]
        if self.has_generators:
            set_generators(self.tensors[generators_key(self._rank)])


_GENERATORS = "generators."


def generators_key(rank: int) -> str:
    return f"{_GENERATORS}{rank:05d}"


def generators_now() -> Tensor:
    """The generators of this process (Python, NumPy, PyTorch's of the CPU and of its CUDA device) as bytes of JSON."""
    algorithm, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    content = {
        "python": random.getstate(),
        "numpy": [algorithm, np.asarray(words).tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else None,
    }
    return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)


def set_generators(saved: Tensor) -> None:
    """Continues the sequences of `generators_now`."""
    content = json.loads(saved.numpy().tobytes())
    version, words, gauss = content["python"]
    random.setstate((version, tuple(words), gauss))
    algorithm, words, position, has_gauss, cached = content["numpy"]
    np.random.set_state((algorithm, np.array(words, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes_tensor(content["torch"]))
    if content["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes_tensor(content["cuda"]))


def _bytes_tensor(digits: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(digits), dtype=torch.uint8)


def _weights(state: RunState) -> Tensors:
    tensors: dict[str, Any] = {
        f"models.{name}.{key}": tensor
        for name, model in state.models.items()
        for key, tensor in get_model_state_dict(model).items()
    }
    return tensors | {f"ema.{key}": tensor for key, tensor in state.ema.items()}


def _moments(name: str, held: Mapping[str, Any]) -> Tensors:
    return {
        f"optimizers.{name}.{parameter}.{key}": tensor
        for parameter, entries in held["state"].items()
        for key, tensor in entries.items()
    }


def _keep_stored(name: str, held: dict[str, Any], stored: Mapping[str, Any]) -> Tensors:
    """Leaves only the stored part of a new optimizer's state, and returns its tensors by their stored names.

    A parameter that had no gradient yet has no state.
    """
    held["state"] = {
        parameter: entries
        for parameter, entries in held["state"].items()
        if any(key in stored for key in _moments(name, {"state": {parameter: entries}}))
    }
    return _moments(name, held)


def _with_tuples(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group read from JSON, which has no tuples: AdamW's `betas` were one."""
    return {key: tuple(value) if isinstance(value, list) and key != "params" else value for key, value in group.items()}


def _form(stored: TensorStorageMetadata) -> str:
    return f"{tuple(stored.size)} {stored.properties.dtype}"


def _bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()  # of a sharded tensor: of the whole
