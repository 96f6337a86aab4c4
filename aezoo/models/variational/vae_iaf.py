"""VAE with inverse autoregressive flow (Kingma et al. 2016), https://arxiv.org/abs/1606.04934

    L = E[-log p(x|z_T)] + beta E[log q_0(z_0|x) - sum_t sum_i log s_ti - log p(z_T)]
    z_0 ~ q_0(z|x) = N(mu(x), diag sigma(x)^2)     p(z) = N(0, I)
    z_t = s_t z_(t-1) + (1 - s_t) m_t     s_t = sigmoid(a_t + 1.5)     (m_t, a_t) = MADE_t(z_(t-1), h(x))

in nats per sample, computed as in vae_flow. m_ti and a_ti depend on the elements of z_(t-1) before i and on h, the
encoder's third output. The Jacobian of a step is therefore triangular with the s_t on its diagonal. The order of
dimensions is reversed from step to step. The 1.5 keeps a step near the identity at the start (section 4, algorithm 1).
The nets are those of Germain et al. 2015, https://arxiv.org/abs/1502.03509: one hidden layer with units of degree 0 to
D - 1; units of degree 0 see only h. T = 0 is the VAE.

Shapes: B batch, D code, K importance samples, H hidden units.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo import nets
from aezoo.models.variational.vae_flow import VAEFlow
from aezoo.nets.blocks.flows import MADE, check_n_flows
from aezoo.training.limits import at_least


class VAEIAF(VAEFlow):
    """A posterior made flexible by autoregressive steps, and a standard normal prior.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        latent_dim: D, size of the code.
        n_flows: T, number of steps; 0 is the VAE.
        flow_width: H, number of hidden units of each step's network, and of values of h.
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

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        n_flows: int = 2,
        flow_width: int = 64,
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
            n_flows=0,
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
        check_n_flows(n_flows)
        at_least(1, flow_width=flow_width)
        self.n_flows = n_flows
        self.steps = nn.ModuleList(MADE(latent_dim, flow_width) for _ in range(n_flows))
        if n_flows:
            outputs = 2 * latent_dim + flow_width
            self.encoder = nets.encoder(net, self.input_shape, (outputs,), hidden_dims, activation)

    def flow(self, z: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Codes z_T and the sum of all log s, given h as `steps`: (..., B, D), (B, H) -> (..., B, D), (..., B)."""
        log_det = torch.zeros_like(z[..., 0])
        for t, made in enumerate(self.steps):
            if t:
                z = z.flip(-1)
            m, a = made(z, steps)
            s = torch.sigmoid(a + 1.5)
            z = s * z + (1 - s) * m
            log_det = log_det + F.logsigmoid(a + 1.5).sum(-1)
        return z, log_det
