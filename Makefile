# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

DOCS_STAMP := .venv/.installed-docs

.PHONY: demo test test-quantised lint types check bench docs docs-serve notebooks clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $(DOCS_STAMP)

demo: $(STAMP)
	$(BIN)/engram demo

test: $(STAMP) # a process a core, each file of tests by one
	$(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

test-quantised: $(STAMP) # last: once torchao is installed, transformers imports it everywhere, and it talks
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[quant]"
	$(BIN)/pytest tests/model/test_quantised.py tests/editors/test_memory_plan.py

check: lint types test test-quantised

bench: $(STAMP)
	$(BIN)/python benchmarks/trace.py
	$(BIN)/python benchmarks/average.py
	$(BIN)/python benchmarks/rome.py
	$(BIN)/python benchmarks/mass.py
	$(BIN)/python benchmarks/second_moment.py
	$(BIN)/python benchmarks/evaluate.py

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

docs-serve: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

notebooks: $(STAMP)
	$(BIN)/python tools/run_notebooks.py notebooks/*.ipynb

clean:
	rm -rf .venv site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
