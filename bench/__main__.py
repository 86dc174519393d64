"""`python -m bench COMMAND …`; see `bench.cli`."""

import gc
import sys

from bench.system.interrupt import ending_at_once

with ending_at_once():
    from bench.cli import main

if __name__ == "__main__":
    code = main()
    # What libraries hold would be collected for seconds.
    gc.freeze()
    sys.exit(code)
