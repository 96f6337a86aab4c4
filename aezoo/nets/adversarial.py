"""Players of an adversarial game that step at once, on one backward pass.

Each player has a loss of its own, which passes no gradient to the parameters of the others: what another one owns is
`frozen` or detached in it. Then one backward pass through the sum of all losses gives the gradients of every player,
and an optimiser with a group of parameters for each is as many optimisers. A loss that is to train, but not to count in
the value of the sum, is a `gradient_alone`.
"""

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from aezoo import optimizers
from aezoo.errors import AezooError
from aezoo.likelihoods import Likelihood


def check_discriminator(dims: tuple[int, ...], lr: float) -> None:
    """Refuse the arguments discriminator_dims and discriminator_lr that no model can have.

    Raises:
        AezooError: a width below 1, or a learning rate that is not above 0 and at most 1000.
    """
    if any(width < 1 for width in dims):
        raise AezooError(f"discriminator_dims must be whole numbers above 0, got {tuple(dims)}")
    if not 0 < lr <= 1000:
        raise AezooError(f"discriminator_lr must be above 0 and at most 1000, got {lr}")


def frozen(module: nn.Module, *inputs: Tensor) -> Any:
    """module(*inputs) with the module's parameters as constants: gradients go to the inputs alone."""
    return functional_call(module, {name: p.detach() for name, p in module.named_parameters()}, inputs)


def gradient_alone(loss: Tensor) -> Tensor:
    """A term of value 0 with the gradient of a loss."""
    return loss - loss.detach()


def two_groups(model: nn.Module, betas: tuple[float, float], both: bool = False) -> list[dict[str, Any]]:
    """Parameter groups: all that is not the discriminator's, and the discriminator's, at a rate of its own.

    Args:
        model: has a module `discriminator`, its learning rate, `discriminator_lr`, and `optimizer`.
        betas: of the discriminator's optimiser, if it has moments and the user sets no others.
        both: these are the other group's, too.
    """
    others = [p for name, p in model.named_parameters() if not name.startswith("discriminator.")]
    judge = [*model.discriminator.parameters()]  # type: ignore[union-attr]
    own: dict[str, Any] = {"betas": optimizers.betas(str(model.optimizer), betas)}
    return [{"params": others, **(own if both else {})}, {"params": judge, "lr": model.discriminator_lr, **own}]


class Generator(nn.Module):
    """Codes to data, (B, *code_shape) -> (B, *input_shape): a decoder and the mean of its likelihood as one module."""

    def __init__(self, decoder: nn.Module, likelihood: Likelihood) -> None:
        super().__init__()
        self.decoder, self.likelihood = decoder, likelihood

    def forward(self, z: Tensor) -> Tensor:
        return self.likelihood.mean(self.decoder(z))
