"""Finds the tokens of each message of a conversation, with everything that the chat template writes for it."""

from itertools import groupby
from operator import itemgetter
from typing import Any

from transformers import PreTrainedTokenizerBase

from .assistant_turns import RenderedExample, content_finder, has_words, messages_of, template_options


def find_message_tokens(
    example: dict[str, Any], rendered: RenderedExample, tokenizer: PreTrainedTokenizerBase, chat_template: str | None
) -> list[list[int] | None]:
    """
    Find the tokens of each message of a labelled conversation: header, reasoning, content, tool calls and the end of
    its turn. `None` for a message whose bounds are not certain.

    Where only the assistant's messages have labels, as with `assistant_only_loss` or with a single message as the
    completion, an assistant message's tokens are the labelled ones.
    """
    messages = messages_of(example)
    finder = content_finder(tokenizer, **template_options(example, chat_template))
    contents = {
        i: finder.find_contents(messages, [i], rendered.text)[0]
        for i, message in enumerate(messages)
        if has_words(message)
    }
    spans = finder.find_messages(messages, contents, rendered.text)
    starts = [start for start, _ in rendered.offsets]
    tokens = [span and [i for i, start in enumerate(starts) if span[0] <= start < span[1]] for span in spans]
    in_content = {i: content and rendered.tokens_in(content) for i, content in contents.items()}
    # With labels on a completion alone, earlier assistant messages have none; with `assistant_only_loss`, all may
    for first in dict.fromkeys((len(example.get("prompt", [])), 0)):
        of_assistant = _labelled_messages(messages, first, in_content, example["labels"])
        if of_assistant is not None:
            labelled = {token for run in of_assistant.values() for token in run}
            others = [found and [token for token in found if token not in labelled] for found in tokens]
            return [of_assistant.get(i, others[i]) for i in range(len(messages))]
    return tokens


def _labelled_messages(
    messages: list[dict[str, Any]], first: int, in_content: dict[int, list[int] | None], labels: list[int]
) -> dict[int, list[int]] | None:
    """
    The runs of tokens with labels, by message, if there is one for each of the assistant's messages from number
    `first` on, with its words and no others. `in_content` has the tokens of the words of each message that has any.
    """
    is_labelled = [label != -100 for label in labels]
    runs = [[i for i, _ in run] for key, run in groupby(enumerate(is_labelled), itemgetter(1)) if key]
    numbers = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
    if len(runs) != len(numbers):
        return None
    found = dict(zip(numbers, runs, strict=True))
    owners = {token: i for i, run in found.items() for token in run}
    for i, message in enumerate(messages):
        words = in_content.get(i)
        if words is None and message.get("content") and i not in found:
            return None  # its words could be in any run
        # Its words are in its own run, if it has one, and in no other's
        if words is not None and {owners[token] for token in words if token in owners} != {i} & found.keys():
            return None
    return found
