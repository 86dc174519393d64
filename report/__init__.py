"""Records to tables, plots and pages."""

import os

try:
    import matplotlib as _matplotlib  # noqa: F401
except ValueError:
    # $MPLBACKEND names one that is not installed here, that of the notebook which started this
    # process; plots are drawn without any.
    os.environ.pop("MPLBACKEND", None)
