# Two commands do everything on a fresh machine with Python >= 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo sweep-offline test lint fuzz bench bench-check clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: $(VENV)/.recipes  ## Install, then fine-tune and compress a small ViT on handwritten digits (minutes, no network)
	$(BIN)/python recipes/vit_cifar.py --preset offline

sweep-offline: $(VENV)/.recipes runs/vit_cifar/checkpoints/last.ckpt  ## Fine-tune once, then compress it in a few trials of a W&B sweep (no account)
	$(BIN)/python recipes/sweep_offline.py recipes/sweeps/compress.yaml --trials 8

runs/vit_cifar/checkpoints/last.ckpt: | $(VENV)/.recipes
	$(BIN)/python recipes/vit_cifar.py --preset offline --compare false

test: $(VENV)/.dev  ## Install, then run the tests
	$(BIN)/python -m pytest

lint: $(VENV)/.dev  ## Install, then run ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

fuzz: $(VENV)/.dev  ## Throw damaged files at load, inspect and apply; SECONDS=60 says for how long
	$(BIN)/python -m bench.fuzz --seconds $(or $(SECONDS),60)

bench: $(VENV)/.peers  ## Measure what bench/results/ lacks, cell by cell (days; stop and go on at will), and write RESULTS.md
	$(BIN)/python -m bench.quality.rates
	$(BIN)/python -m bench.quality
	$(BIN)/python -m bench.quality.adamr
	$(BIN)/python -m bench.speed
	$(BIN)/python -m bench.report

bench-check: $(VENV)/.peers  ## Measure a sample of bench/results/ again and compare (up to an hour)
	$(BIN)/python -m bench.check

clean:  ## Remove the environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache runs

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dtrain needs Python >= 3.11; try: make PYTHON=python3.12 demo")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.recipes: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[recipes]'
	touch $@

$(VENV)/.peers: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[recipes,peers]'
	touch $(VENV)/.recipes $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(VENV)/.recipes $@
