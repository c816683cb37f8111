"""
The loss of an optimizer step, slowly: from the methods' formulas, the prepared rows and the model's own logits.

Each document goes through the model alone, and nothing of the package's losses, of its LM head or of TRL's is used.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model
from helpers import GradientRecorder, assert_same_gradients, make_trainer, one_step_log
from methods import METHODS, SFT, TOLERANCE
from trl import SFTConfig


@dataclass
class Document:
    """A document as the model reads it alone. Of `logits` and `hidden`, the n-th is about token n + 1."""

    row: dict[str, Any]
    logits: torch.Tensor
    hidden: torch.Tensor
    router_logits: tuple[torch.Tensor, ...]

    @property
    def labels(self) -> torch.Tensor:
        return torch.tensor(self.row["labels"][1:], dtype=torch.long)

    @property
    def is_label(self) -> torch.Tensor:
        return self.labels != -100

    @property
    def nll(self) -> torch.Tensor:
        """Negative log-likelihood of each token but the first; meaningless for tokens without a label."""
        return F.cross_entropy(self.logits, self.labels.clamp(min=0), reduction="none")

    def annotation(self, column: str) -> torch.Tensor:
        """A column's values on the tokens that are predicted."""
        return torch.tensor(self.row[column][1:])


@dataclass
class Step:
    """A step: its documents, the model before it, the trainer's options and the micro-batches that were trained on."""

    documents: list[Document]
    model: torch.nn.Module
    args: SFTConfig
    inputs: list[dict[str, Any]]


def make_step(model, rows: Iterable[dict[str, Any]], args: SFTConfig, inputs: list[dict[str, Any]]) -> Step:
    return Step([read(model, row) for row in cut_into_documents(rows)], model, args, inputs)


def model_without_fused_head(model):
    """A copy of a trainer's model, in float32, with its class's forward in place of the fused LM head's."""
    model = copy.deepcopy(model).train()
    del base_of(model).__dict__["forward"]
    return model.float() if model.dtype == torch.bfloat16 else model


def base_of(model):
    """The causal language model, out of PEFT's wrapper."""
    return model.get_base_model() if is_peft_model(model) else model


def cut_into_documents(rows: Iterable[dict[str, Any]]) -> list[dict[str, list]]:
    """The documents of prepared rows: a row is one, unless it says where its documents end."""
    documents = []
    for row in rows:
        start = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            per_token = {name: values for name, values in row.items() if isinstance(values, list | np.ndarray)}
            documents.append({name: values[start : start + length] for name, values in per_token.items()})
            start += length
    return documents


def read(model, row: dict[str, list]) -> Document:
    """The model's outputs for a document, without those of virtual tokens before it."""
    hidden = []
    head = base_of(model).get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
    outputs = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
    hook.remove()
    about_labels = slice(-len(row["input_ids"]), -1)
    return Document(
        row,
        outputs.logits[0, about_labels].double(),
        hidden[0][0, about_labels],
        getattr(outputs, "router_logits", None) or (),
    )


def cross_entropy(step: Step) -> torch.Tensor:
    """The mean over all tokens that have a label."""
    return torch.cat([document.nll[document.is_label] for document in step.documents]).mean()


def sft_go_loss(step: Step) -> torch.Tensor:
    """(1 - λ) mean + λ max over the groups, of each document, weighted by its number of labels."""
    total, num_tokens, weight = 0.0, 0, step.args.worst_group_weight
    for document in step.documents:
        nll, groups = document.nll[document.is_label], document.annotation("group_ids")[document.is_label]
        if len(nll) > 0:
            means = [nll[groups == group].mean() for group in groups.unique() if group >= 0]
            mean = nll.mean()
            total = total + len(nll) * ((1 - weight) * mean + weight * max(means, default=mean))
            num_tokens += len(nll)
    return total / num_tokens


def sftkey_loss(step: Step) -> torch.Tensor:
    """The mean over the tokens of the key."""
    assert step.args.stages == ["key"]
    return torch.cat(
        [document.nll[document.is_label & (document.annotation("key_mask") == 1)] for document in step.documents]
    ).mean()


def poft_loss(step: Step) -> torch.Tensor:
    """The mean over documents of -log σ(β (r_θ - mean of r_j) + γ)."""
    losses = []
    for document in step.documents:
        target = -document.nll[document.annotation("scored_mask") == 1].mean()
        references = [values[0] for name, values in document.row.items() if name.startswith("reference_log_prob_")]
        margin = target - sum(references) / len(references)
        losses.append(F.softplus(-(step.args.beta * margin + step.args.gamma)))
    return torch.stack(losses).mean()


def sftmix_loss(step: Step) -> torch.Tensor:
    """Cross-entropy plus μ times that of mixed hidden states against mixed labels; pairs and λ are the step's own."""
    by_tokens = {tuple(document.row["input_ids"]): document for document in step.documents}
    mixup, num_mixed = 0.0, 0
    for *pair, share in [pair for inputs in step.inputs for pair in pairs_of(inputs)]:
        documents = [by_tokens[tokens] for tokens in pair]
        size = min(int(document.is_label.sum()) for document in documents)
        hidden, labels = (
            [values[document.is_label][:size] for document, values in zip(documents, of_both, strict=True)]
            for of_both in ([d.hidden for d in documents], [d.labels for d in documents])
        )
        logits = logits_of_hidden(step.model, share * hidden[0] + (1 - share) * hidden[1])
        one_hot = [F.one_hot(ids, logits.size(-1)) for ids in labels]
        soft_labels = share * one_hot[0] + (1 - share) * one_hot[1]
        mixup = mixup - (soft_labels * logits.log_softmax(-1)).sum()
        num_mixed += size
    return cross_entropy(step) + step.args.mixup_weight * mixup / num_mixed


def pairs_of(inputs: dict[str, Any]) -> list[tuple[tuple[int, ...], tuple[int, ...], float]]:
    """Tokens of both documents of each pair, and the share λ of the first, read from the model's inputs."""
    pairs = {}
    num_columns = inputs["input_ids"].size(1)
    positions = (inputs[name].tolist() for name in ("mixup_first", "mixup_second"))
    for (*places,), share in zip(zip(*positions, strict=True), inputs["mixup_weights"], strict=True):
        documents = tuple(document_at(inputs, row, num_columns + column) for row, column in places)
        assert pairs.setdefault(documents, share) == share
    return [(*documents, share) for documents, share in pairs.items()]


def document_at(inputs: dict[str, Any], row: int, column: int) -> tuple[int, ...]:
    """Tokens of the document at a place of a collated batch."""
    if "position_ids" in inputs:
        documents = (inputs["position_ids"][0] == 0).cumsum(0)
        is_its = documents == documents[column]
    else:
        is_its = inputs["attention_mask"][row].bool()
    return tuple(inputs["input_ids"][row][is_its].tolist())


def logits_of_hidden(model, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (n, vocabulary) by the model's own forward from last hidden states, with scale, soft-cap and bias."""
    base = base_of(model)
    hook = base.base_model.register_forward_hook(partial(put_hidden_states, hidden))
    logits = base(input_ids=torch.zeros(1, len(hidden), dtype=torch.long)).logits[0]
    hook.remove()
    return logits.double()


def put_hidden_states(hidden: torch.Tensor, module, args, output):
    output.last_hidden_state = hidden[None]
    return output


def load_balancing_loss(documents: list[Document], num_experts: int, num_chosen: int) -> torch.Tensor:
    """Experts times the sum over experts of the share of choices and the mean probability, over tokens and layers."""
    router_logits = torch.cat([layer.double() for document in documents for layer in document.router_logits])
    probabilities = router_logits.softmax(-1)
    chosen = F.one_hot(probabilities.topk(num_chosen).indices, num_experts).sum(1).double()
    return num_experts * (chosen.mean(0) * probabilities.mean(0)).sum()


def weighted_loss(step: Step) -> torch.Tensor:
    """The mean over the tokens that have a label by their weights."""
    nll = torch.cat([document.nll[document.is_label] for document in step.documents])
    weights = torch.cat([document.annotation("token_weights")[document.is_label] for document in step.documents])
    return (weights * nll).sum() / weights.sum()


LOSSES: dict[str, Callable[[Step], torch.Tensor]] = {
    "base": cross_entropy,
    "sft_go": sft_go_loss,
    "sftkey": sftkey_loss,
    "poft": poft_loss,
    "sftmix": sftmix_loss,
    "weighted": weighted_loss,
}
# Evaluation does not mix, and does not follow SFTKey's stages
EVALUATION_LOSSES = {**LOSSES, "sftkey": cross_entropy, "sftmix": cross_entropy}


class RecordedInputs(list):
    """The micro-batches that a trainer trains on."""

    def __init__(self, trainer):
        super().__init__()
        self.training_step = trainer.training_step
        trainer.training_step = self.record_and_step

    def record_and_step(self, model, inputs, *args):
        self.append(inputs)
        return self.training_step(model, inputs, *args)


def assert_prepared_as_by_sft_trainer(trainer, *arguments, **options):
    """Tokens, labels and documents of packed rows; arguments as of `make_trainer` after the classes."""
    plain = make_trainer(*SFT, *arguments, **options)
    assert prepared_rows(trainer.train_dataset) == prepared_rows(plain.train_dataset)


def prepared_rows(dataset):
    names = ("input_ids", "labels", "seq_lengths")
    return [{name: row[name] for name in names if name in row} for row in dataset]


def assert_as_used_is_the_slow_loss(method, *arguments, tolerance=1e-5, gradient_tolerance=1e-5, **options):
    """
    Loss and gradients of a step of the method as it is used, up to relative tolerances. Returns the trainer.

    Arguments as of `make_trainer` after the classes.
    """
    recorder = GradientRecorder()
    options = {"max_steps": 1, "save_strategy": "no", **METHODS[method].options, **options}
    trainer = make_trainer(*METHODS[method].classes, *arguments, callbacks=[recorder], **options)
    reference = model_without_fused_head(trainer.model)
    inputs = RecordedInputs(trainer)
    trainer.train()
    step = make_step(reference, trainer.train_dataset, trainer.args, inputs)
    expected, plain = LOSSES[method](step), cross_entropy(step)
    assert method == "base" or abs(expected / plain - 1) > 3 * tolerance  # else the method would not be in use
    if trainer.aux_loss_enabled:
        config = trainer.model.config
        balance = load_balancing_loss(step.documents, config.num_experts, config.num_experts_per_tok)
        expected = expected + trainer.router_aux_loss_coef * balance
    expected.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=tolerance)
    expected_gradients = {
        name: parameter.grad for name, parameter in reference.named_parameters() if parameter.grad is not None
    }
    assert_same_gradients(expected_gradients, recorder.gradients, tolerance=gradient_tolerance)
    return trainer


def assert_control_is_sft_trainer(method, *arguments, gradient_tolerance=TOLERANCE, **options):
    """Loss, gradients and metrics of a step of the control; arguments as of `make_trainer` after the classes."""
    log, gradients = one_step_log(*SFT, *arguments, **options)
    options = {**options, **METHODS[method].control}
    our_log, our_gradients = one_step_log(*METHODS[method].classes, *arguments, **options)
    assert {name: our_log[name] for name in log} == pytest.approx(log, rel=TOLERANCE, abs=0.0)
    assert_same_gradients(gradients, our_gradients, tolerance=gradient_tolerance)
