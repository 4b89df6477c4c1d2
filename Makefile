# `make pretrain` and `make test` do everything on a fresh machine, each from nothing.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
FLAT := jointmae_hf/configuration_joint_mae.py jointmae_hf/modeling_joint_mae.py

.PHONY: pretrain test lint format clean

$(VENV)/.train: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,io]"
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

pretrain: $(VENV)/.train
	$(BIN)/accelerate launch examples/pretrain.py $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@# All rules of transformers but TRF057: its auto_docstring only knows classes inside transformers.
	@mkdir -p build
	@sed '/^\[rules\.TRF057\]/,/^default_enabled/s/= true/= false/' \
	    "$$($(BIN)/python -c 'import mlinter; print(mlinter.__path__[0])')/rules.toml" > build/mlinter_rules.toml
	$(BIN)/mlinter --no-progress --no-cache --rules-toml build/mlinter_rules.toml $(FLAT)

test: lint
	$(BIN)/python -m pytest $(ARGS)

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .cache build *.egg-info
