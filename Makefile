# Two commands need nothing else to have run: `make serve` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STATE := .state
TEST_HOME := $(CURDIR)/$(STATE)/bentoml-test

.PHONY: serve setup test test-setup test-clients container test-container test-vllm lint format demo clean

serve: setup  ## set up, put the demonstration model into the store, serve on port 8000
	$(BIN)/bentoml serve

setup: $(STATE)/setup

test: test-setup  ## set up and pass all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	BENTOML_HOME=$(TEST_HOME) BENTOML_DO_NOT_TRACK=true $(BIN)/python -m pytest $(ARGS)

test-clients: test-setup  ## other people's clients, each in an environment of its own under .state/clients (minutes)
	$(BIN)/python -m tests.clients.environments
	BENTOML_HOME=$(TEST_HOME) BENTOML_DO_NOT_TRACK=true $(BIN)/python -m pytest -rs tests/clients/clients.py $(ARGS)

test-setup: $(STATE)/test-setup $(STATE)/openai-0.28

lint: test-setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports && $(BIN)/mypy

format: test-setup
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

container: setup  ## build the image; DEVICE=cpu|cuda, MODEL=TAG puts a model into it
	PATH="$(CURDIR)/$(BIN):$$PATH" DEVICE="$(DEVICE)" MODEL="$(MODEL)" deploy/container/build.sh

test-container: test-setup  ## build, run and call the image, where a container engine can be used
	PATH="$(CURDIR)/$(BIN):$$PATH" deploy/container/test.sh $(ARGS)

demo: test-setup  ## train the demonstration model again (minutes)
	$(BIN)/python -m models.demo.build

clean:
	rm -rf $(VENV) .venv-* $(STATE)

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed (apt-get install python3.11 python3.11-venv), or say which: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "apt-get install python3-venv is needed"; rm -rf $(VENV); exit 1; }

$(STATE)/setup: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@mkdir -p $(STATE) && touch $@

$(STATE)/test-setup: requirements.txt requirements-dev.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@mkdir -p $(STATE) && touch $@ $(STATE)/setup

$(STATE)/openai-0.28:  ## the documented client of 2023, which cannot live beside today's
	$(PYTHON) -m venv .venv-openai-0.28
	.venv-openai-0.28/bin/python -m pip install --quiet --disable-pip-version-check openai==0.28.1
	@mkdir -p $(STATE) && touch $@
