"""Records to tables, plots and pages."""

import os

# $MPLBACKEND may name a backend that is not installed here, that of the notebook which started this
# process, and matplotlib would refuse to be imported; plots are drawn without any.
_backend = os.environ.pop("MPLBACKEND", None)
import matplotlib as _matplotlib  # noqa: E402, F401

if _backend is not None:
    os.environ["MPLBACKEND"] = _backend
