"""Laws of the denoisers that are trained on clean samples, pairs of noisy samples or single noisy samples."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import aezoo
from aezoo.models.classic.dncnn import DnCNN
from aezoo.models.classic.noise2noise import Noise2Noise
from aezoo.models.classic.noise2void import Noise2Void

SIZES = [(1, 20, 97), (3, 33, 20), (2, 1, 1), (3, 40), (1, 5, 6, 7)]


LOG_PI = math.log(math.pi)


def small(make: Any, shape: tuple[int, ...] = (2, 6, 7), **settings: Any) -> Any:
    return make(shape, **{"width": 5, "depth": 3, "activation": "silu", **settings})


# ---- dncnn: Zhang et al. 2016 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("make", [DnCNN, Noise2Noise, Noise2Void])
def test_output_has_input_size_for_any_image_size(make: Any, residual: bool) -> None:
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
    """The best linear map of y to x, as y @ matrix + offset, for noise of the given variance in each value."""
    S, mean = torch.cov(x[..., 0].T), x[..., 0].mean(0)
    matrix = torch.linalg.solve(S + torch.diag(noise_variance), S)
    return matrix, mean - mean @ matrix


def noise_variance(kind: str, x: Tensor) -> Tensor:
    """The noise variance of each value, averaged over x: s^2, or x / peak for Poisson noise."""
    name, amount = kind.split(":")
    mean = x[..., 0].mean(0)
    return float(amount) ** 2 + 0 * mean if name == "gaussian" else mean / float(amount)


def best_linear_law(model: Any, kind: str, x: Tensor) -> None:
    """The fitted model is that for clean targets, the Wiener filter."""
    matrix, offset = fitted(model, x)
    best, best_offset = wiener(x, noise_variance(kind, x))
    torch.testing.assert_close(matrix, best, rtol=0, atol=0.03)
    torch.testing.assert_close(offset, best_offset, rtol=0, atol=0.03)
    assert (matrix - torch.eye(DIMS)).abs().max() > 0.1


# ---- all three models ------------------------------------------------------------------------------------------------


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
def test_invalid_values_are_refused(make: Any, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word) as error:
        small(make, **settings)
    assert "\n" not in str(error.value)
