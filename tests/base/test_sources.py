"""`metrics_by`: exact metrics of each source, however the batch is laid out."""

import copy
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from helpers import make_trainer, one_step_log, padded_document_log_probs
from trl import SFTConfig

from hf_sft_variants import AnnotatedSFTConfig, AnnotatedSFTTrainer
from hf_sft_variants.errors import InputError


CLASSES = AnnotatedSFTTrainer, AnnotatedSFTConfig
SOURCES = ["web", "code", "web", "books", "code", "web", "web", "web"]
LAYOUTS = {
    "padded": {"per_device_train_batch_size": 8},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "padding_free": {"per_device_train_batch_size": 8, "padding_free": True, "max_length": None},
    "packed": {"packing": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
}


@pytest.fixture
def sourced_rows():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in (9, 14, 5, 20, 7, 11, 3, 16)]
    return Dataset.from_dict(
        {"input_ids": ids, "source": ["web", "code", "web", "books", "code", "web", "web", "web"]}
    )


def expected_metrics(model, rows):
    nll = {}
    for row in rows:
        log_probs = padded_document_log_probs(model, row["input_ids"], row["input_ids"])
        nll.setdefault(str(row["source"]), []).extend(-log_prob for log_prob in log_probs)
    total = sum(map(len, nll.values()))
    means = {f"nll/{name}": sum(values) / len(values) for name, values in nll.items()}
    return means | {f"token_share/{name}": len(values) / total for name, values in nll.items()}


def of_sources(log, prefix=""):
    starts = (f"{prefix}nll/", f"{prefix}token_share/")
    return {name.removeprefix(prefix): value for name, value in log.items() if name.startswith(starts)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_source(layout, tiny_model, tokenizer, sourced_rows, tmp_path):
    log, _ = one_step_log(
        *CLASSES, tiny_model, tokenizer, sourced_rows, tmp_path, metrics_by="source", **LAYOUTS[layout]
    )
    assert of_sources(log) == pytest.approx(expected_metrics(tiny_model, sourced_rows), rel=1e-5)


def test_integers_and_evaluation_sets_with_other_values(tiny_model, tokenizer, sourced_rows, tmp_path):
    rows = sourced_rows.remove_columns("source").add_column("source", [3, 1, 3, 2, 1, 3, 3, 3])
    other = rows.select([0, 1]).remove_columns("source").add_column("source", [7, 1])
    trainer = make_trainer(
        *CLASSES,
        tiny_model,
        tokenizer,
        rows,
        tmp_path,
        metrics_by="source",
        eval_dataset={"same": rows, "other": other},
    )
    metrics = trainer.evaluate()
    for name, dataset in (("same", rows), ("other", other)):
        found = {key: value for key, value in of_sources(metrics, f"eval_{name}_").items() if value}
        assert found == pytest.approx(expected_metrics(tiny_model, dataset), rel=1e-5)


def test_without_it_nothing_changes(tiny_model, tokenizer, sourced_rows, tmp_path):
    log, _ = one_step_log(*CLASSES, tiny_model, tokenizer, sourced_rows, tmp_path)
    assert of_sources(log) == {}


def test_a_prepared_set_knows_its_sources(tiny_model, tokenizer, sourced_rows, tmp_path):
    arguments = (*CLASSES, tiny_model, tokenizer)
    options = {"metrics_by": "source", **LAYOUTS["packed"]}
    prepared = make_trainer(*arguments, sourced_rows, tmp_path, **options).train_dataset
    assert "source" not in prepared.column_names
    log, _ = one_step_log(*arguments, prepared, tmp_path, **options)
    assert of_sources(log) == pytest.approx(expected_metrics(tiny_model, sourced_rows), rel=1e-5)
    other = copy.copy(sourced_rows).filter(lambda row: row["source"] != "books")
    with pytest.raises(InputError, match="was prepared with other numbers of the values of `metrics_by='source'`"):
        make_trainer(*arguments, other, tmp_path, **options, eval_dataset=prepared)
    with pytest.raises(InputError, match="The train dataset was not prepared with `metrics_by='origin'`"):
        make_trainer(*arguments, prepared, tmp_path, **{**options, "metrics_by": "origin"})
    log, _ = one_step_log(*arguments, prepared, tmp_path, **LAYOUTS["packed"])
    assert of_sources(log) == {}


def test_unpacked_rows_are_numbered_again(tiny_model, tokenizer, sourced_rows, tmp_path):
    arguments = (*CLASSES, tiny_model, tokenizer)
    prepared = make_trainer(*arguments, sourced_rows, tmp_path, metrics_by="source").train_dataset
    other = sourced_rows.filter(lambda row: row["source"] != "books")
    trainer = make_trainer(*arguments, other, tmp_path, metrics_by="source", eval_dataset=prepared)
    found = {key: value for key, value in of_sources(trainer.evaluate(), "eval_").items() if value}
    assert found == pytest.approx(expected_metrics(tiny_model, sourced_rows), rel=1e-5)


def test_rows_that_are_not_prepared_again(tiny_model, tokenizer, sourced_rows, tmp_path):
    arguments, as_they_are = (*CLASSES, tiny_model, tokenizer), {"dataset_kwargs": {"skip_prepare_dataset": True}}
    prepared = make_trainer(*arguments, sourced_rows, tmp_path, metrics_by="source").train_dataset
    log, _ = one_step_log(*arguments, prepared, tmp_path, metrics_by="source", **LAYOUTS["padded"], **as_they_are)
    assert of_sources(log) == pytest.approx(expected_metrics(tiny_model, sourced_rows), rel=1e-5)
    for rows in (
        make_trainer(*arguments, sourced_rows, tmp_path).train_dataset,
        prepared.remove_columns("annotated_with"),
        make_trainer(*arguments, sourced_rows.add_column("a", [1] * 8), tmp_path, metrics_by="a").train_dataset,
    ):
        with pytest.raises(InputError, match="The train dataset was not prepared with `metrics_by='source'`"):
            make_trainer(*arguments, rows, tmp_path, metrics_by="source", **as_they_are)


@pytest.mark.parametrize(
    "values, message",
    [
        (None, "has no column `source`, which `metrics_by` names"),
        ([0.5] * 8, "has 0.5: give a text or an integer in each row"),
        ([["a"]] * 8, r"has \['a'\]: give a text or an integer"),
        (["a"] * 7 + [None], "Row 7 of the train dataset has no value in `source`"),
    ],
)
def test_what_can_not_be_a_source(values, message, tiny_model, tokenizer, sourced_rows, tmp_path):
    rows = sourced_rows.remove_columns("source")
    rows = rows if values is None else rows.add_column("source", values)
    labels = [ids if row else [-100] * len(ids) for row, ids in enumerate(rows["input_ids"])]
    rows = rows.add_column("labels", labels)  # the first row is dropped, but counts
    with pytest.raises(InputError, match=message):
        make_trainer(*CLASSES, tiny_model, tokenizer, rows, tmp_path, metrics_by="source")


def test_too_many_sources_and_streams(tiny_model, tokenizer, tmp_path):
    rows = Dataset.from_dict({"input_ids": [[3, 4, 5]] * 65, "source": [f"s{i}" for i in range(65)]})
    with pytest.raises(InputError, match="has 65 different values, such as 's0', but at most 64"):
        make_trainer(*CLASSES, tiny_model, tokenizer, rows, tmp_path, metrics_by="source")
    with pytest.raises(InputError, match="is a stream, but `metrics_by='source'` needs all values"):
        make_trainer(
            *CLASSES, tiny_model, tokenizer, rows.to_iterable_dataset(), tmp_path, metrics_by="source", max_steps=1
        )


def test_a_configuration_of_ones_own_needs_no_metrics_by(tiny_model, tokenizer, tmp_path):
    @dataclass
    class OwnConfig(SFTConfig):
        alpha: float = 0.5

    rows = Dataset.from_list([{"input_ids": [5, 6, 7]}])
    trainer = make_trainer(AnnotatedSFTTrainer, OwnConfig, tiny_model, tokenizer, rows, tmp_path)
    assert type(trainer.args) is OwnConfig


def test_a_number_and_its_text_are_one_source(tiny_model, tokenizer, tmp_path):
    numbers, texts = (Dataset.from_list([{"input_ids": [5, 6, 7], "source": value}] * 2) for value in (1, "1"))
    arguments = (*CLASSES, tiny_model, tokenizer, numbers, tmp_path)
    trainer = make_trainer(*arguments, eval_dataset=texts, metrics_by="source")
    assert trainer.evaluate()["eval_token_share/1"] == 1


def test_sets_with_other_sources_are_joined(tiny_model, tokenizer, sourced_rows, tmp_path):
    arguments = (*CLASSES, tiny_model, tokenizer)
    parts = [sourced_rows.filter(lambda row, name=name: row["source"] == name) for name in ("web", "code")]
    prepared = [make_trainer(*arguments, part, tmp_path, metrics_by="source").train_dataset for part in parts]
    together = concatenate_datasets(prepared)
    log, _ = one_step_log(*arguments, together, tmp_path, metrics_by="source", **LAYOUTS["padded"])
    assert of_sources(log) == pytest.approx(expected_metrics(tiny_model, concatenate_datasets(parts)), rel=1e-5)
    assert len(make_trainer(*arguments, together, tmp_path).train_dataset) == 7
    with pytest.raises(InputError, match="was not prepared with `metrics_by='source'`"):
        as_they_are = {"dataset_kwargs": {"skip_prepare_dataset": True}}
        make_trainer(*arguments, together, tmp_path, metrics_by="source", **as_they_are)


@pytest.mark.parametrize("column", ["text", "completion"])
def test_a_text_to_train_on_is_no_source(column, tiny_model, tokenizer, tmp_path):
    rows = Dataset.from_dict({"prompt": ["a "], "completion": ["b"]} if column == "completion" else {"text": ["a b"]})
    with pytest.raises(InputError, match=f"`metrics_by='{column}'` names a text to train on"):
        make_trainer(*CLASSES, tiny_model, tokenizer, rows, tmp_path, metrics_by=column)
