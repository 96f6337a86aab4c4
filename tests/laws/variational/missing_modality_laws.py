"""Laws of samples with missing parts: every result equals that of a model of the present parts only."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributions as D
from multimodal_laws import (
    mixture,
)
from scipy import stats
from torch import Tensor, nn

from aezoo import AezooError
from aezoo.models.variational.cmvae import CMVAE
from aezoo.models.variational.crmvae import CRMVAE
from aezoo.models.variational.jmvae import JMVAE
from aezoo.models.variational.jnf import JNF
from aezoo.models.variational.mmvae import MMVAE
from aezoo.models.variational.mmvae_plus import MMVAEPlus
from aezoo.models.variational.mopoe_vae import MoPoEVAE
from aezoo.models.variational.mvae import MVAE
from aezoo.models.variational.mvtcae import MVTCAE
from aezoo.models.variational.nexus import Nexus
from aezoo.models.variational.vae import VAE

SHAPE, PARTS, CODE = (9, 1, 2), (2, 3, 4), 4


MODELS: list[Any] = [MVAE, MMVAE, MoPoEVAE, MVTCAE, CRMVAE, MMVAEPlus, CMVAE, Nexus]


# settings without random choices of parts
WITHOUT_DRAWS: dict[Any, Any] = {MVAE: {"n_subsets": 0}, Nexus: {"dropout": 0.0}}


# all non-empty subsets of three parts
PATTERNS = [present for n in (1, 2, 3) for present in itertools.combinations(range(3), n)]


NAN = float("nan")


def small(make: Any, shifted: Any, **settings: Any) -> Any:
    return shifted(make(SHAPE, parts=PARTS, latent_dim=CODE, hidden_dims=(8,), **settings).double())


def images(n: int = 5) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64)


def without(x: Tensor, present: Any) -> Tensor:
    """The samples with NaN in all parts but those in `present`."""
    parts = x.split(PARTS, 1)
    return torch.cat([part if i in present else torch.full_like(part, NAN) for i, part in enumerate(parts)], 1)


def of_parts(x: Tensor, present: Any) -> Tensor:
    parts = x.split(PARTS, 1)
    return torch.cat([parts[i] for i in present], 1)


def smaller(model: Any, present: Any) -> Any:
    """A model of the present parts, with their networks in `model`."""
    sizes = tuple(PARTS[i] for i in present)
    settings = {name: value for name, value in model.hparams.items() if name not in ("input_shape", "parts")}
    other = type(model)((sum(sizes), *SHAPE[1:]), parts=sizes, **settings).double().train(model.training)
    other.encoder = nn.ModuleList(model.encoder[i] for i in present)
    for place, i in enumerate(present):
        other.decoder[place] = model.decoder[i]
    other.likelihood = model.likelihood
    if isinstance(model, MMVAEPlus):
        other.r_log_var_MP = nn.Parameter(model.r_log_var_MP[[*present]].detach())
    if isinstance(model, CMVAE):
        other.weight_K, other.mean_KD, other.log_var_KD = model.weight_K, model.mean_KD, model.log_var_KD
    if isinstance(model, Nexus):
        other.top.node = model.top.node
        other.top.messages = nn.ModuleList(model.top.messages[i] for i in present)
        other.top.downward = nn.ModuleList(model.top.downward[i] for i in present)
        other.top.s_log_var_MP = nn.Parameter(model.top.s_log_var_MP[[*present]].detach())
    return other


def with_noise(model: Any, x: Tensor) -> Any:
    """The loss with constant noise, which does not depend on the number of parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda like: torch.full_like(like, 0.7))
        return model.loss(x)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian:learned"])
def test_loss_matches_models_of_present_modalities(make: Any, likelihood: str, shifted: Any) -> None:
    settings = WITHOUT_DRAWS.get(make, {})
    model, x = small(make, shifted, beta=3.0, likelihood=likelihood, **settings), images(len(PATTERNS))
    given = torch.cat([without(x[i : i + 1], present) for i, present in enumerate(PATTERNS)])
    terms = with_noise(model, given)
    alone = [with_noise(smaller(model, present), of_parts(x[i : i + 1], present)) for i, present in enumerate(PATTERNS)]
    for name, value in terms.items():
        torch.testing.assert_close(value, torch.stack([one[name] for one in alone]).mean(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("present", PATTERNS[:-1])
def test_outputs_equal_model_of_present_modalities(make: Any, present: Any, shifted: Any) -> None:
    model, x = small(make, shifted).eval(), images()
    other, given = smaller(model, present), without(x, present)
    code, own = model.encode(given), other.encode(of_parts(x, present))
    if issubclass(make, MMVAEPlus | Nexus):
        shared, private = code.split([CODE, code.shape[1] - CODE], 1)
        private, unseen = private.unflatten(1, (3, -1)), [i for i in range(3) if i not in present]
        expected = model.top.down(shared)[0][:, unseen] if make is Nexus else torch.zeros_like(private[:, unseen])
        torch.testing.assert_close(private[:, unseen], expected)
        code = torch.cat([shared, private[:, [*present]].flatten(1)], 1)
    torch.testing.assert_close(code, own, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.score(given), other.score(of_parts(x, present)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(of_parts(model(given), present), other(of_parts(x, present)), rtol=1e-9, atol=1e-9)
    # the missing parts are reconstructed from the present ones only
    torch.testing.assert_close(model(given), model.reconstruct_from(x, present), rtol=1e-9, atol=1e-9)
    assert torch.equal(model.reconstruct_from(given, present), model.reconstruct_from(x, present))


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("present", PATTERNS[:-1])
def test_missing_modality_gets_no_gradient(make: Any, present: Any, shifted: Any) -> None:
    model, x = small(make, shifted, **WITHOUT_DRAWS.get(make, {})), images()
    other = smaller(model, present)
    with_noise(other, of_parts(x, present))["loss"].backward()
    expected = {i: [p.grad.clone() for p in (*model.encoder[i].parameters(), *model.decoder[i].parameters())]
                for i in present}  # fmt: skip
    model.zero_grad()
    with_noise(model, without(x, present))["loss"].backward()
    for i in range(3):
        found = [p.grad for p in (*model.encoder[i].parameters(), *model.decoder[i].parameters())]
        if i not in present:
            assert all((gradient == 0).all() for gradient in found)
            continue
        for gradient, one in zip(found, expected[i], strict=True):
            torch.testing.assert_close(gradient, one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [MMVAE, MoPoEVAE, MMVAEPlus, CMVAE])
def test_posterior_draws_use_present_components(make: Any, shifted: Any) -> None:
    model, x, present = small(make, shifted), images(2), (0, 2)
    other = smaller(model, present)
    z, log_q = model.sample_posterior(without(x, present), 4000)
    q = mixture(*other.components(of_parts(x, present)))
    rest = 0.0
    if issubclass(make, MMVAEPlus):
        own = z[..., CODE:].unflatten(2, (3, -1))
        mu, log_var = (values[..., CODE:] for values in other.experts(of_parts(x, present)))
        rest = D.Normal(mu, (0.5 * log_var).exp()).log_prob(own[:, :, [*present]]).sum((2, 3))
        rest = rest + D.Normal(0.0, 1.0).log_prob(own[:, :, 1]).sum(2)
    torch.testing.assert_close(log_q, q.log_prob(z[..., :CODE]) + rest)
    drawn = q.sample((4000,))
    for b, d in itertools.product(range(2), range(CODE)):
        assert stats.ks_2samp(z[:, b, d].detach(), drawn[:, b, d]).pvalue > 1e-4


@pytest.mark.parametrize("make", MODELS)
def test_partly_missing_modalities_are_refused(make: Any, shifted: Any) -> None:
    model, x = small(make, shifted), images()
    model.check_batch(without(x, (1,)))
    for bad in (without(x, ()), without(x, (1,)).index_fill(3, torch.tensor([0]), NAN), without(x, (0,)) / 0):
        with pytest.raises(AezooError, match=r"sample 3 .* a part is missing where all its values are NaN"):
            model.check_batch(torch.cat([x[:3], bad]))
    # without the check the loss is not finite
    assert not with_noise(model, without(x, (1,)).index_fill(3, torch.tensor([0]), NAN))["loss"].isfinite()


@pytest.mark.parametrize("make", [VAE, JMVAE, JNF])
def test_models_without_missing_support_suggest_others(make: Any) -> None:
    with pytest.raises(AezooError, match=r"NaN or infinite values: clean them first, or use .* such as mvae"):
        make(SHAPE, latent_dim=2, hidden_dims=()).check_batch(without(images().float(), (1,)))
