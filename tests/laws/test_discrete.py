"""Laws of the categorical codes: their KL, their relaxation, exact evidence by enumeration, and rivals' slips."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributions as D
from scipy.stats import ks_2samp
from torch import Tensor
from torch.utils.data import DataLoader

import aezoo
from aezoo.distributions.categorical import one_hot, sample_gumbel
from aezoo.models.variational.categorical_vae import CategoricalVAE
from aezoo.models.variational.joint_vae import JointVAE
from aezoo.models.variational.vae import VAE

N, K = 3, 4


def small(name: str = "categorical_vae", **settings: Any) -> Any:
    given = {"n_variables": N, "n_classes": K, "hidden_dims": (16,)} | settings
    return aezoo.create_model(name, input_shape=(6,), **given).double()


def data(n: int = 5) -> Tensor:
    return torch.rand(n, 6, dtype=torch.float64)


def nll_at(model: Any, x: Tensor, z: Tensor) -> Tensor:
    """-log p(x|z) by torch.distributions, (B,)."""
    return -D.Bernoulli(logits=model.decoder(z), validate_args=False).log_prob(x).flatten(1).sum(1)


def all_codes(dtype: torch.dtype = torch.float64) -> Tensor:
    """Every one-hot code there is, by itertools, (K^N, N, K)."""
    return torch.stack([torch.eye(K, dtype=dtype)[list(c)] for c in itertools.product(range(K), repeat=N)])


def exact(model: Any, x: Tensor) -> Tensor:
    """The evidence log p(x) as a sum over every code, one sample at a time."""
    codes = all_codes()
    log_px = torch.stack([-nll_at(model, one.expand(len(codes), -1), codes.flatten(1)) for one in x])
    return torch.logsumexp(log_px, 1) - math.log(len(codes))


def exact_elbo(model: Any, x: Tensor) -> Tensor:
    """E_q[log p(x, c) - log q(c|x)] as a sum over every code, (B,)."""
    codes = all_codes()
    found = []
    for one in x:
        log_q = D.OneHotCategorical(logits=model.log_probs(one[None])[0]).log_prob(codes).sum(1)
        log_p = -nll_at(model, one.expand(len(codes), -1), codes.flatten(1)) - math.log(len(codes))
        found.append((log_q.exp() * (log_p - log_q)).sum())
    return torch.stack(found)


# ---- KL --------------------------------------------------------------------------------------------------------------


def reference_kl(log_p: Tensor) -> Tensor:
    q = D.Categorical(logits=log_p)
    return D.kl_divergence(q, D.Categorical(logits=torch.zeros_like(log_p))).sum(1)


def kl_law(cls: type[CategoricalVAE]) -> None:
    """KL and its gradient are those of torch.distributions; 0 of the uniform, N log K of one-hot, within these else."""
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
    """sum p log p, without log K: -log K of the uniform."""

    def kl(self, p_BD: Tensor, log_p_BD: Tensor) -> Tensor:
        return (p_BD * log_p_BD).sum(1)


def test_the_kl_is_that_of_torch_distributions() -> None:
    kl_law(CategoricalVAE)


@pytest.mark.parametrize("rival", [EpsilonInLog, EntropyAlone])
def test_a_rival_s_kl_breaks_the_law(rival: Any) -> None:
    with pytest.raises(AssertionError):
        kl_law(rival)


def test_logits_beyond_all_bounds_leave_everything_finite() -> None:
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
    """Every entry of z is distributed as torch.distributions draws it, at several temperatures."""
    logits = torch.tensor([0.3, -1.0, 1.5, 0.0])
    for tau in (0.3, 1.0, 2.5):
        model = cls((6,), n_variables=1, n_classes=4, temperature=tau)
        z = draws(model, logits, 4000)
        wanted = D.RelaxedOneHotCategorical(torch.tensor(tau), logits=logits).sample((4000,))
        torch.testing.assert_close(z.sum(1), torch.ones(4000))
        for k in range(4):
            assert ks_2samp(z[:, k].numpy(), wanted[:, k].numpy()).pvalue > 1e-4, (tau, k)
        # the largest entry is that of an exact draw, whatever the temperature (Maddison et al. 2016, proposition 1)
        found = one_hot(z).mean(0)
        assert ((found - logits.softmax(0)).abs() < 5 * (0.25 / 4000) ** 0.5).all()


class NoiseOutside(CategoricalVAE):
    """softmax(log p / tau + g): the noise is not divided by the temperature."""

    def draw(self, log_p_BNK: Tensor) -> Tensor:
        return (log_p_BNK / self.tau() + sample_gumbel(log_p_BNK)).softmax(2)


class GaussianNoise(CategoricalVAE):
    def draw(self, log_p_BNK: Tensor) -> Tensor:
        return ((log_p_BNK + torch.randn_like(log_p_BNK)) / self.tau()).softmax(2)


def test_relaxed_codes_are_distributed_as_those_of_torch_distributions() -> None:
    relaxation_law(CategoricalVAE)


@pytest.mark.parametrize("rival", [NoiseOutside, GaussianNoise])
def test_another_noise_breaks_the_law(rival: Any) -> None:
    with pytest.raises(AssertionError):
        relaxation_law(rival)


def test_gumbel_noise_has_its_distribution() -> None:
    noise = sample_gumbel(torch.zeros(20_000))
    wanted = D.Gumbel(0.0, 1.0).sample((20_000,))
    assert ks_2samp(noise.numpy(), wanted.numpy()).pvalue > 1e-4


def test_at_a_low_temperature_the_code_is_the_arg_max_of_logits_plus_noise() -> None:
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
    """One-hot values, exactly, and the gradient of the relaxed code of the same noise."""
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
    """z + (hard - z) rounds where hard + (z - z) does not; and here both carry gradients."""

    def draw(self, log_p_BNK: Tensor) -> Tensor:
        z = ((log_p_BNK + sample_gumbel(log_p_BNK)) / self.tau()).softmax(2)
        return z + (one_hot(z) - 0.9 * z.detach()) if self.straight_through else z


def test_straight_through_codes_are_one_hot_with_the_relaxed_gradient() -> None:
    hard_law(CategoricalVAE)


@pytest.mark.parametrize("rival", [HardWithoutGradient, NearlyHard])
def test_a_hard_code_without_the_gradient_breaks_the_law(rival: Any) -> None:
    with pytest.raises(AssertionError):
        hard_law(rival)


# ---- the temperature and the capacity depend on the step -------------------------------------------------------------


class Record:
    """Batches of a fit, and what the model's `of` says at each step."""

    def __init__(self, of: str) -> None:
        self.of, self.found = of, []

    def watch(self, model: Any) -> Any:
        loss = model.loss

        def watched(x: Tensor, y: Any = None) -> Any:
            terms = loss(x, y)
            if model.training:
                self.found.append(float(terms[self.of] if self.of in terms else model.tau()))
            return terms

        model.loss = watched
        return model


def steps_of(cls: Any, of: str, quiet: Any, tmp_path: Any, **settings: Any) -> tuple[list[float], list[float]]:
    """What was in force at the 9 steps of 3 epochs: in one run, and in a run that is stopped after 2 and goes on."""
    loader: Any = DataLoader(list(torch.rand(12, 6)), batch_size=4)
    whole, parted = Record(of), Record(of)
    quiet(max_epochs=3, log_every_n_steps=1).fit(whole.watch(cls((6,), **settings)), loader, loader)
    first = quiet(max_epochs=2, log_every_n_steps=1)
    first.fit(parted.watch(cls((6,), **settings)), loader, loader)
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    later = quiet(max_epochs=3, log_every_n_steps=1)
    later.fit(
        parted.watch(cls((6,), **settings)), loader, loader, ckpt_path=tmp_path / "stopped.ckpt", weights_only=True
    )
    return whole.found, parted.found


TEMPERATURES = {"start_temperature": 2.0, "temperature": 0.5, "temperature_steps": 6}
EXPECTED = [2.0 * (0.5 / 2.0) ** (min(t, 6) / 6) for t in range(9)]


class RestartsEachEpoch(CategoricalVAE):
    """PyTorch-VAE: the temperature follows the number of the batch, which restarts each epoch."""

    def begin_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor | None]:
        found = super().begin_step(batch, batch_idx)
        self.steps.fill_(batch_idx)
        return found


def test_the_temperature_falls_with_the_step_over_epochs_and_resumes(quiet: Any, tmp_path: Any) -> None:
    whole, parted = steps_of(CategoricalVAE, "tau", quiet, tmp_path, **TEMPERATURES)
    assert whole == pytest.approx(EXPECTED, rel=1e-6)
    assert parted == whole
    wrong, _ = steps_of(RestartsEachEpoch, "tau", quiet, tmp_path, **TEMPERATURES)
    assert wrong != pytest.approx(EXPECTED, rel=1e-6)


def test_a_loaded_model_has_the_temperature_of_its_last_step(quiet: Any, tmp_path: Any) -> None:
    loader: Any = DataLoader(list(torch.rand(12, 6)), batch_size=4)
    trainer, model = quiet(max_epochs=1), CategoricalVAE((6,), **TEMPERATURES)
    trainer.fit(model, loader, loader)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = aezoo.load_model(tmp_path / "model.ckpt")
    assert float(loaded.tau()) == pytest.approx(EXPECTED[2])
    assert float(small(temperature=0.7, start_temperature=3.0).tau()) == pytest.approx(0.7)  # no annealing


def test_both_capacities_rise_with_the_step_and_resume(quiet: Any, tmp_path: Any) -> None:
    settings = {"max_capacity": 8.0, "max_discrete_capacity": 1.0, "capacity_steps": 6, "n_classes": 4}
    rise = [min(t, 6) / 6 for t in range(9)]
    for term, top in (("capacity", 8.0), ("discrete_capacity", 1.0)):
        whole, parted = steps_of(JointVAE, term, quiet, tmp_path, **settings)
        assert whole == pytest.approx([top * share for share in rise])
        assert parted == whole


# ---- evidence --------------------------------------------------------------------------------------------------------


def sharpened(**settings: Any) -> Any:
    """A model whose posterior is neither uniform nor one-hot and whose decoder tells codes apart."""
    model = small(**settings)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.4 * torch.randn_like(p)
    return model


def test_the_likelihood_of_few_codes_is_the_sum_over_all_of_them() -> None:
    model, x = sharpened(), data()
    torch.testing.assert_close(model.log_likelihood(x, K**N), exact(model, x))
    assert torch.equal(model.log_likelihood(x, 10_000), model.log_likelihood(x, 10_000))
    rows: list[int] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    model.log_likelihood(x, K**N - 1)  # sampled
    assert sum(rows) == len(x) * (K**N - 1)


def test_importance_samples_come_from_below_to_the_exact_likelihood() -> None:
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
def test_the_elbo_of_hard_codes_is_the_exact_one_and_that_of_relaxed_codes_is_not(training: bool) -> None:
    """Codes of evaluation are hard, so that what is reported there is a bound, whatever training decodes."""
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


def test_hard_codes_have_the_posterior_s_frequencies_and_probabilities() -> None:
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


def test_codes_are_probabilities_and_scores_are_taken_there() -> None:
    model, x = sharpened().eval(), data()
    p = D.Categorical(logits=model.log_probs(x)).probs
    torch.testing.assert_close(model.encode(x), p.flatten(1))
    torch.testing.assert_close(model.score(x), nll_at(model, x, p.flatten(1)) + reference_kl(p.log()))


def test_beta_weighs_the_kl_and_the_capacity_is_that_of_the_vae() -> None:
    for beta, capacity in ((0.0, 0.0), (3.0, 0.0), (3.0, 2.0)):
        torch.manual_seed(1)
        model = sharpened(beta=beta)
        model.capacity = capacity
        terms = model.loss(data())
        torch.testing.assert_close(terms["loss"], terms["nll"] + beta * (terms["kl"] - capacity).abs())
        assert terms["kl"] > 0.1


# ---- the joint code --------------------------------------------------------------------------------------------------


def joint(**settings: Any) -> Any:
    model = small("joint_vae", latent_dim=2, **settings)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.4 * torch.randn_like(p)
    return model


def test_without_classes_it_is_the_annealed_vae() -> None:
    settings = {"gamma": 7.0, "max_capacity": 3.0, "capacity_steps": 10}
    model = joint(n_variables=0, **settings)
    parent = aezoo.create_model("annealed_vae", input_shape=(6,), latent_dim=2, hidden_dims=(16,), **settings).double()
    parent.load_state_dict(model.state_dict())
    x = data()
    for steps in (0, 4, 20):
        model.steps.fill_(steps), parent.steps.fill_(steps)
        found = []
        for one in (model, parent):
            torch.manual_seed(0)
            found.append(one.loss(x))
        for term in ("loss", "nll", "kl", "elbo", "capacity"):
            torch.testing.assert_close(found[0][term], found[1][term], rtol=1e-9, atol=1e-12)
        assert found[0]["kl_discrete"] == 0
    torch.testing.assert_close(model.score(x), parent.score(x))
    torch.testing.assert_close(model.encode(x), parent.encode(x))


def test_gamma_one_without_capacities_is_the_sum_of_the_parents() -> None:
    model, x = joint(gamma=1.0, max_capacity=0.0, max_discrete_capacity=0.0), data()
    seen: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    terms = model.loss(x)
    mu, log_var, log_p = model.parts(x)
    kl_z = D.kl_divergence(D.Normal(mu, (0.5 * log_var).exp()), D.Normal(0.0, 1.0)).sum(1).mean()
    kl_c = reference_kl(log_p).mean()
    torch.testing.assert_close(terms["kl_continuous"], kl_z)
    torch.testing.assert_close(terms["kl_discrete"], kl_c)
    torch.testing.assert_close(terms["loss"], nll_at(model, x, seen[0]).mean() + kl_z + kl_c)
    torch.testing.assert_close(terms["loss"], -terms["elbo"])


def distance_law(cls: type[JointVAE]) -> None:
    """Each part has its own gamma |KL - C|: the gradient lowers what is above its capacity and raises the rest."""
    model = cls((6,), latent_dim=2, n_variables=2, n_classes=3, gamma=7.0, max_capacity=6.0, capacity_steps=4)
    model = model.double()
    mu = torch.full((5, 2), 2.0, dtype=torch.float64).requires_grad_()
    logits = torch.randn(5, 2, 3, dtype=torch.float64).requires_grad_()
    model.parts = lambda x: (mu, torch.zeros_like(mu), logits.log_softmax(2))
    top = 2 * math.log(3)
    for steps in (0, 1, 2, 4, 9):
        model.steps.fill_(steps)
        share = min(1, steps / 4)
        terms = model.loss(data())
        kl_z, kl_c = (mu**2).sum(1).mean() / 2, reference_kl(logits).mean()
        wanted = 7 * (kl_z - 6 * share).abs() + 7 * (kl_c - min(5, top) * share).abs()
        penalty = terms["loss"] - terms["nll"]
        torch.testing.assert_close(penalty, wanted)
        for a, b in zip(torch.autograd.grad(penalty, (mu, logits)), torch.autograd.grad(wanted, (mu, logits)),
                        strict=True):  # fmt: skip
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


class Unbounded(JointVAE):
    """A capacity beyond N log K, which no posterior can take."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.max_discrete_capacity = 5.0


class OneDistance(JointVAE):
    """gamma |KL_z + KL_c - C_z - C_c|: one part may pay for the other."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        distance = (terms["kl"] - terms["capacity"] - terms["discrete_capacity"]).abs()
        return terms | {"loss": terms["nll"] + self.gamma * distance}


def test_each_part_is_held_at_its_own_capacity() -> None:
    distance_law(JointVAE)


@pytest.mark.parametrize("rival", [Unbounded, OneDistance])
def test_another_distance_breaks_the_law(rival: Any) -> None:
    with pytest.raises(AssertionError):
        distance_law(rival)


def test_the_likelihood_is_that_of_a_mixture_of_gaussians_where_the_decoder_is_linear() -> None:
    """There x given c is Gaussian, in closed form, so the evidence is a sum over classes."""
    model = small("joint_vae", latent_dim=2, n_variables=1, n_classes=3, hidden_dims=(), likelihood="gaussian:0.7")
    with torch.no_grad():
        for p in model.parameters():
            p += 0.15 * torch.randn_like(p)
    W, bias = model.decoder[1].weight, model.decoder[1].bias
    covariance = W[:, :2] @ W[:, :2].T + 0.49 * torch.eye(6, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)
    each = torch.stack([D.MultivariateNormal(bias + W[:, 2 + k], covariance).log_prob(x) for k in range(3)])
    top = torch.logsumexp(each, 0) - math.log(3)
    found = [
        torch.stack([model.log_likelihood(x, n) for _ in range(rows)]).mean(0)
        for n, rows in ((1, 300), (20, 100), (20_000, 1))
    ]
    assert (found[0] < found[1]).all()
    torch.testing.assert_close(found[2], top, rtol=0, atol=0.05)
    # the prior's density is right, too: importance weights over it have mean one
    codes, log_q = model.sample_posterior(x, 20_000)
    normal = D.Normal(0.0, 1.0).log_prob(codes[..., :2]).sum(2) - math.log(3)
    torch.testing.assert_close(model.log_prior(codes), normal)
    torch.testing.assert_close((normal - log_q).exp().mean(0), torch.ones(4).double(), rtol=0, atol=0.1)


def test_joint_samples_and_codes_have_both_parts() -> None:
    model, x = joint().eval(), data()
    mu, _, log_p = model.parts(x)
    torch.testing.assert_close(model.encode(x), torch.cat([mu, log_p.exp().flatten(1)], 1))
    z = model.sample_prior(4000)
    assert z.dtype == torch.float64
    assert ((z[:, :2].var(0) - 1).abs() < 5 * math.sqrt(2 / 4000)).all()
    classes = z[:, 2:].unflatten(1, (N, K))
    assert torch.equal(classes, one_hot(classes))
    assert ((classes.mean(0) - 1 / K).abs() < 5 * (0.25 / 4000) ** 0.5).all()


def test_joint_codes_of_evaluation_have_one_hot_classes_and_their_elbo_is_a_bound() -> None:
    model, x, n = joint(temperature=2.0).eval(), data(1), 20_000
    seen: list[Tensor] = []
    hook = model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        found = model.loss(x.expand(n, -1))["elbo"].item()
        hook.remove()
        classes = seen[0][:, 2:].unflatten(1, (N, K))
        assert torch.equal(classes, one_hot(classes))
        codes, log_q = model.sample_posterior(x, n)
        log_w = -nll_at(model, x.expand(n, -1), codes[:, 0]) + model.log_prior(codes[:, 0]) - log_q[:, 0]
        assert found == pytest.approx(log_w.mean().item(), abs=5 * math.sqrt(2 / n) * log_w.std().item())
        assert found < model.log_likelihood(x, n).item()


@pytest.mark.parametrize(
    ("name", "settings", "word"),
    [
        ("categorical_vae", {"n_variables": 0}, "n_variables"),
        ("categorical_vae", {"n_classes": 1}, "n_classes"),
        ("categorical_vae", {"temperature": 0.0}, "temperature"),
        ("categorical_vae", {"start_temperature": math.inf}, "start_temperature"),
        ("categorical_vae", {"temperature_steps": -1}, "temperature_steps"),
        ("joint_vae", {"n_variables": -1}, "n_variables"),
        ("joint_vae", {"n_classes": 1}, "n_classes"),
        ("joint_vae", {"latent_dim": 0}, "latent_dim"),
        ("joint_vae", {"gamma": -1.0}, "gamma"),
        ("joint_vae", {"max_discrete_capacity": math.nan}, "max_discrete_capacity"),
        ("joint_vae", {"capacity_steps": 0}, "capacity_steps"),
    ],
)
def test_values_that_cannot_work_are_refused(name: str, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word) as refusal:
        aezoo.create_model(name, input_shape=(4,), **settings)
    assert len(str(refusal.value).splitlines()) == 1
