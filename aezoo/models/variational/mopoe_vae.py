"""MoPoE-VAE, the mixture of products of experts (Sutter et al. 2021), https://arxiv.org/abs/2105.02470

A sample consists of parts x = (x_1, ..., x_M), its modalities. The posterior is a mixture over all 2^M - 1 subsets S:

    q(z|x) = 1 / (2^M - 1) sum_S q_S(z)     q_S = N(mu_S, diag sigma_S^2), proportional to prod_(i in S) q_i(z|x_i)
    1 / sigma_S^2 = sum_i 1 / sigma_i^2     mu_S = sigma_S^2 sum_i mu_i / sigma_i^2

    L = 1 / (2^M - 1) sum_S E_q_S[-log p(x|z) + beta (log q(z|x) - log p(z))]     p(z) = N(0, I)

in nats per sample, estimated as in `mmvae`: each q_S draws one z, from which all parts are decoded, and q(z|x) is the
density of the whole mixture at that z. The authors' code (https://github.com/thomassutter/MoPoE) uses the mean of the
KL(q_S || p) instead, which is never less than the KL of the mixture. As in the paper, no product includes the prior; in
that code, the product of all parts does. With only the single-part subsets, this would be MMVAE; with only the set of
all parts, a product of experts. M = 1 is the VAE. If parts of a sample are missing, L is computed from its other parts.

Shapes: B batch, D code, M parts, S subsets of them.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from aezoo.bases.multimodal import MultimodalVAEArgs
from aezoo.distributions import gaussians
from aezoo.errors import AezooError
from aezoo.models.variational.mmvae import MMVAE

# 6 parts have 63 subsets, and the code of each is decoded
MOST_PARTS = 6


class MoPoEVAE(MMVAE, tags=("multimodal", "imputation")):
    """A VAE of several modalities whose posterior is a mixture over all subsets, each with a product of experts.

    Args:
        parts: sizes of at most 6 parts along the first dimension of input_shape that is longer than 1, channels of
            images or entries of vectors, rows of images with one channel; halves by default.
        **kwargs: see `MMVAE`.
    """

    def __init__(self, input_shape: tuple[int, ...], **kwargs: Unpack[MultimodalVAEArgs]) -> None:
        super().__init__(input_shape, **kwargs)
        if len(self.sizes) > MOST_PARTS:
            raise AezooError(f"parts must be at most {MOST_PARTS}, got {len(self.sizes)}: use mvae or mmvae for more")

    def subsets(self, m: int, device: torch.device) -> Tensor:
        """Return all non-empty subsets of m parts, (S, m) bool."""
        numbers_S1 = torch.arange(1, 2**m, device=device)[:, None]
        return numbers_S1 // 2 ** torch.arange(m, device=device) % 2 == 1  # ONNX cannot shift signed numbers

    def components(self, x: Tensor, parts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        mu_BMD, log_var_BMD = self.experts(x, parts)
        member_SM = self.subsets(mu_BMD.shape[1], mu_BMD.device)
        return gaussians.product(mu_BMD[:, None], log_var_BMD[:, None], member_SM)

    def present_components(self, x: Tensor, parts: Sequence[int] | None = None) -> Tensor:
        present_BM = self.present_mask(x, parts)
        return (present_BM[:, None] | ~self.subsets(present_BM.shape[1], x.device)).all(2)
