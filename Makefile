# The two commands of the README are `make demo` and `make test`; CI runs the latter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check test-slow test-gpu clean

demo: $(INSTALLED)
	$(BIN)/lookalike demo $(ARGS)

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow $(ARGS)

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu $(ARGS)

$(INSTALLED): pyproject.toml constraints/ci.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints/ci.txt --editable ".[cpu,demo,dev]"
	touch $@

clean:
	rm -rf $(VENV) demo_run
