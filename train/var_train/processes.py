"""Rank, number and agreement of the processes of a run; without torch.distributed it is one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if distributed() else 0


def world() -> int:
    return dist.get_world_size() if distributed() else 1


def by_first_process(action: Callable[[], T]) -> T:
    """Result of an action of the first process, in all of them; so is its error, or the others would wait forever."""
    outcome: list[Any] = [None, None]  # result, error
    if rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    if distributed():
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def merged_dicts(action: Callable[[], dict[str, T]]) -> dict[str, T]:
    """The dicts that the processes' actions give, as one, in all of them; so is the first error."""
    outcome: tuple[dict[str, T], Exception | None]
    try:
        outcome = action(), None
    except Exception as error:
        outcome = {}, error
    outcomes = [outcome]
    if distributed():
        outcomes = [outcome] * world()
        dist.all_gather_object(outcomes, outcome)
    merged: dict[str, T] = {}
    for part, failure in outcomes:
        if failure is not None:
            raise failure
        merged |= part
    return merged


def average_over_processes(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes its mean over all processes, in place."""
    if distributed():
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor.div_(world())


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if distributed():
        dist.all_reduce(values)
    return values


def any_process(flag: bool) -> bool:
    """Whether the flag is set in one of the processes; a number of the CPU, so no device waits for it."""
    if not distributed():
        return flag
    raised = torch.tensor(int(flag))
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised)
