from ..launch.training import main
from . import SFTKeyConfig, SFTKeyTrainer


if __name__ == "__main__":
    main(SFTKeyTrainer, SFTKeyConfig)
