import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from helpers import make_trainer

from hf_sft_variants import PoFTConfig, PoFTTrainer
from hf_sft_variants.poft.references import reference_names
from hf_sft_variants.poft.score_files import SCHEMA, add_content_keys, keys_of_best, write_score_file
from hf_sft_variants.scoring import EXAMPLE_KEY


MODELS = ["org/first", "second"]


@pytest.fixture(scope="module")
def keys(chat_rows):
    return list(add_content_keys(chat_rows)[EXAMPLE_KEY])


@pytest.fixture
def scores(keys):
    """Another score for each example and model: the first model's mean is -1, -2, ..., the second's half of that."""
    return [
        {
            "example_key": key,
            "model": model,
            "sum_log_prob": -10.0 * (row + 1),
            "num_tokens": 10 * (number + 1),
            "mean_log_prob": -(row + 1) / (number + 1),
            "score_end_of_turn": True,
        }
        for row, key in enumerate(keys)
        for number, model in enumerate(MODELS)
    ]


@pytest.fixture
def make(tiny_model, tokenizer, chat_rows, tmp_path):
    """Makes a trainer with a score file of these rows."""

    def make(scores, data=chat_rows, suffix=".parquet", **options):
        path = tmp_path / f"scores{suffix}"
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(scores), path)
        else:
            path.write_text("".join(json.dumps(score) + "\n" for score in scores))
        options = {"reference_score_file": str(path), "max_length": None, **options}
        return make_trainer(PoFTTrainer, PoFTConfig, tiny_model, tokenizer, data, tmp_path, **options)

    return make


def values(trainer):
    return [[row["reference_log_prob_0"][0], row["reference_log_prob_1"][0]] for row in trainer.train_dataset]


EXPECTED = [[-(row + 1.0), -(row + 1.0) / 2] for row in range(12)]


def test_columns_are_those_of_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "score_file.md").read_text()
    documented = re.findall(r"^\| `(\w+)` \| (\w+) \|", page, flags=re.MULTILINE)
    names = {"string": pa.string(), "double": pa.float64(), "integer": pa.int64(), "boolean": pa.bool_()}
    assert [(column, names[kind]) for column, kind in documented] == [(field.name, field.type) for field in SCHEMA]


class TestJoin:
    @pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
    def test_of_a_shuffled_file_with_duplicates_and_strangers(self, suffix, make, scores):
        others = [{**scores[0], "example_key": "other"}, {**scores[0], "model": "third", "sum_log_prob": -7.0}]
        trainer = make([*scores[::-1], *others, *scores[3:9]], suffix=suffix, reference_models=MODELS)
        assert values(trainer) == EXPECTED
        assert trainer._reference_names == ["first", "second"]

    def test_of_shuffled_data_and_several_files(self, make, scores, chat_rows, tmp_path):
        paths = [str(tmp_path / f"{model.rpartition('/')[2]}.parquet") for model in MODELS]
        for path, model in zip(paths, MODELS, strict=True):
            rows = [score for score in scores if score["model"] == model]
            write_score_file(pa.Table.from_pylist(rows, schema=SCHEMA), path)
        trainer = make([], data=chat_rows.shuffle(seed=1), reference_score_file=paths)
        assert sorted(values(trainer), reverse=True) == EXPECTED

    def test_means_alone(self, make, scores):
        means = [
            {name: score[name] for name in score if name not in ("sum_log_prob", "num_tokens")} for score in scores
        ]
        assert values(make(means)) == EXPECTED
        with pytest.raises(
            ValueError, match=r"Row 0 of the .* 'org/first': `length_normalizer='target'` needs summed"
        ):
            make(means, length_normalizer="target")

    def test_over_the_targets_number_of_tokens(self, make, scores):
        trainer = make(scores, length_normalizer="target")
        for number, (row, found) in enumerate(zip(trainer.train_dataset, values(trainer), strict=True)):
            assert found == pytest.approx([-10.0 * (number + 1) / sum(row["scored_mask"])] * 2)

    @pytest.mark.parametrize("model", MODELS)
    def test_missing_example(self, model, make, scores, keys):
        incomplete = [score for score in scores if (score["example_key"], score["model"]) != (keys[5], model)]
        message = rf"Row 5 of the train dataset \(key {keys[5]}\) has no score of the reference model '{model}'"
        with pytest.raises(ValueError, match=message):
            make(incomplete)

    def test_what_a_model_could_not_score_is_dropped_and_counted(self, make, scores, caplog):
        unscored = {"sum_log_prob": None, "num_tokens": None, "mean_log_prob": None}
        trainer = make([{**score, **(unscored if row in (2, 5) else {})} for row, score in enumerate(scores)])
        assert values(trainer) == [EXPECTED[0], *EXPECTED[3:]]
        assert "2 of 12 examples of the train dataset can't be scored: 1 by org/first, 1 by second" in caplog.text

    def test_everything_unscored_by_one_or_another(self, make, scores):
        unscored = {"sum_log_prob": None, "num_tokens": None, "mean_log_prob": None}
        scores = [{**score, **(unscored if row % 4 in (0, 3) else {})} for row, score in enumerate(scores)]
        with pytest.raises(ValueError, match="12 of 12 .* can't be scored: 6 by org/first, 6 by second. Raise"):
            make(scores)

    def test_another_end_of_turn(self, make, scores):
        with pytest.raises(
            ValueError, match=r"has `score_end_of_turn` \[True\], but `score_end_of_turn=False` is set"
        ):
            make(scores, score_end_of_turn=False)
        mixed = [{**score, "score_end_of_turn": row > 3} for row, score in enumerate(scores)]
        with pytest.raises(ValueError, match=r"has `score_end_of_turn` \[False, True\]"):
            make(mixed)

    @pytest.mark.parametrize("wrong", [float("nan"), -float("inf"), 30.0])
    def test_scores_that_are_no_numbers(self, wrong, make, scores, keys):
        scores[6] = {**scores[6], "sum_log_prob": wrong}
        with pytest.raises(
            ValueError, match=rf"Row 3 .* \(key {keys[3]}\), model 'org/first': the score .* no finite"
        ):
            make(scores)

    def test_a_column_comes_before_the_file(self, make, scores, chat_rows, caplog):
        trainer = make(scores, data=chat_rows.add_column("ref_logps", [[-3.0, -4.0]] * len(chat_rows)))
        assert values(trainer) == [[-3.0, -4.0]] * len(chat_rows)
        assert "The train dataset has the column `ref_logps`, so `reference_score_file=[" in caplog.text


class TestKeys:
    def test_do_not_depend_on_the_trained_model(self, make, scores):
        """Neither on its tokens nor on its end of sequence, which `SFTTrainer` puts behind a completion."""
        rows = Dataset.from_dict({"prompt": ["a", "a"], "completion": ["b", "c"]})
        ours = list(add_content_keys(rows)[EXAMPLE_KEY])
        some = [{**scores[row], "example_key": key} for row, key in enumerate([ours[0], ours[0], ours[1], ours[1]])]
        assert list(make(some, data=rows).train_dataset[EXAMPLE_KEY]) == ours

    def test_equal_rows_share_a_score(self, make, scores, chat_rows):
        """In whatever columns they are: the file has to have one of them only."""
        others = [{**row, "tools": None, "note": "x"} for row in chat_rows]
        rows = Dataset.from_list([*others, *others[:3]])
        assert values(make(scores, data=rows)) == [*EXPECTED, *EXPECTED[:3]]

    def test_of_tokens(self, token_rows):
        assert len(set(add_content_keys(token_rows)[EXAMPLE_KEY])) == 16
        with pytest.raises(ValueError, match=r"has the columns \['input_ids'\], by which examples can't be named"):
            add_content_keys(token_rows.remove_columns("labels"))


def test_keys_of_best(scores, keys):
    table = pa.Table.from_pylist(scores, schema=SCHEMA)
    assert keys_of_best(table, 0.25) == set(keys[:3])
    assert keys_of_best(table, 0.01) == {keys[0]}
    scores[0]["mean_log_prob"] = None
    assert keys_of_best(pa.Table.from_pylist(scores, schema=SCHEMA), 0.25) == set(keys[1:4])


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["a/b", "c"], ["b", "c"]),
        (["a/b/", "c/b"], ["0", "1"]),
        (["a/mean"], ["0"]),
    ],
)
def test_names_of_references(models, names):
    assert reference_names(models) == names
