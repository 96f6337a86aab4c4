"""Laws of Learned compression with a mean and scale hyperprior (Minnen et al. 2018)."""

import torch
from compression_laws import (  # noqa: F401
    data,
    small,
    test_bf16_symbols_determine_code,
    test_bits_are_counted_per_position_for_vectors_and_maps,
    test_codes_are_encoder_output_within_half_a_step,
    test_gradients_of_both_terms_are_finite_differences,
    test_loss_is_negative_elbo_with_uniform_posterior,
    test_loss_matches_paper_rate_distortion,
    test_rate_and_distortion_train_expected_networks,
    test_sampled_symbols_follow_model_distribution,
    test_score_is_evaluation_loss_per_sample,
    test_side_information_passes_gradients_to_code,
    test_symbol_distributions_are_causal,
    test_symbols_determine_code_and_reconstruction,
)
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401

# ---- coded symbols and their order -----------------------------------------------------------------------------------


def test_zero_means_equal_scale_hyperprior() -> None:
    """With zero means, the same scales, and codes that equal their magnitudes."""
    both = [small(name).eval() for name in ("scale_hyperprior", "mean_scale_hyperprior")]
    one, two = both
    two.load_state_dict({k: v for k, v in one.state_dict().items() if not k.startswith("hyper_decoder")}, strict=False)
    channels = one.code_shape[0]
    with torch.no_grad():
        for mine, its in zip(one.hyper_decoder.parameters(), two.hyper_decoder.parameters(), strict=True):
            if mine.shape == its.shape:
                its.copy_(mine)
        # transposed convolution: (in, out, ...)
        weight, bias = [*two.hyper_decoder.parameters()][-2:]
        weight.zero_()
        bias.zero_()
        weight[:, channels:], bias[channels:] = [*one.hyper_decoder.parameters()][-2:]
        for model in both:
            model.encoder[-1].weight.abs_()
            model.encoder[-1].bias.fill_(100.0)  # positive codes equal their magnitudes
    x = data()
    terms = [model.loss(x) for model in both]
    for term in terms[0]:
        torch.testing.assert_close(terms[0][term], terms[1][term])
