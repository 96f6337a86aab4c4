"""Small hyperparameters of every built-in model, for laws of all models."""

from typing import Any

import torch

import aezoo

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
    "fre": {"latent_dim": 5},
    "padim": {"n_features": 20},
    "patchcore": {"memory_size": 10},
    "student_teacher": {},
    "reverse_distillation": {"latent_dim": 6},
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
    "compressai": {"width": 4, "latent_dim": 4},
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


def build(name: str, shifted: Any, **extra: Any) -> Any:
    torch.manual_seed(0)
    model = shifted(aezoo.create_model(name, input_shape=SHAPE, **(MODELS[name] | extra)))
    if name in ("topk_sae", "abs_topk_sae", "ra_sae", "batch_topk_sae", "matryoshka_sae", "temporal_sae"):
        large = 3 if name == "temporal_sae" else 8  # whose tokens are rows of pixels
        with torch.no_grad():  # a third is dead, with positive pre-activations below those of the others
            model.encoder.bias += large
            model.encoder.bias[::3] -= large * 5 / 8
        model.since_fired_N[::3] = 10**6
    return model
