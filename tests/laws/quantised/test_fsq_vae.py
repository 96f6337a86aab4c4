"""Laws of FSQ autoencoder, finite scalar quantisation (Mentzer et al. 2023)."""

from typing import Any

import pytest
import torch
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from quantised_laws import (  # noqa: F401
    DIM,
    built,
    data,
    require_alike,
    small,
    test_autocast_indices_and_terms_match_float32,
    test_each_term_trains_expected_parts_only,
    test_inference_calls_do_not_update_codebook,
    test_invalid_values_are_refused,
    test_loss_matches_numpy_formula,
    test_quantiser_dropout_keeps_first_levels,
    test_resume_is_exact_and_indices_roundtrip,
    test_usage_is_over_whole_set_not_batch_mean,
)
from torch import Tensor

from aezoo.models.quantised.fsq_vae import FSQVAE
from aezoo.quantisers import FSQ

# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 3])
def test_encoder_gradient_treats_rounding_as_constant(depth: int, shifted: Any) -> None:
    """Central differences of the loss, with the rounding error added to the bounded code as a constant."""
    levels = (2, 3, 4, 7)
    settings = {"net": "mlp", "hidden_dims": (8,), "places": 2, "activation": "silu", "depth": depth}
    model = shifted(FSQVAE((6,), levels=levels, **settings)).double()
    x, L = torch.rand(3, 6, dtype=torch.float64), torch.tensor(levels, dtype=torch.float64)[:, None]
    o = torch.where(L % 2 == 0, 0.5, 0.0)
    s = torch.where(L > 2, torch.tan(2 * o / ((L - 1) * 0.999)), 0.0)

    def bounded() -> Tensor:
        f = torch.tanh(model.encoder(x) + s) * (L - 1) * 0.999 / 2 - o
        return torch.where(L > 2, f / (L // 2), 2 * f + 1)  # two levels are -1 and 1, not -1 and 0

    weight = [p for p in model.encoder.parameters() if p.ndim == 2][-1]
    (found,) = torch.autograd.grad(model.loss(x)["loss"], weight)
    with torch.no_grad():
        rounding = model.quantise(x).z_q - bounded()
        assert rounding.abs().max() > (0.1 if depth == 1 else 0.01)
        for place in ((0, 1), (3, 2), (5, 7), (6, 4)):
            values = []
            for step in (1e-5, -1e-5):
                weight[place] += step
                values.append(model.nll(model.decoder(bounded() + rounding), x).mean())
                weight[place] -= step
            difference = (values[0] - values[1]) / 2e-5
            torch.testing.assert_close(found[place], difference, rtol=1e-5, atol=1e-8)
            assert difference.abs() > 1e-4


# ---- special cases ---------------------------------------------------------------------------------------------------


def test_fsq_of_depth_1_and_binary_levels_match_fsq_and_lfq() -> None:
    one, other = small("fsq", dropout=1.0), small("fsq")
    other.load_state_dict(one.state_dict())
    other.quantiser = FSQ((4, 3, 5, 6)).double()
    require_alike(one, other)
    lfq, x = small("lfq"), data()
    fsq = built("fsq_vae", levels=(2,) * DIM).double()
    fsq.load_state_dict({key: value for key, value in lfq.state_dict().items() if "quantiser" not in key})
    assert torch.equal(fsq.encode_indices(x), lfq.encode_indices(x))
    assert fsq.loss(x)["loss"].item() == pytest.approx(lfq.loss(x)["nll"].item(), rel=1e-12)
