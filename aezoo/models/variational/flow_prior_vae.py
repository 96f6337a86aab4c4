"""VAE with a normalising-flow prior (Dinh et al. 2016), https://arxiv.org/abs/1605.08803

    L = E_q[-log p(x|z)] + beta E_q[log q(z|x) - log p(z)]     q(z|x) = N(mu(x), diag sigma(x)^2)
      = E_q[-log p(x|z)] + beta (KL(q(z|x) || N(0, I)) + E_q[log N(z | 0, I) - log p(z)])
    log p(z) = log N(u | 0, I) + sum_t sum_i a_ti              u = f_T(... f_1(z)), learned with the rest
    f_t(z)_i = z_i exp(a_ti(z)) + m_ti(z)                      a and m depend on elements of z that f_t inverts before i

in nats per sample. In a coupling layer (realnvp), these elements are every second one, and they remain unchanged. In a
masked autoregressive flow (maf: Papamakarios et al. 2017, https://arxiv.org/abs/1705.07057), they are all elements
before i. Layers alternate between two orders. Sampling inverts the layers, z = f^-1(u) with u ~ N(0, I), which takes
two passes through the networks of a realnvp and D passes through those of a maf. Both are implemented here, because
zuko's coupling layers wait for the GPU at every step and break the compiled graph. a = m = 0 is the VAE.

The second form of L is computed; it is the VAE's loss if f is the identity. The score, which has no noise, uses this
form at z = mu.

Shapes: B batch, D code, H hidden units.
"""

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.errors import AezooError
from aezoo.models.variational.vae import VAE, VAEArgs
from aezoo.nets.blocks.flows import AffineLayer, check_n_flows
from aezoo.training.limits import check_at_least

PRIORS = ("realnvp", "maf")


class FlowPriorVAE(VAE, normal_prior=False, tags=("generation",)):
    """Gaussian code whose prior is a learned normalising flow.

    Args:
        prior: realnvp or maf; the first draws samples faster, the second is more flexible.
        n_flows: number of layers in the flow; 0 is the VAE, and a realnvp needs two to transform all elements.
        flow_width: hidden units of each layer's network, in each of its two hidden layers.
        **kwargs: see `VAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        prior: str = "realnvp",
        n_flows: int = 4,
        flow_width: int = 64,
        **kwargs: Unpack[VAEArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        # the sampled KL may be negative, so its distance from a capacity would be meaningless
        del self.capacity
        if prior not in PRIORS:
            raise AezooError(f"unknown prior {prior!r}: choose from {', '.join(PRIORS)}")
        check_n_flows(n_flows)
        check_at_least(1, flow_width=flow_width)
        order_D = torch.arange(self.latent_dim)
        turns = (order_D % 2, (order_D + 1) % 2) if prior == "realnvp" else (order_D, order_D.flip(0))
        self.flow = nn.ModuleList(AffineLayer(turns[t % 2], prior == "realnvp", flow_width) for t in range(n_flows))

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BD, log_var_BD = self.posterior(x)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * torch.randn_like(mu_BD)
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        kl = (self.kl(mu_BD, log_var_BD) + super().log_prior(z_BD) - self.log_prior(z_BD)).mean()
        return {"loss": nll + self.beta * kl, "nll": nll, "kl": kl, "elbo": -(nll + kl)}

    def log_prior(self, z: Tensor) -> Tensor:
        u, log_det = at_least_float32(z), torch.zeros(z.shape[:-1], device=z.device)
        for layer in self.flow:
            u, log_det_t = layer(u)
            log_det = log_det + log_det_t
        return super().log_prior(u) + log_det

    @torch.no_grad()
    def sample_prior(self, n: int) -> Tensor:
        u = super().sample_prior(n)
        z = at_least_float32(u)
        layer: Any
        for layer in reversed(self.flow):
            z = layer.inverse(z)
        return z.to(u.dtype)

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """Return -log p(x | mu) plus the KL in the second form of L, in nats: (B, *input_shape) -> (B,), no noise."""
        mu_BD, log_var_BD = self.posterior(x)
        kl_B = self.kl(mu_BD, log_var_BD) + super().log_prior(mu_BD) - self.log_prior(mu_BD)
        return self.nll(self.decoder(mu_BD.to(x.dtype)), x) + kl_B
