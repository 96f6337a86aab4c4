"""A learned mixture of Gaussians as the prior of codes, or of some of their dimensions.

Shapes: D dimensions, K components, N codes.
"""

import math

import torch
from torch import Tensor, nn

from aezoo.autoencoder import Autoencoder, at_least_float32
from aezoo.distributions.gaussians import LOG_2PI
from aezoo.training.limits import check_at_least

# maximum number of differences between codes and components in memory: 64 MiB
_MAX_VALUES = 2**24


class MixturePrior(Autoencoder):
    """A model whose prior is or contains sum_k w_k N(m_k, diag s_k^2); its constructor calls `build_mixture`.

    Attributes:
        n_components: K.
        weight_K: logarithms of the w_k, up to a constant.
        mean_KD: the m_k.
        log_var_KD: logarithms of the s_k^2.
    """

    n_components: int
    weight_K: nn.Parameter
    mean_KD: nn.Parameter
    log_var_KD: nn.Parameter

    def build_mixture(self, n_components: int, size: int) -> None:
        """Initialise the mixture; its mean and covariance are those of N(0, I), up to chance."""
        check_at_least(1, n_components=n_components)
        self.n_components = n_components
        self.weight_K = nn.Parameter(torch.zeros(n_components))
        self.mean_KD = nn.Parameter(math.sqrt(0.5) * torch.randn(n_components, size))
        self.log_var_KD = nn.Parameter(torch.full((n_components, size), math.log(0.5)))

    def mixture(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-weights, means and log-variances of the Gaussians: (K,), (K, D), (K, D)."""
        weight_K, mean_KD, log_var_KD = map(at_least_float32, (self.weight_K, self.mean_KD, self.log_var_KD))
        return weight_K.log_softmax(0), mean_KD, log_var_KD.clamp(-30, 20)

    def log_joint(self, mu_ND: Tensor, var_ND: Tensor) -> Tensor:
        """Mean of log w_k N(z | m_k, diag s_k^2) over z ~ N(mu, diag var), in nats: (N, D), (N, D) -> (N, K)."""
        log_w_K, mean_KD, log_var_KD = self.mixture()
        step = max(1, _MAX_VALUES // mean_KD.numel())
        log_p_NK = [
            -0.5 * (((mu_ND[:, None] - mean_KD) ** 2 + var_ND[:, None]) / log_var_KD.exp() + log_var_KD).sum(2)
            for mu_ND, var_ND in zip(mu_ND.split(step), var_ND.split(step), strict=True)
        ]
        return log_w_K + torch.cat(log_p_NK) - 0.5 * LOG_2PI * mean_KD.shape[1]

    def mixture_log_prob(self, z: Tensor) -> Tensor:
        """Return the mixture's log-density in nats, (..., D) -> (...)."""
        z_ND = at_least_float32(z).reshape(-1, z.shape[-1])
        return torch.logsumexp(self.log_joint(z_ND, torch.zeros_like(z_ND)), 1).reshape(z.shape[:-1])

    @torch.no_grad()
    def sample_mixture(self, n: int) -> Tensor:
        """Draw n samples of the mixture, (n, D)."""
        log_w_K, mean_KD, log_var_KD = self.mixture()
        k_N = torch.multinomial(log_w_K.exp(), max(1, n), replacement=True)[:n]  # torch cannot draw zero samples
        return mean_KD[k_N] + torch.exp(0.5 * log_var_KD[k_N]) * torch.randn_like(mean_KD[k_N])
