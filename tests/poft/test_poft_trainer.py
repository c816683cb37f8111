import math

import pytest
import torch
from datasets import Dataset
from helpers import (
    assert_same_gradients,
    make_trainer,
    one_step,
    one_step_log,
    padded_document_log_probs,
)
from trl import SFTConfig, SFTTrainer

from hf_sft_variants import PoFTConfig, PoFTTrainer, ReferenceScoringCallback
from hf_sft_variants.errors import InputError


CLASSES = (PoFTTrainer, PoFTConfig)
LAYOUTS = {
    "padded": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "packed": {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 7 plus 5?"},
    {"role": "assistant", "content": "Add the ones: 12"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes 🙂 "},
]


@pytest.fixture(scope="module")
def scored_rows(token_rows):
    """Eight pre-tokenized rows, each with what two reference models think of it."""
    rows = token_rows.select(range(8))
    return rows.add_column("ref_logps", [[-5.0 - row / 4, -6.0 + row % 3] for row in range(len(rows))])


@pytest.fixture
def train_set(tiny_model, tokenizer, tmp_path):
    """Makes a trainer on the tiny model and returns its prepared training set."""

    def prepare(rows, **options):
        return make_trainer(*CLASSES, tiny_model, tokenizer, rows, tmp_path, **options).train_dataset

    return prepare


@pytest.fixture
def other_template(tokenizer, monkeypatch):
    return lambda template: monkeypatch.setattr(tokenizer, "chat_template", template)


def expected_examples(model, rows):
    """r_θ, r̄ and the mean cross-entropy with its graph, document by document from the model's own logits."""
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="none")
        supervised = [t for t, label in enumerate(row["labels"][1:]) if label != -100]
        yield losses[supervised].mean(), sum(row["ref_logps"]) / len(row["ref_logps"])


def expected_loss_and_gradients(model, rows, beta=1.0, gamma=0.0):
    """The loss of the formula, and the gradients of the cross-entropy weighted by the detached τ."""
    loss, weighted = 0.0, 0.0
    for cross_entropy, reference in expected_examples(model, rows):
        logit = beta * (-cross_entropy.item() - reference) + gamma
        loss += math.log1p(math.exp(-logit)) / len(rows)
        weighted = weighted + beta / (1 + math.exp(logit)) * cross_entropy / len(rows)
    model.zero_grad()
    weighted.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


class TestLoss:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_loss_gradients_and_metrics_in_every_layout(self, layout, tiny_model, tokenizer, scored_rows, tmp_path):
        parameters = {"beta": 2.0, "gamma": 0.5}
        loss, gradients = expected_loss_and_gradients(tiny_model, scored_rows, **parameters)
        options = {"per_device_train_batch_size": 8, **parameters, **LAYOUTS[layout]}
        log, our_gradients = one_step_log(*CLASSES, tiny_model, tokenizer, scored_rows, tmp_path, **options)
        assert log["loss"] == pytest.approx(loss, rel=1e-6)
        assert_same_gradients(our_gradients, gradients, tolerance=1e-6)

        examples = [(-loss.item(), reference) for loss, reference in expected_examples(tiny_model, scored_rows)]
        taus = [1 / (1 + math.exp(2 * (r - reference) + 0.5)) for r, reference in examples]
        expected = {
            "poft/loss": loss,
            "poft/r_theta": sum(r for r, _ in examples) / 8,
            "poft/reference_0": sum(-5 - row / 4 for row in range(8)) / 8,
            "poft/reference_1": sum(-6 + row % 3 for row in range(8)) / 8,
            "poft/reference_mean": sum(reference for _, reference in examples) / 8,
            "poft/margin": sum(r - reference for r, reference in examples) / 8,
            "poft/win_rate": sum(r > reference for r, reference in examples) / 8,
            "poft/tau_mean": sum(taus) / 8,
            "poft/tau_min": min(taus),
            "poft/tau_max": max(taus),
            "poft/effective_sample_size": sum(taus) ** 2 / 8 / sum(tau**2 for tau in taus),
        }
        assert {name: log[name] for name in log if name.startswith("poft/")} == pytest.approx(expected, rel=1e-5)

    def test_evaluation_reports_loss_nll_and_margins(self, tiny_model, tokenizer, scored_rows, tmp_path):
        trainer = make_trainer(
            *CLASSES, tiny_model, tokenizer, scored_rows, tmp_path,
            eval_dataset={"first": scored_rows, "second": scored_rows.select([0])}, per_device_eval_batch_size=4,
        )  # fmt: skip
        metrics = trainer.evaluate()
        loss, _ = expected_loss_and_gradients(tiny_model, scored_rows)
        assert metrics["eval_first_loss"] == pytest.approx(loss, rel=1e-5)
        assert metrics["eval_first_poft/tau_min"] < metrics["eval_first_poft/tau_max"]
        assert metrics["eval_second_poft/tau_min"] == metrics["eval_second_poft/tau_max"]
        again = trainer.evaluate(trainer.eval_dataset["first"])  # which is prepared already
        assert again["eval_loss"] == metrics["eval_first_loss"]
        margins = [-loss.item() - reference for loss, reference in expected_examples(tiny_model, scored_rows)]
        assert again["eval_poft/margin"] == pytest.approx(sum(margins) / 8, rel=1e-5)
        losses = [padded_document_log_probs(tiny_model, row["input_ids"], row["labels"]) for row in scored_rows]
        losses = [-log_prob for of_row in losses for log_prob in of_row if log_prob is not None]
        assert again["eval_nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)

    @pytest.mark.parametrize("batch_size", [1, 2, 8])
    def test_evaluation_loss_is_the_mean_over_examples_when_packed(
        self, batch_size, tiny_model, tokenizer, scored_rows, tmp_path
    ):
        trainer = make_trainer(
            *CLASSES, tiny_model, tokenizer, scored_rows, tmp_path,
            eval_dataset=scored_rows, packing=True, per_device_eval_batch_size=batch_size,
        )  # fmt: skip
        assert len(trainer.eval_dataset) < len(scored_rows)
        loss, _ = expected_loss_and_gradients(tiny_model, scored_rows)
        assert trainer.evaluate()["eval_poft/loss"] == pytest.approx(loss, rel=1e-5)

    def test_a_micro_batch_without_scored_tokens(self, tiny_model, tokenizer, scored_rows, tmp_path):
        """Its neighbour learns as if alone, also when nothing was prepared."""
        prepared = make_trainer(*CLASSES, tiny_model, tokenizer, scored_rows.select([0]), tmp_path).train_dataset
        empty = prepared.map(lambda row: {"scored_mask": [0] * len(row["input_ids"])})
        rows = Dataset.from_list([*empty, *prepared])
        options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "per_device_train_batch_size": 1}
        loss, gradients = one_step(
            *CLASSES, tiny_model, tokenizer, rows, tmp_path, gradient_accumulation_steps=2, **options
        )
        alone, gradients_alone = one_step(*CLASSES, tiny_model, tokenizer, prepared, tmp_path, **options)
        assert loss == pytest.approx(alone)
        assert_same_gradients(gradients, gradients_alone, tolerance=1e-6)


class TestControls:
    @pytest.mark.parametrize("layout", [*LAYOUTS, "bfd_split", "wrapped", "truncated"])
    def test_uniform_is_the_mean_cross_entropy_of_examples(self, layout, tiny_model, tokenizer, token_rows, tmp_path):
        """It needs no reference, and accepts every packing; where that cuts examples, their parts are examples."""
        packed = {"packing": True, "packing_strategy": layout}
        options = LAYOUTS.get(layout, {"max_length": 20, **(packed if layout != "truncated" else {})})
        options = {"preference_weighting": "uniform", "per_device_train_batch_size": 8, **options}
        common = (*CLASSES, tiny_model, tokenizer, token_rows.select(range(8)), tmp_path)
        means = []
        for row in make_trainer(*common, **options).train_dataset:
            end = 0
            for length in row.get("seq_lengths", [len(row["input_ids"])]):
                start, end = end, end + length
                found = padded_document_log_probs(tiny_model, row["input_ids"][start:end], row["labels"][start:end])
                means.append([-log_prob for log_prob in found if log_prob is not None])
        means = [sum(losses) / len(losses) for losses in means if losses]
        assert one_step(*common, **options)[0] == pytest.approx(sum(means) / len(means), rel=1e-5)

    def test_constant_is_scaled_uniform(self, tiny_model, tokenizer, scored_rows, tmp_path):
        common = (*CLASSES, tiny_model, tokenizer, scored_rows, tmp_path)
        loss, gradients = one_step(*common, preference_weighting="uniform")
        options = {"preference_weighting": "constant", "beta": 2.0, "gamma": 1.0}
        log, constant_gradients = one_step_log(*common, **options)
        weight = 2 / (1 + math.e)
        assert log["loss"] == pytest.approx(weight * loss)
        assert log["poft/tau_mean"] == log["poft/tau_min"] == pytest.approx(weight / 2)
        assert log["poft/effective_sample_size"] == pytest.approx(1)
        assert "poft/margin" in log
        scaled = {name: weight * gradient for name, gradient in gradients.items()}
        assert_same_gradients(constant_gradients, scaled, tolerance=1e-6)

    def test_uniform_of_equal_lengths_is_sft(self, tiny_model, tokenizer, tmp_path):
        rows = Dataset.from_dict({"input_ids": [[3, 4, 5, 6], [7, 8, 9, 10]]})
        loss, gradients = one_step(SFTTrainer, SFTConfig, tiny_model, tokenizer, rows, tmp_path)
        options = {"preference_weighting": "uniform"}
        log, our_gradients = one_step_log(*CLASSES, tiny_model, tokenizer, rows, tmp_path, **options)
        assert log["loss"] == pytest.approx(loss) == pytest.approx(log["nll"])
        assert_same_gradients(our_gradients, gradients, tolerance=1e-6)
        assert {name for name in log if name.startswith("poft/")} == {"poft/loss", "poft/r_theta"}

    def test_uniform_ignores_references_and_truncates(self, train_set, token_rows):
        rows = train_set(token_rows, preference_weighting="uniform", reference_models=["nowhere"], max_length=12)
        assert max(map(len, rows["input_ids"])) == 12 and len(rows) == len(token_rows)


class TestScoredTokens:
    def text_of(self, tokenizer, row):
        ids = [token for token, is_scored in zip(row["input_ids"], row["scored_mask"], strict=True) if is_scored]
        return tokenizer.decode(ids)

    @pytest.mark.parametrize("end", [True, False])
    def test_of_a_conversation(self, end, train_set, tokenizer):
        rows = Dataset.from_dict({"messages": [CONVERSATION], "ref_logps": [[-1.0]]})
        (row,) = train_set(rows, score_end_of_turn=end, max_length=None)
        parts = ["Add the ones: 12", "Yes 🙂 "]
        assert self.text_of(tokenizer, row) == "".join(part + "<|im_end|>" * end for part in parts)
        assert row["labels"] == row["input_ids"]  # TRL's stay as they are

    def test_of_a_prompt_and_a_completion(self, train_set, tokenizer):
        rows = Dataset.from_dict(
            {"prompt": [CONVERSATION[:4]], "completion": [CONVERSATION[4:]], "ref_logps": [[-1.0]]}
        )
        (row,) = train_set(rows, max_length=None)
        assert self.text_of(tokenizer, row) == "Yes 🙂 <|im_end|>"
        rows = Dataset.from_dict({"prompt": ["What is 12"], "completion": [" plus 30?"], "ref_logps": [[-1.0]]})
        for end in (True, False):
            (row,) = train_set(rows, score_end_of_turn=end)
            assert self.text_of(tokenizer, row) == " plus 30?" + "<|im_end|>" * end

    def test_of_tokens_and_of_plain_text_are_the_labels(self, train_set, tokenizer, scored_rows):
        for row in train_set(scored_rows):
            assert row["scored_mask"] == [int(label != -100) for label in row["labels"]]
        (row,) = train_set(Dataset.from_dict({"text": ["What is 12?"], "ref_logps": [[-1.0]]}))
        assert self.text_of(tokenizer, row) == "What is 12?<|im_end|>"

    def test_only_they_are_in_the_loss(self, tiny_model, tokenizer, tmp_path):
        rows = Dataset.from_dict({"messages": [CONVERSATION], "ref_logps": [[-3.0]]})
        log, _ = one_step_log(*CLASSES, tiny_model, tokenizer, rows, tmp_path, max_length=None)
        (row,) = make_trainer(*CLASSES, tiny_model, tokenizer, rows, tmp_path, max_length=None).train_dataset
        labels = [t if scored else -100 for t, scored in zip(row["input_ids"], row["scored_mask"], strict=True)]
        found = [p for p in padded_document_log_probs(tiny_model, row["input_ids"], labels) if p is not None]
        assert log["poft/r_theta"] == pytest.approx(sum(found) / len(found), rel=1e-5)

    @pytest.mark.parametrize("layout", [{}, {"packing": True}])
    def test_cut_examples_are_dropped_and_counted(self, layout, train_set, scored_rows, caplog):
        kept = train_set(scored_rows, max_length=20, **layout)
        lengths = [len(ids) for ids in scored_rows["input_ids"] if len(ids) <= 20]
        assert sum(map(len, kept["input_ids"])) == sum(lengths)
        message = f"{8 - len(lengths)} with scored tokens that max_length=20 cuts"
        assert (
            f"Dropped {8 - len(lengths)} of 8 examples of the train dataset: 0 without" in caplog.text
            and message in caplog.text
        )

    @pytest.mark.filterwarnings("ignore:.*keep_end:FutureWarning")
    def test_prompts_are_cut_in_the_control_only(self, train_set, scored_rows):
        options = {"max_length": 20, "truncation_mode": "keep_end"}
        kept = train_set(scored_rows, preference_weighting="uniform", **options)
        assert list(kept["input_ids"]) == [ids[-20:] for ids in scored_rows["input_ids"]]

    def test_examples_without_a_word_are_dropped_and_counted(self, train_set, caplog):
        silent = [*CONVERSATION[:2], {"role": "assistant", "content": " \n"}]
        rows = Dataset.from_dict({"messages": [CONVERSATION, silent, CONVERSATION[:2]], "ref_logps": [[-1.0]] * 3})
        assert len(train_set(rows, max_length=None)) == 1
        assert "Dropped 2 of 3 examples of the train dataset: 2 without a word of the assistant, 0 with" in caplog.text


class TestBadInput:
    @pytest.mark.parametrize("value", [[-1.0, -float("inf")], None])
    def test_reference_column(self, value, train_set, token_rows):
        values = [[-1.0, -2.0]] * 3 + [value] + [[-1.0, -2.0]] * 12
        with pytest.raises(ValueError, match="Row 3 of the train dataset: column `ref_logps` has .*Give a list of 2"):
            train_set(token_rows.add_column("ref_logps", values))

    def test_what_can_not_be_scored(self, train_set, token_rows, tmp_path):
        with pytest.raises(ValueError, match="The train dataset is a stream, but all its examples"):
            train_set(token_rows.to_iterable_dataset(), reference_models=["a"], max_steps=1)

    @pytest.mark.parametrize(
        ("eval_rows", "message"),
        [
            (lambda rows: rows.to_iterable_dataset(), "The eval dataset is a stream, but all its examples"),
            (lambda rows: rows.select([]), "The eval dataset is empty"),
            (
                lambda rows: {"first": rows.add_column("ref_logps", [[-1.0]] * 16)},
                "The first dataset has scores of 1 reference models, the train dataset of 2",
            ),
        ],
    )
    def test_evaluation_sets_are_checked_before_a_model_scores(self, eval_rows, message, train_set, token_rows):
        callback = ReferenceScoringCallback(["nowhere", "elsewhere"])
        with pytest.raises(InputError, match=message):
            train_set(token_rows, eval_dataset=eval_rows(token_rows), callbacks=[callback])

    def test_an_evaluation_set_without_a_source(self, train_set, scored_rows, token_rows):
        with pytest.raises(InputError, match="there is none for the eval dataset: set `reference_models`"):
            train_set(scored_rows, eval_dataset=token_rows)

    def test_plain_texts_are_scored_as_their_tokens(self, train_set, tiny_model, tokenizer, tmp_path):
        tiny_model.save_pretrained(tmp_path / "reference")
        tokenizer.save_pretrained(tmp_path / "reference")
        options = {"reference_models": [str(tmp_path / "reference")], "score_cache_dir": str(tmp_path / "scores")}
        scored = train_set(Dataset.from_dict({"text": ["What is 12?", "Add the tens"]}), **options)
        again = train_set(scored.select_columns(["input_ids", "labels"]), **options)
        assert again["reference_log_prob_0"][:] == scored["reference_log_prob_0"][:]
        parts = Dataset.from_dict({"question": ["What is 12?", "Add the"], "answer": ["", " tens"]})
        formatted = train_set(parts, **options, formatting_func=lambda row: row["question"] + row["answer"])
        assert formatted["reference_log_prob_0"][:] == scored["reference_log_prob_0"][:]

    def test_texts_with_a_column_of_prepared_ones(self, train_set, chat_rows):
        rows = chat_rows.add_column("reference_log_prob_0", [-1.0] * 12)
        for options in ({"reference_models": ["a"]}, {"reference_score_column": "reference_log_prob_0"}):
            with pytest.raises(InputError, match="has the column `reference_log_prob_0`, which this .* Rename"):
                train_set(rows, **options)

    def test_labels_that_leave_out_a_scored_token(self, train_set, other_template):
        other_template(
            "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
            "{% generation %}{{ message.content }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}"
            "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        rows = Dataset.from_dict({"messages": [CONVERSATION], "ref_logps": [[-1.0]]})
        options = {"assistant_only_loss": True, "chat_template_path": None, "max_length": None}
        with pytest.raises(ValueError, match="Row 0 of the train dataset: 2 of the .* scored tokens have no label"):
            train_set(rows, **options)
        assert len(train_set(rows, score_end_of_turn=False, **options)) == 1

    def test_a_generation_prompt_that_reaches_into_the_response(self, train_set, other_template):
        """As of templates that open `<think>` for the model."""
        other_template(
            "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nAdd the ones{% endif %}"
        )
        rows = {"prompt": [CONVERSATION[1:2]], "completion": [CONVERSATION[2:3]], "ref_logps": [[-1.0]]}
        rows, options = Dataset.from_dict(rows), {"chat_template_path": None, "max_length": None}
        with pytest.raises(ValueError, match="Row 0 .* have no label.* `completion_only_loss` does this where"):
            train_set(rows, **options)
        row = train_set(rows, completion_only_loss=False, **options)[0]
        messages = Dataset.from_dict({"messages": [CONVERSATION[1:3]], "ref_logps": [[-1.0]]})
        assert row["scored_mask"] == train_set(messages, **options)[0]["scored_mask"]

    def test_nobody_speaks(self, train_set):
        turns = [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]
        rows = Dataset.from_dict({"messages": [turns], "ref_logps": [[-1.0]]})
        with pytest.raises(ValueError, match=r"role 'assistant' whose .* row 0 has the roles \['gpt', 'human'\]"):
            train_set(rows, max_length=None)

    def test_everything_cut(self, train_set, scored_rows):
        with pytest.raises(ValueError, match="No example of the train dataset can be used: 0 without a word"):
            train_set(scored_rows, max_length=2)

    def test_unprepared_data_without_reference_columns(self, train_set, scored_rows):
        rows = scored_rows.map(lambda row: {"scored_mask": [1] * len(row["input_ids"])})
        with pytest.raises(ValueError, match="must bring the columns `reference_log_prob_0`"):
            train_set(rows, dataset_kwargs={"skip_prepare_dataset": True})
