"""Finds the scored tokens of an example, the assistant's words and the ends of its turns, in any model's rendering."""

from enum import IntEnum
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from ..text.assistant_turns import RenderedExample, render_example, require_same_tokens


class ScoredMask(IntEnum):
    """Values of the column `scored_mask`."""

    NOT_SCORED = 0
    SCORED = 1


def scored_mask(example: dict[str, Any], rendered: RenderedExample, eos_token: str, end_of_turn: bool) -> list[int]:
    """
    Mark the scored tokens with 1, all others with 0. Scored are the completion of a prompt, or all turns of the
    assistant that have words and, with `end_of_turn`, the ends of these turns. The row has `messages`, or `prompt` and
    `completion`; `rendered` is the row in a model's template and tokens; `eos_token` follows the words of a plain
    completion. Raises an `InputError` if the tokens differ from the assistant's words by more than white space around
    them.
    """
    words = _assistant_words(example, eos_token)
    turns = [turn for turn in rendered.turns if rendered.text[slice(*turn.content)].strip()]
    if len(turns) != len(words):
        raise InputError(f"the text shows {len(turns)} turns of the assistant, the row has {len(words)}")
    mask = [0] * len(rendered.token_ids)
    for turn, (content, has_calls) in zip(turns, words, strict=True):
        tokens = rendered.tokens_in(turn.content)
        if not tokens:
            raise InputError(f"there is no token for the assistant's words {content[:80]!r}")
        first, last = min(tokens), max(tokens)
        # Without a template the end of a prompt may share a token with the start of the completion
        start = turn.content[0] if isinstance(example.get("completion"), str) else rendered.offsets[first][0]
        text = rendered.text[start : rendered.offsets[last][1]]
        if text.strip() != content.strip():
            raise InputError(
                f"the scored tokens say {text[:80]!r}, but the assistant said {content[:80]!r}. Use a chat "
                "template that shows its words as they are"
            )
        for i in [*tokens, *range(last + 1, turn.end_token if end_of_turn and not has_calls else 0)]:
            mask[i] = 1
    return mask


def _assistant_words(example: dict[str, Any], eos_token: str) -> list[tuple[str, bool]]:
    """Words of the assistant's turns that have any, and whether tool calls, which are not scored, follow them."""
    spoken = example["completion"] if "prompt" in example else example["messages"]
    if isinstance(spoken, str):
        contents = [(spoken.removesuffix(eos_token), False)]
    else:
        contents = [(m.get("content"), bool(m.get("tool_calls"))) for m in spoken if m["role"] == "assistant"]
    return [(content, has_calls) for content, has_calls in contents if isinstance(content, str) and content.strip()]


def add_scored_mask(
    example: dict[str, Any],
    row: int,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    has_responses: bool,
    end_of_turn: bool,
    dataset_name: str,
) -> dict[str, Any]:
    """
    Add the columns `scored_mask` (unless it exists), `num_scored_tokens`, `example_row` (the row's number) and
    `has_responses`. For `Dataset.map`. Scored are the tokens of [`scored_mask`], or the supervised ones of rows that
    came as tokens or plain texts. Raises an `InputError` that names the row if the scored tokens can't be found or
    have no label.
    """
    example = {column: value for column, value in example.items() if value is not None}
    try:
        if "scored_mask" in example:
            mask = example["scored_mask"]
        elif has_responses:
            rendered = render_example(example, tokenizer, chat_template, text_field="")
            require_same_tokens(rendered, example["input_ids"])
            mask = scored_mask(example, rendered, tokenizer.eos_token or "", end_of_turn)
        else:
            mask = _supervised_mask(example["labels"], end_of_turn)
        _require_labels(mask, example)
    except InputError as problem:
        raise InputError(f"Row {row} of the {dataset_name} dataset: {problem}.") from problem
    return {
        "scored_mask": mask,
        "num_scored_tokens": sum(mask[1:]),
        "example_row": row,
        "has_responses": example.get("has_responses", has_responses),
    }


def _supervised_mask(labels: list[int], end_of_turn: bool) -> list[int]:
    if not end_of_turn:
        raise InputError(
            "`score_end_of_turn=False` needs messages, or prompts and completions; in other rows all labels are "
            "scored. Set the labels of the end-of-turn tokens to -100 instead"
        )
    return [int(label != -100) for label in labels]


def _require_labels(mask: list[int], example: dict[str, Any]) -> None:
    # A mask of another length is refused when it is truncated
    pairs = zip(mask, example["labels"], strict=False)
    unlabelled = sum(is_scored == 1 and label == -100 for is_scored, label in pairs)
    if not unlabelled:
        return
    if "prompt" in example:
        fix = (
            "`completion_only_loss` does this where the chat template's generation prompt ends with more than what "
            "precedes the same words in a whole conversation, such as `<think>`: set it to False, or give `messages` "
            "(PoFT trains only on the responses in any case)"
        )
    else:
        fix = (
            "`assistant_only_loss` does this where the chat template leaves the end of turn out of its generation "
            "marks: remove it (PoFT trains only on the assistant's turns in any case), or set "
            "`score_end_of_turn=False`"
        )
    raise InputError(
        f"{unlabelled} of the {sum(mask)} scored tokens have no label, so the trained model can't score them. {fix}"
    )
