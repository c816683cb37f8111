"""Wrong configurations, data and arguments raise an error with a clear message before the first step."""

import math
from dataclasses import fields
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from methods import METHODS
from trl import DPOConfig, SFTConfig

from hf_sft_variants.errors import InputError


Case = tuple[str, str, dict[str, Any], Any, dict[str, Any], type[Exception]]


def configuration(method: str, message: str, **options: Any) -> Case:
    return method, message, options, "tokens", {}, InputError


def broken(message: str, method: str, rows: Any, **options: Any) -> Case:
    """Of wrong rows, columns, or rows that the fixture has by this name."""
    return method, message, options, rows, {}, InputError


def argument(message: str, method: str, error: type[Exception] = InputError, rows="tokens", **arguments: Any) -> Case:
    return method, message, {}, rows, arguments, error


RANGES = [
    # Of all methods
    configuration("base", "`max_length` must be an integer of 1 or more, got -5", max_length=-5),
    configuration("sft_go", "`max_length` must be an integer of 1 or more, got 0", max_length=0),
    configuration("sftkey", "`max_length` must be an integer of 1 or more, got '64'", max_length="64"),
    configuration("poft", "`pad_to_multiple_of` must be an integer of 1 or more, got 0", pad_to_multiple_of=0),
    configuration("base", "`per_device_train_batch_size` must be .* got 0", per_device_train_batch_size=0),
    configuration("sft_go", "`gradient_accumulation_steps` must be .* got 0", gradient_accumulation_steps=0),
    # SFT-GO
    configuration("sft_go", "`important_fraction` must be between 0 and 1, exclusive", important_fraction=0.0),
    configuration("sft_go", "`important_fraction` must be between 0 and 1, .* got 1.0", important_fraction=1.0),
    configuration("sft_go", "`important_fraction` must be a number between .* got nan", important_fraction=math.nan),
    configuration("sft_go", "`worst_group_weight` must be a number .* got -0.1", worst_group_weight=-0.1),
    configuration("sft_go", "`worst_group_weight` must be a number .* got 1.5", worst_group_weight=1.5),
    configuration("sft_go", "`worst_group_weight_end` must be a number .* got 2", worst_group_weight_end=2),
    configuration("sft_go", "`min_grouped_tokens` must be 0 or more, got -1", min_grouped_tokens=-1),
    configuration("sft_go", "`score_batch_tokens` must be 1 or more, got 0", score_batch_tokens=0),
    # SFTKey
    configuration("sftkey", "`stages` has no stage; it must be a list of 'full' and 'key'", stages=[]),
    configuration("sftkey", r"must be positive and sum to 1, not 1.1", stage_fractions=[0.5, 0.6]),
    configuration("sftkey", r"must be positive and sum to 1", stage_fractions=[1.5, -0.5]),
    configuration("sftkey", r"must be positive and sum to 1, not nan", stage_fractions=[math.nan, 0.5]),
    configuration("sftkey", "must have one number for each stage", stage_fractions=[1.0]),
    configuration("sftkey", "must have one number for each stage", stages=["full"] * 3),
    configuration("sftkey", "must have one learning rate .* for each", stage_learning_rates=[1e-5]),
    configuration("sftkey", "must have one learning rate .* for each", stage_learning_rates=[1e-5, -1e-5]),
    configuration("sftkey", "must have one learning rate .* for each", stage_learning_rates=[math.nan, 0.1]),
    configuration("sftkey", "`full_loss_weight` must be a number of 0 or more, got -1.0", full_loss_weight=-1.0),
    configuration("sftkey", "`key_loss_weight` must be a number of 0 or more, got nan", key_loss_weight=math.nan),
    configuration("sftkey", "`answer_eval_steps` must be 1 or more, got 0", answer_eval_steps=0),
    configuration("sftkey", "`answer_eval_samples` must be 1 or more, got -2", answer_eval_samples=-2),
    configuration("sftkey", "`answer_eval_max_new_tokens` must be 1 or more", answer_eval_max_new_tokens=0),
    # PoFT
    configuration("poft", "`beta` must be a positive number, got 0.0", beta=0.0),
    configuration("poft", "`beta` must be a positive number, got inf", beta=math.inf),
    configuration("poft", "`gamma` must be a finite number, got nan", gamma=math.nan),
    configuration("poft", "`reference_batch_tokens` must be 1 or more, got 0", reference_batch_tokens=0),
    # SFTMix
    configuration("sftmix", "`mixup_weight` must be a number of 0 or more, got -0.1", mixup_weight=-0.1),
    configuration("sftmix", "`mixup_weight` must be a number of 0 or more, got nan", mixup_weight=math.nan),
    configuration("sftmix", "`ntp_weight` must be a number of 0 or more, got inf", ntp_weight=math.inf),
    configuration("sftmix", "`mixup_alpha` must be a number above 0, got 0.0", mixup_alpha=0.0),
    configuration("sftmix", r"`confidence_checkpoints=\[\]` must be one or more steps", confidence_checkpoints=[]),
    configuration("sftmix", "one or more steps, counted from 1", confidence_checkpoints=[0, 5]),
]

CHOICES = [
    configuration("sftkey", r"`stages` must be list\[str\], got 'full'", stages="full"),
    configuration("sft_go", r"`group_by='tf-idf'` is unknown; choose one of \['tfidf',", group_by="tf-idf"),
    configuration("sft_go", "`group_scope='batch'` is unknown", group_scope="batch"),
    configuration("sft_go", "`sample_weighting='equal'` is unknown", sample_weighting="equal"),
    configuration("sft_go", "`worst_group_schedule='step'` is unknown", worst_group_schedule="step"),
    configuration("sftkey", "`stages` has 'answer'; it must be a list of", stages=["full", "answer"]),
    configuration("sftkey", "`missing_key='skip'` is unknown", missing_key="skip"),
    configuration("sftkey", "`key_turns='first'` is unknown", key_turns="first"),
    configuration("poft", r"`length_normalizer='mean'` is unknown; choose one of", length_normalizer="mean"),
    configuration("poft", "`preference_weighting='dpo'` is unknown", preference_weighting="dpo"),
    configuration("sftmix", "`confidence_split='median'` is unknown", confidence_split="median"),
    configuration("sftmix", "`confidence_source='reward'` is unknown", confidence_source="reward"),
    configuration("sftmix", "`confidence_measure='nll'` is unknown", confidence_measure="nll"),
    configuration("base", "`loss_type='dft'` is not supported: AnnotatedSFTTrainer has its own", loss_type="dft"),
    configuration("poft", "Unsupported truncation mode: middle", truncation_mode="middle"),
]  # fmt: skip

CONFLICTS = [
    configuration("base", "`label_smoothing_factor=0.1` is not supported", label_smoothing_factor=0.1),
    configuration("base", "`eval_packing=True` without `packing=True` is not supported", eval_packing=True),
    configuration("sft_go", "`max_length` can't be `None`: set it", packing=True, max_length=None),
    configuration("sft_go", "`importance_column` .* or `group_column` .* got neither", group_by="column"),
    configuration("sft_go", "`group_column` .* got both", group_by="column", importance_column="a", group_column="b"),
    configuration("sft_go", "`group_column='b'` is only used with `group_by='column'`", group_column="b"),
    configuration("sft_go", "`tfidf_file='f'` is only used with `group_by='tfidf'`", tfidf_file="f",
                  group_by="column", group_column="b"),
    configuration("sft_go", "`group_by='rho1'` needs `reference_model`", group_by="rho1"),
    configuration("sft_go", "`reference_model='a'` is only used with `group_by='rho1'`", reference_model="a"),
    configuration("sftkey", "`learning_rate=0.0` must be positive with", stage_learning_rates=[1e-5, 1e-5],
                  learning_rate=0.0),
    configuration("sftkey", "`full_loss_weight=0.1` only has an effect in a 'key' stage", full_loss_weight=0.1,
                  stages=["full"]),
    configuration("sftkey", "`key_loss_weight=2.0` only has an effect in a 'full' stage", key_loss_weight=2.0,
                  stages=["key"]),
    configuration("sftkey", r"`key_pattern='\\\\d\+'` has no group named `key`", key_pattern=r"\d+"),
    configuration("sftkey", "is not a regular expression", key_pattern=r"(?P<key>\d+"),
    configuration("sftkey", "`key_delimiter=' '` is blank", key_delimiter=" "),
    configuration("sftkey", "`key_delimiter` and `key_pattern` both say", key_delimiter="#", key_pattern="(?P<key>.)"),
    configuration("sftkey", "`answer_column='a'` must be set together", answer_column="a"),
    configuration("sftkey", r"`answer_tags` is \['<a>'\]: pass an opening and a closing tag", answer_tags=["<a>"]),
    configuration("sftkey", "none of which contains another", answer_tags=["<Thinking", "b"]),
    configuration("poft", r"`reference_models=\['a', 'a'\]` has a model twice", reference_models=["a", "a"]),
    configuration("poft", "`truncation_mode='keep_end'` cuts prompts", truncation_mode="keep_end"),
    configuration("poft", "`packing_strategy='wrapped'` cuts examples", packing=True, packing_strategy="wrapped"),
    configuration("poft", "`packing_strategy='bfd_split'` cuts examples", eval_packing=True,
                  packing_strategy="bfd_split"),
    configuration("poft", "`length_normalizer='target'` needs summed", length_normalizer="target"),
    configuration("sftmix", "are both 0, which leaves no loss", mixup_weight=0.0, ntp_weight=0.0),
    configuration("sftmix", "`pair_sampling=False` leaves no pairs for `mixup_weight=0.2`", pair_sampling=False),
    configuration("sftmix", "`confidence_file='c'` is only used with `confidence_source='file'`", confidence_file="c"),
    configuration("sftmix", "needs `confidence_file`, the path", confidence_source="file"),
    configuration("sftmix", "`confidence_source` is 'online'. Remove it", confidence_source="online",
                  reference_model="m"),
    configuration("sftmix", "no confidence is needed here", confidence_split="random", reference_model="m"),
    configuration("sftmix", "no confidence is needed here", confidence_split="random", confidence_checkpoints=[1]),
    configuration("sftmix", "mixes from the second epoch on", confidence_source="online", num_train_epochs=1),
    configuration("sftmix", "which draws pairs in an order of its own", train_sampling_strategy="group_by_length"),
    configuration("sftmix", "gives a process 3 rows, but pairs need an even number", per_device_train_batch_size=3),
    configuration("sftmix", "may choose an odd batch size", auto_find_batch_size=True),
    configuration("sftmix", "may cut pairs apart when the last batch", accelerator_config={"dispatch_batches": True}),
    configuration("sftmix", r"`confidence_checkpoints` must be list\[int\] \| None, got \[2.5\]",
                  confidence_checkpoints=[2.5]),
    configuration("sftmix", "`packing_strategy='wrapped'` cuts examples", packing=True, packing_strategy="wrapped"),
    configuration("sftmix", "leaves the examples without the numbers",
                  dataset_kwargs={"skip_prepare_dataset": True}),
]  # fmt: skip

USER = [{"role": "user", "content": "What is 3 plus 2?"}]
ANSWER = [{"role": "assistant", "content": "It is 5."}]
IDS = list(range(5, 17))


def conversation(**message: Any) -> list[dict]:
    return [{"messages": USER + ANSWER}, {"messages": [*USER, message]}]


ROWS = [
    broken(r"has the columns \['a', 'q'\], but none to train on: `prompt` and", "base", [{"q": "b", "a": "c"}]),
    broken(r"`txt` \(`dataset_text_field`\), or `input_ids`", "sft_go", {"text": ["a"]}, dataset_text_field="txt"),
    broken("Row 1 of the train dataset: `text` is None; give a text", "sftmix", {"text": ["a b", None, "c"]}),
    broken("Row 0 of the train dataset: `text` is 1; give a text", "base", {"text": [1, 2]}),
    broken("The train dataset has no supervised token", "sft_go", {"text": ["", ""]}),
    broken("Row 0 .*: there is a `prompt`, but no `completion`", "poft", {"prompt": ["a", "b"]}),
    broken("Row 1 .*: `prompt` is 'b' and `completion` None; give two texts", "sftkey",
           {"prompt": ["a", "b"], "completion": ["a", None]}),
    broken(r"`prompt` is 'a' and `completion` \[.*\]; give two", "sft_go", [{"prompt": "a", "completion": ANSWER}]),
    broken(r"`prompt` is \[.*\] and `completion` 'b'; give two texts", "base", [{"prompt": USER, "completion": "b"}]),
    broken(r"`completion` is \[\]; give a list of messages", "sftkey",
           [{"prompt": USER, "completion": ANSWER}, {"prompt": USER, "completion": []}]),
    broken(r"Row 1 .*: `messages` is \[\]; give a list of messages", "sft_go",
           [{"messages": USER + ANSWER}, {"messages": []}]),
    broken("Row 1 .*: `messages` is None; give a list of messages", "poft",
           [{"messages": USER + ANSWER}, {"messages": None}]),
    broken("Row 0 .*: `messages` is 'hello'; give a list of messages", "sftkey", {"messages": ["hello"]}),
    broken("message 0 of `messages` has no `role`", "sftmix", [{"messages": [{"content": "a"}]}]),
    broken("Row 1 .*: message 1 of `messages` has None as `content`; give a text", "base",
           conversation(role="assistant", content=None)),
    broken("message 0 of `messages` has 1 as `content`; give a text", "sft_go",
           [{"messages": [{"role": "user", "content": 1}]}]),
    broken("message 1 of `conversations` has None as `value`", "sftmix",
           [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]}]),
    broken("`tools` is '{not json', which is not JSON", "base", [{"messages": USER + ANSWER, "tools": "{not json"}]),
    broken("`chat_template_kwargs` is None; give a mapping", "poft",
           [{"messages": USER + ANSWER, "chat_template_kwargs": value} for value in ({"a": True}, None)]),
    broken("has the column 'images': vision data sets are not", "sftkey", {"images": [[None]], "text": ["a"]}),
    broken("`completion_only_loss=True` needs `prompt` and `completion`", "sft_go", {"text": ["a b"]},
           completion_only_loss=True),
    broken("The train dataset has the column `labels`, but no `input_ids`.* Rename the column or remove it", "base",
           {"text": ["a b", "c"], "labels": [1, 0]}),
    broken("has the column `labels`, but no `input_ids`", "sftkey",
           [{"messages": USER + ANSWER, "labels": [1, 0, 1]}, {"messages": USER + ANSWER, "labels": []}]),
    broken("has the column `labels`, but no `input_ids`", "poft",
           {"prompt": ["a"], "completion": ["b"], "labels": [1.5]}),
    broken("has the column `labels`, but no `input_ids`", "sft_go", [{"messages": USER + ANSWER, "labels": "good"}]),
    broken("has the column `labels`, but no `input_ids`", "sftmix", {"text": ["a b", "c"], "labels": [[0], [1]]}),
    broken("has the column `assistant_masks`, but no `input_ids`", "base", {"text": ["a"], "assistant_masks": [True]}),
    # Tokens
    broken("`labels` has 1; give a list of integers, one for each token", "base",
           {"input_ids": [IDS, IDS], "labels": [1, 0]}),
    broken(r"`input_ids` has \[.*\]; give a list", "base", "stream of large ids"),
    broken("Row 0 .*: `input_ids` has None; give a list of integers", "base", {"input_ids": [[5, None, 6]]}),
    broken("Row 1 .*: `input_ids` has None; give a list of integers", "sft_go", {"input_ids": [IDS, None]}),
    broken("`input_ids` has 5; give a list of integers", "sftkey", {"input_ids": [5, 6]}),
    broken(r"`input_ids` has \[5, 6\]; give a list of integers", "poft", {"input_ids": [[[5, 6], [7, 8]]]}),
    broken("`input_ids` has 5.5; give a list of integers", "sftmix", {"input_ids": [[5.5, 6.0]]}),
    broken("`input_ids` has 'a'; give a list of integers", "base", {"input_ids": [["a", "b"]]}),
    broken(r"`input_ids` has -3, which is not an id .* \(0 to 329\)", "sftkey", {"input_ids": [[5, -3, 6]]}),
    broken(r"`input_ids` has 100000, which is not an id of the tokenizer \(0 to 329\)", "sftmix",
           {"input_ids": [[*IDS, 100_000]]}),
    broken("`labels` has 13 values, but `input_ids` has 12", "base", {"input_ids": [IDS], "labels": [[*IDS, 7]]}),
    broken("`labels` has 10 values, but `input_ids` has 12 tokens", "poft", {"input_ids": [IDS], "labels": [IDS[2:]]}),
    broken("Row 1 .*: `labels` has None; give a list", "sftmix", {"input_ids": [IDS, IDS], "labels": [IDS, None]}),
    broken("`labels` has None; give a list of", "sft_go", {"input_ids": [IDS], "labels": [[*IDS[:-1], None]]}),
    broken("`labels` has 5.0; give a list of integers", "sftkey",
           {"input_ids": [IDS], "labels": [[float(token) for token in IDS]]}),
    broken("`labels` has 100000, which is not an id", "base", {"input_ids": [IDS], "labels": [[*IDS[:-1], 100_000]]}),
    broken("`labels` has -1, which is not an id", "sftkey", {"input_ids": [IDS], "labels": [[-1] * 12]}),
    broken("`completion_mask` has 7 values, but `input_ids` has 12", "sft_go",
           {"input_ids": [IDS], "completion_mask": [[1] * 7]}),
    broken("`assistant_masks` has 2; give 1 on the tokens of the loss", "poft",
           {"input_ids": [IDS], "assistant_masks": [[2] * 12]}),
    broken("`seq_lengths` adds up to 13, but `input_ids` has 12 tokens", "base",
           {"input_ids": [IDS], "seq_lengths": [[6, 7]]}),
    broken("The train dataset has no supervised token", "sftmix", {"input_ids": [IDS], "labels": [[-100] * 12]}),
]  # fmt: skip

OWN_COLUMNS = {"group_by": "column", "group_column": "mine"}
OWN_SCORES = {"group_by": "column", "importance_column": "mine"}


def column(values: Any, **others: Any) -> dict[str, list]:
    """Two rows of tokens with a column `mine`, or columns by their names; the second row has the values."""
    return {
        "input_ids": [IDS, IDS],
        **{name: [[0] * 12, value] for name, value in ({"mine": values} | others).items()},
    }


def only(**columns: Any) -> dict[str, list]:
    return {"input_ids": [IDS, IDS], **columns}


COLUMNS = [
    broken("The train dataset has no column `mine`; it has", "sft_go", only(), **OWN_COLUMNS),
    broken("Row 1 .*: column `mine` has 11 values, but `input_ids` has 12", "sft_go", column([0] * 11), **OWN_COLUMNS),
    broken("Row 1 .*: column `mine` has None, but `input_ids` has 12", "sft_go", column(None), **OWN_COLUMNS),
    broken("Row 1 .*: column `mine` has the group id 32. .* integers from 0 to 31", "sft_go", column([32] * 12),
           **OWN_COLUMNS),
    broken("column `mine` has the group id 0.5", "sft_go", only(mine=[[0.5] * 12] * 2), **OWN_COLUMNS),
    broken("column `mine` has the group id None", "sft_go", column([None] * 12), **OWN_COLUMNS),
    broken("column `mine` has the score nan. Scores must be finite", "sft_go", only(mine=[[math.nan] * 12] * 2),
           **OWN_SCORES),
    broken("column `mine` has the score 'a'", "sft_go", only(mine=[["a"] * 12] * 2), **OWN_SCORES),
    broken("column `mine` has the score True", "sft_go", only(mine=[[True] * 12] * 2), **OWN_SCORES),
    broken("Row 0 .*: column `key_mask` has 2: it must be 1 on tokens", "sftkey", only(key_mask=[[2] * 12] * 2)),
    broken("column `key_mask` has 11 values, but `input_ids` has 12", "sftkey", only(key_mask=[[1] * 11] * 2)),
    broken("column `key_mask` is not 1 on any token in the loss", "sftkey", only(key_mask=[[0] * 12] * 2)),
    broken("Row 0 .*: the tag '<Thinking>' is not there. Specify where the answer is", "sftkey", "chat"),
    broken("Row 0 .*: `key_delimiter='@@'` is not there", "sftkey", "chat", key_delimiter="@@"),
    broken("No example of the train dataset has a key within max_length=40", "sftkey", "chat", key_delimiter="####",
           max_length=40),
    broken("has no column `why`, which `reasoning_column` names", "sftkey", "chat", reasoning_column="why",
           answer_column="what"),
    broken("needs an `eval_dataset` .* has the columns `prompt` and `answer`", "sftkey", "chat", stages=["full"],
           answer_eval_steps=5),
    broken(r"Row 0 .*: column `ref_logps` has \[-1.0, None\]. Give a list of 2", "poft",
           only(ref_logps=[[-1.0, None]] * 2)),
    broken(r"column `ref_logps` has \[nan\]. Give a list of 1 finite", "poft", only(ref_logps=[[math.nan]] * 2)),
    broken(r"column `ref_logps` has \[2.0\]. .* \(0 or less\)", "poft", only(ref_logps=[[2.0]] * 2)),
    broken(r"column `ref_logps` has \[-1.0\]. Give a list of 2", "poft", only(ref_logps=[[-1.0, -1.0], [-1.0]])),
    broken("column `ref_logps` has -1.0. Give a list of 1", "poft", only(ref_logps=[-1.0, -1.0])),
    broken("column `ref_logps` has 'a'. Give a list of 1", "poft", only(ref_logps=["a", "b"])),
    broken(r"`reference_models=\['a'\]` names 1", "poft", only(ref_logps=[[-1.0, -2.0]] * 2),
           reference_models=["a"]),
    broken("there is none for the train dataset: set `reference_models`", "poft", "raw chat"),
    broken("Row 0 .*: `score_end_of_turn=False` needs messages", "poft", only(ref_logps=[[-1.0]] * 2),
           score_end_of_turn=False),
    broken("1 example of the train dataset has labels, but a pair takes two", "sftmix", {"input_ids": [IDS]}),
    broken("`confidence_split='confidence'` needs all examples before training", "sftmix", "stream"),
]  # fmt: skip


def no_rows():
    return iter(())


ARGUMENTS = [
    argument("`train_dataset` must be a `Dataset` or `IterableDataset`, got `list`", "sft_go", TypeError,
             train_dataset=[{"text": "a"}]),
    argument("must be a `Dataset` or `IterableDataset`, got `DatasetDict`", "sftkey", TypeError,
             train_dataset=DatasetDict({"train": Dataset.from_dict({"text": ["a"]})})),
    argument("`train_dataset` is empty", "poft", train_dataset=Dataset.from_dict({"text": []})),
    argument("`train_dataset` is empty", "base", train_dataset=IterableDataset.from_generator(no_rows)),
    argument("`eval_dataset` must be a `Dataset` or .* got `list`", "base", eval_dataset=[1]),
    argument("The a dataset has the column `labels`, but no `input_ids`", "sft_go",
             eval_dataset={"a": Dataset.from_dict({"text": ["a b"], "labels": [1]})}),
    argument("The train dataset has the column `labels`, but", "base", rows={"line": ["a b", "c"], "labels": [1, 0]},
             formatting_func=lambda row: row["line"]),
    argument(r"`eval_dataset\['a'\]` must be .* got `NoneType`", "sft_go", eval_dataset={"a": None}),
    argument("The eval dataset has the columns", "base", eval_dataset=Dataset.from_dict({"q": ["a"]})),
    argument("Row 0 of the a dataset: `text` is None", "sftmix",
             eval_dataset={"a": Dataset.from_dict({"text": [None]})}),
    argument("`args` must be an `SFTKeyConfig` or an `SFTConfig` .* got `DPOConfig`", "sftkey",
             args=DPOConfig("run", use_cpu=True, bf16=False)),
    argument("`compute_loss_func` is not supported", "base", compute_loss_func=print),
    argument("`peft_config` must be a `peft.PeftConfig` instance", "sft_go", TypeError, peft_config={"r": 4}),
    argument("must be either a `PreTrainedTokenizerBase`", "base", TypeError, processing_class="gpt2"),
    argument("`formatting_func` must return a text, got \\['a'\\]", "base", rows={"line": ["a"]},
             formatting_func=lambda row: [row["line"]]),
]  # fmt: skip

OWN_FIELDS = [
    (name, field.name)
    for name, method in METHODS.items()
    for field in fields(method.config_class)
    if field.name not in SFTConfig.__dataclass_fields__
]


CASES = [case for case in [*RANGES, *CHOICES, *CONFLICTS, *ROWS, *COLUMNS, *ARGUMENTS] if case[0] in METHODS]


@pytest.mark.cell(
    "Bad input", "invalid data, options, files and models: an error names the fix before training", refused=True
)
@pytest.mark.parametrize(
    ("method", "message", "options", "rows", "arguments", "error"),
    CASES,
    ids=[f"{method}-{message}" for method, message, *_ in CASES],
)
@pytest.mark.filterwarnings("ignore:.*keep_end:FutureWarning")
def test_refused(method, message, options, rows, arguments, error, start):
    with pytest.raises(error, match=message) as caught:
        start(method, options, rows, **arguments)
    assert type(caught.value) is error


@pytest.mark.cell("Bad input", "wrong type in each field of the config", refused=True)
@pytest.mark.parametrize("method, name", OWN_FIELDS)
def test_types(method, name, start):
    with pytest.raises(InputError, match=rf"`{name}` must be .*, got 3j\."):
        start(method, {name: 3j})
