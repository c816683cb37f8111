from .batch import AnnotatedBatch
from .trainer import AnnotatedSFTTrainer


__all__ = ["AnnotatedBatch", "AnnotatedSFTTrainer"]
