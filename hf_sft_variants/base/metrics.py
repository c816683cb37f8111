import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from .batch import Ratio


logger = get_logger(__name__)


class MetricSums:
    """
    Metrics as sums over micro-batches and processes, divided when they are logged: a mean of micro-batch means would
    depend on how the batch is cut.
    """

    def __init__(self):
        self.sums = {"train": {}, "eval": {}}

    def add(self, mode: str, prefix: str, metrics: dict[str, Ratio], accelerator: Accelerator) -> None:
        """
        Add a micro-batch of every process. All have to bring the same names.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
            prefix (`str`):
                Goes before each name.
            metrics (`dict[str, tuple]`):
                Name to numerator and denominator, numbers or scalar tensors.
            accelerator ([`~accelerate.Accelerator`]):
                Gathers the sums.
        """
        device = accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        values = [torch.as_tensor(value, device=device).to(dtype) for pair in metrics.values() for value in pair]
        values = accelerator.gather(torch.stack(values)[None]).sum(0).view(-1, 2).tolist()
        for name, (numerator, denominator) in zip(metrics, values, strict=True):
            total = self.sums[mode].setdefault(prefix + name, [0.0, 0.0])
            total[0], total[1] = total[0] + numerator, total[1] + denominator

    def take(self, mode: str) -> dict[str, float]:
        """The metrics since the last call; one whose denominator is zero is left out."""
        sums, self.sums[mode] = self.sums[mode], {}
        if mode == "train" and sums.get("nll", (0, 1))[1] == 0:
            logger.warning("No token was in the loss since the last log: nothing was learned. Check the labels.")
        return {name: numerator / denominator for name, (numerator, denominator) in sums.items() if denominator != 0}
