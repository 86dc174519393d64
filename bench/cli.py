"""The command line: `python -m bench COMMAND …`."""

import argparse
import importlib
import logging
import os
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType

from bench import commands
from bench.errors import InputError
from bench.options import Parser, UsageError

PROG = "python -m bench"
_EXIT_CODES = """\
exit code: 0 done; 1 something failed, the output says what; 2 wrong input; 130 interrupted"""


def find_commands() -> dict[str, ModuleType]:
    """Return the modules of `bench.commands` by the name of their command."""
    return {
        found.name: importlib.import_module(f"{commands.__name__}.{found.name}")
        for found in pkgutil.iter_modules(commands.__path__)
        if not found.name.startswith("_")
    }


def parser() -> argparse.ArgumentParser:
    """The command line with all commands."""
    result = Parser(
        prog=PROG,
        description="Profile, check and compare attention mechanisms for high-resolution vision.",
        epilog=f"{_EXIT_CODES}\n\n`{PROG} COMMAND --help` explains a command; `python run_all.py`"
        " runs whole suites.",
    )
    subparsers = result.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in find_commands().items():
        command = subparsers.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=getattr(module, "EPILOG", "") + _EXIT_CODES,
        )
        module.configure(command)
        command.set_defaults(run=module.run)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    prog = PROG
    try:
        options = parser().parse_args(arguments)
        prog = f"{PROG} {options.command}"
        code: int = options.run(options)
    except UsageError as error:
        print(f"{error.prog}: error: {error}", file=sys.stderr)
        return 2
    except InputError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever reads the output has seen enough. Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code
