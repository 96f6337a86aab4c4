"""DRAEM, a discriminatively trained reconstruction (Zavrtanik et al. 2021), https://arxiv.org/abs/2108.07610

The autoencoder learns to remove simulated anomalies, and a segmentation network learns to locate them from x~ and xhat:

    L = -log p(x | xhat) + w_ssim X (1 - SSIM(x, xhat)) + w_seg X mean_i -(1 - p_i)^2 log p_i
    xhat = g(f(x~))     x~ = (1 - M) x + M ((1 - b) x + b a)     b ~ U[0.1, 1]
    p_i: probability that the segmentation, a U-Net of (x~, xhat), assigns to the true class of pixel i, changed or
        unchanged

L is in nats per sample. With the Gaussian likelihood of variance 1/2, it is X times the authors' sum of means, plus a
constant. M is the mask where Perlin noise is above 1/2; half of the samples remain unchanged. In the paper, a is a
texture from other data. Here it is a colour between the smallest and the largest value of the sample (the paper's
homogeneous regions), or another sample of the batch, shifted. A pixel is labelled as changed only if x~ differs from x:
a black anomaly on a black background is invisible.

Windows of SSIM at the border use reflection padding. The authors pad with zeros, which are equal in both images, so 1 -
SSIM of the same networks is smaller and has less weight relative to -log p. In 1,200 steps on 32 x 32 crops of
photographs (batches of 8, means of three seeds; `python -m benchmarks.deviations`) the squared error of reconstructions
is 0.0296 per value, and 0.0269 with zero padding.

`anomaly_map` is the probability that a pixel was changed; the score is its maximum after a moving average (section
3.3).
Shapes: B batch, C channels, H height, W width, X = C H W.
"""

import itertools
import math
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import NetworkArgs, NetworkAutoencoder
from aezoo.errors import AezooError
from aezoo.nets.blocks.ssim import similarity
from aezoo.nets.unet import UNet
from aezoo.training.limits import check_at_least

_FINEST = 4  # width of the smallest cell in pixels
_MOST_HALVINGS = 5


def perlin(n: int, grid: tuple[int, ...], device: torch.device) -> Tensor:
    """Return gradient noise (Perlin 1985) from -1 to 1, on a separate lattice for each sample, (n, H, W).

    https://doi.org/10.1145/325165.325247

    Each dimension has 1, 2, 4 .. 32 cells of at least 4 pixels, and the lattice is rotated by up to 90 degrees, as in
    the paper.

    Args:
        n: number of samples.
        grid: (H, W).
        device: device of the noise.
    """
    halvings = min(_MOST_HALVINGS, int(math.log2(max(1, min(grid) // _FINEST))))
    side = 2**halvings + 1  # size of the lattice, which is periodic
    angle_BG = 2 * math.pi * torch.rand(n, side * side, device=device)
    cells_B2 = 2 ** (torch.rand(n, 2, device=device) * (halvings + 1)).floor()
    turn_B11 = math.pi * (torch.rand(n, 1, 1, device=device) - 0.5)
    i, j = ((torch.arange(length, device=device) + 0.5) / length - 0.5 for length in grid)
    cos, sin, i = turn_B11.cos(), turn_B11.sin(), i[:, None]
    u, v = (torch.stack([cos * i - sin * j, sin * i + cos * j]) + 0.5) * cells_B2.T[..., None, None]

    noise = torch.zeros_like(u)
    for du, dv in itertools.product((0, 1), repeat=2):
        corner = ((u.floor() + du) % side * side + (v.floor() + dv) % side).long()
        angle = angle_BG.gather(1, corner.flatten(1)).view_as(u)
        a, b = u - u.floor() - du, v - v.floor() - dv
        noise = noise + _fade(1 - a.abs()) * _fade(1 - b.abs()) * (a * angle.cos() + b * angle.sin())
    return math.sqrt(2) * noise


def _fade(t: Tensor) -> Tensor:
    """Return 6 t^5 - 15 t^4 + 10 t^3 (Perlin 2002, https://doi.org/10.1145/566654.566636)."""
    return t**3 * (t * (6 * t - 15) + 10)


class DRAEM(
    NetworkAutoencoder,
    hidden_dims={"unet": (16, 32)},
    defaults={"net": "unet", "likelihood": "gaussian"},
    tags=("anomaly",),
):
    """An autoencoder that removes simulated anomalies from images, and a network that segments them.

    Args:
        input_shape: (C, H, W).
        latent_dim: size of the code.
        ssim_weight: w_ssim, weight of the structural similarity; 0 for data outside of [0, 1].
        segmentation_weight: w_seg, weight of the segmentation's focal loss.
        source: content of the simulated anomalies, color or samples.
        window: side of the score's window in pixels, odd; 21 for the paper's images of 256 x 256.
        segmentation_dims: channels of the segmentation's stages.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus or identity, between layers.
        **kwargs: see `NetworkAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 32,
        ssim_weight: float = 1.0,
        segmentation_weight: float = 1.0,
        source: str = "color",
        window: int = 3,
        segmentation_dims: tuple[int, ...] = (16, 32),
        **kwargs: Unpack[NetworkArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        if len(self.input_shape) != 3 or min(self.input_shape[1:]) < 3:
            raise AezooError(f"draem takes images (C, H, W) of at least 3 x 3, got {self.input_shape}: use dense_ae")
        check_at_least(1, latent_dim=latent_dim, window=window, segmentation_dims=min(segmentation_dims, default=0))
        check_at_least(0, ssim_weight=ssim_weight, segmentation_weight=segmentation_weight)
        if source not in ("color", "samples"):
            raise AezooError(f"source is {source!r}: use color or samples")
        if window % 2 == 0:
            raise AezooError(f"window must be odd, got {window}")
        self.ssim_weight = ssim_weight
        self.segmentation_weight = segmentation_weight
        self.source = source
        self.window = window
        self.code_shape = (latent_dim,)
        self.encoder = self.build_encoder(self.code_shape)
        self.decoder = self.build_decoder(self.code_shape)
        channels, *grid = self.input_shape
        self.segmentation = UNet((2 * channels, *grid), 1, segmentation_dims, self.activation)

    def simulate_defects(self, x: Tensor) -> Tensor:
        """Return x~, in which half of the samples have simulated anomalies, (B, C, H, W) -> (B, C, H, W)."""
        hit_B, opacity_B = torch.rand(len(x), 2, 1, 1, 1, device=x.device).to(x.dtype).unbind(1)
        mask = (perlin(len(x), self.input_shape[1:], x.device)[:, None] > 0.5) & (hit_B < 0.5)
        if self.source == "color":
            low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
            a = torch.lerp(low, high, torch.rand(*x.shape[:2], 1, 1, device=x.device).to(x.dtype))
        else:
            places = (torch.arange(n, device=x.device) for n in x.shape[2:])
            rows, columns = (
                (place + (len(place) * torch.rand((), device=x.device)).long()) % len(place) for place in places
            )
            a = self.all_gather_batch(x).roll(1, 0)[self.local_rows(x)][:, :, rows][..., columns]
        return torch.where(mask, torch.lerp(x, a, 0.1 + 0.9 * opacity_B), x)

    def log_odds(self, x: Tensor, params: Tensor) -> Tensor:
        """Return the log-odds that each pixel was changed, given a sample and its reconstruction, (B, H, W)."""
        both = torch.cat([x, self.likelihood.mean(params).to(x.dtype)], 1)
        return at_least_float32(self.segmentation(both)).squeeze(1)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        damaged = self.simulate_defects(x)
        params = self.decoder(self.encoder(damaged))
        nll = self.nll(params, x).mean()

        x_dim, side = math.prod(self.input_shape), min(self.input_shape[1:])
        ssim_window = min(11, side - 1 + side % 2)
        with torch.autocast(x.device.type, enabled=False):  # variances are small differences of large numbers
            both = (at_least_float32(x), self.likelihood.mean(at_least_float32(params)))
            x_p, x_hat_p = (F.pad(image, (ssim_window // 2,) * 4, mode="reflect") for image in both)
            structure = x_dim * (1 - similarity(x_p, x_hat_p, ssim_window).mean())

        changed_BHW = (damaged != x).any(1).float()
        cross_entropy = F.binary_cross_entropy_with_logits(
            self.log_odds(damaged, params), changed_BHW, reduction="none"
        )
        segmentation = x_dim * (torch.expm1(-cross_entropy).square() * cross_entropy).mean()
        loss = nll + self.ssim_weight * structure + self.segmentation_weight * segmentation
        return {"loss": loss, "nll": nll, "structure": structure, "segmentation": segmentation}

    def anomaly_map(self, x: Tensor) -> Tensor:
        """Return the probability that each pixel is an anomaly, (B, C, H, W) -> (B, H, W)."""
        return self.log_odds(x, self.decoder(self.encode(x))).sigmoid()

    def score(self, x: Tensor) -> Tensor:
        """Return the largest mean of `anomaly_map` in a window, (B, C, H, W) -> (B,)."""
        return F.avg_pool2d(self.anomaly_map(x)[:, None], self.window, 1, self.window // 2).amax((1, 2, 3))
