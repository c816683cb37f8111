"""
DDP, FSDP2 and DeepSpeed's ZeRO-2 and ZeRO-3: two processes train what one does, or what `SFTTrainer` does on two.

Each strategy is launched once, by `trl sft` with its accelerate configuration; all cases share the launch.
"""

import copy
import os
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import is_deepspeed_available
from fixtures.small_tokenizers import word_piece
from helpers import LAUNCH, SMALL, STRATEGIES, make_trainer, scores_in
from methods import METHODS, TOLERANCE, every_method, needs, only
from processes import (
    AS_USED,
    RECIPE_METHODS,
    STEPS,
    cases_in_bfloat16,
    cases_like_one_process,
    control_rows,
    make_trainer_of,
    result_of,
    scoring_cases,
    write_rows,
)
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForTokenClassification,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    set_seed,
)
from trl.cli.main import main as trl_main

from hf_sft_variants.base.batch import NumItems, make_annotated_batch


REPOSITORY = Path(__file__).parents[2]
# Required in CI
NEEDS_DEEPSPEED = pytest.mark.skipif(
    not is_deepspeed_available() and "CI" not in os.environ, reason="DeepSpeed is not installed: pip install deepspeed"
)


def on_each_strategy(cell=None, strategies=STRATEGIES, **options):
    """Parametrizes `strategy`; `cell` follows the strategy's name in the compatibility table."""
    parameters = []
    for strategy in strategies:
        marks = [pytest.mark.distributed]
        if strategy.startswith("zero"):
            marks.append(NEEDS_DEEPSPEED)
        if cell is not None:
            marks.append(pytest.mark.cell("Processes", f"{STRATEGIES[strategy]}{cell}", **options))
        parameters.append(pytest.param(strategy, marks=marks))
    return pytest.mark.parametrize("strategy", parameters)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_factory, tokenizer, token_rows):
    """Folder with all models, all rows, and a recipe for each strategy."""
    folder = tmp_path_factory.mktemp("processes")
    for name, model in make_models(tiny_model_factory(num_hidden_layers=1), tokenizer).items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    save_importance_model(folder / "importance")
    write_rows(folder, token_rows)
    for strategy, method in RECIPE_METHODS.items():
        (folder / strategy).mkdir()
        keys = {
            "module": "processes",
            **AS_USED[method],
            "model_name_or_path": str(folder / "untied"),
            "dataset_name": str(folder / "data"),
            "output_dir": str(folder / strategy / "recipe"),
            "max_length": 64,
            **SMALL,
            **STEPS,
        }
        (folder / strategy / "RECIPE.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
        (folder / strategy / "recipes").symlink_to(REPOSITORY / "recipes")
    return folder


def make_models(tied, tokenizer):
    """The tiny model, a reference model, one with an untied LM head, and one whose LM head has a bias."""
    tied.config.max_position_embeddings = 512
    reference, config = copy.deepcopy(tied), copy.deepcopy(tied.config)
    reference.model.embed_tokens.weight.data.mul_(1.1)
    config.tie_word_embeddings = False
    shape = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    tokens = {"bos_token_id": None, "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    phi_config = PhiConfig(**{name: getattr(config, name) for name in shape}, initializer_range=0.2, **tokens)
    set_seed(0)
    return {
        "tied": tied,
        "reference": reference,
        "untied": LlamaForCausalLM(config),
        "biased": PhiForCausalLM(phi_config),
    }


def save_importance_model(path):
    tokenizer = word_piece()
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    set_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=24, initializer_range=0.6, **shape)
    BertForTokenClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.fixture(scope="module")
def one_process(folder):
    """Runs a case on this process alone, in float32."""
    return cache(partial(run_on_one_process, folder))


def run_on_one_process(folder, name):
    cases = cases_like_one_process(folder) | cases_in_bfloat16() | scoring_cases(folder, "one")
    accumulation = {"gradient_accumulation_steps": 2 * STEPS["gradient_accumulation_steps"], "bf16": False}
    trainer = make_trainer_of(cases[name], folder, folder / "one" / name, **accumulation)
    trainer.train()
    return result_of(trainer)


@pytest.fixture(scope="module")
def launch(folder, one_process):
    """Launches all cases on a strategy."""
    for name in scoring_cases(folder, "one"):
        one_process(name)  # leaves scores to be found
    return cache(partial(launch_processes, folder))


def launch_processes(folder, strategy):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder / strategy)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("HF_HOME", str(folder / "cache"))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)]))
        trl_main(LAUNCH.format(strategy).split()[1:])
    return torch.load(folder / strategy / "results.pt", weights_only=True)


@pytest.fixture
def results(launch, strategy):
    return launch(strategy)


def assert_same(result, expected):
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-4, abs=1e-6)
    assert_same_weights(result["weights"], expected["weights"], tolerance=1e-5)


def assert_same_weights(weights, expected, tolerance=0.0):
    assert weights.keys() == expected.keys() and weights
    for name, values in weights.items():
        torch.testing.assert_close(values, expected[name], rtol=0, atol=tolerance)


@every_method
@on_each_strategy(": same loss and weights as one process")
def test_equal_to_one_process(strategy, method, results, one_process):
    """Four optimizer steps with clipped gradients on global batches that divide evenly."""
    assert_same(results[method], one_process(method))


@every_method
@on_each_strategy(": same evaluation as one process")
def test_evaluation(strategy, method, results, one_process):
    evaluation = results[method]["evaluation"]
    assert evaluation == pytest.approx(one_process(method)["evaluation"], rel=1e-5) and "eval_loss" in evaluation


@every_method
@on_each_strategy(", smaller last batch: same loss and weights as SFTTrainer")
def test_controls_on_uneven_data(strategy, method, results):
    assert_control_is_sft_trainer(results, "uneven", method)


@every_method
@on_each_strategy(", average_tokens_across_devices=False: same loss and weights as SFTTrainer")
def test_controls_with_counts_of_each_process(strategy, method, results):
    assert_control_is_sft_trainer(results, "separate", method)


def assert_control_is_sft_trainer(results, name, method):
    ours, plain = results[f"{name}_{method}"], results[f"{name}_sft_{control_rows(method)}"]
    assert ours["losses"] == pytest.approx(plain["losses"], rel=TOLERANCE)
    assert_same_weights(ours["weights"], plain["weights"], tolerance=TOLERANCE)


@every_method
@on_each_strategy(": resumed from a checkpoint")
def test_resumed(strategy, method, results):
    """SFTKey between its stages, the others inside their run."""
    assert results[f"{method}_resumed"]["losses"] == results[method]["losses"]
    assert_same_weights(results[f"{method}_resumed"]["weights"], results[method]["weights"])


@every_method
@on_each_strategy(": a checkpoint holds the whole model")
def test_checkpoints_are_whole(strategy, method, results, folder):
    assert_holds_model(folder / strategy / method / "checkpoint-4", results[method]["weights"])


def assert_holds_model(path, weights, tolerance=0.0):
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_weights(model.state_dict(), weights, tolerance)


@on_each_strategy()
def test_recipe(strategy, launch, folder, one_process):
    """The model that the command itself trained, after all cases."""
    launch(strategy)
    weights = one_process(RECIPE_METHODS[strategy])["weights"]
    assert_holds_model(folder / strategy / "recipe", weights, tolerance=1e-5)


@only("sft_go", "sftmix")
@on_each_strategy(", LoRA: same loss and weights as one process")
def test_lora(strategy, method, results, one_process):
    assert_same(results[f"{method}_lora"], one_process(f"{method}_lora"))


@every_method
@on_each_strategy(", bfloat16, 300 tokens: loss and metrics close to float32")
def test_bfloat16(strategy, method, results, one_process):
    """FSDP2 casts the model's outputs to bfloat16, but sums and counts stay in float32."""
    result, expected = results[f"{method}_bf16"], one_process(f"{method}_bf16")
    assert result["losses"] == pytest.approx(expected["losses"], rel=0.01)
    assert result["metrics"] == pytest.approx(expected["metrics"], rel=0.02, abs=0.02)


@only("sftmix")
@on_each_strategy()
def test_process_without_a_pair(method, strategy, results, one_process):
    assert_same(results["sftmix_packed"], one_process("sftmix_packed"))


@only("sftmix")
@on_each_strategy(": same reference training and ranking as one process")
def test_reference_phase(method, strategy, results, one_process, folder):
    """With an LM head that has a bias."""
    assert_same_halves(results["sftmix_reference"], one_process("sftmix_reference"))
    assert_same_confidence(folder, f"{strategy}/sftmix_reference")


@only("sftmix")
@on_each_strategy(", model passed as an object: the reference is a copy", strategies=["ddp", "fsdp2", "zero2"])
def test_copied_reference(method, strategy, results, one_process, folder):
    assert_same_halves(results["sftmix_copied"], one_process("sftmix_reference"))
    assert_same_confidence(folder, f"{strategy}/sftmix_copied")


@only("sftmix")
@on_each_strategy(", model passed as an object: the reference is a copy", strategies=["zero3"], refused=True)
def test_copied_reference_is_refused(method, strategy, results):
    assert "`model` is a PhiForCausalLM with sharded weights" in results["sftmix_copied"]["refused"]


@only("sftmix")
@on_each_strategy(', confidence_source="online": same loss and weights as one process')
def test_online_confidence(method, strategy, results, one_process):
    """With an LM head that shares its weights."""
    assert_same_halves(results["sftmix_online"], one_process("sftmix_online"))


def assert_same_halves(result, expected):
    assert_same(result, expected)
    assert torch.equal(result["halves"], expected["halves"]) and len(result["halves"].unique()) > 1


def assert_same_confidence(folder, run):
    """Confidence of each example at each checkpoint; halves may be equal by chance."""
    ours, expected = (
        pd.read_parquet(folder / path / "reference" / "confidence.parquet") for path in (run, "one/sftmix_reference")
    )
    pd.testing.assert_frame_equal(ours, expected, rtol=1e-4)


@only("sftkey")
@on_each_strategy(": same generated answers as one process")
def test_answers(method, strategy, results, one_process):
    answers = one_process("sftkey")["answers"]
    assert results["sftkey"]["answers"] == answers and len(set(answers[0])) > 1


SCORED = pytest.mark.parametrize(
    ("method", "case"), [(case.method, name) for name, case in scoring_cases(Path(), "one").items()]
)


@SCORED
@on_each_strategy(": the processes share the scoring", strategies=["ddp", "fsdp2", "zero2"])
def test_scoring(method, case, strategy, results, one_process, folder):
    """Scores are equal to the last bit."""
    assert_same(results[case], one_process(case))
    by_one, by_two = (scores_in(folder / f"scores_of_{processes}") for processes in ("one", strategy))
    assert by_one == by_two and len(by_one) == len(scoring_cases(folder, "one"))


@SCORED
@on_each_strategy(": the processes share the scoring", strategies=["zero3"], refused=True)
def test_scoring_is_refused(method, case, strategy, results):
    assert "can't be loaded under DeepSpeed ZeRO-3. Run `hf-sft-variants score" in results[case]["refused"]


@SCORED
@on_each_strategy(": training with scores computed beforehand")
def test_found_scores(method, case, strategy, results, one_process):
    assert_same(results[f"{case}_found"], one_process(case))


@every_method
@on_each_strategy(" with cp_size=2 (context parallelism)", strategies=["fsdp2"], refused=True)
def test_context_parallelism_is_refused(method, strategy, results):
    assert "does not support `cp_size=2`: the tokens of a sample" in results[f"{method}_sharded"]["refused"]


@every_method
@on_each_strategy(" with sp_size=2 (sequence parallelism)", strategies=["zero3"], refused=True)
def test_sequence_parallelism_is_refused(method, strategy, results):
    assert "does not support `sp_size=2`: the tokens of a sample" in results[f"{method}_sharded"]["refused"]


# Assumptions of the launches


def test_accelerate_configurations_are_those_of_the_tests():
    assert {path.stem for path in (REPOSITORY / "recipes" / "accelerate").glob("*.yaml")} == set(STRATEGIES)


def test_sums_of_rounded_log_probs_are_in_float32():
    """In bfloat16, a sum of ones stops growing at 256."""
    outputs = SimpleNamespace(log_probs=torch.ones(1, 4, dtype=torch.bfloat16), label_mask=torch.ones(1, 4).bool())
    batch = make_annotated_batch({"labels": torch.ones(1, 5)}, outputs, {}, {}, NumItems())
    assert batch.log_probs.dtype == torch.float32


@needs("sftkey")
def test_deepspeed_rounds_no_counts(tiny_model, tokenizer, token_rows, tmp_path, monkeypatch):
    """DeepSpeed casts a model's inputs to bfloat16, where 1003 becomes 1004."""
    trainer = make_trainer(*METHODS["sftkey"].classes, tiny_model, tokenizer, token_rows, tmp_path, stages=["full"])
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", plugin)
    trainer.is_deepspeed_enabled = True
    batch = {"labels": torch.ones(1, 2), "num_items_in_step": {"weighted_tokens": torch.tensor(1003.0)}}
    prepared = trainer._prepare_inputs(batch)
    assert prepared["num_items_in_step"]["weighted_tokens"].item() == 1003
    assert prepared["labels"].dtype == torch.bfloat16
