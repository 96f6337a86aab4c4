"""Laws of BSQ autoencoder, binary spherical quantisation (Zhao et al. 2024)."""

import torch
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from quantised_laws import (  # noqa: F401
    DIM,
    built,
    data,
    passed,
    test_autocast_indices_and_terms_match_float32,
    test_each_term_trains_expected_parts_only,
    test_inference_calls_do_not_update_codebook,
    test_invalid_values_are_refused,
    test_loss_matches_numpy_formula,
    test_resume_is_exact_and_indices_roundtrip,
)

# ---- gradients -------------------------------------------------------------------------------------------------------


def test_gradient_passes_sphere_and_bound() -> None:
    _, z, _, of_z, of_q = passed("bsq")
    norm = z.norm(dim=1, keepdim=True)
    u = z / norm
    torch.testing.assert_close(of_z, (of_q - u * (u * of_q).sum(1, keepdim=True)) / norm)
    for key in ("fsq", "fsq-deep"):
        _, z, _, of_z, of_q = passed(key)
        L = torch.tensor([4.0, 3, 5, 6], dtype=torch.float64)
        half, offset = (L - 1) * 0.999 / 2, torch.where(L % 2 == 0, 0.5, 0.0)
        slope = half / torch.cosh(z + (offset / half).tan()) ** 2 / (L // 2)
        torch.testing.assert_close(of_z, of_q * slope)


# ---- special cases ---------------------------------------------------------------------------------------------------


def test_one_channel_bsq_equals_lfq_and_zero_weights_nll() -> None:
    models = [built(name, latent_dim=1).double() for name in ("lfq_vae", "bsq_vae")]
    models[1].load_state_dict(models[0].state_dict())
    x = data()
    assert models[0].loss(x)["nll"].item() == models[1].loss(x)["nll"].item()
    for name in ("lfq_vae", "bsq_vae", "vq_vae", "rq_vae"):
        weights = {"entropy_weight": 0.0} if name in ("lfq_vae", "bsq_vae") else {}
        terms = built(name, beta=0.0, latent_dim=DIM, **weights).loss(x.float())
        assert terms["loss"].item() == terms["nll"].item() and terms["commitment"].item() > 0
