"""Files and models that users bring, damaged in the ways files are, and the error each gets."""

import copy
import io
import math
import pickle
import struct
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bad_inputs import BadInput
from helpers import SMALL
from safetensors import SafetensorError
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from hf_sft_variants import SFTGOConfig, SFTGOTrainer
from hf_sft_variants.base.example_keys import add_content_keys
from hf_sft_variants.base.fingerprints import vocabulary_hash


class Executed:
    """What a pickle of it does shows if anything loads it."""

    def __reduce__(self):
        return exec, ("raise SystemError('a pickle was loaded')",)


# Files as they should be


def frequencies(world, **changes):
    arrays = {"idf": np.ones(len(world.tokenizer)), "vocabulary": vocabulary_hash(world.tokenizer), **changes}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def parquet(columns, metadata=None):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), buffer)
    return buffer.getvalue()


def confidence(world, metadata=None, **changes):
    keyed = add_content_keys(world.rows["tokens"])
    count = len(keyed)
    columns = {"example_key": keyed["example_key"][:], "mean_nll": [1.0 + row for row in range(count)]}
    columns["mean_perplexity"] = [math.exp(nll) for nll in columns["mean_nll"]]
    return parquet(columns | changes, metadata)


def scores(world, **changes):
    keys = add_content_keys(world.rows["tokens"])["example_key"][:]
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


class Damaged:
    """Writes a file that was right before it was damaged."""

    def __init__(self, good, damage):
        self.good = good
        self.damage = damage

    def __call__(self, path: Path, world: SimpleNamespace) -> None:
        self.damage(path, self.good(world))


class Wrong:
    """Writes a whole file with something wrong in it."""

    def __init__(self, good, **changes):
        self.good = good
        self.changes = changes

    def __call__(self, path: Path, world: SimpleNamespace) -> None:
        path.write_bytes(self.good(world, **self.changes))


class Text:
    """Writes a file of lines."""

    def __init__(self, content):
        self.content = content

    def __call__(self, path: Path, world: SimpleNamespace) -> None:
        path.write_text(self.content)


DAMAGES = (empty, text, truncated, corrupted, pickled, huge, folder)
TFIDF = {"tfidf_file": "FILE.npz"}
CONFIDENCE = {"confidence_source": "file", "confidence_file": "FILE.parquet"}
SCORES = {"reference_score_file": "FILE.parquet"}
LINES = {"reference_score_file": "FILE.jsonl"}
UNREADABLE = r"`tfidf_file='.*npz'` can't be read \(.*\). Delete it to have it fitted again"

FILES = [
    *[BadInput("sft_go", UNREADABLE, TFIDF, file=Damaged(frequencies, damage)) for damage in DAMAGES],
    BadInput("sft_go", UNREADABLE, TFIDF, file=Wrong(frequencies, idf=np.array([Executed()], dtype=object))),
    BadInput("sft_go", UNREADABLE, TFIDF, file=Wrong(frequencies, idf=np.full(330, math.nan))),
    BadInput("sft_go", UNREADABLE, TFIDF, file=Wrong(frequencies, idf=-np.ones(330))),
    BadInput("sft_go", UNREADABLE, TFIDF, file=Wrong(frequencies, idf=np.ones((330, 2)))),
    BadInput("sft_go", UNREADABLE, TFIDF, file=Wrong(frequencies, idf=np.array(["a"] * 330))),
    BadInput("sft_go", "was written with another tokenizer. Give another", TFIDF,
             file=Wrong(frequencies, idf=np.ones(329))),
    BadInput("sft_go", "was written with another tokenizer", TFIDF, file=Wrong(frequencies, vocabulary="other")),
    *[
        BadInput("sftmix", "`confidence_file='.*'` can't be read: .* Give a file that `ConfidenceTr", CONFIDENCE,
                 file=Damaged(confidence, damage))
        for damage in (missing, *DAMAGES)
    ],
    BadInput("sftmix", "has no column `mean_perplexity`, only", CONFIDENCE,
             file=Wrong(lambda world: parquet({"example_key": ["a"], "mean_nll": [1.0]}))),
    BadInput("sftmix", "has a value of the wrong type: .*'a'", CONFIDENCE,
             file=Wrong(confidence, mean_nll=["a"] * 16)),
    BadInput("sftmix", "is that of another data set: none of the 16 examples", CONFIDENCE,
             file=Wrong(confidence, example_key=list(range(16)))),
    BadInput("sftmix", "Row 1 .* has no perplexity in .*: it is NaN or null there", CONFIDENCE,
             file=Wrong(confidence, mean_nll=[1.0, math.nan] + [1.0] * 14)),
    BadInput("sftmix", "has the `mean_nll` -1.0 in row 0, but it is never negative", CONFIDENCE,
             file=Wrong(confidence, mean_nll=[-1.0] * 16)),
    BadInput("sftmix", "has two different confidences of the example with the key a", CONFIDENCE,
             file=Wrong(confidence, example_key=["a", "a"] + ["b"] * 14, mean_nll=[1.0, 2.0] + [3.0] * 14)),
    BadInput("sftmix", "is that of another data set: none of the 16 examples", CONFIDENCE,
             file=Wrong(confidence, example_key=[str(row) for row in range(16)])),
    BadInput("sftmix", "can't be read: Expecting", CONFIDENCE,
             file=Wrong(confidence, metadata={"hf_sft_variants": "{"})),
    BadInput("sftmix", "has the format 99, but this version of hf_sft_variants reads 2", CONFIDENCE,
             file=Wrong(confidence, metadata={"hf_sft_variants": '{"version": 99}'})),
    *[
        BadInput("poft", r"`reference_score_file` '.*' can't be read: .* See docs/score_file.md", SCORES,
                 file=Damaged(scores, damage))
        for damage in (missing, *DAMAGES)
    ],
    *[
        BadInput("poft", r"`reference_score_file` '.*' can't be read: .* See docs/score_file.md", LINES, file=file)
        for file in (Damaged(scores, pickled), Text(""), Text('{"example_key": "a", "mod'), Text("[1, 2]\n"))
    ],
    BadInput("poft", "is neither .parquet nor .jsonl", {"reference_score_file": "FILE.csv"}, file=Text("a,b\n")),
    BadInput("poft", "has no column `model`, only", SCORES, file=Wrong(scores, model=None)),
    BadInput("poft", "has no column `sum_log_prob` and `num_tokens`", SCORES,
             file=Wrong(scores, num_tokens=None, mean_log_prob=None)),
    BadInput("poft", "has a value of the wrong type", SCORES, file=Wrong(scores, num_tokens=["many"] * 16)),
    BadInput("poft", "has a value of the wrong type", SCORES, file=Wrong(scores, num_tokens=[5.5] * 16)),
    BadInput("poft", "has no `example_key` in row 2", SCORES,
             file=Wrong(scores, example_key=["a", "b", None] + ["c"] * 13)),
    BadInput("poft", r"has `score_end_of_turn` \['yes'\], but `score_end_of_turn=True`", SCORES,
             file=Wrong(scores, score_end_of_turn=["yes"] * 16)),
    BadInput("poft", "the score .* gives no finite mean log-probability of 0 or less", SCORES,
             file=Wrong(scores, sum_log_prob=[math.nan] * 16)),
    BadInput("poft", "the score .* gives no finite mean log-probability", SCORES,
             file=Wrong(scores, num_tokens=[0] * 16, mean_log_prob=[None] * 16)),
    BadInput("poft", "contradicts itself, `mean_log_prob` is not `sum_log_prob` over", SCORES,
             file=Wrong(scores, mean_log_prob=[-7.0] * 16)),
    BadInput("poft", "has two different scores of 'm'", SCORES,
             file=Wrong(scores, example_key=["a"] * 16, sum_log_prob=[-10.0] * 15 + [-20.0],
                        mean_log_prob=[None] * 16)),
    BadInput("poft", "has no score of the reference model 'other'", {**SCORES, "reference_models": ["other"]},
             file=Wrong(scores)),
]  # fmt: skip


# Models


def saved(world, folder, lacks=None):
    """A folder of the model and its tokenizer, without one of the files."""
    world.model.save_pretrained(folder)
    world.tokenizer.save_pretrained(folder)
    if lacks is not None:
        (folder / lacks).unlink()
    return str(folder)


def nowhere(world, folder):
    return str(folder / "nowhere")


def model_alone(world, folder):
    world.model.save_pretrained(folder)
    return str(folder)


def cut_weights(world, folder):
    path = Path(saved(world, folder), "model.safetensors")
    truncated(path, path.read_bytes())
    return str(folder)


def pickled_weights(world, folder):
    pickled(Path(saved(world, folder, "model.safetensors"), "pytorch_model.bin"), b"")
    return str(folder)


def broken_configuration(world, folder):
    Path(saved(world, folder), "config.json").write_text("{")
    return str(folder)


def masked_model(world, folder):
    return BertForMaskedLM(BertConfig(vocab_size=330, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))


def encoder_decoder(world, folder):
    model = T5ForConditionalGeneration(T5Config(vocab_size=330, d_model=8, d_ff=8, num_layers=1, num_heads=1))
    model.save_pretrained(folder)
    return str(folder)


def backbone(world, folder):
    return world.model.model


def layer(world, folder):
    return world.model.lm_head


def fewer_embeddings(world, folder):
    world.model.resize_token_embeddings(100)
    return world.model


def no_template(world, folder):
    world.tokenizer.chat_template = None
    return world.model


def other_vocabulary(world, folder):
    """The same model, and beside it one with another tokenizer."""
    other = copy.deepcopy(world.tokenizer)
    other.add_tokens(["<new>"])
    other.save_pretrained(folder)
    world.model.save_pretrained(folder)
    return world.model


def no_weights_beside(world, folder):
    saved(world, folder, "model.safetensors")
    return world.model


def damaged_scores(world, folder):
    """A model that has scored the rows, and its scores damaged since."""
    options = {"group_by": "rho1", "reference_model": saved(world, folder), "score_cache_dir": str(folder)}
    args = SFTGOConfig(str(folder), **SMALL, **options)
    SFTGOTrainer(world.model, args, train_dataset=world.rows["tokens"], processing_class=world.tokenizer)
    (path,) = folder.glob("*/*.parquet")
    truncated(path, path.read_bytes())
    return world.model


RHO1 = {"group_by": "rho1", "reference_model": "FOLDER", "score_cache_dir": "FOLDER"}
MODELS = [
    BadInput("base", "nowhere", model=nowhere, error=OSError),
    BadInput("sftmix", "Error no file named model.safetensors", error=OSError,
             model=partial(saved, lacks="model.safetensors")),
    BadInput("sft_go", "Error while deserializing header", model=cut_weights, error=SafetensorError),
    BadInput("poft", "Weights only load failed", model=pickled_weights, error=pickle.UnpicklingError),
    BadInput("sftkey", "config.json' is not a valid JSON file", model=broken_configuration, error=OSError),
    BadInput("base", "Can't instantiate a processor, a tokenizer", arguments={"processing_class": None},
             model=model_alone),
    BadInput("sftmix", "`model` is a `BertForMaskedLM`, which is no causal language model", model=masked_model),
    BadInput("sft_go", "`model` is a `T5ForConditionalGeneration`, which is no causal", model=encoder_decoder),
    BadInput("poft", "`model` is a `LlamaModel`, which is no causal language model", model=backbone),
    BadInput("sftkey", "`model` must be the id or folder of a model, .* got `Linear`", model=layer),
    BadInput("base", r"has the token id \d+, but the model has 100 embeddings. Pass the model's own tokenizer",
             model=fewer_embeddings),
    BadInput("sft_go", "the model has 100 embeddings", rows="chat", model=fewer_embeddings),
    BadInput("base", "tokenizer.chat_template is not set", rows="chat", model=no_template),
    BadInput("sft_go", "The reference model '.*' can't be loaded: .* Pass the folder of a causal language", RHO1,
             model=no_weights_beside),
    BadInput("sft_go", "has another vocabulary than the trained model: 331 tokens against 330", RHO1,
             model=other_vocabulary),
    BadInput("sft_go", r"The scores in .* can't be read \(.*\). Delete the file to score again", RHO1,
             model=damaged_scores),
    BadInput("sft_go", "`importance_model", {"group_by": "llmlingua2", "importance_model": "FOLDER"}),
    BadInput("poft", "The tokenizer of the reference model '.*' can't be loaded",
             {"reference_models": ["FOLDER"]}, rows="raw chat"),
    BadInput("sftmix", "has another vocabulary than the trained model", {"reference_model": "FOLDER"},
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
    ("sftkey", RECIPE + "key_pattern: '('", "`key_pattern='\\('` is no regular expression"),
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
