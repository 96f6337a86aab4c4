"""Laws of the models of anomalies: DAGMM's energy and statistics, GANomaly's players and score, and rivals' slips."""

import copy
import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn
from torch.utils.data import DataLoader
from two_ranks import on_two_ranks

import aezoo
from aezoo.tasks.detect import detect
from aezoo.training.seeding import mix

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
SHAPE = (2, 3, 3)


def images(n: int = 6, seed: int = 7) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dagmm(**settings: Any) -> Any:
    settings = {"input_shape": SHAPE, "latent_dim": 3, "hidden_dims": (16,), "dropout": 0.0, **settings}
    return aezoo.create_model("dagmm", **settings).double()


def mixture_of(seed: int, k: int = 3, z: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Shares, means and well-conditioned covariances."""
    rng = np.random.default_rng(seed)
    roots = rng.normal(0, 1, (k, z, z))
    sigma = roots @ roots.transpose(0, 2, 1) + 0.5 * np.eye(z)
    return (
        torch.from_numpy(rng.dirichlet(np.full(k, 2.0))),
        torch.from_numpy(rng.normal(0, 2, (k, z))),
        torch.from_numpy(sigma),
    )


def of_scikit_learn(phi: Any, mu: Any, sigma: Any) -> GaussianMixture:
    """A mixture of given parameters."""
    found = GaussianMixture(len(phi))
    found.weights_, found.means_, found.covariances_ = (np.asarray(v, np.float64) for v in (phi, mu, sigma))
    found.precisions_cholesky_ = np.linalg.inv(np.linalg.cholesky(found.covariances_)).transpose(0, 2, 1)
    return found


def z_by_hand(model: Any, x: Tensor) -> np.ndarray:
    """[z_c, relative Euclidean distance, cosine similarity] (section 3.2), a sample at a time."""
    with torch.no_grad():
        z_c, x_hat = model.encoder(x), model(x)
    rows = []
    for code, one, other in zip(z_c.numpy(), x.flatten(1).numpy(), x_hat.flatten(1).numpy(), strict=True):
        length = np.linalg.norm(one)
        cosine = one @ other / (length * np.linalg.norm(other))
        rows.append([*code, np.linalg.norm(one - other) / length, cosine])
    return np.array(rows)


# ---- DAGMM: the energy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_the_energy_is_the_mixtures_negative_log_density(seed: int) -> None:
    phi, mu, sigma = mixture_of(seed)
    z = 3 * torch.randn(50, 5, dtype=torch.float64)
    energy = dagmm().energy(z, phi, mu, sigma)
    jittered = sigma + 1e-6 * torch.eye(5, dtype=torch.float64)
    learn = of_scikit_learn(phi, mu, jittered)
    torch.testing.assert_close(energy, torch.from_numpy(-learn.score_samples(z.numpy())), rtol=1e-9, atol=1e-9)
    law = D.MixtureSameFamily(D.Categorical(phi), D.MultivariateNormal(mu, jittered))
    torch.testing.assert_close(energy, -law.log_prob(z), rtol=1e-9, atol=1e-9)
    # what the jitter changes
    plain = -of_scikit_learn(phi, mu, sigma).score_samples(z.numpy())
    torch.testing.assert_close(energy, torch.from_numpy(plain), rtol=1e-4, atol=1e-4)
    # the determinant without its root, as where |2 pi Sigma| stands for its square root
    rooted = -torch.logsumexp(law.component_distribution.log_prob(z[:, None]) - jittered.logdet() / 2 + phi.log(), 1)
    assert (rooted - energy).abs().max() > 0.1


def test_far_samples_keep_their_order_where_a_port_ties_them() -> None:
    """-log(sum + 1e-12), as in https://github.com/danieltan07/dagmm, ends at 27.6 for whatever is far."""
    phi, mu, sigma = mixture_of(0)
    z = torch.arange(1, 6, dtype=torch.float64)[:, None] * 100 * torch.ones(5, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        energy = dagmm().energy(*(v.to(dtype) for v in (z, phi, mu, sigma)))
        assert (energy.diff() > 100).all() and energy.isfinite().all() and energy.dtype == dtype
    density = D.MixtureSameFamily(D.Categorical(phi), D.MultivariateNormal(mu, sigma)).log_prob(z).exp()
    assert (-(density + 1e-12).log()).diff().abs().max() < 1e-6


def test_the_score_is_the_energy_of_code_distance_and_cosine(shifted: Any) -> None:
    model, x = shifted(dagmm()).eval(), images(20)
    for _ in range(3):
        model.train().loss(images(40, seed=3))
    phi, mu, sigma = model.eval().remembered()
    z = z_by_hand(model, x)
    torch.testing.assert_close(phi.sum().item(), 1.0)
    learn = of_scikit_learn(phi, mu, sigma + 1e-6 * torch.eye(5, dtype=torch.float64))
    with torch.no_grad():
        score = model.score(x)
    torch.testing.assert_close(score, torch.from_numpy(-learn.score_samples(z)), rtol=1e-8, atol=1e-8)
    # a score of the code alone, without the errors, is another one
    alone = of_scikit_learn(phi, mu[:, :3], sigma[:, :3, :3])
    assert np.abs(alone.score_samples(z[:, :3]) + score.numpy()).max() > 0.1


# ---- DAGMM: statistics of a batch ------------------------------------------------------------------------------------


def weighted(gamma: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Equation 5 by NumPy's own weighted averages and covariances."""
    mu = np.stack([np.average(z, axis=0, weights=g) for g in gamma.T])
    sigma = np.stack([np.cov(z.T, aweights=g, ddof=0) for g in gamma.T])
    return gamma.mean(0), mu, sigma


def gamma_by_hand(model: Any, z: np.ndarray) -> np.ndarray:
    """The estimation network, a hidden layer with tanh and a softmax (section 4.3)."""
    weights = [p.detach().numpy() for p in model.estimation.parameters()]
    logits = np.tanh(z @ weights[0].T + weights[1]) @ weights[2].T + weights[3]
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def test_shares_means_and_covariances_are_weighted_by_the_assignment(shifted: Any) -> None:
    model, x = shifted(dagmm()).train(), images(30)
    z = z_by_hand(model, x)
    expected = weighted(gamma_by_hand(model, z), z)
    found = model.mixture(torch.from_numpy(z))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.detach(), torch.from_numpy(theirs), rtol=1e-9, atol=1e-12)
    # one Gaussian, whatever its network says: mean and covariance of the batch
    one = shifted(dagmm(n_components=1))
    phi, mu, sigma = one.mixture(torch.from_numpy(z))
    assert phi.item() == 1
    torch.testing.assert_close(mu[0].detach(), torch.from_numpy(z.mean(0)))
    torch.testing.assert_close(sigma[0].detach(), torch.from_numpy(np.cov(z.T, bias=True)))


def test_the_loss_is_error_energy_and_inverse_variances(shifted: Any) -> None:
    model, x = shifted(dagmm(energy_weight=0.3, covariance_weight=0.02)).train(), images(30)
    z = z_by_hand(model, x)
    phi, mu, sigma = weighted(gamma_by_hand(model, z), z)
    error = (x - model(x)).detach().flatten(1).square().sum(1).mean().item() + 9 * math.log(math.pi)
    energy = -of_scikit_learn(phi, mu, sigma + 1e-6 * np.eye(5)).score_samples(z).mean()
    inverse = (1 / (np.diagonal(sigma, axis1=1, axis2=2) + 1e-6)).sum()
    terms = model.loss(x)
    for name, value in {"nll": error, "energy": energy, "inverse_variances": inverse}.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-7), name
    assert terms["loss"].item() == pytest.approx(error + 0.3 * energy + 0.02 * inverse, rel=1e-7)


def test_without_weights_it_is_an_autoencoder(shifted: Any) -> None:
    """lambda_1 = lambda_2 = 0: the loss and the gradients of dense_ae with the same weights."""
    model, x = shifted(dagmm(energy_weight=0.0, covariance_weight=0.0)), images(30)
    parent = aezoo.create_model(
        "dense_ae", SHAPE, latent_dim=3, hidden_dims=(16,), activation="tanh", likelihood="gaussian"
    ).double()
    for mine, theirs in ((model.encoder, parent.encoder), (model.decoder, parent.decoder)):
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            q.data.copy_(p)
    found, expected = model.train().loss(x), parent.train().loss(x)
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=0)
    found["loss"].backward()
    expected["loss"].backward()
    for p, q in zip(model.encoder.parameters(), parent.encoder.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-9)


def test_the_energy_trains_all_networks_and_its_gradient_is_that_of_differences(shifted: Any) -> None:
    model, x = shifted(dagmm(energy_weight=1.0)).train(), images(12)
    energy = model.loss(x)["energy"]
    for net in (model.encoder, model.decoder, model.estimation):
        grads = torch.autograd.grad(energy, [*net.parameters()], retain_graph=True)
        assert all(g.norm() > 1e-6 for g in grads)
    p = model.estimation[0].weight
    (grad,) = torch.autograd.grad(energy, [p])
    off = torch.zeros_like(p)
    off[1, 2] = 1e-5
    values = []
    for sign in (1, -1):
        other = copy.deepcopy(model)
        other.estimation[0].weight.data.add_(sign * off)
        values.append(other.loss(x)["energy"].item())
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(grad[1, 2].item(), rel=1e-4)


def test_two_ranks_are_one(shifted: Any) -> None:
    model, x = shifted(dagmm(covariance_weight=0.1, energy_weight=0.5)).train(), images(16)
    whole = copy.deepcopy(model)
    terms = whole.loss(x)
    together = on_two_ranks(model, x)
    for name, value in terms.items():
        torch.testing.assert_close(together.terms[name], value, rtol=1e-9, atol=1e-12)
    expected = torch.autograd.grad(terms["loss"], [*whole.parameters()])
    for mine, theirs in zip(together.gradients(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)
    for own in together.copies:
        for name, buffer in own.named_buffers():
            torch.testing.assert_close(buffer, whole.get_buffer(name), rtol=1e-9, atol=1e-12)
    # statistics of each rank by itself
    apart = on_two_ranks(model, x, exchange=False)
    assert (apart.terms["energy"] - terms["energy"]).abs() > 0.01


# ---- DAGMM: what evaluation reads ------------------------------------------------------------------------------------


def test_evaluation_reads_the_pooled_statistics_of_training(shifted: Any) -> None:
    """Batches with weights that fall by 19/20: shares, means and covariances of all samples, by NumPy."""
    model, parts = shifted(dagmm()).train(), [images(20 + i, seed=i) for i in range(5)]
    for x in parts:
        model.loss(x)
    z = [z_by_hand(model, x) for x in parts]
    weights = [np.full(len(x), 0.95 ** (4 - i) / len(x)) for i, x in enumerate(parts)]
    gamma = np.concatenate([gamma_by_hand(model, part) * w[:, None] for part, w in zip(z, weights, strict=True)])
    phi, mu, sigma = weighted(gamma, np.concatenate(z))
    found = model.remembered()
    for mine, theirs in zip(found, (phi / phi.sum(), mu, sigma), strict=True):
        # what stood there before the first batch has a weight of about 1e-5
        torch.testing.assert_close(mine, torch.from_numpy(theirs), rtol=1e-3, atol=1e-4)
    averaged = np.mean([weighted(gamma_by_hand(model, part), part)[2] for part in z], axis=0)
    assert np.abs(averaged - sigma).max() > 1e-3  # a mean of covariances lacks what means differ by


def test_evaluation_changes_nothing_and_looks_at_no_other_sample(shifted: Any) -> None:
    model, x = shifted(dagmm()), images(20)
    model.train().loss(images(20, seed=1))
    held = {name: value.clone() for name, value in model.eval().state_dict().items()}
    whole, terms = model.score(x), model.loss(x)
    assert torch.equal(model.score(x), whole)
    torch.testing.assert_close(model.score(x[3:4]), whole[3:4], rtol=1e-12, atol=0)
    torch.testing.assert_close(terms["energy"], whole.mean())
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())
    # of the batch's own statistics the energy would be another
    assert (model.energy(torch.from_numpy(z_by_hand(model, x)), *model.mixture(torch.from_numpy(z_by_hand(model, x))))
            - whole).abs().max() > 0.1  # fmt: skip


def test_before_training_the_mixture_is_one_standard_gaussian_thrice() -> None:
    model, x = dagmm(n_components=3).eval(), images()
    z = torch.from_numpy(z_by_hand(model, x))
    expected = -D.Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(model.score(x).detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_fewer_samples_than_dimensions_have_an_energy(n: int, scale: float, dtype: torch.dtype) -> None:
    """A covariance of rank n - 1 has no Cholesky factor without the jitter, nor with one that rounding exceeds."""
    torch.manual_seed(n)
    model = dagmm().to(dtype)
    z = (scale * (torch.randn(n, 5) + 3)).to(dtype)
    phi, mu, sigma = model.mixture(z)
    energy = model.energy(z, phi, mu, sigma)
    energy.sum().backward()
    assert energy.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(RuntimeError, match="not positive-definite"):
        torch.linalg.cholesky(sigma - 1e-12 * scale**2 * torch.eye(5, dtype=dtype))


def test_codes_that_are_no_numbers_give_an_energy_that_is_none_and_no_error_of_torch() -> None:
    model, (phi, mu, sigma) = dagmm(), mixture_of(0)
    assert (
        model.energy(torch.zeros(4, 5).double(), phi, mu, sigma.index_fill(0, torch.tensor([1]), torch.nan))
        .isnan()
        .all()
    )
    lost = sigma.clone()
    lost[1] = -lost[1]  # no covariance
    assert model.energy(torch.zeros(4, 5).double(), phi, mu, lost).isnan().all()


def test_a_component_without_samples_is_no_trouble() -> None:
    model, x = dagmm(n_components=2), images(12)
    with torch.no_grad():
        model.estimation[-1].bias.copy_(torch.tensor([2000.0, -2000.0]))
    terms = model.train().loss(x)
    terms["loss"].backward()
    assert all(value.isfinite() for value in terms.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.eval().score(x).isfinite().all()


def test_black_samples_have_a_finite_distance(shifted: Any) -> None:
    model, x = shifted(dagmm()), torch.zeros(4, *SHAPE, dtype=torch.float64)
    x[1:] = images(3)
    z = model.features(model.encoder(x), x, model(x))
    rms = model(x)[0].square().mean().sqrt()
    torch.testing.assert_close(z[0, -2], rms / 1e-3)
    assert z[0, -1] == 0
    terms = model.train().loss(x)
    terms["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# ---- GANomaly: who trains what ---------------------------------------------------------------------------------------

LIKELIHOODS = ("laplace", "bernoulli", "gaussian:learned")


def ganomaly(**settings: Any) -> Any:
    settings = {"latent_dim": 4, "hidden_dims": (16,), "discriminator_dims": (12, 8), **settings}
    return aezoo.create_model("ganomaly", SHAPE, **settings).double()


def players(model: Any) -> dict[str, list[nn.Parameter]]:
    parts = (model.encoder, model.decoder, model.second_encoder, model.likelihood)
    return {
        "generator": [p for part in parts for p in part.parameters()],
        "discriminator": [*model.discriminator.parameters()],
    }


def features_by_hand(model: Any, x: Tensor) -> Tensor:
    """The last hidden layer, of mean 0 and variance 1 for each sample."""
    h = model.discriminator.body(x)
    return (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()


def losses(model: Any, x: Tensor) -> dict[str, Tensor]:
    """What each player minimises, all parameters live: the authors' means, times X / 50."""
    z = model.encoder(x)
    params = model.decoder(z)
    x_hat = model.likelihood.mean(params)
    f, f_hat = features_by_hand(model, x), features_by_hand(model, x_hat)
    x_dim = x[0].numel()
    real, fake = (model.discriminator.head(features_by_hand(model, g)).sigmoid() for g in (x, x_hat.detach()))
    adversarial, encoding = F.mse_loss(f_hat, f.detach()), F.mse_loss(z, model.second_encoder(x_hat))
    nll = -model.likelihood.log_prob(params, x).mean()
    return {
        "generator": nll + model.adv_weight * x_dim * adversarial + model.enc_weight * x_dim * encoding,
        "discriminator": F.binary_cross_entropy(real, torch.ones_like(real))
        + F.binary_cross_entropy(fake, torch.zeros_like(fake)),
    }


def size(value: Tensor, of: list[nn.Parameter]) -> float:
    """The norm of a gradient, 0 where there is none."""
    found = torch.autograd.grad(value, of, allow_unused=True, retain_graph=True)
    return math.sqrt(sum(float((g**2).sum()) for g in found if g is not None))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_one_backward_pass_gives_each_player_its_own_gradient(likelihood: str, training: bool, shifted: Any) -> None:
    model, x = shifted(ganomaly(likelihood=likelihood, adv_weight=0.7, enc_weight=0.3)).train(training), images()
    terms, expected = model.loss(x), losses(model, x)
    terms["loss"].backward()
    torch.testing.assert_close(terms["loss"], expected["generator"])
    torch.testing.assert_close(terms["discriminator"], expected["discriminator"])
    for player, part in players(model).items():
        wanted = torch.autograd.grad(expected[player], part)
        assert math.sqrt(sum(float((g**2).sum()) for g in wanted)) > 1e-3
        for p, g in zip(part, wanted, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=1e-9)


def test_no_term_reaches_another_player(shifted: Any) -> None:
    model, x = shifted(ganomaly()), images()
    terms, parts = model.loss(x), players(model)
    for term in ("nll", "adversarial", "encoding"):
        assert size(terms[term], parts["generator"]) > 1e-6
        assert size(terms[term], parts["discriminator"]) == 0
    assert size(terms["discriminator"], parts["discriminator"]) > 1e-6
    assert size(terms["discriminator"], parts["generator"]) == 0
    # the codes' distance trains both encoders and the decoder between them
    for net in (model.encoder, model.decoder, model.second_encoder):
        assert size(terms["encoding"], [*net.parameters()]) > 1e-6
    assert size(terms["nll"], [*model.second_encoder.parameters()]) == 0
    # the slip of https://github.com/samet-akcay/ganomaly's ports, an output that is not detached
    leaky = F.softplus(model.discriminator(model(x))[1]).mean()
    assert size(leaky, parts["generator"]) > 1e-6


def test_the_players_are_disjoint_and_together_all_parameters() -> None:
    model = ganomaly(discriminator_lr=3e-3, likelihood="laplace:learned")
    first, last = model.configure_optimizers().param_groups
    held = [id(p) for group in (first, last) for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == {id(p) for p in model.parameters()}
    assert {id(p) for p in last["params"]} == {id(p) for p in model.discriminator.parameters()}
    # https://github.com/samet-akcay/ganomaly, lib/model.py: both
    assert (first["lr"], first["betas"]) == (1e-3, (0.5, 0.999))
    assert (last["lr"], last["betas"]) == (3e-3, (0.5, 0.999))
    groups = ganomaly(optimizer="adam:beta1=0.8").configure_optimizers().param_groups
    assert [group["betas"] for group in groups] == [(0.8, 0.999)] * 2
    assert len(ganomaly(optimizer="sgd").configure_optimizers().param_groups) == 2


def test_its_steps_are_those_of_an_optimiser_for_each_player(shifted: Any, quiet: Any) -> None:
    batches = [images(6, seed) for seed in range(5)]
    model = shifted(ganomaly(lr=2e-3, discriminator_lr=5e-3, adv_weight=0.7))
    other = copy.deepcopy(model)
    torch.manual_seed(11)
    trainer: pl.Trainer = quiet(max_epochs=1)
    trainer.fit(model, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    parts = players(other)
    adams = {
        "generator": torch.optim.Adam(parts["generator"], 2e-3, (0.5, 0.999)),
        "discriminator": torch.optim.Adam(parts["discriminator"], 5e-3, (0.5, 0.999)),
    }
    for i, x in enumerate(batches):
        torch.manual_seed(mix(11, 0, 0, i))
        found = losses(other, x)
        grads = {player: torch.autograd.grad(found[player], part) for player, part in parts.items()}
        for player, part in parts.items():
            for p, g in zip(part, grads[player], strict=True):
                p.grad = g
            adams[player].step()
    for (key, mine), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8, msg=key)


def test_without_weights_the_generator_is_an_autoencoder(shifted: Any) -> None:
    """Its loss and gradients are dense_ae's, whatever the discriminator does."""
    model, x = shifted(ganomaly(adv_weight=0.0, enc_weight=0.0)), images()
    parent = aezoo.create_model(
        "dense_ae", SHAPE, latent_dim=4, hidden_dims=(16,), activation="leaky_relu", likelihood="laplace"
    ).double()
    pairs = [
        *zip(model.encoder.parameters(), parent.encoder.parameters(), strict=True),
        *zip(model.decoder.parameters(), parent.decoder.parameters(), strict=True),
    ]
    for p, q in pairs:
        q.data.copy_(p)
    found, expected = model.loss(x), parent.loss(x)
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=0)
    found["loss"].backward()
    expected["loss"].backward()
    for p, q in pairs:
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-9)


def test_a_discriminator_that_cannot_tell_costs_2_log_2() -> None:
    model = ganomaly()
    with torch.no_grad():
        for p in model.discriminator.head.parameters():
            p.zero_()
    assert model.loss(images())["discriminator"].item() == pytest.approx(2 * math.log(2))


def test_the_discriminator_cannot_choose_the_scale_of_its_features(shifted: Any) -> None:
    model, x, found = shifted(ganomaly()), images(), []
    for factor in (1, 1000):
        with torch.no_grad():
            model.discriminator.body[-2].weight *= factor
            model.discriminator.body[-2].bias *= factor
        found.append(model.loss(x)["adversarial"])
        # at most the distance of opposite points of a sphere, 4 for each feature
        assert 0 < found[-1] <= 4 * 18
    torch.testing.assert_close(*found, rtol=1e-3, atol=0)


# ---- GANomaly: the score ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("likelihood", ["laplace", "bernoulli"])
def test_the_score_is_the_mean_squared_difference_of_the_two_codes(likelihood: str, net: str, shifted: Any) -> None:
    model, x = shifted(ganomaly(likelihood=likelihood, net=net)).eval(), images(20)
    with torch.no_grad():
        z, z_hat = model.encode(x).numpy(), model.second_encoder(model(x)).numpy()
        score = model.score(x)
    # torch.mean(torch.pow((latent_i-latent_o), 2), dim=1) in lib/model.py of https://github.com/samet-akcay/ganomaly
    np.testing.assert_allclose(score.numpy(), np.mean((z - z_hat) ** 2, axis=1), rtol=1e-9)
    torch.testing.assert_close(model.score(x[5:6]).detach(), score[5:6], rtol=1e-9, atol=0)
    # scaled by the least and the largest of what is judged, as in the paper and anomalib #1093, it would not
    scaled = [(s - s.min()) / (s.max() - s.min()) for s in (score, score[3:9])]
    assert (scaled[0][3:9] - scaled[1]).abs().max() > 0.01


def test_two_encoders_that_agree_find_nothing_strange(shifted: Any) -> None:
    """A perfect autoencoder whose second encoder is its first."""
    model: Any = aezoo.create_model("ganomaly", (6,), latent_dim=6, hidden_dims=(), discriminator_dims=(8,)).double()
    with torch.no_grad():
        for net in (model.encoder, model.decoder, model.second_encoder):
            for p in net.parameters():
                p.copy_(torch.eye(6) if p.ndim == 2 else torch.zeros(6))
    x = torch.rand(9, 6, dtype=torch.float64)
    terms = model.loss(x)
    assert not model.eval().score(x).any()
    assert terms["encoding"] == 0 and terms["adversarial"] == 0
    assert terms["nll"].item() == pytest.approx(6 * math.log(2))


@pytest.mark.parametrize("shape", [(9,), (2, 16), (1, 9, 7), (3, 8, 8), (1, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("name", ["dagmm", "ganomaly"])
def test_every_kind_of_sample_is_scored(name: str, shape: tuple[int, ...]) -> None:
    for net in ("mlp", "conv", "resnet")[: 1 if len(shape) == 1 else 3]:
        model, x = aezoo.create_model(name, shape, net=net, hidden_dims=(4, 4)), torch.rand(5, *shape)
        terms = model.loss(x)
        terms["loss"].backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        score = model.eval().score(x)
        assert score.shape == (5,) and score.isfinite().all()


# ---- what they find --------------------------------------------------------------------------------------------------


def test_dagmm_finds_malignant_tumours_once_it_knows_benign_ones(adam: Any) -> None:
    """Rows of a table, as in the paper; far above the reconstruction's relative error alone."""
    found = load_breast_cancer()
    benign, malignant = found.data[found.target == 1], found.data[found.target == 0]
    train, x = (
        torch.from_numpy((part - benign.mean(0)) / benign.std(0)).float()
        for part in (benign[:250], np.concatenate([benign[250:], malignant]))
    )
    model: Any = aezoo.create_model("dagmm", (30,), hidden_dims=(32,))
    adam(model, train, steps=400, lr=2e-3, batch=64)
    y = np.repeat([0, 1], [len(benign) - 250, len(malignant)])
    with torch.no_grad():
        z = model.features(model.encode(x), x, model(x))
        auroc, relative = roc_auc_score(y, model.score(x)), roc_auc_score(y, z[:, -2])
        # the mixture of all training samples at the last weights says nearly the same as what is remembered
        whole = model.energy(z, *model.mixture(model.features(model.encode(train), train, model(train))))
    assert auroc > 0.9 and auroc > relative + 0.2
    assert roc_auc_score(y, whole) == pytest.approx(auroc, abs=0.03)


def test_ganomaly_tells_threes_from_other_digits() -> None:
    """One-vs-rest; figures of runs differ much (anomalib #1093), hence the mean of two. Baselines stand beside it."""
    data, found = aezoo.DataModule("digits", batch_size=64, train_classes=[3]), []
    x, y = data.tensors("train")[0], np.asarray(data.tensors("test")[1])
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = aezoo.create_model("ganomaly", (1, 8, 8), hidden_dims=(64,), lr=2e-3)
        optimizer = model.configure_optimizers()
        for _ in range(400):
            optimizer.zero_grad()
            model.loss(x[torch.randint(len(x), (64,))])["loss"].backward()
            optimizer.step()
        judged = detect(model, data, score="nll,mse", normal="3", n_shown=0)
        assert judged.table[0]["auroc"] == pytest.approx(roc_auc_score(y != 3, judged.scores))
        assert {"mse", "pca", "mean", "knn", "isolation_forest"} < {row["method"] for row in judged.table}
        found.append(judged.table[0]["auroc"])
    assert np.mean(found) > 0.9, found
