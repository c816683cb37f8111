from dataclasses import dataclass, field

from trl import SFTConfig

from .field_checks import require_valid_fields


@dataclass
class AnnotatedSFTConfig(SFTConfig):
    """
    What the methods' configurations have in common; [`AnnotatedSFTTrainer`] takes it, too.

    Lists only the parameters that [`~trl.SFTConfig`] does not have.

    Parameters:
        metrics_by (`str`, *optional*):
            Column of text or integers, with at most 64 different values, such as the source of each row. Training and
            evaluation log `nll/<value>`, the mean negative log-likelihood of its tokens, and `token_share/<value>`,
            their share of the tokens in the loss. Not for streams.
    """

    metrics_by: str | None = field(
        default=None,
        metadata={"help": "Column whose values get metrics of their own, such as the source of each row."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_valid_fields(self)
