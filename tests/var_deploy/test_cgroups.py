"""Limits of control groups, from made-up files: v1, v2, both, containers, and whatever else may stand in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from var_deploy.cgroups import MemoryGroup, cpu_quota, memory_group

Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """`tree(cgroup, mounts, files)`: a stand-in for /proc/self; {} in a mount is where the groups lie."""

    def make(cgroup: str, mounts: list[str], files: dict[str, str]) -> Path:
        process, groups = tmp_path / "self", tmp_path / "the groups"
        process.mkdir(exist_ok=True)
        (process / "cgroup").write_text(cgroup)
        where = str(groups).replace(" ", "\\040")
        (process / "mountinfo").write_text("\n".join(mount.format(where) for mount in mounts) + "\n")
        for name, text in files.items():
            file = groups / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return process

    return make


V2 = ["25 1 0:1 / /proc rw - proc proc rw", "31 23 0:28 / {} rw,relatime shared:9 - cgroup2 cgroup2 rw"]
V1 = [
    "33 31 0:30 / {}/cpu rw - cgroup cgroup rw,cpu,cpuacct",
    "34 31 0:31 / {}/cpuset rw - cgroup cgroup rw,cpuset",
    "35 31 0:32 / {}/memory rw - cgroup cgroup rw,memory",
]
V1_OWN = "9:cpuset:/other\n5:cpu,cpuacct:/a/b\n4:memory:/a/b\n0::/a\n"
#: A container of v1 without a namespace: the mount's root is the container's group, as seen by the host.
CONTAINER = [mount.replace(" / ", " /docker/1f ", 1) for mount in V1]
NO_LIMIT = "9223372036854771712"


@pytest.mark.parametrize(
    ("cgroup", "mounts", "files", "expected"),
    [
        ("0::/a/b\n", V2, {"a/b/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", V2, {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "25000 50000\n"}, 0.5),
        ("0::/a/b\n", V2, {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "300000 100000\n"}, 3.0),
        ("0::/\n", V2, {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/../b\n", V2, {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/a\n", V2, {"a/cpu.max": "max 100000\n"}, None),
        ("0::/a\n", V2, {}, None),
        (V1_OWN, V1, {"cpu/a/b/cpu.cfs_quota_us": "250000", "cpu/a/b/cpu.cfs_period_us": "100000"}, 2.5),
        (V1_OWN, V1, {"cpu/a/b/cpu.cfs_quota_us": "-1\n", "cpu/a/b/cpu.cfs_period_us": "100000"}, None),
        (V1_OWN, V1, {"cpuset/other/cpu.cfs_quota_us": "100000", "cpuset/other/cpu.cfs_period_us": "100000"}, None),
        (V1_OWN, V1, {"cpu/a/cpu.cfs_quota_us": "1000", "cpu/a/cpu.cfs_period_us": "0"}, None),
        (V1_OWN, [*V1, *V2], {"a/cpu.max": "100000 100000"}, 1.0),
        (
            "5:cpu,cpuacct:/docker/1f\n",
            CONTAINER,
            {"cpu/cpu.cfs_quota_us": "700000", "cpu/cpu.cfs_period_us": "100000"},
            7.0,
        ),
        ("0::/a\n", V2, {"a/cpu.max": "lots of it"}, None),
        ("0::/a\n", V2, {"a/cpu.max": "5"}, None),
        ("", V2, {"cpu.max": "100000 100000"}, None),
        ("no colons\n::\n0::/a", ["", "- -", "1 2 3 4 - cgroup2 x y", *V2], {"a/cpu.max": "100000 100000"}, 1.0),
    ],
)
def test_cpu_quota(tree, cgroup, mounts, files, expected):
    assert cpu_quota(tree(cgroup, mounts, files)) == expected


@pytest.mark.parametrize(
    ("cgroup", "mounts", "files", "expected"),
    [
        (
            "0::/a/b\n",
            V2,
            {
                "a/b/memory.max": "max\n",
                "a/b/memory.current": "70\n",
                "a/memory.max": "1000\n",
                "a/memory.current": "600\n",
                "a/memory.stat": "anon 300\nfile 290\ninactive_file 100\nactive_file 150\n",
            },
            MemoryGroup(limit=1000, used=350),
        ),
        (  # the tighter of two
            "0::/a/b\n",
            V2,
            {
                "a/b/memory.max": "5000",
                "a/b/memory.current": "100",
                "a/memory.max": "9000",
                "a/memory.current": "8500",
            },
            MemoryGroup(limit=9000, used=8500),
        ),
        (
            V1_OWN,
            V1,
            {
                "memory/a/b/memory.limit_in_bytes": "4096",
                "memory/a/b/memory.usage_in_bytes": "2000",
                "memory/a/b/memory.stat": "active_file 7\ntotal_inactive_file 500\ntotal_active_file 1000\n",
                "memory/a/memory.limit_in_bytes": NO_LIMIT,
                "memory/a/memory.usage_in_bytes": "2000",
            },
            MemoryGroup(limit=4096, used=500),
        ),
        (V1_OWN, V1, {"memory/memory.limit_in_bytes": NO_LIMIT, "memory/memory.usage_in_bytes": "1"}, None),
        ("0::/a\n", V2, {"a/memory.max": "1000"}, None),  # what is used is not told
        ("0::/a\n", V2, {"a/memory.max": "-5", "a/memory.current": "1"}, None),
        ("0::/a\n", V2, {}, None),
    ],
)
def test_memory_group(tree, cgroup, mounts, files, expected):
    assert memory_group(tree(cgroup, mounts, files)) == expected


def test_a_group_beyond_its_limit_leaves_nothing():
    assert MemoryGroup(limit=10, used=30).free == 0


def test_a_system_that_tells_nothing_limits_nothing(tmp_path):
    assert cpu_quota(tmp_path / "none") is None
    assert memory_group(tmp_path / "none") is None


TEXT = st.text(alphabet="0:/,-. \nabcgroup2memoryx\\40\0", max_size=60)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cgroup=TEXT, mounts=TEXT, quota=TEXT)
def test_garbage_is_no_limit_and_no_crash(tree, cgroup, mounts, quota):
    process = tree(cgroup, [mounts.replace("{", "").replace("}", ""), *V2], {"cpu.max": quota, "memory.max": quota})
    found = cpu_quota(process)
    assert found is None or found > 0
    assert memory_group(process) is None  # nothing says what is used


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(quota=st.integers(1, 10**9), period=st.integers(1, 10**6), levels=st.integers(0, 4))
def test_a_quota_is_found_at_any_level_above(tree, quota, period, levels):
    own = "/" + "/".join("abcd")
    at = "/".join("abcd"[:levels])
    for depth in range(5):
        tree("", [], {f"{'/'.join('abcd'[:depth])}/cpu.max".lstrip("/"): "max 100000"})
    process = tree(f"0::{own}\n", V2, {f"{at}/cpu.max".lstrip("/"): f"{quota} {period}"})
    assert cpu_quota(process) == quota / period
