"""Tests of aezoo/nets/blocks/adversarial.py."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aezoo.nets.blocks.adversarial import (
    PatchDiscriminator,
    adaptive_weight,
    hinge_loss,
    last_layer_vjp,
    value_and_grad,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- losses and discriminators ---------------------------------------------------------------------------------------


def test_hinge_loss_matches_hand_computation() -> None:
    real, fake = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([-3.0, 0.0, 2.0])
    # (0 + 0.5 + 2 + 0) / 4 and (0 + 1 + 3) / 3
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * (2.5 / 4 + 4 / 3))
    assert hinge_loss(torch.zeros(4), torch.zeros(4)).item() == 1
    assert hinge_loss(torch.ones(3), -torch.ones(3)).item() == 0


@pytest.mark.parametrize(
    ("rec", "gan", "expected"),
    [
        ([3.0, 4.0], [0.0, 2.0], 5 / 2.0001),
        ([0.3, 0.4], [0.0, 0.0], 5000.0),
        ([30.0, 40.0], [0.0, 0.0], 1e4),
        ([0.0, 0.0], [1.0, 0.0], 0.0),
    ],
)
def test_adaptive_weight_matches_hand_computation(rec: list[float], gan: list[float], expected: float) -> None:
    found = adaptive_weight(torch.tensor(rec, dtype=torch.float64), torch.tensor(gan, dtype=torch.float64))
    assert found.item() == pytest.approx(expected)
    assert adaptive_weight(torch.ones(3).bfloat16(), torch.ones(3).bfloat16()).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo imports modules that torch has deprecated
def test_compiled_last_layer_gradients_match_eager(shifted: Any) -> None:
    net = shifted(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))).double()
    scale, z = nn.Parameter(torch.tensor(0.7, dtype=torch.float64)), torch.randn(6, 3, dtype=torch.float64)

    def found(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, to_last = last_layer_vjp(net, z)
        value, g = value_and_grad(lambda p: (scale * p).square().square().mean(), out)
        return value, g, to_last(g)

    torch._dynamo.reset()
    both = found(z), torch.compile(found, backend="aot_eager", fullgraph=True)(z)
    torch._dynamo.reset()
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(theirs, mine)
    parameters = [scale, *net.parameters()]
    gradients = [torch.autograd.grad(value, parameters) for value, *_ in both]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(theirs, mine)
    assert not any(constant.requires_grad for _, *constants in both for constant in constants)
    torch.testing.assert_close(both[1][2], gradients[0][3])


@pytest.mark.parametrize("shape", [(2, 9, 7), (1, 1, 1), (3, 11), (1, 5, 4, 3)])
def test_patch_discriminator_treats_samples_independently(shape: tuple[int, ...], shifted: Any) -> None:
    net, x = PatchDiscriminator(shape, (8, 6)).double(), torch.rand(3, *shape, dtype=torch.float64)
    t = net(x)
    assert t.shape == (3, 1, *(math.ceil(math.ceil(n / 2) / 2) for n in shape[1:]))
    torch.testing.assert_close(torch.cat([net(each[None]) for each in x]), t)


def test_patch_discriminator_has_local_receptive_field() -> None:
    net, x = PatchDiscriminator((1, 32), (4,)).double(), torch.rand(1, 1, 32, dtype=torch.float64).requires_grad_()
    for i, t in enumerate(net(x)[0, 0]):
        (g,) = torch.autograd.grad(t, x, retain_graph=True)
        read = g[0, 0].nonzero()[:, 0]
        assert read.min() >= 2 * i - 3 and read.max() <= 2 * i + 3
