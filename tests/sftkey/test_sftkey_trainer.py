"""The trainer: limit cases, losses against a slow reference, splits of a batch, stages in one run, resume."""

import copy
import logging
from functools import partial

import helpers
import pytest
import torch
from datasets import Dataset
from helpers import SMALL, assert_same_gradients
from peft import LoraConfig
from transformers import TrainerCallback, get_scheduler
from trl import SFTConfig, SFTTrainer

from hf_sft_variants import AnnotatedSFTTrainer, SFTKeyConfig, SFTKeyTrainer, StageSwitchCallback
from hf_sft_variants.errors import InputError
from hf_sft_variants.sftkey.stages import reset_state, stage_at, stage_starts


# Tags take many tokens of a vocabulary of 330
make_trainer, one_step_log = (
    partial(function, max_length=200) for function in (helpers.make_trainer, helpers.one_step_log)
)

LAYOUTS = {
    "8x1": {"per_device_train_batch_size": 8},
    "2x4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "1x8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "padding_free": {"per_device_train_batch_size": 8, "padding_free": True, "max_length": None},
}


@pytest.fixture
def make(tiny_model, tokenizer, tmp_path):
    """Makes an SFTKeyTrainer of rows and options."""
    return partial(make_trainer, SFTKeyTrainer, SFTKeyConfig, tiny_model, tokenizer, output_dir=tmp_path)


@pytest.fixture
def step_log(tiny_model, tokenizer, tmp_path):
    """What is logged and gradients of an optimizer step of an SFTKeyTrainer of rows and options."""
    return partial(one_step_log, SFTKeyTrainer, SFTKeyConfig, tiny_model, tokenizer, output_dir=tmp_path)


@pytest.fixture(scope="module")
def tagged_rows():
    """Twelve conversations with a tagged response of different lengths."""
    rows = []
    for first in (3, 14, 25, 36):
        for second in (2, 17, 58):
            steps = "\n".join(f"{first} + {n} = {first + n}" for n in range(second % 4 + 1))
            response = f"<Thinking>{steps}</Thinking>\n<Answer>{first + second}</Answer>"
            rows.append(
                {
                    "prompt": [{"role": "user", "content": f"What is {first} plus {second}?"}],
                    "completion": [{"role": "assistant", "content": response}],
                }
            )
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def key_rows():
    """Sixteen pre-tokenized rows with a masked prompt and a key of one to five tokens at the end."""
    generator = torch.Generator().manual_seed(2)
    rows = {"input_ids": [], "labels": [], "key_mask": []}
    for number, length in enumerate((30, 9, 17, 12, 25, 8, 21, 14, 29, 11, 11, 19, 10, 23, 16, 27)):
        input_ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        num_key = number % 5 + 1
        rows["input_ids"].append(input_ids)
        rows["labels"].append([-100] * (length // 4) + input_ids[length // 4 :])
        rows["key_mask"].append([0] * (length - num_key) + [1] * num_key)
    return Dataset.from_dict(rows)


def decoded_key(trainer, tokenizer, row=0):
    example = trainer.train_dataset[row]
    return tokenizer.decode([t for t, key in zip(example["input_ids"], example["key_mask"], strict=True) if key == 1])


def slow_loss(model, rows, on, weight=None):
    """Mean over the tokens of the rows that `on` picks, from the model's own logits, one row at a time."""
    total, count = 0.0, 0.0
    for row in rows:
        log_probs = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        for position in range(1, len(row["input_ids"])):
            label, key = row["labels"][position], row["key_mask"][position]
            if label == -100 or (on == "key" and not key):
                continue
            token_weight = weight if weight is not None and key else 1.0
            total = total - token_weight * log_probs[position - 1, label]
            count += token_weight
    return total / count


def slow_gradients(model, loss_of):
    model = copy.deepcopy(model)
    loss = loss_of(model)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


class TestLimitCaseIsSFTTrainer:
    def test_needs_no_key(self, make, chat_rows):
        trainer = make(chat_rows, stages=["full"])
        assert len(trainer.train_dataset) == len(chat_rows)
        assert all(1 not in mask for mask in trainer.train_dataset["key_mask"])


class TestLoss:
    @pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
    @pytest.mark.parametrize(
        "method, reference",
        [
            ({"stages": ["key"]}, lambda model, rows: slow_loss(model, rows, "key")),
            (
                {"stages": ["key"], "full_loss_weight": 0.3},
                lambda model, rows: slow_loss(model, rows, "key") + 0.3 * slow_loss(model, rows, "full"),
            ),
            ({"stages": ["full"], "key_loss_weight": 4.0}, lambda model, rows: slow_loss(model, rows, "full", 4.0)),
            ({"stages": ["full"], "key_loss_weight": 0.0}, lambda model, rows: slow_loss(model, rows, "full", 0.0)),
        ],
        ids=["key", "key_and_full", "weighted", "reasoning_only"],
    )
    def test_slow_reference(self, step_log, tiny_model, key_rows, method, reference, options):
        rows = key_rows.select(range(8))
        expected_loss, expected_gradients = slow_gradients(tiny_model, lambda model: reference(model, rows))
        log, gradients = step_log(rows, **method, **options)
        assert log["loss"] == pytest.approx(expected_loss, rel=1e-5)
        assert_same_gradients(expected_gradients, gradients, tolerance=2e-6)

    @pytest.mark.parametrize(
        "method",
        [
            {"stages": ["key"]},
            {"stages": ["key"], "full_loss_weight": 0.5},
            {"stages": ["full"], "key_loss_weight": 3},
        ],
    )
    def test_packed_equals_padded(self, step_log, key_rows, method):
        method = {"per_device_train_batch_size": 16, **method}
        padded, gradients = step_log(key_rows, **method)
        packed, packed_gradients = step_log(key_rows, packing=True, max_length=64, **method)
        assert_same_gradients(gradients, packed_gradients, tolerance=2e-6)
        for name in ("loss", "nll", "sftkey/key_nll", "sftkey/key_fraction"):
            assert padded[name] == pytest.approx(packed[name], rel=1e-5)

    def test_only_the_key_has_a_gradient_at_the_logits(self, make, tagged_rows):
        trainer = make(
            tagged_rows, stages=["key"], per_device_train_batch_size=4, train_sampling_strategy="sequential"
        )
        (inputs,), num_items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
        assert num_items == (inputs["key_mask"][:, 1:] == 1).sum() == (inputs["labels"][:, 1:] != -100).sum()
        plain = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
        assert torch.equal(inputs["input_ids"], plain["input_ids"])  # the context is unchanged
        assert torch.equal(inputs["attention_mask"], plain["attention_mask"])

        hidden = []

        def remember(module, args, output):
            output.last_hidden_state.retain_grad()
            hidden.append(output.last_hidden_state)

        hook = trainer.model.model.register_forward_hook(remember)
        trainer.current_gradient_accumulation_steps = 1
        trainer.compute_loss(trainer.model.train(), inputs, num_items_in_batch=num_items).backward()
        hook.remove()
        # The gradient at a hidden state is the head's product with that at its logits
        has_gradient = hidden[0].grad.abs().sum(-1)[:, :-1] > 0
        assert torch.equal(has_gradient, inputs["key_mask"][:, 1:] == 1)
        assert 0 < has_gradient.sum() < (plain["labels"] != -100).sum()

    def test_reasoning_loss_is_not_computed_but_evaluated(self, make, tiny_model, tokenizer, tagged_rows, tmp_path):
        trainer = make(
            tagged_rows,
            stages=["key"],
            max_steps=2,
            save_strategy="no",
            eval_strategy="steps",
            eval_steps=1,
            eval_dataset=tagged_rows,
        )
        plain = make_trainer(SFTTrainer, SFTConfig, tiny_model, tokenizer, tagged_rows, tmp_path)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate(tagged_rows)["eval_loss"], rel=1e-6)
        trainer.train()
        step = next(log for log in trainer.state.log_history if "loss" in log)
        evaluation = next(log for log in trainer.state.log_history if "eval_loss" in log)
        assert "sftkey/other_nll" not in step
        assert step["sftkey/key_nll"] == pytest.approx(step["nll"]) == pytest.approx(step["loss"], rel=1e-3)
        fraction = evaluation["eval_sftkey/key_fraction"]
        mixed = fraction * evaluation["eval_sftkey/key_nll"] + (1 - fraction) * evaluation["eval_sftkey/other_nll"]
        assert mixed == pytest.approx(evaluation["eval_nll"]) and 0 < fraction < 1
        assert evaluation["eval_loss"] == pytest.approx(evaluation["eval_nll"], rel=0.05)  # per-batch means
        assert step["sftkey/key_fraction"] == pytest.approx(fraction, rel=0.2)

    def test_nothing_to_learn_is_a_differentiable_zero(self, make, key_rows):
        for method in ({"stages": ["key"]}, {"stages": ["key"], "full_loss_weight": 1.0}, {"key_loss_weight": 0.0}):
            trainer = make(key_rows, **method)
            batch = trainer.data_collator([trainer.train_dataset[0]])
            batch["labels"][:] = -100
            for num_items in (None, 0):
                inputs = trainer._prepare_inputs(batch)
                if num_items == 0:
                    (inputs,), num_items = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
                trainer.current_gradient_accumulation_steps = 1
                loss = trainer.compute_loss(trainer.model.train(), inputs, num_items_in_batch=num_items)
                loss.backward()
                assert loss.item() == 0
                assert all(
                    parameter.grad is None or not parameter.grad.any() for parameter in trainer.model.parameters()
                )


def contents(row):
    return row["prompt"][0]["content"], row["completion"][0]["content"]


# Other forms of a row with a conversational prompt and completion
FORMS = {
    "messages": lambda row: {"messages": row["prompt"] + row["completion"]},
    "text": lambda row: {"text": "\n".join(contents(row))},
    "plain": lambda row: dict(zip(("prompt", "completion"), contents(row), strict=True)),
}


class TestKeysOfTheTrainer:
    def test_default_tags(self, make, tokenizer, tagged_rows):
        trainer = make(tagged_rows)
        assert decoded_key(trainer, tokenizer) == "\n<Answer>5</Answer><|im_end|>"
        trainer = make(tagged_rows, key_tags_in_loss=False)
        assert decoded_key(trainer, tokenizer) == "5<|im_end|>"

    @pytest.mark.parametrize(
        "options, key",
        [
            ({"key_delimiter": "####"}, "#### 5<|im_end|>"),
            ({"key_delimiter": "####", "key_tags_in_loss": False}, " 5<|im_end|>"),
            ({"key_pattern": r"####\s*(?P<key>\d+)"}, " 5<|im_end|>"),
        ],
    )
    @pytest.mark.parametrize("form", ["prompt_completion", *FORMS, "tokens"])
    def test_other_sources(self, make, tiny_model, tokenizer, chat_rows, tmp_path, options, key, form):
        rows = chat_rows
        if form == "tokens":
            plain = make_trainer(SFTTrainer, SFTConfig, tiny_model, tokenizer, rows, tmp_path)
            rows = plain.train_dataset.select_columns(["input_ids", "labels"])
        elif form != "prompt_completion":
            rows = rows.map(FORMS[form], remove_columns=rows.column_names)
        trainer = make(rows, **options)
        assert decoded_key(trainer, tokenizer) == key

    @pytest.mark.parametrize("form", ["prompt", "text_prompt", "messages", "answered_messages"])
    def test_columns_are_tagged_and_joined(self, make, tokenizer, form):
        question = [{"role": "user", "content": "What is 3 plus 2?"}]
        row = {"why": "3 + 2 = 5", "result": "5"}
        row |= {
            "prompt": {"prompt": question, "completion": [{"role": "assistant", "content": "#### 7"}]},
            "text_prompt": {"prompt": "What is 3 plus 2? "},
            "messages": {"messages": question},
            "answered_messages": {"messages": [*question, {"role": "assistant", "content": "#### 7"}]},
        }[form]
        options = {"reasoning_column": "why", "answer_column": "result"}
        trainer = make(Dataset.from_list([row]), **options)
        assert decoded_key(trainer, tokenizer) == "\n<Answer>5</Answer><|im_end|>"
        text = tokenizer.decode(trainer.train_dataset[0]["input_ids"])
        assert "<Thinking>3 + 2 = 5</Thinking>\n<Answer>5</Answer><|im_end|>" in text and "####" not in text
        learned = [label for label in trainer.train_dataset[0]["labels"] if label != -100]
        starts_with_response = tokenizer.decode(learned).startswith("<Thinking>")
        assert starts_with_response == (form in ("prompt", "text_prompt"))  # as SFTTrainer does
        raw, prepared = trainer.evaluate(Dataset.from_list([row])), trainer.evaluate(trainer.train_dataset)
        assert raw["eval_sftkey/key_nll"] == prepared["eval_sftkey/key_nll"]

    def test_prepared_set_is_evaluated_as_it_is(self, make, tagged_rows):
        trainer = make(tagged_rows, eval_dataset=tagged_rows)
        raw, prepared = trainer.evaluate(tagged_rows), trainer.evaluate(trainer.eval_dataset)
        assert raw["eval_sftkey/key_nll"] == prepared["eval_sftkey/key_nll"]

    def test_streaming(self, step_log, tagged_rows):
        stream = tagged_rows.to_iterable_dataset()
        logs = []
        for rows in (tagged_rows, stream):
            log, gradients = step_log(rows, stages=["key"], per_device_train_batch_size=4)
            logs.append((log["loss"], gradients))
        assert logs[0][0] == logs[1][0]
        assert_same_gradients(logs[0][1], logs[1][1])


class RunRecorder(TrainerCallback):
    """What the run is like just before each optimizer step, and the weights before it."""

    def __init__(self):
        self.moments, self.weights, self.learning_rates = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
        self.moments.append(max((int(s["step"]) for s in states if s), default=0))
        self.weights.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        self.learning_rates.append(optimizer.param_groups[0]["lr"])


@pytest.fixture
def run(make):
    """Trains in stages; returns the trainer and a [`RunRecorder`]."""
    return partial(staged_run, make)


def staged_run(make, rows, **options):
    recorder = RunRecorder()
    common = {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_strategy": "no", "num_train_epochs": 4}
    trainer = make(rows, callbacks=[recorder], **{**common, **options})
    trainer.train()
    return trainer, recorder


class TestStages:
    """Twelve rows, batches of four: three steps an epoch."""

    @pytest.mark.parametrize(
        "options, num_steps, boundary",
        [
            ({}, 12, 6),
            ({"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}, 16, 8),
            ({"packing": True, "max_length": 200, "per_device_train_batch_size": 2}, None, None),
            ({"max_steps": 7}, 7, 4),  # round(3.5) is 4
            ({"max_steps": 10, "stage_fractions": [0.7, 0.3]}, 10, 7),
        ],
    )
    def test_boundary(self, run, tagged_rows, options, num_steps, boundary):
        options = {"warmup_steps": 2, "lr_scheduler_type": "cosine", "stage_learning_rates": [1e-3, 2e-4], **options}
        trainer, recorder = run(tagged_rows, **options)
        num_steps = num_steps or trainer.state.max_steps
        boundary = boundary or num_steps // 2
        assert trainer.state.global_step == num_steps
        # The optimizer counts its steps from the beginning of each stage
        assert recorder.moments == [*range(boundary), *range(num_steps - boundary)]
        # The schedule, point by point: each stage is a run of its own
        expected = [
            rate
            for length, peak in ((boundary, 1e-3), (num_steps - boundary, 2e-4))
            for rate in schedule_of_a_run("cosine", peak, length, warmup_steps=2)
        ]
        assert recorder.learning_rates == pytest.approx(expected, rel=1e-6)
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert [log["learning_rate"] for log in logs] == pytest.approx(expected, rel=1e-6)
        assert [log["sftkey/stage"] for log in logs] == [1] * boundary + [2] * (num_steps - boundary)
        assert ["sftkey/other_nll" in log for log in logs] == [True] * boundary + [False] * (num_steps - boundary)

    def test_second_stage_starts_from_the_first_ones_weights(self, run, tagged_rows):
        _, both = run(tagged_rows)
        first, _ = run(tagged_rows, stages=["full"], num_train_epochs=2)
        for name, weights in first.model.named_parameters():
            assert torch.equal(weights, both.weights[6][name])

    @pytest.mark.parametrize("reset", [True, False])
    def test_optimizer_state(self, run, tagged_rows, reset):
        _, recorder = run(tagged_rows, reset_optimizer=reset)
        assert recorder.moments == ([*range(6), *range(6)] if reset else [*range(12)])

    def test_full_stages_without_reset_and_schedule_are_one_run(
        self, run, tiny_model, tokenizer, tagged_rows, tmp_path
    ):
        options = {"lr_scheduler_type": "constant", "stages": ["full", "full"], "reset_optimizer": False}
        control, _ = run(tagged_rows, **options)
        plain = make_trainer(
            AnnotatedSFTTrainer, SFTConfig, tiny_model, tokenizer, tagged_rows, tmp_path, lr_scheduler_type="constant",
            per_device_train_batch_size=4, learning_rate=1e-3, save_strategy="no", num_train_epochs=4,
        )  # fmt: skip
        plain.train()
        for name, weights in plain.model.named_parameters():
            assert torch.equal(weights, control.model.get_parameter(name))

    def test_three_stages(self, run, tagged_rows):
        options = {"stages": ["key", "full", "key"], "stage_fractions": [0.25, 0.5, 0.25]}
        trainer, recorder = run(tagged_rows, **options)
        assert recorder.moments == [*range(3), *range(6), *range(3)]
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert ["sftkey/other_nll" in log for log in logs] == [False] * 3 + [True] * 6 + [False] * 3

    def test_logs_of_two_stages_are_not_mixed(self, run, tagged_rows):
        trainer, _ = run(tagged_rows, logging_steps=5)
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert [(log["step"], log["sftkey/stage"]) for log in logs] == [(5, 1), (6, 1), (10, 2)]

    def test_boundary_inside_an_epoch_is_a_warning(self, run, tagged_rows, caplog):
        run(tagged_rows, num_train_epochs=2)
        assert "inside an epoch" not in caplog.text
        run(tagged_rows, num_train_epochs=1)
        assert "A stage begins at optimizer step 2, inside an epoch of 3 steps" in caplog.text

    def test_users_callback_takes_the_place(self, make, tagged_rows):
        trainer = make(tagged_rows, callbacks=[StageSwitchCallback()])
        assert sum(isinstance(c, StageSwitchCallback) for c in trainer.callback_handler.callbacks) == 1

    def test_starts(self):
        assert stage_starts([0.5, 0.5], 7) == [0, 4, 7]
        assert stage_starts([1.0], 7) == [0, 7]
        assert [stage_at(step, [0.2, 0.3, 0.5], 10) for step in range(11)] == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2]
        with pytest.raises(InputError, match=r"of 1 optimizer steps leave stage 1 without a step"):
            stage_starts([0.5, 0.5], 1)

    def test_reset_reaches_the_wrapped_optimizer(self, tiny_model):
        class Wrapper:
            def __init__(self, optimizer):
                self.optimizer = optimizer

        adam = torch.optim.AdamW(tiny_model.parameters())
        tiny_model(input_ids=torch.tensor([[4, 5]]), labels=torch.tensor([[4, 5]])).loss.backward()
        adam.step()
        assert adam.state
        reset_state(Wrapper(Wrapper(adam)))
        assert not adam.state


def schedule_of_a_run(kind, peak, num_steps, warmup_steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    schedule = get_scheduler(kind, optimizer, num_warmup_steps=warmup_steps, num_training_steps=num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


class TestResume:
    """Twelve steps, the stages' boundary at six."""

    @pytest.mark.parametrize("options", [{}, {"lora": True}, {"packing": True, "max_length": 200}], ids=str)
    @pytest.mark.parametrize("stop", [3, 6, 8])
    def test_same_weights(self, run, make, tagged_rows, tmp_path, stop, options):
        options = {
            "save_strategy": "steps",
            "save_steps": stop,
            "max_steps": 12,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.2,
            **options,
        }
        if options.pop("lora", False):
            options["peft_config"] = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
        unbroken, _ = run(tagged_rows, **options)
        resumed = make(tagged_rows, per_device_train_batch_size=4, learning_rate=1e-3, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
        for name, weights in unbroken.model.named_parameters():
            assert torch.equal(weights, resumed.model.get_parameter(name)), name
        steps = {log["step"]: log for log in unbroken.state.log_history if "loss" in log}
        for log in [log for log in resumed.state.log_history if log["step"] > stop and "loss" in log]:
            assert log["loss"] == steps[log["step"]]["loss"]
            assert log["learning_rate"] == steps[log["step"]]["learning_rate"]

    @pytest.mark.parametrize(
        "changed, message",
        [
            ({"max_steps": 8}, r"stages begin at the optimizer steps \[0, 6\], but those of this run at \[0, 4\]"),
            ({"stage_fractions": [0.25, 0.75]}, r"`stage_fractions` was \[0.5, 0.5\], is now \[0.25, 0.75\]"),
            ({"stages": ["key"] * 2}, r"`stages` was \['full', 'key'\], is now \['key', 'key'\]"),
        ],
    )
    def test_other_stages_are_refused(self, run, make, tagged_rows, tmp_path, changed, message):
        options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 12}
        run(tagged_rows, **options)
        resumed = make(tagged_rows, per_device_train_batch_size=4, **{**options, **changed})
        with pytest.raises(InputError, match=message):
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


class TestBadInput:
    def rows(self, *responses):
        question = [{"role": "user", "content": "What is <Answer>3</Answer> plus 2?"}]
        return Dataset.from_list(
            [{"prompt": question, "completion": [{"role": "assistant", "content": text}]} for text in responses]
        )

    @pytest.mark.parametrize(
        "options, response, message",
        [
            ({}, "#### 5", "the tag '<Thinking>' is not there"),
            ({}, "", "there is no assistant turn with text"),
            ({"key_delimiter": "<Answer>"}, "<Answer>5<Answer>6", "`key_delimiter='<Answer>'` is there 2 times"),
            ({"key_pattern": r"<Answer>(?P<key>\d+)"}, "#### 5", "is not there"),
        ],
    )
    def test_no_key(self, make, caplog, options, response, message):
        good = "<Thinking>a</Thinking>\n<Answer>5</Answer>"
        rows = self.rows(good, good, response)
        with pytest.raises(ValueError, match=f"Row 2 of the train dataset: .*{message}"):
            make(rows, **options)
        assert len(make(rows, missing_key="drop", **options).train_dataset) == 2
        assert "Dropped 1 of 3 examples of the train dataset: 1 without a key or with several, 0 with" in caplog.text

    @pytest.mark.parametrize("packing", [False, True])
    def test_key_cut_by_truncation(self, make, tokenizer, caplog, packing):
        short, long = (f"<Thinking>{'a ' * n}</Thinking>\n<Answer>12345</Answer>" for n in (2, 40))
        rows = self.rows(short, long, short)
        trainer = make(rows, max_length=120, packing=packing)
        assert "Dropped 1 of 3 examples of the train dataset: 0 without a key or with several, 1 with a key that" in (
            caplog.text
        )
        key = "\n<Answer>12345</Answer><|im_end|>"
        rows = trainer.train_dataset
        tokens = [
            token
            for ids, mask in zip(rows["input_ids"], rows["key_mask"], strict=True)
            for token, on_key in zip(ids, mask, strict=True)
            if on_key == 1
        ]
        assert tokenizer.decode(tokens) == 2 * key
        with pytest.raises(ValueError, match="No example of the train dataset has a key within max_length=120"):
            make(self.rows(long), max_length=120)

    def test_columns(self, make):
        options = {"reasoning_column": "why", "answer_column": "result"}
        question = [{"role": "user", "content": "What is 3 plus 2?"}]
        cases = [
            ({"prompt": question, "why": "a"}, "has no column `result`, which `answer_column` names"),
            ({"prompt": question, "why": "a", "result": 5}, "Row 0 of the train dataset: column `result` .* has 5"),
            ({"text": "x", "why": "a", "result": "5"}, "has neither `prompt` nor `messages`"),
            ({"prompt": question, "why": "a</Thinking>", "result": "5"}, "'</Thinking>' is there 2 times"),
        ]
        for row, message in cases:
            with pytest.raises(ValueError, match=message):
                make(Dataset.from_list([row]), **options)

    def test_own_key_mask(self, make, key_rows):
        wrong = key_rows.map(lambda row, i: {"key_mask": [2 if i == 4 else 1] * len(row["labels"])}, with_indices=True)
        with pytest.raises(ValueError, match="Row 4 of the train dataset: column `key_mask` has 2"):
            make(wrong)
        short = key_rows.map(lambda row: {"key_mask": row["key_mask"][:-1]})
        with pytest.raises(ValueError, match="Row 0 of the train dataset: column `key_mask` has 29 values"):
            make(short)

    def test_a_single_stage_has_all_steps(self, tmp_path):
        assert SFTKeyConfig(str(tmp_path), **SMALL, stages=["key"]).stage_fractions == [1.0]

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"max_steps": 1}, "leave stage 1 without a step"),
            ({"max_steps": 4, "stage_fractions": [0.95, 0.05]}, "leave stage 2 without a step"),
            (
                {"lr_scheduler_type": "greedy", "eval_strategy": "epoch"},
                "`lr_scheduler_type='greedy'` is not supported",
            ),
        ],
    )
    def test_at_the_start_of_training(self, run, tagged_rows, options, message):
        with pytest.raises(InputError, match=message):
            run(tagged_rows, eval_dataset=tagged_rows, **options)

    def test_users_scheduler(self, tiny_model, tokenizer, tagged_rows, tmp_path):
        optimizer = torch.optim.SGD(tiny_model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
        args = SFTKeyConfig(str(tmp_path), **SMALL)
        with pytest.raises(ValueError, match="`optimizers` includes a learning-rate scheduler"):
            SFTKeyTrainer(
                tiny_model, args, train_dataset=tagged_rows, processing_class=tokenizer,
                optimizers=(optimizer, schedule),
            )  # fmt: skip

    def test_answer_evaluation_without_answers(self, make, tagged_rows):
        for options in ({}, {"eval_dataset": tagged_rows}):
            with pytest.raises(ValueError, match="`answer_eval_steps=5` needs an `eval_dataset`"):
                make(tagged_rows, answer_eval_steps=5, **options)


def test_answers_are_evaluated_when_asked_for(make, tagged_rows, caplog):
    caplog.set_level(logging.WARNING)
    held_out = tagged_rows.add_column("answer", ["5"] * len(tagged_rows)).select(range(3))
    trainer = make(
        tagged_rows,
        eval_dataset=held_out,
        max_steps=4,
        save_strategy="no",
        answer_eval_steps=2,
        answer_eval_max_new_tokens=4,
        answer_eval_samples=2,
    )
    trainer.train()
    reports = [log for log in trainer.state.log_history if "sftkey/score" in log]
    assert [report["step"] for report in reports] == [2, 4]
    assert all(report["sftkey/accuracy"] == 0 for report in reports)


def test_answers_of_each_evaluation_set_are_evaluated(make, tagged_rows, monkeypatch):
    held_out = tagged_rows.add_column("answer", ["5"] * len(tagged_rows))
    sets = {"first": held_out.select(range(3)), "second": held_out.select(range(3, 8))}
    asked = []

    def generate(model, tokenizer, prompts, *args, **options):
        asked.append(prompts)
        return ["<Thinking>a</Thinking><Answer>5</Answer>" if len(prompts) == 5 else "<Answer>6</Answer>"] * len(
            prompts
        )

    monkeypatch.setattr("hf_sft_variants.sftkey.answer_accuracy.generate_answers", generate)
    trainer = make(
        tagged_rows,
        eval_dataset=sets,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=2,
        save_strategy="no",
        answer_eval_steps=2,
    )
    trainer.train()
    scores = {name: value for log in trainer.state.log_history for name, value in log.items() if "accuracy" in name}
    assert {name: value for name, value in scores.items() if "sftkey" in name} == {
        "first_sftkey/accuracy": 0,
        "second_sftkey/accuracy": 1,
    }
    assert asked == [rows["prompt"][:] for rows in sets.values()]
    assert any("eval_first_sftkey/key_nll" in log for log in trainer.state.log_history)  # named alike


def test_every_evaluation_set_needs_answers(make, tagged_rows):
    sets = {"with": tagged_rows.add_column("answer", ["5"] * len(tagged_rows)), "without": tagged_rows}
    with pytest.raises(
        ValueError, match=r"`answer_eval_steps=5` needs .* found \['prompt', .* in the without dataset"
    ):
        make(tagged_rows, eval_dataset=sets, answer_eval_steps=5)
