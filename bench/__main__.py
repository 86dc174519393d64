"""`python -m bench COMMAND …`; see `bench.cli`."""

import sys

from bench.system.interrupt import ending_at_once

with ending_at_once():
    from bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
