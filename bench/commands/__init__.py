"""The commands of `python -m bench`, one module each, found by themselves.

A command module has `HELP` (one line), `configure(parser)` and `run(options) -> exit code`, and may
have `EPILOG` (examples). What takes long to import is imported by `run`, so that `--help` is quick.
"""
