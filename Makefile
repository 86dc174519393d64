# One virtual environment for everything. `make run` is the quick suite, `make test` the tests.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# A source tree of detectron2, whose tests run then too; docs/detectors.md says what it needs.
DETECTRON2_TREE ?=
STAMP := $(VENV)/.installed

.PHONY: run test lint readme docs install clean

# Probes first, with one seed, into the folder of the quick suite, whose page shows them; then rows side
# by side.
run: $(STAMP)
	$(if $(ARGS),,$(VENV)/bin/python run_all.py --suite probes --output results/quick --no-report seeds=[0])
	$(VENV)/bin/python run_all.py --launcher local $(ARGS)

test: $(STAMP)
	$(if $(DETECTRON2_TREE),PYTHONPATH="$(DETECTRON2_TREE)$${PYTHONPATH:+:$$PYTHONPATH}" )$(VENV)/bin/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

readme: $(STAMP)
	$(VENV)/bin/python -m report.readme results/measured/cpu-2-cores/quick

docs: $(STAMP)
	$(VENV)/bin/mkdocs build --strict

install: $(STAMP)

# Installs once; again only when what is installed has changed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $$($(PYTHON) --version) is too old; Python 3.11 or newer is needed (make PYTHON=python3.12 …)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV)
