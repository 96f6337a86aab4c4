"""Laws of dVAE, the discrete VAE of DALL-E (Ramesh et al. 2021)."""

import itertools
import math
from typing import Any

import numpy as np
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
from scipy import integrate, special
from torch import Tensor

import aezoo
import aezoo.distributions.categorical
from aezoo.models.quantised.dvae import LogitLaplaceWithScale

# ---- gumbel_vq_vae and dvae: the formula -----------------------------------------------------------------------------


def test_dvae_loss_matches_paper(shifted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nll is that of torch.distributions with the decoded scales; the KL has the weight of the current step."""
    model, x = tiny(shifted, "dvae", kl_steps=8, temperature_steps=6), vectors()
    g_BPK = D.Gumbel(torch.zeros(5, P, K).double(), 1.0).sample()
    with_noise(monkeypatch, g_BPK)
    logits_BPK = model.encoder(x).movedim(1, 2)
    for steps, beta in ((0, 0.0), (4, 3.3), (8, 6.6), (50, 6.6)):
        model.steps.fill_(steps)
        noisy = logits_BPK.log_softmax(2) + g_BPK
        z_q = torch.eye(K).double()[noisy.argmax(2)] @ model.quantiser.code_KC
        params = model.decoder(z_q.movedim(2, 1))
        assert params.shape == (5, 12)
        b = ((params[:, 6:].double().exp() * math.exp(5) + 1).log() - 5).exp()  # softplus keeps b above exp(-5)
        onto = [D.SigmoidTransform(), D.AffineTransform(-0.1 / 0.8, 1 / 0.8)]
        nll = -D.TransformedDistribution(D.Laplace(params[:, :6], b), onto).log_prob(x).sum(1).mean()
        found = model.eval().loss(x)
        torch.testing.assert_close(found["nll"], nll)
        torch.testing.assert_close(found["kl"], reference_kl(logits_BPK))
        torch.testing.assert_close(found["loss"], nll + beta * found["kl"])
        torch.testing.assert_close(found["elbo"], -nll - found["kl"])


@pytest.mark.parametrize("hard", [False, True])
def test_dvae_training_gradients_match_differences(hard: bool, shifted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of nll + beta KL at fixed noise; hard codes have the gradient of relaxed ones."""
    model, x = tiny(shifted, "dvae", kl_steps=8, temperature_steps=6, hard=hard).train(), vectors()
    g_BPK = D.Gumbel(torch.zeros(5, P, K).double(), 1.0).sample()
    with_noise(monkeypatch, g_BPK)
    model.steps.fill_(4)
    model.begin_step(x, 0)
    tau = 1 / 16 + 15 / 16 * math.cos(math.pi / 3) ** 2

    def value(offset: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        p_BPK = model.encoder(x).movedim(1, 2).softmax(2)
        y_BPK = ((p_BPK.log() + g_BPK) / tau).softmax(2)
        z_q = ((y_BPK + offset) @ model.quantiser.code_KC).movedim(2, 1)
        kl = (p_BPK * (p_BPK * K).log()).sum((1, 2)).mean()
        return model.nll(model.decoder(z_q), x).mean() + 3.3 * kl, y_BPK

    loss = model.loss(x)["loss"]
    with torch.no_grad():
        y_BPK = value()[1]
        offset = torch.eye(K).double()[y_BPK.argmax(2)] - y_BPK if hard else 0.0
        torch.testing.assert_close(loss, value(offset)[0], rtol=1e-6, atol=1e-8)
        weight = [p for p in model.encoder.parameters() if p.ndim == 2][-1]
    for parameter in (weight, model.quantiser.code_KC, [*model.decoder.parameters()][-1]):
        (found,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        with torch.no_grad():
            for place in (0, parameter.numel() // 2, parameter.numel() - 1):
                values = []
                for step in (1e-6, -1e-6):
                    parameter.view(-1)[place] += step
                    values.append(value(offset)[0])
                    parameter.view(-1)[place] -= step
                difference = (values[0] - values[1]) / 2e-6
                torch.testing.assert_close(found.view(-1)[place], difference, rtol=2e-4, atol=1e-5)


def test_dvae_scale_is_clamped_decoder_output() -> None:
    own: Any = aezoo.create_model("dvae", input_shape=(2, 4)).likelihood
    raw = torch.tensor([-1e4, -30.0, -5.0, -2.0, 0.0, 2.0, 1e4], dtype=torch.float64)
    mu, log_b = own.split(torch.stack([torch.zeros_like(raw), raw])[None])
    assert not mu.any()
    torch.testing.assert_close(log_b[0, 0, 3:6], raw[3:6], rtol=0, atol=0.05)
    assert (log_b[0, 0, :2] + 5).abs().max() < 1e-9 and log_b[0, 0, -1] == 5
    # the likelihood of a constant pixel has no maximum: the log-density stays finite
    assert own.log_prob(torch.tensor([[[10.0], [-1e4]]]), torch.ones(1, 1, 1)).isfinite().all()


@pytest.mark.parametrize("b", [0.01, 0.5, 2.9, 3.1, 20.0, 148.0])
def test_dvae_reconstruction_is_mean_at_any_scale(b: float) -> None:
    """Compared with scipy's quadrature, split where the logit is 0, up to the largest scale, exp(5)."""
    mu = np.array([-60.0, -8.0, -1.0, 0.0, 0.3, 4.0, 30.0])
    wanted = []
    for m in mu:
        cut = sorted({0.0, 60.0, *np.clip(abs(m) / b + np.array([-30, -4, 0, 4, 30]) / b, 0, 60)})
        parts = [
            integrate.quad(lambda t, m=m: math.exp(-t) * special.expit([m + b * t, m - b * t]).mean(), *ends)[0]
            for ends in itertools.pairwise(cut)
        ]
        wanted.append((sum(parts) - 0.1) / 0.8)
    raw = math.log(math.expm1(math.log(b) + 5)) - 5
    params = torch.from_numpy(np.stack([mu, np.full_like(mu, raw)]))[None]
    found = LogitLaplaceWithScale().double().mean(params)[0, 0]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1.2e-4)


@pytest.mark.parametrize("net", ["resnet", "conv", "vit", "mlp"])
def test_dvae_decodes_location_and_scale_per_value(net: str) -> None:
    for likelihood, maps in (("logit_laplace", 6), ("logit_laplace:learned", 3), ("bernoulli", 3)):
        model = aezoo.create_model("dvae", input_shape=(3, 8, 9), **SMALL, net=net, likelihood=likelihood).eval()
        z = model.encode(torch.rand(2, 3, 8, 9))
        assert model.decoder(z).shape == (2, maps, 8, 9)
        assert model.decode(z).shape == (2, 3, 8, 9)


# ---- gumbel_vq_vae and dvae: temperature -----------------------------------------------------------------------------


def test_dvae_schedules_are_half_cosines() -> None:
    """Tau falls from 1 to 1/16 and beta rises from 0 to 6.6, both flat at start and end."""
    model: Any = aezoo.create_model("dvae", SHAPE, **SMALL, temperature_steps=12, kl_steps=8)
    for steps in (0, 1, 3, 6, 9, 12, 40):
        model.steps.fill_(steps)
        left, done = min(1, steps / 12), min(1, steps / 8)
        tau = 1 / 16 + (1 - 1 / 16) * math.cos(math.pi / 2 * left) ** 2
        assert float(model.tau()) == pytest.approx(tau)
        assert float(model.kl_weight()) == pytest.approx(6.6 * math.sin(math.pi / 2 * done) ** 2, abs=1e-6)
    model.steps.fill_(6)
    assert float(model.tau()) == pytest.approx(17 / 32)
    for kl_steps, beta in ((8, 0.0), (0, 6.6)):
        model.kl_steps = kl_steps
        model.steps.zero_()
        assert float(model.kl_weight()) == pytest.approx(beta)


def test_best_params_minimise_deviance() -> None:
    made, x = LogitLaplaceWithScale().double(), torch.rand(200, 3, 2, dtype=torch.float64)
    best = made.best_params(x)
    assert made.deviance(best, x).abs().max() == 0
    for spread in (1e-4, 1e-2, 1, 10):
        assert made.deviance(best + spread * torch.randn_like(best), x).min() >= 0
    # log b is 5 in place of -5 for the 6 values of a sample: 10 nats each
    widest = best + torch.tensor([[0.0]] * 3 + [[200.0]] * 3)
    torch.testing.assert_close(made.deviance(widest, x), torch.full((200,), 60.0, dtype=torch.float64))
