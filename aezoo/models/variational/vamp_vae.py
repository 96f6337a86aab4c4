"""VAE with a VampPrior (Tomczak & Welling 2017), https://arxiv.org/abs/1705.07120

    L = E_q[-log p(x|z)] + beta E_q[log q(z|x) - log p(z)]     q(z|x) = N(mu(x), diag sigma(x)^2)
    p(z) = 1/K sum_k q(z|u_k)                                  u_k: pseudo-inputs, learned with the rest

in nats per sample. The prior that maximises the ELBO is the mean of all posteriors; K learned inputs represent the data
(section 3). The KL has no closed form, so both densities are evaluated at the z that is decoded. Encoder and prior are
the same network, so the gradient through the pseudo-inputs' posteriors also trains the encoder.

For likelihoods of data in [0, 1], a pseudo-input is the sigmoid of its parameter, instead of the paper's hardtanh,
whose gradient is 0 outside the interval. For other likelihoods it is the parameter itself. With data_init,
pseudo-inputs are initialised with samples of the first batch of all ranks, used in turn, each with different noise; the
authors' code also has this option.

Shapes: B batch, D code, K pseudo-inputs.
"""

import math
from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo.models.variational.mixture_vae import MixtureVAE, MixtureVAEArgs


class VampVAE(MixtureVAE, defaults={"n_components": 500}, tags=("generation",)):
    """Gaussian code whose prior is the mean of the posteriors of learned inputs.

    Args:
        n_components: K, number of pseudo-inputs; all of them are encoded at every step.
        data_init: initialise the pseudo-inputs from the first batch of training.
        **kwargs: see `MixtureVAE`.
    """

    def __init__(
        self, input_shape: tuple[int, ...], *, data_init: bool = True, **kwargs: Unpack[MixtureVAEArgs]
    ) -> None:
        super().__init__(input_shape, **kwargs)
        # the pseudo-inputs replace these parameters
        del self.weight_K, self.mean_KD, self.log_var_KD
        self.pseudo_K = nn.Parameter(0.1 * torch.randn(self.n_components, *self.input_shape))
        if data_init:
            self.enable_data_init()

    def init_from_data(self, x: Tensor) -> None:
        u_K = x[torch.arange(self.n_components, device=x.device) % len(x)]
        # 0 and 1 would need infinite parameters
        self.pseudo_K.add_(u_K.clamp(0.05, 0.95).logit() if self.likelihood.unit_interval else u_K)

    def pseudo_inputs(self) -> Tensor:
        """Return the u_k, in the data's range: (K, *input_shape)."""
        return self.pseudo_K.sigmoid() if self.likelihood.unit_interval else self.pseudo_K

    def mixture(self) -> tuple[Tensor, Tensor, Tensor]:
        mean_KD, log_var_KD = self.posterior(self.pseudo_inputs())
        return mean_KD.new_full((self.n_components,), -math.log(self.n_components)), mean_KD, log_var_KD
