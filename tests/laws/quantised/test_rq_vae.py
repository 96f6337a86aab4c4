"""Laws of RQ-VAE, residual-quantised autoencoder (Lee et al. 2022)."""

import itertools
from typing import Any

import pytest
import torch
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_gradients_with_other_settings_are_derivatives,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from quantised_laws import (  # noqa: F401
    DIM,
    built,
    error,
    on_data,
    require_alike,
    rows,
    test_autocast_indices_and_terms_match_float32,
    test_beta_weights_commitment_only,
    test_each_term_trains_expected_parts_only,
    test_inference_calls_do_not_update_codebook,
    test_invalid_values_are_refused,
    test_loss_matches_numpy_formula,
    test_misplaced_beta_is_detected,
    test_quantiser_dropout_keeps_first_levels,
    test_resume_is_exact_and_indices_roundtrip,
    test_rotation_trick_keeps_angle_and_scales_by_norms,
    test_straight_through_passes_code_gradient_to_z,
    test_training_loss_updates_codebook,
    test_usage_is_over_whole_set_not_batch_mean,
)
from sklearn.cluster import KMeans
from torch import Tensor

from aezoo.models.quantised.rq_vae import RQVAE

# ---- special cases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"update": "gradient"}, {"estimator": "rotation"}, {"dead_below": 3.0, "decay": 0.5}, {"dropout": 1.0}],
)
def test_one_level_of_rq_vae_is_vq_vae(settings: dict[str, Any]) -> None:
    settings = {"latent_dim": DIM, "codebook_size": 7, "beta": 0.6, **settings}
    one = built("rq_vae", levels=1, **settings).double()
    other = built("vq_vae", **{name: value for name, value in settings.items() if name != "dropout"}).double()
    other.load_state_dict({key.replace("levels.0.", ""): value for key, value in one.state_dict().items()})
    require_alike(one, other)
    assert torch.equal(one.quantiser.levels[0].code_KD, other.quantiser.code_KD)


# ---- k-means ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_more_levels_reduce_error_with_shared_prefix(rows: Tensor) -> None:
    errors, codebooks = [], []
    for levels in (1, 2, 3, 4):
        model = on_data(RQVAE, 64, levels=levels, codebook_size=16).train()
        model.begin_step((rows,), 0)
        errors.append(error(model, rows))
        codebooks.append(model.quantiser.levels[0].code_KD)
        terms = model.loss(rows)
        indices = model.encode_indices(rows)
        if levels == 4:  # decode the first levels only
            partial = [model.decode_indices(indices.where(torch.arange(4)[:, None] < n, -1)) for n in (1, 2, 3, 4)]
            found = [float((x_hat - rows).double().square().sum()) for x_hat in partial]
            assert found == pytest.approx(errors, rel=1e-5)
            # commitment sums the squared residuals of all levels
            assert terms["commitment"].item() * len(rows) == pytest.approx(sum(errors), rel=1e-4)
    for fewer, more in itertools.pairwise(errors):
        assert more < 0.85 * fewer
    assert all(torch.equal(codebook, codebooks[0]) for codebook in codebooks)
    one_book = KMeans(16, n_init=1, random_state=0).fit(rows.numpy()).inertia_
    assert errors[0] == pytest.approx(one_book, rel=0.03)
