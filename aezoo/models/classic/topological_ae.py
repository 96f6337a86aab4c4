"""Topological autoencoder (Moor et al. 2020), https://arxiv.org/abs/1906.00722

Preserves the connectivity of a batch's samples in its codes. As neighbourhoods grow, components merge at certain edges:
the persistence pairing pi of dimension 0. These are the edges of the minimum spanning tree of the distances A:

    L = -log p(x | g(f(x))) + lambda / N (L_X->Z + L_Z->X)                                   (equations 1 and 2)
    L_X->Z = 1/2 ||A^X[pi^X] - A^Z[pi^X]||^2     L_Z->X = 1/2 ||A^Z[pi^Z] - A^X[pi^Z]||^2    (equations 3 and 4)

L is in nats per sample. Distances are Euclidean. Distances between samples are divided by the largest one in the batch,
those between codes by a learned number that starts at 1, as in the authors'
https://github.com/BorgwardtLab/topological-autoencoders (there, the first divisor is the largest distance that images
can have, and the second one is learned directly; here its logarithm is learned, so that it stays positive). The batch
is that of all ranks. The pairing is constant almost everywhere, so gradients pass only through the distances.
lambda = 0 gives the plain autoencoder.

The authors' code omits the 1/2 of equations 3 and 4, which doubles lambda. On 8x8 digits (D = 2, 1,500 steps, means of
three seeds; `python -m benchmarks.deviations`) this gave a nll of 22.0 instead of 21.7, and (L_X->Z + L_Z->X) / N of
0.087 instead of 0.082.

Shapes: B batch on this rank, N samples on all ranks, E = N - 1 edges, X data dimensions, D code.
"""

from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import NetworkArgs, NetworkAutoencoder
from aezoo.distributions import divergences
from aezoo.training.limits import check_at_least


def distances(points_ND: Tensor, unit: Tensor | None = None) -> Tensor:
    """Return A, Euclidean distances divided by `unit`, by default the largest one, (N, D), () -> (N, N)."""
    a_NN = divergences.distances(points_ND)
    return a_NN / (a_NN.amax().clamp(min=torch.finfo(a_NN.dtype).tiny) if unit is None else unit)


# a custom operator, which torch.compile does not trace into
@torch.library.custom_op("aezoo::pairing", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def pairing(a_NN: Tensor) -> Tensor:
    """Return pi, the edges of the minimum spanning tree of distances, (N, N) -> (E, 2)."""
    a = a_NN.cpu().numpy()
    # Prim's algorithm: every pair has an edge, and sorting all edges would take longer
    edges = np.empty((len(a) - 1, 2), dtype=np.int64)
    # the distance of each vertex from the tree, the nearest vertex of the tree, whether the tree contains the vertex
    far_N, near_N, within_N = a[0].copy(), np.zeros(len(a), dtype=np.int64), np.zeros(len(a), dtype=a.dtype)
    new = 0
    for edge in edges:
        within_N[new] = np.inf
        near_N[a[new] < far_N] = new
        np.minimum(far_N, a[new], out=far_N)
        new = (far_N + within_N).argmin()
        edge[:] = near_N[new], new
    return torch.from_numpy(edges).to(a_NN.device)


@pairing.register_fake
def _(a_NN: Tensor) -> Tensor:
    return a_NN.new_empty((a_NN.shape[0] - 1, 2), dtype=torch.long)


class TopologicalAE(NetworkAutoencoder, hidden_dims={"mlp": (256,)}, compares_samples=True, tags=("representation",)):
    """Learns codes with the connectivity of the samples, which larger batches represent better.

    Args:
        latent_dim: D, size of the code.
        topology: lambda, weight of the topological term.
        **kwargs: see `NetworkAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        topology: float = 500.0,
        **kwargs: Unpack[NetworkArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        check_at_least(0, topology=topology)
        self.topology = topology
        self.code_shape = (latent_dim,)
        self.log_unit = nn.Parameter(torch.zeros(()))
        self.encoder = self.build_encoder(self.code_shape)
        self.decoder = self.build_decoder(self.code_shape)

    @staticmethod
    def signature_loss(x_NX: Tensor, z_ND: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Return L_X->Z and L_Z->X of a batch, each divided by N, where `unit` divides distances of codes."""
        a_x_NN, a_z_NN = distances(x_NX), distances(z_ND, unit)
        gap_NN = 0.5 * (a_x_NN - a_z_NN).square()
        x_to_z_E, z_to_x_E = (gap_NN[tuple(pairing(a_NN.detach()).T)] for a_NN in (a_x_NN, a_z_NN))
        return x_to_z_E.sum() / len(x_NX), z_to_x_E.sum() / len(x_NX)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_BD = self.encoder(x)
        nll = self.nll(self.decoder(z_BD), x).mean()
        x_NX, z_ND = self.all_gather_batch(x.flatten(1)), self.all_gather_batch(z_BD)
        unit = at_least_float32(self.log_unit).exp()
        x_to_z, z_to_x = self.signature_loss(at_least_float32(x_NX), at_least_float32(z_ND), unit)
        return {"loss": nll + self.topology * (x_to_z + z_to_x), "nll": nll, "x_to_z": x_to_z, "z_to_x": z_to_x}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        # overridden so that the whole step is not captured as a CUDA graph: the spanning tree is computed on the CPU
        return super().training_step(batch, batch_idx)
