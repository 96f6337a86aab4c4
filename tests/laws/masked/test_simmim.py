"""Laws of SimMIM, a simple framework for masked image modelling (Xie et al. 2021)."""

import math
from typing import Any

import pytest
import torch
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from masked_laws import (  # noqa: F401
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
from torch import Tensor, nn

from aezoo.nets import mixer, vit

# ---- the transformer -------------------------------------------------------------------------------------------------


def mixed(block: mixer.Block, x_BND: Tensor) -> Tensor:
    """A mixer block by equation 1 of the paper, with explicit sums over positions and channels."""

    def norm_(layer: nn.LayerNorm, h: Tensor) -> Tensor:
        mean, var = h.mean(2, keepdim=True), h.var(2, correction=0, keepdim=True)
        return (h - mean) / (var + 1e-6).sqrt() * layer.weight + layer.bias

    (w_1, b_1), (w_2, b_2) = ((block.places[i].weight, block.places[i].bias) for i in (0, 2))
    (w_3, b_3), (w_4, b_4) = ((block.channels[i].weight, block.channels[i].bias) for i in (0, 2))
    h_BSD = torch.einsum("sn,bnd->bsd", w_1, norm_(block.norm_1, x_BND)) + b_1[:, None]
    x_BND = x_BND + torch.einsum("ns,bsd->bnd", w_2, nn.functional.gelu(h_BSD)) + b_2[:, None]
    h_BNC = torch.einsum("cd,bnd->bnc", w_3, norm_(block.norm_2, x_BND)) + b_3
    return x_BND + torch.einsum("dc,bnc->bnd", w_4, nn.functional.gelu(h_BNC)) + b_4


def test_simmim_mixer_uses_mixer_blocks_without_positions(shifted: Any) -> None:
    model, x = build("simmim_mixer", shifted, depth=3), data(4)
    masked_BN = vit.is_masked(torch.rand(4, patchify_of(model).n).argsort(1), model.masked)
    embed, blocks, _ = model.encoder.children()
    h = torch.where(masked_BN[..., None], model.mask_token, embed(x))
    *layers, last = blocks
    assert len(layers) == 3
    for layer in layers:
        h = mixed(layer, h)
    torch.testing.assert_close(model.tokens(x, masked_BN), last(h))


# ---- the losses ------------------------------------------------------------------------------------------------------


def test_masking_after_mixing_leak_is_detected(shifted: Any) -> None:
    """The mixer of autoencodersplz masks after mixing: visible tokens then depend on all masked values."""
    model, x = build("simmim_mixer", shifted), data(3).requires_grad_()
    order_BN, masked = masks(model, 3)
    embed, blocks, _ = model.encoder.children()
    kept_BVD = vit.shuffle(blocks(embed(x)), order_BN[:, : len(order_BN[0]) - model.masked])
    (gradient,) = torch.autograd.grad((kept_BVD * torch.randn_like(kept_BVD)).sum(), x)
    assert (gradient[masked] != 0).all()


@pytest.mark.parametrize("name", ["simmim", "simmim_mixer"])
def test_simmim_encoder_reads_mask_tokens(name: str, shifted: Any) -> None:
    model, x, found = build(name, shifted), data(4), []
    order_BN, _ = masks(model, 4)
    model.encoder[1].register_forward_hook(lambda module, given, out: found.append(given[0]))
    loss(model, x)
    n = len(order_BN[0])
    assert model.masked == math.floor(0.6 * n)
    for b in range(4):
        for i in range(n):
            is_masked = i in order_BN[b, n - model.masked :]
            wanted = model.mask_token if is_masked else model.encoder[0](x)[b, i]
            torch.testing.assert_close(found[0][b, i], wanted)


def test_auxiliary_heads_train_only_their_parameters(shifted: Any) -> None:
    for name, term, own in (
        ("mae_norm", "scale", "decoder.scale."),
        ("simmim", "readout", "decoder.1."),
        ("simmim_mixer", "readout", "decoder.1."),
    ):
        model, x = build(name, shifted), data(5)
        terms = loss(model, x)
        parameters = dict(model.named_parameters())
        found = torch.autograd.grad(terms[term], [*parameters.values()], retain_graph=True, allow_unused=True)
        assert {key for key, g in zip(parameters, found, strict=True) if g is not None} == {
            key for key in parameters if key.startswith(own)
        }
        others = torch.autograd.grad(terms["nll"], [*parameters.values()], allow_unused=True)
        assert {key for key, g in zip(parameters, others, strict=True) if g is None} == {
            key for key in parameters if key.startswith(own)
        }
