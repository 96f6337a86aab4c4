"""Laws of Gumbel VQ-VAE, a grid of codes sampled from logits (Jang et al. 2016)."""

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
from relaxed_codebook_laws import (  # noqa: F401
    SHAPE,
    SMALL,
    K,
    P,
    nll_of,
    reference_kl,
    test_elbo_with_sampled_codes_is_below_evidence,
    test_hard_codes_have_relaxed_gradient,
    test_indices_roundtrip_after_training,
    test_invalid_values_are_refused,
    test_kl_trains_encoder_and_likelihood_everything,
    test_loss_at_most_likely_codes_is_not_a_bound,
    test_low_temperature_codes_are_discrete,
    test_quantiser_temperature_follows_the_schedule,
    test_samples_decode_uniform_codes,
    test_score_is_vae_score_at_most_likely_codes,
    tiny,
    vectors,
    with_noise,
)
from torch import Tensor

import aezoo
import aezoo.distributions.categorical
from aezoo.models.quantised.gumbel_vq_vae import GumbelVQVAE
from aezoo.quantisers.base import Quantised

# ---- gumbel_vq_vae and dvae: the formula -----------------------------------------------------------------------------


def loss_law(model: Any, monkeypatch: pytest.MonkeyPatch, tau: float, beta: float) -> None:
    """Training decodes the relaxed code, evaluation the drawn one; the KL is summed over positions."""
    x, g_BPK = vectors(), D.Gumbel(torch.zeros(5, P, K).double(), 1.0).sample()
    with_noise(monkeypatch, g_BPK)
    logits_BPK = model.encoder(x).movedim(1, 2)
    codes_KC = model.quantiser.code_KC
    for training in (True, False):
        noisy = logits_BPK.log_softmax(2) + g_BPK
        y = (noisy / tau).softmax(2) if training else torch.eye(K).double()[noisy.argmax(2)]
        nll = nll_of(model.decoder((y @ codes_KC).movedim(2, 1)), x).mean()
        kl = reference_kl(logits_BPK)
        found = model.train(training).loss(x)
        wanted = {"loss": nll + beta * kl, "nll": nll, "kl": kl, "elbo": -nll - kl}
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value)


class MeanOverPlaces(GumbelVQVAE):
    """As in taming-transformers: the KL is a sum over codes, and a mean over positions and the batch."""

    def draw(self, x: Tensor) -> Quantised:
        found = super().draw(x)
        return found._replace(terms={"kl": found.terms["kl"] / math.prod(self.index_shape)})


class MeanOverCodes(GumbelVQVAE):
    """The KL is a mean over codes."""

    def draw(self, x: Tensor) -> Quantised:
        found = super().draw(x)
        return found._replace(terms={"kl": found.terms["kl"] / self.index_sizes[0]})


class NegativeEntropy(GumbelVQVAE):
    """The KL without log K, that is, minus the entropy."""

    def draw(self, x: Tensor) -> Quantised:
        found = super().draw(x)
        return found._replace(terms={"kl": found.terms["kl"] - P * math.log(K)})


@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
def test_sampled_code_loss_matches_formula(tau: float, shifted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(shifted, beta=2.5, temperature=tau, start_temperature=tau)
    loss_law(model, monkeypatch, tau, 2.5)


@pytest.mark.parametrize("rival", [MeanOverPlaces, MeanOverCodes, NegativeEntropy])
def test_wrong_kl_scale_is_detected(rival: Any, shifted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(shifted, beta=2.5, temperature=1.0)
    model.__class__ = rival
    with pytest.raises(AssertionError):
        loss_law(model, monkeypatch, 1.0, 2.5)


# ---- gumbel_vq_vae and dvae: temperature -----------------------------------------------------------------------------


def test_temperature_decays_geometrically() -> None:
    model: Any = aezoo.create_model(
        "gumbel_vq_vae", SHAPE, **SMALL, start_temperature=2.0, temperature=0.5, temperature_steps=10
    )
    for steps, tau in ((0, 2.0), (5, 1.0), (10, 0.5), (77, 0.5)):
        model.steps.fill_(steps)
        assert float(model.tau()) == pytest.approx(tau)
    assert model.quantiser.temperature == 2
    model.temperature_steps = 0
    model.steps.zero_()
    assert float(model.tau()) == 0.5
