"""Batches on the GPUs or machines of a Ray cluster: actors make PNG files, this process writes them.

So only the bundle has to be on every machine, at the same path, and what was written is known in one place. When a
worker dies Ray places another one, where there is room, and its batches go to whichever worker is free.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ..errors import EngineError, RequestError, VarDeployError
from ..version import __version__
from .maker import Order, Started, Worker
from .plan import Batch
from .run import Put, Source

log = logging.getLogger("var_deploy")

#: Batches that a worker has at a time: one that computes, one that is compressed and sent.
_IN_FLIGHT = 2
#: Times that a worker may die without a batch made in between: then it is not bad luck.
_DEATHS = 3
#: Seconds without a worker that is ready after which the user hears why nothing happens.
_PATIENCE = 30.0
#: Bytes of the store that a local Ray gets: results stay in it for moments. Ray would take a third of the memory.
_LOCAL_STORE = 256 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Where workers run, and how many."""

    address: str  #: "local" starts a Ray on this machine for the run; else of one that runs: HOST:PORT or "auto"
    workers: int | None = None  #: None: one for each share of the GPUs, or of the CPUs
    gpus_per_worker: float | None = None  #: None: 1 where the cluster has GPUs and the device is not a CPU
    cpus: int | None = None  #: of a local Ray; None: those of this machine

    def __post_init__(self) -> None:
        for field, value, least in (("workers", self.workers, 1), ("gpus_per_worker", self.gpus_per_worker, 0)):
            if value is not None and value < least:
                raise RequestError(f"{field}: got {value}, expected at least {least}")


@contextmanager
def on_ray(order: Order, cluster: Cluster) -> Iterator[Source]:
    """Workers of a cluster, until the block is left. Raises EngineError and RequestError."""
    device = str(order.load.get("device", "auto"))
    if ":" in device:
        raise RequestError(f"device: got {device!r} with Ray, which gives every worker a GPU of its own; use cuda")
    with _connected(cluster):
        gpus = _gpus_per_worker(cluster, device)
        count = cluster.workers or _default_workers(gpus, order.load.get("threads"))
        log.info("ray: %d workers with %g GPUs each", count, gpus)
        pool = _Pool(order, count, gpus)
        try:
            pool.wait_until_ready()
            yield pool
        finally:
            pool.end()


# ---- the cluster -----------------------------------------------------------------------------------------------------


@contextmanager
def _connected(cluster: Cluster) -> Iterator[None]:
    local = cluster.address == "local"
    if not local:
        _check_address(cluster.address)
    if ray.is_initialized():  # by the program that calls, which has chosen and will end it
        yield
        return
    # Read by the Ray that is started here; of a cluster that runs, whoever started it has decided.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own = dict[str, Any](num_cpus=cluster.cpus, include_dashboard=False, object_store_memory=_LOCAL_STORE)
    on_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR, **(own if local else {}))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EngineError(f"ray: cannot use {cluster.address!r} ({error}); check it with ray status") from error
    try:
        if on_main_thread:  # Ray sets its own, with another exit status
            signal.signal(signal.SIGTERM, handler)
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Refuses at once what Ray would try for two minutes. Raises RequestError and EngineError."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not separator or not host or not port.isdigit() or int(port) > 65_535:
        raise RequestError(f"ray: got {address!r}, expected local, auto or HOST:PORT, like 10.0.0.5:6379")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise EngineError(
            f"ray: nothing answers at {address} ({error.strerror or error}); start one there with ray start --head, or "
            "use --ray local"
        ) from error


def _gpus_per_worker(cluster: Cluster, device: str) -> float:
    if cluster.gpus_per_worker is not None:
        return cluster.gpus_per_worker
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    if device == "cuda" and not has_gpus:
        raise EngineError("ray: device 'cuda', but the cluster has no GPU; use cpu, or start Ray where one is")
    return 1.0 if has_gpus and device != "cpu" else 0.0


def _default_workers(gpus: float, threads: int | None) -> int:
    """As many as there are GPUs for; on CPUs one per machine, or with `threads` as many as there are cores for."""
    resources = ray.cluster_resources()
    if gpus:
        return max(1, int(resources.get("GPU", 0) / gpus))
    if threads is None:
        return max(1, sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes()))
    cores = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return max(1, sum(int(core // threads) for core in cores))


# ---- workers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Call:
    """What an actor is at."""

    worker: int
    actor: Any
    batch: Batch | None  #: None: it loads


class _Pool:
    """Actors of one order.

    An actor that is lost is not restarted by Ray but replaced: calls to it would fail until the cluster has noticed
    that its machine is gone, and later calls would wait for a new one while other workers have nothing to do.
    """

    def __init__(self, order: Order, count: int, gpus: float) -> None:
        self._order = order
        self._actor_class: Any = ray.remote(Worker).options(
            num_cpus=int(order.load.get("threads") or 1),
            num_gpus=gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=_IN_FLIGHT,
            scheduling_strategy="SPREAD",
        )
        self._actors: list[Any] = [None] * count
        self._deaths = [0] * count
        self._ready: set[int] = set()
        self._in_flight: dict[Any, _Call] = {}
        self._first: Started | None = None
        for worker in range(count):
            self._start(worker)

    @property
    def computed(self) -> Mapping[str, str]:
        assert self._first is not None, "no worker is ready"
        return {"precision": self._first.precision, "engine": self._first.engine}

    @property
    def batch(self) -> int:
        assert self._first is not None, "no worker is ready"
        return self._first.batch

    def wait_until_ready(self) -> None:
        """Until one worker has loaded; what the others find is compared with that when they have."""
        while not self._ready:
            self._settle(deque(), None)

    def run(self, batches: Iterator[Batch], put: Put) -> None:
        """Makes all batches; of a worker that dies others make them again."""
        lost: deque[Batch] = deque()
        while True:
            self._hand_out(batches, lost)
            if not lost and not any(call.batch for call in self._in_flight.values()):
                return
            self._settle(lost, put)

    def end(self) -> None:
        """Stops the workers, and with them what they are at."""
        for actor in self._actors:
            ray.kill(actor)

    def _start(self, worker: int) -> None:
        self._actors[worker] = actor = self._actor_class.remote(self._order)
        self._in_flight[actor.start.remote()] = _Call(worker, actor, None)

    def _hand_out(self, batches: Iterator[Batch], lost: deque[Batch]) -> None:
        """Batches to the workers that are free, in turn."""
        for _ in range(_IN_FLIGHT):
            for worker in sorted(self._ready):
                if sum(call.worker == worker for call in self._in_flight.values()) >= _IN_FLIGHT:
                    continue
                batch = lost.popleft() if lost else next(batches, None)
                if batch is None:
                    return
                actor = self._actors[worker]
                self._in_flight[actor.make.remote(batch)] = _Call(worker, actor, batch)

    def _settle(self, lost: deque[Batch], put: Put | None) -> None:
        """Waits for a call to end, and does what follows from it."""
        began = time.monotonic()
        while not (ended := ray.wait(list(self._in_flight), num_returns=1, timeout=_PATIENCE)[0]):
            if not self._ready:
                log.warning(
                    "ray: no worker is ready after %.0f s; ray status says what the cluster has free",
                    time.monotonic() - began,
                )
        call = self._in_flight.pop(ended[0])
        try:
            result = ray.get(ended[0])
        except RayTaskError as error:
            raise _cause(error, call.worker) from None
        except RayError as error:
            if call.batch is not None:
                lost.append(call.batch)
            if call.actor is self._actors[call.worker]:  # else it was replaced when its other call failed
                self._replace(call.worker, error)
            return
        if call.batch is None:
            self._loaded(call.worker, result)
            return
        self._deaths[call.worker] = 0
        assert put is not None, "a batch without a place for it"
        for index, png in zip(call.batch.indices, result, strict=True):
            put(index, lambda png=png: png)  # type: ignore[misc]

    def _loaded(self, worker: int, found: Started) -> None:
        where = f"ray: worker {worker} on {found.host}"
        if found.version != __version__:
            raise EngineError(f"{where} has var_deploy {found.version}, here it is {__version__}; install the same")
        self._first = first = self._first or found
        pairs = ((name, getattr(found, name), getattr(first, name)) for name in ("engine", "precision", "batch"))
        if differing := ", ".join(f"{name} {mine}, not {others}" for name, mine, others in pairs if mine != others):
            raise EngineError(
                f"{where} takes {differing} as the one on {first.host}; give engine, device, precision and batch"
            )
        log.info("%s has loaded, process %d", where, found.process)
        self._ready.add(worker)

    def _replace(self, worker: int, error: RayError) -> None:
        """Another actor for one that was lost."""
        if getattr(error, "actor_init_failed", False):
            raise EngineError(f"ray: worker {worker} does not start ({_last_line(error)}); install there what is here")
        self._ready.discard(worker)
        self._deaths[worker] += 1
        if self._deaths[worker] >= _DEATHS:
            raise EngineError(
                f"ray: worker {worker} died {_DEATHS} times in a row without a batch made ({type(error).__name__}); "
                "look at memory and disk of its machine, and at Ray's logs there"
            )
        log.warning("ray: worker %d died; what it was making is made again", worker)
        ray.kill(self._actors[worker])  # if it was only out of reach
        self._start(worker)


def _cause(error: RayTaskError, worker: int) -> Exception:
    """What was raised in the worker, without Ray's account of where."""
    if isinstance(error.cause, VarDeployError):
        return error.cause
    return EngineError(f"ray: worker {worker} failed ({_last_line(error)}); try the same without Ray")


def _last_line(error: Exception) -> str:
    """Of what Ray says, which may be a whole trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
