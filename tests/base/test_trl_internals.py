"""What we rely on in TRL beyond its documented names: a failure here says what moved."""

import inspect

from transformers import Trainer
from trl import SFTTrainer

from hf_sft_variants.base import trl_internals


def test_names_are_there():
    for name in trl_internals.__all__:
        assert hasattr(trl_internals, name), f"TRL no longer has `{name}`: see base/trl_internals.py"


def test_methods_we_override_are_there():
    overridden = ["_prepare_dataset", "_set_signature_columns_if_needed", "_reject_skip_prepare_without_labels"]
    for name in [*overridden, "compute_loss", "evaluate"]:
        assert name in SFTTrainer.__dict__, f"SFTTrainer no longer has `{name}`: see base/trainer.py"
    for name in ["get_batch_samples", "_prepare_inputs", "get_tp_size"]:
        assert hasattr(Trainer, name), f"Trainer no longer has `{name}`: see base/trainer.py"


def test_preparation_takes_the_same_arguments():
    parameters = list(inspect.signature(SFTTrainer._prepare_dataset).parameters)
    assert parameters == [
        "self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"
    ]  # fmt: skip


def test_loss_calls_the_model_with_the_fused_head():
    source = inspect.getsource(SFTTrainer.compute_loss)
    assert "model(**inputs, fused_lm_head=True)" in source, "the loss no longer comes from the fused LM head"
    assert "aux_loss_enabled" in source and "router_aux_loss_coef" in source


def test_settings_of_the_fused_head_are_in_its_closure(tiny_model):
    trl_internals.add_fused_lm_head(tiny_model, temperature=0.5)
    settings = trl_internals.fused_lm_head_settings(tiny_model)
    read = ["temperature", "cast_lm_head_to_fp32", "final_logit_softcapping", "logit_scale"]
    assert [settings[name] for name in read] == [0.5, False, None, 1.0]
