"""Normalisation of a sample's channels by fixed numbers, as expected by pretrained networks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# mean and standard deviation of ImageNet's values in [0, 1], as used by all networks of torchvision and most of timm
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class ChannelNorm(nn.Module):
    """(x - mean) / std of each channel, (B, C, ...) -> (B, C, ...).

    The numbers are part of a model's configuration and are not saved with its weights.

    Args:
        mean: mean of each channel.
        std: standard deviation of each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean.to(x)) / self.std.to(x)

    def inverse(self, x: Tensor) -> Tensor:
        """Restore the sample before normalisation, (B, C, ...) -> (B, C, ...)."""
        return x * self.std.to(x) + self.mean.to(x)
