# `make demo` and `make test` are all a newcomer needs; both set up first. `make help` lists the rest.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Test files run side by side: unit tests in processes of one thread each, whole programs in one more than two cores, as
# they wait for each other a third of the time.
UNIT_WORKERS ?= auto
E2E_WORKERS  ?= 3
# Of `make chaos`: SEED says which faults, FIRST and RUNS which of its runs; each has five.
SEED  ?= 0
FIRST ?= 0
RUNS  ?= 10

.PHONY: help setup lock system demo test lint types unit e2e chaos docker-test bench bench-faces clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

LOCKS  := requirements/run.txt requirements/develop.txt

$(STAMP): pyproject.toml $(LOCKS)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
		{ echo "FaceFed needs Python 3.11 or 3.12; $(PYTHON) is $$($(PYTHON) --version). Use make PYTHON=python3.11 ..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes $(LOCKS:%=-r %)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

setup: $(STAMP) ## create .venv and install the pinned dependencies, each file by its hash

lock: $(STAMP) ## after a change of pyproject.toml or constraints.txt: write requirements/ anew, asking pip's index
	$(BIN)/python requirements/lock.py

system: ## install the databases, the browser and the tracer that some end-to-end tests use (Debian, as root)
	@tests/system-packages install

demo: $(STAMP) ## two synthetic face data sets, federated, tracked: the main job, in a few minutes
	$(BIN)/facefed data synth --layout celeba --out data/celeba
	$(BIN)/facefed data synth --layout vggface2 --out data/vggface2
	$(BIN)/flower-simulation --config demo --client celeba=data/celeba --client vggface2=data/vggface2

test: lint types unit e2e ## lint, types, import floors, all tests

lint: $(STAMP) ## ruff, import floors and fences
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(STAMP) ## mypy --strict
	$(BIN)/mypy

unit: $(STAMP) ## unit, golden and integration tests
	@tests/system-packages
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(UNIT_WORKERS) --dist loadfile tests/unit tests/golden tests/integration

e2e: $(STAMP) ## whole programs, as a user runs them
	@tests/system-packages
	$(BIN)/python -m pytest -q -n $(E2E_WORKERS) --dist loadfile --no-loadscope-reorder tests/e2e

docker-test: ## whole federations in containers, killed, cut off and taken down (by hand; needs a Docker engine)
	$(PYTHON) -m tests.docker.run

chaos: $(STAMP) ## 50 faults over ten runs of real processes; a report and a table (an hour): make chaos SEED=0 RUNS=10
	$(BIN)/python -m tests.chaos --seed $(SEED) --first $(FIRST) --runs $(RUNS)

bench: $(STAMP) ## speed and memory against the peers, a table and JSON (a quarter of an hour)
	$(BIN)/python -m bench.run

bench-faces: $(STAMP) ## accuracy on a CelebA and a VGGFace2 folder: make bench-faces CELEBA=DIR VGGFACE2=DIR (an hour)
	$(BIN)/python -m bench.real_faces --celeba $(CELEBA) --vggface2 $(VGGFACE2)

clean: ## remove the environment and everything that runs left here
	rm -rf $(VENV) build dist data runs logs chaos .facefed mlflow.db mlartifacts mlflow-auth *.egg-info
