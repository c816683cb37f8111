"""A prepared data set given to a trainer again: as it is with the same settings, refused with others."""

import json

import datasets
import pytest
import torch
from datasets import load_dataset
from helpers import make_trainer
from methods import METHODS
from trl import SFTConfig, SFTTrainer

from hf_sft_variants import AnnotatedSFTTrainer, PoFTConfig, PoFTTrainer, SFTGOConfig
from hf_sft_variants.base.prepared_sets import MADE_WITH
from hf_sft_variants.errors import InputError


DEFAULTS = {
    "sft_go": {},
    "sftkey": {"key_delimiter": "####"},
    "poft": {},
    "sftmix": {"confidence_split": "random"},
    "weighted": {"key_delimiter": "####", "answer_weight": 2.0},
}
CLASSES = {name: (*METHODS[name].classes, options) for name, options in DEFAULTS.items() if name in METHODS}
PACKED = {"packing": True, "max_length": 64}
SKIP = {"dataset_kwargs": {"skip_prepare_dataset": True}}


@pytest.fixture(scope="module")
def rows(chat_rows):
    return chat_rows.add_column("ref_logps", [[-5.0 - row / 4, -6.0] for row in range(len(chat_rows))])


@pytest.fixture(scope="module")
def references(tmp_path_factory, tiny_model_factory, tokenizer):
    """Folders of two models."""
    folder = tmp_path_factory.mktemp("references")
    for name, factor in (("first", 1.5), ("second", 0.5)):
        model = tiny_model_factory()
        model.model.embed_tokens.weight.data.mul_(factor)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def make(tiny_model, tokenizer, tmp_path):
    """Makes a trainer of a method."""

    def make_it(method, rows, tokenizer=tokenizer, **options):
        trainer_class, config_class, defaults = CLASSES[method]
        options = {"save_strategy": "no", "per_device_train_batch_size": 4, **defaults, **options}
        if method != "sftmix":  # whose pairs are drawn
            options["train_sampling_strategy"] = "sequential"
        return make_trainer(trainer_class, config_class, tiny_model, tokenizer, rows, tmp_path / "run", **options)

    return make_it


def first_loss(trainer):
    trainer.args.max_steps = 2
    trainer.train()
    return trainer.state.log_history[0]["loss"]


# Settings that the annotations depend on: method, the set's, the later trainer's, what is named
CHANGES = {
    "end of turn": ("poft", {}, {"score_end_of_turn": False}, "`score_end_of_turn` was True, is now False"),
    "delimiter": ("sftkey", {}, {"key_delimiter": "tens."}, "`key_delimiter` was '####', is now 'tens.'"),
    "key tags": ("sftkey", {}, {"key_tags_in_loss": False}, "`key_tags_in_loss` was True, is now False"),
    "keys": ("sftkey", {"stages": ["full"]}, {"stages": ["full", "key"]}, "`stages` was 'without keys'"),
    "no keys": ("sftkey", {}, {"stages": ["full"]}, "`stages` was 'with keys', is now 'without keys'"),
    "control": ("poft", {"preference_weighting": "uniform"}, {}, "`preference_weighting` was 'uniform'"),
    "fraction": ("sft_go", PACKED, {**PACKED, "important_fraction": 0.2}, "`important_fraction` was 0.5, is now 0.2"),
    "scope": ("sft_go", {**PACKED, "group_scope": "micro_batch"}, PACKED, "`group_scope` was 'micro_batch'"),
    "length": ("sft_go", {"max_length": 40}, {}, "`max_length` was 40, is now 64"),
    "cut end": ("sft_go", {"max_length": 40}, {"max_length": 40, "truncation_mode": "keep_end"}, "`truncation_mode`"),
    "packing": ("sftkey", PACKED, {}, "`packing` was 'bfd', is now False"),
    "wrapped": ("sft_go", {**PACKED, "packing_strategy": "wrapped"}, PACKED, "`packing` was 'wrapped', is now 'bfd'"),
    "packed length": ("sft_go", PACKED, {**PACKED, "max_length": 80}, "`max_length` was 64, is now 80"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*keep_end.*:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_other_settings_are_refused(change, make, rows):
    method, before, after, message = CHANGES[change]
    prepared = make(method, rows, **before).train_dataset
    with pytest.raises(InputError, match=f"dataset was prepared with different settings: {message}.* Restore them"):
        make(method, prepared, **after)
    with pytest.raises(InputError, match=message):
        make(method, prepared, **after, **SKIP)
    with pytest.raises(InputError, match=message):
        make(method, prepared.to_iterable_dataset(), max_steps=2, **after)
    later = make(method, rows, **after)
    with pytest.raises(InputError, match=f"The eval dataset .*{message}"):
        later.evaluate(prepared)


def test_other_groups_are_refused(make, rows, references):
    prepared = make("sft_go", rows, **PACKED).train_dataset
    options = {"group_by": "rho1", "reference_model": str(references / "first"), "score_cache_dir": str(references)}
    with pytest.raises(InputError, match="`group_by` was 'tfidf', is now 'rho1'"):
        make("sft_go", prepared, **PACKED, **options)
    prepared = make("sft_go", rows, **PACKED, **options).train_dataset
    options["reference_model"] = str(references / "second")
    with pytest.raises(InputError, match="`reference_model` was .*'first'.* is .*'second'"):
        make("sft_go", prepared, **PACKED, **options)


class TestReferences:
    """PoFT's scores belong to the models that made them."""

    @pytest.fixture
    def scored(self, make, chat_rows, references):
        def scored(*names, rows=chat_rows, **options):
            models = [str(references / name) for name in names]
            options = {"reference_models": models, "score_cache_dir": str(references / "scores"), **options}
            return make("poft", rows, **options)

        return scored

    def test_other_models_are_refused(self, scored, make):
        prepared = scored("first").train_dataset
        with pytest.raises(InputError, match="`reference_models` was .*'first'.* is .*'second'"):
            scored("second", rows=prepared)
        with pytest.raises(InputError, match="the scores of 1 reference models, but .* names 2"):
            scored("first", "second", rows=prepared)
        with pytest.raises(InputError, match="`length_normalizer` was 'own', is now 'target'"):
            scored("first", rows=prepared, length_normalizer="target")

    def test_a_copy_elsewhere_is_the_same(self, scored, make, references, tmp_path):
        import shutil

        trainer = scored("first")
        shutil.copytree(references / "first", tmp_path / "copy")
        again = make("poft", trainer.train_dataset, reference_models=[str(tmp_path / "copy")])
        assert first_loss(again) == first_loss(trainer)

    def test_models_that_are_not_here(self, scored, make, rows):
        """Prepared elsewhere: the scores are taken, but of the same models for all data sets."""
        first, second = (scored(name).train_dataset for name in ("first", "second"))
        trainer = make("poft", first, eval_dataset=first)
        assert trainer.evaluate()["eval_poft/reference_0"] == pytest.approx(
            sum(row["reference_log_prob_0"][0] for row in first) / len(first)
        )
        with pytest.raises(InputError, match="The eval dataset .*`reference_models` was .*'second'.* is .*'first'"):
            make("poft", first, eval_dataset=second)
        again = json.loads(trainer.train_dataset[0][MADE_WITH])
        assert again == json.loads(first[0][MADE_WITH]) and again["settings"]["reference_models"][0]["name"] == "first"

    def test_own_scores(self, make, rows, references):
        """The column wins over models, which then name its values, as with raw rows."""
        prepared = make("poft", rows, **PACKED).train_dataset
        models = [str(references / name) for name in ("first", "second")]
        trainer = make("poft", prepared, **PACKED, reference_models=models, eval_dataset=prepared)
        assert trainer.evaluate()["eval_poft/reference_second"] == -6
        for options in ({}, SKIP):
            with pytest.raises(InputError, match="scores of 2 reference models, but `reference_models=.* names 1"):
                make("poft", prepared, **PACKED, reference_models=models[:1], **options)

    def test_another_number_of_own_scores(self, make, rows):
        prepared = make("poft", rows, **PACKED).train_dataset
        three = rows.map(lambda row: {"ref_logps": [*row["ref_logps"], -1.0]})
        with pytest.raises(InputError, match="The eval dataset has scores of 3 reference models, the train .* of 2"):
            make("poft", prepared, **PACKED, eval_dataset=make("poft", three, **PACKED).train_dataset)


@pytest.mark.parametrize("layout", [{}, PACKED, {**PACKED, "packing_strategy": "wrapped"}], ids=["", "bfd", "wrapped"])
@pytest.mark.parametrize("method", CLASSES)
def test_the_same_settings_train_the_same(method, layout, make, rows, tmp_path):
    """However the rows were kept and however often they were prepared; for training and evaluation alike."""
    if method == "sftmix" and layout:
        pytest.skip("needs the rows before packing, or adds no annotations")
    if method == "poft" and "packing_strategy" in layout:
        layout = {**layout, "preference_weighting": "uniform"}
    trainer = make(method, rows, **layout)
    prepared, loss = trainer.train_dataset, first_loss(trainer)
    prepared.to_json(tmp_path / "rows.jsonl")
    prepared.to_parquet(tmp_path / "rows.parquet")
    prepared.save_to_disk(tmp_path / "saved")
    for kept in (
        prepared,
        load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path)),
        load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train", cache_dir=str(tmp_path)),
        datasets.load_from_disk(tmp_path / "saved"),
    ):
        trainer = make(method, kept, eval_dataset=kept, **layout)
        again = make(method, trainer.train_dataset, **layout).train_dataset
        assert list(again) == list(trainer.train_dataset) == list(prepared)
    assert trainer.evaluate(kept)["eval_nll"] == trainer.evaluate()["eval_nll"]
    assert first_loss(trainer) == loss
    if method != "sftmix":  # whose pairs of a stream are those inside of the micro-batches
        assert first_loss(make(method, prepared.to_iterable_dataset(), max_steps=2, **layout)) == loss


def test_another_method_is_refused(make, rows):
    for method in CLASSES:
        prepared = make(method, rows).train_dataset
        for other in CLASSES:
            if other != method:
                names = f"prepared by {CLASSES[method][0].__name__}, but this is {CLASSES[other][0].__name__}"
                with pytest.raises(InputError, match=names):
                    make(other, prepared)


def test_rows_that_were_prepared_differently(make, rows):
    first = make("sftkey", rows).train_dataset
    second = make("sftkey", rows, key_tags_in_loss=False).train_dataset
    without = first.remove_columns(MADE_WITH)
    for other in (second, without):
        mixed = datasets.concatenate_datasets([first, other])
        for rows, options in ((mixed, {}), (mixed, SKIP), (mixed.to_iterable_dataset(), {"max_steps": 2})):
            with pytest.raises(InputError, match="rows of the train dataset were prepared with different settings"):
                list(make("sftkey", rows, **options).train_dataset)
    together = datasets.concatenate_datasets([first, first.select([3])])
    assert len(make("sftkey", together).train_dataset) == 13


def test_annotations_of_unknown_origin(make, rows):
    for method, column in (("poft", "scored_mask"), ("poft", "reference_log_prob_0"), ("sft_go", "group_ids")):
        prepared = make(method, rows).train_dataset.remove_columns(MADE_WITH)
        others = {"scored_mask", "reference_log_prob_0", "reference_log_prob_1", "example_number"} - {column}
        unknown = prepared.remove_columns([name for name in others if name in prepared.column_names])
        with pytest.raises(InputError, match=f"has the column `{column}`, which this trainer creates, but no column"):
            make(method, unknown)
        make(method, prepared, **SKIP)
    with pytest.raises(InputError, match="has the column `group_ids`, which this trainer creates, but no column"):
        make("sft_go", rows.add_column("group_ids", [7] * 12))
    strange = make("poft", rows).train_dataset.map(lambda row: {MADE_WITH: "a human"})
    with pytest.raises(InputError, match="column `annotated_with` of the train dataset was not written by a trainer"):
        make("poft", strange)


def test_own_columns_are_taken(make, token_rows, rows):
    mask = [[int(t >= len(ids) // 2) for t in range(len(ids))] for ids in token_rows["input_ids"]]
    make("sftkey", token_rows.add_column("key_mask", mask))
    make("sft_go", token_rows.add_column("group_ids", mask), group_by="column", group_column="group_ids")


def test_groups_of_unpacked_rows_are_made_anew(make, rows):
    """Exactly as of the raw rows, so nothing need be refused."""
    prepared = make("sft_go", rows).train_dataset
    options = {"important_fraction": 0.2, "min_grouped_tokens": 3}
    for layout in ({}, PACKED):
        expected = make("sft_go", rows, **options, **layout).train_dataset
        found = make("sft_go", prepared, **options, **layout).train_dataset
        assert found["group_ids"][:] == expected["group_ids"][:] != prepared["group_ids"][:]


def test_document_frequencies_are_of_one_training_set(make, rows):
    packed, other = (make("sft_go", rows.select(some), **PACKED).train_dataset for some in (range(8), range(4, 12)))
    for trainer in (make("sft_go", rows.select(range(8)), **PACKED), make("sft_go", packed, **PACKED)):
        trainer.evaluate(packed)
        with pytest.raises(InputError, match="`document_frequencies` was "):
            trainer.evaluate(other)


def test_another_file_of_document_frequencies_is_refused(make, rows, tmp_path):
    files = {"tfidf_file": str(tmp_path / "first.npz")}, {"tfidf_file": str(tmp_path / "second.npz")}
    first, second = (
        make("sft_go", rows.select(some), **PACKED, **file).train_dataset
        for some, file in zip((range(8), range(4, 12)), files, strict=True)
    )
    make("sft_go", first, **PACKED, **files[0], eval_dataset=first)
    for prepared, file in ((first, files[1]), (second, files[0])):
        with pytest.raises(InputError, match="`document_frequencies` was "):
            make("sft_go", prepared, **PACKED, **file)


def test_examples_that_a_reference_model_could_not_read_are_gone(make, rows, references):
    """So rows that it scored are not those of another grouping, though the groups would be made anew."""
    options = {"group_by": "rho1", "reference_model": str(references / "first"), "score_cache_dir": str(references)}
    prepared = make("sft_go", rows, **options).train_dataset
    make("sft_go", prepared, important_fraction=0.2, **options)
    with pytest.raises(InputError, match="`reference_model` was {.*, is now None"):
        make("sft_go", prepared)


def test_another_tokenizer_is_refused(make, rows, tokenizer):
    from copy import deepcopy

    larger = deepcopy(tokenizer)
    larger.add_tokens(["farmer has"])
    prepared = make("sft_go", rows).train_dataset
    with pytest.raises(InputError, match="`processing_class` was "):
        make("sft_go", prepared, tokenizer=larger)


def test_filtered_to_nothing(make, rows):
    prepared = make("poft", rows).train_dataset
    with pytest.raises(InputError, match="`train_dataset` is empty"):
        make("poft", prepared.filter(lambda row: False))


class MyPoFTTrainer(PoFTTrainer):
    """Another loss on the same annotations."""

    def compute_annotated_loss(self, batch):
        return 2 * super().compute_annotated_loss(batch)


class FirstWordsTrainer(AnnotatedSFTTrainer):
    annotation_columns = {"weight": 0.0}
    config_class = SFTGOConfig

    def annotate(self, dataset, dataset_name):
        fraction = self.args.important_fraction
        return dataset.map(lambda row: {"weight": [fraction] * len(row["labels"])})


class TestVariants:
    def test_a_subclass_with_another_loss(self, make, rows, tiny_model, tokenizer, tmp_path):
        prepared = make("poft", rows).train_dataset
        make_trainer(MyPoFTTrainer, PoFTConfig, tiny_model, tokenizer, prepared, tmp_path)

    def test_all_fields_of_its_configuration_count(self, rows, tiny_model, tokenizer, tmp_path):
        common = (FirstWordsTrainer, SFTGOConfig, tiny_model, tokenizer)
        prepared = make_trainer(*common, rows, tmp_path).train_dataset
        make_trainer(*common, prepared, tmp_path)
        with pytest.raises(InputError, match="`important_fraction` was 0.5, is now 0.2"):
            make_trainer(*common, prepared, tmp_path, important_fraction=0.2)

    def test_without_annotations(self, rows, token_rows, make, tiny_model, tokenizer, tmp_path):
        """What SFTTrainer or the base class prepared has no annotations, so any method takes it."""
        for trainer_class in (SFTTrainer, AnnotatedSFTTrainer):
            prepared = make_trainer(trainer_class, SFTConfig, tiny_model, tokenizer, rows, tmp_path).train_dataset
            assert MADE_WITH not in prepared.column_names
            make("sft_go", prepared)


def test_the_model_never_sees_it(make, rows):
    """Nor a collator, whatever columns are kept."""
    seen = []

    class Seeing:
        def __init__(self, collator):
            self.collator = collator

        def __call__(self, examples):
            seen.extend(examples)
            return self.collator(examples)

    trainer = make("sft_go", rows, remove_unused_columns=False)
    trainer.data_collator.collator = Seeing(trainer.data_collator.collator)
    batch = next(iter(trainer.get_train_dataloader()))
    assert MADE_WITH in trainer.train_dataset.column_names
    assert seen and all(MADE_WITH not in example for example in seen)
    assert all(isinstance(value, torch.Tensor) for value in batch.values())
