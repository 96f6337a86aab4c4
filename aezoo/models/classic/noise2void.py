"""Noise2Void (Krull et al. 2019), https://arxiv.org/abs/1811.10980

Learns to denoise from single noisy samples y. Some pixels M, drawn for each sample and step, are replaced by the value
of a neighbour and predicted from their surroundings:

    L = P mean_{i in M} -log p(y_i | f(y~)_i)     y~_i = y_{j(i)} for i in M, else y_i     j(i) around i, not in M

L is in nats per sample, scaled as if all P pixels had been predicted. f(y~)_i does not depend on y_i. If the noise has
zero mean and is independent between pixels, it cannot be learned, and the best f is E[x_i | y around i] (section 3).

A pixel comprises all channels at one position. j(i) is uniform over the positions of the window around i that lie
inside the grid and are not in M. Clipping positions to the grid instead would repeat border values, and at a corner
j(i) could be i itself. A drawn pixel without such a position is left unchanged and removed from M. In evaluation, M is
drawn from a fixed seed.

The network and its code, which is not a bottleneck, are those of dncnn, by default in its direct form.

Shapes: B batch, C channels, P pixels, M masked pixels, K positions of the window, R dimensions of the grid.
"""

import math
from itertools import product
from typing import Unpack

import torch
from torch import Tensor

from aezoo import corruptions
from aezoo.errors import AezooError
from aezoo.models.classic.dncnn import DnCNN, DnCNNArgs
from aezoo.training.precision import at_least_float32

_MOST_PLACES = 10_000


class Noise2Void(DnCNN, defaults={"residual": False}, tags=("denoising",)):
    """Learns from single noisy samples, by blind spots; metrics compare with the data, or with clean data if known.

    Args:
        input_shape: (C, L), (C, H, W) or (C, D, H, W), with at least two pixels.
        corruption: none for data that are already noisy; gaussian:STD and others first add noise to clean data.
        masked: share of pixels that are predicted, at least one per sample; above 0 and at most 0.5.
        radius: largest distance of a neighbour along each axis, in pixels; 2 is a window of 5 x 5.
        width: features of each layer.
        depth: number of convolutions.
        **kwargs: see `DnCNN`.
    """

    offsets_KR: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        corruption: str = "none",
        masked: float = 0.02,
        radius: int = 2,
        **kwargs: Unpack[DnCNNArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        self.grid = self.input_shape[1:]
        pixels, rank = math.prod(self.grid), len(self.grid)
        if pixels < 2:
            raise AezooError(f"a pixel needs a neighbour: input_shape must have at least two, got {self.input_shape}")
        if not 0 < masked <= 0.5:
            raise AezooError(f"masked must be a share above 0 and at most 0.5, got {masked}")
        if radius < 1 or (2 * radius + 1) ** rank > _MOST_PLACES:
            raise AezooError(f"radius must be at least 1, with a window of at most {_MOST_PLACES} pixels, got {radius}")
        self.corruption = corruptions.corruption(corruption)
        self.n_masked = max(1, int(masked * pixels))
        offsets = [offset for offset in product(range(-radius, radius + 1), repeat=rank) if any(offset)]
        self.register_buffer("offsets_KR", torch.tensor(offsets), persistent=False)

    def blind(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return y~ and M, (B, C, *grid) -> (B, C, *grid) and (B, P); M is 1 for the pixels that were replaced."""
        y_BCP = y.flatten(2)
        drawn_BM = torch.rand(len(y), y_BCP.shape[2], device=y.device).topk(self.n_masked, 1).indices
        drawn_BP = torch.zeros_like(at_least_float32(y_BCP[:, 0])).scatter(1, drawn_BM, 1.0)
        free_BMK, j_BMK = torch.ones_like(drawn_BM)[..., None].bool(), torch.zeros_like(drawn_BM)[..., None]
        stride = 1
        for axis in reversed(range(len(self.grid))):  # in row-major order, like flatten
            place_BMK = (drawn_BM // stride % self.grid[axis])[..., None] + self.offsets_KR[:, axis]
            free_BMK = free_BMK & (place_BMK >= 0) & (place_BMK < self.grid[axis])
            j_BMK = j_BMK + stride * place_BMK
            stride *= self.grid[axis]
        j_BMK = j_BMK.where(free_BMK, 0)
        free_BMK = free_BMK & (drawn_BP.gather(1, j_BMK.flatten(1)).view_as(j_BMK) == 0)
        u_BMK = torch.rand(j_BMK.shape, device=y.device).masked_fill(~free_BMK, -1.0)
        j_BM = j_BMK.gather(2, u_BMK.argmax(2, keepdim=True))[..., 0]
        replaced_BM = free_BMK.any(2)
        j_BM = j_BM.where(replaced_BM, drawn_BM)
        values_BCM = y_BCP.gather(2, j_BM[:, None].expand(-1, y_BCP.shape[1], -1))
        index_BCM = drawn_BM[:, None].expand_as(values_BCM)
        drawn_BP = drawn_BP.scatter(1, drawn_BM, replaced_BM.to(drawn_BP))
        return y_BCP.scatter(2, index_BCM, values_BCM).view_as(y), drawn_BP

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        noisy = x if self.corruption is None else self.corruption(x)
        blind, M_BP = self.blind(noisy)
        params_BPC, noisy_BPC = (t.flatten(2).transpose(1, 2) for t in (self.decoder(self.encoder(blind)), noisy))
        nll_BP = self.nll(params_BPC.flatten(0, 1), noisy_BPC.flatten(0, 1)).view_as(M_BP)
        nll_B = M_BP.shape[1] * (nll_BP * M_BP).sum(1) / M_BP.sum(1)
        nll = nll_B.mean()
        return {"loss": nll, "nll": nll}
