"""VAE with a normalising-flow posterior (Rezende & Mohamed 2015), https://arxiv.org/abs/1505.05770

    L = E[-log p(x|z_T)] + beta E[log q_0(z_0|x) - sum_t log|det dz_t/dz_(t-1)| - log p(z_T)]
      = E[-log p(x|z_T)] + beta (KL(q_0 || p) + E[log p(z_0) - log p(z_T) - sum_t log|det dz_t/dz_(t-1)|])
    z_0 ~ q_0(z|x) = N(mu(x), diag sigma(x)^2)     z_t = f_t(z_(t-1); x)     p(z) = N(0, I)

in nats per sample. The second form is computed; it is the VAE's loss if the flow is the identity. In both papers, the
parameters of all T steps are outputs of the encoder for x, as are mu and sigma:

    planar      f(z) = z + u' tanh(w z + b)             u' = u + (m(w u) - w u) w / ||w||^2
    radial      f(z) = z + b' (z - c) / (a + ||z - c||)     a > 0, b' = a m(b)
    sylvester   f(z) = z + Q R tanh(S Q^T z + b)        van den Berg et al. 2018, https://arxiv.org/abs/1803.05649

with an increasing m > -1 that makes a step invertible (appendix A), Q a product of min(D, 8) Householder reflections,
and R and S upper triangular: see `aezoo.nets.blocks.flows`. If all parameters are 0, a step is the identity; T = 0 is
the VAE. The code of a sample is z_T for z_0 = mu; the score, which has no noise, uses the second form at this code.

Shapes: B batch, D code, K importance samples, T steps, P parameters of a step.
"""

from typing import Unpack

import torch
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.distributions import gaussians
from aezoo.errors import AezooError
from aezoo.models.variational.vae import VAE, VAEArgs
from aezoo.nets.blocks.flows import FLOWS, check_n_flows


class VAEFlow(VAE, normal_prior=False, tags=("generation",)):
    """Code with a normalising flow of invertible steps as posterior, and a standard normal prior.

    Args:
        flow: kind of the steps: planar, radial or sylvester; the last transforms all dimensions in one step.
        n_flows: T, number of steps; 0 is the VAE.
        **kwargs: see `VAE`.
    """

    def __init__(
        self, input_shape: tuple[int, ...], *, flow: str = "planar", n_flows: int = 8, **kwargs: Unpack[VAEArgs]
    ) -> None:
        super().__init__(input_shape, **kwargs)
        # the sampled KL may be negative, so its distance from a capacity would be meaningless
        del self.capacity
        if flow not in FLOWS:
            raise AezooError(f"unknown flow {flow!r}: choose from {', '.join(FLOWS)}")
        check_n_flows(n_flows)
        self.n_flows = n_flows
        self.step, size = FLOWS[flow]
        if n_flows:
            outputs = 2 * self.latent_dim + n_flows * size(self.latent_dim)
            self.encoder = self.build_encoder((outputs,))

    def amortised(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log-variance of q_0(z|x), parameters of the steps: (B, *input_shape) -> (B, D), (B, D), (B, T P)."""
        d = self.code_shape[0]
        mu_BD, log_var_BD, steps_BP = at_least_float32(self.encoder(x)).tensor_split((d, 2 * d), dim=1)
        return mu_BD, log_var_BD.clamp(-30, 20), steps_BP

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q_0(z|x), before the flow: (B, *input_shape) -> (B, D), (B, D)."""
        return self.amortised(x)[:2]

    def flow(self, z: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """z_T and the sum of the steps' log|det|: (..., B, D), (B, T P) -> (..., B, D), (..., B)."""
        log_det = torch.zeros_like(z[..., 0])
        for parameters_BP in steps.chunk(self.n_flows, 1) if self.n_flows else ():
            z, log_det_t = self.step(z, parameters_BP)
            log_det = log_det + log_det_t
        return z, log_det

    def encode(self, x: Tensor) -> Tensor:
        mu_BD, _, steps_BP = self.amortised(x)
        return self.flow(mu_BD, steps_BP)[0].to(x.dtype)

    def sample_posterior(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        mu_BD, log_var_BD, steps_BP = self.amortised(x)
        z0_KBD, log_q0_KB = gaussians.rsample(mu_BD, log_var_BD, n)
        z_KBD, log_det_KB = self.flow(z0_KBD, steps_BP)
        return z_KBD, log_q0_KB - log_det_KB

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BD, log_var_BD, steps_BP = self.amortised(x)
        z0_BD = mu_BD + torch.exp(0.5 * log_var_BD) * torch.randn_like(mu_BD)
        z_BD, log_det_B = self.flow(z0_BD, steps_BP)
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        change_B = self.log_prior(z0_BD) - self.log_prior(z_BD) - log_det_B
        kl = (self.kl(mu_BD, log_var_BD) + change_B).mean()
        return {"loss": nll + self.beta * kl, "nll": nll, "kl": kl, "elbo": -(nll + kl)}

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """-log p(x | z_T) plus the KL (second form), with z_0 = mu, in nats: (B, *input_shape) -> (B,), no noise."""
        mu_BD, log_var_BD, steps_BP = self.amortised(x)
        z_BD, log_det_B = self.flow(mu_BD, steps_BP)
        kl_B = self.kl(mu_BD, log_var_BD) + self.log_prior(mu_BD) - self.log_prior(z_BD) - log_det_B
        return self.nll(self.decoder(z_BD.to(x.dtype)), x) + kl_B
