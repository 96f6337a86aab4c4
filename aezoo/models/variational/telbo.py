"""TELBO, the triple ELBO (Vedantam et al. 2018), https://arxiv.org/abs/1705.10762

A sample consists of parts x = (x_1, ..., x_M), its modalities. A joint encoder encodes all parts together. Each part
also has a separate encoder, an expert that is multiplied with the prior:

    q(z|x) = N(mu(x), diag sigma(x)^2)     q_i(z|x_i) = N(mu_i, diag sigma_i^2)     p(z) = N(0, I)
    q(z|x_S) proportional to p(z) prod_(i in S) q_i(z|x_i)     S: some of the parts, not all

    L = E_q(z|x)[-sum_i log p(x_i|z)] + beta KL(q(z|x) || p(z))
        + sum_i (gamma E_q(z|x_i)[-log p(x_i|z)] + beta KL(q(z|x_i) || p(z)))

in nats per sample. With beta = gamma = 1, these are the ELBO of all parts and the ELBO of each part: three ELBOs for
two parts. The terms nll, kl and elbo are those of all parts; `parts_nelbo` is the contribution of the other ELBOs to L.

The decoders, and the scale of a likelihood, are trained only by the first ELBO. In the others they are constant, so
that these fit the parts' encoders to the model's p(z|x_i), and not the model to the encoders. All ELBOs are trained
together, as in the authors' code (https://github.com/google/joint_vae, whose scripts set stop_elbox_gradient and
stop_elboy_gradient); that code uses the mean of the ELBOs, and has a weight for each likelihood. MultiVae
(https://github.com/AgatheSenellart/MultiVae) trains the parts' encoders in a second stage, with the other networks
frozen; here the other networks learn the same, since they get no gradient from these encoders. MultiVae computes the KL
of a part with the joint log-variance instead of the part's log-variance, which pulls sigma_i to 0.

The paper's products are over the attributes that are given; here they are over parts. If the q_i are the likelihoods
p(x_i|z), all of these products are exact, as in `mvae`.

Shapes: B batch, D code, M parts, S posteriors: given all parts, given each single part.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.bases.multimodal import Multimodal, MultimodalVAEArgs
from aezoo.models.variational.mvae import MVAE
from aezoo.models.variational.vae import VAE
from aezoo.nets.blocks.adversarial import call_frozen
from aezoo.nets.blocks.levels import gaussian
from aezoo.training.limits import check_at_least


class TELBO(Multimodal, VAE, tags=("multimodal", "imputation")):
    """A VAE of whole samples, with encoders of their parts that are trained on separate ELBOs.

    Args:
        beta: weight of the KL terms.
        gamma: weight of the likelihoods in the ELBOs of the parts.
        **kwargs: see `VAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        gamma: float = 1.0,
        **kwargs: Unpack[MultimodalVAEArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(0, gamma=gamma)
        self.gamma = gamma
        # a capacity is a target for a single KL, but this loss has several
        del self.capacity
        self.build_parts(self.parts, self.net, self.hidden_dims, self.activation)
        self.joint_encoder = self.build_encoder((2 * self.latent_dim,))

    def infer(self, x: Tensor, parts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        if parts is None or sorted(parts) == [*range(len(self.sizes))]:
            return gaussian(self.joint_encoder(x))
        return MVAE.product(*self.experts(x, parts))

    def frozen_decoder_nll(self, i: int, z_BD: Tensor, x: Tensor) -> Tensor:
        """Return -log p(x_i|z), with a gradient for z only: (B, D), (B, *part) -> (B,)."""
        params = call_frozen(self.decoder[i], z_BD.to(x.dtype))
        log_p_B: Tensor = call_frozen(self.likelihood, at_least_float32(params), at_least_float32(x))
        return -log_p_B

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        of_parts = MVAE.product(*(v[:, :, None] for v in self.experts(x)))
        mu_BSD, log_var_BSD = (
            torch.cat([whole[:, None], own], 1) for whole, own in zip(self.infer(x), of_parts, strict=True)
        )
        z_BSD = mu_BSD + torch.exp(0.5 * log_var_BSD) * torch.randn_like(mu_BSD)
        kl_BS = self.kl(mu_BSD.flatten(0, 1), log_var_BSD.flatten(0, 1)).unflatten(0, z_BSD.shape[:2])
        nll, kl = self.nll(self.decoder(z_BSD[:, 0].to(x.dtype)), x).mean(), kl_BS[:, 0].mean()
        own_nll_MB = [self.frozen_decoder_nll(i, z_BSD[:, 1 + i], x_i) for i, x_i in enumerate(self.split(x))]
        parts_nelbo = (self.gamma * torch.stack(own_nll_MB).sum(0) + self.beta * kl_BS[:, 1:].sum(1)).mean()
        loss = nll + self.beta * kl + parts_nelbo
        return {"loss": loss, "nll": nll, "kl": kl, "parts_nelbo": parts_nelbo, "elbo": -(nll + kl)}
