"""Laws of Crosscoder (Lindsey et al. 2024)."""

import math
from typing import Any

import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from sae_laws import (  # noqa: F401
    assert_same,
    build,
    data,
    gap,
    gradients,
    rescaled,
    test_bias_can_start_at_geometric_median,
    test_penalty_warms_up_linearly_and_is_full_in_eval,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- crosscoder: Lindsey et al. 2024 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 4, 6)])
def test_one_stream_crosscoder_equals_april_sae(shape: tuple[int, ...], shifted: Any) -> None:
    found = []
    for name, extra in (("crosscoder", {}), ("sae_l1", {"form": "april"})):
        torch.manual_seed(0)
        model, x = shifted(build(name, input_shape=shape, latent_dim=12, l1=0.4, **extra)), data(7, shape)
        terms = model.loss(x)
        found.append({"code": model.encode(x), "x_hat": model(x), "score": model.score(x), **terms})
        found[-1] |= gradients(terms["loss"], model)
    assert_same(*found)


def test_encoder_sums_streams_with_own_decoders_and_costs(shifted: Any) -> None:
    model, x = shifted(build("crosscoder", input_shape=(3, 5), latent_dim=12, l1=0.4)), data(9, (3, 5))
    with torch.no_grad():
        model.decoder.W_NX *= torch.linspace(0.2, 2, 15)
    pi, W, D = model.encoder.bias, model.encoder.weight.view(12, 3, 5), model.decoder.W_NX.view(12, 3, 5)
    for s in range(3):
        pi = pi + torch.einsum("bd,nd->bn", x[:, s], W[:, s])
    f = pi.clamp(min=0)
    x_hat = torch.stack([f @ D[:, s] + model.decoder.b_X.view(3, 5)[s] for s in range(3)], 1)
    cost = torch.stack([f * D[:, s].square().sum(1).sqrt() for s in range(3)]).sum((0, 2)).mean()
    sse = torch.stack([(x[:, s] - x_hat[:, s]).square().sum(1) for s in range(3)]).sum(0).mean()
    terms = model.loss(x)
    torch.testing.assert_close(model.encode(x), f)
    torch.testing.assert_close(model(x), x_hat)
    torch.testing.assert_close(terms["nll"], sse + 7.5 * math.log(math.pi))
    torch.testing.assert_close(terms["l1"], cost)
    torch.testing.assert_close(terms["loss"], terms["nll"] + 0.4 * cost)
    assert_same(gradients(terms["loss"], model), gradients(sse + 0.4 * cost, model))
    assert model.norms().shape == (12, 3)
    torch.testing.assert_close(model.norms(), D.norm(dim=2))
    assert gap((f * D.flatten(1).norm(dim=1)).sum(1).mean(), cost) > 0.1  # not the norm of all streams together


def test_crosscoder_loss_is_invariant_to_latent_scale(shifted: Any) -> None:
    model, x = shifted(build("crosscoder", input_shape=(3, 5), latent_dim=12, l1=0.4)), data(9, (3, 5))
    before = model.loss(x)
    after = rescaled(model, torch.linspace(0.2, 3, 12).double()).loss(x)
    for term in before:
        torch.testing.assert_close(after[term], before[term])
