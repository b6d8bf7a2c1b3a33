"""A Ray of two workers, one of them killed; what is raised or dies there; and addresses at which nothing is."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError
from typer.main import get_command

from var_deploy.cli import app
from var_deploy.errors import EngineError, RequestError
from var_deploy.samples import on_ray
from var_deploy.samples.maker import Order, Worker
from var_deploy.samples.on_ray import Cluster


@pytest.fixture(scope="module")
def ray_of_two() -> Iterator[None]:
    """One Ray for all tests here; a run uses the one that is there."""
    with on_ray._connected(Cluster(address="local", cpus=2)):
        yield


def test_a_worker_is_killed_and_it_is_the_undisturbed_run(
    ray_of_two, tiny_bundle, assert_same_samples, tmp_path, caplog, capsys
):
    caplog.set_level(logging.INFO, "var_deploy")
    out, killed = tmp_path / "out", threading.Event()

    def kill() -> None:
        """The worker that loaded first, once some images are there: it is at work on others."""
        deadline = time.monotonic() + 60
        while len(list(out.glob("*.png"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(int(re.findall("has loaded, process ([0-9]+)", caplog.text)[0]), signal.SIGKILL)
        killed.set()

    killer = threading.Thread(target=kill)
    killer.start()
    asked = ["--count", "31", "--seed", "7", "--engine", "onnx", "--device", "cpu", "--no-cache", "--threads", "1"]
    on_two = ["--ray", "local", "--workers", "2", "--batch", "1"]
    get_command(app)(["sample", str(tiny_bundle), "--out", str(out), *asked, *on_two], standalone_mode=False)
    killer.join()
    assert killed.is_set()
    assert re.search("ray: worker [01] died; what it was making is made again", caplog.text)
    assert capsys.readouterr().out == f"{out}: 31 images, 31 of them made now\n"
    assert_same_samples(out)


def _order(bundle: Path, **load: object) -> Order:
    return Order(bundle=str(bundle), digest="f" * 64, load=load, settings={}, batch=None)


def test_what_a_worker_raises_or_dies_of_is_one_line(ray_of_two, tiny_bundle, monkeypatch):
    one = Cluster(address="local", workers=1)
    with pytest.raises(EngineError) as caught, on_ray.on_ray(_order(tiny_bundle, engine="nonsense"), one):
        pass
    assert str(caught.value) == "unknown engine 'nonsense'; known: auto, onnx, torch, tensorrt"

    class Dying(Worker):
        def start(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(on_ray, "Worker", Dying)
    monkeypatch.setattr(on_ray, "_DEATHS", 1)  # the test above starts one again
    with pytest.raises(EngineError) as caught, on_ray.on_ray(_order(tiny_bundle), one):
        pass
    assert str(caught.value).startswith("ray: worker 0 died 1 times in a row without a batch made (")


def test_what_ray_says_becomes_one_line():
    trace = "ray::Worker.start() (pid=1)\n  File ...\nZeroDivisionError: division by zero\n"
    raised = on_ray._cause(RayTaskError("start", trace, ZeroDivisionError("division by zero")), worker=3)
    assert str(raised) == "ray: worker 3 failed (ZeroDivisionError: division by zero); try the same without Ray"
    ours = RequestError("batch: too large")
    assert on_ray._cause(RayTaskError("start", trace, ours), worker=3) is ours


def _unused_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def test_an_address_at_which_nothing_is_is_refused_at_once(tiny_bundle):
    address = f"127.0.0.1:{_unused_port()}"
    with (
        pytest.raises(
            EngineError, match=f"ray: nothing answers at {address} .+; start one there with ray start --head"
        ),
        on_ray.on_ray(_order(tiny_bundle), Cluster(address=address)),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "device", "message"),
    [
        ({"address": "somewhere"}, "cpu", "ray: got 'somewhere', expected local, auto or HOST:PORT"),
        ({"address": "host:99999"}, "cpu", "ray: got 'host:99999', expected local, auto or HOST:PORT"),
        ({"address": "local"}, "cuda:1", "device: got 'cuda:1' with Ray, which gives every worker a GPU of its own"),
        ({"address": "local", "workers": 0}, "cpu", "workers: got 0, expected at least 1"),
        ({"address": "local", "gpus_per_worker": -1}, "cpu", "gpus_per_worker: got -1, expected at least 0"),
    ],
)
def test_what_no_cluster_could_do_is_refused(tiny_bundle, options, device, message):
    with pytest.raises(RequestError) as caught, on_ray.on_ray(_order(tiny_bundle, device=device), Cluster(**options)):
        pass
    assert message in str(caught.value)
