"""
What is mixed in a micro-batch, and how much: a function of the seed, the step and the examples' numbers, so that a
resumed run, another number of processes or another accumulation draws the same.
"""

import zlib
from typing import Any, NamedTuple

import numpy as np
import torch

from ..base.batch import sample_ids_of
from .pairing import CONFIDENT, UNCONFIDENT


# No example has this number, so an example's place in the order is independent of each λ
_ORDER = 2**63


class Document(NamedTuple):
    """
    A document of a micro-batch that has labels: a row, or a part of a packed or padding-free row.

    Attributes:
        number (`int`):
            What it is known by, from 0.
        half (`int`):
            `CONFIDENT`, `UNCONFIDENT` or `NEITHER`.
        positions (`torch.Tensor` of shape `(n, 2)`):
            Its labels in order, as `add_paired_lm_head` names positions: row and, from the end of the row, column.
    """

    number: int
    half: int
    positions: torch.Tensor


def draw_mixup(
    inputs: dict[str, Any], halves: torch.Tensor | None, is_packed: bool, alpha: float, seed: int, step: int
) -> dict[str, Any]:
    """
    Draw pairs among the documents of a micro-batch and a λ for each.

    Args:
        inputs (`dict[str, Any]`):
            Collated batch, with the column `example_number` if there are halves.
        halves (`torch.Tensor` of shape `(num_examples,)`, *optional*):
            Half of each example, by its number. Without them each two documents that follow each other are a pair.
        is_packed (`bool`):
            Whether rows are packed: their documents, which always stand in the same place, find partners at random.
        alpha (`float`):
            λ ~ Beta(alpha, alpha).
        seed (`int`):
            Seed of the draw.
        step (`int`):
            Number of the optimizer step.

    Returns:
        `dict[str, Any]`: What [`mixup_inputs`] returns.
    """
    pairs = draw_pairs(documents_of(inputs, halves), seed, step, shuffle=is_packed and halves is not None)
    return mixup_inputs(pairs, alpha, seed, step, inputs["labels"].device)


def documents_of(inputs: dict[str, Any], halves: torch.Tensor | None) -> list[Document]:
    """
    The documents of a micro-batch that have labels.

    Args:
        inputs (`dict[str, Any]`):
            Collated batch, with the column `example_number` if there are halves.
        halves (`torch.Tensor` of shape `(num_examples,)`, *optional*):
            Half of each example, by its number. Without them documents are known by their content, and each two that
            follow each other are of different halves.
    """
    labels = inputs["labels"][:, 1:].cpu()
    sample_ids, num_samples = sample_ids_of(inputs)
    is_label = labels != -100
    sizes = torch.bincount(sample_ids[:, 1:].cpu()[is_label], minlength=num_samples).tolist()
    positions = is_label.nonzero()  # row by row, so document by document
    positions[:, 1] -= labels.size(1)
    # What a document is known by stands on each of its labels, or is made of its tokens up to the last label
    tokens = inputs["input_ids"].cpu()
    documents = []
    for sample, of_document in enumerate(positions.split(sizes)):
        if len(of_document) == 0:
            continue
        if halves is None:
            row, column = of_document[-1].tolist()
            in_document = sample_ids[row].cpu() == sample
            in_document[labels.size(1) + column + 2 :] = False
            number = zlib.crc32(tokens[row, in_document].numpy().tobytes())
            half = (CONFIDENT, UNCONFIDENT)[len(documents) % 2]
        else:
            number = inputs["example_number"][of_document[0, 0], of_document[0, 1]].item()
            half = halves[number].item()
        documents.append(Document(number, half, of_document))
    return documents


def draw_pairs(documents: list[Document], seed: int, step: int, shuffle: bool) -> list[tuple[Document, Document]]:
    """
    Give each confident document of a micro-batch an unconfident one, as far as there are any.

    Args:
        documents (`list[Document]`):
            What [`documents_of`] returns.
        seed (`int`):
            Seed of the draw.
        step (`int`):
            Number of the optimizer step.
        shuffle (`bool`):
            Whether to draw partners. Otherwise the first confident document is the first unconfident one's partner,
            and so on.
    """
    if shuffle:
        documents = sorted(documents, key=lambda document: _generator(seed, step, document.number, _ORDER).random())
    confident, unconfident = (
        [document for document in documents if document.half == half] for half in (CONFIDENT, UNCONFIDENT)
    )
    return list(zip(confident, unconfident, strict=False))


def mixup_inputs(
    pairs: list[tuple[Document, Document]], alpha: float, seed: int, step: int, device: torch.device
) -> dict[str, Any]:
    """
    What `add_paired_lm_head` asks for: the n-th label of a document is mixed with the n-th one of its partner, up to
    the shorter one's end; λ ~ Beta(alpha, alpha) for each pair.

    Args:
        pairs (`list[tuple[Document, Document]]`):
            What [`draw_pairs`] returns.
        alpha (`float`):
            Parameter of the distribution.
        seed (`int`):
            Seed of the draw.
        step (`int`):
            Number of the optimizer step.
        device (`torch.device`):
            Where the positions go.

    Returns:
        `dict[str, Any]`: `mixup_first` and `mixup_second`, int64 tensors of shape `(P, 2)`, and `mixup_weights`, a
        list of `P` numbers in float32: a tensor would be cast to the model's dtype by DeepSpeed and FSDP.
    """
    first, second, weights = [torch.empty(0, 2, dtype=torch.long)], [torch.empty(0, 2, dtype=torch.long)], []
    for confident, unconfident in pairs:
        length = min(len(confident.positions), len(unconfident.positions))
        weight = _generator(seed, step, confident.number, unconfident.number).beta(alpha, alpha)
        first.append(confident.positions[:length])
        second.append(unconfident.positions[:length])
        weights += [float(np.float32(weight))] * length
    return {
        "mixup_first": torch.cat(first).to(device),
        "mixup_second": torch.cat(second).to(device),
        "mixup_weights": weights,
    }


def _generator(seed: int, step: int, first: int, second: int) -> np.random.Generator:
    # The generator counts up from the low words, so the numbers stand in the high ones: no two streams overlap
    key, counter = [seed % 2**64, step], [0, 0, first, second]
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64)))
