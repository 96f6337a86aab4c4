"""Laws of the weakly supervised VAEs: pairs and groups by labels, averaged posteriors, several ranks."""

from typing import Any

import pytest
import torch
import torch.distributions as D
from torch import Tensor
from two_ranks import on_two_ranks

import aezoo
from aezoo.models.variational.ada_gvae import AVERAGES, AdaGVAE
from aezoo.models.variational.mlvae import MLVAE
from aezoo.models.variational.triplet_vae import TripletVAE
from aezoo.models.variational.vae import VAE
from aezoo.testing import SharedNoise

# the model of each case, for conftest.py
MODEL_OF = {"gvae": "ada_gvae"}


SHAPE, CODE = (2, 3, 3), 4


SHARING: list[Any] = [AdaGVAE, MLVAE]


WEAK = [*SHARING, TripletVAE]


def small(make: Any, **settings: Any) -> Any:
    settings |= {"group_dim": 2} if make is MLVAE and "group_dim" not in settings else {}
    return make(SHAPE, latent_dim=CODE, hidden_dims=(16,), **settings).double()


def images(n: int = 6) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64)


def posterior(n: int = 6) -> tuple[Tensor, Tensor]:
    mu = torch.randn(n, CODE, dtype=torch.float64) @ torch.randn(CODE, CODE, dtype=torch.float64) + 0.5
    return mu, torch.randn(n, CODE, dtype=torch.float64) - 1


def normal(mu: Tensor, log_var: Tensor) -> D.Normal:
    return D.Normal(mu, (0.5 * log_var).exp())


def terms_at(model: Any, mu: Tensor, log_var: Tensor, y: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
    """The loss with given posteriors and zero noise, and the decoder's input in it."""
    model.posterior = lambda x: (mu, log_var)
    seen: list[Tensor] = []
    hook = model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", torch.zeros_like)
        terms = model.loss(images(len(mu)), y)
    hook.remove()
    return terms, seen[0]


def labels(*values: int) -> Tensor:
    return torch.tensor(values)


# ---- without labels --------------------------------------------------------------------------------------------------


ALONE: dict[str, Tensor | None] = {
    "none": None,
    "unknown": labels(-1, -1, -1, -1, -1, -1),
    "all different": labels(5, 3, 0, 2, 9, 1),
}


def model_and_vae(make: Any, shifted: Any, **settings: Any) -> tuple[Any, Any]:
    model, vae = small(make, **settings), shifted(small(VAE))
    model.load_state_dict(vae.state_dict())
    return model, vae


def losses(model: Any, vae: Any, y: Tensor | None, training: bool) -> list[dict[str, Tensor]]:
    found, x = [], images()
    for each, given in ((model, y), (vae, None)):
        torch.manual_seed(3)
        each.zero_grad()
        found.append(each.train(training).loss(x, given))
        found[-1]["loss"].backward()
    return found


def assert_equals_vae(model: Any, vae: Any, y: Tensor | None, training: bool) -> None:
    mine, theirs = losses(model, vae, y, training)
    for term in ("loss", "nll", "kl", "elbo"):
        torch.testing.assert_close(mine[term], theirs[term], rtol=1e-10, atol=1e-12)
    for p, q in zip(model.parameters(), vae.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("y", ALONE.values(), ids=list(ALONE))
@pytest.mark.parametrize("make", WEAK)
def test_ungrouped_samples_equal_vae(make: Any, y: Tensor | None, training: bool, shifted: Any) -> None:
    assert_equals_vae(*model_and_vae(make, shifted), y, training)


@pytest.mark.parametrize("average", AVERAGES)
def test_averaging_sample_with_itself_is_identity(average: str, shifted: Any) -> None:
    assert_equals_vae(*model_and_vae(AdaGVAE, shifted, average=average), ALONE["all different"], True)


@pytest.mark.parametrize("make", WEAK)
def test_group_labels_change_loss(make: Any, shifted: Any) -> None:
    mine, theirs = losses(*model_and_vae(make, shifted), labels(0, 0, 1, 1, -1, -1), True)
    assert (mine["loss"] - theirs["loss"]).abs() > 1e-3


@pytest.mark.parametrize("make", WEAK)
def test_inference_without_labels_equals_vae(make: Any, shifted: Any) -> None:
    x, found = images(), []
    for each in model_and_vae(make, shifted):
        torch.manual_seed(5)
        each.eval()
        found.append([each.encode(x), each(x), each.score(x), each.log_likelihood(x, 20), each.sample(3)])
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("make", WEAK)
def test_beta_weighs_distance_of_kl_from_capacity(make: Any, shifted: Any) -> None:
    """On both sides of the capacity (Burgess et al. 2018); the model's other terms stay the same."""
    model, x, found = shifted(small(make)), images(), []
    for beta, capacity in ((1.0, 0.0), (0.25, 0.0), (0.25, 90.0)):
        model.beta, model.capacity = beta, capacity
        torch.manual_seed(3)
        found.append(model.loss(x, labels(0, 0, 1, 1, -1, -1)))
    kl = found[0]["kl"]
    assert 0.1 < kl < 89
    torch.testing.assert_close(found[1]["loss"], found[0]["loss"] - 0.75 * kl)
    torch.testing.assert_close(found[2]["loss"], found[0]["loss"] - kl + 0.25 * (90 - kl))


# ---- Ada-GVAE: Locatello et al. 2020 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("average", AVERAGES)
def test_an_identical_pair_shares_every_dimension(average: str) -> None:
    mu, log_var = (t[:1].expand(2, -1) for t in posterior())
    model = small(AdaGVAE, average=average)
    assert model.shared(mu, log_var, mu, log_var).all()
    for found, expected in zip(model.paired(mu, log_var, labels(4, 4)), (mu, log_var), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("average", AVERAGES)
def test_most_different_dimension_is_kept_least_averaged(average: str) -> None:
    mu, log_var = posterior(2)
    model = small(AdaGVAE, average=average)
    kl = D.kl_divergence(normal(mu, log_var), normal(mu.flip(0), log_var.flip(0)))
    kl = kl + kl.flip(0)
    new = model.paired(mu, log_var, labels(0, 0))
    for i in range(2):
        far, near = kl[i].argmax(), kl[i].argmin()
        assert new[0][i, far] == mu[i, far] and new[1][i, far] == log_var[i, far]
        expected = model.averaged(mu[i], log_var[i], mu[1 - i], log_var[1 - i])
        assert new[0][i, near] == expected[0][near] and new[1][i, near] == expected[1][near]
        assert abs(new[0][i, near] - mu[i, near]) > 1e-4


@pytest.mark.parametrize("average", AVERAGES)
def test_loss_uses_averaged_posteriors(average: str) -> None:
    mu, log_var = posterior()
    y, model = labels(0, 1, 0, 0, 1, -1), small(AdaGVAE, average=average, beta=3.0)
    terms, z = terms_at(model, mu, log_var, y)
    new_mu, new_log_var = model.paired(mu, log_var, y)
    assert (new_mu - mu).abs().max() > 0.1
    torch.testing.assert_close(z, new_mu)
    prior = D.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    torch.testing.assert_close(terms["kl"], D.kl_divergence(normal(new_mu, new_log_var), prior).sum(1).mean())
    torch.testing.assert_close(terms["loss"], terms["nll"] + 3 * terms["kl"])


# ---- all models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", WEAK)
def test_two_ranks_equal_one_process_with_split_groups(make: Any, shifted: Any) -> None:
    model, x, y = shifted(small(make)), images(), labels(0, 1, 0, 1, 1, 2)
    with SharedNoise(range(6), 6):
        whole = model.loss(x, y)
    together = on_two_ranks(model, x, y)
    for term in whole:
        torch.testing.assert_close(together.terms[term], whole[term])
    expected = torch.autograd.grad(whole["loss"], [*model.parameters()])
    for a, b in zip(together.gradients(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    for wrong in ({"exchange": False}, {"ranked": False}):
        assert (on_two_ranks(model, x, y, **wrong).terms["loss"] - whole["loss"]).abs() > 1e-4


@pytest.mark.parametrize("make", WEAK)
def test_groups_and_pairs_ignore_batch_order(make: Any, shifted: Any) -> None:
    model, x, y = shifted(small(make)), images(), labels(0, 1, 0, 2, 1, -1)
    order = torch.tensor([4, 2, 5, 0, 3, 1])
    found = []
    for rows in (torch.arange(6), order):
        with SharedNoise(rows.tolist(), 6):
            found.append(model.loss(x[rows], y[rows])["loss"])
    torch.testing.assert_close(*found)


def least_variance_within_pairs(model: Any, with_labels: bool) -> float:
    """Train on x = a u + b v with one a per pair; return the least share within pairs of a code's variance."""
    torch.manual_seed(1)
    pair = torch.arange(256).repeat_interleave(2)
    a, b = torch.randn(256).repeat_interleave(2), torch.randn(512)
    u, v = torch.tensor([1.0, 0, 1, 0, 1, 0]), torch.tensor([0.0, 1, 1, 0, 1, 1])  # neither is a principal component
    x = a[:, None] * u + b[:, None] * v
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(300):
        rows = slice(128 * (step % 4), 128 * (step % 4) + 128)
        optimizer.zero_grad()
        model.loss(x[rows], pair[rows] if with_labels else None)["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        z = model.encode(x)
    within = (z[::2] - z[1::2]).square().mean(0) / 2
    return float((within / z.var(0)).min())


@pytest.mark.slow
@pytest.mark.parametrize("make", SHARING)
def test_pair_training_finds_shared_dimension(make: Any) -> None:
    found = []
    for with_labels in (True, False):
        torch.manual_seed(0)
        model = make((6,), latent_dim=2, hidden_dims=(), likelihood="gaussian:0.3")
        found.append(least_variance_within_pairs(model, with_labels))
    assert found[0] < 0.01 < 0.05 < found[1]


@pytest.mark.parametrize(
    ("make", "settings", "word"),
    [
        (AdaGVAE, {"average": "vae"}, "average"),
        (AdaGVAE, {"beta": -1.0}, "beta"),
        (MLVAE, {"group_dim": -1}, "group_dim"),
        (MLVAE, {"group_dim": CODE + 1}, "latent_dim = 4"),
    ],
)
def test_invalid_values_are_refused(make: Any, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word):
        small(make, **settings)
