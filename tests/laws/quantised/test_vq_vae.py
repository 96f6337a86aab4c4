"""Laws of VQ-VAE, vector-quantised autoencoder (van den Oord et al. 2017)."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from quantised_laws import (  # noqa: F401
    DIM,
    PLACES,
    FixedCode,
    built,
    data,
    error,
    gradients,
    on_data,
    require_alike,
    rows,
    small,
    spread,
    test_autocast_indices_and_terms_match_float32,
    test_beta_weights_commitment_only,
    test_each_term_trains_expected_parts_only,
    test_inference_calls_do_not_update_codebook,
    test_invalid_values_are_refused,
    test_loss_matches_numpy_formula,
    test_misplaced_beta_is_detected,
    test_resume_is_exact_and_indices_roundtrip,
    test_rotation_trick_keeps_angle_and_scales_by_norms,
    test_straight_through_passes_code_gradient_to_z,
    test_training_loss_updates_codebook,
    test_usage_is_over_whole_set_not_batch_mean,
)
from sklearn.cluster import KMeans
from torch import Tensor
from torch.utils.data import DataLoader

from aezoo.models.quantised.vq_vae import VQVAE
from aezoo.quantisers import VQ, GroupedVQ

# ---- loss ------------------------------------------------------------------------------------------------------------


def test_training_step_updates_code_counts_once() -> None:
    model, x = small("vq").train(), data()
    before = model.quantiser.count_K.clone()
    hits = np.bincount(model.eval().encode_indices(x).flatten().numpy(), minlength=7)
    model.train().loss(x)
    expected = 0.99 * before.numpy() + 0.01 * hits
    moved = model.quantiser.count_K != len(x) * PLACES / 7  # all but the codes that were restarted
    assert int(moved.sum()) > 0
    np.testing.assert_allclose(model.quantiser.count_K[moved].numpy(), expected[moved.numpy()], rtol=1e-6)


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["diveq", "gumbel"])
def test_diveq_and_gumbel_codes_get_decoder_gradient(estimator: str) -> None:
    model = small("vq-gradient", estimator=estimator).train()
    terms = model.loss(data())
    assert ("codebook" in terms) == (estimator == "gumbel")
    (of_codes,) = gradients(terms["nll"], model.quantiser.parameters())
    assert of_codes.abs().max() > 0


# ---- special cases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"update": "gradient"}, {"cosine": True}, {"dead_below": 3.0, "decay": 0.5}])
def test_one_group_equals_vq_vae_with_legacy_names(settings: dict[str, Any]) -> None:
    given = {"latent_dim": DIM, "codebook_size": 7, "beta": 0.6, **settings}
    one, other = (spread(built("vq_vae", n_groups=1, **given).double()) for _ in range(2))
    assert type(one.quantiser) is VQ
    other.load_state_dict(one.state_dict())
    other.quantiser = GroupedVQ(DIM, 1, 7, **{"dead_below": 1.0, **settings}).double()
    other.quantiser.groups[0].load_state_dict(one.quantiser.state_dict())
    require_alike(one, other)


@pytest.mark.parametrize(
    "settings",
    [{}, {"update": "gradient"}, {"cosine": True}, {"estimator": "rotation"}, {"dead_below": 3.0, "decay": 0.5}],
)
def test_groups_equal_separate_vq_vaes(settings: dict[str, Any]) -> None:
    """Terms are summed over the groups, and the indices of a position are those of its groups in turn."""
    settings = {"codebook_size": 7, "beta": 0.6, **settings}
    whole = spread(built("vq_vae", latent_dim=DIM, n_groups=2, **settings).double())
    parts = [built("vq_vae", latent_dim=DIM // 2, **settings).double().quantiser for _ in range(2)]
    for part, group in zip(parts, whole.quantiser.groups, strict=True):
        part.load_state_dict(group.state_dict())
    for training in (True, True, False):
        z = torch.randn(9, DIM, PLACES, dtype=torch.float64, requires_grad=True)
        whole.encoder, grad = FixedCode(z), torch.randn(9, DIM, PLACES, dtype=torch.float64)
        found = whole.train(training).quantise(data(9))
        cuts = [(part.train(training)(cut), cut) for part, cut in zip(parts, z.split(DIM // 2, 1), strict=True)]
        assert torch.equal(found.indices, torch.cat([of.indices for of, _ in cuts], 1))
        assert torch.equal(found.z_q, torch.cat([of.z_q for of, _ in cuts], 1))
        assert found.terms.keys() == cuts[0][0].terms.keys()
        for term, value in found.terms.items():
            torch.testing.assert_close(value, cuts[0][0].terms[term] + cuts[1][0].terms[term])
        (of_z,) = torch.autograd.grad(found.z_q, z, grad)
        theirs = torch.autograd.grad([of.z_q for of, _ in cuts], z, [*grad.split(DIM // 2, 1)])[0]
        assert torch.equal(of_z, theirs)
    assert not torch.equal(*(part.code_KD for part in parts))
    for part, group in zip(parts, whole.quantiser.groups, strict=True):
        assert torch.equal(part.code_KD, group.code_KD)


# ---- k-means ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "decay", "epochs"), [(1437, 0.5, 100), (479, 0.95, 100)])
def test_identity_nets_reach_k_means_inertia(rows: Tensor, batch: int, decay: float, epochs: int) -> None:
    first = rows[torch.randperm(len(rows))[:20]].clone()
    reference = KMeans(20, init=first.numpy(), n_init=1, max_iter=300).fit(rows.numpy()).inertia_
    model = on_data(VQVAE, 64, codebook_size=20, decay=decay, data_init=False, dead_below=0.0)
    model.quantiser.code_KD.copy_(first)
    model.quantiser.sum_KD.copy_(first)
    start = error(model, rows)
    model.train()
    for _ in range(epochs):
        for part in rows[torch.randperm(len(rows))].split(batch):
            model.training_step(part, 0)
    found = error(model, rows)
    assert start > 1.3 * reference
    assert found < 1.01 * reference
    # both terms of the loss are this error
    terms = model.loss(rows)
    assert terms["commitment"].item() * len(rows) == pytest.approx(found, rel=1e-4)
    constant = 0.5 * 64 * math.log(math.pi)  # of a Gaussian of variance 1 / 2
    assert (terms["nll"].item() - constant) * len(rows) == pytest.approx(found, rel=1e-3)


def test_codes_are_initialised_once_from_first_batch(rows: Tensor) -> None:
    first, second = rows[:700], rows[700:]
    model = on_data(VQVAE, 64, codebook_size=20).train()
    assert not model.started
    model.begin_step((first,), 0)
    assert bool(model.started)
    codes = model.quantiser.code_KD.clone()
    reference = min(KMeans(20, n_init=1, random_state=seed).fit(first.numpy()).inertia_ for seed in range(3))
    assert error(model, first) < 1.03 * reference
    label = torch.cdist(first, codes).argmin(1)
    means = torch.stack([first[label == k].mean(0) for k in range(20)])
    assert (codes - means).norm() < 0.05 * codes.norm()
    loaded = on_data(VQVAE, 64, codebook_size=20)
    loaded.load_state_dict(model.state_dict())
    for started in (model, loaded):
        started.train().begin_step((second,), 0)
        assert torch.equal(started.quantiser.code_KD, codes)
    never = on_data(VQVAE, 64, codebook_size=20, data_init=False).train()
    codes = never.quantiser.code_KD.clone()
    never.begin_step((first,), 0)
    assert torch.equal(never.quantiser.code_KD, codes)


def test_channel_groups_reach_k_means(rows: Tensor) -> None:
    """2 groups of 20 codes make 20^2 codes, where a single codebook of as many numbers has 20."""
    model = on_data(VQVAE, 64, codebook_size=20, n_groups=2, decay=0.5, dead_below=0.0).train()
    model.begin_step((rows,), 0)
    reference = sum(
        min(KMeans(20, n_init=1, random_state=seed).fit(half.numpy()).inertia_ for seed in range(3))
        for half in rows.split(32, 1)
    )
    start = error(model, rows)
    assert start < 1.03 * reference
    for _ in range(10):
        model.train().training_step(rows, 0)
    assert error(model, rows) < 1.001 * start
    assert model.index_shape == (2, 1) and model.index_sizes == (20, 20)
    one_book = KMeans(20, n_init=1, random_state=0).fit(rows.numpy()).inertia_
    assert error(model, rows) < 0.9 * one_book


# ---- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_revival_uses_every_code_on_balanced_clusters(quiet: Any) -> None:
    clusters = torch.rand(48, 6).repeat(16, 1)[torch.randperm(768)]
    loader: Any = DataLoader((clusters + 0.01 * torch.randn(768, 6)).clamp(0, 1), batch_size=192)  # type: ignore[arg-type]
    used = {}
    for dead_below in (0.0, 1.0):
        torch.manual_seed(4)
        settings = {"latent_dim": DIM, "codebook_size": 12, "decay": 0.9, "data_init": False}
        model = built("vq_vae", places=1, dead_below=dead_below, **settings)
        trainer = quiet(max_epochs=20)
        trainer.fit(model, loader, loader)
        trainer.validate(model, loader, verbose=False)
        used[dead_below] = float(trainer.callback_metrics["val/usage"])
    assert used[0.0] < 0.8
    assert used[1.0] == 1.0
