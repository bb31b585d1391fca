# Everything here sets up what it needs: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# What another version of a library can break.
VERSIONED := tests/models tests/nn tests/examples tests/serving/test_engine.py tests/serving/test_sampling.py \
             tests/integrations tests/ops/test_operation.py tests/kernels/triton/portable/test_compile.py \
             tests/kernels/triton/portable/test_dispatch.py tests/benchmarks/cases/test_minimax.py

# .venv has the versions of constraints.txt, .venv-oldest and .venv-newest the lowest and the newest that are allowed.
# torch comes first and alone: what else is installed then finds the small build for a CPU.
define install  # environment, constraints, options
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(2) $(3) torch
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(2) $(3) -e '.[dev]'
endef

.PHONY: help demo docs test test-oldest test-newest test-gpu lint format bench clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt)
	touch $@

$(VENV)-oldest/.installed: pyproject.toml constraints-oldest.txt
	$(call install,$(VENV)-oldest,constraints-oldest.txt)
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

docs: $(STAMP)  ## the documentation as a site, in runs/docs; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: $(STAMP)  ## run the tests (GPU tests skip where there is no GPU)
	$(BIN)/python -m pytest -n 2

test-oldest: $(VENV)-oldest/.installed  ## run the tests that versions can break with the lowest versions allowed
	$(VENV)-oldest/bin/python -m pytest -n 2 $(VERSIONED)

test-newest:  ## the same with the newest versions allowed, looked up at every run
	$(call install,$(VENV)-newest,constraints-newest.txt,--upgrade --upgrade-strategy eager)
	$(VENV)-newest/bin/python -m pip list | grep -E '^(accelerate|peft|tokenizers|torch|transformers|triton) '
	$(VENV)-newest/bin/python -m pytest -n 2 $(VERSIONED)

test-gpu: $(STAMP)  ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

lint: $(STAMP)  ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(STAMP)  ## rewrite the files in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## time and memory against softmax attention on this machine, into runs/bench (four minutes)
	$(BIN)/lightning-attention bench

clean:  ## remove the environments and every output
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest demo runs dist
