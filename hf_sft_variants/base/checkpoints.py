"""Finds the checkpoint to resume from, and refuses one whose recorded run differs from the current one."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints
from trl import SFTConfig

from ..errors import InputError
from ..files import write_text
from .config import AnnotatedSFTConfig
from .field_checks import as_json_values
from .fingerprints import describe_content, what_counts


logger = get_logger(__name__)

# Written next to a checkpoint's other files
RUN_FILE = "hf_sft_variants.json"

# Enough to tell data sets apart, yet quick to read
_NUM_COMPARED = 100

# A checkpoint without a description was made by `SFTTrainer`
_SFT = {"trainer": "SFTTrainer", "settings": {}, "examples": None}

_NEW_RUN = "or start a new run from its weights: pass the folder as `model`, without `resume_from_checkpoint`."


class ResumeCheckMixin:
    """Refuses to resume from an incomplete checkpoint or from another run's."""

    # Columns to compare with a checkpoint's training set, in addition to tokens, labels and the user's annotations
    _columns_compared_on_resume: list[str] = []
    _examples: dict[str, Any] | None = None
    _run: dict[str, Any] | None = None

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """
        Like [`~transformers.Trainer.train`], but `resume_from_checkpoint=True` skips a checkpoint that a killed run
        did not finish writing, and a checkpoint of another method or with different settings or data is refused.
        """
        return super().train(self.checkpoint_to_resume(resume_from_checkpoint), trial, ignore_keys_for_eval)

    def checkpoint_to_resume(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """
        Return the checkpoint to resume from; `None` if the run starts from scratch. Raises an `InputError` if there is
        no complete checkpoint, or it belongs to another run.
        """
        if not resume_from_checkpoint:
            return None
        checkpoint = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
        run = self.describe_run()
        require_same_run(checkpoint, {**run, "examples": None} if self.args.ignore_data_skip else run)
        if not list(Path(checkpoint).glob("rng_state*.pth")):
            logger.warning(
                f"{checkpoint} has only the weights (`save_only_model=True`): the optimizer and the learning rate "
                "start over, so the result differs from that of an uninterrupted run."
            )
        return checkpoint

    def remember_examples(self, dataset: Dataset | IterableDataset, dataset_name: str) -> None:
        """
        Record the training set as it is trained on, packed or not; it is prepared before any other data set. A stream
        can't be described. Called by all processes.
        """
        if dataset_name == "train" and self._examples is None and isinstance(dataset, Dataset):
            columns = ["input_ids", "labels", *self._columns_compared_on_resume, *sorted(self._columns_of_the_user)]
            self._examples = describe_examples(dataset, columns)

    def describe_run(self) -> dict[str, Any]:
        """Describe what a checkpoint must share with this run, as JSON values: the loss, its settings and the data."""
        settings = describe_settings(self.args)
        return {"trainer": _owner_of_loss(type(self)), "settings": settings, "examples": self._examples}

    def begin_run(self, checkpoint: str | None) -> None:
        """
        Reset the trainer's per-run state, or restore it from the checkpoint. Called when training begins, and again
        when `auto_find_batch_size` starts over.
        """
        self._run = self.describe_run()  # now, because the files behind these names may change later

    def _inner_training_loop(
        self, batch_size=None, args=None, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None
    ):
        self.begin_run(resume_from_checkpoint)
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)

    def save_model(self, output_dir=None, _internal_call=False):
        if _internal_call and output_dir is not None:  # a checkpoint, also that of a hyperparameter search
            self.add_to_checkpoint(Path(output_dir))
        super().save_model(output_dir, _internal_call)

    def add_to_checkpoint(self, folder: Path) -> None:
        """Add our files to those of TRL. Called by all processes, before anything is pushed."""
        if self.args.should_save:
            write_run(folder, self._run)


def _owner_of_loss(trainer_class: type) -> str:
    """Name of the class that defines the loss; the methods' base class has the loss of `SFTTrainer`."""
    owners = [cls.__name__ for cls in trainer_class.__mro__ if "compute_annotated_loss" in vars(cls)]
    return owners[0] if len(owners) > 1 else _SFT["trainer"]


def describe_settings(args: SFTConfig) -> dict[str, Any]:
    """
    Return the fields that a configuration adds to [`~trl.SFTConfig`], as JSON values, except those in its
    `_MAY_CHANGE_ON_RESUME`. Files and folders named in the fields of `_FILES_AND_MODELS` are described by their
    content rather than their path.
    """
    return _settings(args, _describe_content)


def named_settings(args: SFTConfig) -> dict[str, Any]:
    """Like [`describe_settings`], but with only the names of files and folders, for publication."""
    return _settings(args, local_name)


def _settings(args: SFTConfig, describe: Callable[[str], Any]) -> dict[str, Any]:
    left_out = {*AnnotatedSFTConfig.__dataclass_fields__, *getattr(args, "_MAY_CHANGE_ON_RESUME", ())}
    settings = {field.name: getattr(args, field.name) for field in fields(args) if field.name not in left_out}
    for name in getattr(args, "_FILES_AND_MODELS", ()):
        value = settings[name]
        if value is not None:
            settings[name] = describe(value) if isinstance(value, str) else [describe(item) for item in value]
    return as_json_values(settings)


def _describe_content(name: str) -> str | dict[str, str]:
    return describe_content(name) if os.path.exists(name) else name


def local_name(name: str) -> str:
    """Last component of a local path, so that its folders are not published; a Hub id is returned unchanged."""
    is_path = os.path.exists(name) or name.startswith((os.sep, ".", "~"))
    return os.path.basename(os.path.abspath(name)) if is_path else name


def describe_examples(dataset: Dataset, columns: list[str]) -> dict[str, Any]:
    """Number of prepared examples in a data set, with a hash of these columns of some of them."""
    rows = np.unique(np.linspace(0, len(dataset) - 1, _NUM_COMPARED, dtype=int))
    some = dataset.select_columns(columns)[rows]
    return {"number": len(dataset), "hash": hashlib.sha256(json.dumps(some).encode()).hexdigest()[:16]}


def write_run(folder: str | Path, run: dict[str, Any]) -> None:
    """Write the description of a run to a folder."""
    write_text(Path(folder, RUN_FILE), json.dumps(run, indent=2) + "\n")


def require_same_run(folder: str | Path, run: dict[str, Any], or_else: str = _NEW_RUN) -> None:
    """
    Refuse to resume from a folder written by another trainer, with other settings or, unless `run["examples"]` is
    `None`, on other examples. A folder without a description by [`write_run`] counts as a checkpoint of `SFTTrainer`.
    `or_else` ends the error message: what to do instead.
    """
    path = Path(folder, RUN_FILE)
    try:
        written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else _SFT
        trainer, settings, examples = written["trainer"], dict(written["settings"]), written["examples"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} can't be read ({error!r}). Resume from another checkpoint.") from error
    if trainer != run["trainer"]:
        raise InputError(
            f"{folder} was made by {trainer}, but this is {run['trainer']}. Resume with the same trainer, {or_else}"
        )
    changes = [
        f"`{name}` was {value!r}, is now {run['settings'].get(name)!r}"
        for name, value in settings.items()
        if what_counts(value) != what_counts(run["settings"].get(name))
    ]
    if changes:
        raise InputError(f"{folder} was made with different settings: {'; '.join(changes)}. Restore them, {or_else}")
    if None not in (examples, run["examples"]) and examples != run["examples"]:
        raise InputError(
            f"{folder} was made with {examples['number']} training examples, and the {run['examples']['number']} of "
            "this run differ. Resume with the same data set and annotations, tokenizer, chat template and "
            "`max_length`, or set `ignore_data_skip=True` to start from the first example."
        )


def find_checkpoint(resume_from_checkpoint: str | bool, output_dir: str) -> str:
    """
    Return the checkpoint that `resume_from_checkpoint` names; if it is `True`, the last complete one in `output_dir`.
    Raises an `InputError` if there is no such checkpoint, or it is incomplete.
    """
    if resume_from_checkpoint is True:
        checkpoint = last_checkpoint(output_dir)
        if checkpoint is None:
            raise InputError(
                f"`resume_from_checkpoint=True`, but `output_dir={output_dir!r}` has no checkpoint. Start without it."
            )
        return checkpoint
    checkpoint = os.fspath(resume_from_checkpoint)
    if not _is_complete(checkpoint):
        raise InputError(
            f"`resume_from_checkpoint={checkpoint!r}` is not a complete checkpoint: it has no readable "
            f"{TRAINER_STATE_NAME}. Give the folder of a checkpoint, or True for the last one in `output_dir`."
        )
    return checkpoint


def last_checkpoint(folder: str | Path) -> str | None:
    """Last complete checkpoint in a folder, if any. A checkpoint's trainer state is written last."""
    complete = [path for path in sort_checkpoints(str(folder)) if _is_complete(path)]
    return complete[-1] if complete else None


def _is_complete(checkpoint: str) -> bool:
    try:
        json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
