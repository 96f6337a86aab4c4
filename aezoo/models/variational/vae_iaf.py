"""VAE with inverse autoregressive flow (Kingma et al. 2016), https://arxiv.org/abs/1606.04934

    L = E[-log p(x|z_T)] + beta E[log q_0(z_0|x) - sum_t sum_i log s_ti - log p(z_T)]
    z_0 ~ q_0(z|x) = N(mu(x), diag sigma(x)^2)     p(z) = N(0, I)
    z_t = s_t z_(t-1) + (1 - s_t) m_t     s_t = sigmoid(a_t + 1.5)     (m_t, a_t) = MADE_t(z_(t-1), h(x))

in nats per sample, computed as in vae_flow. m_ti and a_ti depend on the elements of z_(t-1) before i and on h, the
encoder's third output. The Jacobian of a step is therefore triangular with the s_t on its diagonal. The order of
dimensions is reversed after each step. The 1.5 keeps a step near the identity at the start (section 4, algorithm 1).
The networks are those of Germain et al. 2015, https://arxiv.org/abs/1502.03509: one hidden layer with units of degree 0
to D - 1; units of degree 0 depend only on h. T = 0 is the VAE.

Shapes: B batch, D code, K importance samples, H hidden units.
"""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.models.variational.vae import VAEArgs
from aezoo.models.variational.vae_flow import VAEFlow
from aezoo.nets.blocks.flows import MADE, check_n_flows
from aezoo.training.limits import check_at_least


class VAEIAF(VAEFlow, tags=("generation",)):
    """Code with a flow of autoregressive steps as posterior, and a standard normal prior.

    Args:
        n_flows: T, number of steps; 0 is the VAE.
        flow_width: H, number of hidden units of each step's network, and size of h.
        **kwargs: see `VAEFlow`.
    """

    def __init__(
        self, input_shape: tuple[int, ...], *, n_flows: int = 2, flow_width: int = 64, **kwargs: Unpack[VAEArgs]
    ) -> None:
        super().__init__(input_shape, n_flows=0, **kwargs)
        check_n_flows(n_flows)
        check_at_least(1, flow_width=flow_width)
        self.n_flows = n_flows
        self.steps = nn.ModuleList(MADE(self.latent_dim, flow_width) for _ in range(n_flows))
        if n_flows:
            outputs = 2 * self.latent_dim + flow_width
            self.encoder = self.build_encoder((outputs,))

    def flow(self, z: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Codes z_T and the sum of all log s, given h as `steps`: (..., B, D), (B, H) -> (..., B, D), (..., B)."""
        log_det = torch.zeros_like(z[..., 0])
        for t, layer in enumerate(self.steps):
            if t:
                z = z.flip(-1)
            m, a = layer(z, steps)
            s = torch.sigmoid(a + 1.5)
            z = s * z + (1 - s) * m
            log_det = log_det + F.logsigmoid(a + 1.5).sum(-1)
        return z, log_det
