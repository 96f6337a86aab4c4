"""Structural similarity of images (Wang et al. 2004), https://doi.org/10.1109/TIP.2003.819861

Shapes: B batch, C channels, H height, W width.
"""

import torch
from torch import Tensor

C1, C2 = 0.01**2, 0.03**2


def blur(x: Tensor, window: int) -> Tensor:
    """Return means under a Gaussian window, without padding: (B, C, H, W) -> (B, C, H - window + 1, W - window + 1)."""
    # products with banded matrices: a convolution with so few channels is a hundred times slower on a CPU, and on a
    # GPU it may round to TF32, with errors larger than the variance of a smooth patch
    sigma = 1.5 * window / 11
    for dim in (2, 3):
        place, start = (torch.arange(n, device=x.device) for n in (x.shape[dim], x.shape[dim] - window + 1))
        t = (place - start[:, None] - window // 2).to(x.dtype)
        band = torch.where(t.abs() <= window // 2, torch.exp(-(t**2) / (2 * sigma**2)), 0.0)
        band = band / band.sum(1, keepdim=True)
        x = band @ x if dim == 2 else x @ band.T
    return x


def similarity(x: Tensor, y: Tensor, window: int, luminance: bool = True) -> Tensor:
    """Return the SSIM of images in [0, 1] under each window, with or without the luminance factor (local means).

    (B, C, H, W), (B, C, H, W) -> (B, C, H - window + 1, W - window + 1), equations 12 and 13.
    """
    mu_x, mu_y = blur(x, window), blur(y, window)
    var_x, var_y, cov = blur(x * x, window) - mu_x**2, blur(y * y, window) - mu_y**2, blur(x * y, window) - mu_x * mu_y
    structure = (2 * cov + C2) / (var_x + var_y + C2)
    return structure * (2 * mu_x * mu_y + C1) / (mu_x**2 + mu_y**2 + C1) if luminance else structure
