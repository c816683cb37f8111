"""Preparing a recipe's training data as its trainer does, without the model's weights."""

import tempfile
from dataclasses import dataclass
from functools import partial

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, PreTrainedModel
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, SFTTrainer

from ..base.prepared_sets import is_prepared_and_packed
from ..errors import InputError, first_line
from .parsing import parse, trainer_and_parser
from .recipe_checks import read_mapping
from .training import load_data


# For machines without a GPU, which refuse a GPU recipe's settings; none of them changes the data
_WITHOUT_ACCELERATOR = ["--use_cpu", "true", "--bf16", "false", "--fp16", "false", "--tf32", "false"]


@dataclass
class Recipe:
    """
    Parsed recipe: its file, the trainer of the package named by `module` (without it, [`~trl.SFTTrainer`]), and the
    values of the recipe and the flags.
    """

    path: str
    trainer_class: type[SFTTrainer]
    script_args: ScriptArguments
    training_args: SFTConfig
    model_args: ModelConfig
    dataset_args: DatasetMixtureConfig


def load_recipe(path: str, flags: list[str]) -> Recipe:
    """Read a recipe, with or without `module`, as strictly as training does. `flags` override it."""
    trainer_class, parser = trainer_and_parser(read_mapping(path).get("module"))
    on_this_machine = [] if torch.accelerator.is_available() else _WITHOUT_ACCELERATOR
    parsed = parse(parser, ["--config", path, *flags, *on_this_machine])
    return Recipe(path, trainer_class, *parsed)


def prepare_view(recipe: Recipe) -> SFTTrainer:
    """
    Like [`prepare`], but for showing `train_dataset`: examples stay in order, and whole unless they come packed.
    Changes `recipe.training_args`.
    """
    args = recipe.training_args
    args.shuffle_dataset, args.eval_strategy = False, "no"
    train_dataset, _ = load_data(recipe.script_args, recipe.dataset_args)
    if not is_prepared_and_packed(train_dataset):
        if args.packing and args.packing_strategy == "bfd":
            args.truncation_mode = "keep_start"  # what this strategy does to an example that is too long
        elif args.packing:
            args.max_length = None  # examples are split, not truncated
        args.packing = args.padding_free = False
    return prepare(recipe)


def prepare(recipe: Recipe) -> SFTTrainer:
    """
    Build the recipe's trainer with its data sets prepared for training. Of the model, only the configuration and the
    tokenizer are loaded. Changes `recipe.training_args`: nothing is reported or pushed, and `output_dir` is temporary.
    """
    args = recipe.training_args
    evaluates = args.eval_strategy != "no"
    train_dataset, eval_dataset = load_data(recipe.script_args, recipe.dataset_args, evaluates)
    model, processing_class = load_without_weights(recipe)
    args.report_to, args.push_to_hub, args.activation_offloading, args.model_init_kwargs = [], False, False, None
    with tempfile.TemporaryDirectory() as args.output_dir:  # the trainer creates the folder that it would save to
        return recipe.trainer_class(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
        )


def load_without_weights(recipe: Recipe) -> tuple[PreTrainedModel, object]:
    """
    Load the recipe's model on the `meta` device, and its tokenizer or processor. Preparing data only needs the model's
    configuration, name and embedding size, which a model without weights has.
    """
    name, args = recipe.model_args.model_name_or_path, recipe.training_args
    revision = (args.model_init_kwargs or {}).get("revision", recipe.model_args.model_revision)
    options = {"revision": revision, "trust_remote_code": args.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        processing_class = AutoProcessor.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise InputError(
            f"`model_name_or_path` is {name!r}, which could not be loaded: {first_line(error)}"
        ) from error
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if architecture is None:  # defined by the model's own code
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
        else:
            model = architecture(config)
    model.hf_device_map = {"": "meta"}  # so that `Trainer` does not move the model
    # `chat_template_path` may add tokens, whose mean embedding can't be computed without weights
    model.resize_token_embeddings = partial(model.resize_token_embeddings, mean_resizing=False)
    return model, processing_class
