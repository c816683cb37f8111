"""Records which trainer and settings annotated a prepared data set, and refuses a data set that doesn't match."""

import json
from functools import cached_property
from typing import Any

from datasets import Dataset, IterableDataset
from trl import SFTConfig

from ..errors import InputError
from .checkpoints import describe_settings
from .field_checks import as_json_values
from .fingerprints import vocabulary_hash, what_counts
from .preparation import kept_length, map_description
from .sources import RAW_ROWS
from .trl_internals import get_dataset_column_names


# A column, the same on all rows, survives `select`, `concatenate_datasets`, Parquet, JSON and the Hub
MADE_WITH = "annotated_with"


class PreparedSetsMixin:
    """Accepts data sets prepared by the same trainer with the same settings, and refuses all others."""

    # Annotation columns that users may supply themselves
    _columns_of_the_user: frozenset[str] = frozenset()

    def annotation_settings(self, columns: list[str], is_packed: bool) -> dict[str, Any]:
        """
        Return the settings that the annotations depend on, as JSON values. They are written to the column
        `annotated_with` of the prepared data set, and a trainer whose settings differ refuses it. By default these are
        all the fields that the configuration class adds to [`~trl.SFTConfig`]. Settings that are left out are not
        compared.

        Args:
            columns (`list[str]`):
                Columns of the annotated data set.
            is_packed (`bool`):
                Whether its rows are packed. Packed rows are used unchanged. All others are annotated again, so
                settings whose effect [`annotate`] overwrites can be left out.
        """
        return describe_settings(self.args)

    def check_prepared(
        self, dataset: Dataset | IterableDataset, packing: bool, dataset_name: str
    ) -> dict[str, Any] | None:
        """
        Return the trainer and settings that annotated a data set; `None` if it is not annotated. Takes over the
        numbers of its sources where its rows are used unchanged. Raises an `InputError` if they differ from this
        trainer's, or the data set has annotations but does not record them.
        """
        columns = get_dataset_column_names(dataset)
        if not {MADE_WITH, "input_ids"} <= set(columns):
            if self._skip_prepare_dataset:
                self.adopt_sources(None, dataset_name)
            else:
                unknown = {*self.token_columns} & {*columns} - self._columns_of_the_user
                refuse_unknown_annotations(unknown, dataset_name)
            return None
        made_with = read_made_with(dataset, dataset_name)
        wanted = self.describe_annotations(columns, packing, is_packed(made_with))
        all_wanted = {**wanted, "settings": {**wanted["settings"], **self._settings_of_first_set}}
        require_same_settings(made_with, all_wanted, dataset_name)
        # Settings that this trainer does not have, such as unnamed reference models, must match across data sets
        unknown = made_with["settings"].keys() - wanted["settings"].keys()
        self._settings_of_first_set |= {name: made_with["settings"][name] for name in unknown}
        if is_packed(made_with) or self._skip_prepare_dataset:  # others are numbered again
            self.adopt_sources(made_with, dataset_name)
        return made_with

    def describe_annotations(
        self, columns: list[str], packing: bool, is_packed: bool, before: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """
        Describe the trainer and its settings for the column `annotated_with`. `before` is the rows' previous
        description; its settings are kept unless this trainer has its own value for them.
        """
        settings = {
            **(before["settings"] if before else {}),
            "processing_class": self._vocabulary,
            **cut_settings(self.args, packing, is_packed),
            **self.annotation_settings(columns, is_packed),
        }
        return {"trainer": _annotating_class(type(self)), "settings": as_json_values(settings)}

    def _packs(self, dataset_name: str) -> bool:
        args = self.args
        return args.packing if dataset_name == "train" or args.eval_packing is None else args.eval_packing

    @cached_property
    def _vocabulary(self) -> str:
        return vocabulary_hash(self._tokenizer)[:16]

    @cached_property
    def _settings_of_first_set(self) -> dict[str, Any]:
        return {}


def _annotating_class(trainer_class: type) -> str:
    """Class that defines a trainer's annotations: a subclass that only changes the loss annotates like its parent."""
    hooks = {"annotate", "annotate_untruncated", "annotation_columns"}
    return next(cls.__name__ for cls in trainer_class.__mro__ if hooks & vars(cls).keys())


def is_packed(made_with: dict[str, Any] | None) -> bool:
    """Whether a data set is packed according to `annotated_with`; rows packed with `wrapped` don't show it."""
    return made_with is not None and bool(made_with["settings"].get("packing"))


def is_prepared_and_packed(dataset: Dataset | IterableDataset) -> bool:
    """Whether a data set is already annotated and packed."""
    return MADE_WITH in get_dataset_column_names(dataset) and is_packed(read_made_with(dataset, "train"))


def add_made_with(
    dataset: Dataset | IterableDataset, made_with: dict[str, Any], args: SFTConfig, dataset_name: str
) -> Dataset | IterableDataset:
    """Add the column `annotated_with`: in every row, as JSON, the trainer and the settings that prepared it."""
    fn_kwargs = {"text": json.dumps(made_with, sort_keys=True)}
    map_kwargs = map_description(dataset, args, f"Marking {dataset_name} dataset")
    return dataset.map(_add_text, batched=True, fn_kwargs=fn_kwargs, **map_kwargs)


def _add_text(examples: dict[str, list], text: str) -> dict[str, list]:
    return {MADE_WITH: [text] * len(examples["input_ids"])}


def read_made_with(dataset: Dataset | IterableDataset, dataset_name: str) -> dict[str, Any]:
    """
    Read the column `annotated_with`. Of a stream, read the first row; [`require_as_first_row`] checks the others.
    Raises an `InputError` if rows were prepared with different settings, or the column was not written by a trainer.
    """
    dataset = dataset.with_format(None)
    is_stream = isinstance(dataset, IterableDataset)
    texts = {next(iter(dataset))[MADE_WITH]} if is_stream else set(dataset[MADE_WITH][:])
    if len(texts) > 1 and None in texts:
        raise InputError(_mixture_message(dataset_name))
    made_with, *others = [_parse_made_with(text, dataset_name) for text in texts]
    if any(not _is_alike(other, made_with) for other in others):
        raise InputError(_mixture_message(dataset_name))
    # Sets prepared alike may number their sources differently, so the joined numbers mean nothing
    return {**made_with, "sources": {}} if others else made_with


def _is_alike(made_with: dict[str, Any], other: dict[str, Any]) -> bool:
    return {**made_with, "sources": {}} == {**other, "sources": {}}


def _parse_made_with(text: str, dataset_name: str) -> dict[str, Any]:
    try:
        made_with = json.loads(text)
        return {
            "trainer": str(made_with["trainer"]),
            "settings": dict(made_with["settings"]),
            "sources": dict(made_with.get("sources", {})),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"The column `{MADE_WITH}` of the {dataset_name} dataset was not written by a trainer ({text!r}). Rename "
            f"it, or {RAW_ROWS}."
        ) from error


def require_as_first_row(dataset: IterableDataset, dataset_name: str) -> IterableDataset:
    """Check each row of a stream as it arrives, and refuse one whose settings differ from the first row's."""
    first = _parse_made_with(next(iter(dataset))[MADE_WITH], dataset_name)
    return dataset.map(_require_alike, fn_kwargs={"first": first, "dataset_name": dataset_name})


def _require_alike(example: dict[str, Any], first: dict[str, Any], dataset_name: str) -> dict[str, Any]:
    text = example[MADE_WITH]
    if text is None or not _is_alike(_parse_made_with(text, dataset_name), first):
        raise InputError(_mixture_message(dataset_name))
    return example


def _mixture_message(dataset_name: str) -> str:
    return (
        f"The rows of the {dataset_name} dataset were prepared with different settings, or some were not prepared at "
        f"all (see the column `{MADE_WITH}`). Prepare all rows with the same settings, or {RAW_ROWS}."
    )


def require_same_settings(found: dict[str, Any], wanted: dict[str, Any], dataset_name: str) -> None:
    """
    Refuse a data set that another trainer or other settings prepared: `found` are those that did, `wanted` those of
    this trainer. Settings that only one side has, such as reference models that the configuration does not name, are
    not compared.
    """
    if found["trainer"] != wanted["trainer"]:
        raise InputError(
            f"The {dataset_name} dataset was prepared by {found['trainer']}, but this is {wanted['trainer']}, which "
            f"annotates differently. Use {found['trainer']}, or {RAW_ROWS}."
        )
    changes = [
        f"`{name}` was {value!r}, is now {wanted['settings'][name]!r}"
        for name, value in found["settings"].items()
        if name in wanted["settings"] and what_counts(value) != what_counts(wanted["settings"][name])
    ]
    if changes:
        raise InputError(
            f"The {dataset_name} dataset was prepared with different settings: {'; '.join(changes)}. Restore them, or "
            f"{RAW_ROWS}."
        )


def refuse_unknown_annotations(columns: set[str], dataset_name: str) -> None:
    """Refuse annotation columns of unknown origin."""
    if columns:
        raise InputError(
            f"The {dataset_name} dataset has the column `{min(columns)}`, which this trainer creates, but no column "
            f"`{MADE_WITH}` that records its settings. Rename or remove the former, or {RAW_ROWS}."
        )


def cut_settings(args: SFTConfig, packing: bool, is_packed: bool) -> dict[str, Any]:
    """
    Return the truncation and packing settings that prepared rows depend on. `packing` is whether the trainer packs the
    data set, `is_packed` whether the rows already are; if not, they may be packed later.
    """
    max_length = args.max_length if is_packed else kept_length(args, packing)
    return {
        "packing": args.packing_strategy if packing and is_packed else False,
        "max_length": max_length,
        "truncation_mode": "keep_start" if packing or max_length is None else args.truncation_mode,
    }
