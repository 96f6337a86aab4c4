"""Laws of FSP autoencoder, finite scalar perturbation (Zhai et al. 2026)."""

import math
from typing import Any

import pytest
import torch
import vector_quantize_pytorch as peer
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from quantised_laws import (  # noqa: F401
    test_inference_calls_do_not_update_codebook,
)
from torch import Tensor
from torch.distributions import Normal

import aezoo
from aezoo.quantisers import FSP
from aezoo.quantisers.fsp import SQUASHES

LEVELS = (4, 3, 5, 2)


squashes = pytest.mark.parametrize("squash", SQUASHES)


def built(**settings: Any) -> Any:
    return FSP(LEVELS, **settings).double().train()


def rows(n: int = 200) -> Tensor:
    return torch.randn(n, 4, dtype=torch.float64) * 2


@squashes
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_fsp_matches_peer_codes_noise_and_gradients(squash: str, rate: float) -> None:
    theirs = peer.FSP(levels=[*LEVELS], act_name=squash, quantize_rate=rate, vector_norm="none").double()
    ours, z = built(squash=squash, quantised=rate), rows().requires_grad_()
    for mode in (True, False):
        results = []
        for quantiser in (theirs.train(mode), ours.train(mode)):
            torch.manual_seed(3)  # both draw the noise first, then which numbers are quantised
            found = quantiser(z)
            results.append((found[0], found[1], torch.autograd.grad(found[0].square().sum(), z)[0]))
        (z_q, index, of_z), (same, same_index, same_of_z) = results
        torch.testing.assert_close(same, z_q)
        torch.testing.assert_close(same_of_z, of_z)
        assert torch.equal(same_index[:, 0], index.long())
    torch.testing.assert_close(ours.codes(same_index), theirs.indices_to_codes(index).double(), rtol=1e-6, atol=1e-6)


@squashes
def test_p_is_uniform_for_target_distribution_of_z(squash: str) -> None:
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    of_squash = {"tanh": (2 * u - 1).atanh(), "sigmoid": u.logit(), "normal": Normal(0, 1).icdf(u)}[squash]
    found = FSP((5,), squash=squash).double().eval()(of_squash[:, None])
    assert torch.bincount(found.indices[:, 0]).tolist() == [4000] * 5
    assert all(term < 1e-3 for term in found.terms.values())  # moments of the target distribution: 0, sigma_g^2
    values = found.z_q.unique()
    torch.testing.assert_close(values, math.sqrt(12) * ((torch.arange(5).double() + 0.5) / 5 - 0.5))
    # the least error that five values can have for a uniform source of variance 1 (Lloyd 1982, Max 1960)
    error = (math.sqrt(12) * (u - 0.5) - found.z_q[:, 0]).square().mean()
    torch.testing.assert_close(error, torch.tensor(1 / 25, dtype=torch.float64), rtol=1e-4, atol=0)


def test_terms_pull_variance_to_squash_distribution() -> None:
    z = rows()
    for squash, variance in (("tanh", math.pi**2 / 12), ("sigmoid", math.pi**2 / 3), ("normal", 1.0)):
        terms = built(squash=squash)(z).terms
        expected = ((z.var(0, unbiased=False) - variance) ** 2).sum()
        torch.testing.assert_close(terms["code_variance"], expected)
        torch.testing.assert_close(terms["code_mean"], (z.mean(0) ** 2).sum())


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
def test_noise_has_eta_intervals_width_within_unit_range(eta: float) -> None:
    quantiser, z = built(eta=eta, quantised=0.0), rows(4000)
    p, moved = (torch.tanh(z) + 1) / 2, quantiser(z).z_q / math.sqrt(12) + 0.5
    off = (moved - p).abs() * torch.tensor(LEVELS)
    assert (moved >= 0).all() and (moved <= 1).all() and off.max() <= eta / 2 + 1e-9
    assert off.max() >= 0.48 * eta
    if 0 < eta <= 1:  # near the middle, no noise leaves the unit range
        z = rows(4000) / 100
        off = (quantiser(z).z_q / math.sqrt(12) - torch.tanh(z) / 2).abs() * torch.tensor(LEVELS)
        torch.testing.assert_close(off.mean(), torch.tensor(eta / 4, dtype=torch.float64), rtol=0.03, atol=0)
    # p stays where noise would leave the unit range: nothing is clamped to its ends
    assert ((moved == 0) | (moved == 1)).sum() == ((p == 0) | (p == 1)).sum()


def test_zero_noise_equals_autoencoder_training() -> None:
    nets: dict[str, Any] = {"net": "mlp", "hidden_dims": (8,), "places": 3, "levels": LEVELS}
    x = torch.rand(7, 6, dtype=torch.float64)
    model: Any = aezoo.create_model("fsp_vae", (6,), **nets, eta=0.0, quantised=0.0, mean_weight=0.0).double()
    model.variance_weight = 0.0
    code = math.sqrt(12) * torch.tanh(model.encoder(x)) / 2
    expected = model.nll(model.decoder(code), x).mean()
    torch.testing.assert_close(model.train().loss(x)["loss"], expected)
    model = aezoo.create_model("fsp_vae", (6,), **nets, quantised=1.0, mean_weight=0.3, variance_weight=0.7).double()
    terms, same = model.train().loss(x), model.eval().loss(x)
    for term in terms:
        torch.testing.assert_close(terms[term], same[term])
    total = terms["nll"] + 0.3 * terms["code_mean"] + 0.7 * terms["code_variance"]
    torch.testing.assert_close(terms["loss"], total)


@pytest.mark.parametrize(
    "wrong", [{"levels": (4, 1)}, {"levels": ()}, {"squash": "relu"}, {"eta": -1.0}, {"quantised": 1.5}]
)
def test_invalid_values_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(aezoo.AezooError, match=next(iter(wrong))):
        aezoo.create_model("fsp_vae", (1, 8, 8), **wrong)
