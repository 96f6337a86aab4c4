"""Importance weighted autoencoder (Burda et al. 2015), https://arxiv.org/abs/1509.00519

Maximises a bound on log p(x) that tightens with the number K of importance samples, in nats per sample:

    log p(x) >= L_K = E[log 1/K sum_k w_k]     w_k = p(x|z_k) p(z_k) / q(z_k|x)     z_k ~ q(z|x) independently

With v_k = w_k / sum_j w_j the decoder's gradient is sum_k v_k d log w_k for every `estimator`. The encoder's is

    reparam   sum_k v_k d log w_k                    through all of q; its signal-to-noise ratio falls as K grows
    stl       sum_k v_k (d log w_k / dz_k) dz_k      Roeder et al. 2017, https://arxiv.org/abs/1703.09194
    dreg      sum_k v_k^2 (d log w_k / dz_k) dz_k    Tucker et al. 2018, https://arxiv.org/abs/1810.04152

reparam and dreg have the same mean; stl is biased for K > 1 (Tucker et al. 2018). The loss is -L_K for all three.

Shapes: B batch, D code, K importance samples.
"""

import math
from typing import Unpack

import torch
from torch import Tensor

from aezoo.bases.network import LatentArgs
from aezoo.distributions.gaussians import LOG_2PI
from aezoo.errors import AezooError
from aezoo.models.variational.vae import VAE

ESTIMATORS = ("reparam", "stl", "dreg")
# maximum number of importance samples per data sample, each of which is decoded
MOST_SAMPLES = 10_000


class IWAEArgs(LatentArgs, total=False):
    """Arguments of `IWAE`."""

    n_samples: int
    estimator: str


class IWAE(VAE, tags=("generation",)):
    """Gaussian code with a standard normal prior, trained on the importance weighted bound.

    Args:
        n_samples: K, number of importance samples per data sample; each is decoded.
        estimator: the encoder's gradient: reparam, stl or dreg; the last two are less noisy.
        **kwargs: see `VAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        n_samples: int = 5,
        estimator: str = "reparam",
        **kwargs: Unpack[LatentArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        # the bound has no KL weight, so BetaAnnealing would change these without effect
        del self.beta, self.capacity
        if not 1 <= n_samples <= MOST_SAMPLES:
            raise AezooError(f"n_samples must be from 1 to {MOST_SAMPLES}, got {n_samples}")
        if estimator not in ESTIMATORS:
            raise AezooError(f"unknown estimator {estimator!r}: choose from {', '.join(ESTIMATORS)}")
        self.n_samples = n_samples
        self.estimator = estimator

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_BKD, nll_BK, kl_BK = self.draw(x, self.n_samples)
        log_w_BK = -(nll_BK + kl_BK)
        if self.estimator == "dreg":
            self.scale_gradient(z_BKD, log_w_BK.detach().softmax(1))  # stl's v_k becomes v_k^2
        bound = (torch.logsumexp(log_w_BK, 1) - math.log(self.n_samples)).mean()
        return {"loss": -bound, "nll": nll_BK.mean(), "kl": kl_BK.mean(), "elbo": bound}

    def draw(self, x: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes z ~ q(z|x), -log p(x|z) and log q(z|x) - log p(z): (B, *input_shape) -> (B, n, D), (B, n), (B, n).

        Unless the estimator is reparam, log q has a gradient in q's parameters only through z.
        """
        mu_BD, log_var_BD = self.posterior(x)
        mu_B1D, log_var_B1D = mu_BD[:, None], log_var_BD[:, None]
        std_B1D = torch.exp(0.5 * log_var_B1D)
        eps_BKD = torch.randn(len(x), n, *self.code_shape, device=mu_BD.device, dtype=mu_BD.dtype)
        z_BKD = mu_B1D + std_B1D * eps_BKD
        nll_BK = self.nll_given(x, z_BKD)
        if self.estimator != "reparam":
            # (z - mu) / sigma with constant mu and sigma, without the rounding error of the difference at a small sigma
            eps_BKD = eps_BKD + (z_BKD - z_BKD.detach()) / std_B1D.detach()
            log_var_B1D = log_var_B1D.detach()
        log_q_BK = -0.5 * (eps_BKD**2 + log_var_B1D + LOG_2PI).sum(2)
        return z_BKD, nll_BK, log_q_BK - self.log_prior(z_BKD)

    def nll_given(self, x: Tensor, z_BKD: Tensor) -> Tensor:
        """Return -log p(x|z) for several codes of each sample: (B, *input_shape), (B, K, D) -> (B, K)."""
        b, k, _ = z_BKD.shape
        x_BK = x[:, None].expand(b, k, *x.shape[1:]).flatten(0, 1)
        return self.nll(self.decoder(z_BKD.flatten(0, 1).to(x.dtype)), x_BK).unflatten(0, (b, k))

    @staticmethod
    def scale_gradient(z_BKD: Tensor, factor_BK: Tensor) -> None:
        """Scale the gradient with respect to z for the encoder; the decoder's gradient and all values do not change."""
        if z_BKD.requires_grad:
            z_BKD.register_hook(lambda gradient: gradient * factor_BK[..., None])
