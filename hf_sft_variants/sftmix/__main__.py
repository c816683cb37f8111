from ..launch.training import main
from . import SFTMixConfig, SFTMixTrainer


if __name__ == "__main__":
    main(SFTMixTrainer, SFTMixConfig)
