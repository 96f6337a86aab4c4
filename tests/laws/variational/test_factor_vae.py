"""Laws of FactorVAE (Kim & Mnih 2018)."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from adversarial_laws import (  # noqa: F401
    CODE,
    images,
    player_parameters,
    small,
    test_beta_and_capacity_apply_to_kl_term,
    test_inference_equals_vae,
    test_no_term_reaches_other_networks,
    test_one_backward_gives_each_network_its_gradient,
    test_player_parameters_partition_the_model,
    test_resumed_networks_use_requested_learning_rates,
    test_training_matches_separate_optimisers,
    test_two_ranks_equal_one_process,
    test_zero_logits_cost_log_2_per_term,
    trained,
)
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from torch import Tensor

import aezoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

# ---- FactorVAE -------------------------------------------------------------------------------------------------------


def test_factor_vae_with_gamma_0_trains_like_the_vae(shifted: Any, quiet: Any) -> None:
    batches = [images(6, seed) for seed in range(6)]
    vae = shifted(small("vae", lr_schedule="cosine"))
    start = {name: p.clone() for name, p in vae.state_dict().items()}
    found = {}
    for gamma in (0.0, 5.0):
        model = small("factor_vae", gamma=gamma, lr_schedule="cosine")
        model.load_state_dict(model.state_dict() | start)
        trained(model, batches, quiet)
        found[gamma] = model.state_dict()
    trained(vae, batches, quiet)
    for name, p in vae.state_dict().items():
        torch.testing.assert_close(found[0.0][name], p, rtol=0, atol=1e-5)
        torch.testing.assert_close(found[0.0][name], p, rtol=1e-9, atol=1e-12)
        assert not torch.equal(p, start[name])
    assert max((found[5.0][name] - p).abs().max() for name, p in vae.state_dict().items()) > 1e-4


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_zero_gamma_has_vae_loss_and_gradient(training: bool, shifted: Any) -> None:
    vae, model, x, found = shifted(small("vae")), small("factor_vae", gamma=0.0), images(), []
    model.load_state_dict(model.state_dict() | vae.state_dict())
    for each in (model, vae):
        torch.manual_seed(3)
        found.append(each.train(training).loss(x))
        found[-1]["loss"].backward()
    for term in ("loss", "nll", "kl", "elbo"):
        torch.testing.assert_close(found[0][term], found[1][term], rtol=0, atol=1e-5)
        torch.testing.assert_close(found[0][term], found[1][term], rtol=1e-12, atol=1e-12)
    for p, q in zip(player_parameters(model)["vae"], vae.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def test_permuted_codes_keep_marginals_and_are_independent() -> None:
    model = small("factor_vae")
    z = torch.randn(4000, 1, dtype=torch.float64) + 0.3 * torch.randn(4000, CODE, dtype=torch.float64)
    permuted = model.permute_dims(z)
    assert torch.equal(permuted.sort(0).values, z.sort(0).values)
    off = ~torch.eye(CODE, dtype=torch.bool)
    assert np.corrcoef(z.T.numpy())[off.numpy()].min() > 0.8
    assert np.abs(np.corrcoef(permuted.T.numpy())[off.numpy()]).max() < 0.08
    # permuting whole rows or whole columns keeps the dependence
    assert np.corrcoef(z[torch.randperm(4000)].T.numpy())[off.numpy()].min() > 0.8
    columns = z[:, torch.randperm(CODE)]
    assert np.corrcoef(columns.T.numpy())[off.numpy()].min() > 0.8


def test_column_permutations_are_equally_likely() -> None:
    model, z = small("factor_vae"), torch.arange(3, dtype=torch.float64)[:, None].expand(3, CODE)
    orders = torch.cat([model.permute_dims(z).T for _ in range(1200)])
    codes, counts = (orders @ torch.tensor([9.0, 3.0, 1.0]).double()).unique(return_counts=True)
    assert len(codes) == 6
    chi2 = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi2 < 20.5  # 99.9 % quantile for 5 degrees of freedom


def at(model: Any, z: Tensor) -> Any:
    """The model with a posterior concentrated at the given codes."""
    model.posterior = lambda x: (z, torch.full_like(z, -60.0))
    return model


@pytest.mark.slow
def test_optimal_discriminator_is_log_density_ratio() -> None:
    """For a Gaussian with correlation rho: TC = -1/2 log(1 - rho^2), and t(z) is the log ratio at every point."""
    rho, n = 0.8, 1024
    model: Any = aezoo.create_model(
        "factor_vae", input_shape=(1,), latent_dim=2, hidden_dims=(), discriminator_dims=(64, 64)
    )
    joint = D.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, rho], [rho, 1.0]]))
    x = torch.rand(n, 1)
    adam = torch.optim.Adam(model.discriminator.parameters(), 3e-3, (0.5, 0.9))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 500)
    for _ in range(500):
        loss = at(model, joint.sample((n,))).loss(x)["loss"]
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    z = joint.sample((20_000,))
    with torch.no_grad():
        terms = at(model, z).loss(torch.rand(20_000, 1))
        t = model.discriminator(z)[:, 0]
    normal = D.Normal(0.0, 1.0)
    ratio = joint.log_prob(z) - normal.log_prob(z).sum(1)
    tc = -0.5 * math.log(1 - rho**2)
    assert ratio.mean().item() == pytest.approx(tc, abs=0.02)
    assert terms["tc"].item() == pytest.approx(tc, abs=0.04)
    assert (t - ratio).square().mean().sqrt() < 0.15
    # the least loss of the discriminator is log 2 minus the Jensen-Shannon divergence
    product = normal.sample((20_000, 2))
    other = joint.log_prob(product) - normal.log_prob(product).sum(1)
    least = 0.5 * (F.softplus(-ratio).mean() + F.softplus(other).mean())
    assert least < 0.6
    assert terms["discriminator"].item() == pytest.approx(least.item(), abs=0.01)


@pytest.mark.slow
def test_independent_codes_have_zero_total_correlation() -> None:
    model: Any = aezoo.create_model(
        "factor_vae", input_shape=(1,), latent_dim=2, hidden_dims=(), discriminator_dims=(32,)
    )
    adam = torch.optim.Adam(model.discriminator.parameters(), 3e-3)
    for _ in range(200):
        terms = at(model, torch.rand(1024, 2) ** 2).loss(torch.rand(1024, 1))
        adam.zero_grad()
        terms["loss"].backward()
        adam.step()
    assert terms["discriminator"].item() == pytest.approx(math.log(2), abs=5e-3)
    assert terms["tc"].item() == pytest.approx(0, abs=0.03)
