"""Laws of FSQ autoencoder, finite scalar quantisation (Mentzer et al. 2023)."""

import pytest
import torch
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

from aezoo.quantisers import FSQ

# ---- neutral limits --------------------------------------------------------------------------------------------------


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
