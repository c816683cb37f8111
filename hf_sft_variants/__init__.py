"""Drop-in variants of TRL's `SFTTrainer`: other objectives, the same everything else."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

# Imported on first use: `import hf_sft_variants` and the command line answer before torch is loaded.
_SUBMODULE_OF = {
    "AnnotatedBatch": "base",
    "AnnotatedSFTConfig": "base",
    "AnnotatedSFTTrainer": "base",
    "ConfidenceTrackingCallback": "sftmix",
    "PoFTConfig": "poft",
    "PoFTTrainer": "poft",
    "ReferenceScoringCallback": "poft",
    "SFTGOConfig": "sft_go",
    "SFTGOTrainer": "sft_go",
    "SFTKeyConfig": "sftkey",
    "SFTKeyTrainer": "sftkey",
    "SFTMixConfig": "sftmix",
    "SFTMixTrainer": "sftmix",
    "StageSwitchCallback": "sftkey",
    "WeightedSFTConfig": "weighted",
    "WeightedSFTTrainer": "weighted",
}

__all__ = [
    "AnnotatedBatch",
    "AnnotatedSFTConfig",
    "AnnotatedSFTTrainer",
    "ConfidenceTrackingCallback",
    "PoFTConfig",
    "PoFTTrainer",
    "ReferenceScoringCallback",
    "SFTGOConfig",
    "SFTGOTrainer",
    "SFTKeyConfig",
    "SFTKeyTrainer",
    "SFTMixConfig",
    "SFTMixTrainer",
    "StageSwitchCallback",
    "WeightedSFTConfig",
    "WeightedSFTTrainer",
    "__version__",
]

if TYPE_CHECKING:
    from .base import AnnotatedBatch, AnnotatedSFTConfig, AnnotatedSFTTrainer
    from .poft import PoFTConfig, PoFTTrainer, ReferenceScoringCallback
    from .sft_go import SFTGOConfig, SFTGOTrainer
    from .sftkey import SFTKeyConfig, SFTKeyTrainer, StageSwitchCallback
    from .sftmix import ConfidenceTrackingCallback, SFTMixConfig, SFTMixTrainer
    from .weighted import WeightedSFTConfig, WeightedSFTTrainer


def __getattr__(name: str) -> Any:
    if name not in _SUBMODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_SUBMODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
