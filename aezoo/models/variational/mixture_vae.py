"""VAE with a mixture of Gaussians as prior (Jiang et al. 2016), https://arxiv.org/abs/1611.05148

    L = E_q[-log p(x|z)] + beta E_q[log q(z|x) - log p(z)]     q(z|x) = N(mu(x), diag sigma(x)^2)
    p(z) = sum_k w_k N(z | m_k, diag s_k^2)                    w, m, s learned with the rest

in nats per sample. The KL to a mixture has no closed form: both densities are evaluated at the z that is decoded. With
equal weights this is the prior MoG of Tomczak & Welling 2017, https://arxiv.org/abs/1705.07120. K = 1 with m = 0 and
s = 1 is the VAE. The initial prior has the mean and the covariance of N(0, I), up to chance.

The score has no noise: instead of the KL it uses the bound KL(q || p) <= -log sum_k w_k exp(-KL(q || p_k)) of Hershey &
Olsen 2007, https://doi.org/10.1109/ICASSP.2007.366913, which is an equality for K = 1.

Shapes: B batch, D code, K components.
"""

import torch
from torch import Tensor

from aezoo.bases.mixture_prior import MixturePrior
from aezoo.distributions.gaussians import LOG_2PI
from aezoo.models.variational.vae import VAE


class MixtureVAE(MixturePrior, VAE):
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
        # the sampled KL may be negative, so there is no distance from a capacity
        del self.capacity
        self.build_mixture(n_components, latent_dim)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_1BD, log_q_1B = self.sample_posterior(x, 1)
        nll = self.nll(self.decoder(z_1BD[0].to(x.dtype)), x).mean()
        kl = (log_q_1B - self.log_prior(z_1BD)).mean()
        return {"loss": nll + self.beta * kl, "nll": nll, "kl": kl, "elbo": -(nll + kl)}

    def log_prior(self, z: Tensor) -> Tensor:
        return self.mixture_log_prob(z)

    def sample_prior(self, n: int) -> Tensor:
        return self.sample_mixture(n).to(next(self.decoder.parameters()).dtype)

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """-log p(x | mu) plus the bound on the KL above, in nats: (B, *input_shape) -> (B,), no noise."""
        mu_BD, log_var_BD = self.posterior(x)
        log_q_B = -0.5 * (1 + log_var_BD + LOG_2PI).sum(1)  # its mean over q
        kl_B = log_q_B - torch.logsumexp(self.log_joint(mu_BD, log_var_BD.exp()), 1)
        return self.nll(self.decoder(mu_BD.to(x.dtype)), x) + kl_B
