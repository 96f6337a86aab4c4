"""Long trainings with random hyperparameters and their memory use, for test_soak.py."""

import ctypes
import gc
import inspect
import mmap
import random
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np

from aezoo import registry
from aezoo.bases.triplet import MINING
from aezoo.models.classic.isometric_ae import DISTORTIONS
from aezoo.models.classic.semantic_hash_ae import BINARISATIONS
from aezoo.models.regularised.rae import REGULARISERS
from aezoo.models.variational.ada_gvae import AVERAGES
from aezoo.models.variational.flow_prior_vae import PRIORS
from aezoo.models.variational.info_vae import KERNELS
from aezoo.models.variational.iwae import ESTIMATORS
from aezoo.nets.blocks.compressai import ARCHITECTURES
from aezoo.nets.blocks.dictionary import DECODES, INPUT_NORMS
from aezoo.nets.blocks.diffusers import KINDS
from aezoo.nets.blocks.flows import FLOWS
from aezoo.nets.blocks.split_diffusers import CONSISTENCY, RAE
from aezoo.nets.build import ACTIVATIONS, WEIGHT_INITS
from aezoo.quantisers.fsp import SQUASHES
from aezoo.quantisers.stochastic_vq import VARIANCES
from aezoo.quantisers.vq import UPDATES
from aezoo.training.optimizers import OPTIMIZERS, SCHEDULES

LIKELIHOODS = (
    "bernoulli", "continuous_bernoulli", "gaussian", "gaussian:0.1", "gaussian:learned", "laplace", "laplace:learned",
    "discretised_logistic", "beta_binomial", "logcosh", "logcosh:learned", "logit_laplace", "sigmoid_gaussian",
)  # fmt: skip
# how to draw each argument of the models; a test checks that none is missing
RANGES = {
    "latent_dim": lambda rng: rng.randint(4, 24),
    "latent_map": lambda rng: rng.random() < 0.5,
    "hidden_dims": lambda rng: [rng.randint(4, 32) for _ in range(rng.randint(0, 3))],
    "net": lambda rng: rng.choice(("mlp", "conv", "resnet", "conv_keras", "gdn", "dc", "mixer")),
    "activation": lambda rng: rng.choice([*ACTIVATIONS]),
    "weight_init": lambda rng: rng.choice(WEIGHT_INITS),
    "code_activation": lambda rng: rng.choice([*ACTIVATIONS]),
    "likelihood": lambda rng: rng.choice(LIKELIHOODS),
    # small: training with a large learning rate may diverge, which has tests of its own
    "lr": lambda rng: 10 ** rng.uniform(-5, -3),
    "optimizer": lambda rng: rng.choice([name for name in OPTIMIZERS if name != "sgd"]),
    "weight_decay": lambda rng: rng.choice((0.0, 1e-4)),
    "lr_schedule": lambda rng: rng.choice([*SCHEDULES]),
    "warmup_steps": lambda rng: rng.randint(0, 20),
    "contraction": lambda rng: rng.uniform(0, 1),
    "corruption": lambda rng: rng.choice(("gaussian:0.3", "masking:0.3", "salt_and_pepper:0.2", "none")),
    "beta": lambda rng: rng.uniform(0, 4),
    "rho": lambda rng: rng.uniform(0.01, 0.5),
    "l1": lambda rng: rng.uniform(0, 1),
    "l2": lambda rng: rng.choice((0.0, 1e-4, 1e-2)),
    "k": lambda rng: rng.randint(1, 4),
    "start_k": lambda rng: rng.choice((0, 4)),
    "k_steps": lambda rng: rng.randint(0, 500),
    "lifetime": lambda rng: rng.uniform(0.01, 1),
    "spatial": lambda rng: rng.random() < 0.5,
    "form": lambda rng: rng.choice(("unit_norm", "april")),
    "input_norm": lambda rng: rng.choice(INPUT_NORMS),
    "unit_norm": lambda rng: rng.random() < 0.5,
    "skip": lambda rng: rng.random() < 0.5,
    "l1_steps": lambda rng: rng.randint(0, 500),
    "resample_steps": lambda rng: rng.choice((0, 3, 50)),
    "l0_weight": lambda rng: rng.uniform(0, 1),
    "l0_steps": lambda rng: rng.randint(0, 500),
    "target_l0": lambda rng: rng.choice((0.0, 3.0)),
    "threshold": lambda rng: rng.uniform(0, 0.1),
    "targets": lambda rng: [],
    "data_init": lambda rng: rng.random() < 0.5,
    "tied": lambda rng: rng.random() < 0.5,
    "aux_scale": lambda rng: rng.choice(("sse", "variance")),
    "multi_weight": lambda rng: rng.choice((0.0, 0.125)),
    "decode": lambda rng: rng.choice(DECODES),
    "theta_decay": lambda rng: rng.choice((0.0, 0.9, 0.99)),
    "fractions": lambda rng: sorted(rng.uniform(0.01, 0.99) for _ in range(rng.randint(0, 3))),
    "energy_weight": lambda rng: rng.uniform(0, 1),
    "covariance_weight": lambda rng: rng.uniform(0, 0.1),
    "estimation_dim": lambda rng: rng.randint(1, 20),
    "dropout": lambda rng: rng.uniform(0, 0.9),
    "adv_weight": lambda rng: rng.uniform(0, 1),
    "enc_weight": lambda rng: rng.uniform(0, 1),
    "ssim_weight": lambda rng: rng.uniform(0, 1),
    "segmentation_weight": lambda rng: rng.uniform(0, 2),
    "segmentation_dims": lambda rng: [rng.randint(4, 12) for _ in range(rng.randint(1, 3))],
    "source": lambda rng: rng.choice(("color", "samples")),
    "svm_weight": lambda rng: rng.uniform(0, 10),
    "nll_weight": lambda rng: rng.uniform(0, 2),
    "generator_weight": lambda rng: rng.uniform(0, 1),
    "feature_weight": lambda rng: rng.uniform(0, 2),
    "penalty_weight": lambda rng: rng.uniform(0, 20),
    "pool": lambda rng: rng.randint(1, 3),
    "n_features": lambda rng: rng.randint(1, 40),
    "epsilon": lambda rng: 10 ** rng.uniform(-4, 0),
    "memory_size": lambda rng: rng.randint(1, 60),
    "n_neighbors": lambda rng: rng.randint(1, 12),
    "nu": lambda rng: rng.uniform(0.01, 0.99),
    "n_frequencies": lambda rng: rng.randint(1, 100),
    "sw_weight": lambda rng: rng.uniform(0, 50),
    "cw_weight": lambda rng: rng.uniform(0, 5),
    "adversarial_weight": lambda rng: rng.uniform(0, 50),
    "regulariser": lambda rng: rng.choice(REGULARISERS),
    "regulariser_weight": lambda rng: 10 ** rng.uniform(-7, -1),
    "n_projections": lambda rng: rng.randint(1, 60),
    "kernel_scales": lambda rng: [10 ** rng.uniform(-1, 1) for _ in range(rng.randint(1, 5))],
    "unbiased": lambda rng: rng.random() < 0.5,
    "gaussian_posterior": lambda rng: rng.random() < 0.5,
    "mask_ratio": lambda rng: rng.uniform(0.2, 0.9),
    "patch_size": lambda rng: rng.randint(0, 3),
    "norm_pix": lambda rng: rng.random() < 0.5,
    "learned_token": lambda rng: rng.random() < 0.5,
    "decoder_width": lambda rng: rng.randint(4, 16),
    "decoder_depth": lambda rng: rng.randint(1, 2),
    "decoder_heads": lambda rng: rng.choice((0, 1, 3)),
    "class_token": lambda rng: rng.random() < 0.5,
    "norm_eps": lambda rng: 10 ** rng.uniform(-7, -4),
    "n_targets": lambda rng: rng.randint(1, 5),
    "momentum": lambda rng: rng.uniform(0.5, 1),
    "momentum_steps": lambda rng: rng.randint(0, 500),
    "predictor_width": lambda rng: rng.randint(4, 16),
    "predictor_depth": lambda rng: rng.randint(1, 2),
    "least_masked": lambda rng: rng.uniform(0, 0.5),
    "most_masked": lambda rng: rng.uniform(0.5, 0.9),
    "aux_depth": lambda rng: rng.randint(1, 2),
    "n_items": lambda rng: rng.randint(1, 60),
    "shrinkage": lambda rng: rng.uniform(0, 3),
    "entropy_weight": lambda rng: rng.uniform(0, 1),
    "binarisation": lambda rng: rng.choice(BINARISATIONS),
    "noise_std": lambda rng: rng.uniform(0, 5),
    "topology": lambda rng: rng.uniform(0, 1000),
    "triplet_weight": lambda rng: rng.uniform(0, 50),
    "margin": lambda rng: rng.uniform(0.1, 5),
    "mining": lambda rng: rng.choice(MINING),
    "isometry": lambda rng: rng.uniform(0, 50),
    "distortion": lambda rng: rng.choice(DISTORTIONS),
    "phase_epochs": lambda rng: rng.randint(0, 2),
    "k_aux": lambda rng: rng.randint(0, 16),
    "aux_weight": lambda rng: rng.uniform(0, 1),
    "n_points": lambda rng: rng.randint(1, 100),
    "delta": lambda rng: rng.choice((0.0, 0.5)),
    "key_dim": lambda rng: 3 * rng.randint(1, 4),
    "heads": lambda rng: rng.choice((1, 3)),
    "dead_after": lambda rng: rng.randint(1, 2000),
    "gamma": lambda rng: rng.uniform(0, 50),
    "max_capacity": lambda rng: rng.uniform(0, 25),
    "capacity_steps": lambda rng: rng.randint(1, 500),
    "per_sample": lambda rng: rng.random() < 0.5,
    "off_diagonal": lambda rng: rng.uniform(0, 20),
    "diagonal": lambda rng: rng.uniform(0, 100),
    "alpha": lambda rng: rng.uniform(0, 1),
    "mmd_weight": lambda rng: rng.uniform(1, 1000),
    "kernel": lambda rng: rng.choice(KERNELS),
    "bandwidth": lambda rng: rng.uniform(0.5, 3),
    "n_samples": lambda rng: rng.randint(1, 6),
    "n_groups": lambda rng: rng.randint(1, 3),
    "n_values": lambda rng: rng.randint(2, 12),
    "estimator": lambda rng: rng.choice(ESTIMATORS),
    "discriminator_dims": lambda rng: [rng.randint(4, 32) for _ in range(rng.randint(0, 2))],
    "mi_weight": lambda rng: rng.uniform(0, 2),
    "discriminator_weight": lambda rng: rng.uniform(0, 2),
    "discriminator_start": lambda rng: rng.randint(0, 50),
    "perceptual_weight": lambda rng: rng.uniform(0, 2),
    "alignment_weight": lambda rng: rng.choice((0.0, 0.1, 1.0)),
    "cosine_margin": lambda rng: rng.choice((0.0, 0.5)),
    "matrix_margin": lambda rng: rng.choice((0.0, 0.25)),
    "equivariance": lambda rng: rng.choice((0.0, 0.5, 1.0)),
    "decoder_dims": lambda rng: [],
    "teacher": lambda rng: "none",
    "sigma_min": lambda rng: 10 ** rng.uniform(-3, -1),
    "sigma_max": lambda rng: 10 ** rng.uniform(0, 2),
    "sigma_data": lambda rng: 10 ** rng.uniform(-1, 0),
    "start_noise_levels": lambda rng: rng.randint(1, 20),
    "noise_levels": lambda rng: rng.randint(20, 1280),
    "level_steps": lambda rng: rng.randint(0, 500),
    "code_shape": lambda rng: rng.choice(([], [5])),
    "tau": lambda rng: rng.uniform(0, 2),
    "full_mask": lambda rng: rng.choice((0.0, 0.5, 1.0)),
    "discriminator_lr": lambda rng: 10 ** rng.uniform(-5, -3),
    "classifier_dims": lambda rng: [rng.randint(4, 32) for _ in range(rng.randint(0, 2))],
    "latent_dims": lambda rng: [rng.randint(2, 16) for _ in range(rng.randint(1, 3))],
    "level_dim": lambda rng: rng.randint(4, 32),
    "free_bits": lambda rng: rng.uniform(0, 2),
    "width": lambda rng: rng.randint(4, 16),
    "latent_channels": lambda rng: rng.randint(1, 4),
    "enc_blocks": lambda rng: [rng.randint(1, 2) for _ in range(2)],
    "dec_blocks": lambda rng: [rng.randint(1, 2) for _ in range(2)],
    "n_components": lambda rng: rng.randint(1, 20),
    "flow": lambda rng: rng.choice([*FLOWS]),
    "n_flows": lambda rng: rng.randint(0, 4),
    "flow_width": lambda rng: rng.randint(1, 32),
    "prior": lambda rng: rng.choice(PRIORS),
    "second_hidden_dims": lambda rng: [rng.randint(4, 32) for _ in range(rng.randint(0, 3))],
    "posterior": lambda rng: rng.choice(("power_spherical", "vmf")),
    "kappa_scale": lambda rng: rng.choice((None, 10 ** rng.uniform(-1, 1))),
    "prior_shape": lambda rng: 10 ** rng.uniform(-1, 2),
    "prior_rate": lambda rng: 10 ** rng.uniform(-2, 2),
    "curvature": lambda rng: 10 ** rng.uniform(-3, 1.5),
    "n_leapfrog": lambda rng: rng.randint(0, 4),
    "step_size": lambda rng: rng.uniform(0.001, 0.1),
    "beta_0": lambda rng: rng.uniform(0.05, 1),
    "n_centroids": lambda rng: rng.randint(1, 60),
    "metric_floor": lambda rng: 10 ** rng.uniform(-3, 1),
    "n_fixed_point": lambda rng: rng.randint(1, 4),
    "n_variables": lambda rng: rng.randint(1, 6),
    "n_classes": lambda rng: rng.randint(2, 6),
    "temperature": lambda rng: rng.uniform(0.1, 2),
    "start_temperature": lambda rng: rng.uniform(0.5, 4),
    "variance": lambda rng: rng.choice(VARIANCES),
    "start_variance": lambda rng: 10 ** rng.uniform(-1, 1),
    "temperature_steps": lambda rng: rng.randint(0, 500),
    "straight_through": lambda rng: rng.random() < 0.5,
    "max_discrete_capacity": lambda rng: rng.uniform(0, 5),
    "num_classes": lambda rng: 10,
    "dataset_size": lambda rng: rng.choice((0, 300)),
    "a": lambda rng: rng.uniform(1, 20),
    "weight": lambda rng: rng.uniform(10, 1000),
    "scales": lambda rng: rng.randint(1, 5),
    "window": lambda rng: rng.choice((3, 7, 11)),
    "features": lambda rng: "random",
    "foundation": lambda rng: "random",
    "average": lambda rng: rng.choice(AVERAGES),
    "group_dim": lambda rng: rng.choice((None, 0, 3)),
    "sigma": lambda rng: rng.uniform(0.01, 1),
    "residual": lambda rng: rng.random() < 0.5,
    "depth": lambda rng: rng.randint(2, 6),
    "masked": lambda rng: rng.uniform(0.01, 0.5),
    "radius": lambda rng: rng.randint(1, 3),
    "pad_value": lambda rng: rng.choice((None, 0.0)),
    "codebook_size": lambda rng: rng.randint(2, 64),
    "update": lambda rng: rng.choice(UPDATES),
    "decay": lambda rng: rng.uniform(0.5, 0.999),
    "dead_below": lambda rng: rng.choice((0.0, 1.0)),
    "cosine": lambda rng: rng.random() < 0.5,
    "places": lambda rng: rng.randint(1, 8),
    "squash": lambda rng: rng.choice([*SQUASHES]),
    "quantised": lambda rng: rng.uniform(0, 1),
    "eta": lambda rng: rng.uniform(0, 2),
    "neighbours": lambda rng: rng.randint(1, 20),
    "queue_size": lambda rng: rng.randint(1, 200),
    "share": lambda rng: rng.uniform(0, 1),
    "mean_weight": lambda rng: rng.uniform(0, 1),
    "variance_weight": lambda rng: rng.uniform(0, 1),
    "group_size": lambda rng: rng.randint(1, 8),
    "levels": lambda rng: rng.randint(1, 3),
    "top_dims": lambda rng: [rng.randint(4, 16) for _ in range(rng.randint(0, 2))],
    "kl_steps": lambda rng: rng.randint(0, 500),
    "hard": lambda rng: rng.random() < 0.5,
    "tokenizer": lambda rng: {"model": "vq_vae", "net": "mlp", "hidden_dims": [16], "places": 4, "codebook_size": 16},
    "kernel_size": lambda rng: rng.choice((3, 5)),
    "n_tokens": lambda rng: rng.randint(1, 8),
    "lam": lambda rng: 10 ** rng.uniform(-4, -1),
    "hyper_dim": lambda rng: rng.randint(1, 8),
    "hyper_hidden_dims": lambda rng: [rng.randint(4, 16) for _ in range(rng.randint(0, 2))],
    "architecture": lambda rng: rng.choice([*ARCHITECTURES]),
    "table_width": lambda rng: 0,
    "reach": lambda rng: rng.randint(1, 3),
    "lams": lambda rng: sorted(10 ** rng.uniform(-4, -1) for _ in range(rng.randint(1, 4))),
    "mixtures": lambda rng: rng.randint(1, 4),
    "attention": lambda rng: rng.random() < 0.5,
    # the other two need 3 channels, and samples here have one
    "kind": lambda rng: rng.choice([kind for kind in KINDS if kind not in (RAE, CONSISTENCY)]),
    "config": lambda rng: None,
    "pretrained": lambda rng: "none",
    "commitment": lambda rng: rng.uniform(0, 2),
    "parts": lambda rng: rng.choice(([], [8], [3, 5], [2, 1, 4, 1])),
    "private_dim": lambda rng: rng.randint(0, 4),
    "part_dim": lambda rng: rng.randint(1, 16),
    "top_beta": lambda rng: rng.uniform(0, 4),
    "n_subsets": lambda rng: rng.randint(0, 3),
    "groups": lambda rng: [rng.randint(1, 6) for _ in range(rng.randint(1, 4))],
}
# replaces combinations that constructors refuse
FIXED = {
    "sparse_ae_kl": {"code_activation": "sigmoid"},
    "compressai": {"width": 8, "latent_dim": 8},
    "contractive_ae": {"net": "mlp"},
    **{name: {"net": "gdn"} for name in ("joint_ar_hyperprior", "checkerboard", "elic")},
    "ciwae": {"beta": 0.3},
    "temporal_sae": {"latent_dim": 12},
    "beta_tcvae": {"estimator": "mss_mean"},
    # the first steps of radam are those of sgd, in which 1 / Sigma_jj diverges
    "dagmm": {"optimizer": "adam"},
    "deep_svdd": {"activation": "leaky_relu"},
    "dncnn": {"likelihood": "gaussian"},
    "noise2noise": {"likelihood": "gaussian", "corruption": "gaussian:0.1"},
    "noise2void": {"likelihood": "gaussian"},
    "unet_ae": {"hidden_dims": [8, 12]},
    "mae": {"likelihood": "gaussian:learned", "width": 12, "decoder_width": 12, "input_norm": "none"},
    "transcoder": {"activation": "topk:3", "skip": False},
    "simmim": {"net": "mixer"},
    "sequence_ae": {"net": "transformer", "hidden_dims": [16, 12]},
    "vq_vae": {"estimator": "rotation", "latent_dim": 6, "n_groups": 2},
    "titok": {"estimator": "rotation"},
    "vq_vae_2": {"estimator": "gumbel", "net": "conv"},
    "rq_vae": {"estimator": "ste"},
    **{name: {"estimator": "rotation"} for name in ("sim_vq_vae", "fvq_vae")},
    "fsq_vae": {"levels": [5, 4, 3], "depth": 2},
    "fsp_vae": {"levels": [5, 4, 3]},
    "autoencoder_kl": {"net": "conv", "beta": 1e-6},
    "eq_vae": {"net": "dc", "beta": 1e-6},
    "va_vae": {"net": "conv", "beta": 1e-6},
    "asymmetric_kl": {"net": "conv", "beta": 1e-6, "hidden_dims": [8, 12], "decoder_dims": [16, 8]},
    "vqgan": {"net": "conv", "estimator": "rotation"},
    "consistency_decoder": {"net": "conv"},
}


def arguments(name):
    """The keyword arguments of a model."""
    return [key for key in inspect.signature(registry.model_class(name)).parameters if key != "input_shape"]


def draw(name, seed):
    """Valid random hyperparameters of a model."""
    rng = random.Random(f"{name} {seed}")
    drawn = {key: RANGES[key](rng) for key in arguments(name)}
    if not drawn.get("likelihood", "").startswith(("gaussian", "laplace", "logcosh")):
        drawn |= {key: "none" for key in ("input_norm",) if key in drawn}  # normalised samples leave [0, 1]
    return drawn | {key: value for key, value in FIXED.get(name, {}).items() if key in drawn}


# glibc keeps freed memory, varying by megabytes from one step to the next: without returning it first, growth of
# less than about 20 KiB per step could not be measured
TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def resident():
    """Bytes of memory in use by this process; needs TRIM (Linux with glibc)."""
    gc.collect()
    TRIM(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


class Watch(pl.Callback):
    """Record memory after every epoch, and whether all terms of the loss were finite."""

    def __init__(self):
        self.held, self.finite, self.steps = [], True, 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps += 1
        self.finite &= all(bool(value.isfinite()) for value in outputs.values())

    def on_train_epoch_end(self, trainer, module):
        self.held.append(resident())

    def growth(self):
        """Growth in bytes per step, by a line fitted to the second half of the epochs."""
        later = self.held[len(self.held) // 2 :]
        return float(np.polyfit(range(len(later)), later, 1)[0]) * len(self.held) / self.steps
