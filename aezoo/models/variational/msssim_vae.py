"""VAE with a multiscale structural similarity (Snell et al. 2015), https://arxiv.org/abs/1511.06409

    L = E_q[weight (1 - MS-SSIM(x, xhat))] + beta KL(q(z|x) || p(z))     xhat = g(z)
    MS-SSIM = l_M^a_M prod_m cs_m^a_m      cs = mean of (2 cov(x, y) + c2) / (var x + var y + c2)
    l cs = mean of (2 mu_x mu_y + c1) / (mu_x^2 + mu_y^2 + c1) times that     at the coarsest scale M

(Wang et al. 2003, https://doi.org/10.1109/ACSSC.2003.1292216), with local means mu and covariances under a Gaussian
window. Images are in [0, 1], and their size is halved at each scale. Of the five scales, those whose images are at
least as large as the window are used, and their exponents a_m are normalised to sum to 1; a window larger than the
image is reduced to the image's size. For example, 28 x 28 has two scales with 11 x 11 windows or three with 7 x 7, and
192 x 192 has all five. Windows lie inside the image, and at scale M also on its reflection.

exp(-weight (1 - MS-SSIM)) is a density up to an unknown constant, so no ELBO or log-likelihood is reported.

Shapes: B batch, C channels, H height, W width, D code.
"""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.errors import AezooError
from aezoo.models.variational.vae import VAE, VAEArgs
from aezoo.nets.blocks.ssim import similarity
from aezoo.training.limits import check_above

EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, section 4
_LEAST = 0.01  # minimum similarity for which the root is used unchanged


class MSSSIMVAE(VAE, tags=("generation",)):
    """A VAE of images that compares their local structure at several scales.

    Args:
        input_shape: (C, H, W), both sides at least 3.
        weight: nats for a reconstruction that has nothing in common with the image.
        scales: maximum number of scales, each half as large as the one before; fewer if the window does not fit into
            the image.
        window: maximum width of the Gaussian window in pixels, odd.
        likelihood: whose mean of the decoder's output is the reconstruction, see vae; the rest of it is not used. Data
            outside of [0, 1] need gaussian.
        **kwargs: see `VAE`.
    """

    log_likelihood = None  # type: ignore[assignment]  # the constant of the density is not known

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        weight: float = 300.0,
        scales: int = 5,
        window: int = 11,
        **kwargs: Unpack[VAEArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        self.likelihood.requires_grad_(False)  # no term reads a scale
        if len(self.input_shape) != 3 or min(self.input_shape[1:]) < 3:
            raise AezooError(f"msssim_vae takes images (C, H, W) of at least 3 x 3, got {self.input_shape}: use vae")
        check_above(0, weight=weight)
        if not 1 <= scales <= len(EXPONENTS):
            raise AezooError(f"scales must be from 1 to {len(EXPONENTS)}, got {scales}")
        if window < 3 or window % 2 == 0:
            raise AezooError(f"window must be odd and at least 3, got {window}")
        side = min(self.input_shape[1:])
        self.weight = weight
        self.window = min(window, side - 1 + side % 2)
        self.scales = sum(side // 2**m >= self.window for m in range(scales))

    def ms_ssim(self, x: Tensor, y: Tensor) -> Tensor:
        """MS-SSIM of each pair of images, (B, C, H, W), (B, C, H, W) -> (B,); 1 for equal images."""
        exponents = [a / sum(EXPONENTS[: self.scales]) for a in EXPONENTS[: self.scales]]
        product = x.new_ones(len(x))
        for m, a in enumerate(exponents):
            coarsest, pad = m == self.scales - 1, self.window // 2
            if coarsest:
                x, y = (F.pad(image, (pad,) * 4, mode="reflect") for image in (x, y))
            product = product * _positive(similarity(x, y, self.window, coarsest).mean((1, 2, 3))) ** a
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        return product

    def nll(self, params: Tensor, x: Tensor) -> Tensor:
        """Return the weighted distance, which replaces -log p(x|z): (B, *shape), (B, *shape) -> (B,)."""
        with torch.autocast(x.device.type, enabled=False):  # variances are small differences
            x_hat = self.likelihood.mean(at_least_float32(params))
            return self.weight * (1 - self.ms_ssim(x_hat, at_least_float32(x)))

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BD, log_var_BD = self.posterior(x)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * torch.randn_like(mu_BD)
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        kl = self.mean_kl(self.kl(mu_BD, log_var_BD))
        return {"loss": nll + self.beta * (kl - self.capacity).abs(), "nll": nll, "kl": kl}


def _positive(similarity: Tensor) -> Tensor:
    """Replace values below 0.01 by a hyperbola: the root of a negative value and its gradient at 0 are undefined."""
    far = _LEAST**2 / (2 * _LEAST - similarity.clamp(max=_LEAST))
    return torch.where(similarity > _LEAST, similarity, far)
