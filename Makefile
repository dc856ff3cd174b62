# Two commands: `make demo` and `make test`. Both set up .venv themselves, with the versions in requirements.lock.
PYTHON ?= python3
BIN := .venv/bin
UV_VERSION := 0.13.9
export DO_NOT_TRACK := 1

.PHONY: demo test test-all check bench bench-peers study rehearsal lock clean
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

# A process for each core; a file's tests stay together, for they share what is costly to set up. In the order of their names:
# by default files of few tests come last, and those are the longest.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations 30

test: check
	$(PYTEST) -m "not long"

test-all: check
	$(PYTEST)

bench: .venv/.ready
	$(BIN)/python infra/bench/bench.py
	$(BIN)/python infra/bench/loader.py
	$(BIN)/python infra/bench/loader.py --memory
	$(BIN)/python infra/bench/ingest.py
	$(BIN)/python infra/bench/ingest.py --memory
	$(BIN)/python infra/bench/shards.py
	$(BIN)/python infra/bench/selection.py
	$(BIN)/python infra/bench/trainer.py
	$(BIN)/python infra/bench/evaluation.py

# What `make bench` runs beside the loader: 70 MB in a folder of their own. And beside ingest: video2dataset, 6 GB in an environment
# of its own, which needs Python 3.11.
bench-peers: .venv/.ready
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --target .venv/loader-peers infra/bench/peers/loader.txt
	$(BIN)/uv venv --quiet --clear --python 3.11 .venv/video2dataset
	$(BIN)/uv pip sync --quiet --python .venv/video2dataset/bin/python infra/bench/peers/video2dataset.txt

# Does active selection help? What is missing of the study's runs, then its tables and pictures.
study: .venv/.ready
	$(BIN)/python infra/study/study.py --out runs/study

# A small cloud on this machine, parts of which are killed: is anything lost? SEED=N draws other moments.
rehearsal: .venv/.ready
	$(BIN)/python infra/rehearsal/rehearsal.py --seed $(or $(SEED),0)

# After a change of the dependencies in pyproject.toml.
lock: .venv/.ready
	$(BIN)/uv pip compile --quiet --universal --group dev --extra train pyproject.toml --no-header --no-annotate --no-emit-index-url --output-file requirements.lock

clean:
	rm -rf .venv runs build dist
