import platform

import pytest

from tests.processes import python

FAULTS = """
import resource, torch
from bench.config.schema import RunConfig
from bench.system.devices import single_fabric
single_fabric(RunConfig(row="full", device="cpu"))
def touch():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**26).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# The heap settles in a few calls.
print(min(touch() for _ in range(8)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators differ")
def test_a_cpu_keeps_the_memory_of_freed_tensors(monkeypatch):
    for name in ("LD_PRELOAD", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)

    pages = 2**28 // 4096
    assert int(python("-c", FAULTS)) < pages / 100
    # As it is where the environment has chosen.
    assert int(python("-c", FAULTS, BENCH_ALLOCATOR="system")) > pages / 2
