"""Laws of the autoencoder with a triplet loss on its codes (Schroff et al. 2015)."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from code_geometry_laws import (  # noqa: F401
    CODE,
    LABELS,
    by_torch,
    gradients,
    images,
    labels,
    plain,
    same,
    semi_hard,
    small,
    test_outputs_equal_plain_autoencoder,
    test_training_with_labels_separates_the_classes,
    test_two_ranks_equal_one_process,
    test_zero_weight_equals_plain_autoencoder,
    triples,
)
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from torch import Tensor

from aezoo.bases.triplet import MINING

# ---- triplets: Schroff et al. 2015, Hermans et al. 2017 --------------------------------------------------------------


@pytest.mark.parametrize("margin", [0.2, 1.0])
@pytest.mark.parametrize("mining", MINING)
def test_triplet_loss_matches_torch_over_all_triplets(mining: str, margin: float, shifted: Any) -> None:
    model = small("triplet_ae", shifted, mining=mining, margin=margin)
    y = labels(0, 1, 0, 0, 2, 1, -1, 2, -1, 1, 3)
    kinds = set()
    for _ in range(5):
        z = torch.randn(11, CODE, dtype=torch.float64).requires_grad_()
        chosen = semi_hard(z.detach(), y) if mining == "semi_hard" else triples(y)
        d = torch.cdist(z, z)
        kinds |= {bool(d[a, n] > d[a, p]) for a, p, n in chosen}
        mine, expected = model.triplet_loss(z, y), by_torch(z, chosen, margin, mining)
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(*(torch.autograd.grad(v, z)[0] for v in (mine, expected)), rtol=1e-8, atol=1e-11)
        squared = F.triplet_margin_with_distance_loss(
            *(z[list(part)] for part in zip(*chosen, strict=True)),
            distance_function=lambda u, v: (u - v).square().sum(1),
            margin=margin,
        )
        assert (mine - squared).abs() > 1e-3
    assert kinds == {True, False}  # both cases of semi-hard mining occur


@pytest.mark.parametrize(
    "y", [None, labels(-1, -1, -1, -1, -1, -1), labels(3, 3, 3, 3, 3, 3), labels(0, 1, 2, 3, 4, 5)]
)
@pytest.mark.parametrize("mining", MINING)
def test_batch_without_triplets_equals_plain_autoencoder(mining: str, y: Tensor | None, shifted: Any) -> None:
    model, x = small("triplet_ae", shifted, mining=mining), images()
    other = plain(model)
    terms = model.loss(x, y)
    assert float(terms["triplet"].detach()) == 0
    assert same(gradients(model, terms["loss"]), gradients(other, other.loss(x)["loss"]))


@pytest.mark.parametrize("mining", MINING)
def test_separated_classes_have_zero_triplet_loss(mining: str, shifted: Any) -> None:
    model, y = small("triplet_ae", shifted, mining=mining, margin=1.0), labels(0, 0, 1, 1)
    z = torch.tensor([[0.0], [1.0], [4.0], [5.0]], dtype=torch.float64)
    assert float(model.triplet_loss(z, y)) == 0
    # nearest negative at 3, positive at 1: a margin of 2.5 is violated by 0.5 in the two inner triplets of eight
    model.margin = 2.5
    wanted = {"all": 2 * 0.5 / 8, "active": 0.5, "semi_hard": 2 * 0.5 / 4}
    assert float(model.triplet_loss(z, y)) == pytest.approx(wanted[mining])


def test_unlabelled_samples_do_not_change_triplet_term(shifted: Any) -> None:
    for mining in MINING:
        model = small("triplet_ae", shifted, mining=mining)
        z, y = torch.randn(8, CODE, dtype=torch.float64), labels(0, 1, 0, 1, 2, 2, -1, -1)
        torch.testing.assert_close(model.triplet_loss(z, y), model.triplet_loss(z[:6], y[:6]), rtol=1e-12, atol=1e-12)


def test_the_triplet_term_trains_only_the_encoder(shifted: Any) -> None:
    model, x = small("triplet_ae", shifted), images()
    term = model.loss(x, LABELS)["triplet"]
    of_encoder = torch.autograd.grad(term, [*model.encoder.parameters()], retain_graph=True)
    assert max(float(g.norm()) for g in of_encoder) > 1e-3
    of_decoder = torch.autograd.grad(term, [*model.decoder.parameters()], allow_unused=True)
    assert all(g is None for g in of_decoder)


def test_equal_codes_give_triplets_finite_gradients(shifted: Any) -> None:
    for mining in MINING:
        z = torch.zeros(4, CODE, dtype=torch.float64).requires_grad_()
        loss = small("triplet_ae", shifted, mining=mining).triplet_loss(z, labels(0, 0, 1, 1))
        assert float(loss.detach()) == 1.0  # the margin
        assert torch.autograd.grad(loss, z)[0].isfinite().all()
