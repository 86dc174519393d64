import os

import pytest

from bench import cgroups, files, record


def of_v1(quota, throttled=0, period=100_000):
    stat = f"nr_periods 9\nnr_throttled {throttled}\nthrottled_time 1"
    files = {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": period, "cpu.stat": stat}
    return {name: str(text) for name, text in files.items()}


def of_v2(limit, throttled=0):
    return {"cpu.max": limit, "cpu.stat": f"usage_usec 5\nnr_throttled {throttled}"}


@pytest.mark.parametrize(
    ("line", "groups", "quota", "throttled"),
    [
        ("2:cpu,cpuacct:/", {"cpu": of_v1(-1)}, None, 0),
        ("2:cpu:/a", {"cpu/a": of_v1(25_000, 3), "cpu": of_v1(-1)}, 0.25, 3),
        # Of several, that of the least counts, be it the process's own or one above it.
        ("2:cpu:/a/b", {"cpu/a/b": of_v1(-1), "cpu/a": of_v1(75_000, 2, 50_000)}, 1.5, 2),
        ("2:cpu:/a/b", {"cpu/a/b": of_v1(50_000, 1), "cpu/a": of_v1(150_000, 2)}, 0.5, 3),
        # A container sees its own group as the topmost one.
        ("2:cpu:/docker/1f", {"cpu": of_v1(25_000, 3)}, 0.25, 3),
        ("2:cpu:/../x", {"cpu": of_v1(-1)}, None, 0),
        ("0::/", {".": of_v2("max 100000")}, None, 0),
        ("0::/a.slice/b", {"a.slice/b": of_v2("max 100000", 4), "a.slice": of_v2("150000 100000")},
         1.5, 4),
        ("0::/a", {"a": {"cpu.stat": "usage_usec 5"}}, None, None),
        ("2:memory:/a", {"cpu/a": of_v1(25_000, 3)}, None, None),
        ("nothing known", {}, None, None),
    ],
)  # fmt: skip
def test_quota_of_the_own_group_and_those_above(cgroup, line, groups, quota, throttled):
    cgroup(line, groups)
    assert cgroups.quota() == quota
    assert cgroups.throttled() == throttled


def test_without_groups_there_is_no_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroups, "_OF_PROCESS", tmp_path / "missing")
    assert cgroups.quota() is None
    assert cgroups.throttled() is None


@pytest.mark.parametrize(
    ("limit", "usable", "whole"),
    [("max", 4, 4), (25, 0.25, 1), (33.3333, 0.333, 1), (200, 2, 2), (250, 2.5, 2), (900, 4, 4)],
)
def test_usable_cores_are_what_the_quota_leaves(cgroup, monkeypatch, limit, usable, whole):
    there = set(range(4))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: there, raising=False)
    allowed = limit if limit == "max" else int(1000 * limit)
    cgroup("0::/", {".": of_v2(f"{allowed} 100000")})
    found = record.environment(command="", device="cpu")["cores"]
    assert (found, type(found)) == (usable, type(usable))
    assert (files.cores(), type(files.cores())) == (whole, int)


def test_memory_is_what_the_tightest_group_leaves(cgroup):
    own = {"memory.max": "9000", "memory.current": "2000"}
    above = {"memory.max": "5000", "memory.current": "4000"}
    cgroup("0::/a/b", {"a/b": own, "a": above, ".": {"memory.max": "max"}})
    assert cgroups.memory_left() == 1000
    assert record.environment(command="", device="cpu")["memory_bytes"] == 5000


def test_memory_of_v1_is_known_too(cgroup):
    own = {"memory.limit_in_bytes": "9000", "memory.usage_in_bytes": "2000"}
    none = {"memory.limit_in_bytes": "9223372036854771712", "memory.usage_in_bytes": "8000"}
    cgroup("3:memory:/a", {"memory/a": own, "memory": none})
    assert (cgroups.memory_left(), cgroups.memory_limit()) == (7000, 9000)
