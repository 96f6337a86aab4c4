"""Laws of AbsTopK sparse autoencoder (Zhu et al. 2025)."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from archetypal_sae_laws import (  # noqa: F401
    DEAD,
    SHAPE,
    build,
    create,
    data,
    largest,
    same_gradients,
    test_invalid_values_are_refused,
)
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from topk_sae_laws import (  # noqa: F401
    test_a_fit_keeps_unit_norm_and_starts_from_data,
    test_auxk_does_not_add_the_bias_a_second_time,
    test_auxk_trains_dead_latents_only,
    test_data_init_runs_once_and_only_if_enabled,
    test_resumed_fit_equals_uninterrupted_fit,
)
from torch import Tensor

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- abs_topk_sae: Zhu et al. 2025 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", ["dense", "gather"])
@pytest.mark.parametrize("k", [1, 3, 12])
def test_code_keeps_k_largest_magnitudes_with_gradients(k: int, decode: str, shifted: Any) -> None:
    model, x = shifted(build("abs_topk_sae", k=k, decode=decode, multi_weight=0.125)), data(20) * 4 - 2
    W, V, b = model.encoder.weight, model.decoder.W_NX, model.decoder.b_X
    pi = (x.flatten(1) - b) @ W.T + model.encoder.bias
    f = largest(pi, k)
    torch.testing.assert_close(model.encode(x), f)
    assert (f < 0).any(1).float().mean() > 0.2 < (f > 0).any(1).float().mean()
    torch.testing.assert_close(model(x).flatten(1), f @ V + b)
    terms = model.loss(x)
    assert terms["l0"] == k
    wide = largest(pi, min(4 * k, 12)) @ V + b
    sse = [(x.flatten(1) - x_hat).square().sum(1).mean() + 12 * math.log(math.pi) for x_hat in (f @ V + b, wide)]
    torch.testing.assert_close(terms["loss"], sse[0] + sse[1] / 8)
    same_gradients(model, terms["loss"], sse[0] + sse[1] / 8)


def test_negated_sample_has_negated_code(shifted: Any) -> None:
    """With respect to b_pre and without b_enc; TopK selects other latents."""
    for name, odd in (("abs_topk_sae", True), ("topk_sae", False)):
        model, x = shifted(build(name)), data(9) * 4 - 2
        with torch.no_grad():
            model.encoder.bias.zero_()
        b = model.decoder.b_X.view(SHAPE)
        opposite = 2 * b - x
        assert torch.allclose(model.encode(opposite), -model.encode(x)) == odd
        assert torch.allclose(model(opposite) - b, b - model(x)) == odd
        with torch.no_grad():
            model.encoder.bias += 1
        assert not torch.allclose(model.encode(opposite), -model.encode(x))


def best_sum(x: Tensor, V: Tensor, k: int, lowest: float) -> Tensor:
    """||x - x_hat||^2 of the best combination of k directions, by least squares over all choices of k."""
    found = []
    for row in x.numpy():
        errors = []
        for which in itertools.combinations(range(len(V)), k):
            D = V[list(which)].numpy().T
            errors.append(2 * scipy.optimize.lsq_linear(D, row, (lowest, np.inf)).cost)
        found.append(min(errors))
    return torch.tensor(found)


def test_orthonormal_topk_is_best_k_term_approximation() -> None:
    """TopK is the best only among those with non-negative coefficients."""
    x, errors = torch.randn(4, 8, dtype=torch.float64) * 2, {}
    V = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q[:6]
    for name, lowest in (("abs_topk_sae", -np.inf), ("topk_sae", 0)):
        model = create(name, input_shape=(8,), latent_dim=6, k=2).double()
        with torch.no_grad():
            model.decoder.W_NX.copy_(V)
            model.encoder.weight.copy_(V)
            model.decoder.b_X.fill_(0.3)
            errors[name] = (x - model(x)).square().sum(1)
        torch.testing.assert_close(errors[name], best_sum(x - 0.3, V, 2, lowest), rtol=1e-6, atol=1e-9)
    assert (errors["abs_topk_sae"] <= errors["topk_sae"] + 1e-9).all()
    assert (errors["abs_topk_sae"] < errors["topk_sae"] - 1e-2).any()


@pytest.mark.parametrize("aux_scale", ["sse", "variance"])
@pytest.mark.parametrize("decode", ["dense", "gather"])
def test_positive_pre_activations_equal_topk(decode: str, aux_scale: str, shifted: Any) -> None:
    x, found = data(6), []
    settings = {"decode": decode, "aux_scale": aux_scale, "multi_weight": 0.3, "aux_weight": 0.7, "k_aux": 4}
    for name in ("topk_sae", "abs_topk_sae"):
        torch.manual_seed(3)
        model = shifted(build(name, dead_after=100, **settings))
        with torch.no_grad():
            model.encoder.bias += 20
            model.encoder.bias[DEAD] -= 15
        model.since_fired_N[DEAD] = 100
        assert (model.pre_activations(x) > 0).all()
        terms = model.loss(x)
        assert terms["aux"] > 0
        gradients = torch.autograd.grad(terms["loss"], [*model.parameters()])
        found.append([*terms.values(), model.encode(x), *gradients, model.since_fired_N.double()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k_aux", [1, 2, 3, 6])
def test_auxk_uses_dead_latents_of_both_signs_only(k_aux: int, shifted: Any) -> None:
    model, x = shifted(build("abs_topk_sae", dead_after=100, k_aux=k_aux, aux_weight=0.5)), data(5)
    with torch.no_grad():  # live latents have larger pre-activations
        model.encoder.bias += 20 * torch.tensor([1.0, -1.0]).repeat(6)
        model.encoder.bias[DEAD] /= 4
    model.since_fired_N[DEAD] = 100
    terms = model.loss(x)
    pi = model.pre_activations(x)
    assert (pi[:, DEAD] > 0).any() and (pi[:, DEAD] < 0).any()
    e = (x - model(x)).detach().flatten(1)
    e_hat = largest(pi[:, DEAD], k_aux) @ model.decoder.W_NX[DEAD]
    expected = (e - e_hat).square().sum(1).mean() * min(3 / k_aux, 1)
    torch.testing.assert_close(terms["aux"], expected)
    same_gradients(model, terms["aux"], expected)
    torch.testing.assert_close(terms["loss"], terms["nll"] + 0.5 * expected)
    model.since_fired_N.zero_()
    assert model.loss(x)["aux"] == 0


def test_negative_latents_count_as_active(shifted: Any) -> None:
    model, expected = shifted(build("abs_topk_sae", dead_after=20)), torch.zeros(12, dtype=torch.long)
    with torch.no_grad():
        model.encoder.bias[:6] -= 4
    for n in (2, 9, 4):
        x = data(n) - 0.5
        f = largest(model.pre_activations(x), 3)
        expected = torch.where((f != 0).any(0), 0, expected + n)
        terms = model.train().loss(x)
        assert torch.equal(model.since_fired_N, expected)
        assert terms["dead_latents"] == ((expected >= 20).sum() / 12).item()
    assert ((f < 0).any(0) & ~(f > 0).any(0)).any()
    assert (expected > 0).any()


def test_data_init_scales_encoder_for_signed_sums(shifted: Any) -> None:
    model, x = shifted(build("abs_topk_sae", data_init=True)).train(), data(30) ** 3 * 5
    model.begin_step(x, 0)
    b = model.decoder.b_X.detach()
    f = largest((x.flatten(1) - b) @ model.encoder.weight.T + model.encoder.bias, 3)
    lengths = [v.norm(dim=1).mean() for v in (x.flatten(1) - b, f @ model.decoder.W_NX)]
    torch.testing.assert_close(*lengths)
    assert (f < 0).any()


@pytest.mark.slow
def test_both_signs_of_direction_are_one_latent() -> None:
    """Known directions with coefficients of both signs, and as many latents: TopK would need twice as many."""
    truth = F.normalize(torch.randn(8, 24), dim=1)
    signs = torch.where(torch.rand(4000, 8) < 0.5, -1.0, 1.0)
    x = (torch.rand(4000, 8) + 0.5) * signs * (torch.rand(4000, 8) < 0.25) @ truth
    recovered = {}
    for name in ("abs_topk_sae", "topk_sae"):
        torch.manual_seed(0)
        model = create(name, input_shape=(24,), latent_dim=8, k=2, dead_after=2000).train()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(400):
            optimizer.zero_grad()
            model.loss(x[torch.randint(4000, (128,))])["loss"].backward()
            model.on_before_optimizer_step(optimizer)
            optimizer.step()
            model.after_optimizer_step()
        best = (truth @ model.decoder.W_NX.T).abs().amax(1)
        fvu = (x - model.eval()(x)).square().sum() / x.square().sum()
        recovered[name] = (int((best > 0.9).sum()), fvu.item())
    assert recovered["abs_topk_sae"][0] >= 7
    assert recovered["abs_topk_sae"][1] < 0.6 * recovered["topk_sae"][1]
