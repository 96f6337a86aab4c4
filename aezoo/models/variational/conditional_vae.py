"""Conditional variational autoencoder (Sohn et al. 2015), https://papers.nips.cc/paper/5775

The encoder and the decoder receive the label y of a sample; in nats per sample:

    L(x, y) = E_q(z|x,y)[-log p(x|z, y)] + KL(q(z|x, y) || p(z)) >= -log p(x|y)
    L(x)    = -E[log sum_y p(y) w_y] >= -log p(x)     w_y = p(x|z_y, y) p(z_y) / q(z_y|x, y)     z_y ~ q(z|x, y)

p(z) = N(0, I), and p(y) is uniform. A sample without a label (y None or -1) has the loss L(x), with one sample of z per
label; the logarithm of the sum needs the weights w_y, since it would not be a bound with a closed-form KL. The code
contains the label, [z, one-hot y]. Without labels, `encode` uses the most likely one, arg max_y of log p(x|mu_y, y) -
KL_y.

Shapes: B batch, D latent, K labels, E = D + K code, S importance samples.
"""

import math
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from aezoo import nets
from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import LatentArgs
from aezoo.distributions import gaussians
from aezoo.models.variational.vae import VAE
from aezoo.nets.blocks import labels


class ConditionalVAEArgs(LatentArgs, total=False):
    """Arguments of `ConditionalVAE`."""

    num_classes: int | None


class ConditionalVAE(labels.LabelledCode, VAE, normal_prior=False, tags=("generation",)):
    """A Gaussian code with a label, which can be chosen when sampling: `sample(n, y)`.

    Args:
        latent_dim: D, size of the code without the label.
        num_classes: K, number of labels; the command line reads it from the data.
        **kwargs: see `VAE`.
    """

    def __init__(
        self, input_shape: tuple[int, ...], *, num_classes: int | None = 10, **kwargs: Unpack[LatentArgs]
    ) -> None:
        super().__init__(input_shape, **kwargs)
        del self.beta, self.capacity  # the bound has no KL weight: BetaAnnealing would change them without effect
        self.num_classes = labels.check_num_classes(num_classes)
        self.code_shape = (self.latent_dim + self.num_classes,)
        self.label_map = labels.ConcatLabel(self.num_classes, self.input_shape)
        self.encoder = nets.encoder(
            self.net, self.label_map.joint_shape, (2 * self.latent_dim,), self.hidden_dims, self.activation
        )
        self.decoder = self.build_decoder(self.code_shape)

    def conditional_posterior(self, x: Tensor, y_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x, y), y one-hot: (B, *input_shape), (B, K) -> (B, D), (B, D)."""
        mu_BD, log_var_BD = at_least_float32(self.encoder(self.label_map(x, y_BK))).chunk(2, dim=1)
        return mu_BD, log_var_BD.clamp(-30, 20)

    def terms(self, x: Tensor, y_BK: Tensor, eps_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-log p(x|z, y), KL and log q(z|x, y) - log p(z) at z = mu + sigma eps: -> (B,), (B,), (B,)."""
        mu_BD, log_var_BD = self.conditional_posterior(x, y_BK)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * eps_BD
        nll_B = self.nll(self.decoder(torch.cat([z_BD.to(x.dtype), y_BK], 1)), x)
        return nll_B, self.kl(mu_BD, log_var_BD), 0.5 * (z_BD**2 - eps_BD**2 - log_var_BD).sum(1)

    def terms_per_label(self, x: Tensor, eps_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return `terms` for each label, with the same noise for all labels of a sample: -> (B, K), (B, K), (B, K)."""
        k = self.num_classes
        nll, kl, log_ratio = self.terms(*labels.repeat_for_each_label(x, k), eps_BD.repeat(k, 1))
        return nll.unflatten(0, (k, -1)).T, kl.unflatten(0, (k, -1)).T, log_ratio.unflatten(0, (k, -1)).T

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        eps_BD = torch.randn_like(at_least_float32(x.new_empty(len(x), self.latent_dim)))
        if y is not None and labels.all_labelled(y, self.num_classes):
            nll_B, kl_B, _ = self.terms(x, labels.one_hot(y, self.num_classes, x), eps_BD)
        else:
            nll_BK, kl_BK, log_ratio_BK = self.terms_per_label(x, eps_BD)
            # log sum_y p(y) w_y = sum_y r_y (log w_y + log p(y) - log r_y) with r the softmax of log w
            log_r_BK = (-nll_BK - log_ratio_BK).log_softmax(1)
            nll_B = (log_r_BK.exp() * nll_BK).sum(1)
            kl_B = (log_r_BK.exp() * (log_ratio_BK + log_r_BK)).sum(1) + math.log(self.num_classes)
            if y is not None:
                nll_B, kl_B = labels.select_label(y, nll_BK, nll_B), labels.select_label(y, kl_BK, kl_B)
        nll, kl = nll_B.mean(), kl_B.mean()
        return {"loss": nll + kl, "nll": nll, "kl": kl, "elbo": -(nll + kl)}

    def bounds(self, x: Tensor) -> Tensor:
        """Return log p(x|mu_y, y) - KL_y for each label, without noise: (B, *input_shape) -> (B, K)."""
        nll_BK, kl_BK, _ = self.terms_per_label(x, x.new_zeros(x.shape[0], self.latent_dim))
        return -(nll_BK + kl_BK)

    def classify(self, x: Tensor) -> Tensor:
        """Return the log-probability of each label under the bounds, without noise: (B, *input_shape) -> (B, K)."""
        return self.bounds(x).log_softmax(1)

    def posterior(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the code's mean and log-variance; the label (default: most likely) has the smallest log-variance."""
        if y is None or not labels.all_labelled(y, self.num_classes):
            likely = self.classify(x).argmax(1)
            y = likely if y is None else torch.where(y < 0, likely, y)
        y_BK = labels.one_hot(y, self.num_classes, x)
        mu_BD, log_var_BD = self.conditional_posterior(x, y_BK)
        return torch.cat([mu_BD, y_BK.to(mu_BD.dtype)], 1), F.pad(log_var_BD, (0, self.num_classes), value=-30.0)

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.posterior(x, y)[0].to(x.dtype)

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """-log sum_y p(y) p(x|mu_y, y) exp(-KL_y) in nats: (B, *input_shape) -> (B,), no noise."""
        return math.log(self.num_classes) - torch.logsumexp(self.bounds(x), 1)

    def sample_posterior(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Draw n codes for each sample, y ~ `classify` and z ~ q(z|x, y), and log q in nats: -> (n, B, E), (n, B)."""
        k, log_q_BK, rows = self.num_classes, self.classify(x), torch.arange(len(x), device=x.device)
        y_SB = torch.distributions.Categorical(logits=log_q_BK).sample((n,))
        of_label = (
            part.unflatten(0, (k, -1)) for part in self.conditional_posterior(*labels.repeat_for_each_label(x, k))
        )
        z_SBD, log_q_z_SB = gaussians.rsample(*(part[y_SB, rows] for part in of_label))
        return torch.cat([z_SBD, labels.one_hot(y_SB, k, z_SBD)], 2), log_q_BK[rows, y_SB] + log_q_z_SB
