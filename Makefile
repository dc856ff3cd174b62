# Two commands: `make demo` and `make test`. Both set up .venv themselves, with the versions in requirements.lock.
PYTHON ?= python3
BIN := .venv/bin
UV_VERSION := 0.13.9
export DO_NOT_TRACK := 1

.PHONY: demo test test-all check bench bench-peers study lock clean
.DELETE_ON_ERROR:

.venv/.ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14) and "cmacc needs Python 3.11 to 3.13; set PYTHON=python3.x")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip sync --quiet --python $(BIN)/python requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

demo: .venv/.ready
	$(BIN)/cmacc demo runs/demo

check: .venv/.ready
	$(BIN)/ruff check ingest shards train flows tests infra
	$(BIN)/ruff format --check --quiet ingest shards train flows tests infra
	$(BIN)/mypy
	$(BIN)/lint-imports

# A process for each core; a file's tests stay together, for they share what is costly to set up.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test: check
	$(PYTEST) -m "not long"

test-all: check
	$(PYTEST)

bench: .venv/.ready
	$(BIN)/python infra/bench/bench.py
	$(BIN)/python infra/bench/ingest.py
	$(BIN)/python infra/bench/ingest.py --memory
	$(BIN)/python infra/bench/shards.py

# video2dataset, 6 GB in an environment of its own, so that `make bench` can run it beside ingest. Needs Python 3.11.
bench-peers: .venv/.ready
	$(BIN)/uv venv --quiet --clear --python 3.11 .venv/video2dataset
	$(BIN)/uv pip sync --quiet --python .venv/video2dataset/bin/python infra/bench/peers/video2dataset.txt

# The demo's run beside the same with other negatives, three seeds each; takes `make demo`'s data set.
study: .venv/.ready
	$(BIN)/python infra/study.py runs/demo/data --out runs/study

# After a change of the dependencies in pyproject.toml.
lock: .venv/.ready
	$(BIN)/uv pip compile --quiet --universal --group dev pyproject.toml --no-header --no-annotate --no-emit-index-url --output-file requirements.lock

clean:
	rm -rf .venv runs build dist
