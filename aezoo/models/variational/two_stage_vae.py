"""Two-stage VAE (Dai & Wipf 2019), https://arxiv.org/abs/1903.05789

    L  = E_q[-log p(x|z)] + KL(q(z|x) || N(0, I))              first stage: a VAE of data
    L' = E_q'[-log p(z|u)] + KL(q'(u|z) || N(0, I))            second stage: a VAE of the first one's codes z ~ q(z|x)
    p(z|u) = N(g(u), s^2)     p(u) = N(0, I)                   u as wide as z; s learned, as in gaussian:learned

in nats per sample. If data lie on a manifold, the codes of a good first stage do not follow N(0, I). These codes have a
density in all dimensions, which the second stage learns (section 4). Sampling goes u -> z -> x with noise at z.

The paper trains the second stage after the first. Here both are trained in the same steps: L' uses z without its
gradient, so that the first stage has the same weights as without the second, and a fit needs no schedule of the stages.
Near the end of training, as the learning rate decreases, the codes that the second stage is trained on no longer
change.

elbo is that of the sampled model, E[log p(x|z) + log p(z|u) + log p(u) - log q(z|x) - log q'(u|z)], and log_likelihood
draws both u and z. The score is that of the first stage only.

Shapes: B batch, D code, N codes.
"""

from typing import Unpack

import torch
from torch import Tensor

from aezoo.bases.network import LatentArgs
from aezoo.distributions.gaussians import LOG_2PI
from aezoo.models.variational.vae import VAE


class TwoStageVAE(VAE, defaults={"likelihood": "gaussian:learned"}, normal_prior=False, tags=("generation",)):
    """A VAE of data and a VAE of its codes, trained together.

    Args:
        second_hidden_dims: widths of the second stage's encoder, an mlp; its decoder mirrors them.
        **kwargs: see `VAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        second_hidden_dims: tuple[int, ...] = (400, 400),
        **kwargs: Unpack[LatentArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        # both stages use their ELBO, so BetaAnnealing would change these without effect
        del self.beta, self.capacity
        self.second = VAE(
            self.code_shape,
            latent_dim=self.latent_dim,
            hidden_dims=second_hidden_dims,
            activation=self.activation,
            likelihood="gaussian:learned",
        )

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BD, log_var_BD = self.posterior(x)
        eps_BD = torch.randn_like(mu_BD)
        z_BD = (mu_BD + torch.exp(0.5 * log_var_BD) * eps_BD).to(x.dtype)
        nll, kl = self.nll(self.decoder(z_BD), x).mean(), self.kl(mu_BD, log_var_BD).mean()
        log_q = -0.5 * (eps_BD**2 + log_var_BD + LOG_2PI).sum(1).mean()
        second = self.second.loss(z_BD.detach())
        return {
            "loss": nll + kl + second["loss"],
            "nll": nll,
            "kl": kl,
            "code_nll": second["nll"],
            "code_kl": second["kl"],
            "elbo": second["elbo"] - nll - log_q,
        }

    def log_prior(self, z: Tensor) -> Tensor:
        """Log of an unbiased estimate of p(z), p(z|u) p(u) / q'(u|z) at one u ~ q'(u|z): (..., D) -> (...)."""
        z_ND = z.reshape(-1, z.shape[-1]).to(next(self.second.parameters()).dtype)
        return self.second.log_likelihood(z_ND, 1).reshape(z.shape[:-1])

    @torch.no_grad()
    def sample_prior(self, n: int) -> Tensor:
        return self.second.likelihood.sample(self.second.decoder(self.second.sample_prior(n)))
