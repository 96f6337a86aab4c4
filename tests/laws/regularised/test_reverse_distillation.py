"""Laws of reverse distillation (Deng & Li 2022): the distances of maps, the map of pixels, and the shapes."""

import numpy as np
import pytest
import torch
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
from scipy.ndimage import gaussian_filter, zoom

import aezoo


def test_distances_are_one_minus_cosine_of_places() -> None:
    model, x = small("reverse_distillation").requires_grad_(False), images(3)
    maps = model.maps(x)
    restored = model.restore(model.encode(x))
    total = 0.0
    for M, E, D in zip(model.distances(maps, restored), maps, restored, strict=True):
        E_np, D_np = E.numpy(), D.numpy()
        norms = np.linalg.norm(E_np, axis=1) * np.linalg.norm(D_np, axis=1)
        present = norms > 1e-6
        np.testing.assert_allclose(M[present], (1 - (E_np * D_np).sum(1) / np.maximum(norms, 1e-9))[present], rtol=1e-6)
        total += float(M.mean())
    assert float(model.loss(x)["distillation"]) == pytest.approx(total)


def test_distance_ignores_length_of_restored_features() -> None:
    model, x = small("reverse_distillation"), images(3)
    maps = [found + 0.1 for found in model.maps(x)]
    for M in model.distances(maps, [3 * found for found in maps]):
        assert M.abs().max() < 1e-9


def test_map_is_smoothed_sum_of_enlarged_distances() -> None:
    model, x = small("reverse_distillation", sigma=1.5), images(3)
    maps = model.maps(x)
    with torch.no_grad():
        distances = model.distances(maps, model.restore(model.encode(x)))
        found, score = model.anomaly_map(x).numpy(), model.score(x)
    # the corners of maps and image are aligned
    large = sum(zoom(M.numpy(), (1, 12 / M.shape[1], 13 / M.shape[2]), order=1, grid_mode=False) for M in distances)
    wanted = np.stack([gaussian_filter(each, 1.5, mode="mirror", truncate=4) for each in large])
    np.testing.assert_allclose(found, wanted, rtol=1e-7)
    np.testing.assert_allclose(score, wanted.max((1, 2)), rtol=1e-7)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 27, 35), (1, 40, 9)], ids=str)
@pytest.mark.parametrize("features", ["random", "timm:resnet18,out_indices=1:2:3"])
def test_restored_maps_have_the_shapes_of_the_maps(shape: tuple[int, ...], features: str) -> None:
    torch.manual_seed(0)
    model = aezoo.create_model("reverse_distillation", shape, features=features, latent_dim=3)
    x = torch.rand(2, *shape)
    z = model.encode(x)
    assert z.shape == (2, *model.code_shape) and model.code_shape[0] == 3
    assert [found.shape for found in model.restore(z)] == [found.shape for found in model.maps(x)]
