"""Laws of Learned compression with several rates in one model (Cui et al. 2021)."""

import math
from typing import Any

import pytest
import torch
from compression_laws import (  # noqa: F401
    SHAPE,
    SMALL,
    data,
    small,
    test_bf16_symbols_determine_code,
    test_bits_are_counted_per_position_for_vectors_and_maps,
    test_codes_are_encoder_output_within_half_a_step,
    test_gradients_of_both_terms_are_finite_differences,
    test_loss_is_negative_elbo_with_uniform_posterior,
    test_loss_matches_paper_rate_distortion,
    test_rate_and_distortion_train_expected_networks,
    test_sampled_symbols_follow_model_distribution,
    test_score_is_evaluation_loss_per_sample,
    test_side_information_passes_gradients_to_code,
    test_symbol_distributions_are_causal,
    test_symbols_determine_code_and_reconstruction,
)
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from scipy import stats

import aezoo
from aezoo.bases.entropy_coded import AdditiveNoise, Rounding
from aezoo.errors import AezooError

# ---- coded symbols and their order -----------------------------------------------------------------------------------


LAMS = (0.002, 0.01, 0.03)


@pytest.mark.parametrize("training", [True, False])
def test_unit_gains_equal_mean_scale_hyperprior(training: bool) -> None:
    """At each quality with its own lam in evaluation; training uses one quality."""
    x = data()
    for lams in ((0.01,),) if training else ((0.01,), LAMS):
        one = small("gained_hyperprior", lams=lams).train(training)
        with torch.no_grad():
            one.log_gain_SM.zero_()
            one.log_inverse_SM.zero_()
        for s, lam in enumerate(lams):
            two = small("mean_scale_hyperprior", lam=lam).train(training)
            two.load_state_dict({key: value for key, value in one.state_dict().items() if key[:4] != "log_"})
            one.quality = s
            torch.manual_seed(0)
            found = one.loss(x)
            torch.manual_seed(0)
            if training:
                torch.rand(len(x))
            expected = two.loss(x)
            for term, value in expected.items():
                torch.testing.assert_close(found[term], value)
            torch.testing.assert_close(one.score(x), two.score(x))
            assert torch.equal(one.encode_symbols(x), two.encode_symbols(x))


def test_code_is_rounded_in_steps_of_quality_gain() -> None:
    model, x = small("gained_hyperprior", lams=LAMS).eval(), data()
    parent, y = small("mean_scale_hyperprior").eval(), model.encoder(x)
    parent.load_state_dict({key: value for key, value in model.state_dict().items() if key[:4] != "log_"})
    for s in range(3):
        model.quality = s
        gain, inverse = (of[s].exp().view(-1, 1, 1) for of in (model.log_gain_SM, model.log_inverse_SM))
        torch.testing.assert_close(model.encode(x), parent.code_latents(Rounding(), gain * y, len(x)) * inverse)


def test_gains_and_lambda_are_interpolated_geometrically() -> None:
    model, x = small("gained_hyperprior", lams=LAMS).eval(), data()
    for s, part in ((0, 0.25), (1, 0.7)):
        model.quality = s + part
        found = model.loss(x)
        between = small("gained_hyperprior", lams=(LAMS[s] ** (1 - part) * LAMS[s + 1] ** part,)).eval()
        state = model.state_dict()
        for name in ("log_gain_SM", "log_inverse_SM"):
            low, high = state[name][s].exp(), state[name][s + 1].exp()
            state[name] = (low ** (1 - part) * high**part).log()[None]
        between.load_state_dict(state)
        for term, value in between.loss(x).items():
            torch.testing.assert_close(found[term], value)
        torch.testing.assert_close(model.score(x), between.score(x))


def test_training_draws_quality_per_sample_with_its_lambda() -> None:
    model, x = small("gained_hyperprior", lams=LAMS).train(), data(12)
    torch.manual_seed(3)
    found = model.loss(x)
    expected = torch.zeros(12, dtype=torch.float64)
    for s, lam in enumerate(LAMS):
        torch.manual_seed(3)
        drawn, noise = (3 * torch.rand(12)).long(), AdditiveNoise()
        y_hat = model.code_with_gains(noise, model.encoder(x), 12, [float(s == other) for other in range(3)])
        loss_B = noise.rate_B + lam * 255**2 * math.log(2) / SHAPE[0] * model.nll(model.decoder(y_hat), x)
        assert bool((drawn == s).any())
        expected = torch.where(drawn == s, loss_B, expected)
    torch.testing.assert_close(found["loss"], expected.mean())


def test_qualities_are_drawn_equally_often() -> None:
    model = aezoo.create_model("gained_hyperprior", (3,), net="mlp", hidden_dims=(4,), lams=LAMS).train()
    seen: list[Any] = []
    original = model.code_with_gains
    model.code_with_gains = lambda *given: seen.append(given[-1]) or original(*given)  # type: ignore[func-returns-value]
    model.loss(torch.rand(3000, 3))
    counts = [int(share.sum()) for share in seen[0]]
    assert sum(counts) == 3000 and stats.chisquare(counts).pvalue > 1e-4


def test_gains_learn_from_the_samples_of_their_quality() -> None:
    """The gains get gradients of rate and distortion, the inverse gains of distortion only."""
    model, x = small("gained_hyperprior", lams=LAMS).train(), data(2)
    torch.manual_seed(0)
    drawn = {*(3 * torch.rand(2)).long().tolist()}
    assert 0 < len(drawn) < 3
    torch.manual_seed(0)
    terms = model.loss(x)
    for p, of in ((model.log_gain_SM, ("rate", "nll", "loss")), (model.log_inverse_SM, ("nll", "loss"))):
        for term in of:
            (slope,) = torch.autograd.grad(terms[term], p, retain_graph=True)
            assert {s for s in range(3) if bool((slope[s] != 0).all())} == drawn
            assert {s for s in range(3) if bool((slope[s] != 0).any())} == drawn
    assert torch.autograd.grad(terms["rate"], model.log_inverse_SM, allow_unused=True, retain_graph=True)[0] is None


def test_initial_gains_scale_error_inversely_with_lambda() -> None:
    model = aezoo.create_model("gained_hyperprior", SHAPE, lams=LAMS, **SMALL)
    step = model.log_inverse_SM.exp()
    torch.testing.assert_close(step[0] ** 2 / step[2] ** 2, torch.full((5,), LAMS[2] / LAMS[0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(step * model.log_gain_SM.exp(), torch.ones(3, 5))
    torch.testing.assert_close(step.log().mean(0), torch.zeros(5))


def test_invalid_qualities_and_lambdas_are_refused() -> None:
    model = aezoo.create_model("gained_hyperprior", SHAPE, lams=LAMS, **SMALL)
    assert model.quality == model.max_quality == 2
    for value in (-0.1, 2.1, math.nan):
        with pytest.raises(AezooError, match="quality must be from 0 to 2, one of each lam"):
            model.quality = value
    for lams in ((), (0.1, 0.01), (0.0, 0.1), (0.1, math.inf), (math.nan,)):
        with pytest.raises(AezooError, match=r"lams must be numbers above 0 that rise|lams takes a list"):
            type(model)(SHAPE, lams=lams)
