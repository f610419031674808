# One word per task. Everything runs inside .venv, which `setup` builds from scratch.
PYTHON ?= python3
PROMPT ?= a red rocket flying over the ocean at sunset
BIN := .venv/bin
STAMP := .venv/.stamp
# The prompt as typed: make would expand a $ in it. The shell reads it from the environment.
override PROMPT := $(value PROMPT)
export PROMPT

.PHONY: help setup video test check fix bench docs gallery long edits soak fuzz conformance clean
help:  ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*##/\t/'

setup: $(STAMP)  ## build .venv with everything a developer needs

# torch first and pinned: an unpinned one pulls gigabytes of CUDA libraries.
$(STAMP): pyproject.toml projects/diorama/pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]' -e projects/diorama
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps wan22==2.2.11  # reference for parity tests
	touch $(STAMP)

video: $(STAMP)  ## make a video: make video PROMPT="a cat on the beach" [ARGS="--seed 7"]
	@$(BIN)/skyloom generate $(ARGS) -- "$$PROMPT"

test: $(STAMP)  ## run the tests (CPU, no network)
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest

check: $(STAMP)  ## format, lint, import contracts, types and conventions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PYTHONPATH=src:projects/diorama/src $(BIN)/lint-imports
	$(BIN)/pyright -p pyproject.toml
	$(BIN)/python -m pytest tests/conventions

fix: $(STAMP)  ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## the transformer and whole videos against diffusers, side by side; where the time goes
	$(BIN)/python bench/dit_forward.py
	$(BIN)/python bench/pipeline.py
	$(BIN)/python bench/rollout.py
	$(BIN)/python bench/edit.py
	$(BIN)/python bench/parts.py
	$(BIN)/python bench/jobs.py --videos 5

docs: $(STAMP)  ## write the command line pages, the table of memory and the tree of ARCHITECTURE.md
	$(BIN)/python docs/write_cli.py
	$(BIN)/python docs/write_tree.py
	$(BIN)/python docs/write_memory_table.py

long: $(STAMP)  ## docs/images/long again: a minute, and the ways of going on that were rejected
	$(BIN)/python projects/diorama/examples/long.py

gallery: $(STAMP)  ## docs/gallery.md again, compared with what is there
	$(BIN)/python examples/gallery.py

SOAK := PYTHONPATH=src $(BIN)/python tests/serve
soak: $(STAMP)  ## the queue and the server under 10,000 seeds, 1,200 kills, cancels, crowds and full disks (some as root)
	$(SOAK)/simulate.py --seeds 10000
	$(SOAK)/swarm.py --kills 1000
	$(SOAK)/swarm.py --kills 200 --postgres
	$(SOAK)/torn.py
	$(SOAK)/cancels.py --cancels 500
	$(SOAK)/cancels.py --cancels 40 --model
	$(SOAK)/crowd.py --clients 200 --seconds 60
	$(SOAK)/fair.py --videos 5
	$(SOAK)/drains.py --drains 100
	$(SOAK)/drains.py --drains 5 --model
	$(SOAK)/full.py --places 200
	$(SOAK)/parted.py --kills 20 --parted 60
	$(SOAK)/soak.py --minutes 120

fuzz: $(STAMP)  ## 2,000 mutated media files, a corpus of bombs, and 10,000 calls by the server's OpenAPI document
	$(BIN)/python bench/media_mutants.py 2000
	$(BIN)/python bench/media_bombs.py
	SKYLOOM_FUZZ_CASES=10100 $(BIN)/python -m pytest tests/serve/api/test_schema.py --timeout=0

conformance: $(STAMP)  ## ask a real server by OpenAI's clients: Python 2 and 3, JavaScript (needs the network)
	$(BIN)/python tests/e2e/conformance.py

edits: $(STAMP)  ## edits of every verb: sheets and the measured part of docs/editing.md
	$(BIN)/python examples/edits.py

clean:  ## remove the environment and caches
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
