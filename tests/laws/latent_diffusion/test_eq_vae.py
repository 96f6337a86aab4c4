"""Laws of EQ-VAE, equivariant codes (Kouzelis et al. 2025)."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from latent_diffusion_laws import (
    SHAPE,
    Tau,
    by_hand,
    images,
    losses,
    sets,
    small,
)
from torch import Tensor, nn

from aezoo.errors import AezooError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- EQ-VAE ----------------------------------------------------------------------------------------------------------


def resized(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Linear interpolation between cell centres along each axis."""
    for axis, (n, m) in enumerate(zip(x.shape[2:], grid, strict=True), start=2):
        at = ((torch.arange(m, dtype=torch.float64) + 0.5) * n / m - 0.5).clamp(0, n - 1)
        low = at.floor().long()
        share = (at - low).view(-1, *[1] * (3 - axis))
        x = (1 - share) * x.index_select(axis, low) + share * x.index_select(axis, (low + 1).clamp(max=n - 1))
    return x


def turned(x: Tensor, quarters: int) -> Tensor:
    return torch.from_numpy(np.rot90(x.detach().numpy(), quarters, (2, 3)).copy())


def tau_of_draws(model: Any) -> Tau:
    """Tau from the three random numbers after those of the code."""

    def tau(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        share, turn, factor = (torch.rand(()).item() for _ in range(3))
        if share >= model.equivariance:
            return x, z
        quarters, factor = (1, 2, 3)[int(turn * 3)], 0.25 + 0.75 * factor
        for _ in range(quarters):  # a quarter turn is a transposition and a flip of the first axis
            x, z = (part.transpose(2, 3).flip(2) for part in (x, z))
        z = resized(z, tuple(max(1, round(side * factor)) for side in z.shape[2:]))
        return resized(x, model.decoder(z).shape[2:]), z

    return tau


@pytest.mark.slow
def test_terms_and_gradients_match_transformed_images(shifted: Any) -> None:
    model, x = shifted(small("eq_vae", beta=0.3, perceptual_weight=0.7)), images()
    by_draws, sizes = tau_of_draws(model), set()

    def tau(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        x, z = by_draws(x, z)
        sizes.add(x.shape[2:])
        return x, z

    for seed in range(10):
        torch.manual_seed(seed)
        found = model.loss(x)
        torch.manual_seed(seed)
        for name, value in by_hand(model, x, tau).items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)
        torch.manual_seed(seed)
        expected = losses(model, x, tau=tau)
        for player, part in sets(model).items():
            mine, theirs = (torch.autograd.grad(t, part, retain_graph=True) for t in (found["loss"], expected[player]))
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert SHAPE[1:] in sizes and len(sizes) > 3


@pytest.mark.parametrize("net", ["resnet", "conv", "convnext", "conv_keras", "gdn", "dc"])
@pytest.mark.parametrize("shape", [SHAPE, (1, 8, 8), (1, 1, 13)])
def test_transformed_images_match_decoded_size(net: str, shape: tuple[int, ...]) -> None:
    model, x = small("eq_vae", input_shape=shape, net=net), images(2, shape=shape)
    z, found = torch.randn(2, *model.code_shape, dtype=torch.float64), set()
    for quarters in (1, 2, 3):
        for factor in (0.25, 0.4, 0.6, 0.8, 1.0):
            tau_x, tau_z = model.transformed(x, z, quarters, factor)
            assert model.decoder(tau_z).shape == tau_x.shape
            grid = turned(z, quarters).shape[2:]
            assert tau_z.shape[2:] == tuple(max(1, round(factor * side)) for side in grid)
            torch.testing.assert_close(tau_z, resized(turned(z, quarters), tau_z.shape[2:]))
            torch.testing.assert_close(tau_x, resized(turned(x, quarters), tau_x.shape[2:]))
            found.add(tuple(tau_x.shape[2:]))
    assert len(found) > 1


class Codes(nn.Module):
    """An encoder whose mean is a function of the images, with almost no variance."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        z = self.function(x)
        return torch.cat([z, torch.full_like(z, -1e3)], 1)


class Images(nn.Module):
    """A decoder that is a function, after an identity layer."""

    def __init__(self, function: Callable[[Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels, channels, 1, bias=False)
        nn.init.eye_(self.layer.weight[:, :, 0, 0])
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(self.layer(z))


def test_equivariant_autoencoder_has_zero_penalty() -> None:
    """No penalty for the identity; one for an encoder that adds, and a decoder that subtracts, a value per position."""
    model: Any = small("eq_vae", input_shape=(2, 8, 8), latent_dim=2, hidden_dims=(), equivariance=1.0)
    model.likelihood = small(likelihood="laplace").likelihood
    x, places = images(shape=(2, 8, 8)), torch.arange(64.0, dtype=torch.float64).view(8, 8)
    decoder_inputs, sizes = model.decoder_inputs, []

    def noted(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        x, z = decoder_inputs(x, z)
        sizes.append(x[0].numel())
        return x, z

    model.decoder_inputs = noted

    def excess(seed: int) -> float:
        torch.manual_seed(seed)
        terms = model.loss(x)
        return (terms["nll"] + terms["perceptual"]).item() - sizes[-1] * math.log(2)

    model.encoder, model.decoder = Codes(lambda x: x), Images(lambda z: z, 2).double()
    assert all(excess(seed) == pytest.approx(0, abs=1e-3) for seed in range(8))
    assert len(set(sizes)) > 3
    model.encoder = Codes(lambda x: x + places)
    model.decoder = Images(lambda z: z - places if z.shape[2:] == places.shape else z, 2).double()
    assert all(excess(seed) > 10 for seed in range(8))
    torch.testing.assert_close(model.eval()(x), x)


def test_average_pooling_is_rotation_equivariant() -> None:
    model: Any = small("eq_vae", input_shape=(1, 8, 8), hidden_dims=(4,))
    up = Images(lambda z: nn.functional.interpolate(z, scale_factor=2.0), 1).double()
    down = nn.AvgPool2d(2)
    for side, factors in ((2, (1.0,)), (4, (1.0, 0.5))):
        parts = torch.rand(3, 1, 8 // side, 8 // side, dtype=torch.float64)
        x = parts.repeat_interleave(side, 2).repeat_interleave(side, 3)
        for factor in factors:
            for quarters in (1, 2, 3):
                tau_x, tau_z = model.transformed(x, down(x), quarters, factor)
                torch.testing.assert_close(up(tau_z), tau_x)
                assert len({float(part) for part in parts.flatten()}) > 1
    tau_x, tau_z = model.transformed(x, down(x).flip(3), 1, 1.0)
    assert (up(tau_z) - tau_x).abs().max() > 0.1


@pytest.mark.parametrize("training", [True, False])
def test_zero_equivariance_equals_autoencoder_kl(training: bool, shifted: Any) -> None:
    other, x = shifted(small(beta=0.3)), images()
    model = small("eq_vae", beta=0.3, equivariance=0.0 if training else 1.0)
    model.load_state_dict(other.state_dict())
    found = []
    for each in (model.train(training), other.train(training)):
        torch.manual_seed(3)
        terms = each.loss(x)
        gradients = torch.autograd.grad(terms["loss"], [*each.parameters()])
        found.append([*terms.values(), *gradients, torch.rand(())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_transformation_is_determined_by_step_seed(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, drawn = small("eq_vae", equivariance=share), []
    monkeypatch.setattr(model, "transformed", lambda x, z, *tau: drawn.append(tau) or (x, z))
    x, z = torch.zeros(1), torch.zeros(1)
    for _ in range(2):
        torch.manual_seed(5)
        for _ in range(1000):
            model.decoder_inputs(x, z)
    n = len(drawn) // 2
    assert drawn[:n] == drawn[n:]
    assert abs(n / 1000 - share) < 0.05
    quarters, factors = (np.array(column) for column in zip(*drawn[:n], strict=True))
    assert all(abs((quarters == k).mean() - 1 / 3) < 0.1 for k in (1, 2, 3))
    assert 0.25 <= factors.min() < 0.27 and 0.98 < factors.max() < 1
    assert factors.mean() == pytest.approx(0.625, abs=0.05)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"input_shape": (30,)}, "turns images"),
        ({"input_shape": (3, 11)}, "turns images"),
        ({"input_shape": (1, 5, 4, 3)}, "turns images"),
        ({"net": "mlp"}, "feature map"),
        ({"net": "unet"}, "maps of one size"),
        ({"net": "vit"}, "maps of one size"),
        ({"net": "mixer"}, "maps of one size"),
        ({"equivariance": 1.1}, "equivariance must be from 0 to 1"),
    ],
)
def test_unsupported_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(AezooError, match=words):
        small("eq_vae", **settings)
