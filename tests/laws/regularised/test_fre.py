"""Laws of FRE (Ahuja et al. 2023): principal components of frozen features, and the map of their errors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from frozen_feature_laws import (  # noqa: F401
    images,
    small,
    test_bfloat16_keeps_statistics_in_float32,
    test_fitted_model_finds_and_locates_defects,
    test_image_decoder_does_not_affect_code_map_or_score,
    test_missing_network_is_refused_in_one_line,
    test_saved_model_contains_the_weights_of_its_network,
    test_training_does_not_change_frozen_network,
    test_two_ranks_of_frozen_features_equal_one_process,
    test_vectors_and_volumes_are_refused,
)
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from sklearn.decomposition import PCA
from torch import Tensor


def test_errors_of_principal_components_match_scikit_learn() -> None:
    model, x = small("fre", latent_dim=4), images(40)
    f_BF = model.feature_vector(x)
    pca = PCA(4).fit(f_BF.numpy())
    with torch.no_grad():
        model.W_DF.copy_(torch.from_numpy(pca.components_))
        model.c_F.copy_(torch.from_numpy(pca.mean_))
        model.b_D.copy_(-model.W_DF @ model.c_F)
    wanted = np.square(f_BF.numpy() - pca.inverse_transform(pca.transform(f_BF.numpy()))).sum(1)
    np.testing.assert_allclose(model.score(x).detach(), wanted, rtol=1e-8)
    np.testing.assert_allclose(model.encode(x).detach(), pca.transform(f_BF.numpy()), rtol=1e-6, atol=1e-9)
    assert model.loss(x)["fre"].item() == pytest.approx(wanted.mean())


@pytest.mark.slow
def test_trained_error_is_that_of_principal_components() -> None:
    model, x = small("fre", latent_dim=4).train(), images(40)
    f_BF = model.feature_vector(x)
    optimizer = torch.optim.LBFGS([model.W_DF, model.b_D, model.c_F], max_iter=1000, line_search_fn="strong_wolfe")

    def error() -> Tensor:
        optimizer.zero_grad()
        value = model.errors(f_BF).sum(1).mean()
        value.backward()
        return value.detach()

    optimizer.step(error)  # type: ignore[arg-type]
    pca = PCA(4).fit(f_BF.numpy())
    best = np.square(f_BF.numpy() - pca.inverse_transform(pca.transform(f_BF.numpy()))).sum(1).mean()
    assert best * (1 - 1e-9) < error().item() < 1.01 * best


@pytest.mark.parametrize("pool", [1, 2, 100])
def test_features_are_averages_over_windows(pool: int) -> None:
    model, x = small("fre", (1, 40, 33), pool=pool), images(3, shape=(1, 40, 33))
    f = model.maps(x)[-1]
    side = min(pool, 5)
    means = [
        [f[:, :, i * side : (i + 1) * side, j * side : (j + 1) * side].mean((2, 3)) for j in range(5 // side)]
        for i in range(5 // side)
    ]
    wanted = torch.stack([torch.stack(row, 2) for row in means], 2)
    torch.testing.assert_close(model.feature_vector(x).view(wanted.shape), wanted)
    assert model.pooled_shape == tuple(wanted.shape[1:])


def test_map_is_error_of_each_place() -> None:
    model, x = small("fre", (1, 40, 33)), images(3, shape=(1, 40, 33))
    with torch.no_grad():
        model.c_F += torch.rand(model.c_F.shape)
        f_BF = model.feature_vector(x)
        f_hat_BF = (f_BF @ model.W_DF.T + model.b_D) @ model.W_DF + model.c_F
        error = ((f_BF - f_hat_BF) ** 2).view(3, *model.pooled_shape).sum(1)
    torch.testing.assert_close(
        model.anomaly_map(x).detach(), F.interpolate(error[:, None], (40, 33), mode="bilinear")[:, 0]
    )
    torch.testing.assert_close(model.score(x).detach(), error.sum((1, 2)))


def test_code_has_at_most_half_of_the_features() -> None:
    assert small("fre", (1, 8, 8), latent_dim=220).code_shape == (32,)
    assert small("fre", (1, 40, 33), latent_dim=220).code_shape == (220,)
