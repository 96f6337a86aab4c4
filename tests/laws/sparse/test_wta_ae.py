"""Laws of Winner-take-all autoencoder (Makhzani & Frey 2015).

No code of the authors was found. The model was compared with two ports, run by TensorFlow, in float64 on equal weights
and batch. Differences are relative to the largest value; for gradients, the largest over the parameters is given.

    https://github.com/iwyoo/tf_ConvWTA, commit a423f6ff8683e0bcf9b0269e0d4e31d068dfae14
        model.py, ConvWTA           codes 2.6e-16, those kept 1.3e-16, loss 1.8e-16, gradients of 8 parameters 8.9e-16
    https://github.com/guoguo12/tensorflow-fcwta, commit 1a721236e9c2a6fdcc4a08749483f547fbcf797a
        models.py, FullyConnectedWTA, weights not tied
                                    codes 1.6e-16, output 1.0e-16, loss 0, gradients of 4 parameters 4.5e-16

Their loss is summed over the batch. Differs: they keep floor(p B) samples for each unit, ours ceil(p B), and the first
port keeps all of equal activations; the paper specifies neither. After training, the first port reconstructs with
spatial sparsity only, ours with a threshold in place of the selection of winners.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from sae_laws import (  # noqa: F401
    build,
    data,
    gap,
    gradients,
    test_invalid_values_are_refused,
)
from two_ranks import on_two_ranks

import aezoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- wta_ae: Makhzani & Frey 2015 ------------------------------------------------------------------------------------


def last_layer(net: Any) -> Any:
    """The last layer with a bias."""
    return [layer for layer in net.modules() if hasattr(layer, "bias")][-1]


def winners_by_hand(h: np.ndarray, p: float) -> np.ndarray:
    """The samples that each unit is kept for, (B, D), with a loop over units."""
    kept, most = np.zeros(h.shape, bool), math.ceil(round(p * len(h), 9))
    for unit in range(h.shape[1]):
        kept[np.argsort(-h[:, unit])[:most], unit] = True
    return kept


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize(("lifetime", "n"), [(0.05, 7), (0.05, 40), (0.07, 100), (0.5, 9), (1.0, 6)])
def test_each_unit_wins_for_lifetime_share_of_batch(lifetime: float, n: int, spatial: bool, shifted: Any) -> None:
    model, x = shifted(build("wta_ae", lifetime=lifetime, spatial=spatial, latent_dim=10)), data(n)
    with torch.no_grad():
        last_layer(model.encoder).bias += 5  # so that kept units are not 0
        h = model.encode(x)
        found = (
            model.mask_units(h, model.winners).flatten(2) if spatial else model.mask_units(h, model.winners)[..., None]
        )
    best = h.flatten(2).amax(2) if spatial else h
    kept = winners_by_hand(best.numpy(), lifetime)
    used = (found != 0).any(2)
    np.testing.assert_array_equal(used.numpy(), kept)
    assert (used.sum(0) == math.ceil(round(lifetime * n, 9))).all()
    assert lifetime == 1 or len(used.sum(1).unique()) > 1  # samples differ in the number of units kept
    assert ((found != 0).sum(2) <= 1).all()
    torch.testing.assert_close(found.sum(2), best * torch.from_numpy(kept))
    places = found.argmax(2)[used]
    assert torch.equal(places, h.flatten(2).argmax(2)[used]) if spatial else True
    assert math.ceil(0.07 * 100) == 8  # the product is rounded before ceil: in floating point it exceeds 7


@pytest.mark.parametrize("spatial", [False, True])
def test_winners_are_selected_over_all_ranks(spatial: bool, shifted: Any) -> None:
    model, x = shifted(build("wta_ae", lifetime=0.25, spatial=spatial, latent_dim=10)).train(), data(12)
    single = shifted(model).train()
    one, together = single.loss(x), on_two_ranks(single, x)
    before = on_two_ranks(single, x, exchange=False)
    for term in one:
        torch.testing.assert_close(together.terms[term], one[term])
    expected = [*torch.autograd.grad(one["loss"], [*single.parameters()])]
    for a, b in zip(together.gradients(), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert gap(before.terms["nll"], one["nll"]) > 1e-6
    first, second = (copy.theta_D for copy in together.copies)
    assert torch.equal(first, second)
    # without its rank number, a rank keeps samples of another
    wrong = on_two_ranks(single, x, ranked=False)
    assert gap(wrong.terms["nll"], one["nll"]) > 1e-6


def test_encode_returns_dense_relu_codes(shifted: Any) -> None:
    for spatial in (False, True):
        model, x = shifted(build("wta_ae", spatial=spatial, latent_dim=10)), data(8)
        model.train().loss(x)
        for mode in (True, False):
            assert torch.equal(model.train(mode).encode(x), model.encoder(x).relu())
        torch.testing.assert_close(model.encode(x)[2:3], model.encode(x[2:3]))


def test_the_gradient_passes_only_through_the_winners(shifted: Any) -> None:
    model, x = shifted(build("wta_ae", lifetime=0.2, latent_dim=3)), data(10)
    with torch.no_grad():
        last_layer(model.encoder).bias += 5
    h = model.encode(x)
    (through,) = torch.autograd.grad(model.loss(x)["loss"], last_layer(model.encoder).bias)
    h_hat = model.decoder(h * model.winners(h))
    slope = torch.autograd.grad(model.nll(h_hat, x).mean(), h)[0]
    assert torch.equal(slope != 0, model.winners(h))
    torch.testing.assert_close(through, slope.sum(0))


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_lifetime_1_equals_relu_autoencoder(likelihood: str, shifted: Any) -> None:
    x, found = data(6), []
    for name, extra in (("wta_ae", {"lifetime": 1.0}), ("dense_ae", {"code_activation": "relu"})):
        torch.manual_seed(0)
        model = build(name, latent_dim=9, hidden_dims=(), likelihood=likelihood, **extra)
        found.append(shifted(model).eval())
    mine, dense = (model.loss(x)["loss"] for model in found)
    torch.testing.assert_close(mine, dense)
    slopes = [[*gradients(loss, model).values()] for loss, model in zip((mine, dense), found, strict=True)]
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(found[0](x), found[1](x))  # untrained, so theta is 0


@pytest.mark.slow
@pytest.mark.parametrize("spatial", [False, True])
def test_evaluation_threshold_converges_to_training_winners(spatial: bool, shifted: Any) -> None:
    model, x = shifted(build("wta_ae", lifetime=0.25, spatial=spatial, latent_dim=10)), data(16)
    nll = [model.train().loss(x)["nll"] for _ in range(300)][-1]
    h = model.eval().encode(x)
    least = (h.flatten(2).amax(2) if spatial else h).sort(0, descending=True).values[3]
    torch.testing.assert_close(model.theta_D, least.detach(), rtol=1e-6, atol=1e-9)
    model.theta_D.sub_(1e-7)
    torch.testing.assert_close(model.score(x).mean(), nll, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.nll(model(x), x), model.score(x))
    everything = model.nll(model.decoder(model.encode(x)), x).mean()
    assert everything > nll + 1e-3  # with all units the nll is higher
    held = model.theta_D.clone()
    model.loss(x)
    assert torch.equal(model.theta_D, held)


# ---- crosscoder: Lindsey et al. 2024 ---------------------------------------------------------------------------------


def test_convolutions_need_a_grid() -> None:
    with pytest.raises(aezoo.AezooError, match="convolutions take"):
        build("wta_ae", input_shape=(24,), spatial=True)
