"""JMVAE, the joint multimodal VAE (Suzuki et al. 2016), https://arxiv.org/abs/1611.01891

A sample consists of parts x = (x_1, ..., x_M), its modalities. A joint encoder encodes all parts together. Each part
also has a separate encoder, which is trained to approximate the joint one:

    q(z|x) = N(mu(x), diag sigma(x)^2)     q_i(z|x_i) = N(mu_i, diag sigma_i^2)     p(z) = N(0, I)

    L = E_q(z|x)[-sum_i log p(x_i|z)] + beta KL(q(z|x) || p(z)) + alpha sum_i KL(q(z|x) || q_i(z|x_i))

in nats per sample. This is the paper's JMVAE-kl, with a weight beta on its first KL. The encoders of the parts are
trained only by the last term, the decoders only by the first, and q(z|x) by all three. With alpha = 0, it is a VAE of
whole samples.

The code of one part comes from its encoder, and the code of all parts from q(z|x). The paper does not define the code
of several parts. Each q_i approximates p(z|x_i), which includes the prior, and a product of several must include the
prior only once:

    q(z|x_S) proportional to p(z) prod_(i in S) q_i(z|x_i) / p(z)     S: some of the parts
    1 / sigma_S^2 = 1 + sum_i (1 / sigma_i^2 - 1)     mu_S = sigma_S^2 sum_i mu_i / sigma_i^2

This equals p(z|x_S) if the q_i are the p(z|x_i), since the parts are independent given z. In that case no sigma_i is
above 1; a larger value is replaced by 1. MultiVae (https://github.com/AgatheSenellart/MultiVae) multiplies the q_i
without this correction. Its product includes the prior once for each part, so it is overconfident about codes near 0.

Shapes: B batch, D code, M parts.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from aezoo.bases.multimodal import Multimodal, MultimodalVAEArgs
from aezoo.distributions import gaussians
from aezoo.models.variational.vae import VAE
from aezoo.nets.blocks.levels import gaussian
from aezoo.training.limits import check_at_least


class JMVAE(Multimodal, VAE, tags=("multimodal", "imputation")):
    """A VAE of whole samples, with encoders of their parts that approximate its posterior.

    Args:
        beta: weight of the KL term between the posterior and the prior.
        alpha: weight of the KL terms between the posterior and the posteriors of the parts.
        **kwargs: see `VAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        alpha: float = 0.1,
        **kwargs: Unpack[MultimodalVAEArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(0, alpha=alpha)
        self.alpha = alpha
        # a capacity is a target for a single KL, but this loss has several
        del self.capacity
        self.build_parts(self.parts, self.net, self.hidden_dims, self.activation)
        self.joint_encoder = self.build_encoder((2 * self.latent_dim,))

    @staticmethod
    def product(mu_BSD: Tensor, log_var_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of p(z) prod_i q_i(z|x_i) / p(z): (B, S, D), (B, S, D) -> (B, D), (B, D)."""
        precision_BSD = torch.exp(-log_var_BSD.clamp(max=0))
        precision_BD = 1 + (precision_BSD - 1).sum(1)
        return (precision_BSD * mu_BSD).sum(1) / precision_BD, -precision_BD.log()

    def infer(self, x: Tensor, parts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        if parts is None or sorted(parts) == [*range(len(self.sizes))]:
            return gaussian(self.joint_encoder(x))
        mu_BSD, log_var_BSD = self.experts(x, parts)
        return (mu_BSD[:, 0], log_var_BSD[:, 0]) if len(parts) == 1 else self.product(mu_BSD, log_var_BSD)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BD, log_var_BD = self.infer(x)
        mu_BMD, log_var_BMD = self.experts(x)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * torch.randn_like(mu_BD)
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        kl = self.kl(mu_BD, log_var_BD).mean()
        parts_kl = gaussians.kl(mu_BD[:, None], log_var_BD[:, None], mu_BMD, log_var_BMD).sum(1).mean()
        loss = nll + self.beta * kl + self.alpha * parts_kl
        return {"loss": loss, "nll": nll, "kl": kl, "parts_kl": parts_kl, "elbo": -(nll + kl)}
