"""Laws of SimVQ autoencoder, vector quantisation with one linear layer (Zhu et al. 2024)."""

import pytest
import torch
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from quantised_laws import (  # noqa: F401
    DIM,
    PLACES,
    FixedCode,
    data,
    small,
    test_autocast_indices_and_terms_match_float32,
    test_beta_weights_commitment_only,
    test_each_term_trains_expected_parts_only,
    test_inference_calls_do_not_update_codebook,
    test_invalid_values_are_refused,
    test_loss_matches_numpy_formula,
    test_misplaced_beta_is_detected,
    test_resume_is_exact_and_indices_roundtrip,
    test_rotation_trick_keeps_angle_and_scales_by_norms,
    test_straight_through_passes_code_gradient_to_z,
    trained_losses,
)

# ---- special cases ---------------------------------------------------------------------------------------------------


def test_identity_sim_vq_equals_vq_before_updates() -> None:
    one, other = small("sim_vq"), small("vq-gradient", data_init=False, dead_below=0.0)
    nets = {key: value for key, value in one.state_dict().items() if "quantiser" not in key}
    other.load_state_dict({**nets, "quantiser.code_KD": one.quantiser.frozen_KD})
    with torch.no_grad():
        one.quantiser.W_DD.copy_(torch.eye(DIM))
    first, second = trained_losses(one, 2), trained_losses(other, 2)
    assert first[0] == pytest.approx(second[0], rel=1e-12)
    assert first[1]["codebook"] != pytest.approx(second[1]["codebook"], rel=1e-6)


def test_one_used_code_moves_all_codes_in_sim_vq_only() -> None:
    frozen = {}
    for key in ("sim_vq", "vq-gradient"):
        model = small(key, **({} if key == "sim_vq" else {"data_init": False, "dead_below": 0.0}))
        with torch.no_grad():
            model.encoder = FixedCode(model.quantiser.codebook()[2].expand(5, PLACES, -1).movedim(1, 2) + 0.01)
        before = {name: value.clone() for name, value in model.quantiser.state_dict().items()}
        codebook = model.quantiser.codebook().detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model.train().loss(data())["loss"].backward()
        optimizer.step()
        moved = (model.quantiser.codebook() != codebook).any(1)
        assert moved.tolist() == ([True] * 7 if key == "sim_vq" else [i == 2 for i in range(7)])
        frozen[key] = [name for name, value in model.quantiser.state_dict().items() if torch.equal(value, before[name])]
    assert frozen == {"sim_vq": ["frozen_KD"], "vq-gradient": []}
