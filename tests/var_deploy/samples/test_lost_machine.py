"""A Ray of two nodes, one of which is gone in the middle, as when a machine is: the other makes what is left."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from ray.cluster_utils import Cluster as RayNodes

from var_deploy.samples import on_ray
from var_deploy.samples.on_ray import Cluster

NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


@pytest.fixture
def nodes() -> Iterator[tuple[RayNodes, Any]]:
    """(two nodes with a worker's room each, the one that a program does not connect to)"""
    found = RayNodes(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    second = found.add_node(**NODE)
    found.wait_for_nodes()
    yield found, second
    found.shutdown()


@pytest.mark.slow
def test_a_machine_is_lost_and_it_is_the_undisturbed_run(nodes, plan, run_sample, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "var_deploy")
    cluster, second = nodes
    many = replace(plan, count=200)  # seconds of work are left when the node goes
    losing = threading.Thread(target=cluster.remove_node, args=(second,), kwargs={"allow_graceful": False})

    def progress(done: int, total: int) -> None:
        if done == 4:
            losing.start()

    def wait_for_both(pool: on_ray._Pool) -> None:
        while len(pool._ready) < 2:
            pool._settle(deque(), None)

    monkeypatch.setattr(on_ray._Pool, "wait_until_ready", wait_for_both)
    source = partial(on_ray.on_ray, cluster=Cluster(address=cluster.address, workers=2))
    load = {"engine": "onnx", "device": "cpu", "cache": False, "threads": 1}
    out, expected = tmp_path / "out", tmp_path / "undisturbed"
    assert run_sample(out, plan=many, batch=1, load=load, source=source, progress=progress).made == 200
    losing.join()
    assert "died; what it was making is made again" in caplog.text
    run_sample(expected, plan=many)
    files = sorted(path.name for path in expected.glob("*.png"))
    assert sorted(path.name for path in out.glob("*.png")) == files
    assert [name for name in files if (out / name).read_bytes() != (expected / name).read_bytes()] == []
