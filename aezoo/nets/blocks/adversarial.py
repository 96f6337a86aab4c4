"""Adversarial training of several players by one backward pass and one optimiser step.

Each player has a separate loss, which passes no gradient to the parameters of the other players: these are constants in
it (`call_frozen`) or detached. One backward pass through the sum of all losses then computes the gradients of all
players. An optimiser with one parameter group per player is equivalent to several optimisers. `gradient_only` returns a
loss that is trained but has the value 0 in the sum.

If the weight of a loss depends on the gradients of two losses at one layer, `last_layer_vjp` and `value_and_grad`
compute these gradients in passes that training needs anyway.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp

from aezoo.distributions.likelihoods import Likelihood
from aezoo.errors import AezooError
from aezoo.nets.conv import CONVS, rank_of
from aezoo.training import optimizers
from aezoo.training.limits import check_at_least
from aezoo.training.precision import at_least_float32


def check_discriminator(dims: tuple[int, ...], lr: float, start: int = 0) -> None:
    """Check the values of discriminator_dims, discriminator_lr and discriminator_start.

    Raises:
        AezooError: a width below 1, a learning rate that is not above 0 and at most 1000, or a start below 0.
    """
    check_at_least(0, discriminator_start=start)
    if any(width < 1 for width in dims):
        raise AezooError(f"discriminator_dims must be whole numbers above 0, got {tuple(dims)}")
    if not 0 < lr <= 1000:
        raise AezooError(f"discriminator_lr must be above 0 and at most 1000, got {lr}")


def call_frozen(module: nn.Module, *inputs: Tensor) -> Any:
    """Compute module(*inputs) with the module's parameters as constants: only the inputs get gradients."""
    return functional_call(module, {name: p.detach() for name, p in module.named_parameters()}, inputs)


def gradient_only(loss: Tensor) -> Tensor:
    """Return a term with value 0 and the gradient of a loss."""
    return loss - loss.detach()


def discriminator_parameter_groups(
    model: nn.Module, betas: tuple[float, float], for_all: bool = False
) -> list[dict[str, Any]]:
    """Return two parameter groups, the second with the discriminator's parameters and a separate learning rate.

    Args:
        model: has attributes `discriminator`, `discriminator_lr` (its learning rate) and `optimizer`.
        betas: betas of the discriminator's group, if the optimiser has them and the user sets no others.
        for_all: whether the other group also uses these betas.
    """
    others = [p for name, p in model.named_parameters() if not name.startswith("discriminator.")]
    discriminator = [*model.discriminator.parameters()]  # type: ignore[union-attr]
    discriminator_options: dict[str, Any] = {"betas": optimizers.betas(str(model.optimizer), betas)}
    return [
        {"params": others, **(discriminator_options if for_all else {})},
        {"params": discriminator, "lr": model.discriminator_lr, **discriminator_options},
    ]


class Generator(nn.Module):
    """A decoder followed by the mean of its likelihood, from codes to data, (B, *code_shape) -> (B, *input_shape)."""

    def __init__(self, decoder: nn.Module, likelihood: Likelihood) -> None:
        super().__init__()
        self.decoder, self.likelihood = decoder, likelihood

    def forward(self, z: Tensor) -> Tensor:
        return self.likelihood.mean(self.decoder(z))


class PatchDiscriminator(nn.Sequential):
    """Scores how real each patch of a sample is (Isola et al. 2016, https://arxiv.org/abs/1611.07004, section 2.2.2).

    (B, C, *grid) -> (B, 1, *smaller grid), by stages of stride 2, for any size. It uses group normalisation, since the
    paper's batch normalisation would make samples depend on each other.

    Args:
        input_shape: (C, L), (C, H, W) or (C, D, H, W).
        dims: channels of the stages.

    Raises:
        AezooError: the shape has no grid.
    """

    def __init__(self, input_shape: tuple[int, ...], dims: tuple[int, ...]) -> None:
        conv, channels = CONVS[rank_of(input_shape)], input_shape[0]
        layers: list[nn.Module] = []
        for i, width in enumerate(dims):
            layers.append(conv(channels, width, 3, stride=2, padding=1))
            if i:  # not after the first stage, as in the paper's appendix 6.1.2
                layers.append(nn.GroupNorm(math.gcd(width, max(1, width // 4)), width))
            layers.append(nn.LeakyReLU(0.2))
            channels = width
        super().__init__(*layers, conv(channels, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return at_least_float32(super().forward(x))


def hinge_loss(t_real: Tensor, t_fake: Tensor) -> Tensor:
    """Return the discriminator's loss, E[(1 - t_real)^+] / 2 + E[(1 + t_fake)^+] / 2, of any shapes -> ().

    Lim & Ye 2017, https://arxiv.org/abs/1705.02894; halved as in https://github.com/CompVis/taming-transformers.
    """
    return 0.5 * (F.relu(1 - t_real).mean() + F.relu(1 + t_fake).mean())


def last_layer_vjp(net: nn.Module, *inputs: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return a network's output, and a function from gradients of the output to gradients of the last weight W.

    Both use one forward pass. Shapes: (B, ...) -> (B, ...); the function (B, ...) -> (*W.shape) returns constants.
    """
    name, weight = [(name, p) for name, p in net.named_parameters() if p.ndim > 1][-1]
    if not torch.compiler.is_compiling():
        out, vjp_fn, *_ = vjp(lambda w: functional_call(net, {name: w}, inputs), weight)
        return out, lambda gradient: vjp_fn(gradient)[0].detach()
    # on constants, with a second forward pass: inductor (torch 2.13) fails if tensors inside a transform of
    # torch.func are differentiated from outside, "Cannot access storage of TensorWrapper"; it merges equal passes
    fixed, constants = {name: p.detach() for name, p in net.named_parameters()}, tuple(x.detach() for x in inputs)
    _, vjp_fn, *_ = vjp(lambda w: functional_call(net, {**fixed, name: w}, constants), weight.detach())
    return net(*inputs), lambda gradient: vjp_fn(gradient)[0].detach()


def value_and_grad(loss: Callable[[Tensor], Tensor], params: Tensor) -> tuple[Tensor, Tensor]:
    """Return loss(params), differentiable, and its gradient in `params`, a constant: (B, ...) -> (), (B, ...)."""
    compiling = torch.compiler.is_compiling()  # then handled as in `last_layer_vjp`
    value, vjp_fn, *_ = vjp(loss, params.detach() if compiling else params)
    gradient = vjp_fn(torch.ones_like(value))[0].detach()
    return loss(params) if compiling else value, gradient


def input_gradient(net: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient at a network's input for a gradient at its output, as a constant: (B, ...) -> (B, ...)."""
    _, vjp_fn, *_ = vjp(lambda at: call_frozen(net, at), x.detach())
    return vjp_fn(gradient)[0].detach()


def adaptive_weight(g_rec: Tensor, g_gan: Tensor, *, max_weight: float = 1e4) -> Tensor:
    """||g_rec|| / (||g_gan|| + 1e-4), at most `max_weight`, of the gradients at the decoder's last layer -> ().

    With this weight, the adversarial loss changes that layer as much as the reconstruction does, for any scale of the
    losses (Esser et al. 2020, https://arxiv.org/abs/2012.09841, equation 7, with the constants of their code). The
    gradients must be averaged over ranks, because the mean of each rank's weight would differ.
    """
    ratio = at_least_float32(g_rec).norm() / (at_least_float32(g_gan).norm() + 1e-4)
    return ratio.clamp(0, max_weight)
