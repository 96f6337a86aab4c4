"""Laws of BatchTopK sparse autoencoder (Bussmann et al. 2024)."""

from typing import Any

import numpy as np
import pytest
import torch
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from topk_sae_laws import (  # noqa: F401
    SHAPE,
    SMALL,
    build,
    create,
    data,
    positive,
    test_a_fit_keeps_unit_norm_and_starts_from_data,
    test_auxk_does_not_add_the_bias_a_second_time,
    test_auxk_trains_dead_latents_only,
    test_data_init_runs_once_and_only_if_enabled,
    test_data_init_sets_bias_to_median_and_encoder_scale,
    test_invalid_topk_values_are_refused,
    test_resumed_fit_equals_uninterrupted_fit,
    test_two_ranks_select_same_latents_as_one_process,
    with_dead_latents,
)

from aezoo.models.sparse.batch_topk_sae import RunningMean

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- topk_sae: Gao et al. 2024 ---------------------------------------------------------------------------------------


def test_auxk_of_no_dead_latents_is_not_computed(shifted: Any, monkeypatch: Any) -> None:
    """On a CPU, where the check for dead latents needs no synchronisation."""
    model, x, asked = with_dead_latents("batch_topk_sae", shifted), data(6), []
    sum_of_directions = model.decoder.sum_of_directions
    monkeypatch.setattr(
        model.decoder, "sum_of_directions", lambda *active: asked.append(1) or sum_of_directions(*active)
    )
    assert model.loss(x)["aux"] > 0 and len(asked) == 1
    model.since_fired_N.zero_()
    assert model.loss(x)["aux"] == 0 and len(asked) == 1


# ---- batch_topk_sae: Bussmann et al. 2024 ----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 9])
def test_training_selects_top_latents_over_batch(n: int, shifted: Any) -> None:
    model, x = positive("batch_topk_sae", shifted), data(n)
    pi = model.pre_activations(x).detach()
    f = model.top_of_batch(pi, 3)
    assert (f > 0).sum() == 3 * n
    assert model.loss(x)["l0"] == 3
    cut = np.sort(pi.numpy().ravel())[-3 * n]
    torch.testing.assert_close(f, torch.where(pi >= cut, pi, 0))
    torch.testing.assert_close(model.loss(x)["nll"], model.nll(model.decoder(f), x).mean())
    if n == 9:
        assert (f > 0).sum(1).unique().numel() > 1


def test_ties_select_at_most_k_latents_per_sample() -> None:
    """Many values are equal in bf16: a threshold would select all of them."""
    model = build("batch_topk_sae")
    pi = torch.ones(4, 12).bfloat16() + torch.rand(4, 12).bfloat16() / 64
    f = model.top_of_batch(pi, 3)
    assert (f > 0).sum() == 12
    cut = pi.flatten().topk(12).values[-1]
    assert (pi >= cut).sum() > 12


def test_negative_pre_activations_are_never_taken(shifted: Any) -> None:
    model = positive("batch_topk_sae", shifted, k=12)
    pi = model.pre_activations(data(4)) - 2
    f = model.top_of_batch(pi, 12)
    assert torch.equal(f, pi.relu())
    assert 0 < (f > 0).sum() < f.numel()
    assert model.theta.value > 0  # the smallest positive selected activation
    before = model.theta.value.clone(), model.theta.steps.clone()
    model.top_of_batch(-pi.abs(), 12)  # no latent is active: there is no activation to average
    assert (model.theta.value, model.theta.steps) == before


@pytest.mark.parametrize("settings", [{"k": 12}, {"n": 1}], ids=["all latents", "one sample"])
def test_full_k_or_single_sample_equals_topk(settings: dict[str, int], shifted: Any) -> None:
    k, x, found = settings.get("k", 3), data(settings.get("n", 6)), []
    for name in ("topk_sae", "batch_topk_sae"):
        torch.manual_seed(0)
        model = with_dead_latents(name, shifted, k=k, aux_weight=0.5)
        terms = model.loss(x)
        found.append([*terms.values(), *torch.autograd.grad(terms["loss"], [*model.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_threshold_is_mean_of_least_activations(shifted: Any) -> None:
    model, least = positive("batch_topk_sae", shifted, theta_decay=0.75), []
    for n in (3, 5, 4, 6, 2, 7):
        x = data(n) * n
        pi = model.pre_activations(x).detach().numpy()
        least.append(np.sort(pi.ravel())[-3 * n])
        model.train().loss(x)
        model.eval().loss(data(4))  # not updated in evaluation
    expected = np.mean(least[:4])
    for value in least[4:]:
        expected = 0.75 * expected + 0.25 * value
    assert model.theta.value.item() == pytest.approx(expected, rel=1e-6)
    assert {"theta.value", "theta.steps"} <= model.state_dict().keys()


def test_bf16_model_keeps_float32_threshold() -> None:
    """SAELens PR #728: a running mean near 1 does not change in bf16, since 1 + 1/1000 rounds to 1."""
    mean, rival = RunningMean(0.999), torch.ones((), dtype=torch.bfloat16)
    mean.update(torch.ones(()))
    mean.bfloat16()
    assert mean.value.dtype == torch.float32
    for _ in range(3000):
        mean.update(torch.tensor(2.0).bfloat16())
        rival.lerp_(torch.tensor(2.0).bfloat16(), 0.001)
    assert mean.value.item() == pytest.approx(2 - 1 / 1000 * 0.999**2001, rel=1e-4)
    assert rival == 1
    model = create("batch_topk_sae", input_shape=SHAPE, **SMALL)
    assert model.bfloat16().theta.value.dtype == torch.float32
    assert model.to(torch.float16).theta.steps.dtype == torch.long


def test_code_does_not_depend_on_rest_of_batch(shifted: Any) -> None:
    model, x = positive("batch_topk_sae", shifted), data(6)
    model.theta.value.fill_(2.5)
    for training in (True, False):  # a callback may encode in training mode on one rank only
        found = model.train(training).encode(x)
        pi = model.pre_activations(x)
        assert torch.equal(found, pi * (pi >= 2.5))
        assert 0 < (found > 0).sum() < (pi > 0).sum()
        torch.testing.assert_close(model.encode(x[:1]), found[:1])
    assert model.theta.steps == 0
    torch.testing.assert_close(model.eval().loss(x)["nll"], model.score(x).mean())
    pi = torch.tensor([[2.5, 2.4999, -1.0, 3.0]], dtype=torch.float64)
    assert model.above_threshold(pi).tolist() == [[2.5, 0, 0, 3.0]]


@pytest.mark.slow
def test_the_threshold_reproduces_the_number_of_active_latents() -> None:
    truth = torch.nn.functional.normalize(torch.randn(16, 24), dim=1)
    x = (torch.rand(4000, 16) + 0.5) * (torch.rand(4000, 16) < 0.15) @ truth
    model = create("batch_topk_sae", input_shape=(24,), latent_dim=32, k=3).train()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(400):
        optimizer.zero_grad()
        model.loss(x[torch.randint(4000, (256,))])["loss"].backward()
        model.on_before_optimizer_step(optimizer)
        optimizer.step()
        model.decoder.normalise()
    l0 = (model.eval().encode(x) > 0).sum(1).double().mean()
    assert l0.item() == pytest.approx(3, rel=0.15)
    model.theta.value.zero_()  # every positive latent is active
    assert (model.encode(x) > 0).sum(1).double().mean() > 2 * l0
