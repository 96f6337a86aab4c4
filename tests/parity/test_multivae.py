"""Losses of MultiVae around copies of our networks (Senellart et al. 2025).

Source: https://github.com/AgatheSenellart/MultiVae. Samples lack a part where its values are NaN; there, MultiVae gets
zeros and a mask. Where the weight of the likelihoods in its loss is set to 0, its KL terms are left.

MMVAE, MMVAE+ and CMVAE of MultiVae estimate all of a KL from draws, ours the KL of each expert in closed form. Their
losses are compared on copies of each sample, whose noise has mean 0 and covariance I over the copies: then the mean of
log q_i(z) - log p(z), a quadratic form of the noise, is the KL.
"""

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from comparison import Comparison, noise
from multivae import models as multivae
from multivae.data.datasets.base import IncompleteDataset, MultimodalBaseDataset
from multivae.models.base.base_utils import poe
from multivae.models.nn.base_architectures import (
    BaseConditionalDecoder,
    BaseJointEncoder,
    BaseMultilatentEncoder,
)
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.models.normalizing_flows.base import BaseNF, BaseNFConfig
from torch import Tensor, nn

import aezoo
from aezoo.models.variational.mvae import MVAE

SHAPE, PARTS, LATENT, PRIVATE, BATCH = (6, 2, 2), (1, 2, 3), 4, 2, 5
NAMES = ("a", "b", "c")
M = len(PARTS)
COMPLETE_OR_NOT = [("gaussian:0.6", False), ("bernoulli", True)]
SUBSETS = [chosen for n in (1, 2, 3) for chosen in itertools.combinations(range(M), n)]
# the parts present in the samples of an incomplete batch
PRESENT = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0], [0, 0, 1]]).bool()
TWO_OF_THREE = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0], [1, 1, 0], [0, 1, 1]]).bool()
MEAN = "a mean over the batch, theirs is a sum"


# ---- our networks in their classes -----------------------------------------------------------------------------------


class Encoder(BaseMultilatentEncoder):
    """A copy of our encoder of a part, with mean and log-variance of the shared and then of the private code."""

    def __init__(self, net: nn.Module, private: int) -> None:
        super().__init__()
        self.net, self.style_dim = copy.deepcopy(net), private

    def forward(self, x: Tensor) -> ModelOutput:
        mean, log_var = self.net(x).chunk(2, 1)
        shared = mean.shape[1] - self.style_dim
        # cloned, since theirs writes to it in place
        return ModelOutput(
            embedding=mean[:, :shared],
            log_covariance=log_var[:, :shared].clone(),
            style_embedding=mean[:, shared:],
            style_log_covariance=log_var[:, shared:],
        )


class ExpertAndPrior(Encoder):
    """The same, multiplied by the prior N(0, I)."""

    def forward(self, x: Tensor) -> ModelOutput:
        mean, log_var = MVAE.product(*(values[:, None] for values in self.net(x).chunk(2, 1)))
        return ModelOutput(embedding=mean, log_covariance=log_var)


class JointEncoder(BaseJointEncoder):
    """A copy of our encoder of whole samples."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.latent_dim = copy.deepcopy(net), LATENT

    def forward(self, x: dict[str, Tensor]) -> ModelOutput:
        mean, log_var = self.net(torch.cat([*x.values()], 1)).chunk(2, 1)
        return ModelOutput(embedding=mean, log_covariance=log_var)


class Decoder(BaseDecoder):
    """A copy of one of our decoder networks."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.net(z))


class Block(BaseEncoder):
    """A copy of one of our networks that returns mean and log-variance, or one value for both."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)

    def inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,)

    def forward(self, x: Tensor) -> ModelOutput:
        found = self.net(*self.inputs(x))
        mean, log_var = found if isinstance(found, tuple) else (found, found)
        return ModelOutput(embedding=mean, log_covariance=log_var.clone())


class Flow(BaseNF):
    """A copy of our flow."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(BaseNFConfig(input_dim=(LATENT,)))
        self.net: Any = copy.deepcopy(net)

    def forward(self, x: Tensor, **_: Any) -> ModelOutput:
        out, log_det = self.net(x)
        return ModelOutput(out=out, log_abs_det_jac=log_det)

    def inverse(self, y: Tensor, **_: Any) -> ModelOutput:
        return ModelOutput(out=self.net.inverse(y), log_abs_det_jac=None)


def ours(name: str, likelihood: str = "bernoulli", **settings: Any) -> Any:
    given = {"parts": PARTS, "latent_dim": LATENT, "hidden_dims": (8,), "likelihood": likelihood, **settings}
    model = aezoo.create_model(
        name, SHAPE, **{key: value for key, value in given.items() if value is not None}
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def decoder_settings(likelihood: str) -> tuple[str, dict[str, float]]:
    kind, _, scale = likelihood.partition(":")
    return {"gaussian": "normal"}.get(kind, kind), {"scale": float(scale)} if scale else {}


def config(kind: str, likelihood: str, **settings: Any) -> Any:
    name, scale = decoder_settings(likelihood)
    plain = {"n_modalities": M, "latent_dim": LATENT, "decoders_dist": dict.fromkeys(NAMES, name)}
    return getattr(multivae, f"{kind}Config")(**plain, decoder_dist_params={m: {**scale} for m in NAMES}, **settings)


def theirs(kind: str, model: Any, settings: dict[str, Any], encoder: Any = Encoder, **nets: Any) -> Any:
    private = getattr(model, "private_dim", PRIVATE) if "modalities_specific_dim" in settings else 0
    encoders = {m: encoder(net, private) for m, net in zip(NAMES, model.encoder, strict=True)}
    decoders = {m: Decoder(net) for m, net in zip(NAMES, model.decoder, strict=True)}
    given = config(kind, model.hparams["likelihood"], **settings)
    return getattr(multivae, kind)(given, encoders, decoders, **nets).double()


def matched(model: Any, modules: list[tuple[nn.Module, nn.Module]], but: tuple[str, ...] = ()) -> Any:
    """Pairs of parameters of modules and their copies; asserts that they are all parameters but those named."""
    found = [pair for a, b in modules for pair in zip(a.parameters(), b.parameters(), strict=True)]
    expected = {id(p) for name, p in model.named_parameters() if p.requires_grad and name not in but}
    assert {id(p) for p, _ in found} == expected, "not all parameters are compared"
    return found


def pairs(model: Any, other: Any, *more: tuple[nn.Module, nn.Module], but: tuple[str, ...] = ()) -> Any:
    """Pairs of the parameters of the parts' encoders and decoders, and of more modules."""
    modules = [*more]
    for net, copies in ((model.encoder, other.encoders), (model.decoder, other.decoders)):
        modules += [(part, copies[m].net) for m, part in zip(NAMES, net, strict=True)]
    return matched(model, modules, but)


# ---- batches and noise -----------------------------------------------------------------------------------------------


def batch(model: Any, present: Tensor | None = None, n: int = BATCH) -> Tensor:
    """Samples, binary for Bernoulli decoders, with missing parts if `present` is given."""
    x = torch.rand(n, *SHAPE)
    x = x.round() if model.hparams["likelihood"] == "bernoulli" else x
    if present is not None:
        for i, part in enumerate(model.split(x)):
            part[~present[:, i]] = torch.nan
    return x


def inputs(model: Any, x: Tensor) -> MultimodalBaseDataset:
    data = {m: part.nan_to_num() for m, part in zip(NAMES, model.split(x), strict=True)}
    if not x.isnan().any():
        return MultimodalBaseDataset(data)
    return IncompleteDataset(data, dict(zip(NAMES, model.present_mask(x).T, strict=True)))


@contextmanager
def draws(*values: Tensor) -> Iterator[None]:
    """`noise`, for `torch.distributions.Normal` as well."""
    with (
        noise(values),
        mock.patch("torch.distributions.normal._standard_normal", lambda shape, **_: torch.randn(shape)),
    ):
        yield


def moment_noise(n: int, s: int, d: int) -> Tensor:
    """Noise of mean 0 and covariance I over 2 d copies of n samples, with s draws each: (2 d n, s, d)."""
    axes = d**0.5 * torch.linalg.qr(torch.randn(n, s, d, d))[0]
    return torch.stack([axes, -axes]).permute(0, 3, 1, 2, 4).reshape(2 * d * n, s, d)


@contextmanager
def no_likelihood(other: Any) -> Iterator[None]:
    with mock.patch.object(other, "rescale_factors", dict.fromkeys(NAMES, 0)):
        yield


def names(chosen: tuple[int, ...]) -> list[str]:
    return [NAMES[i] for i in chosen]


@torch.no_grad()
def compare_codes(report: Comparison, model: Any, other: Any, x: Tensor, subsets: Any = SUBSETS) -> None:
    """Compare the mean code of subsets of the parts, and reconstructions from it."""
    found: list[list[Tensor]] = [[], [], [], []]
    mean = torch.sigmoid if model.hparams["likelihood"] == "bernoulli" else lambda params: params
    for chosen in subsets:
        given = {"inputs": inputs(model, x), "cond_mod": names(chosen), "return_mean": True}
        found[0].append(model.eval().infer(x, chosen)[0][:, : getattr(model, "latent_dims", [LATENT])[0]])
        found[1].append(other.eval().encode(**given).z)
        found[2].append(model.reconstruct_from(x, chosen))
        found[3].append(torch.cat([mean(other.predict(**given)[m]) for m in NAMES], 1))
    codes, their_codes, samples, their_samples = (torch.stack(values) for values in found)
    which = "all subsets" if subsets == SUBSETS else ", ".join("+".join(names(chosen)) for chosen in subsets)
    report.equal(f"codes of {which}", codes, their_codes)
    report.equal(f"samples from {which}", samples, their_samples)


@torch.no_grad()
def compare_likelihood(report: Comparison, model: Any, other: Any, x: Tensor, k: int = 7) -> None:
    eps = torch.randn(k, len(x), LATENT)
    with draws(eps):
        found = model.log_likelihood(x, k)
    with draws(eps):
        expected = other.compute_joint_nll(inputs(model, x), k, 3)
    report.equal("log-likelihood", -found.sum(), expected)


# ---- joint encoders --------------------------------------------------------------------------------------------------


def test_jmvae_losses(compare):
    model = ours("jmvae", "bernoulli", alpha=0.3, beta=2.0)
    nets = {"joint_encoder": JointEncoder(model.joint_encoder)}
    other = theirs("JMVAE", model, {"alpha": 0.3, "beta": 2.0}, **nets)
    x, eps = batch(model), torch.randn(BATCH, LATENT)
    with draws(eps):
        found = model.loss(x)
    with draws(eps):
        expected = other(inputs(model, x), epoch=10)
    with no_likelihood(other), draws(eps):
        kls = other(inputs(model, x), epoch=10)
    report = compare("jmvae", "multivae", "JMVAE")
    report.equal("loss", found["loss"], expected.loss)
    report.equal("nll", found["nll"], expected.metrics["elbo"] - kls.metrics["elbo"])
    report.equal("kl", 2.0 * found["kl"], kls.metrics["elbo"])
    report.equal("parts_kl", 0.3 * found["parts_kl"], kls.loss - kls.metrics["elbo"])
    both = pairs(model, other, (model.joint_encoder, other.joint_encoder.net))
    report.equal_gradients(found["loss"], expected.loss, both)
    compare_codes(report, model, other, x, [(0,), (1,), (2,), (0, 1, 2)])
    compare_likelihood(report, model, other, x)
    report.deviates(
        "codes of several parts",
        model.infer(x, (0, 2))[0],
        other.encode(inputs(model, x), ["a", "c"], return_mean=True).z,
        "the prior counts once in the product of several encoders, in theirs as often as there are encoders; the paper "
        "does not define this code",
        follows="both",
    )


def test_jnf_losses(compare):
    """Both of their stages, which ours trains together."""
    model = ours("jnf", "gaussian:0.6", beta=2.0, flow_width=8)
    flows = {m: Flow(flow) for m, flow in zip(NAMES, model.flows, strict=True)}
    other = theirs("JNF", model, {"beta": 2.0}, joint_encoder=JointEncoder(model.joint_encoder), flows=flows)
    x, eps = batch(model), torch.randn(BATCH, LATENT)
    with draws(eps):
        found = model.loss(x)
    with draws(eps):
        first = other(inputs(model, x), epoch=1)
    other._set_torch_no_grad_on_joint_vae()
    with draws(eps):
        second = other(inputs(model, x), epoch=11)
    other.requires_grad_()
    report = compare("jnf", "multivae", "JNF")
    report.equal("loss of the first stage", found["nll"] + 2.0 * found["kl"], first.loss)
    report.equal("nll", found["nll"], first.metrics["recon_loss"])
    report.scaled("kl", 2.0 * found["kl"], first.metrics["kld_prior"], 1 / BATCH, MEAN)
    mu, log_var = model.infer(x)
    z = mu + torch.exp(0.5 * log_var) * eps
    entropy = -torch.distributions.Normal(mu, torch.exp(0.5 * log_var)).log_prob(z).sum(1).mean()
    report.equal("parts_kl without the entropy of q", found["parts_kl"] + M * entropy, second.loss)
    more = [(model.joint_encoder, other.joint_encoder.net)]
    more += [(flow, other.flows[m].net) for m, flow in zip(NAMES, model.flows, strict=True)]
    both = pairs(model, other, *more)
    report.equal_gradients(found["loss"], first.loss + second.loss, both, "gradient of both stages")
    report.equal_gradients(found["nll"] + 2.0 * found["kl"], first.loss, both, "gradient of the first stage")
    report.equal_gradients(found["parts_kl"], second.loss, both, "gradient of the second stage")
    log_q, data = model.log_experts(z, x), inputs(model, x)
    densities = [other._compute_poe_posterior([m], z, data.data, False, False) for m in NAMES]
    report.equal("log q_i", log_q, torch.stack(densities, 1))
    codes = [model.infer(x, (i,))[0] for i in range(M)]
    report.equal(
        "codes of one part", torch.stack(codes), torch.stack([other.encode(data, [m], 1, True).z for m in NAMES])
    )
    report.equal("code of all parts", model.infer(x)[0], other.encode(data, "all", 1, True).z)
    compare_likelihood(report, model, other, x)


def test_telbo_losses(compare):
    """Both of their stages, which ours trains together; their encoder of a part is ours times the prior."""
    model = ours("telbo", "laplace:0.7", gamma=0.7)
    factors = {"lambda_factors": dict.fromkeys(NAMES, 1.0), "gamma_factors": dict.fromkeys(NAMES, 0.7)}
    settings = {**factors, "uses_likelihood_rescaling": False}
    other = theirs("TELBO", model, settings, ExpertAndPrior, joint_encoder=JointEncoder(model.joint_encoder))
    x, eps = batch(model), torch.randn(BATCH, 1 + M, LATENT)
    with draws(eps):
        found = model.loss(x)
    with draws(eps[:, 0]):
        first = other(inputs(model, x), epoch=1)
    other._set_torch_no_grad_on_joint_vae()
    with draws(*eps.unbind(1)):
        second = other(inputs(model, x), epoch=11).loss
    data = inputs(model, x).data
    log_var = other.joint_encoder(data).log_covariance.detach()
    wrong = 0.5 * sum((net(data[m]).log_covariance - log_var).sum() for m, net in other.encoders.items()) / BATCH
    other.requires_grad_()
    report = compare("telbo", "multivae", "TELBO")
    report.equal("loss of the first stage", found["nll"] + found["kl"], first.loss)
    report.equal("nll", found["nll"], first.recon_loss)
    report.equal("kl", found["kl"], first.KLD)
    reason = "the log-variance in the KL of a part is that of all parts in theirs, which pulls the part's own down"
    report.deviates("parts_nelbo", found["parts_nelbo"], second, reason, follows="ours")
    report.equal("parts_nelbo with its own log-variance in theirs", found["parts_nelbo"], second - wrong)
    both = pairs(model, other, (model.joint_encoder, other.joint_encoder.net))
    report.equal_gradients(found["nll"] + found["kl"], first.loss, both, "gradient of the first stage")
    quantity = "gradient of both stages, with its own log-variance in theirs"
    report.equal_gradients(found["loss"], first.loss + second - wrong, both, quantity)
    compare_codes(report, model, other, x, [(0,), (1,), (2,), (0, 1, 2)])
    compare_likelihood(report, model, other, x)


# ---- products of experts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("likelihood", "k"), [("bernoulli", 0), ("gaussian:0.6", 1)])
def test_mvae_losses(compare, likelihood, k):
    model = ours("mvae", likelihood, beta=2.0, n_subsets=k).train()
    other = theirs("MVAE", model, {"beta": 2.0, "k": k}).train()
    x, eps = batch(model), torch.randn(BATCH, 1 + M + k, LATENT)
    # both draw the first and the last part
    ranks = {
        (BATCH, 1, 1): torch.full((BATCH, 1, 1), 0.5),
        (BATCH, 1, M): torch.tensor([0.1, 0.9, 0.2]).expand(BATCH, 1, M),
    }
    with draws(eps), mock.patch("torch.rand", side_effect=lambda *shape, **_: ranks[shape]):
        found = model.loss(x)
    with draws(*eps.unbind(1)), mock.patch("multivae.models.mvae.mvae_model.choice", return_value=[1]):
        expected = other(inputs(model, x), epoch=10)
    report, which = compare("mvae", "multivae", "MVAE"), "with random subsets: " if k else ""
    report.equal(f"{which}loss", found["loss"], expected.loss)
    report.equal(f"{which}subset_nelbo", found["subset_nelbo"], expected.loss - expected.metrics["a_b_c"])
    report.equal_gradients(found["loss"], expected.loss, pairs(model, other), f"{which}gradient")
    if k:
        return
    report.equal("nll", found["nll"], expected.metrics["recona_b_c"] - expected.metrics["klda_b_c"] * 2.0)
    report.equal("kl", found["kl"], expected.metrics["klda_b_c"])
    compare_codes(report, model, other, x)
    compare_likelihood(report, model, other, x)


def test_mvae_losses_of_incomplete_samples(compare):
    model = ours("mvae", "laplace:0.7", n_subsets=0, beta=2.0)
    other = theirs("MVAE", model, {"beta": 2.0, "use_subsampling": False})
    x, eps = batch(model, PRESENT), torch.randn(BATCH, 1 + M, LATENT)
    with draws(eps):
        found = model.loss(x)
    with draws(eps[:, 0]):
        expected = other(inputs(model, x), epoch=10)
    report = compare("mvae", "multivae", "MVAE")
    report.equal("incomplete samples: nll + beta kl", found["nll"] + 2.0 * found["kl"], expected.loss)
    report.equal("incomplete samples: kl", found["kl"], expected.metrics["klda_b_c"])
    quantity = "incomplete samples: gradient of nll + beta kl"
    report.equal_gradients(found["nll"] + 2.0 * found["kl"], expected.loss, pairs(model, other), quantity)
    # at least two parts, since theirs counts the ELBO of an only part twice
    other.subsampling, x = True, batch(model, TWO_OF_THREE)
    with draws(eps):
        found = model.loss(x)
    present = model.present_mask(x)
    with draws(eps[:, 0], *(eps[present[:, i], 1 + i] for i in range(M))):
        expected = other(inputs(model, x), epoch=10)
    reason = "theirs divides the ELBO of each part by the number of samples that have it, not by that of all samples"
    report.deviates("incomplete samples: loss", found["loss"], expected.loss, reason, follows="ours")
    shares = present.double().mean(0)
    weighted = sum(share * expected.metrics[m] for m, share in zip(NAMES, shares, strict=True))
    which = "subset_nelbo, theirs weighted by shares of samples"
    report.equal(f"incomplete samples: {which}", found["subset_nelbo"], weighted)
    quantity = f"incomplete samples: gradient of {which}"
    report.equal_gradients(found["subset_nelbo"], weighted, pairs(model, other), quantity)


@pytest.mark.parametrize(("likelihood", "missing"), COMPLETE_OR_NOT)
def test_mvtcae_losses(compare, likelihood, missing):
    model = ours("mvtcae", likelihood, beta=2.0, alpha=0.6)
    other = theirs("MVTCAE", model, {"beta": 2.0, "alpha": 0.6})
    x, eps = batch(model, PRESENT if missing else None), torch.randn(BATCH, LATENT)
    with draws(eps):
        found = model.loss(x)
    with draws(eps):
        expected = other(inputs(model, x))
    report, which = compare("mvtcae", "multivae", "MVTCAE"), "incomplete samples: " if missing else ""
    terms = {
        "nll": sum(expected.metrics[m] for m in NAMES),
        "kl": expected.metrics["joint_divergence"],
        "parts_kl": sum(expected.metrics[f"kld_{m}"] for m in NAMES),
    }
    both = pairs(model, other)
    for term, value in terms.items():
        report.scaled(which + term, found[term], value, 1 / BATCH, MEAN)
        report.equal_gradients(found[term], value, both, f"{which}gradient of {term}", 1 / BATCH, MEAN)
    if missing:
        reason = "M is the number of parts that a sample has, in theirs that of all; the paper's loss has all parts"
        report.deviates("incomplete samples: loss", found["loss"], expected.loss, reason, follows="both")
        return
    report.equal("loss", found["loss"], expected.loss)
    report.equal_gradients(found["loss"], expected.loss, both)
    compare_codes(report, model, other, x)
    compare_likelihood(report, model, other, x)


@pytest.mark.parametrize(("likelihood", "missing"), COMPLETE_OR_NOT)
def test_crmvae_terms(compare, likelihood, missing):
    model = ours("crmvae", likelihood, beta=2.0)
    other = theirs("CRMVAE", model, {"beta": 2.0})
    x, eps = batch(model, PRESENT if missing else None), torch.randn(BATCH, 1 + M, LATENT)
    with draws(eps[:, 0], eps[:, 1:]):
        found = model.loss(x)
    with draws(*eps.unbind(1)):
        expected = other(inputs(model, x))
    with draws(*eps.unbind(1)), no_likelihood(other):
        kls = other(inputs(model, x)).loss
    report, which = compare("crmvae", "multivae", "CRMVAE"), "incomplete samples: " if missing else ""
    terms = {
        "nll": sum(expected.metrics[f"recon_{m}_from_joint"] for m in NAMES),
        "own_nll": sum(expected.metrics[f"recon_{m}_from_{m}"] for m in NAMES),
        "kl": expected.metrics["joint_divergence"],
        "parts_kl": sum(expected.metrics[f"kl_{m}"] for m in NAMES),
    }
    both = pairs(model, other)
    for term, value in terms.items():
        report.equal(which + term, found[term], value)
        report.equal_gradients(found[term], value, both, f"{which}gradient of {term}")
    if not missing:
        weighted = 2.0 / (M + 1) * (found["kl"] + found["parts_kl"])
        report.scaled("KLs as weighted in the loss", weighted, kls, 1 / BATCH, MEAN)
        report.equal_gradients(weighted, kls, both, "gradient of the KLs as weighted in the loss", 1 / BATCH, MEAN)
        compare_codes(report, model, other, x)
        compare_likelihood(report, model, other, x)


# ---- mixtures of experts ---------------------------------------------------------------------------------------------


@contextmanager
def components(of: Tensor) -> Iterator[None]:
    """Make our mixture draw these components, (B, K)."""
    with mock.patch("torch.randint", return_value=of):
        yield


def compare_bounds(
    report: Comparison, model: Any, found: Any, loss: Tensor, kl: Tensor, both: Any, n: int, which: str
) -> None:
    """Compare our loss, nll and kl with theirs, which are sums over a batch of n with `moment_noise`."""
    report.scaled(f"{which}loss", found["loss"], loss, 1 / n, MEAN)
    report.scaled(f"{which}nll", found["nll"], loss - kl, 1 / n, MEAN)
    report.scaled(f"{which}kl", model.beta * found["kl"], kl, 1 / n, MEAN)
    report.equal_gradients(found["loss"], loss, both, f"{which}gradient", 1 / n, MEAN)


@pytest.mark.parametrize(("likelihood", "missing"), COMPLETE_OR_NOT)
def test_mmvae_losses(compare, likelihood, missing):
    model = ours("mmvae", likelihood)
    settings = {"K": 1, "prior_and_posterior_dist": "normal", "loss": "iwae_looser", "learn_prior": False}
    other = theirs("MMVAE", model, settings)
    eps = moment_noise(BATCH, M, LATENT)
    x = batch(model, PRESENT if missing else None).repeat(2 * LATENT, 1, 1, 1)
    with draws(eps):
        found = model.loss(x)
    each = [e[None] for e in eps.unbind(1)]
    with draws(*each):
        expected = other(inputs(model, x)).loss
    with draws(*each), no_likelihood(other):
        kl = other(inputs(model, x)).loss
    report = compare("mmvae", "multivae", "MMVAE")
    compare_bounds(
        report, model, found, expected, kl, pairs(model, other), len(x), "incomplete samples: " if missing else ""
    )
    if missing:
        return
    x = x[:BATCH]
    compare_codes(report, model, other, x)
    with torch.no_grad():
        # theirs draws all codes from one part's expert
        eps = torch.randn(7, BATCH, LATENT)
        with draws(eps.transpose(0, 1)), components(torch.full((BATCH, 7), 1)):
            found = model.log_likelihood(x, 7)
        with draws(eps), mock.patch("numpy.random.choice", return_value="b"):
            expected = other.compute_joint_nll(inputs(model, x), 7, 3)
            report.equal("log-likelihood by one expert", -found.sum(), expected)
        # as in the paper, the same number from each expert
        eps = torch.randn(M, 5, BATCH, LATENT)
        with (
            draws(eps.flatten(0, 1).transpose(0, 1)),
            components(torch.arange(M).repeat_interleave(5).expand(BATCH, -1)),
        ):
            found = model.log_likelihood(x, M * 5)
        with draws(*eps):
            expected = other.compute_joint_nll_paper(inputs(model, x), 5, 5)
            report.equal("log-likelihood by all experts", -found.sum(), expected)


@pytest.mark.parametrize("name", ["mmvae_plus", "cmvae"])
@pytest.mark.parametrize(("likelihood", "missing"), COMPLETE_OR_NOT)
def test_losses_with_private_codes(compare, name, likelihood, missing):
    """MMVAE+ and CMVAE; the scales of the clusters, which MultiVae does not train, are set to ours."""
    kind = {"mmvae_plus": "MMVAEPlus", "cmvae": "CMVAE"}[name]
    more = {"n_components": 3} if name == "cmvae" else {}
    model = ours(name, likelihood, beta=2.0, private_dim=PRIVATE, **more)
    settings = {"K": 1, "prior_and_posterior_dist": "normal", "loss": "iwae_looser", "beta": 2.0}
    settings |= {"number_of_clusters": 3} if name == "cmvae" else {}
    other = theirs(kind, model, {**settings, "modalities_specific_dim": PRIVATE})
    scales = [getattr(other, "r_logvars_priors" if name == "cmvae" else "logvars_priors")[m] for m in NAMES]
    learned = {"r_log_var_MP": scales}
    if name == "cmvae":
        learned |= {"weight_K": [other._pc_params], "mean_KD": [*other.mean_clusters]}
        learned |= {"log_var_KD": [*other.logvar_clusters]}
    for parameter, parts in learned.items():
        for part, row in zip(parts, getattr(model, parameter).detach().reshape(len(parts), -1), strict=True):
            part.requires_grad_().data.copy_(row.reshape(part.shape))
    eps, n = moment_noise(BATCH, M, LATENT + PRIVATE), BATCH * 2 * (LATENT + PRIVATE)
    r = torch.randn(n, M, M, PRIVATE)
    x = batch(model, PRESENT if missing else None).repeat(n // BATCH, 1, 1, 1)
    with draws(eps, r):
        found = model.loss(x)
    each = []
    for i in range(M):
        each += [part[None] for part in eps[:, i].split([LATENT, PRIVATE], 1)]
        each += [r[None, :, i, j] for j in range(M) if j != i]
    with draws(*each):
        expected = other(inputs(model, x)).loss
    with draws(*each), no_likelihood(other):
        kl = other(inputs(model, x)).loss
    report, which = compare(name, "multivae", kind), "incomplete samples: " if missing else ""
    both = pairs(model, other, but=(*learned,))
    compare_bounds(report, model, found, expected, kl, both, n, which)
    for parameter, parts in learned.items():
        (gradient,) = torch.autograd.grad(found["loss"], [getattr(model, parameter)], retain_graph=True)
        other_gradient = torch.cat(torch.autograd.grad(expected, parts, retain_graph=True)).reshape(gradient.shape)
        report.scaled(f"{which}gradient of {parameter}", gradient, other_gradient, 1 / n, MEAN)
    if missing:
        return
    x = x[:BATCH]
    # for CMVAE theirs uses the mean of a random part, for MMVAE+ that of all given parts
    subsets = SUBSETS if name == "mmvae_plus" else [(0,), (1,), (2,)]
    compare_codes(report, model, other, x, subsets)


def number(chosen: tuple[int, ...]) -> int:
    """The index of a subset among those of our `mopoe_vae`."""
    return sum(2**i for i in chosen) - 1


def compare_products(report: Comparison, model: Any, x: Any, found: Any, expected: Any, both: Any, which: str) -> None:
    """Compare the likelihoods, and the mean KL of the products, with beta 2."""
    (mu, log_var), weight = model.components(x), model.weights(x)
    kl = (weight * model.kl(mu.flatten(0, 1), log_var.flatten(0, 1)).unflatten(0, weight.shape)).mean()
    report.equal(f"{which}nll", found["nll"], sum(expected.metrics[f"recon_{m}"] for m in NAMES))
    report.equal(f"{which}mean of the KLs", kl, expected.metrics["joint_divergence"])
    report.equal_gradients(found["nll"] + 2.0 * kl, expected.loss, both, f"{which}gradient of nll + beta mean KL")


MOPOE_KL = "the KL is that of the mixture; theirs takes the mean of the KLs of its components, a bound of it"


def test_mopoe_vae_losses(compare):
    """Samples are repeated for each subset in theirs, so that each subset decodes all samples."""
    model = ours("mopoe_vae", "bernoulli", beta=2.0)
    other = theirs("MoPoE", model, {"beta": 2.0})
    s = len(SUBSETS)
    x, eps = batch(model), torch.randn(BATCH, s, LATENT)
    copies = x.repeat(s, 1, 1, 1)
    noise_of_copies = eps[:, [number(chosen) for chosen in SUBSETS]].transpose(0, 1).flatten(0, 1)
    with draws(eps):
        found = model.loss(x)
    with draws(noise_of_copies):
        unchanged = other(inputs(model, copies)).loss
    report, both = compare("mopoe_vae", "multivae", "MoPoE"), pairs(model, other)
    reason = f"{MOPOE_KL}, and multiplies the product of all parts by the prior as well"
    report.deviates("loss", found["loss"], unchanged, reason, follows="ours")
    # the product of all parts without the prior
    other._poe_fusion = poe
    with draws(noise_of_copies):
        expected = other(inputs(model, copies))
    compare_products(report, model, x, found, expected, both, "theirs without the prior of all parts: ")
    found_products = [values[:, number(chosen)] for chosen in SUBSETS for values in model.components(x)]
    latents = other.inference(inputs(model, x))["subsets"]
    products = [values for chosen in SUBSETS for values in latents["_".join(names(chosen))]]
    report.equal("theirs without the prior of all parts: products", torch.stack(found_products), torch.stack(products))
    code = other.encode(inputs(model, x), return_mean=True).z
    report.equal("theirs without the prior of all parts: code of all parts", model.infer(x)[0], code)
    compare_codes(report, model, other, x, [(0,), (1,), (2,)])
    # theirs draws all codes of a sample from one component
    x, eps = batch(model, n=s), torch.randn(7, s, LATENT)
    of = torch.tensor([number(chosen) for chosen in SUBSETS])[:, None].expand(s, 7)
    with torch.no_grad(), draws(eps.transpose(0, 1)), components(of):
        found = model.log_likelihood(x, 7)
    with draws(eps):
        expected = other.compute_joint_nll(inputs(model, x), 7, 3)
    report.equal("theirs without the prior of all parts: log-likelihood", -found.sum(), expected)


def test_mopoe_vae_losses_of_incomplete_samples(compare):
    """Samples with two parts, repeated for each of their three subsets."""
    model = ours("mopoe_vae", "gaussian:0.6", beta=2.0)
    other = theirs("MoPoE", model, {"beta": 2.0})
    x, eps = batch(model, TWO_OF_THREE), torch.randn(BATCH, len(SUBSETS), LATENT)
    copies = x.repeat_interleave(3, 0)
    of = [[k for k, chosen in enumerate(SUBSETS) if has[[*chosen]].all()] for has in TWO_OF_THREE]
    choice = torch.eye(len(SUBSETS))[torch.tensor(of).flatten()]
    noise_of_copies = [eps[b, number(SUBSETS[k])] for b, chosen in enumerate(of) for k in chosen]
    with draws(eps):
        found = model.loss(x)
    with (
        draws(torch.stack(noise_of_copies)),
        mock.patch("torch.distributions.OneHotCategorical.sample", return_value=choice),
    ):
        expected = other(inputs(model, copies))
    report, both = compare("mopoe_vae", "multivae", "MoPoE"), pairs(model, other)
    report.deviates("incomplete samples: loss", found["loss"], expected.loss, MOPOE_KL, follows="ours")
    compare_products(report, model, x, found, expected, both, "incomplete samples: ")


# ---- shared and private codes, hierarchies ---------------------------------------------------------------------------


def test_dmvae_losses(compare):
    model = ours("dmvae", "gaussian:0.6", beta=2.0, private_dim=PRIVATE)
    dims, betas = dict.fromkeys(NAMES, PRIVATE), dict.fromkeys(NAMES, 2.0)
    settings = {"beta": 2.0, "modalities_specific_dim": dims, "modalities_specific_betas": betas}
    other = theirs("DMVAE", model, settings)
    x, eps = batch(model), torch.randn(BATCH, 1 + M, LATENT + M * PRIVATE)
    each = [part for values in eps.unbind(1) for part in values.split([LATENT, *[PRIVATE] * M], 1)]
    with draws(eps):
        found = model.loss(x)
    with draws(*each):
        unchanged = other(inputs(model, x))
    report, both = compare("dmvae", "multivae", "DMVAE"), pairs(model, other)
    reason = (
        "the posterior of u given one part is the product with the prior, as given several; theirs takes the expert "
        "alone in the loss, and the product in `encode`"
    )
    report.deviates("loss", found["loss"], unchanged.loss, reason, follows="both")

    infer = other._infer_latent_parameters

    def with_prior(given: Any, subset: Any = None) -> Any:
        mean, log_var, shared, private = infer(given, subset)
        return mean, log_var, {m: infer(given, [m])[:2] for m in shared}, private

    which = "theirs with the products of `encode`: "
    with draws(*each), mock.patch.object(other, "_infer_latent_parameters", with_prior):
        expected = other(inputs(model, x))
    with draws(*each), mock.patch.object(other, "_infer_latent_parameters", with_prior), no_likelihood(other):
        kls = other(inputs(model, x))
    report.equal("nll", found["nll"], expected.metrics["joint"] - kls.metrics["joint"])
    report.equal("kl", 2.0 * found["kl"], kls.metrics["joint"])
    report.equal_gradients(found["nll"] + 2.0 * found["kl"], expected.metrics["joint"], both, "gradient of -elbo")
    report.equal(f"{which}loss", found["loss"], expected.loss)
    report.equal(f"{which}cross_nelbo", found["cross_nelbo"], sum(expected.metrics[m] for m in NAMES))
    report.equal_gradients(found["loss"], expected.loss, both, f"{which}gradient")
    compare_codes(report, model, other, x)
    for n in (1, 2):
        x, eps = batch(model, n=n), torch.randn(7, n, LATENT + M * PRIVATE)
        u, *w = eps.split([LATENT, *[PRIVATE] * M], 2)
        with torch.no_grad(), draws(eps):
            found = -model.log_likelihood(x, 7).sum()
        with draws(u, *(values[:, b] for b in range(n) for values in w)):
            expected = other.compute_joint_nll(inputs(model, x), 7, 7)
        if n == 1:
            report.equal("log-likelihood of one sample", found, expected)
        else:
            reason = "theirs adds the log-densities of the codes of earlier samples to those of later ones"
            report.deviates("log-likelihood of several samples", found, expected, reason, follows="ours")


@pytest.mark.parametrize(("likelihood", "missing"), COMPLETE_OR_NOT)
def test_nexus_losses(compare, likelihood, missing):
    """With the scale 1 of p(z_i|u), as in theirs."""
    settings = {"latent_dim": 3, "part_dim": LATENT, "level_dim": 6}
    model = ours("nexus", likelihood, beta=2.0, top_beta=1.5, dropout=0.0, **settings).train()
    model.top.s_log_var_MP.data.zero_()
    nets = {
        "top_encoders": {m: Block(net) for m, net in zip(NAMES, model.top.messages, strict=True)},
        "joint_encoder": Block(model.top.node),
        "top_decoders": {m: Decoder(net) for m, net in zip(NAMES, model.top.downward, strict=True)},
    }
    settings = {"warmup": 1, "bottom_betas": dict.fromkeys(NAMES, 2.0), "top_beta": 1.5}
    other = theirs("Nexus", model, settings, **nets)
    x, eps = batch(model, PRESENT if missing else None), torch.randn(BATCH, M * LATENT + 3)
    each = eps.split([LATENT] * M + [3], 1)
    report, which = compare("nexus", "multivae", "Nexus"), "incomplete samples: " if missing else ""
    more = [(model.top.node, other.joint_encoder.net)]
    for ours_of, theirs_of in ((model.top.messages, other.top_encoders), (model.top.downward, other.top_decoders)):
        more += [(net, theirs_of[m].net) for m, net in zip(NAMES, ours_of, strict=True)]
    both = pairs(model, other, *more, but=("top.s_log_var_MP",))
    with draws(eps):
        found = model.loss(x)
    with draws(*each):
        expected = other(inputs(model, x))
    with draws(*each), no_likelihood(other):
        kls = other(inputs(model, x))
    report.equal(f"{which}loss", found["loss"], expected.loss)
    report.equal(f"{which}nll", found["nll"], expected.metrics["bottom_loss"] - kls.metrics["bottom_loss"])
    report.equal(f"{which}kl", 2.0 * found["kl"], kls.metrics["bottom_loss"])
    report.equal(f"{which}top_nll", found["top_nll"], sum(expected.metrics[f"recon_z_{m}"] for m in NAMES))
    report.equal(f"{which}top_kl", found["top_kl"], expected.metrics["joint_KLD"])
    report.equal_gradients(found["loss"], expected.loss, both, f"{which}gradient")
    top = found["top_nll"] + 1.5 * found["top_kl"]
    report.equal_gradients(top, expected.metrics["top_loss"], both, f"{which}gradient of the upper level")
    if missing:
        return
    compare_nexus_codes(report, model, other, x)
    # some messages are dropped
    chosen, model.top.dropout, other.model_config.dropout_rate = [(0, 1, 2), (1,), (0, 2), (2,), (0, 1)], 0.5, 0.5
    rand, dropped, sizes, orders = torch.full((BATCH, 2 + M), 0.9), [], [], []
    for row, senders in zip(rand, chosen, strict=True):
        dropped.append(torch.tensor(float(len(senders) < M)))
        if len(senders) < M:
            row[0], row[1] = 0.1, (len(senders) - 0.5) / (M - 1)
            row[2:][[*senders]] = 0.1
            sizes.append(len(senders))
            orders.append(torch.tensor([*senders, *{*range(M)} - {*senders}]))
    with draws(eps), mock.patch("torch.rand", return_value=rand):
        found = model.train().loss(x)
    with (
        draws(*each),
        mock.patch("torch.distributions.Bernoulli.sample", side_effect=dropped),
        mock.patch("numpy.random.randint", side_effect=sizes),
        mock.patch("torch.randperm", side_effect=orders),
    ):
        expected = other.train()(inputs(model, x))
    report.equal("with dropout: loss", found["loss"], expected.loss)
    report.equal_gradients(found["loss"], expected.loss, both, "with dropout: gradient")


@torch.no_grad()
def compare_nexus_codes(report: Comparison, model: Any, other: Any, x: Tensor) -> None:
    mean = torch.sigmoid if model.hparams["likelihood"] == "bernoulli" else lambda params: params
    found: list[list[Tensor]] = [[], [], [], []]
    for chosen in SUBSETS:
        given = {"inputs": inputs(model, x), "cond_mod": names(chosen), "return_mean": True}
        code = other.eval().encode(**given)
        u, *z = model.eval().infer(x, chosen)[0].split([3, *[LATENT] * M], 1)
        found[0].append(torch.cat([u, *(z[i] for i in chosen)], 1).flatten())
        found[1].append(torch.cat([code.z, *(code.modalities_z[m] for m in names(chosen))], 1).flatten())
        found[2].append(model.reconstruct_from(x, chosen))
        found[3].append(torch.cat([mean(other.predict(**given)[m]) for m in NAMES], 1))
    report.equal("codes of all subsets", torch.cat(found[0]), torch.cat(found[1]))
    report.equal("samples from all subsets", torch.stack(found[2]), torch.stack(found[3]))


class Level(Block):
    """A copy of one of our networks, which reads the level above and a slice of the encoder's output."""

    def __init__(self, net: nn.Module, above: int, dims: tuple[int, ...], level: int) -> None:
        super().__init__(net)
        self.sizes, self.level = [above, *(2 * d for d in dims)], level

    def inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        z, *h = x.split(self.sizes, 1)
        return h[self.level], z


class Top(BaseEncoder):
    """The mean and log-variance of the top level in the encoder's output."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, h: Tensor) -> ModelOutput:
        mean, log_var = h[:, -2 * self.size :].chunk(2, 1)
        return ModelOutput(embedding=mean, log_covariance=log_var)


class BottomUp(BaseEncoder):
    """A copy of our encoder."""

    def __init__(self, net: nn.Module, _: int) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)

    def forward(self, x: Tensor) -> ModelOutput:
        return ModelOutput(embedding=self.net(x))


def test_mhvae_losses(compare):
    """Our networks in theirs: the encoder of a part returns the inputs of all levels, which other blocks pass on."""
    dims = (2, 3, 4)
    model = ours("mhvae", "bernoulli", latent_dim=None, latent_dims=dims, level_dim=8, beta=2.0)
    n = len(dims)
    blocks = {
        "bottom_up_blocks": {m: [*(nn.Identity() for _ in range(n - 2)), Top(dims[-1])] for m in NAMES},
        "top_down_blocks": [nn.Identity() for _ in range(n - 1)],
        "posterior_blocks": [Level(net, dims[i + 1], dims, i) for i, net in enumerate(model.posteriors)],
        "prior_blocks": [Block(net) for net in model.priors],
    }
    other = theirs("MHVAE", model, {"beta": 2.0, "n_latent": n}, BottomUp, **blocks)
    x = batch(model)
    eps = {chosen: [torch.randn(BATCH, d) for d in dims[::-1]] for chosen in SUBSETS}
    with draws(*(e for chosen in model.subsets() for e in eps[chosen])):
        found = model.loss(x)
    each = [e for chosen in SUBSETS for e in eps[chosen]]
    with draws(*each):
        expected = other(inputs(model, x))
    given = inputs(model, x)
    with draws(*eps[SUBSETS[-1]]):
        of_all, _ = other._loss_subset(given, *other.modality_encode(given.data), NAMES)
    report = compare("mhvae", "multivae", "MHVAE")
    more = [(net, block.net) for net, block in zip(model.posteriors, other.posterior_blocks, strict=True)]
    more += [(net, block.net) for net, block in zip(model.priors, other.prior_blocks, strict=True)]
    both = pairs(model, other, *more)
    report.scaled("loss", found["loss"], expected.loss, 1 / BATCH, MEAN)
    report.equal_gradients(found["loss"], expected.loss, both, "gradient", 1 / BATCH, MEAN)
    report.scaled("nll + beta kl", found["nll"] + 2.0 * found["kl"], of_all, 1 / BATCH, MEAN)
    rest = expected.loss - of_all / len(SUBSETS)
    report.scaled("subset_nelbo", found["subset_nelbo"], rest, 1 / BATCH, MEAN)
    for level in range(1, n + 1):
        report.scaled(f"kl_{level}", found[f"kl_{level}"], expected.metrics[f"kl_{level}"], 1 / BATCH, MEAN)
    compare_codes(report, model, other, x)


# ---- labels ----------------------------------------------------------------------------------------------------------


class LabelledEncoder(BaseJointEncoder):
    """A copy of our encoder of samples with their labels."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.label_map, self.net = copy.deepcopy(model.label_map), copy.deepcopy(model.encoder)
        self.latent_dim = LATENT

    def forward(self, x: dict[str, Tensor]) -> ModelOutput:
        mean, log_var = self.net(self.label_map(x["x"], x["y"])).chunk(2, 1)
        return ModelOutput(embedding=mean, log_covariance=log_var)


class LabelledDecoder(BaseConditionalDecoder):
    """A copy of our decoder of codes with labels."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)

    def forward(self, z: Tensor, cond_mods: dict[str, Tensor]) -> ModelOutput:
        return ModelOutput(reconstruction=self.net(torch.cat([z, cond_mods["y"]], 1)))


def test_conditional_vae_losses(compare):
    """The label as their conditioning modality."""
    model = ours("conditional_vae", "bernoulli", parts=None, num_classes=3)
    name, scale = decoder_settings("bernoulli")
    settings = {"conditioning_modalities": ["y"], "main_modality": "x", "latent_dim": LATENT, "decoder_dist": name}
    given = multivae.CVAEConfig(**settings, decoder_dist_params=scale)
    other = multivae.CVAE(given, LabelledEncoder(model), LabelledDecoder(model.decoder)).double()
    x, y, eps = batch(model), torch.arange(BATCH) % 3, torch.randn(BATCH, LATENT)
    data = MultimodalBaseDataset({"x": x, "y": torch.eye(3)[y]})
    with draws(eps):
        found = model.loss(x, y)
    with draws(eps):
        expected = other(data)
    report = compare("conditional_vae", "multivae", "CVAE")
    report.equal("loss", found["loss"], expected.loss)
    report.equal("nll", found["nll"], expected.metrics["recon_loss"])
    report.equal("kl", found["kl"], expected.metrics["kl"])
    nets = [(model.label_map, other.encoder.label_map), (model.encoder, other.encoder.net)]
    both = matched(model, [*nets, (model.decoder, other.decoder.net)])
    report.equal_gradients(found["loss"], expected.loss, both)
    report.equal("code", model.encode(x, y)[:, :LATENT], other.encode(data, return_mean=True).z)
