"""
Selects the positions to mix in a micro-batch and draws λ. Both are functions of the seed, the step and the examples'
numbers, so a resumed run, another number of processes or another accumulation draws the same.
"""

import zlib
from typing import Any, NamedTuple

import numpy as np
import torch

from ..base.batch import sample_ids_of
from .pairing import CONFIDENT, UNCONFIDENT


# No example has this number, so the order of the examples is independent of each λ
_ORDER = 2**63


class Document(NamedTuple):
    """
    A document of a micro-batch that has labels: a row, or a part of a packed or padding-free row.

    Attributes:
        number (`int`):
            Number of the example, from 0.
        half (`int`):
            `CONFIDENT`, `UNCONFIDENT` or `NEITHER`.
        positions (`torch.Tensor` of shape `(n, 2)`):
            Positions of its labels in order, as in `add_lm_head`: the row, and the column counted from the end.
    """

    number: int
    half: int
    positions: torch.Tensor


def documents_of(inputs: dict[str, Any], halves: torch.Tensor | None) -> list[Document]:
    """
    Documents of a collated batch that have labels. Without `halves` their numbers are hashes of their tokens, and they
    belong to the two halves in turn.
    """
    labels = inputs["labels"][:, 1:].cpu()
    sample_ids, num_samples = sample_ids_of(inputs)
    is_label = labels != -100
    sizes = torch.bincount(sample_ids[:, 1:].cpu()[is_label], minlength=num_samples).tolist()
    positions = is_label.nonzero()  # row by row, and so document by document
    positions[:, 1] -= labels.size(1)
    tokens = inputs["input_ids"].cpu()
    documents = []
    for sample, of_document in enumerate(positions.split(sizes)):
        if len(of_document) == 0:
            continue
        if halves is None:
            # Up to the last label: padding-free rows may end in padding
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
    Pair each confident document of a micro-batch with an unconfident one, as far as there are any: at random if
    `shuffle`, otherwise in the order of the batch.
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
    Inputs of `add_lm_head`: the n-th label of a document is mixed with the n-th label of its partner, up to the
    end of the shorter one, with λ ~ Beta(alpha, alpha) for each pair.

    Returns:
        `dict[str, Any]`: `mixup_first` and `mixup_second`, int64 tensors of shape `(P, 2)`, and `mixup_weights`, a
        list of `P` numbers in float32: DeepSpeed and FSDP would cast a tensor to the model's dtype.
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
    # The generator counts up from the low words; with the numbers in the high words no two streams overlap
    key, counter = [seed % 2**64, step], [0, 0, first, second]
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64)))
