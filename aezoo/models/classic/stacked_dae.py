"""Stacked denoising autoencoder (Vincent et al. 2010), https://jmlr.org/papers/v11/vincent10a.html

Layers are trained one after the other: each learns to undo a corruption C of the features that the fixed layers below
compute from a clean sample (figure 3). Then all layers are trained jointly, as one deep denoising autoencoder:

    L_i = E_C[ -log p(h_i | g_i(f_i(C(h_i)))) ]     phase i < N     h_0 = x     h_i = f_i-1(h_i-1)
    L_N = E_C[ -log p(x | g(f(C(x)))) ]             phase N         f = f_N-1 o .. o f_0     g = g_0 o .. o g_N-1

L is in nats per sample. f_i(h) = s(W h + b), and g_i has the same form with separate weights. p(x) is the likelihood; a
hidden layer of sigmoids uses the cross-entropy, any other the squared error. In phase i, the parameters of other layers
have no gradient, so no optimiser changes them, not even by weight decay or momentum. `train/loss` is the loss of the
phase. Evaluation is in phase N, and so is training without a trainer, unless `phase` is set.

Shapes: B batch, N layers, including the code.
"""

import math
from itertools import pairwise
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from aezoo import corruptions, nets
from aezoo.autoencoder import Autoencoder, at_least_float32
from aezoo.distributions import likelihoods
from aezoo.errors import AezooError
from aezoo.training.arguments import TrainingArgs
from aezoo.training.limits import check_at_least
from aezoo.training.optimizers import known_steps


class StackedDAE(Autoencoder, tags=("representation", "denoising")):
    """A deep denoising autoencoder that is trained layer by layer and then jointly, in one fit.

    Attributes:
        phase: the layer that `loss` trains; N for all layers.

    Args:
        input_shape: shape of one sample; any.
        corruption: gaussian:STD, masking:SHARE, salt_and_pepper:SHARE or none, of each layer's input.
        phase_epochs: epochs for each layer; with 0, the layers share half of the fit's steps equally.
        latent_dim: size of the code, the output of the last layer.
        hidden_dims: widths of the layers before it; the decoder mirrors them.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus or identity, after every layer;
            sigmoid in the paper.
        **kwargs: see `Autoencoder`.
    """

    encoder: nn.Sequential
    decoder: nn.Sequential

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        corruption: str = "masking:0.25",
        phase_epochs: int = 0,
        latent_dim: int = 32,
        hidden_dims: tuple[int, ...] = (256, 128),
        activation: str = "relu",
        **kwargs: Unpack[TrainingArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        if any(width < 1 for width in hidden_dims):
            raise AezooError(f"hidden_dims must be whole numbers above 0, got {tuple(hidden_dims)}")
        check_at_least(0, phase_epochs=phase_epochs)
        self.phase_epochs = phase_epochs
        self.code_shape = (latent_dim,)
        self.corruption = corruptions.corruption(corruption)
        self.hidden_likelihood = likelihoods.likelihood("bernoulli" if activation == "sigmoid" else "gaussian")
        widths = [*pairwise((math.prod(self.input_shape), *hidden_dims, latent_dim))]
        down = [nn.Sequential(nn.Flatten(), nn.Linear(*width), nets.activation(activation)) for width in widths]
        up = [nn.Sequential(nn.Linear(n_out, n_in), nets.activation(activation)) for n_in, n_out in widths]
        up[0] = nn.Sequential(up[0][0], nn.Unflatten(1, self.input_shape))
        self.encoder = nn.Sequential(*down)
        self.decoder = nn.Sequential(*up[::-1])
        self.phase = len(down)

    def layer_nll(self, x: Tensor, i: int) -> Tensor:
        """The loss of phase i for each sample, (B, *input_shape) -> (B,)."""
        with torch.no_grad():
            h = self.encoder[:i](x)
        up = self.decoder[-1 - i]
        code = self.encoder[i](h if self.corruption is None else self.corruption(h))
        if i == 0:
            return self.nll(up(code), x)
        params = up.get_submodule("0")(code) if self.hidden_likelihood.discrete else up(code)
        return -self.hidden_likelihood.log_prob(at_least_float32(params), at_least_float32(h))

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        phase = self.phase if self.training else len(self.encoder)
        if phase < len(self.encoder):
            nll_B = self.layer_nll(x, phase)
        else:
            noisy = x if self.corruption is None else self.corruption(x)
            nll_B = self.nll(self.decoder(self.encoder(noisy)), x)
        loss = nll_B.mean()
        if self._across_ranks():  # DistributedDataParallel waits for a gradient of every parameter
            loss = loss + 0 * torch.stack([p.sum() for p in self.parameters()]).sum()
        return {"loss": loss, "nll": nll_B.mean(), "phase": torch.full_like(loss, phase)}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.phase < len(self.encoder):
            layer = nn.ModuleList([self.encoder[self.phase], self.decoder[-1 - self.phase]])
            trained = {*layer.parameters(), *(self.likelihood.parameters() if self.phase == 0 else ())}
            for p in {*self.parameters()} - trained:
                p.grad = None  # with a gradient of 0, momentum and weight decay would still move p

    def current_phase(self) -> int:
        """Return the phase of the trainer's current step."""
        n_layers = len(self.encoder)
        if self.phase_epochs:
            return min(self.trainer.current_epoch // self.phase_epochs, n_layers)
        steps = known_steps(self.trainer)
        if math.isinf(steps):
            raise AezooError("phase_epochs=0 needs a fit with an end: set --trainer.max_epochs, or phase_epochs")
        return min(self.trainer.global_step // max(1, int(steps) // (2 * n_layers)), n_layers)

    def begin_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor | None]:
        if self._trainer is not None:
            self.phase = self.current_phase()
        return super().begin_step(batch, batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        # overridden so that the whole step is not captured as a CUDA graph, which would repeat the first phase forever
        return super().training_step(batch, batch_idx)

    def leave_fit(self) -> None:
        super().leave_fit()
        self.phase = len(self.encoder)
