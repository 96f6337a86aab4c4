"""Quantisers, which map vectors to one of finitely many codes and its index, with a common interface.

    quantise(z) -> z_q, indices, terms        codes(indices) -> z_q        start(z)        bits

See `aezoo.quantisers.base`. `aezoo.quantisers.estimators` defines how gradients pass through them.
"""

from aezoo.quantisers.base import Quantised, Quantiser
from aezoo.quantisers.bsq import BSQ
from aezoo.quantisers.fsp import FSP
from aezoo.quantisers.fsq import FSQ
from aezoo.quantisers.fvq import FVQ
from aezoo.quantisers.grouped_vq import GroupedVQ
from aezoo.quantisers.gumbel_vq import GumbelVQ
from aezoo.quantisers.latent_quantisation import LatentQuantisation
from aezoo.quantisers.lfq import LFQ
from aezoo.quantisers.random_projection import RandomProjection
from aezoo.quantisers.residual_fsq import ResidualFSQ
from aezoo.quantisers.residual_vq import ResidualVQ
from aezoo.quantisers.sim_vq import SimVQ
from aezoo.quantisers.stochastic_vq import StochasticVQ
from aezoo.quantisers.vector_perturbation import VectorPerturbation
from aezoo.quantisers.vq import VQ

__all__ = [
    "BSQ",
    "FSP",
    "FSQ",
    "FVQ",
    "LFQ",
    "VQ",
    "GroupedVQ",
    "GumbelVQ",
    "LatentQuantisation",
    "Quantised",
    "Quantiser",
    "RandomProjection",
    "ResidualFSQ",
    "ResidualVQ",
    "SimVQ",
    "StochasticVQ",
    "VectorPerturbation",
]
