"""The second-stage VAE as a prior of codes: its density, its samples, and the random state."""

import numpy as np
import pytest
import torch

from aezoo.tasks import priors, priors_principal


def ring(n, seed):
    rng = np.random.default_rng(seed)
    angle, radius = rng.uniform(0, 2 * np.pi, n), 2 + 0.2 * rng.standard_normal(n)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


@pytest.fixture(scope="module")
def fitted():
    return priors.fit("two_stage", ring(1500, 0))


@pytest.mark.slow
def test_second_stage_prior_fits_ring_shaped_codes(fitted):
    drawn = np.linalg.norm(fitted.sample(4000, seed=0), axis=1)
    gaussian = np.linalg.norm(priors.fit("gaussian", ring(1500, 0)).sample(4000, seed=0), axis=1)
    # the mean distance of codes from the ring is 0.16
    assert np.abs(drawn - 2).mean() < 0.5 < 0.6 < np.abs(gaussian - 2).mean()
    held = ring(1000, 1)
    assert fitted.gain(held) > 0.3
    assert fitted.gain(held) == pytest.approx(
        (fitted.log_prob(held) - priors.fit("gaussian", ring(1500, 0)).log_prob(held)).mean(), abs=1e-6
    )


@pytest.mark.slow
def test_two_stage_density_is_normalised_and_matches_samples(fitted):
    side = np.linspace(-6, 6, 61)
    grid = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    p = np.exp(fitted.log_prob(grid)) * (side[1] - side[0]) ** 2
    assert p.sum() == pytest.approx(1, abs=0.03)
    drawn = fitted.sample(20_000, seed=0)
    assert (p[:, None] * grid).sum(0) == pytest.approx(drawn.mean(0), abs=0.06)
    assert (p * (grid**2).sum(1)).sum() == pytest.approx((drawn**2).sum(1).mean(), rel=0.04)
    # without the noise at t, as in the paper, samples would be narrower than the density
    scale = float(fitted.density.vae.likelihood.log_scale.detach().exp())
    assert 0.02 < scale < 0.9


@pytest.mark.slow
def test_two_stage_prior_of_gaussian_codes_is_near_gaussian():
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(2000, 4)) @ rng.normal(size=(4, 4)) + 3
    second = priors.fit("two_stage", codes)
    assert abs(second.gain(rng.normal(size=(500, 4)) @ np.linalg.cholesky(np.cov(codes.T)).T + codes.mean(0))) < 0.25
    drawn = second.sample(20_000, seed=0)
    scale = codes.std(0)
    assert np.abs((drawn.mean(0) - codes.mean(0)) / scale).max() < 0.15
    assert np.abs((np.cov(drawn.T) - np.cov(codes.T)) / np.outer(scale, scale)).max() < 0.2


@pytest.mark.slow
def test_prior_keeps_best_held_out_weights(monkeypatch):
    monkeypatch.setattr(priors_principal, "_PATIENCE", 10_000)
    codes = np.random.default_rng(0).normal(size=(60, 4))
    losses = []
    train = priors_principal._train

    def watched(model, nll, data):
        held = data[:6]
        before = model.state_dict

        def seen(*args, **kwargs):
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                losses.append(float(nll(held)))
            return before(*args, **kwargs)

        model.state_dict = seen
        train(model, nll, data)
        del model.state_dict
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            losses.append(float(nll(held)))

    monkeypatch.setattr(priors_principal, "_train", watched)
    fitted = priors.fit("two_stage", codes)
    assert losses[-1] == min(losses) < losses[0]
    # after 200 epochs 54 codes are memorised, but these weights are not kept
    assert fitted.gain(np.random.default_rng(1).normal(size=(500, 4))) > -1.5


@pytest.mark.slow
def test_fitting_and_sampling_keep_torch_rng_state():
    state = torch.get_rng_state()
    fitted = priors.fit("two_stage", ring(12, 0))
    fitted.sample(3, seed=0)
    fitted.log_prob(ring(3, 1))
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():  # as in a task
        priors.fit("two_stage", ring(12, 0))


@pytest.mark.slow
def test_wide_codes_keep_covariance_beyond_components(monkeypatch):
    monkeypatch.setattr(priors_principal, "_MAX_COMPONENTS", 2)
    monkeypatch.setattr(priors_principal, "_EPOCHS", 60)
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(600, 6)) @ rng.normal(size=(6, 6)) + 3
    drawn = priors.fit("two_stage", codes).sample(20_000, seed=0)
    scale = np.sqrt(np.diag(np.cov(codes.T)))
    assert np.abs((np.cov(drawn.T) - np.cov(codes.T)) / np.outer(scale, scale)).max() < 0.25
