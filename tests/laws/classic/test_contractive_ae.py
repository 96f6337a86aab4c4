"""Laws of the contractive autoencoder (Rifai et al. 2011)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from torch import Tensor

import aezoo
from aezoo.io.checkpoint import save_model

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

# ---- contractive_ae: Rifai et al. 2011 -------------------------------------------------------------------------------


def contractive(**settings: Any) -> aezoo.Autoencoder:
    return aezoo.create_model("contractive_ae", input_shape=(2, 3, 4), latent_dim=7, **settings).double()


def jacobians(encode: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """||dh/dx||_F^2 of each sample by autograd."""
    return torch.stack([torch.autograd.functional.jacobian(encode, row[None]).square().sum() for row in x])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_contractive_penalty_matches_autograd_jacobian(shift: bool, training: bool, shifted: Any) -> None:
    model = contractive(contraction=0.7).train(training)
    model = shifted(model) if shift else model
    x = torch.rand(5, 2, 3, 4, dtype=torch.float64)
    truth = jacobians(model.encode, x)
    terms = model.loss(x)
    torch.testing.assert_close(model.jacobian_norm(model.encode(x)), truth, rtol=1e-9, atol=0)
    torch.testing.assert_close(terms["jacobian"], truth.mean(), rtol=1e-9, atol=0)
    torch.testing.assert_close(terms["loss"], model.score(x).mean() + 0.7 * truth.mean())
    # mistakes reported in pylearn2 #90 and #142: a mean over units, a sum before the square
    h, W = model.encode(x), model.encoder[1].weight
    assert ((h * (1 - h)).square() * W.square().sum(1)).mean(1).sub(truth).abs().min() > 1e-3
    assert (((h * (1 - h)) @ W.square().sum(1)).square() - truth).abs().min() > 1e-3


def test_contractive_penalty_gradient_matches_autograd(shifted: Any) -> None:
    model = shifted(contractive(contraction=1.0))
    x = torch.rand(3, 2, 3, 4, dtype=torch.float64)
    W, b = model.encoder[1].weight, model.encoder[1].bias
    terms = model.loss(x)
    found = torch.autograd.grad(terms["loss"] - terms["nll"], (W, b))

    def penalty(W: Tensor, b: Tensor) -> Tensor:
        rows = [
            torch.autograd.functional.jacobian(lambda v: torch.sigmoid(W @ v + b), v, create_graph=True)
            for v in x.flatten(1)
        ]
        return torch.stack([J.square().sum() for J in rows]).mean()

    expected = torch.autograd.grad(penalty(W, b), (W, b))
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("data_init", [True, False])
def test_contractive_outputs_start_at_first_batch_mean(data_init: bool, shifted: Any) -> None:
    model, x = shifted(contractive(data_init=data_init)).train(), torch.rand(4, 2, 3, 4, dtype=torch.float64)
    before = model.decoder[0].bias.detach().clone()
    for batch_idx, batch in enumerate((x, 1 - x)):
        model.begin_step(batch, batch_idx)
    expected = x.mean(0).clamp(0.01, 0.99).logit().flatten() if data_init else before
    torch.testing.assert_close(model.decoder[0].bias.detach(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_data_init_avoids_constant_outputs_of_small_codes(
    tied: bool, adam: Callable[..., float], mnist5k: Tensor
) -> None:
    """Without data_init all units of an untied model saturate in the same way, and every output is the mean image."""
    x, variances = mnist5k[:1280].float(), {}
    for data_init in (False, True):
        torch.manual_seed(0)
        model = aezoo.create_model("contractive_ae", (1, 28, 28), latent_dim=8, data_init=data_init, tied=tied)
        model.begin_step(x[:128], 0)
        adam(model, x, 300, 3e-3, 128)
        with torch.no_grad():
            variances[data_init] = float(model(x).var(0).mean() / x.var(0).mean())
    assert variances[True] > 0.01 and variances[True] > (1.2 if tied else 10) * variances[False]
    assert (variances[False] > 0.01) == tied


@pytest.mark.parametrize("tied", [True, False])
def test_zero_contraction_leaves_likelihood_only(tied: bool, shifted: Any) -> None:
    model, x = shifted(contractive(contraction=0.0, tied=tied)), torch.rand(4, 2, 3, 4, dtype=torch.float64)
    terms = model.loss(x)
    assert torch.equal(terms["loss"], terms["nll"])
    back = model.encoder[1].weight if tied else model.decoder[0].weight.T
    logits = model.encoder(x) @ back + model.decoder[0].bias
    bce = -torch.distributions.Bernoulli(logits=logits, validate_args=False).log_prob(x.flatten(1)).sum(1)
    torch.testing.assert_close(terms["loss"], bce.mean())


def test_tied_decoder_shares_encoder_weights(shifted: Any, tmp_path: Path) -> None:
    model, free = shifted(contractive()), contractive(tied=False)
    x, W = torch.rand(9, 2, 3, 4, dtype=torch.float64), model.encoder[1].weight
    assert model.decoder[0].weight is W
    assert sum(p.numel() for p in model.parameters()) == 7 * 24 + 7 + 24
    free.load_state_dict(model.state_dict() | {"decoder.0.weight": W.T})
    found, expected = model.loss(x), free.loss(x)
    torch.testing.assert_close(found["loss"], expected["loss"])
    down, up = torch.autograd.grad(expected["loss"], (free.encoder[1].weight, free.decoder[0].weight))
    (tied,) = torch.autograd.grad(found["loss"], W)
    torch.testing.assert_close(tied, down + up.T)
    # also after saving and loading
    loaded = aezoo.load_model(save_model(model, tmp_path / "saved")).double()
    assert loaded.decoder[0].weight is loaded.encoder[1].weight
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_prevent_evading_contraction(tied: bool) -> None:
    """With free weights, scaling the encoder by 0.01 and the decoder by 100 keeps the NLL and removes the penalty."""
    model, x = contractive(tied=tied), torch.rand(50, 2, 3, 4, dtype=torch.float64)
    (_, down, _), (up, _) = model.encoder, model.decoder
    with torch.no_grad():
        down.bias.zero_()
        before, half = model.loss(x), torch.full((7,), 0.5, dtype=torch.float64)
        at_half = up(half[None])
        down.weight.mul_(0.01)
        up.weight.div_(0.01)
        up.bias += (at_half - up(half[None]))[0]
        after = model.loss(x)
    assert after["nll"].item() == pytest.approx(before["nll"].item(), rel=1e-12 if tied else 1e-2)
    assert after["jacobian"].item() == pytest.approx((1 if tied else 1e-4) * before["jacobian"].item(), rel=0.3)
