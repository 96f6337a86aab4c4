"""Laws of all models: terms in nats per sample, the same in training and evaluation, in float32 under autocast."""

import math
from typing import Any

import pytest
import torch
import torch.distributions as D
from reductions_helpers import (
    MODELS,
    SHAPE,
    WITH_SIDE,
    build,
)
from representative_models import SLOW_REPRESENTATIVE, others_slow
from torch import Tensor

import aezoo
from aezoo.testing import SharedNoise

# the loss is not a mean over samples: rhohat is a batch mean in a logarithm, dead latents are counted over batches, the
# others have statistics, codes or gradients of the whole batch
BATCH_COUPLED = (
    *("sparse_ae_kl", "topk_sae", "annealed_vae", "dip_vae_i", "dip_vae_ii", "info_vae", "beta_tcvae", "joint_vae"),
    *("factor_vae", "vae_gan", "wta_ae", "dagmm", "wae_mmd", "swae", "cw_ae", "topological_ae"),
    *("lfq_vae", "bsq_vae", "soft_vq", "autoencoder_kl", "eq_vae", "asymmetric_kl", "vqgan", "mine_vae", "va_vae"),
    *("representation_ae", "vp_vae", "fsp_vae"),
)


# estimates that depend on the batch size
BATCH_SIZED = ("beta_tcvae", "wta_ae", "wae_mmd", "cw_ae", "topological_ae")


# the bound is the logarithm of a mean, not a sum of terms
BOUNDS = ("iwae", "miwae", "piwae", "ciwae", "conditional_vae")


# the nll is of a noisy code, of a corrupted sample, of a code that is sparse across the batch, or of indices
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


# rounded codes in evaluation, noise instead of rounding in training
ROUNDED = ("factorized_prior", *WITH_SIDE, "elic", "gained_hyperprior", "compressai")


# batch statistics in training and running means in evaluation, or noise in training only
OWN_SCALE = (
    *("sigma_vae", "sq_vae", "representation_ae", "batch_topk_sae", "matryoshka_sae", "dagmm", "vp_vae", "fsp_vae"),
    *ROUNDED,
)


# the score is not -log p(x | xhat)
OWN_SCORE = (
    "dagmm",
    "ganomaly",
    "ae1svm",
    "deep_svdd",
    "alad",
    "f_anogan",
    "draem",
    *("fre", "padim", "patchcore", "student_teacher", "reverse_distillation"),
    "pixelcnn",
    "index_transformer",
    *ROUNDED,
)


# the loss is nll + kl
PLAIN = (
    *("semi_supervised_m1", "logcosh_vae", "denoising_vae", "msssim_vae", "perceptual_vae", "ada_gvae", "mlvae"),
    "triplet_vae",
)


# the likelihood cannot be chosen
OWN_LIKELIHOOD = (
    *("sigma_vae", "sq_vae", "logcosh_vae", "dncnn", "noise2noise", "noise2void"),
    *("pixelcnn", "index_transformer", "consistency_decoder"),
)


def loss(model: Any, x: Tensor, rows: Any, total: int = 6) -> dict[str, Tensor]:
    with SharedNoise(rows, total), torch.no_grad():
        found: dict[str, Tensor] = model.loss(x)
    return found


def test_settings_cover_every_built_in_model() -> None:
    built_in = {
        name
        for family in (
            *("classic", "sparse", "variational", "regularised", "masked", "quantised", "compression"),
            "latent_diffusion",
        )
        for name in aezoo.list_models(family=family)
    }
    assert set(MODELS) == built_in


def parametrize_models(left_out: Any) -> Any:
    """Parametrise by the names of all other models; only representative ones run by default."""
    return pytest.mark.parametrize("name", others_slow([n for n in MODELS if n not in left_out], SLOW_REPRESENTATIVE))


@pytest.mark.parametrize("training", [True, False])
@parametrize_models(BATCH_SIZED)
def test_a_batch_given_twice_has_the_same_loss(name: str, training: bool, shifted: Any) -> None:
    """Sums over the batch and unbiased statistics would differ; rhohat and the L0 are plain means."""
    x = torch.rand(6, *SHAPE)
    once = loss(build(name, shifted).double().train(training), x.double(), range(6))
    twice = loss(build(name, shifted).double().train(training), x.double().repeat(2, 1, 1, 1), [*range(6)] * 2)
    assert once.keys() == twice.keys()
    for term in once:
        torch.testing.assert_close(twice[term], once[term], rtol=1e-6, atol=1e-9, msg=lambda m, t=term: f"{t}: {m}")


@parametrize_models(BATCH_COUPLED)
def test_batch_loss_is_mean_over_samples(name: str, shifted: Any) -> None:
    model, x = build(name, shifted).double().eval(), torch.rand(6, *SHAPE, dtype=torch.float64)
    whole = loss(model, x, range(6))
    alone = [loss(model, x[i : i + 1], [i]) for i in range(6)]
    for term in whole:
        mean = torch.stack([one[term] for one in alone]).mean()
        torch.testing.assert_close(whole[term], mean, rtol=1e-6, atol=1e-9)


@parametrize_models(())
def test_codes_reconstructions_and_scores_ignore_other_samples(name: str, shifted: Any) -> None:
    model, x = build(name, shifted).double().eval(), torch.rand(6, *SHAPE, dtype=torch.float64)
    for call in (model.encode, model, model.score):
        with torch.no_grad():
            torch.testing.assert_close(call(x)[2:4], call(x[2:4]), rtol=1e-9, atol=1e-12)


# training transforms inputs, or hides parts of them
PARTIAL = ("eq_vae", "asymmetric_kl", "maetok", "nexus")


@parametrize_models((*OWN_SCALE, *PARTIAL))
def test_training_and_evaluation_losses_agree_at_equal_noise(name: str, shifted: Any) -> None:
    x = torch.rand(6, *SHAPE)
    train, evaluation = (loss(build(name, shifted).train(mode), x, range(6)) for mode in (True, False))
    for term in train:
        torch.testing.assert_close(train[term], evaluation[term], rtol=1e-6, atol=1e-6)


@parametrize_models((*NOISY, *OWN_LIKELIHOOD))
def test_nll_is_summed_over_the_data_and_averaged_over_the_batch(name: str, shifted: Any) -> None:
    """Against torch.distributions, summed over the 64 values of a sample."""
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


@parametrize_models((*BOUNDS, "vae_gan"))
def test_the_loss_is_the_weighted_sum_of_its_terms(name: str, shifted: Any) -> None:
    weights = {
        "contractive_ae": {"jacobian": 0.1},
        "sparse_ae_l1": {"l1": 0.1},
        "sparse_ae_kl": {"sparsity": 6.0, "l2": 1e-4},
        **{key: {"aux": 1 / 32, "multi": 1 / 8} for key in ("topk_sae", "abs_topk_sae")},
        **{key: {"aux": 1 / 32} for key in ("batch_topk_sae", "ra_sae", "temporal_sae")},
        "matryoshka_sae": {"nll": 1 / 6 - 1, "prefix_nll": 1 / 6, "aux": 1 / 32},
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
        "fre": {"fre": 1.0},
        "student_teacher": {"imitation": 1.0},
        "reverse_distillation": {"distillation": 1.0},
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
        # lam = 0.01 is for squared errors of values up to 255, and for bits
        **{key: {"rate": 1.0, "nll": 0.01 * 255**2 * math.log(2) - 1} for key in ROUNDED},
        "compressai": {"rate": 1.0, "nll": 0.01 * 255**2 * math.log(2) - 1, "quantiles": 1.0},
    }.get(name, {})
    terms = build(name, shifted).double().loss(torch.rand(6, *SHAPE, dtype=torch.float64))
    total = terms["nll"] + sum(weight * terms[term] for term, weight in weights.items())
    torch.testing.assert_close(terms["loss"], total)
    assert all(terms[term] != 0 for term in weights)  # not at a neutral value
    assert all(value.shape == () for value in terms.values())


@pytest.mark.parametrize(
    "likelihood", ["bernoulli", "gaussian", "continuous_bernoulli", "discretised_logistic", "beta_binomial"]
)
@parametrize_models(OWN_LIKELIHOOD)
def test_terms_stay_float32_and_close_under_bf16_autocast(name: str, likelihood: str, shifted: Any) -> None:
    model, x = build(name, shifted, likelihood=likelihood).eval(), torch.rand(64, *SHAPE)
    full = loss(model, x, range(64), 64)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(model, x, range(64), 64)
    for term, value in half.items():
        assert value.dtype == torch.float32, term
        if term not in ("dead_latents", "l0"):
            least = 0.02 * math.log(2)
            if name in ROUNDED:  # some values are rounded to another integer, and the weight of the nll is large
                least = 0.1 * (model.weight if term == "loss" else 1)
            # a ratio of the norms of two gradients, whose sums cancel in part, which loses precision
            relative = 0.1 if term == "adaptive_weight" else 0.02
            assert value.item() == pytest.approx(full[term].item(), rel=relative, abs=least), term
