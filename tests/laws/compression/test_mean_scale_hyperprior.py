"""Laws of Learned compression with a mean and scale hyperprior (Minnen et al. 2018)."""

import torch
from compression_laws import (  # noqa: F401
    data,
    small,
    test_a_map_s_law_sees_only_what_was_coded_before,
    test_codes_are_the_encoder_s_output_to_half_a_step,
    test_in_bf16_whole_numbers_are_all_that_a_code_needs_too,
    test_samples_have_the_laws_of_the_model,
    test_score_is_the_loss_of_a_sample_as_it_is_evaluated,
    test_the_loss_is_the_negative_elbo_of_a_uniform_posterior,
    test_the_loss_is_the_paper_s_rate_and_distortion,
    test_vectors_and_maps_count_bits_a_place,
    test_whole_numbers_are_all_that_a_code_needs,
)

# ---- what is coded, and in which order -------------------------------------------------------------------------------


def test_zero_means_equal_scale_hyperprior() -> None:
    """Neutral limit: both with one positive side information and the same scales."""
    both = [small(name).eval() for name in ("scale_hyperprior", "mean_scale_hyperprior")]
    one, two = both
    two.load_state_dict({k: v for k, v in one.state_dict().items() if not k.startswith("hyper_decoder")}, strict=False)
    channels = one.code_shape[0]
    with torch.no_grad():
        for mine, its in zip(one.hyper_decoder.parameters(), two.hyper_decoder.parameters(), strict=True):
            if mine.shape == its.shape:
                its.copy_(mine)
        # the last layer is transposed: (in, out, ...)
        weight, bias = [*two.hyper_decoder.parameters()][-2:]
        weight.zero_()
        bias.zero_()
        weight[:, channels:], bias[channels:] = [*one.hyper_decoder.parameters()][-2:]
        for model in both:
            model.encoder[-1].weight.abs_()
            model.encoder[-1].bias.fill_(100.0)  # codes above 0, of which magnitudes are the same
    x = data()
    terms = [model.loss(x) for model in both]
    for term in terms[0]:
        torch.testing.assert_close(terms[0][term], terms[1][term])
