"""Likelihood of a part of held-out completions, such as their answers."""

import re

from transformers import PreTrainedTokenizerBase

from ..text.assistant_turns import render_conversation, require_same_tokens
from .held_out import ScoredRow


def nll_of_part(rows: list[ScoredRow], tokenizer: PreTrainedTokenizerBase, pattern: str) -> list[tuple[float, int]]:
    """
    Sum up the negative log-likelihood, in nats, of the tokens of each completion that `pattern` matches, and count
    them. A token counts if any of its characters is in a match, or in its first group if the pattern has groups.
    """
    regex = re.compile(pattern)
    return [_nll_of_matches(row, tokenizer, regex) for row in rows]


def _nll_of_matches(row: ScoredRow, tokenizer: PreTrainedTokenizerBase, regex: re.Pattern) -> tuple[float, int]:
    rendered = render_conversation(tokenizer, row.prompt + row.completion, first=len(row.prompt))
    require_same_tokens(rendered, row.input_ids)
    tokens = set()
    for turn in rendered.turns:
        start, end = turn.content
        for match in regex.finditer(rendered.text[start:end]):
            first, last = match.span(min(regex.groups, 1))
            tokens |= {*rendered.tokens_in((start + first, start + last))}
    return -sum(float(row.log_probs[i]) for i in tokens), len(tokens)
