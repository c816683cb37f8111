import copy
import json

import pytest
import torch
from answers_of_two_processes import train_and_answer
from datasets import Dataset
from helpers import make_trainer
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_sft_variants.errors import InputError
from hf_sft_variants.evaluation import generate_answers, tagged_scores
from hf_sft_variants.sftkey import answer_accuracy
from hf_sft_variants.sftkey.answer_accuracy import AnswerAccuracyCallback


NAMES = ["sftkey/accuracy", "sftkey/format_rate", "sftkey/score"]


@pytest.fixture
def held_out(chat_rows) -> Dataset:
    answers = [row["completion"][0]["content"].split()[-1] for row in chat_rows]
    return chat_rows.add_column("answer", answers).remove_columns("completion")


@pytest.fixture
def right_answers(monkeypatch, held_out):
    """Every answer is tagged and right, but for the first two questions; returns what was asked for each time."""
    calls = []
    texts = {str(row["prompt"]): f"<Thinking>a</Thinking>\n<Answer>{row['answer']}</Answer>" for row in held_out}
    texts[str(held_out[0]["prompt"])] = "#### " + held_out[0]["answer"]
    texts[str(held_out[1]["prompt"])] = "<Thinking>a</Thinking>\n<Answer>no</Answer>"

    def generate(model, tokenizer, prompts, max_new_tokens, batch_size, **options):
        calls.append({"prompts": prompts, "max_new_tokens": max_new_tokens, "batch_size": batch_size})
        return [texts[str(prompt)] for prompt in prompts]

    monkeypatch.setattr(answer_accuracy, "generate_answers", generate)
    return calls


class StopAfterFirstEpoch(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


class StopAtThirdStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


class RecordState(TrainerCallback):
    """What the callback before it must leave as it was, after every step."""

    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        modules = list(model.modules())
        self.states.append(
            {
                "modes": [module.training for module in modules],
                "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in modules],
                "use_cache": model.config.use_cache,
                "generation_config": model.generation_config.to_dict(),
                "padding_side": processing_class.padding_side,
                "random_state": torch.get_rng_state().tolist(),
                "should_log": control.should_log,
            }
        )


def train(model, tokenizer, rows, tmp_path, held_out=None, steps=2, callback_options=None, **options):
    """A short run, with an `AnswerAccuracyCallback` if there are held-out rows."""
    record = RecordState()
    options = {"max_steps": 5, "per_device_train_batch_size": 2, "save_strategy": "no", **options}
    trainer = make_trainer(SFTTrainer, SFTConfig, model, tokenizer, rows, tmp_path, **options)
    if held_out is not None:
        callback_options = {"max_new_tokens": 4, "batch_size": 5, **(callback_options or {})}
        trainer.add_callback(AnswerAccuracyCallback(trainer, held_out, steps, **callback_options))
    trainer.add_callback(record)
    trainer.train()
    return trainer, record.states


def measured(trainer):
    return [entry for entry in trainer.state.log_history if "sftkey/score" in entry]


def logged_otherwise(trainer):
    """Without the speed."""
    return [
        {name: value for name, value in entry.items() if "per_second" not in name and "runtime" not in name}
        for entry in trainer.state.log_history
        if "sftkey/score" not in entry
    ]


def test_answers_are_scored_every_few_steps_and_after_the_last_one(
    tiny_model, tokenizer, chat_rows, held_out, right_answers, tmp_path
):
    callback_options = {"max_new_tokens": 7, "batch_size": 3}
    trainer, _ = train(tiny_model, tokenizer, chat_rows, tmp_path, held_out, callback_options=callback_options)
    assert [entry["step"] for entry in measured(trainer)] == [2, 4, 5]
    for entry in measured(trainer):
        assert [name for name in entry if name not in ("epoch", "step")] == NAMES
        assert [entry[name] for name in NAMES] == pytest.approx([11 / 12, 11 / 12, 11 / 12])
    assert right_answers == 3 * [{"prompts": held_out["prompt"][:], "max_new_tokens": 7, "batch_size": 3}]
    trainer, _ = train(tiny_model, tokenizer, chat_rows, tmp_path, held_out, max_steps=4)
    assert [entry["step"] for entry in measured(trainer)] == [2, 4]


def test_the_first_samples_are_used(tiny_model, tokenizer, chat_rows, held_out, right_answers, tmp_path):
    options = {"callback_options": {"num_samples": 3}, "max_steps": 1}
    trainer, _ = train(tiny_model, tokenizer, chat_rows, tmp_path, held_out, **options)
    assert right_answers[0]["prompts"] == held_out["prompt"][:3]
    assert measured(trainer)[0]["sftkey/accuracy"] == pytest.approx(2 / 3)


def test_each_of_several_sets_has_its_own_scores(tiny_model, tokenizer, chat_rows, held_out, right_answers, tmp_path):
    sets = {"easy": held_out.select(range(2, 6)), "hard": held_out.select(range(3))}
    trainer, _ = train(tiny_model, tokenizer, chat_rows, tmp_path, sets, max_steps=1)
    (entry,) = (entry for entry in trainer.state.log_history if "easy_sftkey/accuracy" in entry)
    assert [entry[f"easy_{name}"] for name in NAMES] == [1, 1, 1]
    assert [entry[f"hard_{name}"] for name in NAMES] == pytest.approx([2 / 3, 2 / 3, 2 / 3])
    assert not set(NAMES) & set(entry)


def test_training_that_stops_between_steps_is_measured_at_its_end(
    tiny_model, tokenizer, chat_rows, held_out, right_answers, tmp_path
):
    options = {"max_steps": -1, "num_train_epochs": 3, "callbacks": [StopAfterFirstEpoch()]}
    trainer, _ = train(tiny_model, tokenizer, chat_rows, tmp_path, held_out, steps=100, **options)
    assert [entry["step"] for entry in measured(trainer)] == [6]


@pytest.mark.parametrize(("callbacks", "last_step"), [([], 5), ([StopAtThirdStep()], 3)])
def test_the_last_measurement_is_logged_before_training_ends(
    tiny_model, tokenizer, chat_rows, held_out, right_answers, tmp_path, callbacks, last_step
):
    trainer, _ = train(tiny_model, tokenizer, chat_rows, tmp_path, held_out, steps=100, callbacks=callbacks)
    assert [entry["step"] for entry in measured(trainer)] == [last_step]
    assert "train_runtime" in trainer.state.log_history[-1]


@pytest.mark.parametrize("prompt_type", ["conversation", "text"])
def test_it_is_the_model_in_training_that_answers(tiny_model, tokenizer, chat_rows, held_out, tmp_path, prompt_type):
    if prompt_type == "text":
        texts = [row["prompt"][0]["content"] for row in held_out]
        held_out = held_out.remove_columns("prompt").add_column("prompt", texts)
    # After one step with this rate the model says something else, and something that holds a number
    options = {"max_steps": 1, "learning_rate": 1e-2, "callback_options": {"max_new_tokens": 12}}
    start = generate_answers(tiny_model, tokenizer, held_out["prompt"], 12)
    trainer, _ = train(tiny_model, tokenizer, chat_rows, tmp_path, held_out, **options)
    end = generate_answers(trainer.model, tokenizer, held_out["prompt"], 12)
    assert end != start
    with_own_answers = held_out.remove_columns("answer").add_column("answer", end)
    with_own_answers = with_own_answers.map(lambda row: {"answer": f"#### {row['answer']}"})
    callback = AnswerAccuracyCallback(trainer, with_own_answers, steps=1, max_new_tokens=12, batch_size=5)
    assert callback._generate(held_out["prompt"][:]) == end
    scores = tagged_scores(end, held_out["answer"])
    assert [measured(trainer)[0][name] for name in NAMES] == [
        scores["accuracy"],
        scores["format_rate"],
        scores["score"],
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "logging_steps": 2},
        {"peft_config": LoraConfig(target_modules="all-linear", lora_dropout=0.2)},
    ],
    ids=["plain", "checkpointing", "accumulation", "lora"],
)
def test_training_is_not_disturbed(tiny_model, tokenizer, chat_rows, held_out, tmp_path, options):
    tiny_model.config.attention_dropout = 0.2  # so that a random number too many would show
    model = type(tiny_model)(tiny_model.config)
    model.load_state_dict(tiny_model.state_dict())
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    alone, states_alone = train(model, tokenizer, chat_rows, tmp_path, **copy.deepcopy(options))
    watched, states = train(model, tokenizer, chat_rows, tmp_path, held_out, 1, **copy.deepcopy(options))
    assert len(measured(watched)) == 5
    assert logged_otherwise(watched) == logged_otherwise(alone)
    assert states == states_alone
    for (name, weight), other in zip(watched.model.named_parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_tensor_parallelism_is_refused(monkeypatch, tiny_model, tokenizer, chat_rows, held_out, tmp_path):
    monkeypatch.setattr(SFTTrainer, "get_tp_size", lambda self: 2)
    with pytest.raises(InputError, match="tensor parallelism"):
        train(tiny_model, tokenizer, chat_rows, tmp_path, held_out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "`steps` must be .* got 0"),
        ({"num_samples": 0}, "`num_samples` must be .* got 0"),
        ({"batch_size": -1}, "`batch_size` must be .* got -1"),
        ({"answer_tags": "<Answer>"}, "`answer_tags` is '<Answer>'"),
        ({"dataset": [{"prompt": "a", "answer": "b"}]}, "`dataset` must be .* got list"),
        ({"dataset": {"sums": [{"prompt": "a", "answer": "b"}]}}, r"`dataset\['sums'\]` must be .* got list"),
        ({"dataset": Dataset.from_dict({"prompt": ["a"]})}, "no column 'answer', only 'prompt'"),
        ({"dataset": Dataset.from_dict({"prompt": [], "answer": []})}, "`dataset` is empty"),
        (
            {"dataset": Dataset.from_dict({"prompt": ["a", "b"], "answer": ["5", None]})},
            "`dataset`: `answer` of row 1 is None",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(held_out, options, message):
    with pytest.raises(InputError, match=message):
        AnswerAccuracyCallback(None, **{"dataset": held_out, "steps": 1, **options})


@pytest.mark.distributed
def test_two_processes_share_the_prompts(tiny_model, tokenizer, chat_rows, held_out, tmp_path, other_process):
    tiny_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    chat_rows.to_json(tmp_path / "rows.jsonl")
    held_out.select(range(7)).to_json(tmp_path / "held_out.jsonl")
    assert other_process.run(train_and_answer, tmp_path, forks=2) == 0
    first, second = (json.loads((tmp_path / f"results{rank}.json").read_text()) for rank in (0, 1))
    assert first["log"] == second["log"]
    assert first["generations"] == second["generations"] == first["generations_of_one"]
    assert sorted(first["rows"] + second["rows"]) == [0, 1, 2, 3, 4, 5, 6, 6]  # the last one again, to be as many
    assert first["weights_equal"] and second["weights_equal"]
