"""The trainer that the methods extend."""

from .batch import AnnotatedBatch
from .metrics import Maximum, Minimum
from .trainer import AnnotatedSFTTrainer


__all__ = ["AnnotatedBatch", "AnnotatedSFTTrainer", "Maximum", "Minimum"]
