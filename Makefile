# Every target sets up what it needs: `make demo` and `make test` work on a fresh machine.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help venv demo test test-unit test-integration test-slow test-gpu chaos archive-proof fuzz bench lint format build clean

PYTHON ?= python3
BIN := .venv/bin
FOLDERS := models infra operators pipeline tests benchmarks

# Ray reports its usage to its makers unless told not to.
export RAY_USAGE_STATS_ENABLED := 0
# pyright asks the network whether there is a newer one, which its pin makes pointless.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv:  ## set up .venv, or nothing where it is up to date (PYTHON=python3.12 chooses the interpreter)
	@PYTHON=$(PYTHON) .ci/venv

demo: venv  ## see it work: a broker, a video through Kafka, captions and tokens in ./demo-out
	@$(BIN)/stormline demo

test:  ## unit tests, then integration tests; each prints its closing line and time
	@status=0; \
	$(MAKE) --no-print-directory test-unit || status=1; \
	$(MAKE) --no-print-directory test-integration || status=1; \
	exit $$status

# Two workers: each imports torch and Ray anew, so that more of them lose. One thread each: the tensors are tiny, and
# threads that wait for each other on two cores made some tests twenty times slower.
test-unit: venv  ## fast tests: no Ray, no sockets
	@echo "== unit tests"
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -q -n 2 --dist loadfile

# One process: the tests share one broker and one Ray cluster.
test-integration: venv  ## tests with a real broker and a local Ray
	@echo "== integration tests"
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/integration -q -m "not slow" --durations=12

test-slow: venv  ## what takes a minute or more and has a quicker test near it
	@echo "== slow tests"
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/integration -q -m slow --durations=12

test-gpu: venv  ## tests that need a CUDA device; skipped where there is none
	@echo "== GPU tests"
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/gpu -q --durations=5

chaos: venv  ## kill whatever can die, from three seeds, and compare with a run in peace (three quarters of an hour)
	@echo "== chaos"
	@$(BIN)/python -m tests.chaos --faults 40 --seed 1 --seed 2 --seed 3 --json benchmarks/results/chaos.json
	@$(BIN)/python -m tests.chaos --faults 15 --seed 71 --seed 72 --seed 73 \
		--kinds supervisor,gcs,raylet,cluster,machine --json benchmarks/results/chaos-starts.json

archive-proof: venv  ## archive 200 videos, good and bad, in peace and killed on the way, and compare (half an hour)
	@echo "== archive proof"
	@$(BIN)/python -m tests.archive_proof --json benchmarks/results/archive_folder.json

fuzz: venv  ## decode 10,000 damaged segments (ARGS="--help" says what else)
	@$(BIN)/python tests/fuzz/fuzz_decode.py --keep fuzz-out $(ARGS)

bench: venv  ## measure all that needs no GPU (under half an hour), and write README's table (ARGS="--only scan,ask")
	@$(BIN)/python -m pip install -q -c constraints.txt decord  # a peer, and what Ray Data's read_videos wants
	@$(BIN)/python benchmarks $(ARGS)

lint: venv  ## style, format and types, changing nothing
	@status=0; \
	$(BIN)/python -m ruff check $(wildcard $(FOLDERS)) || status=1; \
	$(BIN)/python -m ruff format --check $(wildcard $(FOLDERS)) || status=1; \
	$(BIN)/python -m pyright || status=1; \
	exit $$status

format: venv  ## format the code and fix what can be fixed
	@$(BIN)/python -m ruff check --fix $(wildcard $(FOLDERS))
	@$(BIN)/python -m ruff format $(wildcard $(FOLDERS))

build: venv  ## build the wheel into dist/
	@rm -rf build
	@$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean:  ## remove what was built, run and cached; keeps .venv and ./out
	@rm -rf build dist demo-out .pytest_cache .ruff_cache *.egg-info
	@find $(wildcard $(FOLDERS)) -name __pycache__ -type d -prune -exec rm -rf {} +
