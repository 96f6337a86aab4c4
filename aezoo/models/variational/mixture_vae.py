"""VAE with a mixture of Gaussians as prior (Jiang et al. 2016), https://arxiv.org/abs/1611.05148

    L = E_q[-log p(x|z)] + beta E_q[log q(z|x) - log p(z)]     q(z|x) = N(mu(x), diag sigma(x)^2)
    p(z) = sum_k w_k N(z | m_k, diag s_k^2)                    w, m, s learned with the rest

in nats per sample. The KL to a mixture has no closed form: both densities are taken at the one z that is decoded. With
equal weights this is the prior MoG of Tomczak & Welling 2017, https://arxiv.org/abs/1705.07120. K = 1 with m = 0 and
s = 1 is the VAE. The start has the mean and the covariance of N(0, I), up to chance.

The score is free of noise: in place of the KL it takes the bound KL(q || p) <= -log sum_k w_k exp(-KL(q || p_k)) of
Hershey & Olsen 2007, https://doi.org/10.1109/ICASSP.2007.366913, an equality for K = 1.

Shapes: B batch, D code, K components, N codes.
"""

import math

import torch
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.errors import AezooError
from aezoo.gaussians import LOG_2PI
from aezoo.models.variational.vae import VAE

# of the differences between codes and components that are held at a time: 64 MiB
_MOST_VALUES = 2**24


class MixtureVAE(VAE):
    """Gaussian code whose prior is a learned mixture of Gaussians.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        latent_dim: D, size of the code.
        n_components: K, Gaussians of the prior.
        beta: weight of the KL term.
        net: mlp, conv, resnet, convnext, conv_keras, unet, gdn, dc, vit, mixer, lstm or transformer.
        hidden_dims: widths of the encoder's layers (mlp) or channels of its stages; the decoder mirrors them.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus, identity or (mlp) gated, between layers.
        likelihood: how outputs are compared with data: bernoulli, continuous_bernoulli, gaussian, gaussian:0.1,
            gaussian:learned, laplace, discretised_logistic, beta_binomial, logcosh, logit_laplace.
        lr: learning rate.
        optimizer: adam, adamw, adamax, nadam, radam, rmsprop, adagrad, adadelta or sgd; also adam:beta1=0.5,eps=1e-4.
        weight_decay: the optimiser's weight decay.
        lr_schedule: constant, cosine, linear, exponential, step or multistep:FACTOR@P,P, from warm-up to the last step.
        warmup_steps: optimiser steps over which the learning rate rises linearly.
    """

    normal_prior = False

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        n_components: int = 10,
        beta: float = 1.0,
        net: str = "mlp",
        hidden_dims: tuple[int, ...] = (400,),
        activation: str = "relu",
        likelihood: str = "bernoulli",
        lr: float = 1e-3,
        optimizer: str = "adam",
        weight_decay: float = 0.0,
        lr_schedule: str = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(
            input_shape,
            latent_dim=latent_dim,
            beta=beta,
            net=net,
            hidden_dims=hidden_dims,
            activation=activation,
            likelihood=likelihood,
            lr=lr,
            optimizer=optimizer,
            weight_decay=weight_decay,
            lr_schedule=lr_schedule,
            warmup_steps=warmup_steps,
        )
        self.save_hyperparameters()
        # the sampled KL may be negative, at no distance from a capacity
        del self.capacity
        if n_components < 1:
            raise AezooError(f"n_components must be at least 1, got {n_components}")
        self.n_components = n_components
        self.weight_K = nn.Parameter(torch.zeros(n_components))
        self.mean_KD = nn.Parameter(math.sqrt(0.5) * torch.randn(n_components, latent_dim))
        self.log_var_KD = nn.Parameter(torch.full((n_components, latent_dim), math.log(0.5)))

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights, means and log-variances of the prior's Gaussians: (K,), (K, D), (K, D)."""
        weight_K, mean_KD, log_var_KD = map(at_least_float32, (self.weight_K, self.mean_KD, self.log_var_KD))
        return weight_K.log_softmax(0), mean_KD, log_var_KD.clamp(-30, 20)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_1BD, log_q_1B = self.sample_posterior(x, 1)
        nll = self.nll(self.decoder(z_1BD[0].to(x.dtype)), x).mean()
        kl = (log_q_1B - self.log_prior(z_1BD)).mean()
        return {"loss": nll + self.beta * kl, "nll": nll, "kl": kl, "elbo": -(nll + kl)}

    def log_joint(self, mu_ND: Tensor, var_ND: Tensor) -> Tensor:
        """Mean of log w_k N(z | m_k, diag s_k^2) over z ~ N(mu, diag var), in nats: (N, D), (N, D) -> (N, K)."""
        log_w_K, mean_KD, log_var_KD = self.components()
        step = max(1, _MOST_VALUES // mean_KD.numel())
        log_p_NK = [
            -0.5 * (((mu_ND[:, None] - mean_KD) ** 2 + var_ND[:, None]) / log_var_KD.exp() + log_var_KD).sum(2)
            for mu_ND, var_ND in zip(mu_ND.split(step), var_ND.split(step), strict=True)
        ]
        return log_w_K + torch.cat(log_p_NK) - 0.5 * LOG_2PI * mean_KD.shape[1]

    def log_prior(self, z: Tensor) -> Tensor:
        z_ND = at_least_float32(z).reshape(-1, z.shape[-1])
        return torch.logsumexp(self.log_joint(z_ND, torch.zeros_like(z_ND)), 1).reshape(z.shape[:-1])

    @torch.no_grad()
    def sample_prior(self, n: int) -> Tensor:
        log_w_K, mean_KD, log_var_KD = self.components()
        k_N = torch.multinomial(log_w_K.exp(), n, replacement=True)
        z_ND = mean_KD[k_N] + torch.exp(0.5 * log_var_KD[k_N]) * torch.randn_like(mean_KD[k_N])
        return z_ND.to(next(self.decoder.parameters()).dtype)

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """-log p(x | mu) and the bound on the KL above, in nats: (B, *input_shape) -> (B,), no noise."""
        mu_BD, log_var_BD = self.posterior(x)
        log_q_B = -0.5 * (1 + log_var_BD + LOG_2PI).sum(1)  # its mean over q
        kl_B = log_q_B - torch.logsumexp(self.log_joint(mu_BD, log_var_BD.exp()), 1)
        return self.nll(self.decoder(mu_BD.to(x.dtype)), x) + kl_B
