import math
from dataclasses import dataclass, field

from ..base.config import AnnotatedSFTConfig
from ..errors import InputError


@dataclass
class SFTMixConfig(AnnotatedSFTConfig):
    r"""
    Configuration class for the [`SFTMixTrainer`].

    Lists only the parameters that [`AnnotatedSFTConfig`] does not have. Method: [SFTMix: mixup between confident and
    unconfident examples](https://huggingface.co/papers/2410.05248).

    Parameters of the loss, ntp_weight · L_NTP + μ · L_Mixup:
        mixup_weight (`float`, *optional*, defaults to `0.2`):
            Weight μ of the mixup loss. 0 is the control with the same batches but without mixup.
        mixup_alpha (`float`, *optional*, defaults to `0.5`):
            Each pair is mixed with λ ~ Beta(α, α).
        ntp_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the next-token loss of all examples. 0 is the control with only the mixup loss.

    Parameters of the pairs:
        confidence_split (`str`, *optional*, defaults to `"confidence"`):
            `"confidence"` pairs one confident example with one unconfident example; `"random"`, the control, pairs
            examples of two random halves and needs no confidence. Streams, `packing_strategy="wrapped"` and
            `"bfd_split"` support only `"random"`, and their pairs are drawn within the micro-batch.
        pair_sampling (`bool`, *optional*, defaults to `True`):
            Whether every micro-batch holds whole pairs, drawn anew each epoch; for packed data, whether pairs are
            drawn within the micro-batch. `False`, which needs `mixup_weight=0`, is `SFTTrainer`'s own sampling.

    Parameters of the confidence, the negative mean perplexity of an example's labels over the checkpoints of a run:
        confidence_source (`str`, *optional*, defaults to `"reference"`):
            - `"reference"`: `train()` first trains a reference model by ordinary supervised fine-tuning on the same
              data and with the same arguments, keeps it in `<output_dir>/reference`, and starts anew. An existing
              reference is used if it was trained in the same way, and refused otherwise.
            - `"file"`: `confidence_file`, written by [`ConfidenceTrackingCallback`] in a run of your own, or
              `reference/confidence.parquet` of another run on the same data.
            - `"online"`: what training itself computes for each example, at no cost. Nothing is mixed in the first
              epoch. An approximation: every example is seen by different weights, and with dropout. After three epochs
              84 % of the examples were in the same half as by the confidence tracked in the same run.
        confidence_file (`str`, *optional*):
            For `confidence_source="file"`: the Parquet file.
        reference_model (`str`, *optional*):
            For `confidence_source="reference"`: id or path of another model to train, of any architecture and with any
            tokenizer. By default the reference starts from the trained model's initial weights.
        confidence_checkpoints (`list[int]`, *optional*):
            For `confidence_source="reference"`: optimizer steps after which the data is evaluated. Defaults to the end
            of each epoch if there are three or more, otherwise to three evenly spaced steps, including the last one.
            The paper is silent on this.
        confidence_measure (`str`, *optional*, defaults to `"perplexity"`):
            What is averaged over the checkpoints: `"perplexity"`, as in the paper, or `"mean_nll"`.
        push_confidence (`bool`, *optional*, defaults to `False`):
            For `confidence_source="reference"`: whether to push `reference/confidence.parquet` and
            `reference/settings.json` to the Hub, with which a run resumes elsewhere without training the reference
            again. They contain hashes of the examples (or your own column `example_key`), numbers and settings, but no
            text and no paths. The reference model is never pushed.
    """

    _MAY_CHANGE_ON_RESUME = ["push_confidence"]
    _FILES_AND_MODELS = ["reference_model", "confidence_file"]

    mixup_weight: float = field(
        default=0.2,
        metadata={"help": "Weight of the mixup loss; 0 disables mixup."},
    )
    mixup_alpha: float = field(
        default=0.5,
        metadata={"help": "Each pair is mixed with a weight drawn from Beta(mixup_alpha, mixup_alpha)."},
    )
    ntp_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the next-token loss; 0 leaves only the mixup loss."},
    )
    confidence_split: str = field(
        default="confidence",
        metadata={"help": "How examples are split into the halves to pair.", "choices": ["confidence", "random"]},
    )
    pair_sampling: bool = field(
        default=True,
        metadata={"help": "Whether micro-batches hold pairs; False, with mixup_weight=0, is SFTTrainer's sampling."},
    )
    confidence_source: str = field(
        default="reference",
        metadata={
            "help": "Source of the confidence: a reference run, training itself, or a file.",
            "choices": ["reference", "online", "file"],
        },
    )
    confidence_file: str | None = field(
        default=None,
        metadata={"help": "For confidence_source='file': Parquet file written by ConfidenceTrackingCallback."},
    )
    reference_model: str | None = field(
        default=None,
        metadata={"help": "For confidence_source='reference': id or path of another model to train first."},
    )
    confidence_checkpoints: list[int] | None = field(
        default=None,
        metadata={"help": "Optimizer steps of the reference run after which the data is evaluated."},
    )
    confidence_measure: str = field(
        default="perplexity",
        metadata={"help": "What is averaged over the checkpoints.", "choices": ["perplexity", "mean_nll"]},
    )
    push_confidence: bool = field(
        default=False,
        metadata={"help": "Whether to push the confidence to the Hub (hashes and numbers, no text)."},
    )

    @property
    def needs_confidence(self) -> bool:
        """Whether pairs depend on confidence."""
        return self.pair_sampling and self.confidence_split == "confidence"

    @property
    def needs_reference(self) -> bool:
        """Whether a reference model has to be trained."""
        return self.needs_confidence and self.confidence_source == "reference"

    @property
    def numbers_examples(self) -> bool:
        """Whether pairs go by numbers of the examples; where examples are cut or come prepared, they have none."""
        is_whole = not self.packing or self.packing_strategy == "bfd"
        return self.pair_sampling and is_whole and not self._skips_preparation

    @property
    def _skips_preparation(self) -> bool:
        return (self.dataset_kwargs or {}).get("skip_prepare_dataset", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_weights()
        self._check_source()
        if self.pair_sampling and not self.packing:
            self._check_batches()
        if self.needs_confidence:
            self._check_data()

    def _check_weights(self) -> None:
        for name in ("mixup_weight", "ntp_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"`{name}` must be a number of 0 or more, got {getattr(self, name)!r}.")
        if self.mixup_weight == self.ntp_weight == 0:
            raise InputError("`mixup_weight` and `ntp_weight` are both 0, which leaves no loss: set one of them.")
        if not (math.isfinite(self.mixup_alpha) and self.mixup_alpha > 0):
            raise InputError(f"`mixup_alpha` must be a number above 0, got {self.mixup_alpha!r}.")
        if not self.pair_sampling and self.mixup_weight > 0:
            raise InputError(
                f"`pair_sampling=False` leaves no pairs for `mixup_weight={self.mixup_weight}`: set `mixup_weight=0`, "
                "or leave `pair_sampling` at True."
            )

    def _check_source(self) -> None:
        source = self.confidence_source if self.needs_confidence else None
        for name, its_source in (
            ("confidence_file", "file"),
            ("reference_model", "reference"),
            ("confidence_checkpoints", "reference"),
            ("push_confidence", "reference"),
        ):
            if getattr(self, name) not in (None, False) and source != its_source:
                reason = f"`confidence_source` is {source!r}" if source else "no confidence is needed here"
                raise InputError(
                    f"`{name}={getattr(self, name)!r}` is only used with `confidence_source={its_source!r}`, but "
                    f"{reason}. Remove it."
                )
        checkpoints = self.confidence_checkpoints
        if checkpoints is not None and (not checkpoints or min(checkpoints) < 1):
            raise InputError(f"`confidence_checkpoints={checkpoints}` must be one or more steps, counted from 1.")
        if checkpoints is not None and 0 < self.max_steps < max(checkpoints):
            raise InputError(f"`confidence_checkpoints={checkpoints}` must be at most `max_steps={self.max_steps}`.")
        if source == "file" and self.confidence_file is None:
            raise InputError("`confidence_source='file'` needs `confidence_file`, the path of a Parquet file.")
        if source == "online" and self.max_steps <= 0 and self.num_train_epochs < 2:
            raise InputError(
                f"`confidence_source='online'` mixes from the second epoch on, but `num_train_epochs` is "
                f"{self.num_train_epochs:g}. Train for 2 or more epochs, or choose another source."
            )

    def _check_batches(self) -> None:
        if self.train_sampling_strategy != "random":
            raise InputError(
                f"`train_sampling_strategy={self.train_sampling_strategy!r}` has no effect with `pair_sampling=True`, "
                "which draws pairs in an order of its own. Leave it at 'random'."
            )
        if self.confidence_split == "random":
            return
        num_rows = self.per_device_train_batch_size
        if self.accelerator_config.split_batches:
            num_rows //= self.world_size
        if num_rows % 2 == 1:
            raise InputError(
                f"`per_device_train_batch_size={self.per_device_train_batch_size}` gives a process {num_rows} rows, "
                "but pairs need an even number: make it even, or set `confidence_split='random'`."
            )
        if self.accelerator_config.dispatch_batches:
            raise InputError(
                "`accelerator_config={'dispatch_batches': True}` may cut pairs apart when the last batch is split: "
                "remove it, or set `confidence_split='random'`."
            )
        if self.auto_find_batch_size:
            raise InputError(
                "`auto_find_batch_size=True` may choose an odd batch size, which cuts pairs apart: set "
                "`per_device_train_batch_size` yourself."
            )

    def _check_data(self) -> None:
        if self.packing and self.packing_strategy != "bfd":
            raise InputError(
                f"`packing_strategy={self.packing_strategy!r}` cuts examples, so they can't be split by confidence: "
                "use 'bfd', or set `confidence_split='random'`."
            )
        if self._skips_preparation:
            raise InputError(
                "`dataset_kwargs={'skip_prepare_dataset': True}` leaves the examples without the numbers that pairs "
                "need: remove it (tokenized rows are accepted), or set `confidence_split='random'`."
            )
