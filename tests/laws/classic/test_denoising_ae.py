"""Laws of the denoising autoencoder (Vincent et al. 2008)."""

from typing import Any

import pytest
import torch
import torch.distributions as D
from denoising_helpers import (
    noise_law,
)
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from sklearn.linear_model import LinearRegression
from torch import Tensor

import aezoo
from aezoo.models.classic.denoising_ae import DenoisingAE

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

# ---- denoising_ae: Vincent et al. 2008, Alain & Bengio 2014 ----------------------------------------------------------


def linear_denoiser(dims: int, std: float) -> aezoo.Autoencoder:
    return aezoo.create_model(
        "denoising_ae", input_shape=(dims,), corruption=f"gaussian:{std}", latent_dim=dims + 1, hidden_dims=(),
        likelihood="gaussian",
    ).double()  # fmt: skip


def as_matrix(model: aezoo.Autoencoder, dims: int) -> Tensor:
    """The linear map of a linear model, from its outputs: row i is the image of e_i."""
    with torch.no_grad():
        eye = torch.eye(dims, dtype=torch.float64)
        return model.decode(model.encode(eye)) - model.decode(model.encode(0 * eye))


@pytest.mark.slow
def test_linear_denoiser_matches_wiener_filter() -> None:
    dims, std, n = 4, 0.6, 100_000
    A = torch.randn(dims, dims, dtype=torch.float64) * 0.7
    S = A @ A.T
    x = torch.randn(n, dims, dtype=torch.float64) @ A.T
    model = linear_denoiser(dims, std)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=120, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        torch.manual_seed(5)  # the same noise in each call, so that the optimum for it is known
        optimizer.zero_grad()
        loss = model.loss(x)["loss"]
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.manual_seed(5)
    fitted = LinearRegression().fit(model.corruption(x).numpy(), x.numpy())
    found = as_matrix(model, dims)
    torch.testing.assert_close(found, torch.from_numpy(fitted.coef_).T.contiguous(), rtol=0, atol=1e-4)
    wiener = torch.linalg.solve(S + std**2 * torch.eye(dims, dtype=torch.float64), S)  # (S + s^2 I)^-1 S, its transpose
    torch.testing.assert_close(found, wiener, rtol=0, atol=1e-2)
    assert (found - torch.eye(dims)).abs().max() > 0.1
    # Tweedie on N(0, S): r(x~) - x~ = s^2 grad log N(x~; 0, S + s^2 I)
    noisy = torch.randn(50, dims, dtype=torch.float64, requires_grad=True)
    normal = torch.distributions.MultivariateNormal(noisy.new_zeros(dims), S + std**2 * torch.eye(dims))
    (score,) = torch.autograd.grad(normal.log_prob(noisy).sum(), noisy)
    torch.testing.assert_close(noisy @ wiener - noisy, std**2 * score)


def mixture(std: float) -> torch.distributions.MixtureSameFamily:
    """A mixture of three Gaussians in the plane, with added noise of this standard deviation."""
    means = torch.tensor([[-1.5, 0.0], [1.2, 0.8], [0.3, -1.4]])
    scales = torch.tensor([[0.3, 0.5], [0.4, 0.25], [0.5, 0.3]])
    parts = torch.distributions.Independent(torch.distributions.Normal(means, (scales**2 + std**2).sqrt()), 1)
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.tensor([0.5, 0.3, 0.2])), parts)


@pytest.mark.slow
def test_nonlinear_denoiser_finds_score_of_noisy_density() -> None:
    std = 0.5
    model = aezoo.create_model(
        "denoising_ae", input_shape=(2,), corruption=f"gaussian:{std}", latent_dim=64, hidden_dims=(64,),
        activation="silu", likelihood="gaussian",
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2500)
    for _ in range(2500):
        optimizer.zero_grad()
        model.loss(mixture(0).sample((1024,)))["loss"].backward()
        optimizer.step()
        schedule.step()
    noisy = mixture(std).sample((4000,)).requires_grad_()
    (score,) = torch.autograd.grad(mixture(std).log_prob(noisy).sum(), noisy)
    with torch.no_grad():
        found = (model(noisy) - noisy) / std**2
    error = ((found - score) ** 2).mean() / (score**2).mean()
    assert error < 0.01
    # which is not the score of the clean density
    (clean,) = torch.autograd.grad(mixture(0).log_prob(noisy).sum(), noisy)
    assert ((found - clean) ** 2).mean() / (clean**2).mean() > 0.1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("corruption", ["gaussian:0.3", "masking:0.4", "salt_and_pepper:0.3"])
def test_clean_sample_is_predicted_from_corrupted_one(corruption: str, training: bool, shifted: Any) -> None:
    """The loss is the cross-entropy of the clean values, summed over them, with the code of the corrupted sample."""
    model = shifted(DenoisingAE((2, 3, 5), corruption=corruption, latent_dim=4, hidden_dims=(16,))).double()
    x = torch.rand(6, 2, 3, 5, dtype=torch.float64)
    torch.manual_seed(3)
    noisy = model.corruption(x)
    torch.manual_seed(3)
    loss = model.train(training).loss(x)["loss"]
    p = model.decoder(model.encoder(noisy)).sigmoid()
    expected = -(x * p.log() + (1 - x) * (1 - p).log()).flatten(1).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    own = [*model.parameters()]
    for a, b in zip(torch.autograd.grad(loss, own), torch.autograd.grad(expected, own), strict=True):
        torch.testing.assert_close(a, b)
    clean = -D.Bernoulli(model(x), validate_args=False).log_prob(x).flatten(1).sum(1)
    assert (noisy - x).abs().max() > 0.2 and (loss - clean.mean()).abs() > 1e-3
    torch.testing.assert_close(model.score(x), clean)


@pytest.mark.parametrize("name", ["gaussian:0", "masking:0", "salt_and_pepper:0", "none"])
def test_no_noise_equals_dense_autoencoder(name: str, shifted: Any) -> None:
    x = torch.rand(5, 1, 6, 7)
    settings = {"input_shape": (1, 6, 7), "hidden_dims": (16, 8), "latent_dim": 4}
    torch.manual_seed(0)
    dense = shifted(aezoo.create_model("dense_ae", **settings))
    torch.manual_seed(0)
    denoising = shifted(aezoo.create_model("denoising_ae", corruption=name, **settings))
    for model in (dense, denoising):
        model.loss(x)["loss"].backward()
    assert torch.equal(dense.loss(x)["loss"], denoising.loss(x)["loss"])
    pairs = zip(dense.parameters(), denoising.parameters(), strict=True)
    assert all(torch.equal(a, b) and torch.equal(a.grad, b.grad) for a, b in pairs)


def test_noise_is_fixed_in_evaluation_fresh_in_training(quiet: Any) -> None:
    noise_law(DenoisingAE((1, 4, 4), corruption="gaussian:0.3"), quiet)


class Encdr(DenoisingAE):
    """Validates on clean input, like the library encdr."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        if self.training:
            return super().loss(x)
        nll = self.nll(self.decoder(self.encoder(x)), x).mean()
        return {"loss": nll, "nll": nll}


def test_noise_free_validation_loss_is_detected(quiet: Any) -> None:
    with pytest.raises(AssertionError):
        noise_law(Encdr((1, 4, 4), corruption="gaussian:0.3"), quiet)
