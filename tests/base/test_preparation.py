"""Names of evaluation sets."""

from datasets import Dataset

from hf_sft_variants.base.preparation import named_sets


def test_one_evaluation_set():
    dataset = Dataset.from_dict({"input_ids": [[5, 6]]})
    ((name, named),) = named_sets(dataset).items()
    assert name == "eval" and named is dataset


def test_several_evaluation_sets_keep_their_names():
    sets = {"train": Dataset.from_dict({"input_ids": [[5, 6]]}), "eval": Dataset.from_dict({"input_ids": [[7]]})}
    named = named_sets(sets)
    assert list(named) == ["train", "eval"] and all(named[name] is sets[name] for name in sets)


def test_no_evaluation_set():
    assert named_sets(None) == named_sets({}) == {}
