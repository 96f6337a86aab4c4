"""Laws of Masked convolutional autoencoder, context encoder (Pathak et al. 2016).

The model was compared with the mask and the loss of SparK, around copies of our networks, and with the loss of a port
of context encoders, in float64 on equal weights, batch and masks. Differences are relative to the largest value; for
gradients, the largest over the parameters is given.

    https://github.com/keyu-tian/SparK, commit a63e386f8e5186bc07ad7fce86e06b08f48a61ea
        pretrain/spark.py, SparK, patches of mean 0 and variance 1  masked input 0, loss 4.0e-10, gradients 4.0e-10
    https://github.com/BoyuanJiang/context_encoder_pytorch, commit 01cbf96b3bcb59da9e7a771836de2996801954a8
        train.py, errG_l2 with overlapPred 0                        loss 3.9e-16, gradients 7.9e-16

Our loss is X times theirs, which are means over masked values. SparK adds 1e-8 to the number of masked patches, which
causes the difference above. Differs: SparK scales each patch of the target to mean 0 and variance 1, and masks
N - round(N - ratio N) patches; ours takes targets as they are, as equation 1 of Pathak et al., and floor(ratio N).

The code of Pathak et al. is Lua, and was read line by line: train_random.lua of

    https://github.com/pathak22/context-encoder, commit 68abd116b573380608b7e4a61f15099f8cdcaa68

cuts out random regions, too, but takes the squared error of the whole sample, with 10 times the weight outside of the
regions if useOverlapPred is on; ours and equation 1 take that of the masked values. The adversarial loss of equation 2
has no counterpart here.
"""

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
    """With an output that does not depend on the input, the scale is the same for every ratio."""
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


# ---- mask token ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [True, False])
def test_mask_token_is_learned_or_zero(learned: bool) -> None:
    model: Any = aezoo.create_model("masked_conv_ae", SHAPE, **SMALL["masked_conv_ae"], learned_token=learned)
    assert not model.token.any() and model.token.shape == (2, 1, 1)
    model.loss(data(4).float())["loss"].backward()
    assert (model.token.grad is not None and bool((model.token.grad != 0).all())) is learned
