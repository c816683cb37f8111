"""What proves a cell: a step of a method as it is used equals the slow loss; a step of its control is SFTTrainer's."""

import pytest
from helpers import GradientRecorder, assert_same_gradients, make_trainer, one_step_log
from methods import METHODS, SFT
from slow_losses import (
    LOSSES,
    Step,
    cross_entropy,
    cut_into_documents,
    load_balancing_loss,
    model_without_fused_head,
    read,
)


class RecordedInputs(list):
    """The micro-batches that a trainer trains on."""

    def __init__(self, trainer):
        super().__init__()
        self.training_step = trainer.training_step
        trainer.training_step = self.record_and_step

    def record_and_step(self, model, inputs, *args):
        self.append(inputs)
        return self.training_step(model, inputs, *args)


def prepared_rows(dataset):
    """What SFTTrainer makes of a data set: tokens, labels, and the lengths of the documents of packed rows."""
    names = ("input_ids", "labels", "seq_lengths")
    return [{name: row[name] for name in names if name in row} for row in dataset]


def step_as_used(method, model, tokenizer, rows, output_dir, **options):
    """Trainer, log and gradients of a step of a method as it is used, and the [`Step`] for the slow losses."""
    recorder = GradientRecorder()
    options = {"max_steps": 1, "save_strategy": "no", **METHODS[method].options, **options}
    trainer = make_trainer(
        *METHODS[method].classes, model, tokenizer, rows, output_dir, callbacks=[recorder], **options
    )
    reference = model_without_fused_head(trainer.model)
    inputs = RecordedInputs(trainer)
    trainer.train()
    documents = [read(reference, row) for row in cut_into_documents(trainer.train_dataset)]
    step = Step(documents, reference, trainer.args, inputs)
    return trainer, trainer.state.log_history[0], recorder.gradients, step


def assert_as_used_is_the_slow_loss(method, *arguments, tolerance=1e-5, gradient_tolerance=1e-5, **options):
    """Loss and gradients, up to relative tolerances; arguments as of [`step_as_used`]. Returns the trainer."""
    trainer, log, gradients, step = step_as_used(method, *arguments, **options)
    expected, plain = LOSSES[method](step), cross_entropy(step)
    assert method == "base" or abs(expected / plain - 1) > 3 * tolerance  # else the method would not be in use
    if trainer.aux_loss_enabled:
        config = trainer.model.config
        balance = load_balancing_loss(step.documents, config.num_experts, config.num_experts_per_tok)
        expected = expected + trainer.router_aux_loss_coef * balance
    expected.backward()
    assert log["loss"] == pytest.approx(expected.item(), rel=tolerance)
    expected_gradients = {
        name: parameter.grad for name, parameter in step.model.named_parameters() if parameter.grad is not None
    }
    assert_same_gradients(expected_gradients, gradients, tolerance=gradient_tolerance)
    return trainer


def assert_control_is_sft_trainer(method, *arguments, **options):
    """
    Loss, gradients and metrics of a step; arguments as of [`step_as_used`]. To the last bit, except for PoFT, which
    takes the mean in two steps.
    """
    log, gradients = one_step_log(*SFT, *arguments, **options)
    options = {**options, **METHODS[method].control}
    our_log, our_gradients = one_step_log(*METHODS[method].classes, *arguments, **options)
    tolerance = 1e-6 if method == "poft" else 0.0
    assert {name: our_log[name] for name in log} == pytest.approx(log, rel=tolerance, abs=0.0)
    assert_same_gradients(gradients, our_gradients, tolerance=tolerance)
