"""Bounds of Pyro for generative models and guides written from the papers, around copies of our networks.

Source: https://github.com/pyro-ppl/pyro (Bingham et al. 2019). `TraceMeanField_ELBO` has KLs in closed form,
`Trace_ELBO` and `TraceEnum_ELBO` the densities at the draws. For a Gaussian they agree on the mean over noise and its
negative, of values -1 and 1, `both_signs`: the mean of z^2 over the two is that of N(mu, sigma^2).
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
from comparison import noise, taken
from pyro import poutine
from pyro.distributions.transforms import AffineAutoregressive, Permute
from pyro.distributions.transforms.planar import ConditionedPlanar
from pyro.distributions.transforms.radial import ConditionedRadial
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.ops.gaussian import Gaussian
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

import aezoo

SHAPE, LATENT, BATCH = (6,), 3, 5


@pytest.fixture(autouse=True)
def _empty_param_store() -> Iterator[None]:
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def create(name: str, **settings: Any) -> Any:
    if not {"latent_dims", "n_classes"} & {*settings} or name == "joint_vae":
        settings["latent_dim"] = LATENT
    return aezoo.create_model(name, SHAPE, hidden_dims=(5,), **settings).double()


def binary() -> Tensor:
    return torch.rand(BATCH, *SHAPE).bernoulli()


@contextmanager
def draws(*tensors: Tensor) -> Iterator[None]:
    """Noise of the reference's normal distributions."""
    with (
        taken(tensors) as take,
        mock.patch("torch.distributions.normal._standard_normal", lambda shape, **_: take(shape)),
    ):
        yield


def both_signs(*shape: int) -> tuple[Tensor, Tensor]:
    draw = torch.randn(shape).sign()
    return draw, -draw


def gaussian(mean: Tensor, log_var: Tensor) -> Any:
    return dist.Normal(mean, torch.exp(0.5 * log_var)).to_event(1)


def standard_normal(n: Any, d: int = LATENT) -> Any:
    return gaussian(torch.zeros(n, d), torch.zeros(n, d))


def bernoulli(logits: Tensor) -> Any:
    return dist.Bernoulli(logits=logits).to_event(1)


class Program:
    """A model p(x, z) and a guide q(z | x) with copies of our networks; subclasses follow the papers.

    Args:
        model: ours, whose networks are copied.
    """

    elbo: Any = TraceMeanField_ELBO()

    def __init__(self, model: Any) -> None:
        self.nets, self.beta = copy.deepcopy(model), getattr(model, "beta", 1.0)
        self.pairs = [*zip(model.parameters(), self.nets.parameters(), strict=True)]

    def prior(self, n: int) -> Any:
        return standard_normal(n)

    def observed(self, z: Tensor) -> Any:
        return bernoulli(self.nets.decoder(z.reshape(-1, z.shape[-1])).reshape(*z.shape[:-1], *SHAPE))

    def posterior(self, x: Tensor) -> Any:
        return gaussian(*self.nets.encoder(x).chunk(2, -1))

    def model(self, x: Tensor) -> None:
        pyro.module("nets", self.nets)
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=self.beta):
                z = pyro.sample("z", self.prior(len(x)))
            pyro.sample("x", self.observed(z), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("nets", self.nets)
        with pyro.plate("data", len(x)), poutine.scale(scale=self.beta):
            pyro.sample("z", self.posterior(x))

    def loss(self, x: Tensor) -> Tensor:
        """The negative bound, averaged over the batch."""
        return self.elbo.differentiable_loss(self.model, self.guide, x) / len(x)

    def nll(self, x: Tensor) -> Tensor:
        """The reconstruction term of the bound."""
        drawn = poutine.trace(self.guide).get_trace(x)
        trace = poutine.trace(poutine.replay(self.model, drawn)).get_trace(x)
        trace.compute_log_prob()
        return -trace.nodes["x"]["log_prob_sum"] / len(x)


def importance_bound(program: Any, n: int, batch: Any, noises: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
    """RenyiELBO at alpha = 0, the importance weighted bound, of each sample; and a value with its gradients.

    Pyro weights the particles of a batch together, so each sample is a batch here.
    """
    bound = RenyiELBO(alpha=0, num_particles=n, vectorize_particles=True, max_plate_nesting=1)
    program.nets.zero_grad()
    found = []
    for sample, drawn in zip(batch, noises, strict=True):
        with draws(*drawn):
            found.append(bound.loss_and_grads(program.model, program.guide, sample))
    with_gradients = sum((p * p.grad).sum() / len(found) for p in program.nets.parameters() if p.grad is not None)
    return -torch.tensor(found), with_gradients


# ---- closed-form KLs -------------------------------------------------------------------------------------------------


class Shrink(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + 0.1


class Denoising(Program):
    def posterior(self, x: Tensor) -> Any:
        return super().posterior(Shrink()(x))


class Mixture(Program):
    elbo = Trace_ELBO()

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.nets.weight_K, self.nets.mean_KD, self.nets.log_var_KD

    def prior(self, n: int) -> Any:
        logits, mean, log_var = self.components()
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), gaussian(mean, log_var)).expand([n])


class Vamp(Mixture):
    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros(4), *self.nets.encoder(self.nets.pseudo_K.sigmoid()).chunk(2, -1)


class Gamma(Program):
    def prior(self, n: int) -> Any:
        return dist.Gamma(torch.full((n, LATENT), 1.5), 0.7).to_event(1)

    def posterior(self, x: Tensor) -> Any:
        shape, rate = F.softplus(self.nets.encoder(x)).chunk(2, -1)
        return dist.Gamma(0.1 + shape, 0.7 * (1e-3 + rate)).to_event(1)


GAUSSIAN = [
    ("vae", Program, {}),
    ("beta_vae", Program, {"beta": 4.0}),
    ("denoising_vae", Denoising, {}),
    ("mixture_vae", Mixture, {"n_components": 4, "beta": 0.7}),
    ("vamp_vae", Vamp, {"n_components": 4, "beta": 0.7}),
    ("gamma_vae", Gamma, {"prior_shape": 1.5, "prior_rate": 0.7, "beta": 2.0}),
]


def spread(model: Any) -> Any:
    """Add random offsets to the parameters, some of which are 0 initially."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("name", "program", "settings"), GAUSSIAN, ids=[row[0] for row in GAUSSIAN])
def test_bounds_of_one_code(compare, name, program, settings):
    model = spread(create(name, **settings))
    if name == "denoising_vae":
        model.corruption = Shrink()
    theirs, x, eps = program(model), binary(), torch.randn(BATCH, LATENT)
    if name == "gamma_vae":
        torch.manual_seed(1)
        found = model.loss(x)
        torch.manual_seed(1)
        expected = theirs.loss(x)
        torch.manual_seed(1)
        nll = theirs.nll(x)
    else:
        with noise([eps]) if program.elbo is Program.elbo else noise([eps[None]]):
            found = model.loss(x)
        with draws(eps):
            expected = theirs.loss(x)
        with draws(eps):
            nll = theirs.nll(x)
    row = compare(name, "pyro-ppl", type(program.elbo).__name__)
    row.equal("loss", found["loss"], expected)
    row.equal("nll", found["nll"], nll)
    row.equal("kl", found["kl"], (expected - nll) / theirs.beta)
    row.equal("elbo", found["elbo"], -(nll + (expected - nll) / theirs.beta))
    row.equal_gradients(found["loss"], expected, theirs.pairs)
    if name == "gamma_vae":
        return
    theirs.beta, k = 1.0, 4
    eps = torch.randn(k, BATCH, LATENT)
    with noise([eps]):
        likelihood = model.log_likelihood(x, k)
    model.corruption = None
    if name != "denoising_vae":
        bound, _ = importance_bound(theirs, k, x[:, None], [(e[:, None],) for e in eps.unbind(1)])
        compare(name, "pyro-ppl", "RenyiELBO").equal("log_likelihood", likelihood, bound)


@pytest.mark.parametrize("name", ["vae", "beta_vae", "gamma_vae"])
def test_scores_without_noise(compare, name):
    model, x = spread(create(name)), binary()
    theirs = (Gamma if name == "gamma_vae" else Program)(model)
    if name == "gamma_vae":
        model.prior_shape, model.prior_rate = 1.5, 0.7
    theirs.beta, expected = 1.0, []
    for sample in x.split(1):
        at = theirs.posterior(sample).mean
        given = poutine.condition(theirs.model, data={"z": at})
        trace = poutine.trace(given).get_trace(sample)
        trace.compute_log_prob()
        kl = torch.distributions.kl_divergence(theirs.posterior(sample), theirs.prior(1))
        expected.append(kl - trace.nodes["x"]["log_prob"])
    compare(name, "pyro-ppl", "poutine.condition").equal("score", model.score(x), torch.cat(expected))


# ---- importance weighted bounds --------------------------------------------------------------------------------------


def groups_of(eps: Tensor, m: int) -> list[Tensor]:
    return [*eps.unflatten(1, (m, -1)).unbind(1)]


@pytest.mark.parametrize("name", ["iwae", "ciwae", "miwae", "piwae"])
def test_importance_weighted_bounds(compare, name):
    k, m = 4, 3 if name in ("miwae", "piwae") else 1
    settings = {"miwae": {"n_groups": m}, "piwae": {"n_groups": m}, "ciwae": {"beta": 0.3}}.get(name, {})
    model, x, eps = spread(create(name, n_samples=k, **settings)), binary(), torch.randn(BATCH, m * k, LATENT)
    theirs = Program(model)
    theirs.beta = 1.0
    with noise([eps]):
        found = model.loss(x)

    def bound(noises: Tensor) -> tuple[Tensor, Tensor]:
        each, gradients = importance_bound(theirs, noises.shape[1], x[:, None], [(e[:, None],) for e in noises])
        return each.mean(), gradients

    row = compare(name, "pyro-ppl", "RenyiELBO")
    if name == "iwae":
        whole, gradients = bound(eps)
        row.equal("loss", found["loss"], -whole)
        row.equal_gradients(found["loss"], gradients, theirs.pairs)
    elif name == "ciwae":
        whole, gradients = bound(eps)
        elbo = Trace_ELBO(num_particles=k, vectorize_particles=True, max_plate_nesting=1)
        with draws(eps.transpose(0, 1)):
            negative = elbo.differentiable_loss(theirs.model, theirs.guide, x) / BATCH
        row.equal("loss", found["loss"], 0.3 * negative - 0.7 * whole)
        row.equal("iwae", found["iwae"], whole)
        row.equal_gradients(found["loss"], 0.3 * negative + 0.7 * gradients, theirs.pairs)
    else:
        parts = [bound(part) for part in groups_of(eps, m)]
        mean = sum(part for part, _ in parts) / m
        of_groups = sum(part for _, part in parts) / m
        whole, of_all = bound(eps)
        row.equal("loss", found["loss"], -(mean if name == "miwae" else whole))
        if name == "piwae":
            row.equal("miwae", found["miwae"], mean)
        decoder = {id(p) for p in theirs.nets.decoder.parameters()}
        encoders = [pair for pair in theirs.pairs if id(pair[1]) not in decoder]
        decoders = [pair for pair in theirs.pairs if id(pair[1]) in decoder]
        row.equal_gradients(found["loss"], of_groups, encoders, "gradient of the encoder")
        decoder_gradients = of_groups if name == "miwae" else of_all
        row.equal_gradients(found["loss"], decoder_gradients, decoders, "gradient of the decoder")


# ---- labels ----------------------------------------------------------------------------------------------------------


def beside(*parts: Tensor) -> Tensor:
    """Concatenate along the last dimension, and broadcast the others."""
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*shape, -1) for part in parts], -1)


class Labelled(Program):
    """Kingma et al. 2014, equation 6, or without p(y) the conditional VAE: encoder and decoder read the label."""

    def posterior(self, x: Tensor, y: Tensor) -> Any:
        joint = beside(x, F.linear(y, self.nets.label_map.weight))
        return gaussian(*self.nets.encoder(joint.flatten(0, -2)).unflatten(0, joint.shape[:-1]).chunk(2, -1))

    def model(self, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        pyro.module("nets", self.nets)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(len(x)))
            pyro.sample("x", self.observed(beside(z, y)), obs=x)

    def guide(self, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        pyro.module("nets", self.nets)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x, y))


def test_conditional_bounds(compare):
    k = 4
    model, x, y, eps = spread(create("conditional_vae", num_classes=k)), binary(), torch.tensor([0, 3, 1, 1, 2]), None
    theirs, eps = Labelled(model), torch.randn(BATCH, LATENT)
    with noise([eps]):
        found = model.loss(x, y)
    given = (x, F.one_hot(y, k).to(x.dtype))
    with draws(eps):
        expected = theirs.elbo.differentiable_loss(theirs.model, theirs.guide, given) / BATCH
    row = compare("conditional_vae", "pyro-ppl", "TraceMeanField_ELBO")
    row.equal("loss with labels", found["loss"], expected)
    row.equal_gradients(found["loss"], expected, theirs.pairs, "gradient with labels")
    # without a label, each label is a particle
    with noise([eps]):
        found = model.loss(x)
    each = [(sample, torch.eye(k)[:, None]) for sample in x.split(1)]
    bound, gradients = importance_bound(theirs, k, each, [(e.expand(k, 1, LATENT),) for e in eps])
    row = compare("conditional_vae", "pyro-ppl", "RenyiELBO")
    row.equal("loss without labels", found["loss"], -bound.mean())
    row.equal_gradients(found["loss"], gradients, theirs.pairs, "gradient without labels")


class M2(Labelled):
    """Kingma et al. 2014: equation 7 by enumeration of the labels, or equation 6 where they are observed."""

    elbo = TraceEnum_ELBO(max_plate_nesting=1)

    def model(self, batch: tuple[Tensor, Tensor | None]) -> None:
        x, observed = batch
        pyro.module("nets", self.nets)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(len(x), self.nets.num_classes)), obs=observed)
            z = pyro.sample("z", standard_normal(len(x)))
            pyro.sample("x", self.observed(beside(z, y)), obs=x)

    def guide(self, batch: tuple[Tensor, Tensor | None]) -> None:
        x, y = batch
        pyro.module("nets", self.nets)
        with pyro.plate("data", len(x)):
            if y is None:
                q = dist.OneHotCategorical(logits=self.nets.classifier(x))
                y = pyro.sample("y", q, infer={"enumerate": "parallel"})
            pyro.sample("z", self.posterior(x, y))

    def classify(self, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        pyro.module("nets", self.nets)
        with pyro.plate("data", len(x)), poutine.scale(scale=self.nets.alpha):
            pyro.sample("y", dist.OneHotCategorical(logits=self.nets.classifier(x)), obs=y)


def test_semi_supervised_bounds(compare):
    k = 3
    model, x, y = (
        spread(create("semi_supervised_vae", num_classes=k, alpha=2.5)),
        binary(),
        torch.tensor([0, 2, 1, 1, 2]),
    )
    theirs, signs, one_hot = M2(model), both_signs(BATCH, LATENT), F.one_hot(y, k).double()
    row = compare("semi_supervised_vae", "pyro-ppl", "TraceEnum_ELBO")

    def terms(labels: Tensor | None, eps: Tensor) -> dict[str, Tensor]:
        with noise([eps]):
            return model.loss(x, labels)

    def bound(labels: Tensor | None, eps: Tensor) -> Tensor:
        # the same noise for all labels
        with draws(eps if labels is not None else eps.expand(k, BATCH, LATENT)):
            return theirs.elbo.differentiable_loss(theirs.model, theirs.guide, (x, labels)) / BATCH

    found, expected = (sum(terms(None, e)["loss"] for e in signs) / 2, sum(bound(None, e) for e in signs) / 2)
    row.equal("loss without labels", found, expected)
    row.equal_gradients(found, expected, theirs.pairs, "gradient without labels")
    found = sum(terms(y, e)["loss"] for e in signs) / 2
    classify = Trace_ELBO().differentiable_loss(theirs.classify, lambda batch: None, (x, one_hot)) / BATCH
    expected = sum(bound(one_hot, e) for e in signs) / 2 + classify
    row.equal("loss with labels", found, expected)
    row.equal("cross_entropy", terms(y, signs[0])["cross_entropy"], classify / 2.5)
    row.equal_gradients(found, expected, theirs.pairs, "gradient with labels")


class M1(Program):
    def model(self, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        super().model(x)
        logits = self.nets.classifier(self.nets.encoder(x)[:, :LATENT].detach())
        with pyro.plate("labels", len(x)), poutine.mask(mask=y >= 0):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y.clamp(min=0))

    def guide(self, batch: tuple[Tensor, Tensor]) -> None:
        super().guide(batch[0])


def test_m1_bound(compare):
    model, x, y = spread(create("semi_supervised_m1", num_classes=3)), binary(), torch.tensor([0, 2, -1, 1, -1])
    theirs, eps = M1(model), torch.randn(BATCH, LATENT)
    with noise([eps]):
        found = model.loss(x, y)
    with draws(eps):
        expected = theirs.elbo.differentiable_loss(theirs.model, theirs.guide, (x, y)) / BATCH
    row = compare("semi_supervised_m1", "pyro-ppl", "TraceMeanField_ELBO")
    row.equal("loss", found["loss"], expected)
    row.equal_gradients(found["loss"], expected, theirs.pairs)


# ---- classes ---------------------------------------------------------------------------------------------------------


@contextmanager
def uniforms(u: Tensor) -> Iterator[None]:
    """Gumbel noise -log(-log u); ours computes it from an exponential variable."""
    exponential = lambda self: self.copy_(-u.log())  # noqa: E731
    with mock.patch("torch.rand", return_value=u), mock.patch("torch.Tensor.exponential_", exponential):
        yield


@pytest.mark.parametrize("straight_through", [False, True])
def test_relaxed_categorical_bound(compare, straight_through):
    n, k = 2, 3
    settings = {"n_variables": n, "n_classes": k, "temperature": 0.6, "straight_through": straight_through}
    model, x, u = spread(create("categorical_vae", beta=1.3, **settings)), binary(), torch.rand(BATCH, n, k)
    theirs, kind = Program(model), "RelaxedOneHotCategorical" + "StraightThrough" * straight_through
    with uniforms(u):
        found = model.loss(x)
    logits = theirs.nets.encoder(x).unflatten(1, (n, k))
    with uniforms(u):
        z = getattr(dist, kind)(torch.tensor(0.6), logits=logits).rsample()
    nll = -theirs.observed(z.flatten(1)).log_prob(x).mean()
    q, p = dist.OneHotCategorical(logits=logits), dist.OneHotCategorical(torch.ones(BATCH, n, k))
    kl = torch.distributions.kl_divergence(q, p).sum(1).mean()
    row = compare("categorical_vae", "pyro-ppl", kind)
    row.equal("loss", found["loss"], nll + 1.3 * kl)
    row.equal("nll", found["nll"], nll)
    row.equal("kl", found["kl"], kl)
    row.equal_gradients(found["loss"], nll + 1.3 * kl, theirs.pairs)


def test_likelihood_of_classes_by_enumeration(compare):
    n, k = 2, 3
    model, x = spread(create("categorical_vae", n_variables=n, n_classes=k)), binary()
    theirs = Program(model)

    def program(x: Tensor) -> None:
        uniform = dist.OneHotCategorical(torch.ones(len(x), k))
        with pyro.plate("data", len(x)):
            code = [pyro.sample(f"c{i}", uniform, infer={"enumerate": "parallel"}) for i in range(n)]
            pyro.sample("x", theirs.observed(beside(*code)), obs=x)

    exact = TraceEnum_ELBO(max_plate_nesting=1)
    expected = [-exact.loss(program, lambda x: None, sample) for sample in x.split(1)]
    row = compare("categorical_vae", "pyro-ppl", "TraceEnum_ELBO")
    row.equal("log_likelihood", model.log_likelihood(x, k**n), torch.tensor(expected))


def test_joint_bound(compare):
    n, k = 2, 3
    settings = {"n_variables": n, "n_classes": k, "gamma": 3.0, "max_capacity": 2.0, "max_discrete_capacity": 9.0}
    model, x = spread(create("joint_vae", temperature=0.6, capacity_steps=100, **settings)), binary()
    model.steps.fill_(30)
    theirs, u, eps = Program(model), torch.rand(BATCH, n, k), torch.randn(BATCH, LATENT)
    with uniforms(u), noise([eps]):
        found = model.loss(x)
    mean, log_var, logits = theirs.nets.encoder(x).split([LATENT, LATENT, n * k], 1)
    logits = logits.unflatten(1, (n, k))
    with uniforms(u), draws(eps):
        z = gaussian(mean, log_var).rsample()
        c = dist.RelaxedOneHotCategorical(torch.tensor(0.6), logits=logits).rsample()
    nll = -theirs.observed(torch.cat([z, c.flatten(1)], 1)).log_prob(x).mean()
    kl_z = torch.distributions.kl_divergence(gaussian(mean, log_var), standard_normal(BATCH)).mean()
    q, p = dist.OneHotCategorical(logits=logits), dist.OneHotCategorical(torch.ones(BATCH, n, k))
    kl_c = torch.distributions.kl_divergence(q, p).sum(1).mean()
    row = compare("joint_vae", "pyro-ppl", "RelaxedOneHotCategorical")
    row.equal("nll", found["nll"], nll)
    row.equal("kl_continuous", found["kl_continuous"], kl_z)
    row.equal("kl_discrete", found["kl_discrete"], kl_c)
    # equation 7 at step 30 of 100; the discrete capacity is at most log K per variable
    capacity = 0.3 * n * torch.log(torch.tensor(float(k)))
    loss = nll + 3 * (kl_z - 0.3 * 2).abs() + 3 * (kl_c - capacity).abs()
    row.equal("loss", found["loss"], loss)
    row.equal_gradients(found["loss"], loss, theirs.pairs)


# ---- flows -----------------------------------------------------------------------------------------------------------


def softplus_inverse(value: Tensor) -> Tensor:
    return torch.log(torch.expm1(value))


def m(t: Tensor) -> Tensor:
    """The function that makes a planar or radial step of ours invertible, 0 at 0; the papers have softplus(t) - 1."""
    shift = torch.log(torch.expm1(torch.tensor(0.999)))
    return F.softplus(t + shift) - 0.999


class Flow(Program):
    """A guide with a transformed Gaussian, with Pyro's densities at its draws."""

    elbo = Trace_ELBO()
    paper = False

    def transforms(self, steps: Tensor) -> list[Any]:
        made = []
        for parameters in steps.chunk(2, 1):
            if self.nets.hparams["flow"] == "planar":
                u, w, bias = parameters.split([LATENT, LATENT, 1], 1)
                if self.paper:
                    made.append(ConditionedPlanar((bias, u, w)))
                    continue
                dot = (w * u).sum(1, keepdim=True)
                # Pyro's u for which w u' = m(w u)
                other = u + (softplus_inverse(1 + m(dot)) - dot) * w / (w**2).sum(1, keepdim=True)
                made.append(ConditionedPlanar((bias, other, w)))
            else:
                centre, a, b = parameters.split([LATENT, 1, 1], 1)
                if self.paper:
                    made.append(ConditionedRadial((centre, a, b)))
                    continue
                a = F.softplus(a) + 1e-3
                made.append(ConditionedRadial((centre, softplus_inverse(a), softplus_inverse(a + a * m(b)))))
        return made

    def posterior(self, x: Tensor) -> Any:
        mean, log_var, steps = self.nets.encoder(x).tensor_split((LATENT, 2 * LATENT), 1)
        return dist.TransformedDistribution(gaussian(mean, log_var), self.transforms(steps))


class IAF(Flow):
    def transforms(self, steps: Tensor) -> list[Any]:
        made: list[Any] = []
        for net in self.nets.steps:
            made += [Permute(torch.arange(LATENT).flip(0))] if made else []
            made.append(AffineAutoregressive(lambda z, net=net: net(z, steps), sigmoid_bias=1.5, stable=True))
        return made


class FlowPrior(Program):
    elbo = Trace_ELBO()

    def prior(self, n: int) -> Any:
        layers = []
        for layer in reversed(self.nets.flow):
            net = lambda z, layer=layer: layer.shift_and_log_scale(z)  # noqa: E731
            layers.append(AffineAutoregressive(net).inv)
        return dist.TransformedDistribution(standard_normal(n), layers)


FLOWS = [
    ("vae_flow", "planar", Flow, {"flow": "planar", "n_flows": 2}),
    ("vae_flow", "radial", Flow, {"flow": "radial", "n_flows": 2}),
    ("vae_iaf", "AffineAutoregressive", IAF, {"n_flows": 2, "flow_width": 7}),
    ("flow_prior_vae", "AffineAutoregressive", FlowPrior, {"prior": "maf", "n_flows": 2, "flow_width": 7}),
    ("flow_prior_vae", "AffineAutoregressive", FlowPrior, {"prior": "realnvp", "n_flows": 3, "flow_width": 7}),
]


@pytest.mark.parametrize(("name", "part", "program", "settings"), FLOWS)
def test_bounds_with_flows(compare, name, part, program, settings):
    model, x, signs = spread(create(name, beta=0.8, **settings)), binary(), both_signs(BATCH, LATENT)
    theirs = program(model)

    def terms(eps: Tensor) -> dict[str, Tensor]:
        with noise([eps]):
            return model.loss(x)

    def bound(eps: Tensor) -> Tensor:
        with draws(eps):
            return theirs.loss(x)

    def nll(eps: Tensor) -> Tensor:
        with draws(eps):
            return theirs.nll(x)

    found = sum(terms(e)["loss"] for e in signs) / 2
    expected = sum(bound(e) for e in signs) / 2
    row = compare(name, "pyro-ppl", f"Trace_ELBO, {part}")
    row.equal("loss", found, expected)
    row.equal("nll", terms(signs[0])["nll"], nll(signs[0]))
    row.equal_gradients(found, expected, theirs.pairs)
    if name == "vae_flow":
        theirs.paper = True
        reason = {
            "planar": "m(t) is softplus(t + c) - 0.999, 0 at 0, where theirs is softplus(t) - 1",
            "radial": "b' = a m(b) and a is at least 0.001, where theirs are softplus(b) - a and softplus(a)",
        }[part]
        with_same = sum(bound(e) for e in signs) / 2
        row.deviates("loss at equal outputs of the encoder", found, with_same, reason, follows="theirs")
        theirs.paper = False
    theirs.beta, k = 1.0, 3
    eps = torch.randn(k, BATCH, LATENT)
    with noise([eps]):
        likelihood = model.log_likelihood(x, k)
    expected = []
    for i, sample in enumerate(x.split(1)):
        of_sample = []
        for e in eps[:, i : i + 1]:
            with draws(e):
                of_sample.append(-theirs.elbo.loss(theirs.model, theirs.guide, sample))
        expected.append(torch.logsumexp(torch.tensor(of_sample), 0) - torch.log(torch.tensor(float(k))))
    row.equal("log_likelihood", likelihood, torch.stack(expected))


# ---- levels ----------------------------------------------------------------------------------------------------------


class Hierarchy(Program):
    """z_L to z_1, each from a distribution given the one above; the decoder reads the lowest `read` levels."""

    def sample_levels(self, of_level: Callable[[int, list[Tensor]], Any]) -> list[Tensor]:
        above: list[Tensor] = []
        for level in reversed(range(len(self.nets.latent_dims))):
            with poutine.scale(scale=self.beta):
                above.append(pyro.sample(f"z{level}", of_level(level, above)))
        return above

    def model(self, x: Tensor) -> None:
        pyro.module("nets", self.nets)

        def prior(level: int, above: list[Tensor]) -> Any:
            if above:
                return gaussian(*self.nets.priors[level](above[-1]))
            return standard_normal(len(x), self.nets.latent_dims[-1])

        with pyro.plate("data", len(x)):
            z = self.sample_levels(prior)
            pyro.sample("x", self.observed(torch.cat(z[::-1], -1)), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("nets", self.nets)
        seen = self.nets.bottom_up(x)
        with pyro.plate("data", len(x)):
            self.sample_levels(lambda level, above: self.given_above(seen[level], level, above))

    def given_above(self, seen: Tensor, level: int, above: list[Tensor]) -> Any:
        if above:
            return gaussian(*self.nets.posteriors[level](seen.expand(*above[-1].shape[:-1], -1), above[-1]))
        return gaussian(*seen.chunk(2, -1))

    def kls(self, x: Tensor) -> list[Tensor]:
        drawn = poutine.trace(self.guide).get_trace(x)
        trace = poutine.trace(poutine.replay(self.model, drawn)).get_trace(x)
        levels = [name for name in trace.nodes if name.startswith("z")]
        kl = torch.distributions.kl_divergence
        return [kl(drawn.nodes[z]["fn"], trace.nodes[z]["fn"]).reshape(len(x), -1).sum(1).mean() for z in levels][::-1]


def as_gaussian(mean: Tensor, log_var: Tensor) -> Gaussian:
    precision = torch.diag_embed(torch.exp(-log_var))
    return Gaussian(torch.zeros(mean.shape[:-1]), precision.diagonal(dim1=-2, dim2=-1) * mean, precision)


def moments(product: Gaussian) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of a product of Gaussians with diagonal covariances."""
    covariance = torch.linalg.inv(product.precision)
    mean = (covariance @ product.info_vec[..., None])[..., 0]
    return mean, covariance.diagonal(dim1=-2, dim2=-1).log()


class Ladder(Hierarchy):
    def given_above(self, seen: Tensor, level: int, above: list[Tensor]) -> Any:
        estimate = seen.chunk(2, -1)
        if not above:
            return gaussian(*estimate)
        return gaussian(*moments(as_gaussian(*estimate) + as_gaussian(*self.nets.priors[level](above[-1]))))


class VeryDeep(Hierarchy):
    """Child 2021, figure 3: blocks of a stream from 1x1 up to the image."""

    def walk(self, n: int, of_block: Callable[[Any, Tensor, int], tuple[Any, Tensor, Tensor]]) -> Tensor:
        net, y, groups = self.nets.decoder, torch.zeros(()), 0
        for i in reversed(range(len(net.grids))):
            rows, columns = net.grids[i]
            start = net.starts[i].expand(n, -1, rows, columns)
            y = start + (F.interpolate(y, scale_factor=2)[..., :rows, :columns] if groups else 0)
            for block in net.stages[i]:
                p = block.p(y)
                z = pyro.sample(f"z{groups}", of_block(block, y, i))
                y = y + p[:, 2 * z.shape[1] :] + block.of_z(z)
                y, groups = y + block.net(y), groups + 1
        return net.last(y * net.gain + net.bias)

    @staticmethod
    def diagonal(values: Tensor, channels: int) -> Any:
        mean, log_std = values[:, : 2 * channels].chunk(2, 1)
        return dist.Normal(mean, log_std.exp()).to_event(3)

    def model(self, x: Tensor) -> None:
        pyro.module("nets", self.nets)
        with pyro.plate("data", len(x)):
            logits = self.walk(len(x), lambda block, y, _: self.diagonal(block.p(y), block.of_z.in_channels))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("nets", self.nets)
        seen = self.nets.encoder(x)

        def posterior(block: Any, y: Tensor, i: int) -> Any:
            return self.diagonal(block.q(torch.cat([y, seen[i]], 1)), block.of_z.in_channels)

        with pyro.plate("data", len(x)):
            self.walk(len(x), posterior)


@pytest.mark.parametrize(("name", "program"), [("hierarchical_vae", Hierarchy), ("ladder_vae", Ladder)])
def test_bounds_of_levels(compare, name, program):
    dims = (3, 2, 2)
    model, x = spread(create(name, latent_dims=dims, level_dim=5, beta=0.7)), binary()
    theirs, eps = program(model), [torch.randn(BATCH, d) for d in dims[::-1]]
    with noise(eps):
        found = model.loss(x)
    with draws(*eps):
        expected = theirs.loss(x)
    with draws(*eps):
        nll = theirs.nll(x)
    with draws(*eps):
        kls = theirs.kls(x)
    row = compare(name, "pyro-ppl", "TraceMeanField_ELBO")
    row.equal("loss", found["loss"], expected)
    row.equal("nll", found["nll"], nll)
    for i, kl in enumerate(kls, 1):
        row.equal(f"kl_{i}", found[f"kl_{i}"], kl)
    row.equal_gradients(found["loss"], expected, theirs.pairs)
    theirs.beta, k = 1.0, 4
    eps = [torch.randn(k, BATCH, d) for d in dims[::-1]]
    with noise(eps):
        likelihood = model.log_likelihood(x, k)
    each = [tuple(e[:, i : i + 1] for e in eps) for i in range(BATCH)]
    bound, _ = importance_bound(theirs, k, x[:, None], each)
    compare(name, "pyro-ppl", "RenyiELBO").equal("log_likelihood", likelihood, bound)


def test_bound_of_the_very_deep_model(compare):
    shape = (1, 6, 6)
    model = aezoo.create_model("vdvae", shape, width=8, latent_channels=2, enc_blocks=(1, 1), dec_blocks=(1, 2))
    model = spread(model.double())
    theirs, x = VeryDeep(model), torch.rand(BATCH, *shape).bernoulli()
    eps = [torch.randn(BATCH, 2, 3, 3), torch.randn(BATCH, 2, 3, 3), torch.randn(BATCH, 2, 6, 6)]
    with noise(eps):
        found = model.loss(x)
    with draws(*eps):
        expected = theirs.loss(x)
    with draws(*eps):
        nll = theirs.nll(x)
    row = compare("vdvae", "pyro-ppl", "TraceMeanField_ELBO")
    row.equal("loss", found["loss"], expected)
    row.equal("nll", found["nll"], nll)
    row.equal("kl", found["kl"], expected - nll)
    row.equal_gradients(found["loss"], expected, theirs.pairs)


# ---- learned and calibrated scales -----------------------------------------------------------------------------------


class Scaled(Program):
    """A Gaussian likelihood with one standard deviation."""

    scale: Tensor | None = None

    def observed(self, z: Tensor) -> Any:
        scale = self.nets.likelihood.log_scale.exp() if self.scale is None else self.scale
        return dist.Normal(self.nets.decoder(z), scale).to_event(1)


def test_bound_with_the_best_scale(compare):
    model, x, eps = spread(create("sigma_vae", beta=0.7)), torch.rand(BATCH, *SHAPE), torch.randn(BATCH, LATENT)
    theirs = Scaled(model)
    with noise([eps]):
        found = model.loss(x)

    def loss(sigma: float) -> Tensor:
        theirs.scale = torch.tensor(sigma)
        with draws(eps):
            return theirs.loss(x)

    best = minimize_scalar(
        lambda sigma: loss(sigma).item(), bounds=(0.01, 9), method="bounded", options={"xatol": 1e-9}
    )
    row = compare("sigma_vae", "pyro-ppl", "TraceMeanField_ELBO, scipy.optimize.minimize_scalar")
    row.equal("sigma", found["sigma"], torch.tensor(best.x))
    row.equal("loss", found["loss"], loss(best.x))
    row.equal_gradients(found["loss"], loss(best.x), theirs.pairs)


def test_bounds_of_two_stages(compare):
    settings = {"second_hidden_dims": (4,), "likelihood": "gaussian:learned"}
    model, x, eps = spread(create("two_stage_vae", **settings)), torch.rand(BATCH, *SHAPE), torch.randn(BATCH, LATENT)
    theirs, other = Scaled(model), torch.randn(BATCH, LATENT)
    second = Scaled(model.second)
    theirs.nets.second = second.nets
    theirs.pairs = [*zip(model.parameters(), theirs.nets.parameters(), strict=True)]
    with noise([eps, other]):
        found = model.loss(x)
    with draws(eps):
        first_loss = theirs.loss(x)
    with draws(eps):
        nll = theirs.nll(x)
    q = theirs.posterior(x)
    with draws(eps):
        z = q.rsample().detach()
    pyro.clear_param_store()
    with draws(other):
        second_loss = second.loss(z)
    row = compare("two_stage_vae", "pyro-ppl", "TraceMeanField_ELBO")
    row.equal("loss", found["loss"], first_loss + second_loss)
    row.equal("nll", found["nll"], nll)
    row.equal("kl", found["kl"], first_loss - nll)
    row.equal("code_nll + code_kl", found["code_nll"] + found["code_kl"], second_loss)
    row.equal("elbo", found["elbo"], -(nll + q.log_prob(z).mean() + second_loss))
    row.equal_gradients(found["loss"], first_loss + second_loss, theirs.pairs)


# ---- groups and pairs of samples -------------------------------------------------------------------------------------


class Groups(Program):
    """Bouchacourt et al. 2018: content from the product of a group's posteriors, whose KL counts once per group."""

    content = 1

    def model(self, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        pyro.module("nets", self.nets)
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=self.share(y)):
                c = pyro.sample("c", standard_normal(len(x), self.content))
            s = pyro.sample("s", standard_normal(len(x), LATENT - self.content))
            pyro.sample("x", self.observed(torch.cat([c, s], 1)), obs=x)

    def share(self, y: Tensor) -> Tensor:
        return 1 / (y[:, None] == y).sum(1)

    def guide(self, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        pyro.module("nets", self.nets)
        mean, log_var = self.nets.encoder(x).chunk(2, 1)
        each, found = as_gaussian(mean[:, : self.content], log_var[:, : self.content]), []
        for label in y:
            members = [each[(i,)] for i in torch.nonzero(y == label)[:, 0].tolist()]
            found.append(moments(sum(members[1:], members[0])))
        content = [torch.stack(parts) for parts in zip(*found, strict=True)]
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=self.share(y)):
                pyro.sample("c", gaussian(*content))
            pyro.sample("s", gaussian(mean[:, self.content :], log_var[:, self.content :]))


def test_bound_of_groups(compare):
    model, x, y = spread(create("mlvae", group_dim=1)), binary(), torch.tensor([0, 1, 0, 0, 1])
    theirs, eps = Groups(model), torch.randn(BATCH, LATENT)
    with noise([eps]):
        found = model.loss(x, y)
    with draws(eps[:, :1], eps[:, 1:]):
        expected = theirs.elbo.differentiable_loss(theirs.model, theirs.guide, (x, y)) / BATCH
    row = compare("mlvae", "pyro-ppl", "TraceMeanField_ELBO, ops.gaussian.Gaussian")
    row.equal("loss", found["loss"], expected)
    row.equal_gradients(found["loss"], expected, theirs.pairs)


class Pairs(Program):
    """Locatello et al. 2020, with the KL of both orders, for pairs of successive samples."""

    average, both_orders = "gvae", True

    def posterior(self, x: Tensor) -> Any:
        mean, log_var = self.nets.encoder(x).chunk(2, 1)
        partner = torch.arange(len(x)) ^ 1
        q, other = (dist.Normal(mean[rows], (0.5 * log_var[rows]).exp()) for rows in (slice(None), partner))
        kl = torch.distributions.kl_divergence
        delta = 0.5 * (kl(q, other) + kl(other, q))
        if not self.both_orders:
            # the first of a pair has an even index
            first = torch.arange(len(x)) // 2 * 2
            delta = kl(q, other)[first]
        shared = delta <= 0.5 * (delta.amin(1, keepdim=True) + delta.amax(1, keepdim=True))
        if self.average == "gvae":
            average = 0.5 * (mean + mean[partner]), torch.log(0.5 * (q.variance + other.variance))
        else:
            both = moments(as_gaussian(mean, log_var) + as_gaussian(mean[partner], log_var[partner]))
            # the square root of the product has half its precision
            average = both[0], both[1] + torch.log(torch.tensor(2.0))
        return gaussian(*(torch.where(shared, a, own) for a, own in zip(average, (mean, log_var), strict=True)))


@pytest.mark.parametrize("average", ["gvae", "mlvae"])
def test_bound_of_pairs(compare, average):
    model, n = spread(create("ada_gvae", average=average)), 40
    x, eps, y = torch.rand(n, *SHAPE).bernoulli(), torch.randn(n, LATENT), torch.arange(n) // 2
    theirs = Pairs(model)
    theirs.average = average
    with noise([eps]):
        found = model.loss(x, y)
    with draws(eps):
        expected = theirs.loss(x)
    with draws(eps):
        nll = theirs.nll(x)
    row = compare("ada_gvae", "pyro-ppl", "TraceMeanField_ELBO")
    row.equal("loss", found["loss"], expected)
    row.equal("kl", found["kl"], expected - nll)
    row.equal_gradients(found["loss"], expected, theirs.pairs)
    theirs.both_orders = False
    with draws(eps):
        expected = theirs.loss(x)
    reason = "delta is the mean of the KLs in both orders, the paper's that from the first of a pair to the second"
    row.deviates("loss of pairs in an order", found["loss"], expected, reason, follows="theirs")


# ---- functions of the KL and of the codes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["annealed_vae", "dip_vae_i", "dip_vae_ii"])
def test_bounds_with_penalties(compare, name):
    settings = {"gamma": 3.0, "max_capacity": 5.0} if name == "annealed_vae" else {"off_diagonal": 2.0, "diagonal": 3.0}
    model, x, eps = spread(create(name, **settings)), binary(), torch.randn(BATCH, LATENT)
    theirs = Program(model)
    theirs.beta = 1.0
    with draws(eps):
        bound = theirs.loss(x)
    with draws(eps):
        nll = theirs.nll(x)
    if name == "annealed_vae":
        model.steps.fill_(300)
        # equation 8 at step 300 of 1000
        row, expected = compare(name, "pyro-ppl", "TraceMeanField_ELBO"), nll + 3 * (bound - nll - 0.3 * 5).abs()
    else:
        row = compare(name, "torch", "cov, with pyro's TraceMeanField_ELBO")
        q = theirs.posterior(x)
        covariance = torch.cov(q.mean.T, correction=0)
        if name == "dip_vae_ii":
            covariance = covariance + q.variance.mean(0).diag()
        off, diagonal = covariance - covariance.diag().diag(), covariance.diag() - 1
        expected = bound + 2 * (off**2).sum() + 3 * (diagonal**2).sum()
    with noise([eps]):
        found = model.loss(x)
    row.equal("loss", found["loss"], expected)
    row.equal("nll", found["nll"], nll)
    row.equal("kl", found["kl"], bound - nll)
    if name != "annealed_vae":
        row.equal("off_diagonal", found["off_diagonal"], (off**2).sum())
        row.equal("diagonal", found["diagonal"], (diagonal**2).sum())
    row.equal_gradients(found["loss"], expected, theirs.pairs)
