"""SimVQ (Zhu et al. 2024), https://arxiv.org/abs/2411.02038

    C = C_0 W    z_q = the row of C nearest to z
    codebook = ||sg(z) - z_q||^2    commitment = ||z - sg(z_q)||^2

C_0 is frozen, and W is a D x D matrix that all codes share: an update for one code also moves the others, so the
codebook does not collapse.

Shapes: N rows, D channels, K codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.deprecated import renamed
from aezoo.errors import AezooError
from aezoo.quantisers.base import Quantiser, Rows
from aezoo.quantisers.common import nearest
from aezoo.quantisers.estimators import rotation, ste


class SharedCodebook(Quantiser):
    """VQ with codes computed from shared parameters; a subclass defines `codebook`. Terms: commitment and codebook.

    Args:
        dim: D, channels of z.
        size: K, number of codes.
        estimator: gradient estimator: ste or rotation.

    Raises:
        AezooError: an invalid value.
    """

    def __init__(self, dim: int, size: int, estimator: str) -> None:
        super().__init__(dim, (size,))
        if estimator not in ("ste", "rotation"):
            raise AezooError(f"estimator must be one of ste, rotation, got {estimator!r}")
        self.pass_gradient = rotation if estimator == "rotation" else ste

    def codebook(self) -> Tensor:
        """Return the codes, (K, D)."""
        raise NotImplementedError(f"{type(self).__name__} must write codebook")

    def _quantise_rows(self, z_ND: Tensor, rows_per_sample: int = 1) -> Rows:
        code_KD = self.codebook()
        index_N = nearest(z_ND, code_KD)
        q_ND = F.embedding(index_N, code_KD)
        terms = {
            "commitment": (z_ND - q_ND.detach()).square().sum(1),
            "codebook": (z_ND.detach() - q_ND).square().sum(1),
        }
        return self.pass_gradient(z_ND, q_ND), index_N[:, None], terms

    def _lookup_rows(self, index_NQ: Tensor) -> Tensor:
        return F.embedding(index_NQ[:, 0], self.codebook())


class SimVQ(SharedCodebook):
    """VQ whose codes are a linear map of frozen vectors. Terms: commitment and codebook.

    Args:
        dim: D, channels of z.
        size: K, number of codes.
        estimator: gradient estimator: ste or rotation.

    Raises:
        AezooError: an invalid value.
    """

    frozen_KD: Tensor

    def __init__(self, dim: int, size: int = 512, *, estimator: str = "ste") -> None:
        super().__init__(dim, size, estimator)
        self.register_float32_buffer("frozen_KD", torch.randn(size, dim) * dim**-0.5)
        self.W_DD = nn.Parameter(nn.init.orthogonal_(torch.empty(dim, dim)))

    def codebook(self) -> Tensor:
        """Return the codes, (K, D)."""
        return self.frozen_KD @ self.W_DD.to(self.exact_dtype)


__getattr__ = renamed(__name__)
