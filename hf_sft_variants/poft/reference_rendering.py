"""Renders an example in a reference model's own chat template and tokens."""

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from ..errors import InputError
from ..text.assistant_turns import RenderedExample, render_example
from .scored_tokens import scored_mask


def render_for_reference(
    example: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    target_eos: str,
    end_of_turn: bool,
    model: str,
    dataset_name: str,
) -> dict[str, list[int]]:
    """
    Render an example for a reference model: its tokens as `input_ids`, `labels` on the scored ones. For `Dataset.map`.
    The example has `messages`, or `prompt` and `completion`, and `example_row`. The EOS token that `SFTTrainer` has
    appended to a plain completion (`target_eos`) is replaced by the reference model's. Raises an `InputError` that
    names the row and the model if the chat template can't render the messages or changes the assistant's words.
    """
    content = {column: value for column, value in example.items() if value is not None}
    eos_token = tokenizer.eos_token or ""
    if isinstance(content.get("completion"), str):
        content["completion"] = content["completion"].removesuffix(target_eos) + eos_token
    try:
        rendered = _render(content, tokenizer)
        mask = scored_mask(content, rendered, eos_token, end_of_turn)
    except (TemplateError, InputError) as problem:
        raise InputError(
            f"Row {example['example_row']} of the {dataset_name} dataset can't be scored by the reference model "
            f"{model!r}: {str(problem).rstrip('.')}. Change the row, or choose a model whose chat template shows it."
        ) from problem
    return label_scored_tokens({"input_ids": rendered.token_ids, "scored_mask": mask})


def label_scored_tokens(example: dict[str, Any]) -> dict[str, list[int]]:
    """Keep the tokens, with `labels` on the scored ones. For `Dataset.map`."""
    pairs = zip(example["input_ids"], example["scored_mask"], strict=True)
    labels = [token_id if is_scored else -100 for token_id, is_scored in pairs]
    return {"input_ids": example["input_ids"], "labels": labels}


def _render(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> RenderedExample:
    if tokenizer.chat_template is None and is_conversational(example):
        raise InputError("its tokenizer has no chat template")
    try:
        return render_example(example, tokenizer, None, text_field="")
    except TemplateError:
        merged = merge_system_turn(example)
        if merged is None:
            raise
        return render_example(merged, tokenizer, None, text_field="")


def merge_system_turn(example: dict[str, Any]) -> dict[str, Any] | None:
    """
    Prepend a system turn's text and an empty line to the first user turn, for templates that refuse system turns.
    `None` if the conversation doesn't begin with these two turns.
    """
    column = "prompt" if "prompt" in example else "messages"
    messages = example[column]
    if [message["role"] for message in messages[:2]] != ["system", "user"]:
        return None
    system, user = messages[:2]
    merged = {**user, "content": f"{system['content']}\n\n{user['content']}"}
    return {**example, column: [merged, *messages[2:]]}
