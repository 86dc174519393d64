"""The harness: one run from configuration to record."""

import os

# Before torch starts its threads: how long a thread spins while it waits for the others. By default
# it is so long that any other busy process makes a step take many times as long; CHANGELOG.md says
# what was measured.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
