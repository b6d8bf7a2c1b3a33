"""How many threads compute: affinity, quota and cores, and what is said about it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from var_deploy import cpus
from var_deploy.cpus import UsableCpus, physical_cores, usable_cpus


@pytest.mark.parametrize(
    ("found", "most", "threads", "reason"),
    [
        (UsableCpus(cpus=6, cores=6, quota=None), 6, 6, "6 cores by affinity"),
        (UsableCpus(cpus=1, cores=1, quota=None), 1, 1, "1 core by affinity"),
        (
            UsableCpus(cpus=16, cores=8, quota=None),
            16,
            8,
            "8 cores of 16 CPUs: a core's second thread adds no multipliers",
        ),
        (UsableCpus(cpus=16, cores=8, quota=12.0), 12, 8, "8 cores of 16 CPUs: a core's second thread adds no m"),
        (UsableCpus(cpus=16, cores=8, quota=2.9), 2, 2, "the control group allows 2.9 of 16 CPUs"),
        (UsableCpus(cpus=4, cores=None, quota=None), 4, 4, "4 CPUs, whose cores are not known"),
        (UsableCpus(cpus=4, cores=None, quota=0.25), 1, 1, "the control group allows 0.25 of 4 CPUs"),
        (UsableCpus(cpus=2, cores=2, quota=64.0), 2, 2, "2 cores by affinity"),
    ],
)
def test_threads_and_their_reason(found, most, threads, reason):
    assert (found.most, found.threads) == (most, threads)
    assert found.reason.startswith(reason)


def _topology(directory: Path, siblings: dict[int, str]) -> Path:
    for cpu, text in siblings.items():
        (directory / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (directory / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(text)
    return directory


@pytest.mark.parametrize(
    ("siblings", "usable", "cores"),
    [
        ({0: "0\n", 1: "1\n"}, {0, 1}, 2),
        ({0: "0,4\n", 1: "1,5\n", 4: "0,4\n", 5: "1,5\n"}, {0, 1, 4, 5}, 2),
        ({0: "0-1\n", 1: "0-1\n", 2: "2-3\n", 3: "2-3\n"}, {1, 2, 3}, 2),
        ({0: "0,4\n", 4: "0,4\n"}, {4}, 1),
        ({0: "0\n"}, {0, 1}, None),
        ({0: "", 1: "1\n"}, {0, 1}, None),
        ({0: "first\n", 1: "1\n"}, {0, 1}, None),
    ],
)
def test_physical_cores(tmp_path, siblings, usable, cores):
    assert physical_cores(usable, _topology(tmp_path, siblings)) == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_affinity_counts(monkeypatch):
    whole = os.sched_getaffinity(0)
    monkeypatch.setattr(cpus, "cpu_quota", lambda: None)
    os.sched_setaffinity(0, {min(whole)})
    try:
        one = usable_cpus()
    finally:
        os.sched_setaffinity(0, whole)
    assert (one.cpus, one.threads) == (1, 1)
    assert usable_cpus().cpus == len(whole)


def test_a_system_without_affinity_counts_its_cpus(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    monkeypatch.setattr(cpus, "physical_cores", lambda found: None if found == set(range(5)) else 0)
    monkeypatch.setattr(cpus, "cpu_quota", lambda: 3.5)
    assert usable_cpus() == UsableCpus(cpus=5, cores=None, quota=3.5)
