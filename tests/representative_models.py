"""Models that represent each kind of network and code, for tests that are too slow for all models."""

from collections.abc import Iterable
from typing import Any

import pytest

from aezoo.testing import subject_of

# one for each kind of network, in the default run
REPRESENTATIVE = ("dense_ae", "conv_ae", "vae", "topk_sae", "mae", "vq_vae")

SLOW_REPRESENTATIVE = (
    *("dense_ae", "conv_ae", "resnet_ae", "unet_ae", "sequence_ae", "contractive_ae", "memory_ae"),
    *("topk_sae", "jumprelu_sae", "matching_pursuit_sae", "rae", "dagmm", "mae", "autoencoder_kl"),
    *("vae", "vae_flow", "vae_iaf", "flow_prior_vae", "hvae", "hyperspherical_vae", "gamma_vae", "poincare_vae"),
    *("vdvae", "categorical_vae", "conditional_vae"),
    *("vq_vae", "rq_vae", "fsq_vae", "gumbel_vq_vae", "titok", "soft_vq", "index_transformer"),
)

# the smallest networks of timm
RESNET, VIT = "timm:test_resnet", "timm:test_vit,img_size=32,patch_size=8"
# models on backbones of timm: each network, trained and frozen, and each kind of code
BACKBONES = [("vq_vae", RESNET), ("vae", VIT), ("vae", f"{RESNET},frozen")]


def others_slow(names: Iterable[str], kept: Iterable[str] = REPRESENTATIVE) -> list[Any]:
    """The names as test parameters, all but `kept` marked as slow."""
    return [pytest.param(name, marks=[] if name in kept else [pytest.mark.slow]) for name in names]


# exports copy their operations for each position of the code: 16 positions at a third stage, not 49
UNROLLED = ("cheng2020", "joint_ar_hyperprior")
# and for each unit that is chosen in turn
GREEDY = ("omp_sae", "matching_pursuit_sae")


def of_graphs(name):
    """The model with one stage of its networks; representative models have all, unrolled ones three."""
    subject = subject_of(name, k=3) if name in GREEDY else subject_of(name)
    dims = getattr(subject.build(), "hidden_dims", None) or ()
    if name in UNROLLED:
        return subject_of(name, hidden_dims=dims[:1] * 3)
    return subject if len(dims) < 2 or name in REPRESENTATIVE else subject_of(name, hidden_dims=dims[:1])
