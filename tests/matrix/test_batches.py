"""How rows become batches: data as SFTTrainer prepares it, each method's loss as it is used, and its control."""

import pytest
from helpers import SMALL
from losses import (
    assert_as_used_is_the_slow_loss,
    assert_control_is_sft_trainer,
    assert_prepared_as_by_sft_trainer,
)
from methods import METHODS, cases_of, only


# The response, for PoFT, and the key, for SFTKey, have to be whole
CUT = "max_length truncates (SFTKey and PoFT drop examples that lose too much)"
CUT_PACKED = "max_length truncates, packing"
# A step has all rows, in more than one micro-batch where there are enough
LAYOUTS = {
    "padded": {"per_device_train_batch_size": 8},
    "gradient accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "pad_to_multiple_of": {"pad_to_multiple_of": 8},
    "padding-free": {"padding_free": True, "max_length": None},
    "padding-free, pad_to_multiple_of": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16},
    "packing, bfd": {"packing": True, "max_length": 48, "per_device_train_batch_size": 2},
    "packing, bfd_split": {
        "packing": True,
        "packing_strategy": "bfd_split",
        "max_length": 16,
        "per_device_train_batch_size": 8,
    },
    "packing, wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 20},
    CUT: {"max_length": 20},
    CUT_PACKED: {"max_length": 20, "packing": True},
    "truncation_mode='keep_end'": {"max_length": 20, "truncation_mode": "keep_end"},
    "shuffle_dataset": {"shuffle_dataset": True},
    "dataloader_num_workers": {"dataloader_num_workers": 2},
    "train_sampling_strategy='group_by_length'": {"train_sampling_strategy": "group_by_length"},
}
# A part of an example can't be compared with a reference model's score of the whole; pairs have an order of their own
REFUSED = {
    ("poft", "packing, bfd_split"): "`packing_strategy='bfd_split'` cuts examples",
    ("poft", "packing, wrapped"): "`packing_strategy='wrapped'` cuts examples",
    ("poft", "truncation_mode='keep_end'"): "`truncation_mode='keep_end'` cuts prompts",
    ("sftmix", "train_sampling_strategy='group_by_length'"): "which draws pairs in an order of its own",
}
DROPPED = {(method, name) for method in ("sftkey", "poft") for name in (CUT, CUT_PACKED)}
# PoFT's control counts parts of examples as examples, which are no longer of equal length
CUT_BY_PACKING = [("poft", CUT), ("poft", CUT_PACKED)]


def cases(excluded=()):
    return [
        pytest.param(method, name, marks=pytest.mark.cell("Batches", name), id=f"{name}-{method}")
        for name in LAYOUTS
        for method in METHODS
        if (method, name) not in {*REFUSED, *excluded}
    ]


def layout_of(name):
    return {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **LAYOUTS[name]}


pytestmark = pytest.mark.filterwarnings("ignore:.*keep_end.*:FutureWarning")


@pytest.mark.parametrize(("method", "name"), cases())
def test_as_used(method, name, tiny_model, tokenizer, rows, tmp_path):
    options = layout_of(name)
    trainer = assert_as_used_is_the_slow_loss(method, tiny_model, tokenizer, rows, tmp_path, **options)
    batch_size = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    assert len(trainer.train_dataset) <= batch_size
    kept = rows.filter(lambda row: len(row["input_ids"]) <= 20) if (method, name) in DROPPED else rows
    assert len(kept) < len(rows) or (method, name) not in DROPPED
    assert_prepared_as_by_sft_trainer(trainer, tiny_model, tokenizer, kept, tmp_path, **options)


@pytest.mark.parametrize(("method", "name"), cases(excluded=CUT_BY_PACKING))
def test_control_is_sft_trainer(method, name, tiny_model, tokenizer, even_rows, tmp_path):
    assert_control_is_sft_trainer(method, tiny_model, tokenizer, even_rows, tmp_path, **layout_of(name))


def assert_refused(message, method, tmp_path, **options):
    with pytest.raises(ValueError, match=message):
        METHODS[method].config_class(str(tmp_path), **SMALL, **options)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        pytest.param(*case, marks=pytest.mark.cell("Batches", case[1], refused=True), id="-".join(case))
        for case in cases_of({case: case[0] for case in REFUSED})
    ],
)
def test_refused(method, name, tmp_path):
    assert_refused(REFUSED[method, name], method, tmp_path, **METHODS[method].options, **layout_of(name))


@only("sftmix")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.cell("Batches", f"{name}, confidence_split='confidence'", refused=True), id=name
        )
        for name in ("packing, bfd_split", "packing, wrapped")
    ],
)
def test_refused_by_confidence(method, name, tmp_path):
    """A part of an example has no confidence; random pairs need none."""
    assert_refused("cuts examples, so they can't be split by confidence", method, tmp_path, **layout_of(name))
