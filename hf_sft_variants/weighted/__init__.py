from .config import WeightedSFTConfig
from .trainer import WeightedSFTTrainer


__all__ = ["WeightedSFTConfig", "WeightedSFTTrainer"]
