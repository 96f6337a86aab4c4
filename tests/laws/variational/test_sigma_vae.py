"""Laws of the optimal sigma-VAE, a calibrated decoder (Rybkin et al. 2021)."""

import math
from typing import Any

import pytest
import torch
import torch.distributions as D
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from objective_laws import (  # noqa: F401
    SHAPE,
    build_pair,
    gradients,
    images,
    losses,
    reference_kl,
    same,
    small,
    test_beta_and_capacity_apply_to_kl_term,
    test_invalid_values_are_refused,
    test_two_ranks_equal_one_process,
)
from scipy.optimize import minimize_scalar
from torch import Tensor

import aezoo

# ---- optimal sigma: Rybkin et al. 2021 -------------------------------------------------------------------------------


def errors(model: Any, x: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The loss terms, the reconstruction of the drawn code, and the squared errors of all values."""
    seen: list[Tensor] = []
    hook = model.decoder.register_forward_hook(lambda _, inputs, output: seen.append(output))
    terms = model.loss(x)
    hook.remove()
    return terms, seen[0], (x - seen[0]) ** 2


def test_sigma_minimises_loss(shifted: Any) -> None:
    """s^2 is the MSE, s minimises the loss by scipy, and the loss is that of torch's normal with this s."""
    model, x = shifted(small("sigma_vae")), images(9) * 3
    terms, x_hat, squared = errors(model, x)
    assert terms["sigma"].item() ** 2 == pytest.approx(squared.mean().item(), rel=1e-12)

    def nll(log_s: float) -> float:
        return float(-D.Normal(x_hat.detach(), math.exp(log_s)).log_prob(x).flatten(1).sum(1).mean())

    best = minimize_scalar(nll, bounds=(-5, 5), method="bounded", options={"xatol": 1e-9})
    assert math.log(terms["sigma"].item()) == pytest.approx(best.x, abs=1e-6)
    assert terms["nll"].item() == pytest.approx(best.fun, rel=1e-9)
    assert terms["nll"].item() == pytest.approx(18 / 2 * math.log(2 * math.pi * math.e * squared.mean().item()))
    kl = reference_kl(*model.posterior(x)).mean()
    torch.testing.assert_close(terms["loss"], terms["nll"] + kl)
    torch.testing.assert_close(terms["elbo"], -terms["loss"])
    assert abs(terms["sigma"].item() - 1) > 0.05


def test_sigma_needs_no_gradient(shifted: Any) -> None:
    """dL/ds = 0 at the optimum, so the weights' gradient is that of the loss with s^2 written as the MSE."""
    model, x = shifted(small("sigma_vae")), images(9)
    terms, _, squared = errors(model, x)
    written_out = 18 / 2 * torch.log(2 * math.pi * math.e * squared.mean())
    same(terms["nll"], written_out, tuple(model.parameters()))
    log_s = (0.5 * squared.mean().log()).detach().requires_grad_()
    nll = (squared.detach().flatten(1).sum(1) * torch.exp(-2 * log_s) / 2 + 18 * log_s).mean()
    assert abs(torch.autograd.grad(nll, log_s)[0]) < 1e-12
    # it is not 0 elsewhere, and a fixed sigma gives other gradients
    assert any(
        g.abs().max() > 1e-3
        for g in gradients(terms["nll"] - squared.flatten(1).sum(1).mean(), tuple(model.parameters()))
    )


def test_fixed_sigma_equals_gaussian_vae(shifted: Any) -> None:
    sigma_vae, _ = build_pair("sigma_vae", {}, shifted)
    x = images(9)
    torch.manual_seed(3)
    sigma = sigma_vae.train().loss(x)["sigma"].item()
    vae = small("vae", likelihood=f"gaussian:{sigma!r}")
    vae.likelihood.log_scale.fill_(math.log(sigma))
    vae.load_state_dict({k: v for k, v in sigma_vae.state_dict().items() if k in vae.state_dict()})
    mine, theirs = losses(sigma_vae, vae, x=x)
    for term in ("loss", "nll", "kl", "elbo"):
        torch.testing.assert_close(mine[term], theirs[term])
    for p, q in zip(sigma_vae.parameters(), vae.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    # evaluation, scores and importance weights use the sigma of the likelihood
    sigma_vae.likelihood.log_scale.fill_(math.log(sigma))
    mine, theirs = losses(sigma_vae, vae, x=x[:4], training=False)
    for term in ("loss", "nll", "kl", "elbo"):
        torch.testing.assert_close(mine[term], theirs[term])
    found = []
    for each in (sigma_vae, vae):
        torch.manual_seed(5)
        found.append([each.score(x), each.log_likelihood(x, 10), each(x)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(sigma_vae.score(x)[:2], sigma_vae.score(x[:2]))


def test_evaluation_uses_running_mean_of_sigma(shifted: Any, tmp_path: Any) -> None:
    """With constant weights the running mean of log sigma tends to the batch's value; evaluation does not update it."""
    model, x = shifted(small("sigma_vae")), images(9) * 5
    start = model.likelihood.log_scale.item()
    sigmas = [model.loss(x)["sigma"].item() for _ in range(60)]
    expected = start
    for sigma in sigmas:
        expected = 0.9 * expected + 0.1 * math.log(sigma)
    assert model.likelihood.log_scale.item() == pytest.approx(expected, abs=1e-9)
    assert abs(start - expected) > 0.1
    model.eval()
    assert model.loss(x * 2)["sigma"].item() == pytest.approx(math.exp(expected), rel=1e-9)
    assert model.likelihood.log_scale.item() == pytest.approx(expected, abs=1e-9)
    model.float()
    loaded = aezoo.load_model(aezoo.save_model(model, tmp_path / "a"))
    assert torch.equal(loaded.score(x.float()), model.score(x.float()))


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e12])
def test_sigma_is_finite_for_extreme_errors(scale: float) -> None:
    model = small("sigma_vae").float()
    x = torch.full((4, *SHAPE), scale)
    with torch.no_grad():
        for p in model.decoder.parameters():
            p.zero_()
    for training in (True, False):
        terms = model.train(training).loss(x)
        terms["loss"].backward()
        values = [*terms.values(), *(p.grad for p in model.parameters() if p.grad is not None), model.score(x)]
        assert all(torch.isfinite(v).all() for v in values)
