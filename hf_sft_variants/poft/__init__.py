from .config import PoFTConfig
from .reference_scoring import ReferenceScoringCallback
from .trainer import PoFTTrainer


__all__ = ["PoFTConfig", "PoFTTrainer", "ReferenceScoringCallback"]
