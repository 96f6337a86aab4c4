"""FVQ, full use of a codebook by a bridge, VQBridge (Chang et al. 2025), https://arxiv.org/abs/2509.10140

    h_g = W_comp [P rows of C] + b_comp, of each group g    h <- blocks(h)    P rows of C^ = W_rec norm(h_g) + b_rec
    z_q = the row of C^ nearest to z    codebook = ||sg(z) - z_q||^2    commitment = ||z - sg(z_q)||^2

C is trained through a transformer whose tokens are groups of codes: a gradient for one code updates all codes. The
blocks are those of `aezoo.nets.vit`, without positions; the last group is padded with zeros.

The authors' MLPs are twice as wide as their tokens. Their W_rec and b_rec start at 0, so all initial codes are equal;
here initial codes differ. They recommend two blocks, and groups that grow with K: 16 for K = 16384.

Shapes: N rows, D channels, K codes, P codes per group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.nets import vit
from aezoo.quantisers.sim_vq import SharedCodebook
from aezoo.training.limits import check_at_least


class Bridge(nn.Module):
    """Maps C to C^, (..., K, D) -> (..., K, D).

    Args:
        dim: D.
        group_size: P.
        width: width of a group's token.
        depth: number of blocks.
    """

    def __init__(self, dim: int, group_size: int, width: int, depth: int) -> None:
        super().__init__()
        check_at_least(1, group_size=group_size, width=width, depth=depth)
        self.group_size = group_size
        self.compress = nn.Linear(group_size * dim, width)
        self.blocks = vit.blocks((width,) * depth, "gelu")
        self.recover = nn.Linear(width, group_size * dim)

    def forward(self, code_KD: Tensor) -> Tensor:
        size, dim = code_KD.shape[-2:]
        whole = F.pad(code_KD, (0, 0, 0, -size % self.group_size)).flatten(-2)
        token_1GW = self.compress(whole.unflatten(-1, (-1, self.group_size * dim)))
        token_1GW = self.blocks(token_1GW if token_1GW.ndim == 3 else token_1GW[None])
        moved: Tensor = self.recover(token_1GW).reshape(*code_KD.shape[:-2], -1, dim)[..., :size, :]
        return moved


class FVQ(SharedCodebook):
    """VQ whose codes are computed jointly by a bridge. Terms: commitment and codebook.

    Args:
        dim: D, channels of z.
        size: K, number of codes.
        group_size: P, number of codes in one token of the bridge.
        width: width of a token.
        depth: number of blocks of the bridge.
        estimator: gradient estimator: ste or rotation.

    Raises:
        AezooError: an invalid value.
    """

    def __init__(
        self,
        dim: int,
        size: int = 512,
        *,
        group_size: int = 4,
        width: int = 64,
        depth: int = 2,
        estimator: str = "ste",
    ) -> None:
        super().__init__(dim, size, estimator)
        self.raw_KD = nn.Parameter(torch.randn(size, dim) * dim**-0.5)
        self.bridge = Bridge(dim, group_size, width, depth)

    def codebook(self) -> Tensor:
        moved: Tensor = self.bridge(self.raw_KD).to(self.exact_dtype)
        return moved
