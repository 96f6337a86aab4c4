"""Laws of Masked convolutional autoencoder, context encoder (Pathak et al. 2016)."""

from typing import Any

import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from masked_laws import (  # noqa: F401
    SHAPE,
    SMALL,
    build,
    data,
    test_invalid_values_are_refused_with_a_cure,
    test_loss_is_rescaled_masked_likelihood,
    test_predictions_do_not_depend_on_masked_values,
    test_visible_targets_do_not_enter_the_loss,
)

import aezoo

# ---- the losses ------------------------------------------------------------------------------------------------------


def test_expected_masked_loss_equals_whole_sample_sum(shifted: Any) -> None:
    """With a model that does not look at its input: whatever the ratio, the scale is that of any other model."""
    x = data(1)
    found = []
    for ratio in (0.25, 0.5, 0.75):
        model = build("masked_conv_ae", shifted, mask_ratio=ratio)
        with torch.no_grad():
            for p in model.encoder.parameters():
                p.zero_()
            torch.manual_seed(3)
            found.append(model.loss(x.expand(5000, *SHAPE))["loss"].item())
            whole = model.score(x).item()
    assert found == pytest.approx([whole] * 3, rel=0.02)


# ---- what is learned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [True, False])
def test_mask_token_is_learned_or_zero(learned: bool) -> None:
    model: Any = aezoo.create_model("masked_conv_ae", SHAPE, **SMALL["masked_conv_ae"], learned_token=learned)
    assert not model.token.any() and model.token.shape == (2, 1, 1)
    model.loss(data(4).float())["loss"].backward()
    assert (model.token.grad is not None and bool((model.token.grad != 0).all())) is learned
