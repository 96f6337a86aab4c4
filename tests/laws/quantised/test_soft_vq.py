"""Laws of SoftVQ-VAE, soft vector quantisation (Chen et al. 2024).

The model was compared with the authors' code, in float64 on equal networks, weights and batch, with one codebook and
cosine similarities, at tau 0.07 and 0.01. Differences are relative to the largest value; for gradients, the largest
over the parameters is given.

    https://github.com/Hhhhhhao/continuous_tokenizer, commit 7cc3e962cb4185e0f40a007ff140c059a6f6e84f
        modelling/quantizers/softvq.py, SoftVectorQuantizer  z_q 4.4e-15, nll 0, gradients of 53 parameters 5.2e-14
        ... gradient of the codes, detached in p as there    2.3e-15
        compute_entropy_loss at temperature 0.02             5.5e-6, gradients of 20 parameters 1.7e-7

Ours has temperature 2 tau. They add 1e-6 to E[p] in its logarithm, which causes the difference of the entropies.
Differs, see the model's docstring: they detach the codes in p, unlike the paper's formula and ours, which changes the
gradient of the codes by up to 1.8, and their entropies have a separate temperature. Without l2_norm they compare by dot
products, ours by distances.
"""

import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from token_laws import (  # noqa: F401
    DIM,
    SHAPE,
    SMALL,
    K,
    N,
    bernoulli,
    data,
    rows_of,
    small,
    squares,
    test_invalid_values_are_refused,
    test_number_of_tokens_is_independent_of_input_size,
    test_the_code_does_not_depend_on_the_decoder,
    unit,
)
from torch import Tensor
from two_ranks import on_two_ranks

from aezoo.models.quantised.soft_vq import SoftVQ
from aezoo.models.quantised.titok import TiTok
from aezoo.quantisers.vq import VQ
from aezoo.testing import SharedNoise

# ---- soft_vq: the mixture --------------------------------------------------------------------------------------------


def reference_mixtures(model: Any, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """P and z_q by scipy, (B, N, K), (B, N, D)."""
    rows, codes = rows_of(model, x), model.code_KD.detach().numpy()
    if model.cosine:
        rows, codes = unit(rows), unit(codes)
    p = scipy.special.softmax(-squares(rows, codes) / model.temperature, axis=-1)
    return p, p @ codes


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("temperature", [0.05, 0.14, 1.0, 7.0])
def test_the_mixture_is_the_softmax_of_squared_distances(temperature: float, cosine: bool, shifted: Any) -> None:
    model, x = small("soft_vq", shifted, temperature=temperature, cosine=cosine).eval(), data()
    z_q, p = model.mixtures(x)
    wanted_p, wanted_q = reference_mixtures(model, x)
    np.testing.assert_allclose(p.detach().numpy(), wanted_p, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(z_q.detach().numpy().swapaxes(1, 2), wanted_q, rtol=1e-8, atol=1e-12)
    assert torch.equal(model.encode(x), z_q)
    torch.testing.assert_close(model(x), model.decode(z_q))


def test_cosine_mixture_is_softmax_at_half_temperature(shifted: Any) -> None:
    """The paper's code divides cosines by 0.07."""
    model, x = small("soft_vq", shifted, temperature=0.14).eval(), data()
    cosines = F.cosine_similarity(model.encoder(x).transpose(1, 2)[:, :, None], model.code_KD, dim=-1)
    torch.testing.assert_close(model.mixtures(x)[1], (cosines / 0.07).softmax(-1))


@pytest.mark.parametrize("cosine", [True, False])
def test_temperature_limits_are_nearest_code_and_mean(cosine: bool, shifted: Any) -> None:
    model, x = small("soft_vq", shifted, temperature=1e-7, cosine=cosine).eval(), data()
    vq = VQ(DIM, K, update="gradient", cosine=cosine).double().eval()
    with torch.no_grad():
        vq.code_KD.copy_(model.code_KD)
    found = vq(model.encoder(x))
    torch.testing.assert_close(model.encode(x), found.z_q)
    assert len(found.indices.unique()) > 1
    terms = model.loss(x)
    assert terms["entropy"].item() == pytest.approx(0, abs=1e-9)
    share = np.bincount(found.indices.flatten().numpy(), minlength=K) / (6 * N)
    assert terms["diversity"].item() == pytest.approx(N * scipy.stats.entropy(share), rel=1e-9)

    model.temperature = 1e9
    codes = F.normalize(model.code_KD, dim=1) if cosine else model.code_KD
    torch.testing.assert_close(model.encode(x), codes.mean(0)[None, :, None].expand(6, DIM, N), rtol=1e-6, atol=1e-7)
    for name in ("entropy", "diversity"):
        assert model.loss(x)[name].item() == pytest.approx(N * math.log(K), rel=1e-9)


@pytest.mark.parametrize("cosine", [True, False])
def test_codes_and_tokens_get_paper_mixture_gradient(cosine: bool, shifted: Any) -> None:
    """Analytic gradients through p C and both entropies: the codes get one as mixed vectors and one through p.

    The authors' code leaves out the second.
    """
    T, w, gamma, g = 0.5, 0.7, 1.3, torch.randn(3, DIM, N, dtype=torch.float64)
    model = small("soft_vq", shifted, temperature=T, cosine=cosine, entropy_weight=w, gamma=gamma)
    z = model.encoder(data(3)).detach().requires_grad_()
    model.encoder.forward = lambda _: z
    terms = model.loss(data(3))
    loss = (g * model.mixtures(data(3))[0]).sum() + w * (terms["entropy"] - gamma * terms["diversity"])
    found = [a.numpy() for a in torch.autograd.grad(loss, (z, model.code_KD))]

    rows, codes = z.detach().numpy().swapaxes(1, 2).reshape(-1, DIM), model.code_KD.detach().numpy()
    of_q = g.numpy().swapaxes(1, 2).reshape(-1, DIM)
    a, c = (unit(rows), unit(codes)) if cosine else (rows, codes)
    p = scipy.special.softmax(-squares(a[None], c)[0] / T, axis=1)
    of_p = of_q @ c.T + w / 3 * (gamma * np.log(p.mean(0)) - np.log(p))
    of_logit = p * (of_p - (p * of_p).sum(1, keepdims=True))
    pull = 2 / T * (c[None] - a[:, None])  # derivative of a logit by its token; by its code, the negative
    of_a = np.einsum("mk,mkd->md", of_logit, pull)
    mixed, by_affinity = p.T @ of_q, -np.einsum("mk,mkd->kd", of_logit, pull)
    of_c = mixed + by_affinity
    if cosine:
        for x, of in ((rows, of_a), (codes, of_c)):
            u = unit(x)
            of -= u * (u * of).sum(1, keepdims=True)
            of /= np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(found[0].swapaxes(1, 2).reshape(-1, DIM), of_a, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found[1], of_c, rtol=1e-7, atol=1e-9)
    assert np.abs(by_affinity).max() > 0.1 * np.abs(mixed).max()


def test_straight_through_gradient_is_detected(shifted: Any) -> None:
    class Straight(SoftVQ):
        def mixtures(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = F.normalize(self.encoder(x), dim=1)
            z_q, p = super().mixtures(x)
            return z_q.detach() + (z - z.detach()), p

    torch.manual_seed(0)
    model, x = shifted(Straight(SHAPE, **SMALL, entropy_weight=0.0)).double(), data(3)
    weight = model.encoder.out.weight
    (gradient,) = torch.autograd.grad(model.loss(x)["loss"], weight)
    direction, values = torch.randn_like(weight), []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            weight += step * direction
            values.append(model.loss(x)["loss"].item())
            weight -= step * direction
    assert (gradient * direction).sum().item() != pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-2)


# ---- soft_vq: entropies ----------------------------------------------------------------------------------------------


def reference_soft(model: Any, x: Tensor) -> dict[str, float]:
    p, z_q = reference_mixtures(model, x)
    terms = {
        "nll": bernoulli(model, z_q, x),
        "entropy": float(scipy.stats.entropy(p, axis=-1).sum(1).mean()),
        "diversity": N * float(scipy.stats.entropy(p.mean((0, 1)))),
    }
    loss = terms["nll"] + model.entropy_weight * (terms["entropy"] - model.gamma * terms["diversity"])
    return {"loss": loss, **terms}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cosine", [True, False])
def test_soft_vq_loss_matches_formula(cosine: bool, training: bool, shifted: Any) -> None:
    model = small("soft_vq", shifted, temperature=0.4, entropy_weight=0.7, gamma=1.6, cosine=cosine).train(training)
    x = data()
    terms, wanted = model.loss(x), reference_soft(model, x)
    assert terms.keys() == wanted.keys()
    for name, value in wanted.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-8), name
    assert 0.1 < wanted["entropy"] < wanted["diversity"] < N * math.log(K)


def entropies_at(p: Tensor) -> Tensor:
    """The entropy regulariser with gamma 1 at given mixtures, (B, N, K) -> ()."""
    model = SoftVQ(SHAPE, **{**SMALL, "n_tokens": p.shape[1]}, entropy_weight=1.0).double()
    model.mixtures = lambda x: (torch.zeros(len(p), DIM, p.shape[1], dtype=torch.float64), p)  # type: ignore[method-assign]
    terms = model.loss(data(len(p)))
    return terms["loss"] - terms["nll"]


def test_entropy_loss_is_least_for_one_hot_diverse_tokens() -> None:
    """-N log K for one-hot diverse tokens, 0 for equal mixtures, and in between otherwise, as entropy is concave."""
    best = F.one_hot(torch.arange(K).repeat(N).reshape(K, N), K).double()
    assert entropies_at(best).item() == pytest.approx(-N * math.log(K))
    same = torch.full((K, N, K), 1 / K, dtype=torch.float64)
    one = F.one_hot(torch.zeros(K, N, dtype=torch.long), K).double()
    for p in (same, one, torch.rand(K, dtype=torch.float64).softmax(0).expand(K, N, K)):
        assert entropies_at(p).item() == pytest.approx(0, abs=1e-9)
    for spread in (0.5, 2.0, 8.0):
        p = (spread * torch.randn(K, N, K, dtype=torch.float64)).softmax(2)
        assert -N * math.log(K) < entropies_at(p).item() < 0
    # a small step from the minimum towards any other mixtures increases the loss
    for _ in range(5):
        other = torch.randn(K, N, K, dtype=torch.float64).softmax(2)
        assert entropies_at(0.99 * best + 0.01 * other) > entropies_at(best)


def test_mixtures_of_one_code_have_finite_gradients(shifted: Any) -> None:
    model = small("soft_vq", shifted, temperature=1e-6)
    model.loss(data())["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_code_usage_is_computed_over_ranks(shifted: Any) -> None:
    """Two ranks give the loss and gradients of one process, which entropies computed on each rank would not."""
    model, x = small("soft_vq", shifted, temperature=0.4, entropy_weight=2.0), data(8)
    x[:4] *= 0.1  # so that the ranks use different codes
    with SharedNoise(range(8), 8):
        whole = model.loss(x)
    wanted = torch.autograd.grad(whole["loss"], [*model.parameters()])
    ranks, alone = on_two_ranks(model, x), on_two_ranks(model, x, exchange=False)
    for name in whole:
        torch.testing.assert_close(ranks.terms[name], whole[name], rtol=1e-9, atol=1e-9)
    for found, expected in zip(ranks.gradients(), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert alone.terms["diversity"] < whole["diversity"] - 1e-3


# ---- initialisation --------------------------------------------------------------------------------------------------


def test_soft_vq_codes_start_at_k_means() -> None:
    """With as many codes as distinct rows, each row is a code."""
    torch.manual_seed(0)
    model, x = SoftVQ(SHAPE, **{**SMALL, "codebook_size": 3 * N}, temperature=1e-4), torch.rand(3, *SHAPE)
    with torch.no_grad():
        model.init_from_data(x)
    rows = torch.from_numpy(unit(rows_of(model, x))).flatten(0, 1)
    assert torch.cdist(rows, model.code_KD).amin(1).max() < 1e-3
    torch.testing.assert_close(model.encode(x).transpose(1, 2).flatten(0, 1), rows, rtol=0, atol=1e-2)


def test_soft_vq_code_is_not_discrete() -> None:
    assert not SoftVQ.discrete_code
    assert TiTok.discrete_code
