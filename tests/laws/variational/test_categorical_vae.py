"""Laws of the categorical VAE (Jang et al. 2016)."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributions as D
from categorical_laws import (  # noqa: F401
    K,
    N,
    data,
    nll_at,
    reference_kl,
    small,
    steps_of,
    test_invalid_values_are_refused,
)
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from scipy.stats import ks_2samp
from torch import Tensor
from torch.utils.data import DataLoader

import aezoo
from aezoo.distributions.categorical import one_hot, sample_gumbel
from aezoo.models.variational.categorical_vae import CategoricalVAE
from aezoo.models.variational.vae import VAE


def all_codes(dtype: torch.dtype = torch.float64) -> Tensor:
    """All one-hot codes, (K^N, N, K)."""
    return torch.stack([torch.eye(K, dtype=dtype)[list(c)] for c in itertools.product(range(K), repeat=N)])


def exact(model: Any, x: Tensor) -> Tensor:
    """The evidence log p(x) as a sum over all codes, (B,)."""
    codes = all_codes()
    log_px = torch.stack([-nll_at(model, one.expand(len(codes), -1), codes.flatten(1)) for one in x])
    return torch.logsumexp(log_px, 1) - math.log(len(codes))


def exact_elbo(model: Any, x: Tensor) -> Tensor:
    """E_q[log p(x, c) - log q(c|x)] as a sum over all codes, (B,)."""
    codes = all_codes()
    found = []
    for one in x:
        log_q = D.OneHotCategorical(logits=model.log_probs(one[None])[0]).log_prob(codes).sum(1)
        log_p = -nll_at(model, one.expand(len(codes), -1), codes.flatten(1)) - math.log(len(codes))
        found.append((log_q.exp() * (log_p - log_q)).sum())
    return torch.stack(found)


# ---- KL --------------------------------------------------------------------------------------------------------------


def kl_law(cls: type[CategoricalVAE]) -> None:
    """KL and gradient are those of torch.distributions, from 0 for uniform to N log K for one-hot probabilities."""
    model = cls((6,), n_variables=N, n_classes=K, hidden_dims=(16,)).double()
    for spread in (0.0, 0.5, 3.0, 200.0):
        logits = (spread * torch.randn(7, N, K, dtype=torch.float64)).requires_grad_()
        model.log_probs = lambda x, logits=logits: logits.log_softmax(2)
        kl, expected = model.loss(data(7))["kl"], reference_kl(logits).mean()
        torch.testing.assert_close(kl, expected, rtol=1e-9, atol=1e-9)
        assert -1e-12 <= kl <= N * math.log(K) + 1e-12
        a, b = torch.autograd.grad(kl, logits)[0], torch.autograd.grad(expected, logits)[0]
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        if spread == 0:
            assert kl.item() == pytest.approx(0, abs=1e-12)
        if spread == 200:
            assert kl.item() == pytest.approx(N * math.log(K), abs=0.2)


class EpsilonInLog(CategoricalVAE):
    """PyTorch-VAE: h1 - h2 with eps = 1e-7 inside both logarithms, and the mean over the variables."""

    def kl(self, p_BD: Tensor, log_p_BD: Tensor) -> Tensor:
        k = self.variables[1]
        h1, h2 = p_BD * (p_BD + 1e-7).log(), p_BD * math.log(1 / k + 1e-7)
        return (h1 - h2).unflatten(1, self.variables).sum(2).mean(1)


class EntropyAlone(CategoricalVAE):
    """sum p log p without log K: -log K instead of 0 for uniform probabilities."""

    def kl(self, p_BD: Tensor, log_p_BD: Tensor) -> Tensor:
        return (p_BD * log_p_BD).sum(1)


def test_kl_matches_torch_distributions() -> None:
    kl_law(CategoricalVAE)


@pytest.mark.parametrize("mistake", [EpsilonInLog, EntropyAlone])
def test_wrong_kl_is_detected(mistake: Any) -> None:
    with pytest.raises(AssertionError):
        kl_law(mistake)


def test_extreme_logits_stay_finite() -> None:
    for factor in (1e4, -1e4):
        model, x = small(straight_through=True), data()
        with torch.no_grad():
            model.encoder[-2].bias[::K] = factor
        terms = model.loss(x)
        terms["loss"].backward()
        values = [*terms.values(), *(p.grad for p in model.parameters()), model.score(x), model.log_likelihood(x, 5)]
        assert all(torch.isfinite(v).all() for v in values)


# ---- the relaxation --------------------------------------------------------------------------------------------------


def draws(model: Any, logits: Tensor, n: int) -> Tensor:
    """Codes z of the model for one posterior, (n, K)."""
    z: Tensor = model.draw(logits.log_softmax(0).expand(n, 1, -1))[:, 0]
    return z


def relaxation_law(cls: type[CategoricalVAE]) -> None:
    """Every entry of z is distributed as in torch.distributions, at several temperatures."""
    logits = torch.tensor([0.3, -1.0, 1.5, 0.0])
    for tau in (0.3, 1.0, 2.5):
        model = cls((6,), n_variables=1, n_classes=4, temperature=tau)
        z = draws(model, logits, 4000)
        wanted = D.RelaxedOneHotCategorical(torch.tensor(tau), logits=logits).sample((4000,))
        torch.testing.assert_close(z.sum(1), torch.ones(4000))
        for k in range(4):
            assert ks_2samp(z[:, k].numpy(), wanted[:, k].numpy()).pvalue > 1e-4, (tau, k)
        # the largest entry is an exact draw at every temperature (Maddison et al. 2016, proposition 1)
        found = one_hot(z).mean(0)
        assert ((found - logits.softmax(0)).abs() < 5 * (0.25 / 4000) ** 0.5).all()


class NoiseOutside(CategoricalVAE):
    """softmax(log p / tau + g): the noise is not divided by the temperature."""

    def draw(self, log_p_BNK: Tensor) -> Tensor:
        return (log_p_BNK / self.tau() + sample_gumbel(log_p_BNK)).softmax(2)


class GaussianNoise(CategoricalVAE):
    def draw(self, log_p_BNK: Tensor) -> Tensor:
        return ((log_p_BNK + torch.randn_like(log_p_BNK)) / self.tau()).softmax(2)


def test_relaxed_codes_match_torch_distributions() -> None:
    relaxation_law(CategoricalVAE)


@pytest.mark.parametrize("mistake", [NoiseOutside, GaussianNoise])
def test_wrong_relaxation_noise_is_detected(mistake: Any) -> None:
    with pytest.raises(AssertionError):
        relaxation_law(mistake)


def test_low_temperature_code_is_argmax_of_noisy_logits() -> None:
    model, log_p = small(temperature=0.01), torch.randn(200, N, K, dtype=torch.float64).log_softmax(2)
    torch.manual_seed(5)
    noise = sample_gumbel(log_p)
    torch.manual_seed(5)
    z = model.draw(log_p)
    top = (log_p + noise).topk(2, dim=2).values
    clear = (top[..., 0] - top[..., 1]) > 0.2
    assert clear.double().mean() > 0.8
    torch.testing.assert_close(z[clear], one_hot(log_p + noise)[clear], rtol=0, atol=1e-6)


def hard_law(cls: type[CategoricalVAE]) -> None:
    """Exactly one-hot values, with the gradient of the relaxed code for the same noise."""
    log_p = torch.randn(40, N, K, dtype=torch.float64).log_softmax(2).requires_grad_()
    weights = torch.randn(40, N, K, dtype=torch.float64)
    found = {}
    for hard in (True, False):
        torch.manual_seed(2)
        z = cls((6,), n_variables=N, n_classes=K, straight_through=hard).draw(log_p)
        found[hard] = z, torch.autograd.grad((z * weights).sum(), log_p, allow_unused=True)[0]
    (hard_z, hard_grad), (soft_z, soft_grad) = found[True], found[False]
    assert torch.equal(hard_z.detach(), one_hot(soft_z))
    assert hard_grad is not None
    assert soft_grad.abs().max() > 1e-3
    torch.testing.assert_close(hard_grad, soft_grad)


class HardWithoutGradient(CategoricalVAE):
    def draw(self, log_p_BNK: Tensor) -> Tensor:
        z = super().draw(log_p_BNK)
        return one_hot(z) + 0 * log_p_BNK if self.straight_through else z


class NearlyHard(CategoricalVAE):
    """Values that are not exactly one-hot."""

    def draw(self, log_p_BNK: Tensor) -> Tensor:
        z = ((log_p_BNK + sample_gumbel(log_p_BNK)) / self.tau()).softmax(2)
        return z + (one_hot(z) - 0.9 * z.detach()) if self.straight_through else z


def test_straight_through_is_one_hot_with_relaxed_gradient() -> None:
    hard_law(CategoricalVAE)


@pytest.mark.parametrize("mistake", [HardWithoutGradient, NearlyHard])
def test_hard_code_without_gradient_is_detected(mistake: Any) -> None:
    with pytest.raises(AssertionError):
        hard_law(mistake)


# ---- schedule of the temperature -------------------------------------------------------------------------------------


TEMPERATURES = {"start_temperature": 2.0, "temperature": 0.5, "temperature_steps": 6}


EXPECTED = [2.0 * (0.5 / 2.0) ** (min(t, 6) / 6) for t in range(9)]


class RestartsEachEpoch(CategoricalVAE):
    """PyTorch-VAE: the temperature follows the number of the batch, which restarts each epoch."""

    def begin_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor | None]:
        found = super().begin_step(batch, batch_idx)
        self.steps.fill_(batch_idx)
        return found


@pytest.mark.slow
def test_temperature_schedule_spans_epochs_and_resumes(quiet: Any, tmp_path: Any) -> None:
    whole, parted = steps_of(CategoricalVAE, "tau", quiet, tmp_path, **TEMPERATURES)
    assert whole == pytest.approx(EXPECTED, rel=1e-6)
    assert parted == whole
    wrong, _ = steps_of(RestartsEachEpoch, "tau", quiet, tmp_path, **TEMPERATURES)
    assert wrong != pytest.approx(EXPECTED, rel=1e-6)


def test_loaded_model_keeps_last_temperature(quiet: Any, tmp_path: Any) -> None:
    loader: Any = DataLoader(list(torch.rand(12, 6)), batch_size=4)
    trainer, model = quiet(max_epochs=1), CategoricalVAE((6,), **TEMPERATURES)
    trainer.fit(model, loader, loader)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = aezoo.load_model(tmp_path / "model.ckpt")
    assert float(loaded.tau()) == pytest.approx(EXPECTED[2])
    assert float(small(temperature=0.7, start_temperature=3.0).tau()) == pytest.approx(0.7)  # no annealing


# ---- evidence --------------------------------------------------------------------------------------------------------


def sharpened(**settings: Any) -> Any:
    """A model whose posterior is neither uniform nor one-hot and whose decoder distinguishes codes."""
    model = small(**settings)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.4 * torch.randn_like(p)
    return model


def test_likelihood_of_few_codes_is_exact_sum() -> None:
    model, x = sharpened(), data()
    torch.testing.assert_close(model.log_likelihood(x, K**N), exact(model, x))
    assert torch.equal(model.log_likelihood(x, 10_000), model.log_likelihood(x, 10_000))
    rows: list[int] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    model.log_likelihood(x, K**N - 1)  # sampled
    assert sum(rows) == len(x) * (K**N - 1)


@pytest.mark.slow
def test_importance_bound_approaches_exact_likelihood() -> None:
    model, x = sharpened(), data()
    top = exact(model, x)
    ladder = [
        torch.stack([VAE.log_likelihood(model, x, n) for _ in range(2000 // n)]).mean(0) for n in (1, 10, 100, 2000)
    ]
    assert all((b - a).mean() > -0.02 for a, b in itertools.pairwise(ladder))
    assert (top - ladder[0]).mean() > 0.1
    torch.testing.assert_close(ladder[-1], top, rtol=0, atol=0.15)
    torch.testing.assert_close(ladder[0], exact_elbo(model, x), rtol=0, atol=0.15)
    assert (exact_elbo(model, x) < top).all()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_hard_elbo_is_exact_and_relaxed_is_not(training: bool) -> None:
    """Evaluation uses hard codes, so its ELBO is a lower bound also if training uses relaxed ones."""
    x = data(1)
    for hard in (True, False):
        torch.manual_seed(7)
        model = sharpened(straight_through=hard, temperature=2.0).train(training)
        with torch.no_grad():
            found = model.loss(x.expand(20_000, -1))["elbo"].item()
            off = abs(found - exact_elbo(model, x).item())
            if training and not hard:
                assert off > 0.1
            else:
                assert off < 0.03
                assert found < exact(model, x).item()


def test_hard_codes_follow_posterior_frequencies() -> None:
    model, x = sharpened(), data(2)
    codes, log_q = model.sample_posterior(x, 4000)
    q = D.OneHotCategorical(logits=model.log_probs(x))
    each = codes.unflatten(2, (N, K))
    torch.testing.assert_close(log_q, q.log_prob(each).sum(2))
    assert ((each.mean(0) - q.probs).abs() < 5 * (0.25 / 4000) ** 0.5).all()
    wanted = D.OneHotCategorical(logits=torch.zeros(N, K)).log_prob(each).sum(2)
    torch.testing.assert_close(model.log_prior(codes), wanted.to(codes))


def test_samples_are_decoded_from_uniform_one_hot_codes() -> None:
    model, seen = sharpened().eval(), []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = model.sample(4000)
    codes = seen[0].unflatten(1, (N, K))
    assert torch.equal(codes.sum(2), torch.ones(4000, N, dtype=torch.float64))
    assert torch.equal(codes, codes**2)
    assert ((codes.mean(0) - 1 / K).abs() < 5 * (0.25 / 4000) ** 0.5).all()
    torch.testing.assert_close(x, model.decoder(seen[0]).sigmoid())


def test_codes_and_scores_use_probabilities() -> None:
    model, x = sharpened().eval(), data()
    p = D.Categorical(logits=model.log_probs(x)).probs
    torch.testing.assert_close(model.encode(x), p.flatten(1))
    torch.testing.assert_close(model.score(x), nll_at(model, x, p.flatten(1)) + reference_kl(p.log()))


def test_beta_and_capacity_weight_kl_as_in_vae() -> None:
    for beta, capacity in ((0.0, 0.0), (3.0, 0.0), (3.0, 2.0)):
        torch.manual_seed(1)
        model = sharpened(beta=beta)
        model.capacity = capacity
        terms = model.loss(data())
        torch.testing.assert_close(terms["loss"], terms["nll"] + beta * (terms["kl"] - capacity).abs())
        assert terms["kl"] > 0.1
