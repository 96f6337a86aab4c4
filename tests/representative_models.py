"""Models of each kind of network and of what stands between encoder and decoder, for tests too slow for all."""

from collections.abc import Iterable
from typing import Any

import pytest

from aezoo.testing import subject_of

# one for each way of looking at a sample, in the default run
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
    """The names as parameters of a test that runs by default on those to be kept only."""
    return [pytest.param(name, marks=[] if name in kept else [pytest.mark.slow]) for name in names]


# an export has a copy of their operations for each place of the code; at a third stage there are 16 places, not 49
UNROLLED = ("cheng2020", "joint_ar_hyperprior")
# and for each unit that is chosen in turn
GREEDY = ("omp_sae", "matching_pursuit_sae")


def of_graphs(name):
    """The model with one stage of its networks, which repeat it; with all where it stands for the others."""
    subject = subject_of(name, k=3) if name in GREEDY else subject_of(name)
    dims = getattr(subject.build(), "hidden_dims", None) or ()
    if name in UNROLLED:
        return subject_of(name, hidden_dims=dims[:1] * 3)
    return subject if len(dims) < 2 or name in REPRESENTATIVE else subject_of(name, hidden_dims=dims[:1])
