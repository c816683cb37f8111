"""An example in a reference model's own chat template and tokens."""

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
    For `Dataset.map`: the tokens of a reference model as `input_ids`, and `labels` on those that are scored.

    Args:
        example (`dict[str, Any]`):
            Prepared row with `messages`, or `prompt` and `completion`, and `example_row`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The reference model's tokenizer.
        target_eos (`str`):
            End of sequence that `SFTTrainer` has put behind a plain completion; replaced by the reference model's.
        end_of_turn (`bool`):
            Whether the end-of-turn token is scored.
        model (`str`):
            The reference model's name, for the error.
        dataset_name (`str`):
            Name of the data set, for the error.

    Raises:
        `InputError`: If the chat template can't render the messages or changes the assistant's words, naming the row
            and the model.
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
    labels = [token_id if is_scored else -100 for token_id, is_scored in zip(rendered.token_ids, mask, strict=True)]
    return {"input_ids": rendered.token_ids, "labels": labels}


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
    For templates that refuse a system turn: put its text in front of the first user's, with an empty line between.
    `None` if the conversation doesn't begin with the two.
    """
    column = "prompt" if "prompt" in example else "messages"
    messages = example[column]
    if [message["role"] for message in messages[:2]] != ["system", "user"]:
        return None
    system, user = messages[:2]
    merged = {**user, "content": f"{system['content']}\n\n{user['content']}"}
    return {**example, column: [merged, *messages[2:]]}


def label_scored_tokens(example: dict[str, Any]) -> dict[str, list[int]]:
    """For `Dataset.map`, of rows that came as tokens: `labels` on those that are scored."""
    pairs = zip(example["input_ids"], example["scored_mask"], strict=True)
    return {"labels": [token_id if is_scored else -100 for token_id, is_scored in pairs]}
