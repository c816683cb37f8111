from .config import SFTGOConfig
from .trainer import SFTGOTrainer


__all__ = ["SFTGOConfig", "SFTGOTrainer"]
