"""Gaussians: samples with their density, and mixtures with full covariances.

Shapes: B batch, D code, K components.
"""

import math

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


def standard_normal_like(mu: Tensor) -> Tensor:
    """Draw from N(0, I), (B, ...) -> (B, ...); for a given seed, the noise does not depend on the memory layout."""
    return torch.randn_like(mu, memory_format=torch.contiguous_format)


def rsample(mu: Tensor, log_var: Tensor, *n: int) -> tuple[Tensor, Tensor]:
    """Draw reparameterised samples z ~ N(mu, diag exp(log_var)), and return their log-density in nats.

    Args:
        mu: means, (..., D).
        log_var: logarithms of the variances, (..., D).
        *n: number of draws, as the first dimensions of the results: (*n, ..., D), (*n, ...); one draw by default.
    """
    eps = torch.randn(*n, *mu.shape, device=mu.device, dtype=mu.dtype)
    return mu + torch.exp(0.5 * log_var) * eps, -0.5 * (eps**2 + log_var + LOG_2PI).sum(-1)


def product(mu: Tensor, log_var: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and log-variance of the normalised product of Gaussians; the means are weighted by the precisions.

    Args:
        mu: means, (..., M, D).
        log_var: logarithms of the variances, (..., M, D).
        mask: the Gaussians to multiply, at least one, (..., M) bool; by default all. Results are (..., D).
    """
    log_precision = -log_var if mask is None else torch.where(mask[..., None], -log_var, -torch.inf)
    return (log_precision.softmax(-2) * mu).sum(-2), -log_precision.logsumexp(-2)


def mixture_moments(mu: Tensor, log_var: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log-variance of each dimension of a mixture of Gaussians.

    Args:
        mu: means, (B, S, D).
        log_var: logarithms of the variances, (B, S, D).
        weight: S times the weight of each component, (B, S). Results are (B, D).
    """
    weight_BS1 = weight[..., None]
    mean_BD = (weight_BS1 * mu).mean(1)
    return mean_BD, (weight_BS1 * (log_var.exp() + (mu - mean_BD[:, None]) ** 2)).mean(1).log()


def product_of_posteriors(mu: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log-variances of p(z) prod_i N(z; mu_i, C_i) / p(z) with the prior p(z) = N(0, I).

    The precision is C^-1 = I + sum_i (C_i^-1 - I). Variances of C_i are clamped to at most 1, since posteriors have
    none above 1.

    Args:
        mu: means, (..., M, D).
        root: R_i with C_i = R_i^T R_i, (..., M, D, D). The results are (..., D).
    """
    exact = torch.float32 if mu.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    with torch.autocast(mu.device.type, enabled=False):
        _, scale, axes = torch.linalg.svd(root.to(exact))
        excess = axes.mT @ ((scale.clamp(1e-6, 1)[..., None] ** -2 - 1) * axes)
        covariance = torch.linalg.inv(torch.eye(mu.shape[-1]).to(excess) + excess.sum(-3))
        column = mu.to(exact)[..., None]
        mean = covariance @ (excess @ column + column).sum(-3)
        return mean[..., 0].to(mu.dtype), covariance.diagonal(dim1=-2, dim2=-1).log().to(mu.dtype)


def kl(mu: Tensor, log_var: Tensor, other_mu: Tensor, other_log_var: Tensor) -> Tensor:
    """Return KL(N(mu, diag exp(log_var)) || N(other_mu, diag exp(other_log_var))) in nats: (..., D) each -> (...)."""
    d2 = (mu - other_mu) ** 2 * torch.exp(-other_log_var)
    log_ratio = log_var - other_log_var
    return 0.5 * (log_ratio.exp() + d2 - 1 - log_ratio).sum(-1)


def mixture_log_density(z_BD: Tensor, phi_K: Tensor, mu_KD: Tensor, sigma_KDD: Tensor, jitter: float = 0.0) -> Tensor:
    """Return log sum_k phi_k N(z | mu_k, Sigma_k), (B, D) -> (B,), computed in float64 if the device supports it.

    The rounding error of Sigma_k is added to its diagonal, so that covariances of few samples have a Cholesky factor.

    Args:
        z_BD: points.
        phi_K: weights.
        mu_KD: means.
        sigma_KDD: covariances.
        jitter: added to the diagonals as well.
    """
    rounding_K1 = 4 * torch.finfo(sigma_KDD.dtype).eps * sigma_KDD.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    exact = torch.float32 if z_BD.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    with torch.autocast(z_BD.device.type, enabled=False):
        z, phi, mu, sigma = (values.to(exact) for values in (z_BD, phi_K, mu_KD, sigma_KDD))
        regularised = sigma + torch.diag_embed((jitter + rounding_K1).to(exact).expand_as(mu))
        L_KDD, failed_K = torch.linalg.cholesky_ex(regularised)
        # fails only if codes are NaN; the density is then NaN as well, which the fault guard detects
        L_KDD = L_KDD.masked_fill((failed_K > 0)[:, None, None], torch.nan)
        off_KDB = (z[:, None] - mu).permute(1, 2, 0)
        d2_KB = torch.linalg.solve_triangular(L_KDD, off_KDB, upper=False).square().sum(1)
        log_scale_K = phi.log() - L_KDD.diagonal(dim1=1, dim2=2).log().sum(1) - z.shape[1] / 2 * LOG_2PI
        return torch.logsumexp(log_scale_K[:, None] - 0.5 * d2_KB, 0).to(z_BD.dtype)


@torch.no_grad()
def update_mixture_(mixture: tuple[Tensor, ...], batch: tuple[Tensor, ...], weight: float) -> None:
    """Update the moments of a mixture in place to those of its union with a batch.

    Args:
        mixture: weights, means and covariances of earlier data: (K,), (K, D), (K, D, D).
        batch: the same moments of a batch.
        weight: fraction of the union that is the batch, from 0 to 1.
    """
    phi_K, mu_KD, sigma_KDD = mixture
    new_phi_K, new_mu_KD, new_sigma_KDD = (values.to(phi_K) for values in batch)
    share_K = (1 - weight) * phi_K + weight * new_phi_K
    new_K11 = (weight * new_phi_K / share_K)[:, None, None]
    off_K1D = (new_mu_KD - mu_KD)[:, None]
    sigma_KDD.lerp_(new_sigma_KDD, new_K11).add_(new_K11 * (1 - new_K11) * off_K1D * off_K1D.mT)
    mu_KD.add_((new_K11 * off_K1D)[:, 0])
    phi_K.copy_(share_K)
