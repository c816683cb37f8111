from .config import SFTKeyConfig
from .stages import StageSwitchCallback
from .trainer import SFTKeyTrainer


__all__ = ["SFTKeyConfig", "SFTKeyTrainer", "StageSwitchCallback"]
