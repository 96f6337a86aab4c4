"""Laws of SQ-VAE, a stochastically quantised VAE (Takida et al. 2022).

The model was compared with the authors' code, in float64 on equal networks, weights, batch and Gumbel noise, for the
three kinds of variance. Differences are relative to the largest value; for gradients, the largest over the parameters
is given.

    https://github.com/sony/sqvae, commit dc88ab1a48f7596b3650e19de65e81b8f0498ee4
        vision/quantizer.py, GaussianVectorQuantizer  z_q 4.2e-16 in training, 0 in evaluation
        ... kld_discrete                              value 0, gradients of 6 parameters 5.3e-16
        vision/model.py, GaussianSQVAE with arelbo    nll 0, gradients of 10 parameters 7.6e-15

Ours adds P log K and the constants of the Gaussian, with v for their mean squared error. Differs: kld_continuous takes
the relaxed code (16.9 nats where ours has 39.8), ours the mean over codes, as the paper; with codes almost one-hot, the
mean of 400 of their draws is 39.93, with a standard error of 0.08. Variances of each sample or position are added to
the common variance in theirs and multiplied with it in ours.
"""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributions as D
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from quantised_laws import (  # noqa: F401
    test_inference_calls_do_not_update_codebook,
)
from torch import Tensor
from torch.utils.data import DataLoader

import aezoo
import aezoo.distributions.categorical
from aezoo.errors import AezooError
from aezoo.models.quantised import sq_vae
from aezoo.models.quantised.sq_vae import SQVAE
from aezoo.quantisers import VQ, StochasticVQ
from aezoo.quantisers.stochastic_vq import VARIANCES

K, P, DIM = 3, 2, 4  # codebook size, positions and channels, small enough to list all codes of a sample


SHAPE = (1, 11, 9)


SMALL: dict[str, Any] = {"latent_dim": 4, "codebook_size": 7, "hidden_dims": (6, 5)}


every_variance = pytest.mark.parametrize("variance", VARIANCES)


def tiny(shifted: Any, **settings: Any) -> Any:
    """A float64 model of vectors of 6 with P positions of K codes, each neither certain nor uniform."""
    given = {"latent_dim": DIM, "codebook_size": K, "places": P, "net": "mlp", "hidden_dims": (12,)}
    model = shifted(aezoo.create_model("sq_vae", input_shape=(6,), **given | settings)).double()
    with torch.no_grad():
        [*model.encoder.parameters()][-2].mul_(3)
        model.quantiser.log_variance.fill_(0.7)
        model.likelihood.log_scale.fill_(math.log(0.4))
    return model


def vectors(n: int = 5) -> Tensor:
    return torch.rand(n, 6, dtype=torch.float64)


def parts(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The encoder's z without its variance channel, and its variance s^2: (B, P, D), (B, P, 1)."""
    z_BPD = model.encoder(x).flatten(2).movedim(1, 2)
    s2 = model.quantiser.log_variance.exp().expand(*z_BPD.shape[:2], 1)
    if model.quantiser.variance == "one":
        return z_BPD, s2
    own_BP1 = z_BPD[..., -1:]
    if model.quantiser.variance == "sample":
        own_BP1 = own_BP1.mean(1, keepdim=True).expand_as(own_BP1)
    return z_BPD[..., :-1], s2 * own_BP1.exp()


def squares(model: Any, x: Tensor) -> Tensor:
    """||z - e_k||^2 / (2 s^2) of every code: (B, P, K)."""
    z_BPD, s2_BP1 = parts(model, x)
    return (z_BPD[:, :, None] - model.quantiser.code_KD).square().sum(3) / (2 * s2_BP1)


def with_noise(monkeypatch: pytest.MonkeyPatch, g_BPK: Tensor) -> None:
    """Return this Gumbel noise in every draw."""
    for module in (aezoo.distributions.categorical, sq_vae):
        monkeypatch.setattr(module, "sample_gumbel", lambda like: g_BPK.view_as(like))


def every_code() -> Tensor:
    return torch.tensor([*itertools.product(range(K), repeat=P)])


def gumbel_noise(n: int = 5) -> Tensor:
    return D.Gumbel(torch.zeros(n, P, K).double(), 1.0).sample()


# ---- the terms -------------------------------------------------------------------------------------------------------


@every_variance
@pytest.mark.parametrize("training", [True, False])
def test_terms_are_means_over_all_codes_of_a_sample(variance: str, training: bool, shifted: Any) -> None:
    """E_q ||z - z_q||^2 / (2 s^2) and KL(q || uniform), each by enumeration of the K^P codes."""
    model, x = tiny(shifted, variance=variance).train(training), vectors()
    d_BPK = squares(model, x)
    log_q_BPK = D.Categorical(logits=-d_BPK).logits
    assert 0.1 < log_q_BPK.exp().max(2).values.mean() < 0.99
    pieces = []
    for code in every_code():
        log_q = log_q_BPK[:, torch.arange(P), code].sum(1)
        distance = d_BPK[:, torch.arange(P), code].sum(1)
        pieces.append(torch.stack([log_q.exp() * distance, log_q.exp() * (log_q + P * math.log(K))]))
    dequantisation, kl = torch.stack(pieces).sum(0).mean(1)
    found = model.loss(x)
    torch.testing.assert_close(found["dequantisation"], dequantisation)
    torch.testing.assert_close(found["kl"], kl)
    torch.testing.assert_close(found["loss"], found["nll"] + kl + dequantisation)
    torch.testing.assert_close(found["elbo"], -found["nll"] - kl)
    torch.testing.assert_close(found["code_sigma"], torch.tensor(0.35, dtype=torch.float64).exp())


@every_variance
def test_terms_sum_to_mixture_density_at_codes(variance: str, shifted: Any) -> None:
    """-log of the mean over codes of N(z; e_k, s^2), relative to its value at z = e_k, is the sum of both terms."""
    model, x = tiny(shifted, variance=variance).eval(), vectors()
    z_BPD, s2_BP1 = parts(model, x)
    scale = s2_BP1.sqrt()[..., None].expand(-1, -1, K, DIM)
    at_codes = D.Independent(D.Normal(model.quantiser.code_KD.expand_as(scale), scale), 1)
    mixture = D.MixtureSameFamily(D.Categorical(logits=torch.zeros(len(x), P, K).double()), at_codes)
    highest = -DIM / 2 * torch.log(2 * math.pi * s2_BP1[..., 0])
    wanted_B = (highest - mixture.log_prob(z_BPD)).sum(1)
    terms = model.loss(x)
    torch.testing.assert_close(terms["dequantisation"] + terms["kl"], wanted_B.mean())
    nll_B = -D.Normal(model(x), 0.4).log_prob(x).sum(1)
    torch.testing.assert_close(model.score(x), nll_B + wanted_B)
    assert wanted_B.std() > 0.01 and nll_B.std() > 0.01


@every_variance
def test_terms_depend_on_distances_relative_to_sigma(variance: str, shifted: Any) -> None:
    """Terms and draws stay the same when z and the codes are translated, or scaled together with s."""
    model, x = tiny(shifted, variance=variance).quantiser.train(), torch.randn(5, DIM + 1, P).double()
    x = x[:, : model.dim]
    torch.manual_seed(1)
    before = model(x)
    for factor, offset in ((3.0, 0.0), (1.0, 40.0), (0.2, -2.0)):
        other = StochasticVQ(DIM, K, variance=variance).double().train()
        moved = x.clone()
        moved[:, :DIM] = x[:, :DIM] * factor + offset
        with torch.no_grad():
            other.code_KD.copy_(model.code_KD * factor + offset)
            other.log_variance.copy_(model.log_variance + 2 * math.log(factor))
        torch.manual_seed(1)
        found = other(moved)
        assert torch.equal(found.indices, before.indices)
        torch.testing.assert_close(found.z_q, before.z_q * factor + offset)
        for term, value in before.terms.items():
            torch.testing.assert_close(found.terms[term], value)


# ---- variance per sample or position ---------------------------------------------------------------------------------


def own_channel(variance: str, own: Tensor) -> tuple[StochasticVQ, Tensor]:
    """A quantiser and z, whose last channel is the given log factor of the variance, (B, P)."""
    torch.manual_seed(2)
    quantiser = StochasticVQ(DIM, K, variance=variance, start_variance=1.5).double().eval()
    z = torch.randn(len(own), DIM, own.shape[1], dtype=torch.float64)
    return quantiser, z if variance == "one" else torch.cat([z, own[:, None]], 1)


def test_unit_factor_equals_shared_variance() -> None:
    found = []
    for variance in VARIANCES:
        quantiser, z = own_channel(variance, torch.zeros(6, P).double())
        found.append(quantiser.logits(z))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_variance_modes_scale_per_sample_or_position() -> None:
    own = torch.randn(6, P).double()
    plain = own_channel("one", own)
    one = plain[0].logits(plain[1])
    for variance, log_factor in (("sample", own.mean(1, keepdim=True).expand(-1, P)), ("place", own)):
        quantiser, z = own_channel(variance, own)
        torch.testing.assert_close(quantiser.logits(z), one * (-log_factor).exp()[..., None])
        # a sample's logits do not depend on the rest of the batch
        torch.testing.assert_close(quantiser.logits(z[2:4]), quantiser.logits(z)[2:4])
        assert torch.equal(quantiser(z).indices, plain[0](plain[1]).indices)  # the factor keeps the order of the codes
    assert torch.equal(own_channel("place", own[:, :1])[0].logits(z[:, :, :1]), quantiser.logits(z)[:, :1])


@pytest.mark.parametrize("net", ["mlp", "conv"])
@every_variance
def test_the_encoder_gives_the_variance_a_channel(variance: str, net: str, shifted: Any) -> None:
    model: Any = shifted(aezoo.create_model("sq_vae", SHAPE, **SMALL, variance=variance, net=net, places=3))
    x = torch.rand(4, *SHAPE)
    assert model.encoder(x).shape[1] == 4 + (variance != "one") and model.encode(x).shape[1] == 4
    model.train().loss(x)["loss"].backward()
    last = [*model.encoder.parameters()][-1].grad
    assert last is not None and last.abs().max() > 0 and model.quantiser.log_variance.grad.abs() > 0


# ---- limits of the variance ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hard", [True, False])
def test_zero_variance_equals_vq(hard: bool) -> None:
    """As s goes to 0, draws are the nearest code, the KL is log K, and dequantisation is VQ's commitment over 2 s^2."""
    torch.manual_seed(0)
    quantiser = StochasticVQ(DIM, 9, start_variance=1e-6, hard=hard).double().train()
    vq = VQ(DIM, 9, update="gradient").double().train()
    with torch.no_grad():
        vq.code_KD.copy_(quantiser.code_KD)
    z = torch.randn(40, DIM, 3, dtype=torch.float64)
    found, wanted = quantiser(z), vq(z)
    assert torch.equal(found.indices, wanted.indices) and len(found.indices.unique()) > 4
    torch.testing.assert_close(found.z_q, wanted.z_q, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.terms["kl"], torch.tensor(3 * math.log(9)).double())
    torch.testing.assert_close(2e-6 * found.terms["dequantisation"], wanted.terms["commitment"], rtol=1e-4, atol=0)
    assert torch.equal(quantiser.eval()(z).indices, vq.eval()(z).indices)


def test_large_variance_gives_uniform_codes() -> None:
    """As s grows, codes are drawn uniformly, and KL and dequantisation go to 0."""
    quantiser = StochasticVQ(DIM, 9, start_variance=2e4, hard=True).double().train()
    z = torch.randn(2000, DIM, 3, dtype=torch.float64)
    found = quantiser(z)
    assert 0 < found.terms["kl"] < 1e-5 and 0 < found.terms["dequantisation"] < 1e-2
    q = quantiser.logits(z).softmax(2)
    torch.testing.assert_close(
        D.Categorical(q).entropy(), torch.full((2000, 3), math.log(9)).double(), rtol=0, atol=1e-5
    )
    share = found.indices.flatten().bincount(minlength=9) / 6000
    assert (share - 1 / 9).abs().max() < 5 * math.sqrt(1 / 9 / 6000)


@pytest.mark.parametrize("log_variance", [-1e4, 1e4])
def test_extreme_log_variance_stays_finite(log_variance: float) -> None:
    quantiser = StochasticVQ(DIM, 9).train()
    with torch.no_grad():
        quantiser.log_variance.fill_(log_variance)
    z = (5 * torch.randn(50, DIM)).requires_grad_()
    found = quantiser(z)
    (found.z_q.sum() + sum(found.terms.values())).backward()
    assert all(value.isfinite() for value in found.terms.values())
    assert z.grad.isfinite().all() and quantiser.code_KD.grad.isfinite().all()


# ---- self-annealing --------------------------------------------------------------------------------------------------


def on_a_square(variance: float, noise: float, **settings: Any) -> tuple[Any, Tensor]:
    """Identity networks with four codes at the corners of a square, and samples near them."""
    model: Any = aezoo.create_model(
        "sq_vae", (2,), latent_dim=2, codebook_size=4, places=1, net="mlp", hidden_dims=(), hard=True, **settings
    ).double()
    corners = torch.tensor([[-1.0, -1], [-1, 1], [1, -1], [1, 1]]).double()
    with torch.no_grad():
        for p in [*model.encoder.parameters(), *model.decoder.parameters()]:
            p.copy_(torch.eye(2) if p.ndim == 2 else torch.zeros_like(p))
        model.quantiser.code_KD.copy_(corners)
        model.quantiser.log_variance.fill_(math.log(variance))
    torch.manual_seed(0)
    return model, corners.repeat(1000, 1) + noise * torch.randn(4000, 2).double()


def slope(model: Any, x: Tensor) -> float:
    """The derivative with respect to log s^2 of the exact loss, with expectations over all codes."""
    d_BK = (model.encoder(x).movedim(1, 2) - model.quantiser.code_KD).square().sum(2)
    log_q_BK = (-d_BK / (2 * model.quantiser.log_variance.exp())).log_softmax(1)
    x_hat_KD = model.decoder(model.quantiser.code_KD[:, :, None])
    error = (log_q_BK.exp() * (x[:, None] - x_hat_KD).square().sum(2)).sum(1).mean()
    rest = (log_q_BK.exp() * (d_BK / (2 * model.quantiser.log_variance.exp()) + log_q_BK)).sum(1).mean()
    loss = x.shape[1] / 2 * error.log() + rest
    return float(torch.autograd.grad(loss, model.quantiser.log_variance)[0])


@pytest.mark.parametrize("variance", [0.5, 1.0, 2.0])
def test_variance_falls_with_fit_and_grows_if_ignored(variance: float) -> None:
    """The sign of the gradient of the exact loss, from its value at zero noise."""
    model, x = on_a_square(variance, 0.005)
    fits = slope(model, x)
    # each of 2 coordinates is wrong with probability 1 - p and adds 4 to d, of mean `shift` and variance `spread`
    p = 1 / (1 + math.exp(-2 / variance))
    shift, spread = 4 * 2 * (1 - p), 16 * 2 * p * (1 - p)
    by_hand = (spread / shift - shift) / (2 * variance)
    assert fits == pytest.approx(by_hand, abs=0.05) and fits > 0.1
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()
    assert slope(model, x) == pytest.approx(-shift / (2 * variance), abs=0.05)
    assert slope(model, x) < -1e-3


@pytest.mark.parametrize("reads", [True, False])
def test_variance_update_has_sign_of_exact_gradient(reads: bool) -> None:
    """Relaxed draws at a low temperature have a nearly unbiased gradient."""
    model, x = on_a_square(1.0, 0.02, temperature_steps=0, temperature=0.1)
    model.quantiser.hard = False
    if not reads:
        with torch.no_grad():
            for parameter in model.decoder.parameters():
                parameter.zero_()
    model.train()
    found = [float(torch.autograd.grad(model.loss(x)["loss"], model.quantiser.log_variance)[0]) for _ in range(10)]
    assert (sum(found) > 0) == reads and sum(found) / 10 == pytest.approx(slope(model, x), abs=0.25)


def test_variance_gradient_grows_with_decoder_precision(shifted: Any) -> None:
    """The gradient of s from the nll is proportional to 1 / v."""
    model, x = tiny(shifted, hard=True).eval(), vectors()
    slopes = []
    for scale in (3.0, 0.3, 0.03):
        model.likelihood.log_scale.fill_(math.log(scale))
        d_BPK = squares(model, x)
        log_q_BPK, loss = (-d_BPK).log_softmax(2), 0.0
        for code in every_code():
            q_B = log_q_BPK[:, torch.arange(P), code].sum(1).exp()
            z = model.quantiser.code_KD[code].T.expand(len(x), -1, -1)
            loss = loss + (q_B * model.nll(model.decoder(z), x)).sum()
        slopes.append(float(torch.autograd.grad(loss, model.quantiser.log_variance)[0]))
    assert slopes[1] == pytest.approx(100 * slopes[0]) and slopes[2] == pytest.approx(1e4 * slopes[0])


@pytest.mark.slow
def test_training_reduces_variance() -> None:
    """As in the paper, s^2 falls while codes are learnt, and q becomes confident."""
    model, x = on_a_square(1.0, 0.1)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    seen = []
    for _ in range(150):
        optimizer.zero_grad()
        terms = model.train().loss(x[:256])
        terms["loss"].backward()
        optimizer.step()
        seen.append((terms["code_sigma"].item(), terms["kl"].item()))
    assert seen[-1][0] < 0.8 * seen[0][0] and seen[-1][1] > 1.3 > 1.1 > seen[0][1]


# ---- the likelihood --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
@every_variance
def test_nll_is_computed_at_sampled_codes(
    tau: float, variance: str, shifted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training uses relaxed codes and the v that fits the batch best, evaluation drawn codes and the running mean."""
    model, x = tiny(shifted, variance=variance, temperature=tau, start_temperature=tau), vectors()
    g_BPK = gumbel_noise()
    with_noise(monkeypatch, g_BPK)
    noisy = D.Categorical(logits=-squares(model, x)).logits + g_BPK
    for training in (False, True):
        y = (noisy / tau).softmax(2) if training else torch.eye(K).double()[noisy.argmax(2)]
        x_hat = model.decoder((y @ model.quantiser.code_KD).movedim(2, 1))
        sigma = (x - x_hat).square().mean().sqrt().detach() if training else torch.tensor(0.4, dtype=torch.float64)
        found = model.train(training).loss(x)
        torch.testing.assert_close(found["sigma"], sigma)
        torch.testing.assert_close(found["nll"], -D.Normal(x_hat, sigma).log_prob(x).sum(1).mean())
        # the running mean, of log sigma, is updated in training only
        step = 0.1 if training else 0.0
        wanted = (1 - step) * math.log(0.4) + step * math.log(sigma)
        assert float(model.likelihood.log_scale) == pytest.approx(wanted)


def test_nll_gradient_matches_log_squared_error(shifted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """X / 2 log of the mean squared error, as in the authors' code: v itself needs no gradient."""
    model, x = tiny(shifted).train(), vectors()
    with_noise(monkeypatch, gumbel_noise())
    x_hat = model.decoder(model.draw(x).z_q)
    wanted = 6 / 2 * (x - x_hat).square().sum(1).mean().log()
    pairs = [torch.autograd.grad(v, [*model.parameters()], allow_unused=True) for v in (model.loss(x)["nll"], wanted)]
    for found, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(found, expected)
    assert all(g.abs().max() > 1e-4 for g in pairs[1])


def test_the_running_mean_is_saved(shifted: Any) -> None:
    model, x = tiny(shifted), vectors()
    for _ in range(5):
        model.train().loss(x)
    other = tiny(shifted)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval().score(x), model.eval().score(x)) and model.likelihood.log_scale != math.log(0.4)


# ---- draws and bounds ------------------------------------------------------------------------------------------------


def exact(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Log p(x) and the ELBO by enumeration of all K^P codes, with sigma 0.4: (B,), (B,)."""
    log_q_BPK = (-squares(model, x)).log_softmax(2)
    log_px, log_q = [], []
    for code in every_code():
        z = model.quantiser.code_KD[code].T.expand(len(x), -1, -1)
        log_px.append(D.Normal(model.decoder(z), 0.4).log_prob(x).sum(1))
        log_q.append(log_q_BPK[:, torch.arange(P), code].sum(1))
    log_p, log_q_BM = torch.stack(log_px, 1) - P * math.log(K), torch.stack(log_q, 1)
    return torch.logsumexp(log_p, 1), (log_q_BM.exp() * (log_p - log_q_BM)).sum(1)


@every_variance
def test_the_elbo_is_a_bound_in_evaluation(variance: str, shifted: Any) -> None:
    model, x = tiny(shifted, variance=variance).eval(), vectors(1)
    with torch.no_grad():
        log_p, elbo = exact(model, x)
        assert elbo < log_p - 0.05
        found = torch.stack([model.loss(x.expand(500, -1))["elbo"] for _ in range(40)])
        assert (found.mean() - elbo).abs() < 5 * found.std() / math.sqrt(40) + 1e-6


def test_hard_codes_have_relaxed_gradient(shifted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"temperature_steps": 0, "temperature": 0.7}
    soft, hard, x = tiny(shifted, **settings), tiny(shifted, **settings, hard=True), vectors()
    hard.load_state_dict(soft.state_dict())
    with_noise(monkeypatch, gumbel_noise())
    found = {kind: model.train().draw(x) for kind, model in (("soft", soft), ("hard", hard))}
    torch.testing.assert_close(found["hard"].z_q, hard.codes(found["hard"].indices))
    assert torch.equal(found["hard"].indices, hard.eval().draw(x).indices)
    assert (found["soft"].z_q - found["hard"].z_q).abs().max() > 1e-2
    towards = torch.randn_like(found["soft"].z_q)
    one, two = (
        torch.autograd.grad(
            (found[kind].z_q * towards).sum(), [model.quantiser.log_variance, *model.encoder.parameters()]
        )
        for kind, model in (("soft", soft), ("hard", hard))
    )
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)


def test_positions_and_samples_are_drawn_independently(shifted: Any) -> None:
    """With a uniform q, two positions have the same code with probability 1 / K, in training and evaluation."""
    model = tiny(shifted, hard=True)
    with torch.no_grad():
        model.quantiser.log_variance.fill_(10)
    x = vectors(1).expand(3000, -1)
    for training in (True, False):
        index = model.train(training).draw(x).indices[:, 0]
        for agree in (index[:, 0] == index[:, 1], index[1:, 0] == index[:-1, 0]):
            assert (agree.double().mean() - 1 / K).abs() < 5 * math.sqrt(2 / 9 / 3000)


@pytest.mark.parametrize("training", [True, False])
@every_variance
def test_reconstruction_takes_nearest_code_without_draws(variance: str, training: bool, shifted: Any) -> None:
    model, x = tiny(shifted, variance=variance).train(training), vectors(30)
    state = torch.get_rng_state()
    with torch.no_grad():
        index = torch.cdist(parts(model, x)[0], model.quantiser.code_KD[None]).argmin(2)
        assert torch.equal(model.encode_indices(x)[:, 0], index) and len(index.unique()) > 1
        torch.testing.assert_close(model.encode(x), model.quantiser.code_KD[index].movedim(2, 1))
        torch.testing.assert_close(model(x), model.decoder(model.quantiser.code_KD[index].movedim(2, 1)))
        assert torch.equal(model.score(x), model.score(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.eval().draw(x).indices != model.encode_indices(x)).any()
    assert model.quantiser.training == model.training


# ---- gradients, temperature, samples ---------------------------------------------------------------------------------


@every_variance
def test_likelihood_trains_all_terms_train_encoder_codes(variance: str, shifted: Any) -> None:
    """No gradient is stopped, unlike in VQ, where the nll does not change the codes."""
    model = tiny(shifted, variance=variance).train()
    terms, names = model.loss(vectors()), [name for name, _ in model.named_parameters()]
    moved = {}
    for term in ("nll", "kl", "dequantisation"):
        found = torch.autograd.grad(terms[term], [*model.parameters()], retain_graph=True, allow_unused=True)
        moved[term] = {name.split(".")[0] for name, g in zip(names, found, strict=True) if g is not None and g.any()}
        kept = {name for name, g in zip(names, found, strict=True) if g is not None and g.any()}
        assert {"quantiser.code_KD", "quantiser.log_variance"} <= kept
    every = {"encoder", "quantiser", "decoder"}
    assert moved == {"nll": every, "kl": every - {"decoder"}, "dequantisation": every - {"decoder"}}


def test_temperature_decays_geometrically() -> None:
    model: Any = aezoo.create_model(
        "sq_vae", SHAPE, **SMALL, start_temperature=2.0, temperature=0.5, temperature_steps=10
    )
    for steps, tau in ((0, 2.0), (5, 1.0), (10, 0.5), (77, 0.5)):
        model.steps.fill_(steps)
        assert float(model.tau()) == pytest.approx(tau)
    assert model.quantiser.temperature == 2
    model.temperature_steps = 0
    model.steps.zero_()
    assert float(model.tau()) == 0.5


@pytest.mark.slow
def test_training_anneals_temperature_and_indices_roundtrip(quiet: Any) -> None:
    model: Any = aezoo.create_model("sq_vae", SHAPE, **SMALL, temperature_steps=20)
    x = (torch.rand(40, 1, 1, 1) * torch.rand(40, *SHAPE)).clamp(0, 1)
    trainer, batches = quiet(max_epochs=3), DataLoader(x, batch_size=10)
    trainer.fit(model, batches, batches)
    assert model.steps == 11  # the last of 12 steps, counted from 0
    torch.testing.assert_close(model.quantiser.temperature, model.tau())
    assert 0.5 < model.tau() < 0.95
    found = trainer.validate(model, batches, verbose=False)[0]
    indices = model.eval().encode_indices(x)
    assert torch.equal(model.codes(indices), model.encode(x))
    torch.testing.assert_close(model.decode_indices(indices), model(x))
    assert found["val/bits_per_dim"] == pytest.approx(-found["val/elbo"] / (99 * math.log(2)), rel=1e-5)
    assert found["val/mse"] == pytest.approx(float((model(x) - x).square().mean().detach()), rel=1e-4)


def test_samples_decode_uniform_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = aezoo.create_model("sq_vae", SHAPE, **SMALL).eval()
    seen = []
    monkeypatch.setattr(model, "decode_indices", lambda given: seen.append(given) or model.decode(model.codes(given)))
    found = model.sample(500)
    assert found.shape == (500, *SHAPE) and torch.equal(found, model.decode(model.codes(seen[0])))
    at_places = torch.nn.functional.one_hot(seen[0], 7).double().mean(0)
    assert (at_places - 1 / 7).abs().max() < 6 * math.sqrt(1 / 7 / 500)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"codebook_size": 1}, "codebook_size"),
        ({"latent_dim": 0}, "latent_dim"),
        ({"variance": "channel"}, "variance must be one of one, sample, place"),
        ({"start_variance": 0.0}, "start_variance"),
        ({"start_variance": math.inf}, "start_variance"),
        ({"temperature": 0.0}, "temperature"),
        ({"start_temperature": 0.001}, "start_temperature"),
        ({"temperature_steps": -1}, "temperature_steps"),
        ({"places": 0, "net": "mlp"}, "places"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(AezooError, match=word):
        SQVAE(SHAPE, **settings)
