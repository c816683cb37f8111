"""Keys of examples: of what a row says alone, wherever, in whatever table and for whatever tokenizer it is made."""

import copy
import json

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl import SFTConfig, SFTTrainer

from hf_sft_variants.base.example_keys import EXAMPLE_KEY, add_content_keys
from hf_sft_variants.errors import InputError


TEXTS = st.sampled_from(["", "a", "b c", "日本"])
CALLS = st.fixed_dictionaries(
    {"name": TEXTS}, optional={"arguments": st.fixed_dictionaries({}, optional={"x": TEXTS})}
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": TEXTS, "content": TEXTS}, optional={"name": TEXTS, "tool_calls": st.lists(CALLS, max_size=2)}
    ),
    min_size=1,
    max_size=3,
)
TOOLS = st.lists(st.fixed_dictionaries({"name": TEXTS}, optional={"default": st.integers(0, 2)}), max_size=2)
EXTRAS = {"tools": TOOLS, "chat_template_kwargs": st.fixed_dictionaries({"lang": TEXTS})}
ROWS = st.one_of(
    st.fixed_dictionaries({"messages": TURNS}, optional=EXTRAS),
    st.fixed_dictionaries({"prompt": TURNS, "completion": TURNS}, optional=EXTRAS),
    st.fixed_dictionaries({"text": TEXTS}),
)


def keys(rows, **options):
    names = {name: None for row in rows for name in row}
    rows = [{**names, **row} for row in rows]
    return add_content_keys(Dataset.from_list(rows), **options)[EXAMPLE_KEY][:]


def key(row, **options):
    return keys([row], **options)[0]


def with_nulls(value, names=("name", "x", "default", "never")):
    """A null in place of each of these fields that a mapping has not."""
    if isinstance(value, dict):
        return {**dict.fromkeys(names), **{name: with_nulls(item) for name, item in value.items()}}
    return [with_nulls(item) for item in value] if isinstance(value, list) else value


few = settings(
    max_examples=15, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@few
@given(st.lists(ROWS, min_size=1, max_size=4))
def test_other_rows_do_not_count(rows):
    """They bring columns and fields that are null in this one."""
    alone = [key(row) for row in rows]
    assert keys(rows) == alone
    # Equal content, equal keys; the strategies draw no two texts for the same content
    content = [json.dumps(row, sort_keys=True) for row in rows]
    assert len(set(alone)) == len(set(content))


@few
@given(ROWS)
def test_nulls_order_and_the_form_of_tools_do_not_count(row):
    same = [
        dict(reversed(row.items())),
        {**row, "other": "of the user's", "tools": row.get("tools"), "prompt": row.get("prompt")},
        {name: with_nulls(value) for name, value in row.items()},
    ]
    if "tools" in row:
        same += [{**row, "tools": json.dumps(tools)} for tools in (row["tools"], with_nulls(row["tools"]))]
    if "messages" in row:
        named = {"role": "from", "content": "value"}
        turns = [{named.get(name, name): value for name, value in turn.items()} for turn in row["messages"]]
        same.append({**row, "messages": None, "conversations": turns})
    assert [key(other) for other in same] == [key(row)] * len(same)


def test_what_counts():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"messages": turns},
        {"messages": turns, "tools": "[]"},
        {"messages": turns, "tools": '[{"name": "a"}]'},
        {"messages": turns, "chat_template_kwargs": {"a": True}},
        {"messages": turns[:1]},
        {"prompt": turns[:1], "completion": turns[1:]},
        {"prompt": "a", "completion": "b"},
        {"text": "ab"},
        {"input_ids": [1, 2], "labels": [1, 2]},
        {"input_ids": [1, 2], "labels": [-100, 2]},
    ]
    assert len({key(row) for row in rows}) == len(rows)
    assert key({"story": "ab"}, text_field="story") == key({"text": "ab"})
    tokens = {"input_ids": [1, 2], "labels": [1, 2]}
    assert key({**tokens, "prompt": "a"}, is_prepared=True) == key({**tokens, "text": "a"}) == key(tokens)
    for row in ({"input_ids": [1, 2]}, {"prompt": "a", "other": 1}):
        with pytest.raises(InputError, match=rf"has the columns .*{sorted(row)[0]}.*, by which examples can't be nam"):
            key(row)


def test_a_format_makes_no_difference(token_rows):
    rows = add_content_keys(token_rows.with_format("numpy"))
    assert rows.format["type"] == "numpy"
    assert rows.with_format(None)[EXAMPLE_KEY][:] == add_content_keys(token_rows)[EXAMPLE_KEY][:]


def test_a_second_start_finds_them_in_the_cache(token_rows, tmp_path):
    token_rows.save_to_disk(tmp_path)
    fingerprints = {add_content_keys(Dataset.load_from_disk(tmp_path))._fingerprint for _ in "ab"}
    assert len(fingerprints) == 1


FORMS = {
    "text": [{"text": "a"}, {"text": "b c"}],
    "completion": [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"}],
    "conversations": [{"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}],
    "chat": [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}],
    "tokens": [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [5, 6], "labels": [-100, 6]}],
}


@pytest.mark.parametrize("eos_token", ["<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("rows", FORMS.values(), ids=FORMS)
def test_of_prepared_rows(rows, eos_token, tiny_model, tokenizer, tmp_path):
    """Those of the raw rows, whatever tokenizer they are prepared with and whatever end of sequence it has."""
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, eos_token=eos_token, report_to="none")
    dataset = Dataset.from_list(rows)
    trainer = SFTTrainer(tiny_model, args, train_dataset=dataset, processing_class=copy.deepcopy(tokenizer))
    assert "input_ids" in trainer.train_dataset.column_names
    prepared = add_content_keys(trainer.train_dataset, eos_token=eos_token, is_prepared=True)
    assert prepared[EXAMPLE_KEY][:] == keys(rows)
