"""Data in all forms: prepared as SFTTrainer prepares it, and each method's loss as it is used."""

import copy

import pytest
import torch
from datasets import IterableDataset
from forms import FORMS, TEMPLATE_OF_FILE
from helpers import make_trainer
from methods import METHODS, SFT, cells, every_method
from slow_losses import EVALUATION_LOSSES, Step, cut_into_documents, model_without_fused_head, read
from steps import assert_as_used_is_the_slow_loss, prepared_rows


TWO_BATCHES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_length": 200}


def assert_prepared_as_by_sft_trainer(trainer, *arguments, **options):
    """Tokens and labels; arguments as of `make_trainer` after the classes."""
    plain = make_trainer(*SFT, *arguments, **options)
    assert prepared_rows(trainer.train_dataset) == prepared_rows(plain.train_dataset)


@every_method
@pytest.mark.parametrize("form", cells("Data", FORMS))
def test_forms(method, form, tiny_model, tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = form.template or tokenizer.chat_template
    arguments = (tiny_model, tokenizer, form.rows(tokenizer), tmp_path)
    options = {**TWO_BATCHES, **form.options}
    trainer = assert_as_used_is_the_slow_loss(method, *arguments, **options)
    assert_prepared_as_by_sft_trainer(trainer, *arguments, **options)


@pytest.mark.cell("Data", "chat template from a file")
@every_method
def test_template_of_a_file(method, tiny_model, tokenizer, tmp_path):
    (tmp_path / "chat.jinja").write_text(TEMPLATE_OF_FILE)
    options = {**TWO_BATCHES, "chat_template_path": str(tmp_path / "chat.jinja")}
    rows = FORMS["messages"].rows(tokenizer)
    arguments = (tiny_model, copy.deepcopy(tokenizer), rows, tmp_path)
    trainer = assert_as_used_is_the_slow_loss(method, *arguments, **options)
    assert "<|user|>" in tokenizer.decode(trainer.train_dataset[0]["input_ids"])
    assert_prepared_as_by_sft_trainer(trainer, tiny_model, copy.deepcopy(tokenizer), rows, tmp_path, **options)


@pytest.mark.parametrize("layout", cells("Data", {"streaming": {}, "streaming, packed": {"packing": True}}))
@every_method
def test_streaming(method, layout, tiny_model, tokenizer, tmp_path):
    rows = FORMS["messages"].rows(tokenizer)
    # transformers never ends an epoch of a stream with fewer batches than it accumulates
    options = {"per_device_train_batch_size": 8, "max_length": 200, "max_steps": 1, **layout}
    arguments = (tiny_model, tokenizer, rows.to_iterable_dataset(), tmp_path)
    trainer = assert_as_used_is_the_slow_loss(method, *arguments, **options)
    assert_prepared_as_by_sft_trainer(trainer, *arguments, **options)


@pytest.mark.cell("Data", "streaming, confidence_split='confidence'", refused=True)
@pytest.mark.parametrize("method", ["sftmix"])
def test_streaming_by_confidence(method, tiny_model, tokenizer, rows, tmp_path):
    with pytest.raises(ValueError, match="needs all examples before training, but `train_dataset` is a stream"):
        make_trainer(
            *METHODS[method].classes, tiny_model, tokenizer, rows.to_iterable_dataset(), tmp_path, max_steps=1
        )


EVALUATION_LAYOUTS = {
    "one evaluation set": {},
    "one evaluation set, packed": {"packing": True},
    "one evaluation set, eval_packing=False": {"packing": True, "eval_packing": False},
}


def slow_evaluation_loss(method, trainer, prepared):
    model = model_without_fused_head(trainer.model)
    documents = [read(model, row) for row in cut_into_documents(prepared)]
    return EVALUATION_LOSSES[method](Step(documents, model, trainer.args, [])).item()


@every_method
class TestEvaluation:
    """In batches that hold a whole set: SFTTrainer takes the mean over batches."""

    def make_trainers(self, method, *arguments, **options):
        """As it is used, as SFTTrainer, and as the control."""
        options = {"max_length": 200, "per_device_eval_batch_size": 8, **options}
        classes = METHODS[method].classes
        yield make_trainer(*classes, *arguments, **options, **METHODS[method].options)
        yield make_trainer(*SFT, *arguments, **options)
        yield make_trainer(*classes, *arguments, **options, **METHODS[method].control)

    @pytest.mark.parametrize("layout", cells("Data", EVALUATION_LAYOUTS))
    def test_one_set(self, method, layout, tiny_model, tokenizer, rows, even_rows, tmp_path):
        arguments = (tiny_model, tokenizer, rows, tmp_path)
        used, plain, control = self.make_trainers(method, *arguments, eval_dataset=even_rows, **layout)
        assert ("seq_lengths" in used.eval_dataset.column_names) == (layout == {"packing": True})
        loss = used.evaluate()["eval_loss"]
        assert loss == pytest.approx(slow_evaluation_loss(method, used, used.eval_dataset), rel=1e-5)
        tolerance = 1e-6 if method == "poft" else 0
        assert control.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=tolerance, abs=0)

    @pytest.mark.cell("Data", "an evaluation set of one row")
    def test_one_row(self, method, tiny_model, tokenizer, rows, tmp_path):
        arguments = (tiny_model, tokenizer, rows, tmp_path)
        used, plain, control = self.make_trainers(method, *arguments, eval_dataset=rows.select([2]))
        slow = slow_evaluation_loss(method, used, used.eval_dataset)
        assert used.evaluate()["eval_loss"] == pytest.approx(slow, rel=1e-5)
        tolerance = 1e-6 if method == "poft" else 0
        assert control.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=tolerance, abs=0)

    @pytest.mark.cell("Data", "one evaluation set, a last batch that is smaller")
    def test_last_batch(self, method, tiny_model, tokenizer, rows, even_rows, tmp_path):
        """The loss is SFTTrainer's mean over batches, `nll` the mean over all tokens."""
        arguments = (tiny_model, tokenizer, rows, tmp_path)
        options = {"eval_dataset": even_rows, "per_device_eval_batch_size": 3}
        used, plain, control = self.make_trainers(method, *arguments, **options)
        assert used.evaluate()["eval_nll"] == pytest.approx(slow_evaluation_loss("base", used, even_rows), rel=1e-5)
        tolerance = 1e-6 if method == "poft" else 0
        assert control.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=tolerance, abs=0)

    @pytest.mark.cell("Data", "several evaluation sets")
    def test_several_sets(self, method, tiny_model, tokenizer, rows, even_rows, tmp_path):
        sets = {"some": rows.select(range(5)), "even": even_rows}
        used, plain, control = self.make_trainers(method, tiny_model, tokenizer, rows, tmp_path, eval_dataset=sets)
        metrics, expected, found = used.evaluate(), plain.evaluate(), control.evaluate()
        for name in sets:
            slow = slow_evaluation_loss(method, used, used.eval_dataset[name])
            assert metrics[f"eval_{name}_loss"] == pytest.approx(slow, rel=1e-5)
        assert metrics["eval_some_loss"] != metrics["eval_even_loss"]
        tolerance = 1e-6 if method == "poft" else 0
        assert found["eval_even_loss"] == pytest.approx(expected["eval_even_loss"], rel=tolerance, abs=0)

    @pytest.mark.cell("Data", "evaluate(a new raw set)")
    def test_new_set(self, method, tiny_model, tokenizer, rows, tmp_path):
        new = FORMS["messages"].rows(tokenizer)
        arguments = (tiny_model, tokenizer, rows, tmp_path)
        prepared, *_ = self.make_trainers(method, *arguments, eval_dataset=new)
        used, plain, control = self.make_trainers(method, *arguments)
        loss = used.evaluate(new)["eval_loss"]
        assert loss == prepared.evaluate()["eval_loss"]
        assert loss == pytest.approx(slow_evaluation_loss(method, prepared, prepared.eval_dataset), rel=1e-5)
        if method != "poft":  # the assistant's words alone are PoFT's, the whole conversation SFTTrainer's
            assert control.evaluate(new)["eval_loss"] == plain.evaluate(new)["eval_loss"]


@pytest.mark.cell("Data", "an empty set", refused=True)
@every_method
@pytest.mark.parametrize("form", ["messages", "pre-tokenized, with labels"])
def test_empty_set(method, form, tiny_model, tokenizer, rows, tmp_path):
    empty = FORMS[form].rows(tokenizer).select([])
    arguments = (*METHODS[method].classes, tiny_model, tokenizer)
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        make_trainer(*arguments, empty, tmp_path, **METHODS[method].options)
    with pytest.raises(ValueError, match="The eval dataset is empty"):
        make_trainer(*arguments, rows, tmp_path, eval_dataset=empty, **METHODS[method].options)
    trainer = make_trainer(*arguments, rows, tmp_path, **METHODS[method].options)
    with pytest.raises(ValueError, match="The late dataset is empty"):
        trainer.evaluate({"late": empty})


def no_rows():
    yield from ()


@pytest.mark.cell("Data", "an empty set", refused=True)
@every_method
def test_empty_stream(method, tiny_model, tokenizer, rows, tmp_path):
    empty = IterableDataset.from_generator(no_rows, features=rows.features)
    arguments = (*METHODS[method].classes, tiny_model, tokenizer)
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        make_trainer(*arguments, empty, tmp_path, max_steps=1, **METHODS[method].options)
    with pytest.raises(ValueError, match="The eval dataset is empty"):
        make_trainer(*arguments, rows, tmp_path, eval_dataset=empty, **METHODS[method].options)


@pytest.mark.parametrize(
    "method",
    [
        *(
            pytest.param(name, marks=pytest.mark.cell("Data", "a set of one row"))
            for name in METHODS
            if name != "sftmix"
        ),
        pytest.param("sftmix", marks=pytest.mark.cell("Data", "a set of one row", refused=True)),
    ],
)
def test_one_row(method, tiny_model, tokenizer, rows, tmp_path):
    arguments = (method, tiny_model, tokenizer, rows.select([0]), tmp_path)
    if method == "sftmix":
        with pytest.raises(ValueError, match="a pair takes two"):
            assert_as_used_is_the_slow_loss(*arguments)
    else:
        assert_as_used_is_the_slow_loss(*arguments)


@pytest.mark.cell("Data", "a last batch that is smaller")
@every_method
def test_last_batch(method, tiny_model, tokenizer, rows, tmp_path):
    """Three rows after four, in one optimizer step."""
    arguments = (tiny_model, tokenizer, rows.select(range(7)), tmp_path)
    assert_as_used_is_the_slow_loss(method, *arguments, **TWO_BATCHES)


@pytest.mark.cell("Data", "a last batch that is smaller")
@every_method
def test_last_step(method, tiny_model, tokenizer, even_rows, tmp_path):
    """Two optimizer steps, the second of one row in one batch: the control has SFTTrainer's weights."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    arguments = (tiny_model, tokenizer, even_rows.select(range(5)), tmp_path)
    plain = make_trainer(*SFT, *arguments, learning_rate=1e-2, **options)
    control = make_trainer(
        *METHODS[method].classes, *arguments, learning_rate=1e-2, **options, **METHODS[method].control
    )
    plain.train(), control.train()
    assert control.state.global_step == 2
    weights, tolerance = dict(control.model.state_dict()), 1e-6 if method == "poft" else 0
    torch.testing.assert_close(weights, dict(plain.model.state_dict()), rtol=0, atol=tolerance)


@pytest.mark.cell("Data", "dataset_num_proc")
@every_method
def test_several_workers(method, tiny_model, tokenizer, tmp_path):
    """All columns, annotations included, are those of one worker."""
    arguments = (*METHODS[method].classes, tiny_model, tokenizer, FORMS["messages"].rows(tokenizer), tmp_path)
    options = {**TWO_BATCHES, **METHODS[method].options}
    one, two = (make_trainer(*arguments, dataset_num_proc=number, **options) for number in (None, 2))
    assert list(two.train_dataset) == list(one.train_dataset)
