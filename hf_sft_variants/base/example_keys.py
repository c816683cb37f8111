"""Keys that name examples by their content, so that scores find them after filtering, shuffling or tokenizing."""

import hashlib
import json
from typing import Any

from datasets import Dataset

from ..errors import InputError


EXAMPLE_KEY = "example_key"

_TEXTS = ("messages", "conversations", "prompt", "completion", "tools", "chat_template_kwargs")
_TOKENS = ("input_ids", "labels")


def add_content_keys(
    dataset: Dataset,
    num_proc: int | None = None,
    text_field: str = "text",
    eos_token: str | None = None,
    is_prepared: bool = False,
) -> Dataset:
    """
    Add the column `example_key`, a hash of a row's content that does not depend on the model or the machine: rows with
    equal content have equal keys.

    The content is `messages` (or `conversations`), `prompt`, `completion`, `tools`, `chat_template_kwargs` and the
    plain text in `text_field`; for rows that came as tokens, `input_ids` and `labels`. Null fields do not count, nor
    does it matter whether `tools` is a list or its JSON text. `is_prepared` means that `SFTTrainer` has tokenized the
    rows: their messages or texts still count, if they have them. `eos_token` does not count at the end of plain texts
    and completions: for prepared rows it is the tokenizer's, which `SFTTrainer` has appended.
    """
    content = dataset.with_format(None).select_columns(_content_columns(dataset.column_names, text_field, is_prepared))
    keys = content.map(
        _add_key,
        fn_kwargs={"text_field": text_field, "eos_token": eos_token or ""},
        remove_columns=content.column_names,
        num_proc=num_proc,
        desc="Hashing examples",
    )
    if EXAMPLE_KEY in dataset.column_names:
        dataset = dataset.remove_columns(EXAMPLE_KEY)
    # Follows from the two fingerprints: a second start finds everything after this in the cache
    fingerprint = hashlib.sha256(f"{dataset._fingerprint} {keys._fingerprint}".encode()).hexdigest()[:16]
    return dataset.add_column(EXAMPLE_KEY, keys[EXAMPLE_KEY][:], new_fingerprint=fingerprint)


def keys_are_of(columns: list[str], text_field: str, is_prepared: bool) -> str:
    """Return what [`add_content_keys`] hashes in rows with these columns: `"text"` or `"tokens"`."""
    return "tokens" if _content_columns(columns, text_field, is_prepared) == list(_TOKENS) else "text"


def _content_columns(columns: list[str], text_field: str, is_prepared: bool) -> list[str]:
    texts = [name for name in dict.fromkeys((*_TEXTS, text_field)) if name in columns]
    # A prompt alone does not name an example
    has_texts = {"prompt", "completion"} <= set(texts) or {"messages", "conversations", text_field} & set(texts)
    if has_texts and (is_prepared or "input_ids" not in columns):
        return texts
    if not {*_TOKENS} <= set(columns):
        raise InputError(
            f"The data set has the columns {sorted(columns)}, by which examples can't be named: give `messages`, "
            f"`prompt` and `completion`, `{text_field}`, or `input_ids` and `labels`."
        )
    return list(_TOKENS)


def _add_key(example: dict[str, Any], text_field: str, eos_token: str) -> dict[str, str]:
    content = _without_nulls(dict(example))
    if text_field in content:
        content["text"] = content.pop(text_field)
    if "conversations" in content:
        content["messages"] = content.pop("conversations")
    if isinstance(content.get("messages"), list):
        content["messages"] = [_as_message(turn) for turn in content["messages"]]
    if isinstance(content.get("tools"), str):
        content["tools"] = _read_json(content["tools"])
    for name in ("completion", "text"):
        if isinstance(content.get(name), str):
            content[name] = content[name].removesuffix(eos_token)
    # A table may hold an empty mapping for a row that lacks the field
    content = {name: value for name, value in content.items() if value not in (None, {})}
    text = json.dumps(content, sort_keys=True, default=str)
    return {EXAMPLE_KEY: hashlib.sha256(text.encode()).hexdigest()[:32]}


def _without_nulls(value: Any) -> Any:
    """Drop null fields: in a table, a field that only other rows have is null."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _as_message(turn: Any) -> Any:
    if not isinstance(turn, dict):
        return turn
    return {{"from": "role", "value": "content"}.get(name, name): value for name, value in turn.items()}


def _read_json(text: str) -> Any:
    try:
        return _without_nulls(json.loads(text))
    except ValueError:  # refused where the rows are checked
        return text
