from ..launch.training import main
from . import WeightedSFTConfig, WeightedSFTTrainer


if __name__ == "__main__":
    main(WeightedSFTTrainer, WeightedSFTConfig)
