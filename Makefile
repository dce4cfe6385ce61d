# Every check and every chore has one name here; CI calls the same names and nothing else.

PYTHON ?= python3
# On a machine without a GPU that has no CPU wheel of torch at hand:
# make setup PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=
# tests side by side, one a core; PYTEST_FLAGS="-x --pdb" for one after the other
PYTEST_FLAGS ?= -n logical --maxprocesses 4 --dist worksteal

BIN := .venv/bin
STAMP := .venv/.stamp
PEERS := .venv/.peers
INSTALL = -m pip install --disable-pip-version-check --quiet -c constraints.txt $(PIP_FLAGS)

# nothing may be fetched while tests run
export HF_HUB_OFFLINE := 1
# tests sync thousands of small files: in memory, where it has room, that takes no time
MEMORY := $(shell df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 && $$4 > 10000000 {print "/dev/shm"}')
ifneq ($(MEMORY),)
test test-all conformance: export TMPDIR ?= $(MEMORY)
endif
# models in the tests are so small that threads wait for each other more than they compute
test test-all conformance: export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := test
.DELETE_ON_ERROR:
.PHONY: help setup test test-all test-clients conformance check fix demo smoke size docs docker clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(STAMP) ## create .venv with everything development needs

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) -e .[dev]
	@touch $@

$(PEERS): $(STAMP)
	$(BIN)/python $(INSTALL) -e .[dev,peers]
	@touch $@

test: check ## what a commit must pass (the default): check, and the tests that take seconds
	$(BIN)/pytest $(PYTEST_FLAGS)

test-all: $(PEERS) check ## the same with the tests that take minutes, and those against other packages
	$(BIN)/pytest -m "slow or not slow" $(PYTEST_FLAGS)

test-clients: $(STAMP) ## load sources and outputs in vLLM, llama.cpp, MLX and older transformers (an hour)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/record.py clients $(BIN)/python tools/clients/matrix.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/record.py client-chain $(BIN)/python tools/clients/chain.py

NEWEST := .venv/newest
conformance: ## hold models to the newest transformers that pyproject.toml allows
	$(PYTHON) -m venv $(NEWEST)
	grep -v '^transformers==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python $(subst constraints.txt,$(NEWEST)/constraints.txt,$(INSTALL)) -e .[dev]
	$(NEWEST)/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	$(NEWEST)/bin/pytest tests/model tests/compression/test_pipeline.py tests/compression/test_golden.py $(PYTEST_FLAGS)

check: $(STAMP) ## format, lint, types, imports
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(STAMP) ## format, and mend what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

demo: $(STAMP) ## compress the built-in checkpoint, compare it with the original, write reports
	$(BIN)/ream-stream demo

SMOKE := build/smoke
smoke: ## install the wheel without development extras, and run it
	rm -rf build
	$(PYTHON) -m venv $(SMOKE)/venv
	$(SMOKE)/venv/bin/python -m pip wheel --quiet --no-deps -w $(SMOKE) .
	$(SMOKE)/venv/bin/python $(INSTALL) $(SMOKE)/*.whl
	$(SMOKE)/venv/bin/ream-stream --help
	cd $(SMOKE) && venv/bin/ream-stream demo --quick

size: ## print the lines of each room of the package
	@for room in $$(git ls-files 'ream_stream/*.py' | cut -d/ -f2 | sort -u); do \
	  printf '%7d  %s\n' $$(git ls-files "ream_stream/$$room" | grep '\.py$$' | xargs cat | wc -l) $$room; \
	done
	@printf '%7d  all\n' $$(git ls-files 'ream_stream/*.py' | xargs cat | wc -l)

docs: $(STAMP) ## write what docs have of the command line's help and of kept results
	$(BIN)/python tools/docs/make_cli_docs.py
	$(BIN)/python tools/docs/make_results.py
	$(BIN)/python tools/docs/make_chart.py

docker: ## build the image ream-stream:VERSION; PIP_EXTRA_INDEX_URL= gives torch with CUDA
	docker build -t ream-stream:$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) \
	  $(if $(filter undefined,$(origin PIP_EXTRA_INDEX_URL)),,--build-arg PIP_EXTRA_INDEX_URL=$(PIP_EXTRA_INDEX_URL)) .

clean: ## remove the environment and everything that was built
	rm -rf .venv build dist *.egg-info demo-output bench-output compare-output sweep-output
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find ream_stream tests benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +
