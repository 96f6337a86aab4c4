"""Laws of Matryoshka sparse autoencoder (Bussmann et al. 2025)."""

from typing import Any

import pytest
import torch
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from topk_sae_laws import (  # noqa: F401
    SHAPE,
    build,
    data,
    positive,
    same_gradients,
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

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- matryoshka_sae: Bussmann et al. 2025 ----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_without_fractions_matryoshka_is_batch_topk(training: bool, shifted: Any) -> None:
    """The loss is then the mean of BatchTopK's and that of the bias alone."""
    x, found = data(6), []
    for name, extra in (("batch_topk_sae", {}), ("matryoshka_sae", {"fractions": ()})):
        torch.manual_seed(0)
        model = with_dead_latents(name, shifted, aux_weight=0.5, **extra).train(training)
        model.theta.value.fill_(20)
        terms = model.loss(x)
        alone = model.nll(model.decoder.b_X.view(SHAPE).expand_as(x), x).mean()
        torch.testing.assert_close(terms.pop("prefix_nll", alone), alone, rtol=1e-10, atol=1e-12)
        if name == "batch_topk_sae":
            terms["loss"] = (terms["nll"] + alone) / 2 + 0.5 * terms["aux"]
        values = [terms[name] for name in sorted(terms)]
        found.append([*values, model.encode(x), *torch.autograd.grad(terms["loss"], [*model.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_loss_is_mean_error_of_all_prefixes_and_none(shifted: Any) -> None:
    """As in the authors' `get_loss_dict`, with AuxK added to the mean."""
    model, x = with_dead_latents("matryoshka_sae", shifted, fractions=(0.25, 0.5), k=6, aux_weight=0.5), data(6)
    assert model.prefixes == [3, 6, 12]
    f = model.top_of_batch(model.pre_activations(x), 6)
    each = []
    for size in (0, 3, 6, 12):
        kept = f * (torch.arange(12) < size)
        each.append(model.nll((kept @ model.decoder.W_NX + model.decoder.b_X).unflatten(1, SHAPE), x).mean())
    terms = model.loss(x)
    torch.testing.assert_close(terms["nll"], each[3])
    torch.testing.assert_close(terms["prefix_nll"], each[0] + each[1] + each[2])
    total = torch.stack(each).sum() / 4 + 0.5 * terms["aux"]
    torch.testing.assert_close(terms["loss"], total)
    same_gradients(model, terms["loss"], total)
    assert len({round(value.item(), 3) for value in each}) == 4


def test_prefix_loss_ignores_later_directions(shifted: Any) -> None:
    """With respect to the decoder's rows: later pre-activations do compete for the k."""
    model, x = positive("matryoshka_sae", shifted, fractions=(0.5,), k=6), data(6)
    before = model.loss(x)
    (gradient,) = torch.autograd.grad(before["prefix_nll"], model.decoder.W_NX)
    assert not gradient[6:].any()
    assert gradient[:6].any()
    with torch.no_grad():
        model.decoder.W_NX[6:] = -model.decoder.W_NX[6:]
    after = model.loss(x)
    torch.testing.assert_close(after["prefix_nll"], before["prefix_nll"])
    assert (after["nll"] - before["nll"]).abs() > 1e-2


def test_matryoshka_prefixes_are_distinct_and_complete() -> None:
    assert build("matryoshka_sae", latent_dim=512).prefixes == [32, 64, 128, 256, 512]
    assert build("matryoshka_sae", latent_dim=4, k=1).prefixes == [1, 2, 4]
    assert build("matryoshka_sae", latent_dim=1, k=1).prefixes == [1]
