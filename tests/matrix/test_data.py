"""Sets of all sizes, for training and for evaluation: each method's loss as it is used, and its control."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers import make_trainer
from losses import EVALUATION_LOSSES, assert_as_used_is_the_slow_loss, make_step, model_without_fused_head
from methods import METHODS, SFT, TOLERANCE, cells, every_method


TWO_BATCHES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_length": 200}
EVALUATION_LAYOUTS = {
    "one evaluation set": {},
    "one evaluation set, packed": {"packing": True},
    "one evaluation set, eval_packing=False": {"packing": True, "eval_packing": False},
}


def slow_evaluation_loss(method, trainer, prepared):
    step = make_step(model_without_fused_head(trainer.model), prepared, trainer.args, [])
    return EVALUATION_LOSSES[method](step).item()


@every_method
class TestEvaluation:
    """Each batch holds a whole set, because SFTTrainer takes the mean over batches."""

    def make_trainers(self, method, *arguments, **options):
        """As it is used, as SFTTrainer, and as the control."""
        options = {"max_length": 200, "per_device_eval_batch_size": 12, **options}
        classes = METHODS[method].classes
        yield make_trainer(*classes, *arguments, **options, **METHODS[method].options)
        yield make_trainer(*SFT, *arguments, **options)
        yield make_trainer(*classes, *arguments, **options, **METHODS[method].control)

    def assert_same_loss(self, method, plain, control, rows=None):
        expected, found = (trainer.evaluate(rows)["eval_loss"] for trainer in (plain, control))
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=0)

    @pytest.mark.parametrize("layout", cells("Data", EVALUATION_LAYOUTS))
    def test_one_set(self, method, layout, tiny_model, tokenizer, rows, even_rows, tmp_path):
        arguments = (tiny_model, tokenizer, rows, tmp_path)
        used, plain, control = self.make_trainers(method, *arguments, eval_dataset=even_rows, **layout)
        assert ("seq_lengths" in used.eval_dataset.column_names) == (layout == {"packing": True})
        loss = used.evaluate()["eval_loss"]
        assert loss == pytest.approx(slow_evaluation_loss(method, used, used.eval_dataset), rel=1e-5)
        self.assert_same_loss(method, plain, control)

    @pytest.mark.cell("Data", "one evaluation set, smaller last batch")
    def test_last_batch(self, method, tiny_model, tokenizer, rows, even_rows, tmp_path):
        """The loss is SFTTrainer's mean over batches, `nll` the mean over all tokens."""
        arguments = (tiny_model, tokenizer, rows, tmp_path)
        options = {"eval_dataset": even_rows, "per_device_eval_batch_size": 3}
        used, plain, control = self.make_trainers(method, *arguments, **options)
        assert used.evaluate()["eval_nll"] == pytest.approx(slow_evaluation_loss("base", used, even_rows), rel=1e-5)
        self.assert_same_loss(method, plain, control)

    @pytest.mark.cell("Data", "several evaluation sets")
    @pytest.mark.cell("Data", "evaluation set of one row")
    def test_several_sets(self, method, tiny_model, tokenizer, rows, even_rows, tmp_path):
        sets = {"some": rows.select(range(5)), "even": even_rows, "one": rows.select([2])}
        used, plain, control = self.make_trainers(method, tiny_model, tokenizer, rows, tmp_path, eval_dataset=sets)
        metrics, expected, found = used.evaluate(), plain.evaluate(), control.evaluate()
        for name in sets:
            slow = slow_evaluation_loss(method, used, used.eval_dataset[name])
            assert metrics[f"eval_{name}_loss"] == pytest.approx(slow, rel=1e-5)
        assert metrics["eval_some_loss"] != metrics["eval_even_loss"]
        for name in ("eval_even_loss", "eval_one_loss"):
            assert found[name] == pytest.approx(expected[name], rel=TOLERANCE, abs=0)

    @pytest.mark.cell("Data", "evaluate(new raw data set)")
    def test_new_set(self, method, tiny_model, tokenizer, rows, scored_chat_rows, tmp_path):
        arguments = (tiny_model, tokenizer, rows, tmp_path)
        used, plain, control = self.make_trainers(method, *arguments)
        prepared = next(self.make_trainers(method, *arguments, eval_dataset=scored_chat_rows))
        loss = used.evaluate(scored_chat_rows)["eval_loss"]
        assert loss == prepared.evaluate()["eval_loss"]
        assert loss == pytest.approx(slow_evaluation_loss(method, prepared, prepared.eval_dataset), rel=1e-5)
        if method != "poft":  # its examples have different numbers of labels
            self.assert_same_loss(method, plain, control, scored_chat_rows)


def no_rows():
    yield from ()


@pytest.mark.cell("Data", "empty data set", refused=True)
@every_method
@pytest.mark.parametrize("form", ["conversations", "tokens", "stream"])
def test_empty_set(method, form, tiny_model, tokenizer, rows, scored_chat_rows, tmp_path):
    empty = {
        "conversations": scored_chat_rows.select([]),
        "tokens": rows.select([]),
        "stream": IterableDataset.from_generator(no_rows, features=rows.features),
    }[form]
    options = {"max_steps": 1, **METHODS[method].options}
    arguments = (*METHODS[method].classes, tiny_model, tokenizer)
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        make_trainer(*arguments, empty, tmp_path, **options)
    with pytest.raises(ValueError, match="The eval dataset is empty"):
        make_trainer(*arguments, rows, tmp_path, eval_dataset=empty, **options)
    if isinstance(empty, Dataset):
        trainer = make_trainer(*arguments, rows, tmp_path, **options)
        with pytest.raises(ValueError, match="The late dataset is empty"):
            trainer.evaluate({"late": empty})


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=pytest.mark.cell("Data", "data set of one row", refused=name == "sftmix"))
        for name in METHODS
    ],
)
def test_one_row(method, tiny_model, tokenizer, rows, tmp_path):
    arguments = (method, tiny_model, tokenizer, rows.select([0]), tmp_path)
    if method == "sftmix":
        with pytest.raises(ValueError, match="a pair takes two"):
            assert_as_used_is_the_slow_loss(*arguments)
    else:
        assert_as_used_is_the_slow_loss(*arguments)


@pytest.mark.cell("Data", "smaller last batch")
@every_method
def test_last_batch(method, tiny_model, tokenizer, rows, tmp_path):
    """Three rows after four, in one optimizer step."""
    arguments = (tiny_model, tokenizer, rows.select(range(7)), tmp_path)
    assert_as_used_is_the_slow_loss(method, *arguments, **TWO_BATCHES)


@pytest.mark.cell("Data", "smaller last batch")
@every_method
def test_last_step(method, tiny_model, tokenizer, even_rows, tmp_path):
    """Two optimizer steps, the second of one row in one batch: the control has SFTTrainer's weights."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    options |= {"optim": "sgd", "learning_rate": 0.3}  # of Adam, rounding errors may be steps
    arguments = (tiny_model, tokenizer, even_rows.select(range(5)), tmp_path)
    plain = make_trainer(*SFT, *arguments, **options)
    control = make_trainer(*METHODS[method].classes, *arguments, **options, **METHODS[method].control)
    plain.train(), control.train()
    assert control.state.global_step == 2
    weights, expected = dict(control.model.state_dict()), dict(plain.model.state_dict())
    torch.testing.assert_close(weights, expected, rtol=0, atol=TOLERANCE)
