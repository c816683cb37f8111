from ..launch.training import main
from . import SFTGOConfig, SFTGOTrainer


if __name__ == "__main__":
    main(SFTGOTrainer, SFTGOConfig)
