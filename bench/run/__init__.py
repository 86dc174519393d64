"""One run to its record: training, evaluation, checkpoints. Called, the package is `runner.run`."""

import sys
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    """Lets `bench.run` be both this package and the public function of that name."""

    def __call__(self, *given: Any, **options: Any) -> Any:
        from bench.run.runner import run

        return run(*given, **options)


sys.modules[__name__].__class__ = _Package
