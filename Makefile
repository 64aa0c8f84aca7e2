# `make demo` and `make test` are all a newcomer needs; both set up first. `make help` lists the rest.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# What is installed: to run FaceFed, and to test it as well.
RUN    := $(VENV)/.installed-to-run
STAMP  := $(VENV)/.installed
# TORCH=cpu takes PyTorch's build without CUDA; TORCH_INDEX=URL that of another index. Both are pinned by version alone, since
# requirements/ has the hashes of the usual files; all else is installed by its hash.
TORCH  ?=
TORCH_INDEX ?= $(if $(filter cpu,$(TORCH)),https://download.pytorch.org/whl/cpu)
PIP    := $(BIN)/python -m pip install --disable-pip-version-check
# Test files run side by side: unit tests in processes of one thread each, whole programs in one more than two cores, as
# they wait for each other a third of the time. `make test` gives that time to the types and the unit tests.
UNIT_WORKERS ?= auto
E2E_WORKERS  ?= 3
# Tests of what depends on Flower's inside (docs/adr/0022-flowers-inside.md); FLWR is the version to run them with.
FLWR  ?=
OF_FLOWER := $(addprefix tests/unit/test_,$(addsuffix .py,flowers_inside clients_node clients_parts clients_lifeline \
             server_redelivery certs_superexec bad_bytes fleet_guard server_grid simulation_flow own_lines wire server_bundle)) \
             tests/integration/test_server_machine.py tests/integration/test_stock_in_process.py
# Of `make chaos`: SEED says which faults, FIRST and RUNS which of its runs; each has five.
SEED  ?= 0
FIRST ?= 0
RUNS  ?= 10

# Each of the tests' hundreds of processes would compile our modules anew where the environment forbids to keep that.
unit e2e: export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup lock app-config system demo test lint types unit e2e chaos test-flower docker-test bench bench-faces gpu-check clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

# How large: docs/INSTALL.md. Where pip shows a bar only on a terminal, it names each file as it comes.
$(RUN): pyproject.toml requirements/run.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "FaceFed needs Python 3.11, 3.12 or 3.13; $(PYTHON) is $$($(PYTHON) --version). Use make PYTHON=python3.11 ..." >&2; exit 2; }
	@case "$(TORCH)" in ""|cpu) ;; *) echo "TORCH=$(TORCH) is unknown: give TORCH=cpu, or TORCH_INDEX=URL, or neither." >&2; exit 2;; esac
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(TORCH_INDEX),)
	@echo "Installing into $(VENV): about 3.3 GB to download where nothing is cached, 6.9 GB on disk; 4.3 GB of that is CUDA, which make demo TORCH=cpu leaves out."
	$(PIP) --require-hashes -r requirements/run.txt
else
	@echo "Installing into $(VENV), with PyTorch from $(TORCH_INDEX): about 0.3 GB to download beside it."
	$(BIN)/python requirements/without_torch.py requirements/run.txt >$(VENV)/others.txt
	$(PIP) --require-hashes -r $(VENV)/others.txt
	grep -E '^(torch|torchvision)==' constraints.txt >$(VENV)/torch.txt
	$(PIP) --index-url "$(TORCH_INDEX)" -r $(VENV)/torch.txt
endif
	$(PIP) --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(STAMP): $(RUN) requirements/develop.txt
	@echo "Installing the test tools into $(VENV): about 0.1 GB to download where nothing is cached."
	$(PIP) --no-deps --require-hashes -r requirements/develop.txt
	@touch $@

setup: $(STAMP) ## create .venv and install the pinned dependencies and the test tools, each file by its hash

lock: $(STAMP) ## after a change of pyproject.toml or constraints.txt: write requirements/ anew, asking pip's index
	$(BIN)/python requirements/lock.py

app-config: $(STAMP) ## after a new setting: write what `flwr run` takes into pyproject.toml
	$(BIN)/python requirements/app_config.py

system: ## install the databases, the browser and the tracer that some end-to-end tests use (Debian, as root)
	@tests/system-packages install

demo: $(RUN) ## two synthetic face data sets, federated, tracked: the main job, in a few minutes (TORCH=cpu: without CUDA)
	$(BIN)/facefed data synth --layout celeba --out data/celeba
	$(BIN)/facefed data synth --layout vggface2 --out data/vggface2
	$(BIN)/flower-simulation --config demo --client celeba=data/celeba --client vggface2=data/vggface2

test: lint ## lint, types, import floors, all tests
	@echo "Types, unit tests and whole programs run beside each other; each shows its output when it has ended."
	@$(MAKE) --no-print-directory --output-sync=target --jobs=3 types unit e2e

lint: $(STAMP) ## ruff, import floors and fences
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(STAMP) ## mypy --strict
	$(BIN)/mypy

unit: $(STAMP) ## unit, golden and integration tests
	@tests/system-packages
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(UNIT_WORKERS) --dist loadfile tests/unit tests/golden tests/integration tests/hostile

e2e: $(STAMP) ## whole programs, as a user runs them
	@tests/system-packages
	$(BIN)/python -m pytest -q -n $(E2E_WORKERS) --dist loadfile --no-loadscope-reorder tests/e2e

docker-test: ## whole federations in containers, killed, cut off and taken down (by hand; needs a Docker engine)
	$(PYTHON) -m tests.docker.run

test-flower: $(STAMP) ## what depends on Flower's inside, with another version of it beside the rest: make test-flower FLWR=1.41.0
	@test -n "$(FLWR)" || { echo "test-flower: say which version, such as make test-flower FLWR=1.41.0" >&2; exit 2; }
	$(PIP) --quiet --no-deps --upgrade --target build/flwr-$(FLWR) flwr==$(FLWR)
	PYTHONPATH=$(CURDIR)/build/flwr-$(FLWR) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(UNIT_WORKERS) --dist loadfile $(OF_FLOWER)

chaos: $(STAMP) ## 50 faults over ten runs of real processes; a report and a table (an hour): make chaos SEED=0 RUNS=10
	$(BIN)/python -m tests.chaos --seed $(SEED) --first $(FIRST) --runs $(RUNS)

bench: $(STAMP) ## speed and memory against the peers, a table and JSON (a quarter of an hour)
	$(BIN)/python -m bench.run

bench-faces: $(STAMP) ## accuracy on a CelebA and a VGGFace2 folder: make bench-faces CELEBA=DIR VGGFACE2=DIR (an hour)
	$(BIN)/python -m bench.real_faces --celeba $(CELEBA) --vggface2 $(VGGFACE2)

gpu-check: $(STAMP) ## what only a GPU shows, in under six minutes on one, into one JSON file; without a GPU it says so
	$(BIN)/python -m bench.gpu_check

clean: ## remove the environment and everything that runs left here
	rm -rf $(VENV) build dist data runs logs chaos .facefed mlflow.db mlartifacts mlflow-auth *.egg-info
