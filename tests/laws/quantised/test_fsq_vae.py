"""Laws of FSQ autoencoder, finite scalar quantisation (Mentzer et al. 2023)."""

import pytest
import torch
from quantised_laws import (  # noqa: F401
    DIM,
    built,
    data,
    require_alike,
    small,
    test_each_term_moves_what_it_may_and_nothing_else,
    test_invalid_values_are_refused,
    test_quantiser_dropout_keeps_first_levels,
    test_resume_is_exact_and_indices_roundtrip,
    test_the_loss_is_its_formula_written_out_in_numpy,
    test_under_autocast_indices_and_terms_are_those_of_float32,
    test_usage_is_over_whole_set_not_batch_mean,
    test_what_is_only_looked_at_teaches_a_book_nothing,
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
