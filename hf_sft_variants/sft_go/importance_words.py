"""Words of a text as LLMLingua-2 splits it, the windows it reads them in, and their scores as scores of characters."""

import string
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..text.token_offsets import Span


# SentencePiece's mark before a word; its offsets may be those of the word's first character
_WORD_MARK = "▁"


@dataclass
class SplitText:
    """
    Text as an importance model reads it: its sub-words, without special tokens; the number of the first sub-word of
    each word; and the characters of each word, possibly with white space at the ends.
    """

    text: str
    sub_word_ids: list[int]
    word_starts: list[int]
    word_spans: list[Span]


def split_into_words(text: str, tokenizer: PreTrainedTokenizerBase) -> SplitText:
    """
    Split a text into sub-words and join these to words as LLMLingua-2 does: there a word begins with a sub-word
    without `##` (BERT) or with a `▁` or an ASCII punctuation mark (XLM-RoBERTa). For any tokenizer: where its
    pre-tokenizer cuts, after white space, and at an ASCII punctuation mark.
    """
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens, words, offsets = encoding.tokens(), encoding.word_ids(), encoding["offset_mapping"]
    starts, spans = [], []
    last_word, last_end = None, 0
    for number, (token, word, (start, end)) in enumerate(zip(tokens, words, offsets, strict=True)):
        after_space = any(character.isspace() for character in text[last_end : start + 1])
        covered_end = start if token == _WORD_MARK else end
        if not spans or word != last_word or after_space or token in string.punctuation:
            starts.append(number)
            spans.append((start, covered_end))
        else:
            spans[-1] = (spans[-1][0], max(covered_end, spans[-1][1]))
        last_word, last_end = word, end
    return SplitText(text, encoding["input_ids"], starts, spans)


def cut_windows(word_starts: list[int], num_sub_words: int, window: int) -> list[Span]:
    """
    Cut a text into windows [start, end) of at most `window` sub-words, at the starts of words. A word that is longer
    than a window is cut inside.
    """
    windows, start = [], 0
    for word_start, word_end in pairwise([*word_starts, num_sub_words]):
        if word_end - start > window and word_start > start:
            windows.append((start, word_start))
            start = word_start
        while word_end - start > window:
            windows.append((start, start + window))
            start += window
    return [*windows, (start, num_sub_words)] if start < num_sub_words else windows


def score_characters(split: SplitText, sub_word_scores: np.ndarray) -> np.ndarray:
    """
    Give each character the score of its word, the mean over the word's sub-words; 0 for white space. A character of
    two words gets the higher score.
    """
    scores = np.zeros(len(split.text))
    if not split.word_starts:
        return scores
    is_space = np.array([character.isspace() for character in split.text])
    lengths = np.diff([*split.word_starts, len(sub_word_scores)])
    word_scores = np.add.reduceat(sub_word_scores, split.word_starts) / lengths
    next_starts = [start for start, _ in split.word_spans[1:]] + [len(split.text)]
    for score, (start, end), next_start in zip(word_scores, split.word_spans, next_starts, strict=True):
        # What normalization dropped, such as an accent, belongs to the word before it
        while end < next_start and not is_space[end]:
            end += 1
        scores[start:end] = np.maximum(scores[start:end], score)
    scores[is_space] = 0
    return scores
