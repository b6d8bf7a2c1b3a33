"""PyTorch's own engines for many processes: the group that torchrun starts, DDP and FSDP2, whole weights again.

Every process takes an equal share of each batch, and gradients are averaged, so a run is the same, up to rounding, in
any number of processes.
"""

from __future__ import annotations

import gc
import os
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from var_deploy.config import ConfigError

from .processes import distributed, rank, world


@contextmanager
def process_group() -> Iterator[torch.device]:
    """The device of this process, within the group that torchrun describes in the environment, if it does."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= count:
            raise ConfigError(
                f"got process {number} of this machine, expected at most {count}, one per GPU; start fewer"
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        yield device
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    except BaseException as error:
        held: BaseException | None = error
        while held is not None:  # its frames, and those of what it came from, hold the model
            traceback.clear_frames(held.__traceback__)
            held = held.__context__
        raise
    finally:
        # A model in DDP has to go before the group: the last to hold it, DDP would end its threads while it holds
        # Python's lock, for which one of them may wait.
        gc.collect()
        dist.destroy_process_group()


def shared_out(batch: int, accumulate: int) -> slice:
    """The rows of a global batch that this process takes. Raises ConfigError unless all parts are of one size."""
    if batch % (world() * accumulate):
        raise ConfigError(
            f"data.batch: got {batch} images for {world()} process(es) and optimiser.accumulate {accumulate}, expected "
            f"a multiple of {world() * accumulate}; change one of them"
        )
    share = batch // world()
    return slice(rank() * share, (rank() + 1) * share)


def ddp(model: nn.Module) -> nn.Module:
    """Gradients are averaged over the processes. Buffers are not copied: what sets them keeps them alike."""
    if not distributed():
        return model
    with warnings.catch_warnings():  # from 2.13 on it has another name, which 2.11 does not know
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def fsdp(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> nn.Module:
    """Weights, gradients and optimiser state are shared out; a block's weights are whole while it runs. In place."""
    if distributed():
        # FSDP2 warns of views, for the sake of models that change outputs of their parts in place; VAR changes none
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(device.type, (world(),))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def gradients_stay(model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Around forward and backward of a part of a batch: gradients are averaged with the last part's only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def bare(model: nn.Module) -> Any:
    """The model that DDP wraps, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, which may be shared out; the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, which may be shared out: then every process has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(model: nn.Module, averaged: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain state dict with averaged weights where there are some, in the first process; the others get none of it.

    Every process has to call this.
    """
    state: dict[str, Any] = {**get_model_state_dict(model), **averaged}
    gathered: dict[str, Tensor] = {}
    for key, tensor in state.items():
        full = whole(tensor.detach())
        if rank() == 0:
            gathered[key] = full
    return gathered


def reshard(model: nn.Module) -> None:
    """Parameters are shared out again: a forward pass without a backward pass leaves some of them whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
