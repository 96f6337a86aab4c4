"""Laws of PatchCore (Roth et al. 2022): the coreset, distances against scikit-learn, the score."""

from typing import Any

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
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from aezoo.models.regularised.patchcore import k_centres


def patches(model: Any, x: Tensor) -> np.ndarray:
    return model.encode(x).flatten(2).mT.flatten(0, 1).numpy()


def greedy(x: np.ndarray, k: int) -> list[int]:
    """The definition: always the point farthest from all chosen ones."""
    chosen = [0]
    while len(chosen) < min(k, len(x)):
        chosen.append(int(cdist(x, x[chosen]).min(1).argmax()))
    return chosen


@pytest.mark.parametrize(("n", "k"), [(40, 9), (5, 9), (1, 1)])
def test_coreset_matches_its_definition(n: int, k: int) -> None:
    x = np.random.default_rng(0).normal(size=(n, 3))
    assert k_centres(torch.from_numpy(x), k).tolist() == greedy(x, k)


def test_first_batch_gives_the_coreset_of_its_patches() -> None:
    model, x = small("patchcore").train(), images(4)
    model.loss(x)
    every = patches(model, x)
    np.testing.assert_allclose(model.memory_MD, every[greedy(every, 30)])
    assert int(model.n_held) == 30


def test_memory_of_batches_covers_all_patches() -> None:
    model, x = small("patchcore").train(), images(24)
    for part in x.split(6):
        model.loss(part)
    every, memory = patches(model, x), model.memory_MD.numpy()
    radius, least = cdist(every, memory).min(1).max(), cdist(every, every[greedy(every, 30)]).min(1).max()
    assert least / 2 < radius < 2 * least
    # all entries are patches
    assert cdist(memory, every).min(1).max() < 1e-9


def test_large_memory_contains_every_patch() -> None:
    model, x = small("patchcore", memory_size=500).train(), images(4)
    for part in x.split(1):
        model.loss(part)
    every = patches(model, x)
    assert int(model.n_held) == len(every) < 500
    np.testing.assert_allclose(model.eval().score(x), 0, atol=1e-9)
    # a second epoch adds only repetitions
    model.train().loss(x)
    assert cdist(every, model.memory_MD[: int(model.n_held)].numpy()).min(1).max() < 1e-9


@pytest.mark.parametrize("memory_size", [30, 500])
@pytest.mark.parametrize("k", [1, 4, 1000])
def test_score_matches_formula_with_scikit_learn_neighbours(memory_size: int, k: int) -> None:
    model, x = small("patchcore", memory_size=memory_size, n_neighbors=k).train(), images(5, seed=2)
    model.loss(images(4))
    memory = model.memory_MD[: int(model.n_held)].numpy()
    search, found = NearestNeighbors(n_neighbors=1).fit(memory), model.eval().score(x)
    for one, score in zip(x, found, strict=True):
        z = patches(model, one[None])
        s, nearest = search.kneighbors(z)
        p = s[:, 0].argmax()
        near = cdist(memory[nearest[p, 0]][None], memory)[0].argsort(kind="stable")[:k]
        d = cdist(z[p][None], memory[near])[0]
        w = 1 - np.exp(s[p, 0]) / np.exp(d).sum() if k > 1 else 1
        assert float(score) == pytest.approx(w * s[p, 0], rel=1e-7)


def test_patches_are_averages_of_neighbours() -> None:
    model, x = small("patchcore"), images(2)
    first = model.maps(x)[0]
    padded = F.pad(first, (1, 1, 1, 1))
    shifts = [padded[:, :, i : i + first.shape[2], j : j + first.shape[3]] for i in range(3) for j in range(3)]
    torch.testing.assert_close(model.encode(x)[:, : first.shape[1]], torch.stack(shifts).mean(0))


def test_map_enlarges_and_smooths_distances() -> None:
    model, x = small("patchcore", sigma=1.5).train(), images(3)
    model.loss(images(4, seed=1))
    z = model.eval().encode(x)
    s = cdist(patches(model, x), model.memory_MD.numpy()).min(1).reshape(3, 1, *z.shape[2:])
    large = F.interpolate(torch.from_numpy(s), (12, 13), mode="bilinear")[:, 0].numpy()
    wanted = np.stack([gaussian_filter(each, 1.5, mode="mirror", truncate=4) for each in large])
    np.testing.assert_allclose(model.anomaly_map(x), wanted, rtol=1e-7)
