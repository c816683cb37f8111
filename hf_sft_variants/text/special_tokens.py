"""Ids of a tokenizer's special tokens."""

from transformers import PreTrainedTokenizerBase


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of all special tokens: end of sequence, end of turn, role markers, and those added later."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (added | set(tokenizer.all_special_ids)) - {None}
