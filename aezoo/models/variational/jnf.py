"""JNF, the joint VAE with normalising flows for its parts (Senellart et al. 2023), https://arxiv.org/abs/2305.11832

A sample consists of parts x = (x_1, ..., x_M), its modalities. A joint encoder encodes all parts together. Each part
also has a separate encoder, followed by a flow, which is trained to approximate the joint one:

    q(z|x) = N(mu(x), diag sigma(x)^2)     p(z) = N(0, I)
    log q_i(z|x_i) = log N(f_i(z); mu_i, diag sigma_i^2) + log|det df_i/dz|     f_i: a masked autoregressive flow

    L = E_q(z|x)[-sum_i log p(x_i|z)] + beta KL(q(z|x) || p(z)) + sum_i E_sg(q)[log q(z|x) - log q_i(z|x_i)]

in nats per sample. In `jmvae`, q_i is Gaussian and pulls the joint VAE towards posteriors that q_i can match. Here the
last term trains only the q_i: sg stops gradients. The paper has two stages: first the joint VAE, then, with the joint
VAE frozen, -E_q[log q_i(z|x_i)], which has the same gradient for q_i. In a single run, the joint VAE is trained as
without the q_i, and the q_i follow it: a stationary point of the run is one of both stages. Without flow layers, q_i is
the same as in `jmvae`.

The code of all parts is the mean of q(z|x), and the code of one part is f_i^-1(mu_i). The code of several parts is the
mean of p(z) prod_i q_i(z|x_i) / p(z), which includes the prior once, where each q_i is approximated by a Gaussian
N(m_i, C_i):

    m_i = f_i^-1(mu_i)     C_i = sum_d a_d a_d^T     2 a_d = f_i^-1(mu_i + sigma_id e_d) - f_i^-1(mu_i - sigma_id e_d)
    C_S^-1 = I + sum_i (C_i^-1 - I)     m_S = C_S sum_i C_i^-1 m_i     variances of C_i above 1 are set to 1

This equals p(z|x_S) if the q_i are the p(z|x_i) and the f_i are affine. The paper draws samples from the exact density
by Hamiltonian Monte Carlo. MultiVae (https://github.com/AgatheSenellart/MultiVae) divides it by p(z) once for any
number of parts, which is correct only for two.

Shapes: B batch, D code, M parts, S of them that are used.
"""

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from aezoo.bases.multimodal import MultimodalVAEArgs
from aezoo.distributions import gaussians
from aezoo.distributions.gaussians import LOG_2PI
from aezoo.models.variational.jmvae import JMVAE
from aezoo.nets.blocks.flows import AutoregressiveFlow, check_n_flows
from aezoo.training.limits import check_at_least


class JNF(JMVAE, tags=("multimodal", "imputation")):
    """A VAE of whole samples, with flows that approximate its posterior given each of their parts.

    Args:
        n_flows: number of layers in each part's flow; 0 gives Gaussians.
        flow_width: hidden units of each layer's network, in each of two hidden layers.
        beta: weight of the KL term.
        **kwargs: see `JMVAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        n_flows: int = 2,
        flow_width: int = 64,
        **kwargs: Unpack[MultimodalVAEArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        del self.alpha
        check_n_flows(n_flows)
        check_at_least(1, flow_width=flow_width)
        self.flows = nn.ModuleList(AutoregressiveFlow(self.latent_dim, n_flows, flow_width) for _ in self.sizes)

    def log_experts(self, z_BD: Tensor, x: Tensor) -> Tensor:
        """Return log q_i(z|x_i) in nats for every part: (B, D), (B, *input_shape) -> (B, M)."""
        u_MBD, log_det_MB = zip(*(flow(z_BD) for flow in self.flows), strict=True)
        mu_BMD, log_var_BMD = self.experts(x)
        d2_BMD = (torch.stack(u_MBD, 1) - mu_BMD) ** 2 * torch.exp(-log_var_BMD)
        return torch.stack(log_det_MB, 1) - 0.5 * (d2_BMD + log_var_BMD + LOG_2PI).sum(2)

    def gaussian(self, i: int, mu_BD: Tensor, log_var_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return m_i, and the a_d as rows: (B, D), (B, D) -> (B, D), (B, D, D)."""
        d, std_BDD = mu_BD.shape[1], torch.diag_embed(torch.exp(0.5 * log_var_BD))
        u_BND = mu_BD[:, None] + torch.cat([torch.zeros_like(std_BDD[:, :1]), std_BDD, -std_BDD], 1)
        flow: Any = self.flows[i]
        m_B1D, above_BDD, below_BDD = flow.inverse(u_BND).split([1, d, d], 1)
        return m_B1D[:, 0], (above_BDD - below_BDD) / 2

    def infer(self, x: Tensor, parts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        if parts is None or len(parts) == len(self.sizes):
            return super().infer(x, parts)
        own = zip(parts, *(values.unbind(1) for values in self.experts(x, parts)), strict=True)
        m, a = (torch.stack(values, 1) for values in zip(*(self.gaussian(*each) for each in own), strict=True))
        if len(parts) > 1:
            return gaussians.product_of_posteriors(m, a)
        return m[:, 0], (a[:, 0] ** 2).sum(1).clamp_min(1e-12).log()

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BD, log_var_BD = self.infer(x)
        eps_BD = torch.randn_like(mu_BD)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * eps_BD
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        kl = self.kl(mu_BD, log_var_BD).mean()
        log_q_B = -0.5 * (eps_BD**2 + log_var_BD.detach() + LOG_2PI).sum(1)
        parts_kl = (log_q_B[:, None] - self.log_experts(z_BD.detach(), x)).sum(1).mean()
        loss = nll + self.beta * kl + parts_kl
        return {"loss": loss, "nll": nll, "kl": kl, "parts_kl": parts_kl, "elbo": -(nll + kl)}
