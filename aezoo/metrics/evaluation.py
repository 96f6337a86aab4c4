"""What validation and test report: exact means of the loss terms, and reconstruction quality by torchmetrics."""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

# half the width of torchmetrics' Gaussian window of sigma 1.5: SSIM pads by it, and a smaller image cannot be padded
_SSIM_MARGIN = 5


class Means:
    """Means of named scalars over samples: batches of any size, all ranks, kept on the device without a sync a step."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, terms: dict[str, Tensor], count: int) -> None:
        """Add means over `count` samples."""
        for name, value in terms.items():
            value = value.detach().double() if value.device.type != "mps" else value.detach()
            self._sums[name] = self._sums[name] + value * count if name in self._sums else value * count
        self._count += count

    def compute(self) -> dict[str, Tensor]:
        """The mean of each name over all samples of all ranks, as float32 scalars."""
        if not self._sums:
            return {}
        values = torch.stack([*self._sums.values()])
        count = torch.tensor(float(self._count), dtype=values.dtype, device=values.device)
        packed = torch.cat([values, count[None]])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(packed)
        means = (packed[:-1] / packed[-1]).float()
        return dict(zip(self._sums, means.unbind(), strict=True))

    def reset(self) -> None:
        """Forget everything."""
        self._sums, self._count = {}, 0


class Evaluation:
    """Loss terms, mse and psnr of any data, ssim of images; bits per dimension where the terms have an `elbo`.

    A deterministic model's nll is no bound on log p(x), since its code costs nothing, so it gets no bits per dimension.

    PSNR and SSIM take the data range as 1, the range of data scaled to [0, 1]; outputs are not clipped.

    Args:
        input_shape: shape of one sample; ssim is reported for (C, H, W) with both sides above 5.
        device: where the data are.
    """

    def __init__(self, input_shape: tuple[int, ...], device: torch.device) -> None:
        self._means = Means()
        self._dims = math.prod(input_shape)
        self._metrics: dict[str, Metric] = {"mse": MeanSquaredError(), "psnr": PeakSignalNoiseRatio(data_range=1.0)}
        if len(input_shape) == 3 and min(input_shape[1:]) > _SSIM_MARGIN:
            self._metrics["ssim"] = StructuralSimilarityIndexMeasure(data_range=1.0)
        for metric in self._metrics.values():
            metric.to(device)

    def add(self, terms: dict[str, Tensor], x: Tensor, x_hat: Tensor) -> None:
        """Add one batch: its loss terms (means over the batch), its samples and their reconstructions."""
        self._means.add(terms, len(x))
        for metric in self._metrics.values():
            metric.update(x_hat.float().contiguous(), x.float().contiguous())

    def compute(self) -> dict[str, Tensor]:
        """All figures over all samples of all ranks."""
        figures = self._means.compute()
        if "elbo" in figures:
            figures["bits_per_dim"] = -figures["elbo"] / (self._dims * math.log(2.0))
        return figures | {name: metric.compute() for name, metric in self._metrics.items()}
