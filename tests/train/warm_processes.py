"""A server that starts `python -m var_train …` again and again, without its seconds of imports each time.

It imports all, then forks one process per line of its input (`conftest.WarmProcesses` writes them). Such a process goes
through the same entry point and comes to the same end as one that was started anew, in a session of its own.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time

import torch._dynamo  # noqa: F401 — PyTorch imports it late
from torch.utils.tensorboard import SummaryWriter  # noqa: F401 — so does the trainer

import var_train.command

RUNS = 1000  #: the answer about a process that has not ended


def serve() -> None:
    """Answers every line with a number; returns in the processes that it starts, and ends the server at last."""
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = status_of(request["wait"], request["seconds"])
            running -= {request["wait"]} if answer != RUNS else set()
        else:
            answer = os.fork()
            if answer == 0:
                become(**request)
                return
            running.add(answer)
        print(answer, flush=True)
    for pid in running:
        os.killpg(pid, signal.SIGKILL)
    os._exit(0)


def status_of(pid: int, seconds: float) -> int:
    """The exit status of a process that ends within some seconds, negative for a signal; else `RUNS`."""
    deadline = time.monotonic() + seconds
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() >= deadline:
            return RUNS
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(ended[1])


def become(arguments: list[str], environment: dict[str, str], output: str) -> None:
    """This process is from now on the one that was asked for."""
    os.setsid()
    os.environ.update(environment)
    sys.argv = ["var_train", *arguments]
    for descriptor, name, mode in ((0, os.devnull, "r"), (1, f"{output}.out", "w"), (2, f"{output}.err", "w")):
        with open(name, mode, encoding="utf-8") as stream:
            os.dup2(stream.fileno(), descriptor)


if __name__ == "__main__":
    gc.collect()
    gc.freeze()  # else every process would copy all this memory when it looks for garbage
    serve()
    var_train.command.main()
