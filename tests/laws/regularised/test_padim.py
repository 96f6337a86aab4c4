"""Laws of PaDiM (Defard et al. 2021): Gaussians from batches against NumPy, distances against SciPy, the map."""

from typing import Any

import numpy as np
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
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import mahalanobis
from torch import Tensor


def fitted(**settings: Any) -> tuple[Any, Tensor]:
    """A model fitted to 30 samples in batches of several sizes, and the samples."""
    model, x = small("padim", **settings).train(), images(30)
    for part in x.split([7, 1, 12, 10]):
        model.loss(part)
    return model.eval(), x


def test_statistics_of_batches_are_those_of_all_samples() -> None:
    model, x = fitted(epsilon=0.02)
    z = model.encode(x).flatten(2).numpy()
    for p in range(z.shape[2]):
        np.testing.assert_allclose(model.mean_PD[p], z[:, :, p].mean(0), rtol=1e-9)
        wanted = np.cov(z[:, :, p].T) + 0.02 * np.eye(20)
        np.testing.assert_allclose(model.covariance()[p], wanted, rtol=1e-8, atol=1e-12)
    assert int(model.count) == 30


def test_distances_match_scipy() -> None:
    model, x = fitted()
    z = model.encode(x[:4]).numpy()
    found, Sigma = model.distances(model.embed(x[:4])), model.covariance().numpy()
    for p, (i, j) in enumerate(np.ndindex(*z.shape[2:])):
        mean, inverse = model.mean_PD[p].numpy(), np.linalg.inv(Sigma[p])
        wanted = [mahalanobis(each[:, i, j], mean, inverse) for each in z]
        np.testing.assert_allclose(found[:, i, j], wanted, rtol=1e-7)


def test_map_enlarges_and_smooths_distances() -> None:
    model, x = fitted(sigma=1.5)
    distances = F.interpolate(model.distances(model.embed(x))[:, None], (12, 13), mode="bilinear")[:, 0].numpy()
    wanted = np.stack([gaussian_filter(each, 1.5, mode="mirror", truncate=4) for each in distances])
    np.testing.assert_allclose(model.anomaly_map(x), wanted, rtol=1e-9)
    np.testing.assert_allclose(model.score(x), wanted.max((1, 2)), rtol=1e-9)


def test_code_is_a_choice_of_channels_of_all_maps() -> None:
    model, x = small("padim", n_features=10**6), images(2)
    first, *others = model.maps(x)
    # a coarser map repeats its values
    rows, columns = torch.arange(first.shape[2]), torch.arange(first.shape[3])
    near = [m[:, :, rows * m.shape[2] // len(rows)][..., columns * m.shape[3] // len(columns)] for m in others]
    every = torch.cat([first, *near], 1)
    torch.testing.assert_close(model.encode(x), every)
    few = small("padim", n_features=20)
    assert few.channels_D.unique().shape == (20,) and torch.equal(few.encode(x), every[:, few.channels_D])


def test_evaluation_does_not_update_statistics() -> None:
    model, x = fitted()
    before = model.scatter_PDD.clone()
    model.loss(images(5, seed=9))
    assert torch.equal(model.scatter_PDD, before) and int(model.count) == len(x)
