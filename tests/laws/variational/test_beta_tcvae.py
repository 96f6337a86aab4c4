"""Laws of the beta-TCVAE: weights of the batch, the sum of the three terms, exact cases, several ranks, mistakes."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributions as D
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from two_ranks import on_two_ranks

import aezoo
from aezoo.callbacks import BetaAnnealing, FaultGuard
from aezoo.distributions.divergences import ESTIMATORS
from aezoo.models.variational.beta_tcvae import BetaTCVAE
from aezoo.testing import SharedNoise

SHAPE, CODE = (2, 3, 3), 3


STRATIFIED = ("mss", "mss_mean")


class WrongColumns(BetaTCVAE):
    """Weights as beta-tcvae, pythae, disentangling-vae and PyTorch-VAE fill them: by columns, not by diagonals."""

    def log_weights(self, z_BD: Tensor, n: int) -> Tensor:
        N, M = self.n_data.item(), n - 1
        W = torch.full((n, n), 1 / M, dtype=z_BD.dtype)
        W.view(-1)[:: M + 1] = 1 / N
        W.view(-1)[1 :: M + 1] = (N - M) / (N * M)
        W[M - 1, 0] = (N - M) / (N * M)
        return W.log()


def small(make: Any = BetaTCVAE, **settings: Any) -> Any:
    return make(SHAPE, latent_dim=CODE, hidden_dims=(16,), **settings).double()


def images(n: int = 6) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64)


def posteriors(n: int = 6) -> tuple[Tensor, Tensor]:
    """Random means, correlated between dimensions, and log-variances."""
    mu = torch.randn(n, CODE, dtype=torch.float64) @ torch.randn(CODE, CODE, dtype=torch.float64) + 0.5
    return mu, torch.randn(n, CODE, dtype=torch.float64) - 1


def draw(mu: Tensor, log_var: Tensor) -> Tensor:
    return mu + (0.5 * log_var).exp() * torch.randn_like(mu)


def weights(model: Any, n: int) -> Tensor:
    return model.log_weights(torch.zeros(n, CODE, dtype=torch.float64), n).exp()


def terms_at(model: Any, mu: Tensor, log_var: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The loss with given posteriors, and the decoder's input in it."""
    model.posterior = lambda x: (mu, log_var)
    seen: list[Tensor] = []
    hook = model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    terms = model.loss(images(len(mu)))
    hook.remove()
    return terms, seen[0]


def mixture(mu: Tensor, log_var: Tensor) -> tuple[Any, list[Any]]:
    """q(z) and the q(z_d) of a whole data set, by torch.distributions."""
    std, even = (0.5 * log_var).exp(), D.Categorical(torch.ones(len(mu), dtype=mu.dtype))
    joint = D.MixtureSameFamily(even, D.Independent(D.Normal(mu, std), 1))
    return joint, [D.MixtureSameFamily(even, D.Normal(mu[:, d], std[:, d])) for d in range(mu.shape[1])]


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "N"), [(2, 2), (2, 9), (4, 4), (4, 100), (7, 60_000)])
@pytest.mark.parametrize("estimator", STRATIFIED)
def test_stratified_weights_sum_to_one(estimator: str, n: int, N: int) -> None:
    W = weights(small(estimator=estimator, dataset_size=N), n)
    torch.testing.assert_close(W.sum(1), torch.ones(n, dtype=W.dtype))
    torch.testing.assert_close(W.diagonal(), torch.full((n,), 1 / N, dtype=W.dtype))
    assert (W > 0).all()


def test_stratified_weights_average_to_uniform() -> None:
    n, N = 4, 100
    W, mean = (weights(small(estimator=e, dataset_size=N), n) for e in STRATIFIED)
    expected = torch.full((n, n), 1 / 3, dtype=W.dtype)
    for i in range(n):
        expected[i, i], expected[i, (i + 1) % n] = 1 / N, (N - 3) / (3 * N)
    torch.testing.assert_close(W, expected)
    over_orders = [W[list(p)][:, list(p)] for p in itertools.permutations(range(n))]
    torch.testing.assert_close(torch.stack(over_orders).mean(0), mean)


def test_known_wrong_weights_do_not_sum_to_one() -> None:
    W = weights(small(WrongColumns, dataset_size=100), 4)
    assert [round(row, 2) for row in W.sum(1).tolist()] == [1, 1, 1.31, 1]
    assert W.diagonal().max() > 0.3


def unbiased_law(model: Any) -> None:
    """The mean estimate over all batches of 3 of 5 samples, in all orders, is q(z) for the code of each sample."""
    N, n = 5, 3
    mu, log_var = posteriors(N)
    z = draw(mu, log_var)
    exact = mixture(mu, log_var)[0].log_prob(z).exp()
    found: list[list[Tensor]] = [[] for _ in range(N)]
    for rows in itertools.permutations(range(N), n):
        log_q, _ = model.log_aggregate(z[list(rows)], mu[list(rows)], log_var[list(rows)])
        for place, row in enumerate(rows):
            found[row].append(log_q[place].exp())
    torch.testing.assert_close(torch.stack([torch.stack(f).mean() for f in found]), exact)


@pytest.mark.parametrize("estimator", STRATIFIED)
def test_aggregate_density_estimate_is_unbiased(estimator: str) -> None:
    unbiased_law(small(estimator=estimator, dataset_size=5))


def test_wrong_weights_and_mws_are_biased() -> None:
    for model in (small(WrongColumns, dataset_size=5), small(estimator="mws", dataset_size=5)):
        with pytest.raises(AssertionError):
            unbiased_law(model)


def test_mws_matches_double_loop() -> None:
    n, N = 5, 70
    mu, log_var = posteriors(n)
    z = draw(mu, log_var)
    log_q, log_qd = small(estimator="mws", dataset_size=N).log_aggregate(z, mu, log_var)
    for i in range(n):
        per_dim = [0.0] * CODE
        joint = 0.0
        for j in range(n):
            q = [D.Normal(mu[j, d], (0.5 * log_var[j, d]).exp()).log_prob(z[i, d]).exp().item() for d in range(CODE)]
            joint += math.prod(q) / (N * n)
            per_dim = [total + value / (N * n) for total, value in zip(per_dim, q, strict=True)]
        assert log_q[i].item() == pytest.approx(math.log(joint), abs=1e-9)
        assert log_qd[i].tolist() == pytest.approx([math.log(p) for p in per_dim], abs=1e-9)


# ---- exact cases -----------------------------------------------------------------------------------------------------


def test_full_batch_estimate_is_exact_aggregate() -> None:
    n = 6
    mu, log_var = (t.requires_grad_() for t in posteriors(n))
    z = draw(mu, log_var)
    joint, dims = mixture(mu, log_var)
    expected = joint.log_prob(z), torch.stack([q.log_prob(z[:, d]) for d, q in enumerate(dims)], 1)
    found = small(estimator="mss_mean", dataset_size=n).log_aggregate(z, mu, log_var)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
        for g, h in zip(*(torch.autograd.grad(v.sum(), (mu, log_var), retain_graph=True) for v in (a, b)), strict=True):
            torch.testing.assert_close(g, h)
    assert (found[0] - expected[1].sum(1)).abs().max() > 0.1  # the dimensions are dependent
    for model in (small(WrongColumns, dataset_size=n), small(dataset_size=n), small(dataset_size=n + 3)):
        assert (model.log_aggregate(z, mu, log_var)[0] - expected[0]).abs().max() > 1e-3


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_three_terms_sum_to_the_kl_of_the_sample(estimator: str) -> None:
    mu, log_var = posteriors()
    terms, z = terms_at(small(estimator=estimator, dataset_size=50), mu, log_var)
    q, p = D.Normal(mu, (0.5 * log_var).exp()), D.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    sampled = (q.log_prob(z) - p.log_prob(z)).sum(1).mean()
    torch.testing.assert_close(terms["mi"] + terms["tc"] + terms["dwkl"], sampled)
    torch.testing.assert_close(terms["kl"], D.kl_divergence(q, p).sum(1).mean())
    torch.testing.assert_close(terms["elbo"], -(terms["nll"] + terms["kl"]))
    assert (sampled - terms["kl"]).abs() > 1e-3


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_terms_match_formulas_and_weights(estimator: str) -> None:
    mu, log_var = posteriors()
    model = small(estimator=estimator, dataset_size=50, alpha=0.3, beta=5.0, gamma=2.0)
    terms, z = terms_at(model, mu, log_var)
    log_q, log_qd = model.log_aggregate(z, mu, log_var)
    log_qx = D.Normal(mu, (0.5 * log_var).exp()).log_prob(z).sum(1)
    log_p = D.Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(terms["mi"], (log_qx - log_q).mean())
    torch.testing.assert_close(terms["tc"], (log_q - log_qd.sum(1)).mean())
    torch.testing.assert_close(terms["dwkl"], (log_qd.sum(1) - log_p).mean())
    total = terms["nll"] + 0.3 * terms["mi"] + 5 * terms["tc"] + 2 * terms["dwkl"]
    torch.testing.assert_close(terms["loss"], total)


def independent_law(make: Any, **settings: Any) -> None:
    """Equal posteriors of all samples with independent dimensions have zero mutual information and correlation."""
    mu, log_var = (t[:1].expand(4, -1) for t in posteriors())
    terms, _ = terms_at(small(make, dataset_size=100, **settings), mu, log_var)
    torch.testing.assert_close(terms["mi"], torch.zeros_like(terms["mi"]), atol=1e-9, rtol=0)
    torch.testing.assert_close(terms["tc"], torch.zeros_like(terms["tc"]), atol=1e-9, rtol=0)


@pytest.mark.parametrize("estimator", STRATIFIED)
def test_uninformative_codes_leave_dimension_kl_only(estimator: str) -> None:
    independent_law(BetaTCVAE, estimator=estimator)


@pytest.mark.parametrize(("make", "settings"), [(WrongColumns, {}), (BetaTCVAE, {"estimator": "mws"})])
def test_unnormalised_weights_report_false_correlation(make: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        independent_law(make, **settings)


def test_total_correlation_of_grid_and_diagonal_codes() -> None:
    ticks = torch.linspace(-2, 2, 5, dtype=torch.float64)
    grid, log_var = torch.cartesian_prod(ticks, ticks, ticks), torch.tensor(-2.0, dtype=torch.float64)
    model = small(estimator="mss_mean", dataset_size=125)
    terms, _ = terms_at(model, grid, log_var.expand_as(grid))
    assert abs(terms["tc"].item()) < 1e-9
    assert terms["mi"] > 1
    line = ticks.repeat_interleave(25)[:, None].expand(125, CODE)
    terms, _ = terms_at(model, line, log_var.expand_as(line))
    assert terms["tc"] > 1


def test_distant_codes_have_full_mutual_information() -> None:
    mu = 1000 * torch.arange(6, dtype=torch.float64)[:, None].expand(6, CODE)
    terms, _ = terms_at(small(estimator="mss_mean", dataset_size=6), mu, torch.zeros_like(mu))
    assert terms["mi"].item() == pytest.approx(math.log(6))
    assert terms["tc"].item() == pytest.approx((CODE - 1) * math.log(6))


def test_single_sample_and_oversized_batch_limits() -> None:
    for estimator in STRATIFIED:
        assert weights(small(estimator=estimator, dataset_size=50), 1).tolist() == [[1.0]]
        assert torch.equal(
            weights(small(estimator=estimator, dataset_size=2), 5), weights(small(estimator=estimator), 5)
        )
    assert weights(small(estimator="mws", dataset_size=50), 1).item() == pytest.approx(1 / 50)


# ---- the number of data ----------------------------------------------------------------------------------------------


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(torch.rand(6, *SHAPE))


def loaders() -> dict[str, tuple[Any, int]]:
    x = torch.rand(22, *SHAPE)
    rows: Any = list(x)
    batches: Any = [x[:8], x[8:16], x[16:]]
    return {
        "samples": (DataLoader(rows, batch_size=4, shuffle=True), 22),
        "batches": (DataLoader(batches, batch_size=None), 24),  # counted as full batches
        "a stream": (DataLoader(Stream(), batch_size=3), 0),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", loaders())
def test_dataset_size_is_taken_from_training_loader(kind: str, quiet: Any) -> None:
    loader, expected = loaders()[kind]
    model, told = (BetaTCVAE(SHAPE, latent_dim=CODE, hidden_dims=(8,), **s) for s in ({}, {"dataset_size": 70}))
    for each in (model, told):
        quiet(max_epochs=1).fit(each, loader, loaders()["batches"][0])
    assert model.n_data.item() == expected
    assert told.n_data.item() == 70


def test_dataset_size_survives_a_skipped_first_step(quiet: Any) -> None:
    """The fault guard restores the buffers of a skipped step, but the dataset size must not be lost with them."""
    x = torch.rand(22, *SHAPE)
    x[1] = 1e25
    model = BetaTCVAE(SHAPE, latent_dim=CODE, hidden_dims=(8,), likelihood="gaussian")
    guard = FaultGuard()
    rows: Any = list(x)
    train, val = DataLoader(rows, batch_size=4), DataLoader(rows[2:], batch_size=4)
    quiet(max_epochs=1, callbacks=[guard]).fit(model, train, val)
    assert guard.skipped == 1
    assert model.n_data.item() == 22


@pytest.mark.slow
def test_resumed_run_keeps_dataset_size(quiet: Any, tmp_path: Any) -> None:
    """A size counted again would depend on the batches of the resumed run."""
    loader, val = loaders()["batches"][0], loaders()["samples"][0].dataset
    trainer = quiet(max_epochs=1)
    trainer.fit(BetaTCVAE(SHAPE, latent_dim=CODE, hidden_dims=(8,)), loader, DataLoader(val, batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    smaller: Any = [torch.rand(5, *SHAPE)] * 3
    for ckpt, expected in ((tmp_path / "last.ckpt", 24), (None, 15)):
        model = BetaTCVAE(SHAPE, latent_dim=CODE, hidden_dims=(8,))
        again = DataLoader(smaller, batch_size=None)
        quiet(max_epochs=2).fit(model, again, loader, ckpt_path=None if ckpt is None else str(ckpt))
        assert model.n_data.item() == expected


def test_dataset_size_of_datamodule_is_counted_and_saved(quiet: Any, tmp_path: Any) -> None:
    data = aezoo.DataModule("digits", batch_size=128)
    model = BetaTCVAE(data.input_shape, latent_dim=CODE, hidden_dims=(8,))
    quiet(max_steps=1, max_epochs=1).fit(model, data)
    assert model.n_data.item() == len(data.tensors("train")[0]) > 1000
    from aezoo.io.checkpoint import save_model

    assert aezoo.load_model(save_model(model, tmp_path)).n_data.item() == model.n_data.item()


# ---- ranks and schedules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_two_ranks_equal_one_process(estimator: str, shifted: Any) -> None:
    model, x = shifted(small(estimator=estimator, dataset_size=40)), images()
    with SharedNoise(range(6), 6):
        whole = model.loss(x)
    together = on_two_ranks(model, x)
    for term in whole:
        torch.testing.assert_close(together.terms[term], whole[term])
    expected = torch.autograd.grad(whole["loss"], [*model.parameters()])
    for a, b in zip(together.gradients(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert (on_two_ranks(model, x, exchange=False).terms["loss"] - whole["loss"]).abs() > 1e-3
    if estimator != "mws":  # if each rank takes the first rank's rows for its own
        assert (on_two_ranks(model, x, ranked=False).terms["loss"] - whole["loss"]).abs() > 1e-3


def test_annealing_acts_on_total_correlation_without_capacity(shifted: Any, quiet: Any) -> None:
    model, x, found = shifted(small(dataset_size=50)), images(), []
    for beta in (6.0, 0.5):
        model.beta = beta
        torch.manual_seed(3)
        found.append(model.loss(x))
    assert found[0]["tc"].abs() > 1e-5
    torch.testing.assert_close(found[1]["loss"], found[0]["loss"] - 5.5 * found[0]["tc"])
    batches: Any = [torch.rand(4, *SHAPE)]
    trainer = quiet(max_epochs=1, callbacks=[BetaAnnealing("capacity", 2)])
    with pytest.raises(aezoo.AezooError, match="capacity"):
        trainer.fit(model.float(), *[DataLoader(batches, batch_size=None)] * 2)


def test_terms_are_accurate_in_float32(shifted: Any) -> None:
    """For a total correlation that is a thousandth of the logarithms of which it is the difference."""
    mu, log_var = posteriors(64)
    mu, log_var = 0.05 * mu, 0.05 * log_var
    model = small(dataset_size=4000)
    torch.manual_seed(0)
    z = draw(mu, log_var).float()
    found = []
    for dtype in (torch.float64, torch.float32):
        model.to(dtype).posterior = lambda x, dtype=dtype: (mu.to(dtype), log_var.to(dtype))
        eps = ((z - mu) / (0.5 * log_var).exp()).to(dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda _, eps=eps: eps)
            found.append(model.loss(images(64).to(dtype)))
    for term in ("mi", "tc", "dwkl"):
        assert found[1][term].dtype == torch.float32
        assert found[1][term].item() == pytest.approx(found[0][term].item(), abs=2e-8, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        *(({name: value}, name) for name in ("alpha", "beta", "gamma") for value in (-1.0, math.inf)),
        ({"estimator": "mwss"}, "estimator"),
        ({"dataset_size": -1}, "dataset_size"),
    ],
)
def test_invalid_values_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word):
        small(**settings)
