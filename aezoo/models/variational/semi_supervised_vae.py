"""Semi-supervised variational autoencoder, M2 (Kingma et al. 2014), https://arxiv.org/abs/1406.5298

Learns to classify from few labels and many samples without one; in nats per sample:

    L(x, y) = E_q(z|x,y)[-log p(x|z, y)] - log p(y) + KL(q(z|x, y) || p(z)) >= -log p(x, y)     equation 6
    U(x)    = sum_y q(y|x) (L(x, y) + log q(y|x))                             >= -log p(x)        equation 7
    loss    = mean over samples of L(x, y) - alpha log q(y|x) with a label, of U(x) without       equation 9

p(z) = N(0, I), p(y) is uniform, and q(y|x) is a separate network; the sum runs over all labels. A sample has no label
if y is None or -1: `--data.num_labels 100` keeps the labels of 100 training samples. alpha applies to each labelled
sample: the paper's 0.1 N for N samples, shared by N_l labelled ones, is alpha = 0.1 N / N_l here.

Code, decoding and sampling are those of conditional_vae; `encode` uses the most likely label under q(y|x). The paper's
M1 is semi_supervised_m1. Its M1+M2 is this model on the codes of M1, which `aezoo embed` writes.

Shapes: B batch, D latent, K labels.
"""

import math
from typing import Unpack

import torch
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.models.variational.conditional_vae import ConditionalVAE, ConditionalVAEArgs
from aezoo.nets.blocks.labels import all_labelled, one_hot, select_label
from aezoo.training.limits import check_at_least


class SemiSupervisedVAE(ConditionalVAE, tags=("representation", "generation")):
    """A conditional VAE with a classifier that learns from samples with and without labels.

    Args:
        alpha: weight of the classifier's cross-entropy for each labelled sample; 0.1 N / N_l in the paper, 50 for 100
            labels among 50,000 samples.
        hidden_dims: widths of the encoder's layers (mlp) or channels of its stages; the decoder mirrors them, and the
            classifier has the same. None chooses them by net and sample size; `aezoo info semi_supervised_vae --shape
            C H W` shows the choice.
        **kwargs: see `ConditionalVAE`.
    """

    def __init__(
        self, input_shape: tuple[int, ...], *, alpha: float = 50.0, **kwargs: Unpack[ConditionalVAEArgs]
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(0, alpha=alpha)
        self.alpha = alpha
        self.classifier = self.build_encoder((self.num_classes,))

    def classify(self, x: Tensor) -> Tensor:
        """Return the classifier's log q(y|x): (B, *input_shape) -> (B, K)."""
        return at_least_float32(self.classifier(x)).log_softmax(1)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        log_q_BK = self.classify(x)
        eps_BD = torch.randn_like(at_least_float32(x.new_empty(len(x), self.latent_dim)))
        log_K = math.log(self.num_classes)
        cross_entropy_B = torch.zeros_like(log_q_BK[:, 0])
        if y is not None and all_labelled(y, self.num_classes):
            nll_B, kl_B, _ = self.terms(x, one_hot(y, self.num_classes, x), eps_BD)
            kl_B = kl_B + log_K
        else:
            nll_BK, kl_BK, _ = self.terms_per_label(x, eps_BD)
            nll_B = (log_q_BK.exp() * nll_BK).sum(1)
            kl_B = (log_q_BK.exp() * (kl_BK + log_q_BK + log_K)).sum(1)
            if y is not None:
                nll_B, kl_B = select_label(y, nll_BK, nll_B), select_label(y, kl_BK + log_K, kl_B)
        if y is not None:
            cross_entropy_B = -select_label(y, log_q_BK, cross_entropy_B)
        nll, kl, cross_entropy = nll_B.mean(), kl_B.mean(), cross_entropy_B.mean()
        loss = nll + kl + self.alpha * cross_entropy
        return {"loss": loss, "nll": nll, "kl": kl, "elbo": -(nll + kl), "cross_entropy": cross_entropy}

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """Return U(x) with each z at the mean of its posterior, in nats: (B, *input_shape) -> (B,), no noise."""
        log_q_BK = self.classify(x)
        return (log_q_BK.exp() * (log_q_BK - self.bounds(x))).sum(1) + math.log(self.num_classes)
