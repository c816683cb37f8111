from .confidence import ConfidenceTrackingCallback
from .config import SFTMixConfig
from .trainer import SFTMixTrainer


__all__ = ["ConfidenceTrackingCallback", "SFTMixConfig", "SFTMixTrainer"]
