"""Gumbel VQ, the quantiser of DALL-E's discrete VAE (Ramesh et al. 2021), https://arxiv.org/abs/2102.12092

    p = softmax(z)    y = softmax((log p + g) / temperature)    z_q = sum_k y_k e_k    kl = log K - H(p)

z contains the logits of K codes, and g is standard Gumbel noise (Jang et al. 2016, https://arxiv.org/abs/1611.01144).
kl is KL(p || uniform) in nats. In evaluation mode z_q is the code with the largest logit; with `hard`, the forward
value in training is the code with the largest y. A callback may lower the buffer `temperature` during training.

Shapes: N rows, K codes, C channels of a code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.distributions.categorical import gumbel_softmax, kl_from_uniform
from aezoo.errors import AezooError
from aezoo.quantisers.base import Quantiser, Rows


class GumbelVQ(Quantiser):
    """A relaxed sample of a code, given logits. Terms: kl.

    Args:
        size: K, number of codes and channels of z.
        code_dim: C, channels of z_q.
        temperature: temperature of the relaxation.
        hard: return one-hot codes in training too, with the gradient of the relaxed codes.

    Raises:
        AezooError: an invalid value.
    """

    temperature: Tensor

    def __init__(self, size: int, code_dim: int, temperature: float = 1.0, *, hard: bool = False) -> None:
        super().__init__(size, (size,), code_dim)
        if not temperature > 0:
            raise AezooError(f"GumbelVQ needs a temperature above 0, got {temperature}")
        self.hard = hard
        self.register_float32_buffer("temperature", torch.tensor(float(temperature)))
        self.code_KC = nn.Parameter(torch.randn(size, code_dim))

    def _quantise_rows(self, z_ND: Tensor, rows_per_sample: int = 1) -> Rows:
        log_p_NK = z_ND.log_softmax(1)
        terms = {"kl": kl_from_uniform(log_p_NK.exp(), log_p_NK, self.dim)}
        if self.training:
            # random numbers are drawn per sample, so the shape is (B, P, K)
            y_NK = gumbel_softmax(log_p_NK.unflatten(0, (-1, rows_per_sample)), self.temperature, self.hard).flatten(
                0, 1
            )
            return y_NK @ self.code_KC.to(self.exact_dtype), y_NK.argmax(1, keepdim=True), terms
        index_N1 = z_ND.argmax(1, keepdim=True)
        return self._lookup_rows(index_N1), index_N1, terms

    def _lookup_rows(self, index_NQ: Tensor) -> Tensor:
        return F.embedding(index_NQ[:, 0], self.code_KC.to(self.exact_dtype))
