"""PatchCore, a memory of frozen features of patches (Roth et al. 2022), https://arxiv.org/abs/2106.08265

    s_p(x) = min_m ||z_p - m||     over the M vectors m of the memory
    S(x) = w s*     w = 1 - exp ||z* - m*|| / sum_{m in N(m*)} exp ||z* - m||                      (equation 7)

z_p consists of the channels of all feature maps at position p of the largest map. Each map is first averaged over
windows of 3 x 3; smaller maps are interpolated linearly. z* is the z_p with the largest distance s* to its nearest
neighbour m*, and N(m*) are the vectors of the memory nearest to m*, including m*. The weight w is larger in sparse
regions of the memory.

The memory is a greedy k-centre coreset (algorithm 1): starting with the first patch, the next vector is the one
farthest from all chosen vectors. Here it is updated at each training step from the current memory and the patches of
the batch, over all ranks, so that no other patches need to be stored: after the first batch, the memory is the coreset
of the paper, and k-centre coresets of coresets are also coresets. The paper computes one coreset of all patches, after
a random projection, which only saves time. One epoch is enough.

L = -log p(x | g(z)) trains a decoder that shows codes as samples; no gradient flows from it to z, so it does not affect
the rest (the paper has no such decoder). The map is s, interpolated and smoothed by a Gaussian filter.

Shapes: B batch, D channels, P positions, N patches, M memory, K neighbours.
"""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.bases.frozen_features import FrozenFeatureArgs, FrozenFeatureAutoencoder, smoothed, stacked
from aezoo.training.limits import check_at_least


class PatchCore(FrozenFeatureAutoencoder, steps_differ=True, not_averaged=("memory_MD", "n_held"), tags=("anomaly",)):
    """The score of a patch is the distance of its features to the nearest features of normal patches.

    Args:
        memory_size: M. The paper keeps 1 to 25 % of all patches: for 209 images of 28 x 28 positions, 1,600 to 41,000.
        n_neighbors: K, number of neighbours for w; with 1, w is not used.
        sigma: standard deviation of the Gaussian filter, in pixels; 4 in the paper, for images of 224 x 224.
        **kwargs: see `FrozenFeatureAutoencoder`. The paper uses the maps of stages 2 and 3 of a wide ResNet-50.
    """

    exact_buffers = ("memory_MD",)
    one_epoch = True

    memory_MD: Tensor
    n_held: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        memory_size: int = 256,
        n_neighbors: int = 9,
        sigma: float = 4.0,
        **kwargs: Unpack[FrozenFeatureArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, memory_size=memory_size, n_neighbors=n_neighbors)
        check_at_least(0, sigma=sigma)
        self.n_neighbors, self.sigma = n_neighbors, sigma
        n_channels = sum(shape[0] for shape in self.map_shapes)
        self.code_shape = (n_channels, *self.map_shapes[0][1:])
        self.register_buffer("memory_MD", torch.zeros(memory_size, n_channels))
        self.register_buffer("n_held", torch.zeros((), dtype=torch.long))
        self.decoder = self.build_image_decoder()

    def embed(self, x: Tensor) -> Tensor:
        """Return the channels at all positions, (B, *input_shape) -> (B, D, H', W')."""
        return stacked([F.avg_pool2d(found, 3, 1, 1) for found in self.maps(x)], "bilinear")

    def encode(self, x: Tensor) -> Tensor:
        return self.embed(x).to(x.dtype)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def observe(self, z: Tensor) -> None:
        """Update the memory with the patches of a batch from all ranks, (B, D, H', W')."""
        with torch.autocast(z.device.type, enabled=False):
            patches_ND = self.all_gather_batch(z.flatten(2).mT).flatten(0, 1)
            candidates_ND = torch.cat([self.memory_MD[: int(self.n_held)].to(z), patches_ND])
            chosen = k_centres(candidates_ND, len(self.memory_MD))
        self.memory_MD[: len(chosen)] = candidates_ND[chosen].to(self.memory_MD)
        self.n_held.fill_(len(chosen))

    def distances_to_memory(self, z_ND: Tensor) -> Tensor:
        """Return distances to the memory, infinite for entries that are not filled yet, (N, D) -> (N, M)."""
        memory_MD = at_least_float32(self.memory_MD)
        with torch.autocast(z_ND.device.type, enabled=False):
            # matrix products would lose small distances to rounding
            d_NM = torch.cdist(z_ND.to(memory_MD), memory_MD, compute_mode="donot_use_mm_for_euclid_dist")
        is_empty_M = torch.arange(len(memory_MD), device=z_ND.device) >= self.n_held.clamp(min=1)
        return d_NM.masked_fill(is_empty_M, torch.inf)

    def patch_scores(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return s and the index of the nearest neighbour, (B, D, H', W') -> (B, P), (B, P)."""
        d_NM = self.distances_to_memory(z.flatten(2).mT.flatten(0, 1))
        s_N, nearest_N = d_NM.min(1)
        shape = len(z), z.shape[2] * z.shape[3]
        return s_N.view(shape), nearest_N.view(shape)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z = self.embed(x)
        if self.training:
            self.observe(z)
        nll = self.decoder_nll(z, x)
        return {"loss": nll, "nll": nll}

    def anomaly_map(self, x: Tensor) -> Tensor:
        """Return the distance at each pixel, (B, C, H, W) -> (B, H, W)."""
        z = self.embed(x)
        return smoothed(self.enlarged(self.patch_scores(z)[0].unflatten(1, z.shape[2:])), self.sigma)

    def score(self, x: Tensor) -> Tensor:
        """Return S, (B, *input_shape) -> (B,)."""
        z = self.embed(x)
        s_BP, nearest_BP = self.patch_scores(z)
        s_B, strangest_B = s_BP.max(1)
        n_neighbors = min(self.n_neighbors, len(self.memory_MD))
        if n_neighbors == 1:
            return s_B
        place_B1 = strangest_B[:, None]
        z_BD = z.flatten(2).gather(2, place_B1[:, None].expand(-1, z.shape[1], -1))[..., 0]
        nearest_B = nearest_BP.gather(1, place_B1)[:, 0]
        memory_MD = at_least_float32(self.memory_MD)
        near_BK, index_BK = self.distances_to_memory(memory_MD[nearest_B]).topk(n_neighbors, largest=False)
        d_BK = (z_BD.to(memory_MD)[:, None] - memory_MD[index_BK]).square().sum(2).sqrt()
        # include m* once, regardless of the order of duplicates in topk
        share_B = torch.exp(s_B - d_BK.masked_fill(near_BK.isinf(), -torch.inf).logsumexp(1))
        # w is undefined without other neighbours
        return torch.where(self.n_held > 1, (1 - share_B) * s_B, s_B)


def k_centres(x_ND: Tensor, k: int) -> Tensor:
    """Return indices of a greedy k-centre coreset, at most k, starting with the first vector, (N, D) -> (K,)."""
    chosen = torch.zeros(min(k, len(x_ND)), dtype=torch.long, device=x_ND.device)
    least_N = torch.full_like(x_ND[:, 0], torch.inf)
    for i in range(1, len(chosen)):
        least_N = torch.minimum(least_N, (x_ND - x_ND[chosen[i - 1]]).square().sum(1))
        chosen[i] = least_N.argmax()
    return chosen
