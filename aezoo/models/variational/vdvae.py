"""Very deep VAE (Child 2021), https://arxiv.org/abs/2011.10650

N blocks act on a residual stream y. Each has one group of latent variables, drawn from z_1 of the top block at the
lowest resolution down to z_N at the image's resolution; in nats per sample:

    p(x, z) = p(x | y_N) prod_i p(z_i | z_<i)     q(z | x) = prod_i q(z_i | z_<i, x)     all Gaussian and diagonal
    q_i = q_net([y; a])     p_i, f = p_net(y)     y <- y + f + W z_i     y <- y + net(y)
    L = E_q[-log p(x|z)] + sum_i E_q[KL(q(z_i | z_<i, x) || p(z_i | z_<i))]

where a is the output of the bottom-up path for x at the block's resolution. Networks and initial weights are those of
the author's code (see `nets.top_down`), and as in that code there are no free bits and no KL warm-up. Differences: the
likelihood is one of the zoo's, not a mixture of ten discretised logistics; resolutions are halved at every stage,
rounded up, and remain at 1x1; all stages have the same width; steps with very large gradients are not skipped:
trainer.gradient_clip_val may help.

The code contains all z from z_1 to z_N, flattened; `encode` returns each mean given the means before it.

Shapes: B batch, D code, K importance samples.
"""

import math
from typing import Unpack

import torch
from torch import Tensor

from aezoo.bases.network import NetworkAutoencoder
from aezoo.distributions.latent_chain import LatentChain
from aezoo.errors import AezooError
from aezoo.models.variational.vae import VAE
from aezoo.nets.blocks.levels import Level
from aezoo.nets.blocks.top_down import BottomUp, TopDown
from aezoo.training.arguments import TrainingArgs
from aezoo.training.limits import check_at_least


class VDVAE(VAE, normal_prior=False, tags=("generation",)):
    """Gaussian codes at every resolution of an image, each of which determines the prior of the next.

    Args:
        input_shape: shape of one image, (C, H, W), of any size.
        width: W, number of channels of both paths.
        latent_channels: Z, number of latent variables of a block at each position of its grid.
        enc_blocks: number of bottom-up blocks at the image's resolution, at half of it, at a quarter, ...
        dec_blocks: number of top-down blocks, each with latent variables, at the same resolutions.
        **kwargs: see `Autoencoder`.
    """

    encoder: BottomUp
    decoder: TopDown

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        width: int = 16,
        latent_channels: int = 4,
        enc_blocks: tuple[int, ...] = (1, 1, 1),
        dec_blocks: tuple[int, ...] = (1, 1, 2),
        **kwargs: Unpack[TrainingArgs],
    ) -> None:
        # skip the VAE's constructor, which would build a network for the whole code
        super(NetworkAutoencoder, self).__init__(input_shape, **kwargs)
        if len(self.input_shape) != 3:
            raise AezooError(f"vdvae takes images (C, H, W), not {self.input_shape}: use hierarchical_vae instead")
        check_at_least(1, width=width, latent_channels=latent_channels)
        if min((*enc_blocks, *dec_blocks), default=0) < 1 or len(enc_blocks) != len(dec_blocks):
            found = f"{tuple(enc_blocks)} and {tuple(dec_blocks)}"
            raise AezooError(f"enc_blocks and dec_blocks must be at least 1, the same number for both, got {found}")
        self.width = width
        self.encoder = BottomUp(self.input_shape, width, enc_blocks)
        self.decoder = TopDown(self.input_shape, width, latent_channels, dec_blocks)
        self.code_shape = (sum(self.decoder.sizes),)

    def infer(self, x: Tensor, n: int = 1, draw: bool = True) -> tuple[Tensor, list[Level]]:
        """Parameters and all groups for n samples z ~ q(z|x), or at the means: (n B, *input_shape), (n B, ...)."""
        a = [part.expand(n, *part.shape).flatten(0, 1) for part in self.encoder(x)]
        return self.decoder.forward_levels(n * x.shape[0], a, draw=draw)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of each group given the means of those before: (B, *input_shape) -> (B, D), (B, D)."""
        _, levels = self.infer(x, draw=False)
        return torch.cat([level.mu for level in levels], 1), torch.cat([level.log_var for level in levels], 1)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        params, levels = self.infer(x)
        nll = self.nll(params, x).mean()
        kl = torch.stack([level.kl() for level in levels]).sum(0).mean()
        return {"loss": nll + kl, "nll": nll, "kl": kl, "elbo": -(nll + kl)}

    def log_prior(self, z: Tensor) -> Tensor:
        """Return the density log p(z_1) + ... + log p(z_N | z_<N) in nats, (..., D) -> (...)."""
        _, levels = self.decoder.decode_levels(z.reshape(-1, *self.code_shape))
        return torch.stack([level.log_p() for level in levels]).sum(0).reshape(z.shape[:-1])

    def sample_prior(self, n: int) -> Tensor:
        """Draw n codes from the top down, (n, D)."""
        _, levels = self.decoder.forward_levels(n, draw=True)
        return torch.cat([level.z for level in levels], 1).to(self.decoder.gain.dtype)

    def sample_posterior(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Draw n codes z ~ q(z|x) for each sample, and log q(z|x) in nats: (B, *input_shape) -> (n, B, D), (n, B)."""
        _, levels = self.infer(x, n)
        z_KBD = torch.cat([level.z for level in levels], 1).unflatten(0, (n, len(x)))
        return z_KBD, torch.stack([level.log_q() for level in levels]).sum(0).unflatten(0, (n, len(x)))

    @torch.no_grad()
    def log_likelihood(self, x: Tensor, n: int) -> Tensor:
        """Like `VAE.log_likelihood`, in one pass for z, p and q, with as many rows at a time as memory limits allow."""
        check_at_least(1, n=n)
        chunk = max(1, 2**23 // (self.width * math.prod(self.input_shape[1:]) * len(x)))  # 32 MiB a stream
        log_w = []
        for k in (min(chunk, n - start) for start in range(0, n, chunk)):
            params, levels = self.infer(x, k)
            log_ratio = torch.stack([level.log_p() - level.log_q() for level in levels]).sum(0)
            log_w.append((log_ratio - self.nll(params, x.repeat(k, 1, 1, 1))).unflatten(0, (k, len(x))))
        return torch.logsumexp(torch.cat(log_w), dim=0) - math.log(n)

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """-log p(x | z) + sum_i KL_i with each z at its mean in nats: (B, *input_shape) -> (B,), no noise."""
        params, levels = self.infer(x, draw=False)
        return self.nll(params, x) + torch.stack([level.kl() for level in levels]).sum(0)

    def latent_chain(self) -> LatentChain:
        """Return the groups from the top down, in the form that bits-back coding needs."""
        layers = [self.decoder.conditional(self.encoder) for _ in self.decoder.sizes]
        return LatentChain([*layers], lambda z: self.decoder(torch.cat(z, 1)), self.likelihood, self.input_shape)
