"""Each trainer meets the expectations of TRL's own tests: both run with the same arguments."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import SMALL, GradientRecorder, assert_same_gradients, make_trainer
from methods import METHODS, SFT, TOLERANCE, Method, every_method
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_sft_variants.base.checkpoints import RUN_FILE


PLAIN = Method(*SFT)


@pytest.fixture(scope="module")
def rows(scored_chat_rows):
    return scored_chat_rows


def make(method, model, tokenizer, rows, folder, **options):
    """The method as it is used."""
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, **method.options, **options}
    return make_trainer(*method.classes, model, tokenizer, rows, folder, **options)


class EventRecorder(TrainerCallback):
    """Notes the events of a run and what is logged."""

    def __init__(self):
        self.events, self.logs = [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append("train_begin")

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append("step_end")

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.events.append("evaluate")

    def on_save(self, args, state, control, **kwargs):
        self.events.append("save")

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append("train_end")


def finished_run(method, tiny_model_factory, tokenizer, rows, folder, **options):
    recorder, start = EventRecorder(), tiny_model_factory()
    trainer = make(
        method, start, tokenizer, rows, folder, eval_dataset=rows.select(range(4)), eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=2, callbacks=[recorder], **options,
    )  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    result = trainer.train()
    trainer.save_model(str(folder / "saved"))
    return SimpleNamespace(trainer=trainer, before=before, result=result, folder=folder, recorder=recorder)


@pytest.fixture(scope="module")
def runs(tiny_model_factory, tokenizer, rows, tmp_path_factory):
    """A run of each method and of `SFTTrainer`: two steps, each evaluated, saved at the end."""
    return runs_of_all(tiny_model_factory, tokenizer, rows, tmp_path_factory)


@pytest.fixture(scope="module")
def lora_runs(tiny_model_factory, tokenizer, rows, tmp_path_factory):
    """The same with LoRA."""
    adapter = LoraConfig(r=4, target_modules="all-linear")
    return runs_of_all(tiny_model_factory, tokenizer, rows, tmp_path_factory, peft_config=adapter)


def runs_of_all(tiny_model_factory, tokenizer, rows, tmp_path_factory, **options):
    return {
        name: finished_run(method, tiny_model_factory, tokenizer, rows, tmp_path_factory.mktemp(name), **options)
        for name, method in {**METHODS, "plain": PLAIN}.items()
    }


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@every_method
class TestRun:
    @pytest.mark.cell("TRL's expectations", "every parameter is trained; with LoRA, only the adapter")
    def test_parameters(self, method, runs, lora_runs):
        for run, moving in ((runs[method], None), (lora_runs[method], "lora_")):
            for name, parameter in run.trainer.model.named_parameters():
                moved = not torch.equal(parameter, run.before[name])
                assert moved == (moving is None or moving in name), name

    @pytest.mark.cell("TRL's expectations", "SFTTrainer's metrics are logged, and the method's under its own prefix")
    def test_metrics(self, method, runs):
        ours, plain = runs[method].trainer.state.log_history, runs["plain"].trainer.state.log_history
        assert [log["step"] for log in ours] == [log["step"] for log in plain] == [1, 1, 2, 2, 2]
        for log, our_log in zip(plain, ours, strict=True):
            assert log.keys() <= our_log.keys()
            added = {name.removeprefix("eval_") for name in our_log.keys() - log.keys()}
            assert all(name == "nll" or name.startswith(f"{method}/") for name in added)
            assert ("nll" in added) == ("loss" in log or "eval_loss" in log)
            assert (our_log["epoch"], our_log.get("learning_rate")) == (log["epoch"], log.get("learning_rate"))
            assert all(isinstance(value, int | float) for value in our_log.values())
        assert runs[method].result.metrics.keys() == runs["plain"].result.metrics.keys()

    @pytest.mark.cell("TRL's expectations", "callbacks see the same events and logs")
    def test_callbacks(self, method, runs):
        recorder = runs[method].recorder
        assert recorder.events == runs["plain"].recorder.events == [
            "train_begin", "step_end", "evaluate", "step_end", "evaluate", "save", "train_end"
        ]  # fmt: skip
        history = runs[method].trainer.state.log_history
        assert [{**log, "step": entry["step"]} for log, entry in zip(recorder.logs, history, strict=True)] == history

    @pytest.mark.cell("TRL's expectations", "the same files are saved and can be loaded")
    def test_files(self, method, runs, lora_runs, tiny_model, tokenizer):
        for run, plain in ((runs[method], runs["plain"]), (lora_runs[method], lora_runs["plain"])):
            # With LoRA there is a card already: PEFT's
            cards = {"saved/README.md"} - files_in(plain.folder)
            assert files_in(run.folder) - files_in(plain.folder) == {f"checkpoint-2/{RUN_FILE}", *cards}
            assert files_in(plain.folder) <= files_in(run.folder)
            state = run.trainer.model.state_dict()
            for folder in (run.folder / "checkpoint-2", run.folder / "saved"):
                if (folder / "adapter_config.json").is_file():
                    loaded = PeftModel.from_pretrained(copy.deepcopy(tiny_model), folder)
                else:
                    loaded = AutoModelForCausalLM.from_pretrained(folder)
                assert all(torch.equal(weights, state[name]) for name, weights in loaded.state_dict().items())
                other = AutoTokenizer.from_pretrained(folder)
                assert other.chat_template == tokenizer.chat_template and other.get_vocab() == tokenizer.get_vocab()
                arguments = torch.load(folder / "training_args.bin", weights_only=False)
                assert type(arguments) is METHODS[method].config_class


def count_right(prediction):
    labels = prediction.label_ids[:, 1:]
    right = (prediction.predictions[:, :-1] == labels) & (labels != -100)
    return {"right": int(right.sum()), "labels": int((labels != -100).sum())}


def best_token(logits, labels):
    return logits.argmax(-1)


def nothing(model):
    return {}


def assert_same_step(
    method, model, tokenizer, rows, folder, arguments=nothing, gradient_tolerance=TOLERANCE, **options
):
    """One step of the control is that of `SFTTrainer` with the same arguments, which are made for each trainer."""
    found = []
    for used, own in ((PLAIN, {}), (METHODS[method], METHODS[method].control)):
        recorder = GradientRecorder()
        settings = {**SMALL, "max_steps": 1, "per_device_train_batch_size": 4, "max_grad_norm": 0}
        args = used.config_class(str(folder), **{**settings, "save_strategy": "no", **options, **own})
        start = model if isinstance(model, str) else copy.deepcopy(model)
        given = {"processing_class": tokenizer, "callbacks": [recorder], **arguments(start)}
        trainer = used.trainer_class(start, args, train_dataset=rows, **given)
        trainer.train()
        found.append((trainer, trainer.state.log_history[0]["loss"], recorder.gradients))
    (plain, loss, gradients), (ours, our_loss, our_gradients) = found
    assert our_loss == pytest.approx(loss, rel=TOLERANCE, abs=0)
    assert_same_gradients(our_gradients, gradients, gradient_tolerance)
    return ours, plain


def sgd(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"optimizers": (optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5))}


def adagrad(model):
    return {"optimizer_cls_and_kwargs": (torch.optim.Adagrad, {"lr": 0.1})}


def collator(model):
    return {"data_collator": DataCollatorForLanguageModeling(pad_token_id=0, pad_to_multiple_of=16)}


def adapter(model):
    return {"peft_config": LoraConfig(r=4, target_modules="all-linear")}


def four_bits():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def quantized_adapter(model):
    return {**adapter(model), "quantization_config": four_bits()}


@every_method
class TestEvaluation:
    def trainers(self, method, model, tokenizer, rows, folder, **arguments):
        for used, own in ((PLAIN, {}), (METHODS[method], METHODS[method].control)):
            args = used.config_class(str(folder), **SMALL, per_device_eval_batch_size=4, **own)
            yield used.trainer_class(
                copy.deepcopy(model), args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer,
                **arguments,
            )  # fmt: skip

    @pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
    @pytest.mark.cell("TRL's expectations", "compute_metrics, preprocess_logits_for_metrics: SFTTrainer's values")
    def test_compute_metrics(self, method, tiny_model, tokenizer, equal_rows, tmp_path):
        functions = {"compute_metrics": count_right, "preprocess_logits_for_metrics": best_token}
        plain, ours = self.trainers(method, tiny_model, tokenizer, equal_rows, tmp_path, **functions)
        expected, metrics = plain.evaluate(), ours.evaluate()
        names = [name for name in expected if "time" not in name and "per_second" not in name]
        assert {name: metrics[name] for name in names} == pytest.approx({name: expected[name] for name in names})
        assert metrics["eval_labels"] == 16 * 9 and "eval_right" in metrics

    @pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
    @pytest.mark.cell("TRL's expectations", "predict gives SFTTrainer's logits, labels and metrics")
    def test_predict(self, method, tiny_model, tokenizer, equal_rows, tmp_path):
        plain, ours = self.trainers(method, tiny_model, tokenizer, equal_rows, tmp_path)
        expected, outputs = (trainer.predict(trainer.eval_dataset.select(range(4))) for trainer in (plain, ours))
        assert (outputs.predictions == expected.predictions).all() and (outputs.label_ids == expected.label_ids).all()
        assert outputs.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-6)
        metrics = ours.evaluate()  # of all rows, and of these alone
        assert metrics["eval_nll"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
        assert metrics["eval_loss"] != pytest.approx(expected.metrics["test_loss"], rel=1e-3)


@every_method
class TestArguments:
    @pytest.mark.cell("TRL's expectations", "model given by name, with model_init_kwargs")
    def test_model_by_name(self, method, tiny_model, tokenizer, equal_rows, tmp_path):
        tiny_model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        options = {"model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "eager"}}
        arguments = (method, str(tmp_path / "model"), None, equal_rows, tmp_path / "run")
        ours, _ = assert_same_step(*arguments, gradient_tolerance=1e-2, **options)  # gradients are in bfloat16
        assert ours.model.dtype == torch.bfloat16 and ours.model.config._attn_implementation == "eager"
        assert ours.processing_class.chat_template == tokenizer.chat_template

    @pytest.mark.cell("TRL's expectations", "quantization as an argument and in model_init_kwargs")
    def test_quantization(self, method, tiny_model, tokenizer, equal_rows, tmp_path):
        pytest.importorskip("bitsandbytes")
        tiny_model.config.update({"hidden_size": 64, "head_dim": 16})  # less, and bitsandbytes can't compute
        type(tiny_model)(tiny_model.config).save_pretrained(tmp_path / "model")
        common = (method, str(tmp_path / "model"), tokenizer, equal_rows, tmp_path)
        # The adapter's gradients are in bfloat16
        by_argument, _ = assert_same_step(*common, quantized_adapter, gradient_tolerance=1e-2)
        by_kwargs, _ = assert_same_step(
            *common, adapter, gradient_tolerance=1e-2, model_init_kwargs={"quantization_config": four_bits()}
        )
        assert by_argument.model.is_loaded_in_4bit and by_kwargs.model.is_loaded_in_4bit
        assert by_argument.state.log_history[0]["loss"] == by_kwargs.state.log_history[0]["loss"]

    @pytest.mark.cell("TRL's expectations", "the user's data collator, optimizers and optimizer_cls_and_kwargs")
    def test_own_parts(self, method, tiny_model, tokenizer, equal_rows, tmp_path):
        for arguments, optimizer in ((sgd, torch.optim.SGD), (adagrad, torch.optim.Adagrad), (collator, None)):
            ours, plain = assert_same_step(method, tiny_model, tokenizer, equal_rows, tmp_path, arguments)
            for name, weights in plain.model.state_dict().items():
                torch.testing.assert_close(ours.model.state_dict()[name], weights, rtol=0, atol=1e-6, msg=name)
            if optimizer is not None:
                assert isinstance(ours.optimizer.optimizer, optimizer)
                assert ours.state.log_history[0]["learning_rate"] == plain.state.log_history[0]["learning_rate"]
        batch = next(iter(ours.get_train_dataloader()))
        assert batch["input_ids"].size(1) % 16 == 0

    @pytest.mark.cell("TRL's expectations", "remove_unused_columns=False")
    def test_unused_columns(self, method, tiny_model, tokenizer, equal_rows, tmp_path):
        rows = equal_rows.add_column("source", ["web"] * len(equal_rows))
        assert_same_step(method, tiny_model, tokenizer, rows, tmp_path, remove_unused_columns=False)
