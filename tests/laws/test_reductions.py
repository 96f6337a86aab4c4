"""Laws of every model: nats per sample, one scale for training and evaluation, float32 where autocast would round."""

import math
from typing import Any

import pytest
import torch
import torch.distributions as D
from torch import Tensor

import aezoo
from aezoo.testing import SharedNoise

SHAPE = (1, 8, 8)
FEW_TOKENS = {"n_tokens": 4, "width": 12, "depth": 1, "decoder_width": 8, "decoder_depth": 1}
FOUR_PLACES = {"net": "mlp", "hidden_dims": (24,), "places": 4}
SMALL_TOKENIZER = {"model": "vq_vae", **FOUR_PLACES, "latent_dim": 4, "codebook_size": 16}
SMALL_SIDE = {"hyper_dim": 3, "hyper_hidden_dims": (5,)}
WITH_SIDE = ("scale_hyperprior", "mean_scale_hyperprior", "joint_ar_hyperprior", "checkerboard", "cheng2020")
MODELS: dict[str, dict[str, Any]] = {
    "linear_ae": {"latent_dim": 4},
    "dense_ae": {"hidden_dims": (24,), "latent_dim": 6},
    "conv_ae": {"hidden_dims": (6, 8), "latent_dim": 6},
    "resnet_ae": {"hidden_dims": (8, 8), "latent_dim": 6},
    "denoising_ae": {"hidden_dims": (24,), "latent_dim": 6},
    "contractive_ae": {"latent_dim": 20},
    "unet_ae": {"hidden_dims": (6, 8), "latent_dim": 6},
    "sequence_ae": {"hidden_dims": (12,), "latent_dim": 6},
    "dncnn": {"width": 6, "depth": 3},
    "noise2noise": {"width": 6, "depth": 3},
    "noise2void": {"width": 6, "depth": 3, "masked": 0.2},
    "sparse_ae_l1": {"latent_dim": 20},
    "sparse_ae_kl": {"latent_dim": 20},
    "topk_sae": {"latent_dim": 40, "k": 5, "dead_after": 60, "multi_weight": 0.125},
    "abs_topk_sae": {"latent_dim": 40, "k": 5, "dead_after": 60, "multi_weight": 0.125},
    "ra_sae": {"latent_dim": 40, "k": 5, "n_points": 30, "dead_after": 60},
    "batch_topk_sae": {"latent_dim": 40, "k": 5, "dead_after": 60},
    "matryoshka_sae": {"latent_dim": 40, "k": 5, "dead_after": 60},
    "matching_pursuit_sae": {"latent_dim": 40, "k": 5},
    "omp_sae": {"latent_dim": 40, "k": 5},
    "temporal_sae": {"latent_dim": 40, "k": 5, "dead_after": 600},
    "k_sparse": {"latent_dim": 40, "k": 5},
    "wta_ae": {"latent_dim": 20, "lifetime": 0.3},
    "sae_l1": {"latent_dim": 40},
    "jumprelu_sae": {"latent_dim": 40},
    "gated_sae": {"latent_dim": 40},
    "transcoder": {"latent_dim": 40},
    "crosscoder": {"latent_dim": 40},
    "memory_ae": {"hidden_dims": (24,), "latent_dim": 6, "n_items": 9},
    "semantic_hash_ae": {"hidden_dims": (24,), "latent_dim": 6},
    "topological_ae": {"hidden_dims": (24,), "latent_dim": 6},
    "triplet_ae": {"hidden_dims": (24,), "latent_dim": 6},
    "isometric_ae": {"hidden_dims": (24,), "latent_dim": 6},
    "stacked_dae": {"hidden_dims": (24,), "latent_dim": 6},
    "mae": {"width": 12, "depth": 2, "decoder_width": 8},
    "simmim": {"width": 12, "depth": 2},
    "masked_conv_ae": {"hidden_dims": (6, 8), "latent_dim": 6},
    "maetok": {"n_tokens": 4, "latent_dim": 6, "width": 12, "decoder_width": 12},
    "ijepa": {"width": 12, "depth": 2, "predictor_width": 8, "decoder_width": 8},
    "dagmm": {"hidden_dims": (24,), "latent_dim": 6},
    "wae_mmd": {"hidden_dims": (24,), "latent_dim": 6},
    "swae": {"hidden_dims": (24,), "latent_dim": 5, "n_projections": 10},
    "cw_ae": {"hidden_dims": (24,), "latent_dim": 6},
    "rae": {"hidden_dims": (24,), "latent_dim": 6, "beta": 0.5, "regulariser_weight": 0.1},
    "wae_gan": {"hidden_dims": (24,), "latent_dim": 6, "discriminator_dims": (12,)},
    "aae": {"hidden_dims": (24,), "latent_dim": 6, "discriminator_dims": (12,)},
    "ganomaly": {"hidden_dims": (24,), "latent_dim": 6, "discriminator_dims": (24, 16)},
    "ae1svm": {"hidden_dims": (24,), "latent_dim": 6, "n_frequencies": 40},
    "deep_svdd": {"hidden_dims": (24,), "latent_dim": 6, "nu": 0.2},
    "alad": {"hidden_dims": (24,), "latent_dim": 6, "discriminator_dims": (24, 16), "nll_weight": 0.5},
    "f_anogan": {"hidden_dims": (24,), "latent_dim": 6, "discriminator_dims": (24, 16), "feature_weight": 0.5},
    "draem": {
        **{"hidden_dims": (6, 8), "latent_dim": 6, "segmentation_dims": (4, 6)},
        **{"ssim_weight": 0.5, "segmentation_weight": 2.0},
    },
    "vae": {"hidden_dims": (24,), "latent_dim": 6, "beta": 2.0},
    "beta_vae": {"hidden_dims": (24,), "latent_dim": 6},
    "annealed_vae": {"hidden_dims": (24,), "latent_dim": 6, "gamma": 5.0},
    "dip_vae_i": {"hidden_dims": (24,), "latent_dim": 6},
    "dip_vae_ii": {"hidden_dims": (24,), "latent_dim": 6},
    "info_vae": {"hidden_dims": (24,), "latent_dim": 6},
    "sigma_vae": {"hidden_dims": (24,), "latent_dim": 6, "beta": 2.0},
    "iwae": {"hidden_dims": (24,), "latent_dim": 6, "n_samples": 6, "estimator": "dreg"},
    "miwae": {"hidden_dims": (24,), "latent_dim": 6, "n_groups": 2, "n_samples": 3},
    "piwae": {"hidden_dims": (24,), "latent_dim": 6, "n_groups": 2, "n_samples": 3, "estimator": "stl"},
    "ciwae": {"hidden_dims": (24,), "latent_dim": 6, "beta": 0.5},
    "beta_tcvae": {"hidden_dims": (24,), "latent_dim": 6, "dataset_size": 50},
    "categorical_vae": {"hidden_dims": (24,), "n_variables": 6, "n_classes": 4, "beta": 2.0, "straight_through": True},
    "joint_vae": {
        **{"hidden_dims": (24,), "latent_dim": 4, "n_variables": 2, "n_classes": 4},
        **{"gamma": 5.0, "straight_through": True},
    },
    "conditional_vae": {"hidden_dims": (24,), "latent_dim": 6, "num_classes": 4},
    "semi_supervised_m1": {"hidden_dims": (24,), "latent_dim": 6, "num_classes": 4},
    "semi_supervised_vae": {"hidden_dims": (24,), "latent_dim": 6, "num_classes": 4},
    "factor_vae": {"hidden_dims": (24,), "latent_dim": 6},
    "mine_vae": {"hidden_dims": (24,), "latent_dim": 6, "discriminator_dims": (12,), "beta": 2.0},
    "vae_gan": {"hidden_dims": (24,), "latent_dim": 6, "discriminator_dims": (96,)},
    "hierarchical_vae": {"hidden_dims": (24,), "latent_dims": (4, 3), "level_dim": 12, "beta": 2.0},
    "ladder_vae": {"hidden_dims": (24,), "latent_dims": (4, 3), "level_dim": 12, "beta": 2.0},
    "vdvae": {"width": 8, "latent_channels": 2, "enc_blocks": (1, 1), "dec_blocks": (1, 2)},
    "mixture_vae": {"hidden_dims": (24,), "latent_dim": 6, "beta": 2.0, "n_components": 4},
    "vamp_vae": {"hidden_dims": (24,), "latent_dim": 6, "beta": 2.0, "n_components": 5},
    "vae_flow": {"hidden_dims": (24,), "latent_dim": 6, "beta": 2.0, "flow": "sylvester", "n_flows": 2},
    "vae_iaf": {"hidden_dims": (24,), "latent_dim": 6, "beta": 2.0, "flow_width": 12},
    "flow_prior_vae": {"hidden_dims": (24,), "latent_dim": 6, "beta": 2.0, "flow_width": 12},
    "two_stage_vae": {"hidden_dims": (24,), "latent_dim": 6, "second_hidden_dims": (24,)},
    "hyperspherical_vae": {"hidden_dims": (24,), "latent_dim": 4, "beta": 2.0},
    "poincare_vae": {"hidden_dims": (24,), "latent_dim": 6, "beta": 2.0},
    "gamma_vae": {"hidden_dims": (24,), "latent_dim": 6, "beta": 2.0},
    "hvae": {"hidden_dims": (24,), "latent_dim": 6},
    "rhvae": {"hidden_dims": (24,), "latent_dim": 6, "n_centroids": 20},
    "logcosh_vae": {"hidden_dims": (24,), "latent_dim": 6},
    "denoising_vae": {"hidden_dims": (24,), "latent_dim": 6},
    "msssim_vae": {"hidden_dims": (24,), "latent_dim": 6},
    "perceptual_vae": {"hidden_dims": (24,), "latent_dim": 6},
    "ada_gvae": {"hidden_dims": (24,), "latent_dim": 6},
    "mlvae": {"hidden_dims": (24,), "latent_dim": 6},
    "triplet_vae": {"hidden_dims": (24,), "latent_dim": 6},
    "mvae": {"hidden_dims": (24,), "latent_dim": 6, "parts": (2, 5, 1), "n_subsets": 2, "beta": 2.0},
    "mmvae": {"hidden_dims": (24,), "latent_dim": 6, "parts": (2, 5, 1), "beta": 2.0},
    "mopoe_vae": {"hidden_dims": (24,), "latent_dim": 6, "parts": (2, 5, 1), "beta": 2.0},
    "jmvae": {"hidden_dims": (24,), "latent_dim": 6, "parts": (2, 5, 1), "beta": 2.0, "alpha": 0.7},
    "mmvae_plus": {"hidden_dims": (24,), "latent_dim": 4, "private_dim": 2, "parts": (2, 5, 1), "beta": 2.0},
    "jnf": {"hidden_dims": (24,), "latent_dim": 6, "flow_width": 12, "parts": (2, 5, 1), "beta": 2.0},
    "nexus": {"hidden_dims": (24,), "latent_dim": 4, "part_dim": 3, "level_dim": 12, "parts": (2, 5, 1), "beta": 2.0},
    "mvtcae": {"hidden_dims": (24,), "latent_dim": 6, "parts": (2, 5, 1), "beta": 2.0, "alpha": 0.6},
    "mhvae": {"hidden_dims": (24,), "latent_dims": (4, 3), "level_dim": 12, "parts": (2, 5, 1), "beta": 2.0},
    "dmvae": {"hidden_dims": (24,), "latent_dim": 4, "private_dim": 2, "parts": (2, 5, 1), "beta": 2.0},
    "telbo": {"hidden_dims": (24,), "latent_dim": 6, "parts": (2, 5, 1), "beta": 2.0, "gamma": 3.0},
    "crmvae": {"hidden_dims": (24,), "latent_dim": 6, "parts": (2, 5, 1), "beta": 2.0, "alpha": 0.6},
    "cmvae": {
        "hidden_dims": (24,),
        "latent_dim": 4,
        "private_dim": 2,
        "n_components": 3,
        "parts": (2, 5, 1),
        "beta": 2.0,
    },
    "vq_vae": {**FOUR_PLACES, "latent_dim": 4, "codebook_size": 8},
    "rq_vae": {**FOUR_PLACES, "latent_dim": 4, "levels": 3, "codebook_size": 5},
    "fsq_vae": {**FOUR_PLACES, "levels": (4, 3, 5)},
    "lfq_vae": {**FOUR_PLACES, "latent_dim": 4},
    "bsq_vae": {**FOUR_PLACES, "latent_dim": 4},
    "sim_vq_vae": {**FOUR_PLACES, "latent_dim": 4, "codebook_size": 8},
    "fvq_vae": {**FOUR_PLACES, "latent_dim": 4, "codebook_size": 8, "width": 12, "depth": 1},
    "fsp_vae": {**FOUR_PLACES, "levels": (4, 3, 5)},
    "vp_vae": {**FOUR_PLACES, "codebook_size": 8, "neighbours": 3, "queue_size": 40},
    "qlae": {"hidden_dims": (24,), "latent_dim": 6, "n_values": 4, "beta": 0.5},
    "vq_vae_2": {"hidden_dims": (6, 8), "top_dims": (6,), "latent_dim": 4, "codebook_size": 16},
    "gumbel_vq_vae": {"hidden_dims": (6, 8), "latent_dim": 4, "codebook_size": 16, "beta": 2.0, "hard": True},
    "sq_vae": {"hidden_dims": (6, 8), "latent_dim": 4, "codebook_size": 16, "variance": "sample", "hard": True},
    "titok": {**FEW_TOKENS, "latent_dim": 6, "codebook_size": 9, "update": "gradient"},
    "soft_vq": {**FEW_TOKENS, "latent_dim": 6, "codebook_size": 9, "entropy_weight": 0.5, "temperature": 1.0},
    "pixelcnn": {"tokenizer": SMALL_TOKENIZER, "width": 12, "depth": 2, "dropout": 0.0},
    "index_transformer": {"tokenizer": SMALL_TOKENIZER, "width": 16, "depth": 1, "dropout": 0.0},
    "dvae": {"hidden_dims": (6, 8), "latent_dim": 4, "codebook_size": 16, "beta": 2.0, "kl_steps": 0, "hard": True},
    "factorized_prior": {"hidden_dims": (6, 8), "latent_dim": 4},
    **{name: {"hidden_dims": (6, 8), "latent_dim": 4, **SMALL_SIDE} for name in WITH_SIDE},
    "elic": {"hidden_dims": (8, 8), "groups": (1, 3), **SMALL_SIDE},
    "gained_hyperprior": {"hidden_dims": (6, 8), "latent_dim": 4, "lams": (0.01, 0.01), **SMALL_SIDE},
    "autoencoder_kl": {"hidden_dims": (6, 8), "latent_dim": 4, "beta": 2.0, "perceptual_weight": 0.5},
    "eq_vae": {"hidden_dims": (6, 8), "latent_dim": 4, "beta": 2.0, "perceptual_weight": 0.5, "equivariance": 1.0},
    "va_vae": {"hidden_dims": (6, 8), "latent_dim": 4, "beta": 2.0, "perceptual_weight": 0.5, "alignment_weight": 0.3},
    "asymmetric_kl": {"hidden_dims": (6, 8), "latent_dim": 4, "beta": 2.0, "perceptual_weight": 0.5, "full_mask": 0.3},
    "vqgan": {"hidden_dims": (6, 8), "latent_dim": 4, "codebook_size": 8, "perceptual_weight": 0.5},
    "taesd": {"hidden_dims": (6, 8), "latent_dim": 4},
    "consistency_decoder": {"hidden_dims": (6, 8), "latent_dim": 4, "nll_weight": 0.5},
    "representation_ae": {"code_shape": (6, 4, 4), "width": 12, "depth": 1, "perceptual_weight": 0.5},
    "diffusers_ae": {"config": {"block_out_channels": [6, 8], "norm_num_groups": 2}, "beta": 2.0},
}
# rhohat is a mean over the batch before it enters a logarithm; dead latents are counted over batches; the others
# compare a mean, a covariance or the codes of a whole batch with something, or weigh gradients of a whole batch
BATCH_COUPLED = (
    *("sparse_ae_kl", "topk_sae", "annealed_vae", "dip_vae_i", "dip_vae_ii", "info_vae", "beta_tcvae", "joint_vae"),
    *("factor_vae", "vae_gan", "wta_ae", "dagmm", "wae_mmd", "swae", "cw_ae", "topological_ae"),
    *("lfq_vae", "bsq_vae", "soft_vq", "autoencoder_kl", "eq_vae", "asymmetric_kl", "vqgan", "mine_vae", "va_vae"),
    *("representation_ae", "vp_vae", "fsp_vae"),
)
# what is estimated depends on how many samples there are
BATCH_SIZED = ("beta_tcvae", "wta_ae", "wae_mmd", "cw_ae", "topological_ae")
# a bound is a logarithm of a mean, no sum of terms
BOUNDS = ("iwae", "miwae", "piwae", "ciwae", "conditional_vae")
# the likelihood is that of a noisy code or of a noisy sample's, of a code that the batch has thinned out, or of indices
NOISY = (
    *("denoising_ae", "vae", "beta_vae", "annealed_vae", "dip_vae_i", "dip_vae_ii", "info_vae", "sigma_vae", *BOUNDS),
    *("beta_tcvae", "logcosh_vae", "denoising_vae", "msssim_vae", "perceptual_vae", "ada_gvae", "mlvae"),
    *("categorical_vae", "joint_vae", "semi_supervised_vae", "semi_supervised_m1", "factor_vae", "vae_gan"),
    *("hierarchical_vae", "ladder_vae", "vdvae", "mixture_vae", "vamp_vae", "vae_flow", "vae_iaf", "flow_prior_vae"),
    *("two_stage_vae", "hyperspherical_vae", "poincare_vae", "hvae", "rhvae", "wta_ae", "dncnn", "noise2noise"),
    *("noise2void", "mae", "simmim", "masked_conv_ae", "semantic_hash_ae", "stacked_dae", "draem"),
    *("gumbel_vq_vae", "dvae", "pixelcnn", "index_transformer", "autoencoder_kl", "gamma_vae"),
    *("triplet_vae", "eq_vae", "asymmetric_kl", "mvae", "mmvae", "mopoe_vae", "sq_vae", "mine_vae", "va_vae"),
    *("diffusers_ae", "jmvae", "mvtcae", "mmvae_plus", "mhvae", "representation_ae", "dmvae", "telbo", "crmvae"),
    *("cmvae", "jnf", "nexus"),
)
# evaluated with whole numbers, trained with noise in place of rounding
ROUNDED = ("factorized_prior", *WITH_SIDE, "elic", "gained_hyperprior")
# trained with the scale that suits the batch, evaluated with its running mean; the likelihood is its own, or codes are
# noisy in training alone
OWN_SCALE = (
    *("sigma_vae", "sq_vae", "representation_ae", "batch_topk_sae", "matryoshka_sae", "dagmm", "vp_vae", "fsp_vae"),
    *ROUNDED,
)
# the score is another than -log p(x | xhat)
OWN_SCORE = (
    "dagmm",
    "ganomaly",
    "ae1svm",
    "deep_svdd",
    "alad",
    "f_anogan",
    "draem",
    "pixelcnn",
    "index_transformer",
    *ROUNDED,
)
# nll + kl, whatever these are
PLAIN = (
    *("semi_supervised_m1", "logcosh_vae", "denoising_vae", "msssim_vae", "perceptual_vae", "ada_gvae", "mlvae"),
    "triplet_vae",
)
# takes no other likelihood
OWN_LIKELIHOOD = (
    *("sigma_vae", "sq_vae", "logcosh_vae", "dncnn", "noise2noise", "noise2void"),
    *("pixelcnn", "index_transformer", "consistency_decoder"),
)


def build(name: str, shifted: Any, **extra: Any) -> Any:
    torch.manual_seed(0)
    model = shifted(aezoo.create_model(name, input_shape=SHAPE, **MODELS[name], **extra))
    if name in ("topk_sae", "abs_topk_sae", "ra_sae", "batch_topk_sae", "matryoshka_sae", "temporal_sae"):
        large = 3 if name == "temporal_sae" else 8  # which is of a row of pixels
        with torch.no_grad():  # a third is dead, with positive pre-activations that the live latents outrank
            model.encoder.bias += large
            model.encoder.bias[::3] -= large * 5 / 8
        model.since_fired_N[::3] = 10**6
    return model


def loss(model: Any, x: Tensor, rows: Any, total: int = 6) -> dict[str, Tensor]:
    with SharedNoise(rows, total), torch.no_grad():
        found: dict[str, Tensor] = model.loss(x)
    return found


def test_the_table_covers_every_built_in_model() -> None:
    built_in = {
        name
        for family in (
            *("classic", "sparse", "variational", "regularised", "masked", "quantised", "compression"),
            "latent_diffusion",
        )
        for name in aezoo.list_models(family=family)
    }
    assert set(MODELS) == built_in


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in BATCH_SIZED])
def test_a_batch_given_twice_has_the_same_loss(name: str, training: bool, shifted: Any) -> None:
    """A sum over the batch, or an unbiased statistic of it, would show; rhohat and the L0 are plain means."""
    x = torch.rand(6, *SHAPE)
    once = loss(build(name, shifted).double().train(training), x.double(), range(6))
    twice = loss(build(name, shifted).double().train(training), x.double().repeat(2, 1, 1, 1), [*range(6)] * 2)
    assert once.keys() == twice.keys()
    for term in once:
        torch.testing.assert_close(twice[term], once[term], rtol=1e-6, atol=1e-9, msg=lambda m, t=term: f"{t}: {m}")


@pytest.mark.parametrize("name", [name for name in MODELS if name not in BATCH_COUPLED])
def test_the_loss_of_a_batch_is_the_mean_of_its_samples(name: str, shifted: Any) -> None:
    model, x = build(name, shifted).double().eval(), torch.rand(6, *SHAPE, dtype=torch.float64)
    whole = loss(model, x, range(6))
    alone = [loss(model, x[i : i + 1], [i]) for i in range(6)]
    for term in whole:
        mean = torch.stack([one[term] for one in alone]).mean()
        torch.testing.assert_close(whole[term], mean, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_codes_reconstructions_and_scores_ignore_the_batch_mates(name: str, shifted: Any) -> None:
    model, x = build(name, shifted).double().eval(), torch.rand(6, *SHAPE, dtype=torch.float64)
    for call in (model.encode, model, model.score):
        with torch.no_grad():
            torch.testing.assert_close(call(x)[2:4], call(x[2:4]), rtol=1e-9, atol=1e-12)


# trained on images that are turned, or with a part of them in sight
PARTIAL = ("eq_vae", "asymmetric_kl", "maetok", "nexus")


@pytest.mark.parametrize("name", [name for name in MODELS if name not in (*OWN_SCALE, *PARTIAL)])
def test_training_and_evaluation_compute_the_same_loss_at_the_same_noise(name: str, shifted: Any) -> None:
    x = torch.rand(6, *SHAPE)
    train, evaluation = (loss(build(name, shifted).train(mode), x, range(6)) for mode in (True, False))
    for term in train:
        torch.testing.assert_close(train[term], evaluation[term], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in (*NOISY, *OWN_LIKELIHOOD)])
def test_nll_is_summed_over_the_data_and_averaged_over_the_batch(name: str, shifted: Any) -> None:
    """Against torch.distributions, summed over the 64 values here: a mean over them would be 64 times less."""
    for likelihood in ("bernoulli", "gaussian:0.3"):
        model, x = build(name, shifted, likelihood=likelihood).eval(), torch.rand(6, *SHAPE)
        x_hat = model(x)
        if likelihood == "bernoulli":
            log_p = D.Bernoulli(probs=x_hat, validate_args=False).log_prob(x)
        else:
            log_p = D.Normal(x_hat, 0.3).log_prob(x)
        expected = -log_p.flatten(1).sum(1)
        torch.testing.assert_close(model.loss(x)["nll"], expected.mean(), rtol=1e-4, atol=1e-3)
        if name not in OWN_SCORE:
            torch.testing.assert_close(model.score(x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in (*BOUNDS, "vae_gan")])
def test_the_loss_is_the_weighted_sum_of_its_terms(name: str, shifted: Any) -> None:
    weights = {
        "contractive_ae": {"jacobian": 0.1},
        "sparse_ae_l1": {"l1": 0.1},
        "sparse_ae_kl": {"sparsity": 6.0, "l2": 1e-4},
        **{key: {"aux": 1 / 32, "multi": 1 / 8} for key in ("topk_sae", "abs_topk_sae")},
        **{key: {"aux": 1 / 32} for key in ("batch_topk_sae", "ra_sae", "temporal_sae")},
        "matryoshka_sae": {"aux": 1 / 32, "prefix_nll": 1.0},
        **{key: {"l1": 1.0} for key in ("sae_l1", "transcoder", "crosscoder")},
        "jumprelu_sae": {"l0": 0.1},
        "gated_sae": {"l1": 1.0, "aux": 1.0},
        "memory_ae": {"entropy": 2e-4},
        "topological_ae": {"x_to_z": 500.0, "z_to_x": 500.0},
        "isometric_ae": {"iso": 10.0, "piso": 10.0},
        "simmim": {"readout": 1.0},
        "maetok": {"hog": 1.0},
        "ijepa": {"prediction": 1.0},
        "wae_mmd": {"mmd": 10.0},
        "swae": {"sw": 10.0},
        "cw_ae": {"log_cw": 1.0},
        "rae": {"code": 0.5, "l2": 0.1},
        "wae_gan": {"adversarial": 10.0},
        "aae": {"adversarial": 1.0},
        "dagmm": {"energy": 0.1, "inverse_variances": 0.005},
        "ganomaly": {"adversarial": 0.02, "encoding": 0.02},
        "ae1svm": {"svm": 1.0},
        "deep_svdd": {"svdd": 1.0},
        "alad": {"nll": -0.5, "adversarial": 1.0, "cycle_x": 1.0, "cycle_z": 1.0},
        "f_anogan": {"features": 0.5},
        "draem": {"structure": 0.5, "segmentation": 2.0},
        "vae": {"kl": 2.0},
        "beta_vae": {"kl": 4.0},
        "annealed_vae": {"kl": 5.0},
        "dip_vae_i": {"kl": 1.0, "off_diagonal": 10.0, "diagonal": 100.0},
        "dip_vae_ii": {"kl": 1.0, "off_diagonal": 10.0, "diagonal": 10.0},
        "info_vae": {"kl": 1.0, "mmd": 499.0},
        "sigma_vae": {"kl": 2.0},
        "factor_vae": {"kl": 1.0, "tc": 10.0},
        "mine_vae": {"kl": 2.0, "mi": -0.5},
        "categorical_vae": {"kl": 2.0},
        "hyperspherical_vae": {"kl": 2.0},
        "poincare_vae": {"kl": 2.0},
        "gamma_vae": {"kl": 2.0},
        "hvae": {"kl": 1.0},
        "rhvae": {"kl": 1.0},
        "hierarchical_vae": {"kl": 2.0},
        "ladder_vae": {"kl": 2.0},
        "vdvae": {"kl": 1.0},
        **{key: {"kl": 2.0} for key in ("mixture_vae", "vamp_vae", "vae_flow", "vae_iaf", "flow_prior_vae")},
        **{key: {"kl": 2.0} for key in ("mmvae", "mopoe_vae", "mmvae_plus", "cmvae")},
        "mvae": {"kl": 2.0, "subset_nelbo": 1.0},
        "mhvae": {"nll": 1 / 7 - 1, "kl": 2 / 7, "subset_nelbo": 1.0},
        "jmvae": {"kl": 2.0, "parts_kl": 0.7},
        "jnf": {"kl": 2.0, "parts_kl": 1.0},
        "nexus": {"kl": 2.0, "top_nll": 1.0, "top_kl": 1.0},
        "mvtcae": {"nll": -0.2, "kl": 0.8, "parts_kl": 0.4},
        "dmvae": {"kl": 2.0, "cross_nelbo": 1.0},
        "telbo": {"kl": 2.0, "parts_nelbo": 1.0},
        "crmvae": {"nll": -0.2, "kl": 0.8, "parts_kl": 0.4, "own_nll": 0.2},
        "two_stage_vae": {"kl": 1.0, "code_nll": 1.0, "code_kl": 1.0},
        "joint_vae": {"kl_continuous": 5.0, "kl_discrete": 5.0},
        "semi_supervised_vae": {"kl": 1.0},
        "beta_tcvae": {"mi": 1.0, "tc": 6.0, "dwkl": 1.0},
        **{key: {"commitment": 0.25} for key in ("vq_vae", "rq_vae", "vq_vae_2")},
        **{key: {"kl": 2.0} for key in ("gumbel_vq_vae", "dvae", "diffusers_ae")},
        "sq_vae": {"kl": 1.0, "dequantisation": 1.0},
        **{key: {"tokenizer_loss": 1.0} for key in ("pixelcnn", "index_transformer")},
        "titok": {"commitment": 0.25, "codebook": 1.0},
        "soft_vq": {"entropy": 0.5, "diversity": -0.5},
        **{key: {"commitment": 0.25, "codebook": 1.0} for key in ("sim_vq_vae", "fvq_vae")},
        **{key: {"code_mean": 0.5, "code_variance": 0.35} for key in ("vp_vae", "fsp_vae")},
        "qlae": {"commitment": 0.5, "codebook": 1.0},
        "lfq_vae": {"entropy": 0.3, "diversity": -0.3, "commitment": 0.25},
        "bsq_vae": {"entropy": 0.3, "diversity": -0.3},
        **{key: {"kl": 2.0, "perceptual": 0.5} for key in ("autoencoder_kl", "eq_vae", "asymmetric_kl", "va_vae")},
        "consistency_decoder": {"nll": -0.5, "consistency": 1.0},
        "representation_ae": {"perceptual": 0.5},
        "vqgan": {"commitment": 0.25, "codebook": 1.0, "perceptual": 0.5},
        **{key: {"kl": 1.0} for key in PLAIN},
        # lam of 0.01, of squared errors of values to 255 and of bits
        **{key: {"rate": 1.0, "nll": 0.01 * 255**2 * math.log(2) - 1} for key in ROUNDED},
    }.get(name, {})
    terms = build(name, shifted).double().loss(torch.rand(6, *SHAPE, dtype=torch.float64))
    total = terms["nll"] + sum(weight * terms[term] for term, weight in weights.items())
    torch.testing.assert_close(terms["loss"], total)
    assert all(terms[term] != 0 for term in weights)  # away from the neutral value
    assert all(value.shape == () for value in terms.values())


@pytest.mark.parametrize(
    "likelihood", ["bernoulli", "gaussian", "continuous_bernoulli", "discretised_logistic", "beta_binomial"]
)
@pytest.mark.parametrize("name", [name for name in MODELS if name not in OWN_LIKELIHOOD])
def test_terms_stay_float32_and_close_under_bf16_autocast(name: str, likelihood: str, shifted: Any) -> None:
    model, x = build(name, shifted, likelihood=likelihood).eval(), torch.rand(64, *SHAPE)
    full = loss(model, x, range(64), 64)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(model, x, range(64), 64)
    for term, value in half.items():
        assert value.dtype == torch.float32, term
        if term not in ("dead_latents", "l0"):
            least = 0.02 * math.log(2)
            if name in ROUNDED:  # some numbers are rounded to the one beside, and a loss weighs its nll up
                least = 0.1 * (model.weight if term == "loss" else 1)
            assert value.item() == pytest.approx(full[term].item(), rel=0.02, abs=least), term
