"""The trainer that the methods extend."""

from .batch import AnnotatedBatch
from .config import AnnotatedSFTConfig
from .metrics import Maximum, Minimum
from .trainer import AnnotatedSFTTrainer


__all__ = ["AnnotatedBatch", "AnnotatedSFTConfig", "AnnotatedSFTTrainer", "Maximum", "Minimum"]
