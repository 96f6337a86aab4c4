"""Laws of Noise2Void (Krull et al. 2019)."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from noise_to_noise_laws import (  # noqa: F401
    LOG_PI,
    small,
    test_invalid_values_are_refused,
    test_output_has_input_size_for_any_image_size,
)
from scipy import stats
from torch import Tensor
from torch.utils.data import DataLoader

from aezoo.models.classic.noise2void import Noise2Void

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

# ---- noise2void: Krull et al. 2019 -----------------------------------------------------------------------------------


GRIDS = [((11,), 2), ((5, 6), 2), ((4, 3, 5), 1)]


Blind = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


def replaced_by(model: Any, y: Tensor, allowed: Callable[..., bool], moved: Callable[..., tuple]) -> Any:
    """Replace pixel by pixel with the value at `moved(place)` for an `allowed` offset, drawn uniformly."""
    grid, out = tuple(y.shape[2:]), y.clone()
    M = torch.zeros(len(y), math.prod(grid))
    for b in range(len(y)):
        masked = [np.unravel_index(i, grid) for i in torch.randperm(math.prod(grid))[: model.n_masked].tolist()]
        window = [*np.ndindex(*[2 * model.radius + 1] * len(grid))]
        for place in masked:
            ways = [tuple(int(o) - model.radius for o in offset) for offset in window]
            ways = [way for way in ways if allowed(place, way, grid, masked)]
            way = ways[int(torch.randint(len(ways), ()))]
            out[(b, slice(None), *place)] = y[(b, slice(None), *moved(place, way, grid))]
            M[b, np.ravel_multi_index(place, grid)] = 1
    return out, M


def _inside(place: Any, way: Any, grid: Any, masked: Any) -> bool:
    return any(way) and all(0 <= p + w < n for p, w, n in zip(place, way, grid, strict=True))


def _moved(place: Any, way: Any, grid: Any) -> tuple:
    return tuple(p + w for p, w in zip(place, way, strict=True))


def _clipped(place: Any, way: Any, grid: Any) -> tuple:
    return tuple(min(max(p + w, 0), n - 1) for p, w, n in zip(place, way, grid, strict=True))


# wrong replacements, the first that of CAREamics before its PR #491
MISTAKES: dict[str, Blind] = {
    "coordinates clipped to the grid": lambda m, y: replaced_by(m, y, lambda p, w, g, k: any(w), _clipped),
    "a window with the pixel itself": lambda m, y: replaced_by(
        m, y, lambda p, w, g, k: not any(w) or _inside(p, w, g, k), _moved
    ),
}


FROM_MASKED: Blind = lambda m, y: replaced_by(m, y, _inside, _moved)  # noqa: E731


def neighbours_law(blind: Blind, n: int) -> None:
    """The new value of a pixel is drawn uniformly from its window, inside the grid, without the pixel itself."""
    model = small(Noise2Void, (1, 4, 5), masked=0.05, radius=2)
    model.radius = 2
    y = torch.arange(20.0).reshape(1, 1, 4, 5).expand(n, 1, 4, 5)
    out, M = blind(model, y)
    assert (M.sum(1) == 1).all()
    assert stats.chisquare(M.sum(0).numpy()).pvalue > 1e-4
    for place in (0, 7, 19):  # two corners and an inner pixel
        rows = M[:, place] == 1
        drawn = out[rows].flatten(1)[:, place].long()
        r, c = divmod(place, 5)
        around = [i for i in range(20) if i != place and abs(i // 5 - r) <= 2 and abs(i % 5 - c) <= 2]
        assert set(drawn.tolist()) <= set(around)
        found = np.bincount(drawn.numpy(), minlength=20)[around]
        assert stats.chisquare(found).pvalue > 1e-4
        assert torch.equal(out[rows].flatten(1)[:, :place], y[rows].flatten(1)[:, :place])


def test_neighbour_is_uniform_over_window_in_grid() -> None:
    neighbours_law(Noise2Void.blind, 20_000)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=list(MISTAKES))
def test_clipped_or_own_pixel_neighbours_are_detected(mistake: Blind) -> None:
    with pytest.raises(AssertionError):
        neighbours_law(mistake, 4_000)


def blind_spot_law(blind: Blind, grid: tuple[int, ...], radius: int) -> None:
    """The output at a masked pixel has the gradient 0 by this pixel's own value in all channels, but not by others."""
    model = small(Noise2Void, (2, *grid), masked=0.4, radius=radius).double()
    model.radius = radius
    for seed in range(3):
        torch.manual_seed(seed)
        y = torch.rand(1, 2, *grid, dtype=torch.float64, requires_grad=True)
        blinded, M = blind(model, y)
        out = model.decoder(model.encoder(blinded)).flatten(2).sum(1)
        assert 0 < M.sum() <= model.n_masked
        for i in M[0].nonzero().flatten().tolist():
            (slope,) = torch.autograd.grad(out[0, i], y, retain_graph=True)
            assert not slope.flatten(2)[..., i].any()
            assert slope.any()


@pytest.mark.parametrize(("grid", "radius"), GRIDS)
def test_masked_output_ignores_its_own_value(grid: tuple[int, ...], radius: int) -> None:
    blind_spot_law(Noise2Void.blind, grid, radius)


@pytest.mark.parametrize(
    "mistake", [FROM_MASKED, MISTAKES["a window with the pixel itself"], lambda m, y: (y, FROM_MASKED(m, y)[1])]
)
def test_leak_through_masked_pixel_is_detected(mistake: Blind) -> None:
    with pytest.raises(AssertionError):
        blind_spot_law(mistake, (5, 6), 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_loss_is_rescaled_masked_squared_error(channels: int, shifted: Any) -> None:
    model = shifted(small(Noise2Void, (channels, 5, 6), masked=0.2)).double()
    y = torch.rand(4, channels, 5, 6, dtype=torch.float64)
    torch.manual_seed(3)
    blinded, M = model.blind(y)
    torch.manual_seed(3)
    found = model.loss(y)["loss"]
    f, total, everywhere = model(blinded).detach(), 0.0, 0.0
    for b in range(4):
        pixels = [divmod(i, 6) for i in range(30) if M[b, i]]
        errors = [float(((f[b, :, r, c] - y[b, :, r, c]) ** 2 + LOG_PI / 2).sum()) for r, c in pixels]
        total += 30 * float(np.mean(errors)) / 4
        everywhere += float(((f[b] - y[b]) ** 2 + LOG_PI / 2).sum()) / 4
    assert float(found.detach()) == pytest.approx(total, rel=1e-7)  # the likelihood's scale is a float32
    assert abs(float(found.detach()) - everywhere) > 1e-2  # not the loss over all pixels


def test_targets_are_the_noisy_pixels_not_clean_ones(shifted: Any) -> None:
    """With a corruption only the noisy sample is used; gradients are those of the masked pixels."""
    model = shifted(small(Noise2Void, (2, 5, 6), masked=0.2, corruption="gaussian:0.5")).double()
    x = torch.rand(4, 2, 5, 6, dtype=torch.float64)
    torch.manual_seed(3)
    y = model.corruption(x)
    blinded, M_BP = model.blind(y)
    torch.manual_seed(3)
    loss = model.loss(x)["loss"]
    error_BP = ((model(blinded) - y).square() + LOG_PI / 2).sum(1).flatten(1)
    expected = 30 * (error_BP * M_BP).sum(1).div(M_BP.sum(1)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)
    own = [*model.parameters()]
    for a, b in zip(torch.autograd.grad(loss, own), torch.autograd.grad(expected, own), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_requested_share_of_pixels_is_masked() -> None:
    for masked, n in ((0.02, 1), (0.1, 3), (0.5, 15)):
        _, M = small(Noise2Void, (1, 5, 6), masked=masked, radius=4).blind(torch.rand(50, 1, 5, 6))
        assert (M.sum(1) == n).all()
    out, M = small(Noise2Void, (2, 2), masked=0.5).blind(y := torch.rand(20, 2, 2))
    assert (M.sum(1) == 1).all()
    assert torch.equal(out[..., 0], out[..., 1])  # with two pixels the masked one gets the value of the other
    assert torch.equal(torch.where(M[:, None].bool(), y.flip(2), y), out)


def test_pixel_without_unmasked_neighbour_is_not_masked() -> None:
    model = small(Noise2Void, (1, 12), masked=0.5, radius=1)
    y = torch.rand(500, 1, 12)
    out, M = model.blind(y)
    assert (M.sum(1) >= 1).all() and (M.sum(1) < 6).any()
    assert torch.equal((out != y).flatten(1), M.bool())


def test_masks_are_fixed_in_evaluation_fresh_in_training(quiet: Any) -> None:
    """With different masks in each epoch, validation losses would not be comparable (CAREamics #703)."""
    seen: dict[bool, list[Tensor]] = {True: [], False: []}

    class Recorded(Noise2Void):
        def blind(self, y: Tensor) -> tuple[Tensor, Tensor]:
            out, M = super().blind(y)
            seen[self.training].append(M)
            return out, M

    loader = DataLoader(torch.rand(12, 1, 8, 8), batch_size=6)
    quiet(max_epochs=2, num_sanity_val_steps=0).fit(small(Recorded, (1, 8, 8)), loader, loader)
    assert torch.equal(seen[False][0], seen[False][2]) and torch.equal(seen[False][1], seen[False][3])
    assert not torch.equal(seen[False][0], seen[False][1])
    assert all(not torch.equal(a, b) for a, b in pairwise(seen[True]))


def error_after_training(make: Any, steps: int = 160) -> float:
    """Squared error of denoised images of constant values with noise, relative to that of the noisy images."""
    torch.manual_seed(0)
    model = make((1, 10, 10), masked=0.1, width=8, depth=3, lr=1e-2)
    clean = torch.rand(256, 1, 1, 1).expand(-1, 1, 10, 10)
    y = clean + 0.3 * torch.randn_like(clean)  # a single noisy copy of each
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        model.loss(y[64 * (step % 4) : 64 * (step % 4) + 64])["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        return float((model(y) - clean).square().mean() / (y - clean).square().mean())


class WithoutBlindSpots(Noise2Void):
    """Predicts the masked pixels from an input that contains them."""

    def blind(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y, super().blind(y)[1]


@pytest.mark.slow
def test_training_on_only_noisy_images_denoises() -> None:
    assert error_after_training(Noise2Void) < 0.4
    assert error_after_training(WithoutBlindSpots) > 0.6  # it learns the identity
