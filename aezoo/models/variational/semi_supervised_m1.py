"""Semi-supervised variational autoencoder, M1 (Kingma et al. 2014), https://arxiv.org/abs/1406.5298

A VAE of all samples and a classifier of its codes (section 2.1), in nats per sample:

    L = E[-ELBO(x) - s log q(y|mu(x))]     s = 1 for a sample with a label, 0 for others

q(y|mu) is a separate network, linear by default, see `classifier_dims`. No gradient passes from the labels to the code,
as in the paper, where the classifier is fitted to the codes of a trained VAE. Here both are trained in one run, and the
VAE is the same as `vae`. A sample has no label if y is None or -1: `--data.num_labels 100` keeps the labels of 100
training samples. M2 is semi_supervised_vae.

Shapes: B batch, D code, K labels.
"""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from aezoo import nets
from aezoo.autoencoder import at_least_float32
from aezoo.models.variational.vae import VAE, VAEArgs
from aezoo.nets.blocks.labels import all_labelled, check_num_classes


class SemiSupervisedM1(VAE, tags=("representation",)):
    """A VAE with a classifier of its codes that learns from the samples that have labels.

    Args:
        num_classes: K, number of labels; the command line reads it from the data.
        classifier_dims: widths of the classifier's hidden layers; none makes it logistic regression.
        **kwargs: see `VAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        num_classes: int | None = 10,
        classifier_dims: tuple[int, ...] = (),
        **kwargs: Unpack[VAEArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        self.num_classes = check_num_classes(num_classes)
        self.classifier = nets.encoder("mlp", self.code_shape, (self.num_classes,), classifier_dims, self.activation)

    def classify(self, x: Tensor) -> Tensor:
        """Return the log-probability of each label, log q(y|mu(x)): (B, *input_shape) -> (B, K)."""
        return self.log_q(self.posterior(x)[0].to(x.dtype))

    def log_q(self, mu_BD: Tensor) -> Tensor:
        """Return the log-probability of each label given a code: (B, D) -> (B, K)."""
        return at_least_float32(self.classifier(mu_BD)).log_softmax(1)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BD, log_var_BD = self.posterior(x)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * torch.randn_like(mu_BD)
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        kl = self.mean_kl(self.kl(mu_BD, log_var_BD))
        log_q_BK = self.log_q(mu_BD.detach().to(x.dtype))
        if y is None:
            y = torch.full_like(mu_BD[:, 0], -1)
        else:
            all_labelled(y, self.num_classes)  # raises an error for invalid labels
        # sum over labelled samples, divided by all samples: linear in the batch, so the number of ranks has no effect
        classifier = F.nll_loss(log_q_BK, y.long(), ignore_index=-1, reduction="sum") / len(x)
        loss = nll + self.beta * (kl - self.capacity).abs() + classifier
        return {"loss": loss, "nll": nll, "kl": kl, "elbo": -(nll + kl), "classifier": classifier}
