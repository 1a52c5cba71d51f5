# Everything a newcomer needs: `make demo` and `make test`. VENV may point anywhere.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
ARGS ?=

.PHONY: demo test docs lint format clean

demo: $(VENV)/.installed  ## the degradation study on embedded digits
	$(BIN)/python -m studies.degradation $(ARGS)

# Two at a time: most tests are one thread's work. Those of a file share what it sets up.
test: $(VENV)/.installed-dev lint  ## on a machine with a GPU, make test ARGS="-m gpu -n 0" is the rest
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

docs: $(VENV)/.installed-dev  ## the pages of docs/ with their notebooks, into docs/_build/html
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html
	@echo "docs: docs/_build/html/index.html"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "resprobe needs Python 3.11 or newer; name one with PYTHON=...")'
	@echo "installing PyTorch and what else resprobe needs into $(VENV); a minute or two"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what tests and docs need into $(VENV); a minute"
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info docs/_build
