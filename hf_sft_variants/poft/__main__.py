from ..launch.training import main
from . import PoFTConfig, PoFTTrainer


if __name__ == "__main__":
    main(PoFTTrainer, PoFTConfig)
