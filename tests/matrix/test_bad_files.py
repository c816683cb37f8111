"""Damaged files, models and recipes raise an error with a clear message before the first step."""

import copy
import io
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from methods import METHODS
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from hf_sft_variants.base.example_keys import add_content_keys
from hf_sft_variants.base.fingerprints import vocabulary_hash
from hf_sft_variants.errors import InputError
from hf_sft_variants.launch.training import make_parser, parse


class Case(NamedTuple):
    """A start that is refused: with a file at the path of the option `FILE`, or with a model, made in `FOLDER`."""

    method: str
    message: str
    options: dict[str, Any] = {}
    rows: Any = "tokens"
    arguments: dict[str, Any] = {}
    model: Any = None
    file: Any = None


class Executed:
    """What a pickle of it does shows if anything loads it."""

    def __reduce__(self):
        return exec, ("raise SystemError('a pickle was loaded')",)


# Files as they should be


def frequencies(start, **changes):
    arrays = {"idf": np.ones(len(start.tokenizer)), "vocabulary": vocabulary_hash(start.tokenizer), **changes}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def parquet(columns, metadata=None):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), buffer)
    return buffer.getvalue()


def confidence(start, metadata=None, **changes):
    keyed = add_content_keys(start.rows["tokens"])
    count = len(keyed)
    columns = {"example_key": keyed["example_key"][:], "mean_nll": [1.0 + row for row in range(count)]}
    columns["mean_perplexity"] = [math.exp(nll) for nll in columns["mean_nll"]]
    return parquet(columns | changes, metadata)


def scores(start, **changes):
    keys = add_content_keys(start.rows["tokens"])["example_key"][:]
    columns = {
        "example_key": keys,
        "model": ["m"] * len(keys),
        "sum_log_prob": [-10.0] * len(keys),
        "num_tokens": [5] * len(keys),
        "mean_log_prob": [-2.0] * len(keys),
        "score_end_of_turn": [True] * len(keys),
    }
    return parquet({name: values for name, values in (columns | changes).items() if values is not None})


# The ways they are damaged


def missing(path, content):
    pass


def empty(path, content):
    path.write_bytes(b"")


def text(path, content):
    path.write_text("example_key,model\n")


def truncated(path, content):
    path.write_bytes(content[: len(content) // 2])


def corrupted(path, content):
    flipped = bytes(byte ^ 0xFF for byte in content[60:100])
    path.write_bytes(content[:60] + flipped + content[100:])


def pickled(path, content):
    path.write_bytes(pickle.dumps(Executed()))


def huge(path, content):
    """The file says that it holds much more than it does."""
    if path.suffix == ".parquet":
        path.write_bytes(content[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1")
        return
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**15,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("idf.npy", header.getvalue())


def folder(path, content):
    path.mkdir()


def damaged(good, damage):
    """Writes a file that was right before it was damaged."""
    return lambda path, start: damage(path, good(start))


def wrong(good, **changes):
    """Writes a whole file with something wrong in it."""
    return lambda path, start: path.write_bytes(good(start, **changes))


def lines(content):
    return lambda path, start: path.write_text(content)


DAMAGES = (empty, text, truncated, corrupted, pickled, huge, folder)
TFIDF = {"tfidf_file": "FILE.npz"}
CONFIDENCE = {"confidence_source": "file", "confidence_file": "FILE.parquet"}
SCORES = {"reference_score_file": "FILE.parquet"}
LINES = {"reference_score_file": "FILE.jsonl"}
UNREADABLE = r"`tfidf_file='.*npz'` can't be read \(.*\). Delete it to have it fitted again"

FILES = [
    *[Case("sft_go", UNREADABLE, TFIDF, file=damaged(frequencies, damage)) for damage in DAMAGES],
    Case("sft_go", UNREADABLE, TFIDF, file=wrong(frequencies, idf=np.array([Executed()], dtype=object))),
    Case("sft_go", UNREADABLE, TFIDF, file=wrong(frequencies, idf=np.full(330, math.nan))),
    Case("sft_go", UNREADABLE, TFIDF, file=wrong(frequencies, idf=-np.ones(330))),
    Case("sft_go", UNREADABLE, TFIDF, file=wrong(frequencies, idf=np.ones((330, 2)))),
    Case("sft_go", UNREADABLE, TFIDF, file=wrong(frequencies, idf=np.array(["a"] * 330))),
    Case("sft_go", "was written with another tokenizer. Give another", TFIDF,
             file=wrong(frequencies, idf=np.ones(329))),
    Case("sft_go", "was written with another tokenizer", TFIDF, file=wrong(frequencies, vocabulary="other")),
    *[
        Case("sftmix", "`confidence_file='.*'` can't be read: .* Give a file that `ConfidenceTr", CONFIDENCE,
                 file=damaged(confidence, damage))
        for damage in (missing, *DAMAGES)
    ],
    Case("sftmix", "has no column `mean_perplexity`, only", CONFIDENCE,
             file=wrong(lambda start: parquet({"example_key": ["a"], "mean_nll": [1.0]}))),
    Case("sftmix", "has a value of the wrong type: .*'a'", CONFIDENCE,
             file=wrong(confidence, mean_nll=["a"] * 16)),
    Case("sftmix", "is that of another data set: none of the 16 examples", CONFIDENCE,
             file=wrong(confidence, example_key=list(range(16)))),
    Case("sftmix", "Row 1 .* has no perplexity in .*: it is NaN or null there", CONFIDENCE,
             file=wrong(confidence, mean_nll=[1.0, math.nan] + [1.0] * 14)),
    Case("sftmix", "has the `mean_nll` -1.0 in row 0, but it is never negative", CONFIDENCE,
             file=wrong(confidence, mean_nll=[-1.0] * 16)),
    Case("sftmix", "has two different confidences of the example with the key a", CONFIDENCE,
             file=wrong(confidence, example_key=["a", "a"] + ["b"] * 14, mean_nll=[1.0, 2.0] + [3.0] * 14)),
    Case("sftmix", "is that of another data set: none of the 16 examples", CONFIDENCE,
             file=wrong(confidence, example_key=[str(row) for row in range(16)])),
    Case("sftmix", "can't be read: Expecting", CONFIDENCE,
             file=wrong(confidence, metadata={"hf_sft_variants": "{"})),
    Case("sftmix", "has the format 99, but this version of hf_sft_variants reads 2", CONFIDENCE,
             file=wrong(confidence, metadata={"hf_sft_variants": '{"version": 99}'})),
    *[
        Case("poft", r"`reference_score_file` '.*' can't be read: .* See docs/score_file.md", SCORES,
                 file=damaged(scores, damage))
        for damage in (missing, *DAMAGES)
    ],
    *[
        Case("poft", r"`reference_score_file` '.*' can't be read: .* See docs/score_file.md", LINES, file=file)
        for file in (damaged(scores, pickled), lines(""), lines('{"example_key": "a", "mod'), lines("[1, 2]\n"))
    ],
    Case("poft", "is neither .parquet nor .jsonl", {"reference_score_file": "FILE.csv"}, file=lines("a,b\n")),
    Case("poft", "has no column `model`, only", SCORES, file=wrong(scores, model=None)),
    Case("poft", "has no column `sum_log_prob` and `num_tokens`", SCORES,
             file=wrong(scores, num_tokens=None, mean_log_prob=None)),
    Case("poft", "has a value of the wrong type", SCORES, file=wrong(scores, num_tokens=["many"] * 16)),
    Case("poft", "has a value of the wrong type", SCORES, file=wrong(scores, num_tokens=[5.5] * 16)),
    Case("poft", "has no `example_key` in row 2", SCORES,
             file=wrong(scores, example_key=["a", "b", None] + ["c"] * 13)),
    Case("poft", "has a value of the wrong type: .*yes", SCORES,
             file=wrong(scores, score_end_of_turn=["yes"] * 16)),
    Case("poft", "the score .* gives no finite mean log-probability of 0 or less", SCORES,
             file=wrong(scores, sum_log_prob=[math.nan] * 16)),
    Case("poft", "the score .* gives no finite mean log-probability", SCORES,
             file=wrong(scores, num_tokens=[0] * 16, mean_log_prob=[None] * 16)),
    Case("poft", "contradicts itself, `mean_log_prob` is not `sum_log_prob` over", SCORES,
             file=wrong(scores, mean_log_prob=[-7.0] * 16)),
    Case("poft", "has two different scores of 'm'", SCORES,
             file=wrong(scores, example_key=["a"] * 16, sum_log_prob=[-10.0] * 15 + [-20.0],
                        mean_log_prob=[None] * 16)),
    Case("poft", "has no score of the reference model 'other'", {**SCORES, "reference_models": ["other"]},
             file=wrong(scores)),
]  # fmt: skip


# Models


def saved(start, folder, lacks=None):
    """A folder of the model and its tokenizer, without one of the files."""
    start.model.save_pretrained(folder)
    start.tokenizer.save_pretrained(folder)
    if lacks is not None:
        (folder / lacks).unlink()
    return str(folder)


def masked_model(start, folder):
    return BertForMaskedLM(BertConfig(vocab_size=330, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))


def encoder_decoder(start, folder):
    model = T5ForConditionalGeneration(T5Config(vocab_size=330, d_model=8, d_ff=8, num_layers=1, num_heads=1))
    model.save_pretrained(folder)
    return str(folder)


def backbone(start, folder):
    return start.model.model


def layer(start, folder):
    return start.model.lm_head


def fewer_embeddings(start, folder):
    start.model.resize_token_embeddings(100)
    return start.model


def other_vocabulary(start, folder):
    """The same model, and a folder of it with another tokenizer."""
    other = copy.deepcopy(start.tokenizer)
    other.add_tokens(["<new>"])
    other.save_pretrained(folder)
    start.model.save_pretrained(folder)
    return start.model


def no_weights_beside(start, folder):
    saved(start, folder, "model.safetensors")
    return start.model


def damaged_scores(start, folder):
    """A model that has scored the rows, and its scores damaged since."""
    saved(start, folder)
    start.make("sft_go", RHO1)
    (path,) = folder.glob("*/*.parquet")
    truncated(path, path.read_bytes())
    return start.model


RHO1 = {"group_by": "rho1", "reference_model": "FOLDER", "score_cache_dir": "FOLDER"}
MODELS = [
    Case("sftmix", "`model` is a `BertForMaskedLM`, which is not a causal language model", model=masked_model),
    Case("sft_go", "`model` is a `T5ForConditionalGeneration`, which is not a causal", model=encoder_decoder),
    Case("poft", "`model` is a `LlamaModel`, which is not a causal language model", model=backbone),
    Case("sftkey", "`model` must be the id or folder of a model, .* got `Linear`", model=layer),
    Case("base", r"has the token id \d+, but the model has 100 embeddings. Pass the model's own tokenizer",
             model=fewer_embeddings),
    Case("sft_go", "the model has 100 embeddings", rows="chat", model=fewer_embeddings),
    Case("sft_go", "The reference model '.*' can't be loaded: .* Pass the folder of a causal language", RHO1,
             model=no_weights_beside),
    Case("sft_go", "has another vocabulary than the trained model: 331 tokens against 330", RHO1,
             model=other_vocabulary),
    Case("sft_go", r"The scores in .* can't be read \(.*\). Delete the file to score again", RHO1,
             model=damaged_scores),
    Case("sft_go", "`importance_model", {"group_by": "llmlingua2", "importance_model": "FOLDER"}),
    Case("poft", "The tokenizer of the reference model '.*' can't be loaded",
             {"reference_models": ["FOLDER"]}, rows="raw chat"),
    Case("sftmix", "has another vocabulary than the trained model", {"reference_model": "FOLDER"},
             model=other_vocabulary),
]  # fmt: skip

RECIPE = """\
model_name_or_path: a/model
dataset_name: a/dataset
use_cpu: true
bf16: false
"""
RECIPES = [
    ("sft_go", RECIPE + "worst_weight: 0.5", "unknown key `worst_weight`; did you mean `worst_group_weight`"),
    ("sft_go", RECIPE + "worst_group_weight: heavy", "`worst_group_weight` must be float, got 'heavy'"),
    ("sft_go", RECIPE + "worst_group_weight: 2", "`worst_group_weight` must be a number between 0 and 1, got 2"),
    ("sft_go", RECIPE + "special_tokens_important: maybe", "`special_tokens_important` must be bool, got 'maybe'"),
    ("sft_go", RECIPE + "group_by: idf", "`group_by` must be one of tfidf, llmlingua2, rho1, column, got 'idf'"),
    ("sft_go", RECIPE + "module: hf_sft_variants.poft", "`module` is hf_sft_variants.poft, but .*sft_go"),
    ("sftkey", RECIPE + "stages: [full, {a: 1}]", "`stages` must be list"),
    ("sftkey", RECIPE + "stage_fractions: [half, half]", "`stage_fractions` must be list"),
    ("sftkey", RECIPE + "key_pattern: '('", "`key_pattern='\\('` is not a regular expression"),
    ("poft", RECIPE + "beta: [1]", r"`beta` must be float, got \[1\]"),
    ("poft", RECIPE + "reference_models: {a: b}", "`reference_models` must be list"),
    ("poft", RECIPE + "beta: -1", "`beta` must be a positive number, got -1"),
    ("sftmix", RECIPE + "confidence_checkpoints: [1.5]", "`confidence_checkpoints` must be list"),
    ("sftmix", RECIPE + "mixup_weight: null", "`mixup_weight` must be float, got None"),
    ("sftmix", RECIPE + "mixup_weight: .nan", "`mixup_weight` must be a number of 0 or more, got nan"),
    ("base", "- a\n- b\n", "must hold lines of `key: value`"),
    ("base", "a: [", "is not valid YAML"),
    ("base", RECIPE.replace("dataset_name: a/dataset", ""), "`dataset_name` is missing"),
]  # fmt: skip


@pytest.mark.cell(
    "Bad input", "invalid data, options, files and models: an error names the fix before training", refused=True
)
@pytest.mark.parametrize(
    ("method", "case"), [(case.method, case) for case in FILES + MODELS if case.method in METHODS]
)
def test_refused(method, case, start):
    Path("FOLDER").mkdir()
    for value in case.options.values() if case.file is not None else ():
        if str(value).startswith("FILE"):
            case.file(Path(value), start)
    with pytest.raises(InputError, match=case.message):
        if case.model is not None:
            start.model = case.model(start, Path("FOLDER").absolute())
        start(method, case.options, case.rows, **case.arguments)


@pytest.mark.cell("Bad input", "wrong keys, types and values in recipes", refused=True)
@pytest.mark.parametrize(("method", "recipe", "message"), [case for case in RECIPES if case[0] in METHODS])
def test_recipes(method, recipe, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(InputError, match=message):
        parse(make_parser(*METHODS[method].classes), ["--config", str(tmp_path / "recipe.yaml")])
