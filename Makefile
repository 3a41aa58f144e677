# make quickstart   install, then train, adapt and evaluate a tiny DeepSeek translator (about 10 minutes on 2 cores)
# make test         the test suite            make test-slow   the tests marked slow
# make check        lint, format, types and the order of rooms    make format      mend lint and format
# make matrix       tests on the lowest, the pinned and the newest versions: SETS=, PYTHONS=, TESTS= (.ci/matrix.py)
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PACKAGES := configuration_deepseek tokenization_deepseek modeling_deepseek finetune_deepseek

.PHONY: quickstart test test-slow check format matrix
quickstart: $(INSTALLED)
	$(BIN)/deepseek-hf finetune translation

# Two workers with one thread each: tiny models gain nothing from threads. By file, so that fixtures are made once.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -q -m slow

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

matrix:
	$(PYTHON) .ci/matrix.py $(if $(SETS),--sets $(SETS)) $(if $(PYTHONS),--pythons $(PYTHONS)) $(if $(TESTS),--tests $(TESTS))

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	touch $@
