"""Laws of Masked autoencoder (He et al. 2021)."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from gradient_laws import (
    test_gradients_are_derivatives_of_the_terms,  # noqa: F401
    test_gradients_with_other_settings_are_derivatives,  # noqa: F401
)
from masked_laws import (  # noqa: F401
    SMALL,
    build,
    data,
    loss,
    masks,
    patchify_of,
    test_invalid_values_are_refused_with_a_cure,
    test_loss_is_rescaled_masked_likelihood,
    test_predictions_do_not_depend_on_masked_values,
    test_visible_targets_do_not_enter_the_loss,
)
from scipy.stats import norm
from torch import Tensor

import aezoo
from aezoo.nets import vit
from aezoo.testing import SharedNoise

# ---- the losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mae", "mae_norm"])
def test_mae_loss_depends_on_masked_targets_only(name: str, shifted: Any) -> None:
    """Including the scale head of norm_pix: the encoder reads x, and the targets are changed."""
    model, x, other = build(name, shifted), data(5), data(5)
    order_BN, masked = masks(model, 5)
    embed, blocks, _ = model.encoder.children()
    kept = len(order_BN[0]) - model.masked
    hidden_BND = model.decoder.hidden(blocks(vit.shuffle(embed(x), order_BN[:, :kept])), order_BN)

    def of(target: Tensor) -> Tensor:
        factor, masked_BN1 = len(order_BN[0]) / model.masked / 5, vit.is_masked(order_BN, model.masked)[..., None]
        total: Tensor = sum((masked_BN1 * term).sum() * factor for term in model.terms(target, hidden_BND))
        return total

    torch.testing.assert_close(of(x), loss(model, x)["loss"])
    torch.testing.assert_close(of(torch.where(masked, x, other)), of(x), rtol=1e-12, atol=0)
    assert (of(torch.where(masked, other, x)) - of(x)).abs() > 0.1


def test_mae_encoder_receives_visible_patches_only(shifted: Any) -> None:
    model, x, sizes = build("mae", shifted), data(4).requires_grad_(), []
    blocks = model.encoder[1]
    blocks[0].register_forward_hook(lambda module, given, out: sizes.append((given[0].shape, out)))
    order_BN, masked = masks(model, 4)
    loss(model, x)
    (shape, out_BVD), n = sizes[0], len(order_BN[0])
    assert shape == (4, n - math.floor(0.75 * n), 12)
    (gradient,) = torch.autograd.grad((out_BVD * torch.randn_like(out_BVD)).sum(), x)
    assert torch.equal(gradient != 0, ~masked)
    # visible patches only, in the drawn order
    with torch.no_grad():
        tokens_BND = model.encoder[0](x)
        picked = torch.stack([tokens_BND[b, order_BN[b, : n - model.masked]] for b in range(4)])
        torch.testing.assert_close(out_BVD, blocks[0](picked))


def test_normalised_targets_are_standardised_patches(shifted: Any) -> None:
    model, x = build("mae_norm", shifted), data(5)
    order_BN, _ = masks(model, 5)
    embed, blocks, _ = model.encoder.children()
    decoder, n = model.decoder, len(order_BN[0])
    hidden_BND = decoder.hidden(blocks(vit.shuffle(embed(x), order_BN[:, : n - model.masked])), order_BN)
    out_BNP, scale_BN2, nll, scale = decoder.out(hidden_BND), decoder.scale(hidden_BND), 0.0, 0.0
    real_NP = decoder.patchify.real_NP.bool()
    for b in range(5):
        for i in order_BN[b, n - model.masked :]:
            values = decoder.patchify(x)[b, i][real_NP[i]].numpy()  # without padding
            deviation = np.sqrt((values.var(ddof=1) if len(values) > 1 else 0.0) + 1e-6)
            e = (values - values.mean()) / deviation - out_BNP[b, i][real_NP[i]].detach().numpy()
            nll -= norm(scale=math.sqrt(0.5)).logpdf(e).sum()
            scale += ((np.array([values.mean(), deviation]) - scale_BN2[b, i].detach().numpy()) ** 2).sum()
    terms, factor = loss(model, x), n / model.masked / 5
    assert terms["nll"].item() == pytest.approx(nll * factor, rel=1e-6)
    assert terms["scale"].item() == pytest.approx(scale * factor, rel=1e-9)
    assert terms["loss"].item() == pytest.approx(terms["nll"].item() + terms["scale"].item())


def test_reconstruction_depends_only_on_the_code(shifted: Any) -> None:
    """MAE-pytorch reconstructs with the mean and deviation of the target, which decode does not have."""
    model, x = build("mae_norm", shifted), data(4)
    z = model.encode(x)
    torch.testing.assert_close(model(x), model.decode(z))
    # a visible patch is predicted from the other tokens, not from its own
    other = z.clone()
    other[:, :, 0, 0] += torch.randn(4, 12)
    reached = (model.decode(other) != model.decode(z)).flatten(1).any(1)
    assert reached.all()
    assert torch.equal(model.decode(other)[..., :2, :2], model.decode(z)[..., :2, :2])


def test_score_masks_and_counts_each_patch_once(shifted: Any) -> None:
    for name in ("mae", "simmim", "simmim_mixer"):
        model, x = build(name, shifted), data(3)
        patchify = patchify_of(model)
        orders_KN = vit.fixed_orders(patchify.n, model.masked)
        hidden_KN = vit.is_masked(orders_KN, model.masked)
        total = torch.zeros(3, patchify.n, dtype=torch.float64)
        for order_N, hidden_N in zip(orders_KN, hidden_KN, strict=True):
            if name == "mae":
                embed, blocks, _ = model.encoder.children()
                order_BN = order_N.expand(3, -1)
                seen = blocks(vit.shuffle(embed(x), order_BN[:, : patchify.n - model.masked]))
                x_hat, q = model.decoder.out(model.decoder.hidden(seen, order_BN)), D.Normal
                log_p = q(x_hat, math.sqrt(0.5)).log_prob(patchify(x))
            else:
                log_p = D.Laplace(model.head(model.tokens(x, hidden_N.expand(3, -1))), 1.0).log_prob(patchify(x))
            total -= (log_p * patchify.real_NP).sum(2) * hidden_N / hidden_KN.sum(0)
        torch.testing.assert_close(model.score(x), total.sum(1))


def test_masks_are_drawn_per_sample(shifted: Any) -> None:
    """Each sample has its own mask, which does not depend on the rest of the batch."""
    for name in SMALL:
        model, x = build(name, shifted), data(6)
        with torch.no_grad():
            with SharedNoise(range(6), 6):
                whole = model.loss(x)["loss"]
            halves = []
            for rows in (range(3), range(3, 6)):
                with SharedNoise(rows, 6):
                    halves.append(model.loss(x[rows.start : rows.stop])["loss"])
        torch.testing.assert_close(sum(halves) / 2, whole)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_hidden_patches_are_predicted_from_visible_ones(adam: Any) -> None:
    """Samples of one grey value each can be predicted from visible patches, unlike by the mean sample."""
    torch.manual_seed(0)
    model = aezoo.create_model("mae", (1, 4, 4), **SMALL["mae"])
    x = torch.rand(512, 1, 1, 1).expand(-1, 1, 4, 4)
    adam(model, x, steps=100, lr=5e-3, batch=64)
    with torch.no_grad():
        error = (model(x[:100]) - x[:100]).square().mean()
    assert error < 0.2 * x.var()
