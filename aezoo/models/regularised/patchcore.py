"""PatchCore, a memory of frozen features of patches (Roth et al. 2022), https://arxiv.org/abs/2106.08265

    s_p(x) = min_m ||z_p - m||     over the M vectors m of the memory
    S(x) = w s*     w = 1 - exp ||z* - m*|| / sum_{m in N(m*)} exp ||z* - m||                      (equation 7)

z_p are the channels of all feature maps at place p of the largest, each map averaged over 3 x 3 places first; maps of a
smaller grid are enlarged by straight lines. z* is the strangest z_p, s* its distance to its nearest neighbour m*, and
N(m*) are the vectors of the memory nearest to m*, itself included: in a part of the memory that is rarely visited, a
distance counts more.

The memory is a greedy k-centre coreset (algorithm 1): from the first patch on, the next vector is the one farthest from
all chosen. Here it is renewed at each step of training from itself and the patches of the batch, of all ranks, so that
its size is fixed and nothing else is kept: the first batch alone gives the coreset of the paper, and k-centre coresets
of coresets are coresets again. The paper chooses once, from all patches and after a random projection, which is only
faster. One epoch is enough.

L = -log p(x | g(z)) trains a decoder that shows codes as samples; it reads z without its gradient and changes nothing
else (the paper has none). The map is s, enlarged and smoothed by a Gaussian filter.

Shapes: B batch, D channels, P places, N patches, M memory, K neighbours.
"""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.bases.frozen_features import FrozenFeatureArgs, FrozenFeatureAutoencoder, smoothed, stacked
from aezoo.training.limits import check_at_least


class PatchCore(FrozenFeatureAutoencoder, steps_differ=True, not_averaged=("memory_MD", "n_held"), tags=("anomaly",)):
    """The distance of a patch's features to their nearest neighbour among those of normal patches.

    Args:
        memory_size: M. The paper keeps 1 to 25 % of all patches: of 209 images of 28 x 28 places, 1,600 to 41,000.
        n_neighbors: K, for w; 1 leaves w out.
        sigma: of the filter over the map, in pixels; 4 in the paper, for images of 224 x 224.
        **kwargs: see `FrozenFeatureAutoencoder`. The maps of stages 2 and 3 of a wide ResNet-50 are the paper's.
    """

    exact_buffers = ("memory_MD",)

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
        """The channels of all places, (B, *input_shape) -> (B, D, H', W')."""
        return stacked([F.avg_pool2d(found, 3, 1, 1) for found in self.maps(x)], "bilinear")

    def encode(self, x: Tensor) -> Tensor:
        return self.embed(x).to(x.dtype)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def observe(self, z: Tensor) -> None:
        """Renew the memory with the patches of a batch of all ranks, (B, D, H', W')."""
        with torch.autocast(z.device.type, enabled=False):
            patches_ND = self.all_gather_batch(z.flatten(2).mT).flatten(0, 1)
            candidates_ND = torch.cat([self.memory_MD[: int(self.n_held)].to(z), patches_ND])
            chosen = k_centres(candidates_ND, len(self.memory_MD))
        self.memory_MD[: len(chosen)] = candidates_ND[chosen].to(self.memory_MD)
        self.n_held.fill_(len(chosen))

    def distances_to_memory(self, z_ND: Tensor) -> Tensor:
        """Infinite for places of the memory that are not filled yet: (N, D) -> (N, M)."""
        memory_MD = at_least_float32(self.memory_MD)
        with torch.autocast(z_ND.device.type, enabled=False):
            # by products, small distances would be lost in rounding
            d_NM = torch.cdist(z_ND.to(memory_MD), memory_MD, compute_mode="donot_use_mm_for_euclid_dist")
        is_empty_M = torch.arange(len(memory_MD), device=z_ND.device) >= self.n_held.clamp(min=1)
        return d_NM.masked_fill(is_empty_M, torch.inf)

    def patch_scores(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """S and the index of the nearest neighbour, (B, D, H', W') -> (B, P) both."""
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
        """The distance of each pixel, (B, C, H, W) -> (B, H, W)."""
        z = self.embed(x)
        return smoothed(self.enlarged(self.patch_scores(z)[0].unflatten(1, z.shape[2:])), self.sigma)

    def score(self, x: Tensor) -> Tensor:
        """S, (B, *input_shape) -> (B,)."""
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
        # m* counts once, whatever of its equals topk puts first
        share_B = torch.exp(s_B - d_BK.masked_fill(near_BK.isinf(), -torch.inf).logsumexp(1))
        # without other neighbours there is nothing to compare with
        return torch.where(self.n_held > 1, (1 - share_B) * s_B, s_B)


def k_centres(x_ND: Tensor, k: int) -> Tensor:
    """Indices of a greedy k-centre coreset that begins with the first vector, at most k: (N, D) -> (K,)."""
    chosen = torch.zeros(min(k, len(x_ND)), dtype=torch.long, device=x_ND.device)
    least_N = torch.full_like(x_ND[:, 0], torch.inf)
    for i in range(1, len(chosen)):
        least_N = torch.minimum(least_N, (x_ND - x_ND[chosen[i - 1]]).square().sum(1))
        chosen[i] = least_N.argmax()
    return chosen
