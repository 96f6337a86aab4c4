"""Laws of the VAE with a multiscale structural similarity (Snell et al. 2015)."""

from typing import Any

import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from perceptual_distance_laws import (  # noqa: F401
    SHAPE,
    images,
    test_distance_is_zero_only_for_perfect_reconstruction,
    test_elbo_and_log_likelihood_are_absent,
    test_only_likelihood_mean_is_used,
    test_the_loss_is_the_weighted_distance_and_the_kl,
    test_training_by_the_distance_reconstructs_digits,
)
from torch import Tensor, nn
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as torchmetrics_ms_ssim

import aezoo
from aezoo.models.variational.msssim_vae import EXPONENTS, MSSSIMVAE


def smooth(n: int, shape: tuple[int, ...]) -> Tensor:
    """Images with structure at all scales."""
    parts = [
        nn.functional.interpolate(torch.rand(n, shape[0], s, s, dtype=torch.float64), shape[1:]) for s in (3, 7, 16, 64)
    ]
    return torch.stack(parts).mean(0)


# ---- MS-SSIM: Wang et al. 2003, Snell et al. 2015 --------------------------------------------------------------------


def reference(model: Any, x: Tensor, y: Tensor) -> Tensor:
    weights = EXPONENTS[: model.scales]
    return torchmetrics_ms_ssim(
        x, y, sigma=1.5 * model.window / 11, kernel_size=model.window, data_range=1.0, reduction="none",
        betas=tuple(w / sum(weights) for w in weights),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "settings", "scales", "window"),
    [
        ((1, 192, 192), {}, 5, 11),
        ((1, 177, 200), {}, 5, 11),
        ((3, 64, 64), {}, 3, 11),
        ((1, 32, 32), {}, 2, 11),
        ((1, 28, 28), {}, 2, 11),
        ((1, 28, 28), {"window": 7}, 3, 7),
        ((2, 27, 35), {"window": 5}, 3, 5),
        ((4, 64, 64), {"scales": 1}, 1, 11),
    ],
)
def test_ms_ssim_and_gradient_match_torchmetrics(
    shape: tuple[int, ...], settings: dict[str, Any], scales: int, window: int
) -> None:
    model = MSSSIMVAE(shape, latent_dim=2, hidden_dims=(2,), **settings)
    assert (model.scales, model.window) == (scales, window)
    y = smooth(2, shape)
    x = (0.7 * y + 0.3 * torch.rand(2, *shape, dtype=torch.float64)).requires_grad_()
    found, expected = model.ms_ssim(x, y), reference(model, x, y)
    assert (found < 0.95).all()
    # torchmetrics keeps the exponents in float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    a, b = (torch.autograd.grad(v.sum(), x)[0] for v in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("side", "scales", "window"), [(3, 1, 3), (4, 1, 3), (8, 1, 7), (11, 1, 11), (21, 1, 11), (22, 2, 11), (176, 5, 11)]
)
def test_scales_and_window_follow_the_size_of_the_image(side: int, scales: int, window: int) -> None:
    model = MSSSIMVAE((1, side, side + 1), latent_dim=2, hidden_dims=(2,)).double()
    assert (model.scales, model.window) == (scales, window)
    x, y = images(2, (1, side, side + 1)), images(2, (1, side, side + 1))
    torch.testing.assert_close(model.ms_ssim(x, x), torch.ones(2, dtype=x.dtype))
    assert (model.ms_ssim(x, y) < 0.9).all()


def test_ms_ssim_is_symmetric_and_favours_structure() -> None:
    model = MSSSIMVAE((1, 28, 28)).double()
    x, y = smooth(4, (1, 28, 28)), images(4, (1, 28, 28))
    torch.testing.assert_close(model.ms_ssim(x, y), model.ms_ssim(y, x))
    brighter, noisier = x + 0.1, x + 0.1 * (torch.rand_like(x) > 0.5) - 0.1 * (torch.rand_like(x) > 0.5)
    assert (model.ms_ssim(brighter, x) > model.ms_ssim(noisier, x) + 0.03).all()


CONSTANT = torch.zeros(2, 1, 28, 28)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (CONSTANT, CONSTANT),
        (CONSTANT, CONSTANT + 1),
        (CONSTANT + 0.5, torch.eye(28).expand(2, 1, 28, 28)),
        (torch.eye(28).expand(2, 1, 28, 28), torch.eye(28).expand(2, 1, 28, 28)),
        (torch.eye(28).expand(2, 1, 28, 28), 1 - torch.eye(28).expand(2, 1, 28, 28)),
    ],
)
def test_degenerate_images_have_finite_gradient(x: Tensor, y: Tensor) -> None:
    for model in (MSSSIMVAE((1, 28, 28)), MSSSIMVAE((1, 28, 28), window=7)):
        x = x.clone().requires_grad_()
        found = model.ms_ssim(x, y)
        (gradient,) = torch.autograd.grad(found.sum(), x)
        assert found.isfinite().all() and gradient.isfinite().all()
        assert ((found >= 0) & (found < 1 + 1e-5)).all()


def test_opposite_structure_still_has_useful_gradient() -> None:
    """Where a scale's similarity is negative torchmetrics gives 0 and a gradient of 0."""
    y = smooth(2, (1, 28, 28))
    x = (1 - y).requires_grad_()
    model = MSSSIMVAE((1, 28, 28), window=7).double()
    ((dead,), (alive,)) = (
        torch.autograd.grad(f(x, y).sum(), x) for f in (lambda *a: reference(model, *a), model.ms_ssim)
    )
    assert dead.abs().max() == 0
    step = alive / alive.abs().max()
    assert (model.ms_ssim(x + 0.01 * step, y) > model.ms_ssim(x, y)).all()


def test_variances_are_accurate_in_float32() -> None:
    y = 0.9 + 0.01 * smooth(8, (1, 28, 28))
    x = y + 0.002 * torch.rand_like(y)
    model = MSSSIMVAE((1, 28, 28))
    exact = model.ms_ssim(x, y)
    assert ((1 - exact) > 1e-4).all()
    torch.testing.assert_close(model.ms_ssim(x.float(), y.float()).double(), exact, atol=1e-4, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.nll(torch.logit(x).float(), y.float())
    torch.testing.assert_close(half.double(), model.weight * (1 - exact), atol=1e-4 * model.weight, rtol=0)


@pytest.mark.parametrize("shape", [(30,), (3, 128), (1, 12, 12, 12), (1, 2, 28), (1, 28, 2)])
def test_non_image_shapes_are_refused_in_one_line(shape: tuple[int, ...]) -> None:
    with pytest.raises(aezoo.AezooError, match=r"\(C, H, W\)") as error:
        MSSSIMVAE(shape)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        *(({"weight": w}, "weight") for w in (0.0, -1.0)),
        *(({"scales": s}, "scales") for s in (0, 6)),
        *(({"window": w}, "window") for w in (1, 4, -3)),
    ],
)
def test_invalid_ms_ssim_settings_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word):
        MSSSIMVAE(SHAPE, **settings)
