"""Networks between samples and sequences of tokens without grid (TiTok, Yu et al. 2024), https://arxiv.org/abs/2406.07550

    encoder   [latent tokens, patches] -> blocks -> only the latent tokens -> linear: (B, C, *grid) -> (B, D, N)
    decoder   [tokens, mask tokens] -> blocks -> only the mask tokens -> patches: (B, D, N) -> (B, C, *grid)

Latent tokens are learned and equal for every sample; they attend to the patches of a sample. There is one mask token
for each patch; mask tokens differ only in their positions. So N can be chosen freely for any sample size. Blocks and
patches are those of `vit`; positions are learned.

The initialisation is not from the paper. With random queries and keys, all tokens have about the same mean of the
patches as input, all patches have the same mean of the tokens as input, and after hundreds of steps the output is still
the mean sample. So positions start as random directions, and the first attention of each network starts such that each
token attends to a run of consecutive patches:

    W_q l_n = W_k a_n (encoder)    W_k t_n = W_q a_n (decoder)    a_n = sum of the run's positions / sqrt(their number)

for latent tokens l and positions t of the decoder's tokens, where W_q and W_k are multiples of orthogonal matrices.

Shapes: B batch, C channels of a sample, P patches, D channels of a token, N tokens, W width of a block.
"""

import math

import torch
from torch import Tensor, nn

from aezoo.nets import vit

# a smaller standard deviation over samples is rounding error, or that of a single sample
_LEAST = 1e-4
# scale of queries and keys, such that the patches of a token outweigh all others
_SHARP = 1.5


def _blocks(widths: tuple[int, ...], act: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Create `vit.blocks` with full-size initial attention weights, since tokens and patches interact only there.

    Returns:
        The blocks, and W_q and W_k of the first one, both orthogonal, before scaling, (W, W).
    """
    blocks = vit.blocks(widths, act)
    for part in blocks.modules():
        if isinstance(part, vit.Attention):
            nn.init.xavier_uniform_(part.out.weight)
    q_WW, k_WW = (nn.init.orthogonal_(torch.empty(widths[0], widths[0])) for _ in range(2))
    first = blocks.get_parameter("0.attention.qkv.weight")
    with torch.no_grad():
        first[: 2 * widths[0]] = _SHARP * torch.cat([q_WW, k_WW])
    return blocks, q_WW, k_WW


def token_positions(n: int, positions_PW: Tensor) -> Tensor:
    """Return a_n from the positions of N runs of patches, (P, W) -> (N, W); if N > P, tokens share a patch."""
    patches = len(positions_PW)
    step = torch.arange(max(n, patches))
    share_NP = torch.zeros(n, patches).index_put((step * n // len(step), step * patches // len(step)), torch.ones(()))
    return share_NP / share_NP.sum(1, keepdim=True).sqrt() @ positions_PW


class TokenEncoder(nn.Module):
    """Maps samples to tokens, (B, C, *grid) -> (B, D, N).

    Args:
        patchify: splits samples into patches.
        code_shape: D and N.
        widths: widths of the blocks.
        act: an activation's name.
    """

    def __init__(self, patchify: vit.Patchify, code_shape: tuple[int, int], widths: tuple[int, ...], act: str) -> None:
        super().__init__()
        dim, self.n = code_shape
        embed, position_PW = vit.embedding(patchify.size, widths[0]), torch.randn(patchify.n, widths[0])
        nn.init.normal_(embed.weight, std=2 / math.sqrt(patchify.size))  # not much larger than the positions
        self.embed, self.position_PW = nn.Sequential(patchify, embed), nn.Parameter(position_PW)
        self.blocks, q_WW, k_WW = _blocks(widths, act)
        self.latent_NW = nn.Parameter(token_positions(self.n, position_PW) @ k_WW.T @ q_WW)
        self.out, self.bias_DN = nn.Linear(widths[-1], dim, bias=False), nn.Parameter(torch.zeros(code_shape))

    def read(self, patches_BPW: Tensor) -> Tensor:
        """Compute tokens from all or some embedded patches, (B, P, W) -> (B, D, N)."""
        latent_BNW = self.latent_NW.expand(patches_BPW.shape[0], -1, -1).to(patches_BPW)
        read_BNW = self.blocks(torch.cat([latent_BNW, patches_BPW], dim=1))[:, : self.n]
        code_BDN: Tensor = self.out(read_BNW).transpose(1, 2) + self.bias_DN
        return code_BDN

    @torch.no_grad()
    def init_from_data(self, x: Tensor) -> None:
        """Scale tokens to mean 0 over samples and channels to variance 1, so that samples differ, (B, *input_shape)."""
        code_BDN = self(x)
        mean_DN = code_BDN.mean(0)
        deviation_D1 = (code_BDN - mean_DN).square().mean((0, 2)).sqrt()[:, None]
        gain_D1 = torch.where(deviation_D1 > _LEAST, 1 / deviation_D1, 1)
        self.out.weight.mul_(gain_D1)
        self.bias_DN.sub_(mean_DN).mul_(gain_D1)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.embed(x) + self.position_PW)


class TokenDecoder(nn.Module):
    """Maps tokens to samples, (B, D, N) -> (B, C, *grid).

    Args:
        patchify: splits samples into patches.
        code_shape: D and N.
        widths: widths of the blocks.
        act: an activation's name.
    """

    def __init__(self, patchify: vit.Patchify, code_shape: tuple[int, int], widths: tuple[int, ...], act: str) -> None:
        super().__init__()
        dim, self.n = code_shape
        self.patchify = patchify
        position_PW = torch.randn(patchify.n, widths[0])
        self.embed, self.position_PW = nn.Linear(dim, widths[0]), nn.Parameter(position_PW)
        nn.init.normal_(self.embed.weight)
        self.mask_W = nn.Parameter(0.02 * torch.randn(widths[0]))
        self.blocks, q_WW, k_WW = _blocks(widths, act)
        self.place_NW = nn.Parameter(token_positions(self.n, position_PW) @ q_WW.T @ k_WW)
        self.out = nn.Linear(widths[-1], patchify.size)

    def forward(self, code_BDN: Tensor) -> Tensor:
        tokens_BNW = self.embed(code_BDN.transpose(1, 2)) + self.place_NW
        mask_BPW = (self.mask_W + self.position_PW).expand(tokens_BNW.shape[0], -1, -1).to(tokens_BNW)
        wide_BPW = self.blocks(torch.cat([tokens_BNW, mask_BPW], dim=1))[:, self.n :]
        return self.patchify.inverse(self.out(wide_BPW))
