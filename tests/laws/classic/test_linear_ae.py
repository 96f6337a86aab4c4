"""Laws of the linear autoencoder (Baldi & Hornik 1989)."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA
from torch import Tensor

import aezoo

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

# training MSE per value of PCA on Fashion-MNIST's 60,000 images / 255, by an eigendecomposition in float64
FASHION_PCA = {2: 0.046294, 4: 0.036744, 8: 0.026689, 16: 0.020430}


# the same for scikit-learn's digits / 16, its first 1,437
DIGITS_PCA = {2: 0.052584, 4: 0.037560, 8: 0.023809, 10: 0.019129, 16: 0.010922}


def mse(model: aezoo.Autoencoder, x: Tensor) -> float:
    """Mean squared error per value in float64."""
    with torch.no_grad():
        return float(((model.double()(x.double()) - x.double()) ** 2).mean())


def principal_angle(model: aezoo.Autoencoder, vectors: np.ndarray) -> float:
    weight = model.decoder[0].weight.detach().double().numpy()
    return float(subspace_angles(weight, vectors[:, : weight.shape[1]]).max())


# ---- linear_ae: Baldi & Hornik 1989 ----------------------------------------------------------------------------------


def linear_ae_is_pca(x: Tensor, k: int, fitted: aezoo.Autoencoder, spectrum: Any) -> tuple[float, float]:
    """The ratio to PCA's error and the largest principal angle, after a check that the error is not below PCA's."""
    _, values, vectors = spectrum(x)
    best = values[k:].sum() / len(values)
    ratio = mse(fitted, x) / best
    assert 1 - 1e-9 < ratio < 1.01
    return ratio, principal_angle(fitted, vectors)


@pytest.mark.slow
@pytest.mark.parametrize("k", [4, 10])
def test_linear_ae_is_pca_on_digits(k: int, digits: Tensor, spectrum: Any, centred: Any, adam: Any, lbfgs: Any) -> None:
    x = digits[:1437]
    assert spectrum(x)[1][k:].sum() / 64 == pytest.approx(DIGITS_PCA[k], abs=1e-6)
    sk = PCA(k).fit(x.flatten(1).numpy())
    rebuilt = torch.from_numpy(sk.inverse_transform(sk.transform(x.flatten(1).numpy())))
    assert ((rebuilt - x.flatten(1)) ** 2).mean() == pytest.approx(DIGITS_PCA[k], abs=1e-6)
    model = centred(aezoo.create_model("linear_ae", input_shape=(1, 8, 8), latent_dim=k), x)
    adam(model, x.float(), steps=1500, lr=5e-3, batch=256)
    lbfgs(model.double(), x, rounds=250)
    ratio, angle = linear_ae_is_pca(x, k, model, spectrum)
    assert ratio < 1 + 1e-4
    assert angle < 1e-2


@pytest.mark.slow
def test_linear_ae_is_pca_on_mnist(mnist5k: Tensor, spectrum: Any, centred: Any, adam: Any, lbfgs: Any) -> None:
    model = centred(aezoo.create_model("linear_ae", input_shape=(1, 28, 28), latent_dim=6), mnist5k)
    adam(model, mnist5k.float(), steps=1000, lr=3e-3, batch=256)
    lbfgs(model.double(), mnist5k, rounds=100)
    assert linear_ae_is_pca(mnist5k, 6, model, spectrum)[1] < 1e-2


def rows_of_same_moments(x: Tensor) -> Tensor:
    """Two rows for each dimension, with x's mean and covariance: a linear model's error depends on nothing else."""
    flat = x.double().flatten(1)
    values, vectors = torch.linalg.eigh(flat.T.cov(correction=0))
    rows = vectors.T * (len(values) * values.clamp(min=0)).sqrt()[:, None]
    return (flat.mean(0) + torch.cat([rows, -rows])).unflatten(1, x.shape[1:])


@pytest.mark.slow
def test_linear_ae_is_pca_on_fashion_mnist(
    fashion_mnist: Any, spectrum: Any, centred: Any, adam: Any, lbfgs: Any
) -> None:
    x = fashion_mnist[0]
    assert len(x) == 60_000
    found = spectrum(x)
    values, few = found[1], rows_of_same_moments(x)
    for k, figure in FASHION_PCA.items():
        assert values[k:].sum() / 784 == pytest.approx(figure, abs=1e-6)
    # after 8 eigenvalues there is a large gap, which determines the subspace
    model = centred(aezoo.create_model("linear_ae", input_shape=(1, 28, 28), latent_dim=8), x)
    adam(model, x, steps=300, lr=3e-3, batch=512)
    torch.testing.assert_close(mse(model, few), mse(model, x), rtol=1e-9, atol=0)
    lbfgs(model.double(), few, 400)
    ratio, angle = linear_ae_is_pca(x, 8, model, lambda _: found)
    assert ratio == pytest.approx(1, abs=1e-3)
    assert angle < 1e-2


def test_linear_ae_minimises_the_plain_squared_error(shifted: Any) -> None:
    model = shifted(aezoo.create_model("linear_ae", input_shape=(3, 5), latent_dim=2).double())
    x = torch.rand(7, 3, 5, dtype=torch.float64)
    W, b = model.encoder[1].weight, model.encoder[1].bias
    V, c = model.decoder[0].weight, model.decoder[0].bias
    x_hat = (x.flatten(1) @ W.T + b) @ V.T + c
    sse = ((x.flatten(1) - x_hat) ** 2).sum(1)
    torch.testing.assert_close(model.loss(x)["loss"], sse.mean() + 7.5 * math.log(math.pi))
    torch.testing.assert_close(model.score(x), sse + 7.5 * math.log(math.pi))
