"""AbsTopK sparse autoencoder (Zhu et al. 2025), https://arxiv.org/abs/2510.00404

The k pre-activations with the largest absolute values form the code and keep their signs, so that one direction of the
dictionary can represent two opposite concepts:

    pi = W_enc (x - b_pre) + b_enc     f_i = pi_i where |pi_i| is among the k largest, else 0
    x_hat = W_dec f + b_pre     ||d_i|| = 1
    L = -log p(x | x_hat) + alpha s ||e - e_hat||^2     AuxK and its s as in TopK, e_hat also by absolute value

L is in nats per sample. This is a step of the proximal gradient for at most k entries of any sign (hard thresholding);
TopK takes entries of at least 0. If the k largest are positive, both are the same. A latent fires if it is not 0.

Shapes: B batch, N latents, k active ones.
"""

from torch import Tensor

from aezoo.models.sparse.topk_sae import TopKSAE


class AbsTopKSAE(TopKSAE, tags=("interpretability",)):
    """At most k active latents per sample, of either sign, from a wide dictionary of unit-norm directions.

    Args:
        k: active latents per sample.
        multi_weight: weight of the loss with 4k active latents; 1/8 in Multi-TopK, 0 disables it.
    """

    def active(self, pi_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
        index_Bk = pi_BN.abs().topk(k, dim=1).indices
        return pi_BN.gather(1, index_Bk), index_Bk
