import resource
import subprocess
import sys
from subprocess import PIPE

import pytest

from bench.measure import published

# What counting all published rows may take, in seconds of a processor and bytes.
SECONDS, BYTES = 30, 3e9


@pytest.mark.slow
def test_parameters_and_both_counts_of_the_published_rows(benchmark):
    def count():
        published._count.cache_clear()
        return list(published.recount())

    rows = benchmark.pedantic(count, rounds=1)
    assert len(rows) == 25


@pytest.mark.slow
def test_counting_the_published_rows_is_cheap():
    # The peak of the process itself: what getrusage says is its parent's, where that is larger.
    code = """
import re
from bench.measure import published
assert len(list(published.recount())) == 25
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    kibibytes = int(subprocess.run([sys.executable, "-c", code], check=True, stdout=PIPE).stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Time of a processor: what else the machine does meanwhile is not counted.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS
    assert 1024 * kibibytes < BYTES
