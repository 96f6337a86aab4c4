"""Laws of the denoisers that differ in what they learn from: clean samples, pairs of noisy ones, single noisy ones."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LinearRegression
from test_classic import Watched, noise_law
from torch import Tensor
from torch.utils.data import DataLoader

import aezoo
from aezoo.models.classic.dncnn import DnCNN
from aezoo.models.classic.noise2noise import Noise2Noise, PoissonNoise
from aezoo.models.classic.noise2void import Noise2Void

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

SIZES = [(1, 20, 97), (3, 33, 20), (2, 1, 1), (3, 40), (1, 5, 6, 7)]
LOG_PI = math.log(math.pi)


def small(make: Any, shape: tuple[int, ...] = (2, 6, 7), **settings: Any) -> Any:
    return make(shape, **{"width": 5, "depth": 3, "activation": "silu", **settings})


def noise_free(model: Any, y: Tensor) -> Tensor:
    """The network's own output before anything is subtracted, from its layers."""
    return model.decoder.last(model.encoder.layers(y))


# ---- dncnn: Zhang et al. 2016 ----------------------------------------------------------------------------------------


def residual_law(model: Any, x: Tensor) -> None:
    """The loss is ||R(y) - v||^2 summed over values, with the noise v that was drawn, and so are its gradients."""
    torch.manual_seed(7)
    v = model.sigma * torch.randn_like(x)
    torch.manual_seed(7)
    terms = model.loss(x)
    R = noise_free(model, x + v)
    paper = ((R - v) ** 2).flatten(1).sum(1).mean()
    torch.testing.assert_close(terms["loss"], paper + x[0].numel() / 2 * LOG_PI)
    own = [*model.encoder.parameters(), *model.decoder.parameters()]
    for a, b in zip(torch.autograd.grad(terms["loss"], own), torch.autograd.grad(paper, own), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def with_sigma(make: Any, **settings: Any) -> Any:
    model = small(make, **settings).double()
    model.sigma = settings.get("sigma", 25 / 255)
    return model


def test_the_residual_form_is_the_direct_form(shifted: Any) -> None:
    x = torch.rand(4, 2, 6, 7, dtype=torch.float64)
    residual_law(shifted(with_sigma(DnCNN)), x)
    residual_law(shifted(with_sigma(DnCNN, sigma=0.7)), x)
    model = shifted(with_sigma(DnCNN))
    torch.testing.assert_close(model(x), x - noise_free(model, x))
    direct = with_sigma(DnCNN, residual=False)
    direct.load_state_dict(model.state_dict())
    torch.testing.assert_close(direct(x), noise_free(model, x))


class Adds(DnCNN):
    """Adds the noise that it predicts."""

    def decode(self, z: Tensor) -> Tensor:
        return 2 * z[:, : self.decoder.channels] - self.decoder(z)


def test_a_network_that_adds_the_noise_is_not_the_residual_form(shifted: Any) -> None:
    x, model = torch.rand(4, 2, 6, 7, dtype=torch.float64), shifted(with_sigma(Adds))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model(x), x - noise_free(model, x))
    with pytest.raises(AssertionError):
        residual_law(shifted(with_sigma(DnCNN, residual=False)), x)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("make", [DnCNN, Noise2Noise, Noise2Void])
def test_any_size_returns_exactly_through_a_code_of_features(make: Any, residual: bool) -> None:
    for shape in SIZES:
        if make is Noise2Void and shape == (2, 1, 1):
            continue
        model = small(make, shape, residual=residual).eval()
        x = torch.rand(2, *shape)
        z = model.encode(x)
        assert model.code_shape == (5 + residual * shape[0], *shape[1:]) == z.shape[1:]
        assert torch.equal(model(x), model.decode(z)) and model(x).shape == x.shape
        assert torch.equal(z[:, : shape[0]], x) is residual
        torch.testing.assert_close(z[:, residual * shape[0] :], model.encoder.layers(x))


def test_weights_of_one_size_denoise_another_and_far_pixels_do_not_matter() -> None:
    large, little = small(DnCNN, (1, 30, 25)).eval(), small(DnCNN, (1, 14, 12)).eval()
    little.load_state_dict(large.state_dict())
    x = torch.rand(2, 1, 30, 25)
    # three convolutions see three pixels away
    inside = large(x)[..., 8:16, 9:15]
    torch.testing.assert_close(little(x[..., 5:19, 6:18])[..., 3:11, 3:9], inside)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(little(x[..., 7:21, 6:18])[..., 1:9, 3:9], inside)


def test_sigma_is_on_the_scale_of_the_data() -> None:
    x = torch.full((1, 1, 500, 500), 0.3)
    for settings, sigma in (({}, 25 / 255), ({"sigma": 0.5}, 0.5)):
        noise = small(DnCNN, (1, 500, 500), **settings).corruption(x) - x
        assert float(noise.std()) == pytest.approx(sigma, rel=0.01)
        assert float(noise.mean()) == pytest.approx(0, abs=0.01 * sigma)


def test_noise_is_fixed_in_evaluation_and_anew_for_every_training_batch(quiet: Any) -> None:
    noise_law(small(DnCNN, (1, 4, 4)), quiet)


# ---- the linear case: on a grid of one pixel a convolution is a matrix between channels ------------------------------

DIMS, SAMPLES = 4, 15_000


def linear(make: Any, **settings: Any) -> Any:
    return make((DIMS, 1), width=DIMS + 1, depth=2, activation="identity", **settings).double()


def fitted(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix and offset of a linear model after a fit to one draw of the noise."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        torch.manual_seed(5)
        optimizer.zero_grad()
        loss: Tensor = model.loss(x)["loss"]
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        eye = torch.eye(DIMS, dtype=torch.float64)[..., None]
        offset = model(0 * eye)[:1, :, 0]
        return model(eye)[..., 0] - offset, offset[0]


def positive(n: int) -> Tensor:
    """Correlated values of at least 0 with unequal means, (n, DIMS, 1)."""
    A = torch.tensor([[1.0, 0.5, 0, 0], [0, 1, 0.5, 0], [0, 0, 0.7, 0.5], [0.3, 0, 0, 0.4]], dtype=torch.float64)
    return (torch.rand(n, DIMS, dtype=torch.float64).square() @ A)[..., None]


def wiener(x: Tensor, noise_variance: Tensor) -> tuple[Tensor, Tensor]:
    """The best linear map of y to x, as y @ matrix + offset, where the noise has that variance in each value."""
    S, mean = torch.cov(x[..., 0].T), x[..., 0].mean(0)
    matrix = torch.linalg.solve(S + torch.diag(noise_variance), S)
    return matrix, mean - mean @ matrix


def noise_variance(kind: str, x: Tensor) -> Tensor:
    """Of each value, averaged over x: s^2, or of counts x / peak."""
    name, amount = kind.split(":")
    mean = x[..., 0].mean(0)
    return float(amount) ** 2 + 0 * mean if name == "gaussian" else mean / float(amount)


def best_linear_law(model: Any, kind: str, x: Tensor) -> None:
    """The minimiser is that of clean targets: the Wiener filter."""
    matrix, offset = fitted(model, x)
    best, best_offset = wiener(x, noise_variance(kind, x))
    torch.testing.assert_close(matrix, best, rtol=0, atol=0.03)
    torch.testing.assert_close(offset, best_offset, rtol=0, atol=0.03)
    assert (matrix - torch.eye(DIMS)).abs().max() > 0.1


@pytest.mark.parametrize("residual", [True, False])
def test_a_linear_dncnn_is_the_wiener_filter(residual: bool) -> None:
    best_linear_law(linear(DnCNN, sigma=0.4, residual=residual), "gaussian:0.4", positive(SAMPLES))


@pytest.mark.parametrize("kind", ["gaussian:0.4", "poisson:4"])
def test_noisy_targets_have_the_minimiser_of_clean_ones(kind: str) -> None:
    model, x = linear(Noise2Noise, corruption=kind), positive(SAMPLES)
    best_linear_law(model, kind, x)
    matrix, offset = fitted(model, x)
    torch.manual_seed(5)
    y1, y2 = (model.corruption(x)[..., 0] for _ in range(2))
    for target, tolerance in ((y2, 1e-4), (x[..., 0], 0.03)):  # of this very draw, and of clean targets
        found = LinearRegression().fit(y1.numpy(), target.numpy())
        torch.testing.assert_close(matrix, torch.from_numpy(found.coef_.T.copy()), rtol=0, atol=tolerance)
        torch.testing.assert_close(offset, torch.from_numpy(found.intercept_), rtol=0, atol=tolerance)


# ---- noise2noise: Lehtinen et al. 2018 -------------------------------------------------------------------------------


class OneNoise(Noise2Noise):
    """Takes the same noisy copy for input and target."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        y1 = self.corruption(x)
        return {"loss": self.nll(self.decoder(self.encoder(y1)), y1).mean()}


class Clipped(Noise2Noise):
    """Clips the target to [0, 1], as images are stored: its mean is not the clean sample."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        y1, y2 = self.corruption(x), self.corruption(x).clamp(0, 1)
        return {"loss": self.nll(self.decoder(self.encoder(y1)), y2).mean()}


@pytest.mark.parametrize("make", [OneNoise, Clipped])
def test_shared_noise_and_clipped_targets_break_the_law(make: Any) -> None:
    with pytest.raises(AssertionError):
        best_linear_law(linear(make, corruption="gaussian:0.4"), "gaussian:0.4", positive(SAMPLES))


@pytest.mark.parametrize("kind", ["gaussian:0.4", "poisson:4"])
def test_a_noisy_target_adds_its_variance_to_the_squared_error(kind: str, shifted: Any) -> None:
    """E ||f(y1) - y2||^2 = ||f(y1) - x||^2 + Var(y2 | x), for any f, here at one y1."""
    model = shifted(small(Noise2Noise, (3, 1), corruption=kind)).double()
    x = torch.tensor([0.2, 0.5, 1.1], dtype=torch.float64)[None, :, None]
    y1, n = model.corruption(x), 200_000
    draws = model.corruption(x.expand(n, -1, -1))
    f = model(y1).detach()
    variance = 3 * 0.4**2 if kind.startswith("gaussian") else float(x.sum()) / 4
    losses = model.nll(f.expand(n, -1, -1), draws) - 1.5 * LOG_PI
    expected = float((f - x).square().sum()) + variance
    assert float(losses.mean()) == pytest.approx(expected, abs=5 * float(losses.std()) / math.sqrt(n))


def test_poisson_noise_has_the_probabilities_of_counts() -> None:
    n, noise = 200_000, PoissonNoise(5.0)
    for value in (0.0, 0.3, 2.0):
        counts = 5 * noise(torch.full((1, n), value, dtype=torch.float64))
        torch.testing.assert_close(counts, counts.round())
        found = np.bincount(counts.round().long().flatten().numpy(), minlength=40)[:40] / n
        assert np.abs(found - stats.poisson(5 * value).pmf(np.arange(40))).max() < 0.005
    x = torch.rand(3, 8).bfloat16()
    assert noise(x).dtype == torch.bfloat16
    a, b = (noise(x, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["gaussian:0.3", "poisson:20"])
def test_the_two_copies_are_independent_and_evaluation_s_are_fixed(kind: str, quiet: Any) -> None:
    x = 0.2 + 0.6 * torch.rand(12, 1, 8, 8)
    loader = DataLoader(x, batch_size=6)
    model = small(Noise2Noise, (1, 8, 8), corruption=kind)
    model.corruption = Watched(model)
    seen = model.corruption.seen
    trainer = quiet(max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(model, loader, loader)
    # a batch of training draws two, one of evaluation a third, for its reconstruction
    assert [len(seen[mode]) for mode in (True, False)] == [8, 12]
    assert all(torch.equal(a, b) for a, b in zip(seen[False][:6], seen[False][6:], strict=True))
    assert all(not torch.equal(a, b) for a, b in pairwise(seen[True]))
    one, two = (torch.cat(seen[True][i::2]).flatten() for i in (0, 1))
    assert torch.corrcoef(torch.stack([one, two]))[0, 1].abs() < 5 / math.sqrt(len(one))
    assert one.abs().max() > 0


def test_poisson_noise_needs_data_of_at_least_0() -> None:
    model = small(Noise2Noise, (1, 4, 4), corruption="poisson:10")
    x = torch.rand(3, 1, 4, 4)
    model.train().check_batch(x)
    model.eval().check_batch(x - 0.5)  # unseen data may lie a little outside
    with pytest.raises(aezoo.AezooError, match="at least 0"):
        model.train().check_batch(x - 0.5)
    small(Noise2Noise, (1, 4, 4)).train().check_batch(x - 0.5)


# ---- noise2void: Krull et al. 2019 -----------------------------------------------------------------------------------

GRIDS = [((11,), 2), ((5, 6), 2), ((4, 3, 5), 1)]
Blind = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


def replaced_by(model: Any, y: Tensor, allowed: Callable[..., bool], moved: Callable[..., tuple]) -> Any:
    """Replacement a pixel at a time: the value at `moved(place)` for an offset that is `allowed`, drawn evenly."""
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


# how CAREamics replaced pixels before its PR #491, and what a hasty one does
RIVALS: dict[str, Blind] = {
    "coordinates clipped to the grid": lambda m, y: replaced_by(m, y, lambda p, w, g, k: any(w), _clipped),
    "a window with the pixel itself": lambda m, y: replaced_by(
        m, y, lambda p, w, g, k: not any(w) or _inside(p, w, g, k), _moved
    ),
}
FROM_MASKED: Blind = lambda m, y: replaced_by(m, y, _inside, _moved)  # noqa: E731


def neighbours_law(blind: Blind, n: int) -> None:
    """The new value of a pixel is drawn evenly from its window, inside the grid, without the pixel itself."""
    model = small(Noise2Void, (1, 4, 5), masked=0.05, radius=2)
    model.radius = 2
    y = torch.arange(20.0).reshape(1, 1, 4, 5).expand(n, 1, 4, 5)
    out, M = blind(model, y)
    assert (M.sum(1) == 1).all()
    assert stats.chisquare(M.sum(0).numpy()).pvalue > 1e-4
    for place in (0, 7, 19):  # two corners and a pixel within
        rows = M[:, place] == 1
        drawn = out[rows].flatten(1)[:, place].long()
        r, c = divmod(place, 5)
        around = [i for i in range(20) if i != place and abs(i // 5 - r) <= 2 and abs(i % 5 - c) <= 2]
        assert set(drawn.tolist()) <= set(around)
        found = np.bincount(drawn.numpy(), minlength=20)[around]
        assert stats.chisquare(found).pvalue > 1e-4
        assert torch.equal(out[rows].flatten(1)[:, :place], y[rows].flatten(1)[:, :place])


def test_a_neighbour_is_drawn_evenly_from_the_window_inside_the_grid() -> None:
    neighbours_law(Noise2Void.blind, 20_000)


@pytest.mark.parametrize("rival", RIVALS.values(), ids=list(RIVALS))
def test_clipped_coordinates_and_the_pixel_itself_are_caught(rival: Blind) -> None:
    with pytest.raises(AssertionError):
        neighbours_law(rival, 4_000)


def blind_spot_law(blind: Blind, grid: tuple[int, ...], radius: int) -> None:
    """The output at a masked pixel has derivative 0 in this pixel's own value, in all channels, and not in others'."""
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
def test_the_output_at_a_masked_pixel_does_not_depend_on_its_own_value(grid: tuple[int, ...], radius: int) -> None:
    blind_spot_law(Noise2Void.blind, grid, radius)


@pytest.mark.parametrize(
    "rival", [FROM_MASKED, RIVALS["a window with the pixel itself"], lambda m, y: (y, FROM_MASKED(m, y)[1])]
)
def test_a_value_that_comes_back_by_another_masked_pixel_is_caught(rival: Blind) -> None:
    with pytest.raises(AssertionError):
        blind_spot_law(rival, (5, 6), 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_loss_is_the_squared_error_of_masked_pixels_as_if_all_were(channels: int, shifted: Any) -> None:
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
    assert abs(float(found.detach()) - everywhere) > 1e-2  # a loss over all pixels is another


def test_as_many_pixels_are_masked_as_was_asked_and_at_least_one() -> None:
    for masked, n in ((0.02, 1), (0.1, 3), (0.5, 15)):
        _, M = small(Noise2Void, (1, 5, 6), masked=masked, radius=4).blind(torch.rand(50, 1, 5, 6))
        assert (M.sum(1) == n).all()
    out, M = small(Noise2Void, (2, 2), masked=0.5).blind(y := torch.rand(20, 2, 2))
    assert (M.sum(1) == 1).all()
    assert torch.equal(out[..., 0], out[..., 1])  # of two pixels, one takes the other's place
    assert torch.equal(torch.where(M[:, None].bool(), y.flip(2), y), out)


def test_a_pixel_without_a_free_neighbour_is_left_alone() -> None:
    model = small(Noise2Void, (1, 12), masked=0.5, radius=1)
    y = torch.rand(500, 1, 12)
    out, M = model.blind(y)
    assert (M.sum(1) >= 1).all() and (M.sum(1) < 6).any()
    assert torch.equal((out != y).flatten(1), M.bool())


def test_masks_are_fixed_in_evaluation_and_anew_in_training(quiet: Any) -> None:
    """CAREamics #703: with other masks at each epoch validation losses do not compare."""
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
    """Squared error against the clean samples, of flat ones with noise, over that of the noisy ones."""
    torch.manual_seed(0)
    model = make((1, 10, 10), masked=0.1, width=8, depth=3, lr=1e-2)
    clean = torch.rand(256, 1, 1, 1).expand(-1, 1, 10, 10)
    y = clean + 0.3 * torch.randn_like(clean)  # one noisy copy of each, and no other
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        model.loss(y[64 * (step % 4) : 64 * (step % 4) + 64])["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        return float((model(y) - clean).square().mean() / (y - clean).square().mean())


class Sighted(Noise2Void):
    """Predicts pixels that it sees."""

    def blind(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y, super().blind(y)[1]


def test_noise_is_taken_away_by_what_has_seen_nothing_but_noise() -> None:
    assert error_after_training(Noise2Void) < 0.4
    assert error_after_training(Sighted) > 0.6  # it learns the identity


# ---- all three -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "settings", "word"),
    [
        (DnCNN, {"sigma": 0.0}, "sigma"),
        (DnCNN, {"sigma": -0.1}, "sigma"),
        (DnCNN, {"width": 0}, "width"),
        (DnCNN, {"depth": 1}, "depth"),
        (DnCNN, {"depth": 10**12}, "depth"),
        (DnCNN, {"likelihood": "bernoulli"}, "likelihood"),
        (Noise2Noise, {"likelihood": "discretised_logistic"}, "likelihood"),
        (Noise2Noise, {"corruption": "none"}, "mean zero"),
        (Noise2Noise, {"corruption": "gaussian:0"}, "mean zero"),
        (Noise2Noise, {"corruption": "salt_and_pepper:0.1"}, "mean zero"),
        (Noise2Noise, {"corruption": "poisson"}, "peak"),
        (Noise2Noise, {"corruption": "poisson:0"}, "peak"),
        (Noise2Noise, {"corruption": "poisson:nan"}, "peak"),
        (Noise2Void, {"masked": 0.0}, "masked"),
        (Noise2Void, {"masked": 0.6}, "masked"),
        (Noise2Void, {"radius": 0}, "radius"),
        (Noise2Void, {"radius": 10**12}, "radius"),
    ],
)
def test_values_that_cannot_work_are_refused(make: Any, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word) as error:
        small(make, **settings)
    assert "\n" not in str(error.value)


def test_shapes_without_neighbours_are_refused() -> None:
    for make in (DnCNN, Noise2Noise, Noise2Void):
        with pytest.raises(aezoo.AezooError, match="convolutions take"):
            small(make, (30,))
    with pytest.raises(aezoo.AezooError, match="neighbour"):
        small(Noise2Void, (3, 1, 1))
