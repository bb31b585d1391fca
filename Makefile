# Everything here sets up what it needs: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help demo test test-gpu lint format bench clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)  ## check, measure, train for two minutes and generate (under six minutes)
	$(BIN)/lightning-attention check
	$(BIN)/lightning-attention bench --quick --out demo/bench
	$(BIN)/lightning-attention train --max-minutes 2 --max-epochs 8 --out demo/run --overwrite
	$(BIN)/lightning-attention generate --model demo/run --max-tokens 150 "The with statement" "A class definition"
	@echo
	@echo "speed and memory: $$(ls demo/bench/*.png)"
	@echo "loss:             demo/run/loss.png"
	@echo "checkpoint:       $$(ls -d demo/run/checkpoints/step_* | tail -1)"

test: $(STAMP)  ## run the tests (GPU tests skip where there is no GPU)
	$(BIN)/python -m pytest -n 2

test-gpu: $(STAMP)  ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

lint: $(STAMP)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the files in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## time and memory against softmax attention on this machine, into runs/bench (four minutes)
	$(BIN)/lightning-attention bench

clean:  ## remove the environment and every output
	rm -rf $(VENV) demo runs dist
