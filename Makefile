# Everything a developer or a user does by hand. Each target sets itself up first; a repeated set-up is instant.
#   PYTHON    the interpreter that makes .venv (3.11 or newer)
#   PIP_ARGS  passed to `pip install`, e.g. an index with other builds of torch (see README.md, "CPU and GPU")
#   TEST_WORKERS  test files at a time
#   SOAK_S  seconds that tests of faults at random moments go on in `make soak`
#   PYTHONS  interpreters that `make dist` installs for; none: the one of .venv, with its packages
#   MLFLOW_PORT  where `make mlflow` listens

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_ARGS ?=
TEST_WORKERS ?= 2
SOAK_S ?= 300
PYTHONS ?=
MLFLOW_PORT ?= 5000
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
CODE := $(wildcard tmad pipeline jobs tests benchmarks infra docs)

.DEFAULT_GOAL := help
.PHONY: help setup demo stack stack-demo test soak check format-check lint types format bench docs docs-check dist mlflow clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | awk -F'|' '{printf "  make %-13s %s\n", $$1, $$2}'

setup: $(READY)  ## make .venv with the pinned packages and the project, editable

$(READY): pyproject.toml infra/constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3.11 or python3 on PATH; set PYTHON=/path/to/python"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "Python 3.11 or newer is needed, $(PYTHON) is older; set PYTHON=/path/to/python"; exit 1; }
	@echo "Setting up $(VENV) (a minute or two, once)"
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c infra/constraints.txt -e ".[dev]"
	@touch $(READY)

demo: $(READY)  ## photographs -> shards -> training -> evaluation -> report, on this machine, in minutes
	$(BIN)/python jobs/demo.py

stack: $(READY)  ## S3, MLflow and a Ray cluster of three nodes on this machine, without Docker, until Ctrl-C
	$(BIN)/python infra/stack.py

stack-demo: $(READY)  ## every job, small, submitted to the stack that runs (or to one of its own)
	$(BIN)/python infra/stack_demo.py

test: $(READY)  ## the tests, TEST_WORKERS files at a time (each of them starts a Ray of its own)
	$(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

soak: $(READY)  ## what repeats the tests for minutes: kills at random moments, clusters that lose nodes, every job and every end
	TMAD_SOAK_S=$(SOAK_S) $(BIN)/python -m pytest -m soak

check: format-check lint types test  ## what CI runs: format, lint, types, tests

format-check: $(READY)  ## is the code formatted?
	$(BIN)/ruff format --check $(CODE)

lint: $(READY)  ## the linter
	$(BIN)/ruff check $(CODE)

types: $(READY)  ## the type checker
	$(BIN)/mypy

format: $(READY)  ## format the code and repair what the linter can repair
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

bench: $(READY)  ## the benchmarks, one after the other; reports go to benchmarks/reports (use a quiet machine)
	for name in training_step inference batch_inpaint serve data training_job; do $(BIN)/python benchmarks/$$name.py --limit-s 600 || exit 1; done

docs: $(READY)  ## write the pages of docs/reference out of the code
	$(BIN)/python docs/reference/generate.py

docs-check: $(READY)  ## run the documents' commands and follow their links
	$(BIN)/python docs/check.py

dist: $(READY)  ## wheel and source archive in dist/, each tried where no checkout is
	$(BIN)/python infra/dist.py $(PYTHONS)

mlflow: $(READY)  ## open the MLflow UI on the runs of this machine
	@$(BIN)/python -c 'import socket; socket.create_server(("127.0.0.1", $(MLFLOW_PORT))).close()' 2>/dev/null \
	    || { echo "port $(MLFLOW_PORT) is taken; make mlflow MLFLOW_PORT=5001"; exit 1; }
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --port $(MLFLOW_PORT) \
	    --backend-store-uri "sqlite:///$(CURDIR)/runs/mlflow.db"

clean:  ## remove .venv and the tools' caches (runs/ stays)
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
