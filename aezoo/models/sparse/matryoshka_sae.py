"""Matryoshka sparse autoencoder (Bussmann et al. 2025), https://arxiv.org/abs/2503.17547

Nested dictionaries: for each prefix n_1 < ... < n_M = N, the first n_m latents must also reconstruct the data without
the others, so that early latents represent general features and later ones represent specific features:

    f = relu(batchtopk_kn(W_enc (x - b_pre) + b_enc))     x_hat_m = sum_{i <= n_m} f_i d_i + b_pre     ||d_i|| = 1
    L = 1/(M+1) sum_{m=0..M} -log p(x | x_hat_m) + alpha s ||e - e_hat||^2     n_0 = 0     x_hat_0 = b_pre

e is the residual of the whole dictionary; AuxK is as in TopK. L is in nats per sample. One top-k over the whole
dictionary is used for all prefixes.

The mean and the empty prefix are those of the authors' code (https://github.com/bartbussmann/matryoshka_sae); the paper
sums the errors of M prefixes. On digits of 8x8 (256 latents, k = 4, dead_after = 2000, 1,400 steps, means of 3 seeds;
`python -m benchmarks.deviations`), the squared error per pixel of held-out digits is 0.0155 here and 0.0174 with the
paper's sum, with 163 and 111 latents in use. The difference is due to the empty prefix, with which b_pre approaches the
mean faster (see data_init): the sum with it gives 0.0158, the mean without it 0.0172. With the mean, the weight of AuxK
relative to the errors is M + 1 times as large. The authors' AuxK does not detach e, which gives 0.0154 with 165
latents.

Shapes: B batch, X data dimensions, N latents.
"""

from itertools import pairwise
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from aezoo.errors import AezooError
from aezoo.models.sparse.batch_topk_sae import BatchTopKSAE, BatchTopKSAEArgs


class MatryoshkaSAE(BatchTopKSAE, tags=("interpretability",)):
    """A BatchTopK dictionary in which every prefix is a dictionary.

    Args:
        fractions: sizes of the prefixes before the whole dictionary, as rising shares of it between 0 and 1.
        **kwargs: see `BatchTopKSAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        fractions: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2),
        **kwargs: Unpack[BatchTopKSAEArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        if not all(a < b for a, b in pairwise((0, *fractions, 1))):
            raise AezooError(f"fractions must rise between 0 and 1, got {tuple(fractions)}")
        # small dictionaries have fewer distinct prefixes
        self.prefixes = sorted({max(1, round(share * self.latent_dim)) for share in fractions} | {self.latent_dim})

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        x = self.normalised(x)
        pi_BN = self.pre_activations(x)
        f_BN = self.top_of_batch(pi_BN, self.k) if self.training else self.above_threshold(pi_BN)
        self.update_firing(f_BN)
        sum_BX = torch.zeros_like(x.flatten(1))
        nlls = [self.nll(self.decoder.with_bias(sum_BX), x).mean()]
        for start, end in pairwise((0, *self.prefixes)):
            sum_BX = sum_BX + F.linear(f_BN[:, start:end], self.decoder.W_NX[start:end].t())
            x_hat = self.decoder.with_bias(sum_BX)
            nlls.append(self.nll(x_hat, x).mean())
        aux = self.aux(x, x_hat, pi_BN).mean()
        return {
            "loss": torch.stack(nlls).mean() + self.aux_weight * aux,
            "nll": nlls[-1],
            "prefix_nll": torch.stack(nlls[:-1]).sum(),
            "aux": aux,
            "l0": (f_BN > 0).sum(1).float().mean(),
            "dead_latents": self.dead_N.float().mean(),
        }
