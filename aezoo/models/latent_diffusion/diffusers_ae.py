"""Image autoencoders of the library diffusers (von Platen et al. 2022), https://github.com/huggingface/diffusers

Encoder, decoder and codebook come from diffusers, so that models trained by others can be evaluated and trained
further. The objective is aezoo's, in nats per sample; it depends on the kind of code:

    L = -log p(x | g(z)) + beta KL(N(mu(x), diag sigma(x)^2) || N(0, I))          Gaussian; z ~ N(mu, diag sigma^2)
    L = the same + E[d(f(x_n, t_n, z), stopgrad f(x_n-1, t_n-1, z)) / (s_n - s_n-1)]         ConsistencyDecoderVAE
    L = -log p(x | g(e_k)) + ||sg(z) - e_k||^2 + w_C ||z - sg(e_k)||^2            VQModel; e_k the code nearest to z
    L = -log p(x | g(z))                                                          AutoencoderDC and AutoencoderTiny
    L = -log p(x | g(z + n)) + 1/2 ||z(g(z + n)) - z||^2                          AutoencoderRAE

All terms are sums over the values of a sample or a code. `encode` gives the same as in diffusers: mu of a Gaussian
code, and for VQModel the z that `decode` maps to e_k. `standardiser` maps codes to those of a diffusion model, scale (z
- shift) with the factors of the model's config, and `standardiser.restore` inverts this; taesd learns these codes. With
a small beta, codes are far from N(0, I), so they cannot be sampled from it: `aezoo generate` fits a prior.
laplace:learned trains a scale that the authors of latent diffusion keep at 1, see autoencoder_kl.

ConsistencyDecoderVAE (OpenAI 2023) has a consistency model f as decoder. x_n is x with the noise of step t_n = 16 n of
1024, x_0 = x and f(x, 0, z) = x; n is uniform in 1 to 63, s_n is the noise's standard deviation divided by the sample's
factor, and d is the distance of consistency_decoder, a model with the same objective. g takes two steps: in training
from random noise, otherwise from the same noise for all samples, so that each code has one reconstruction;
`decoder.draw` uses other noise.

The encoder of AutoencoderRAE (Zheng et al. 2025, https://arxiv.org/abs/2510.11690) is a pretrained transformer from the
package transformers and stays frozen. n is noise of scale U(0, noise_tau) for each sample of a training step, otherwise
0; the second term is present if `use_encoder_loss` is set. The paper's perceptual and adversarial terms are in
representation_ae, which accepts such a model as `teacher`.

Shapes: B batch, D channels of a code, (H, W) its positions.
"""

from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder, at_least_float32
from aezoo.distributions import gaussians
from aezoo.distributions.divergences import pseudo_huber
from aezoo.distributions.likelihoods import Gaussian, Laplace, LogCosh
from aezoo.errors import AezooError
from aezoo.nets.blocks import diffusers
from aezoo.nets.blocks.split_diffusers import CONSISTENCY, RAE, split_autoencoder
from aezoo.training.arguments import OptimizerArgs
from aezoo.training.limits import check_at_least

# samples are compared at every 16th of 1024 noise levels; decoding starts from levels 1008 and 512
_STRIDE = 16
_N_LEVELS = 1008 // _STRIDE


class DiffusersAE(Autoencoder, tags=("latent diffusion",)):
    """Trains or loads an autoencoder of the package diffusers; needs the extra diffusers.

    Args:
        input_shape: (C, H, W), with sides that are divisible by the strides of the model. ConsistencyDecoderVAE
            requires 3 channels, and AutoencoderRAE 3 channels and equal sides.
        kind: class in diffusers: AutoencoderKL, AsymmetricAutoencoderKL, AutoencoderKLFlux2, AutoencoderKLKVAE,
            AutoencoderKLHunyuanImage, VQModel, AutoencoderDC, AutoencoderTiny, ConsistencyDecoderVAE or
            AutoencoderRAE, which needs the extra transformers.
        config: arguments of that class, such as block_out_channels; the others default to those of a small model.
        pretrained: none, or a folder written by save_pretrained, which determines kind and config.
        beta: weight of the KL term, for a Gaussian code.
        commitment: w_C, for VQModel.
        likelihood: how outputs are compared with data, see vae; for a pretrained model gaussian, laplace or logcosh.
        **kwargs: see `Autoencoder`.
    """

    encoder: Any
    decoder: Any

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        kind: str = "AutoencoderKL",
        config: dict[str, Any] | None = None,
        pretrained: str = "none",
        beta: float = 1e-6,
        commitment: float = 0.25,
        likelihood: str = "laplace:learned",
        **kwargs: Unpack[OptimizerArgs],
    ) -> None:
        super().__init__(input_shape, likelihood=likelihood, **kwargs)
        check_at_least(0, beta=beta, commitment=commitment)
        if len(self.input_shape) != 3:
            raise AezooError(f"diffusers_ae takes images, (C, H, W), got {self.input_shape}")
        if pretrained == "none":
            net = diffusers.build(kind, config or {}, self.input_shape)
        elif config is not None:
            raise AezooError(f"config is that of {pretrained}: leave it out")
        elif not isinstance(self.likelihood, Gaussian | Laplace | LogCosh):
            # with the others, outputs are not on the scale of samples
            raise AezooError(f"a pretrained model takes likelihood gaussian, laplace or logcosh, got {likelihood!r}")
        else:
            net = diffusers.read(Path(pretrained))
            kind = type(net).__name__
            # so that a checkpoint loads without the folder
            self.hparams.update(kind=kind, config=diffusers.config_of(net), pretrained="none")
        self.beta = beta
        self.commitment = commitment
        self.kind = kind
        self.gaussian = "KL" in kind or kind == CONSISTENCY
        if kind == "AsymmetricAutoencoderKL":
            net.decoder.condition_encoder.requires_grad_(False)  # it encodes a masked image, for inpainting
        self.encoder, self.decoder = split_autoencoder(net)
        if kind == CONSISTENCY:
            self.decoder.fix_noise(self.input_shape[1:])
        self.code_shape = diffusers.code_shape(self.encoder, self.decoder, self.input_shape, self.gaussian)

    @property
    def standardiser(self) -> diffusers.LatentScaling:
        """The map from codes to those of a diffusion model, and its inverse."""
        return diffusers.LatentScaling(self.decoder)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of a Gaussian code, (B, *input_shape) -> (B, D, H, W), (B, D, H, W)."""
        mu, log_var = at_least_float32(self.encoder(x)).chunk(2, dim=1)
        return mu, log_var.clamp(-30, 20)  # as in diffusers

    def encode(self, x: Tensor) -> Tensor:
        return (self.moments(x)[0] if self.gaussian else self.encoder(x)).to(x.dtype)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        if self.gaussian:
            return self.gaussian_loss(x)
        z = self.encoder(x).to(x.dtype)
        if self.kind == RAE:
            return self.representation_loss(x, z)
        nll = self.nll(self.decoder(z), x).mean()
        terms = self.quantisation_terms(z) if self.kind == "VQModel" else {}
        return {
            "loss": nll + self.commitment * terms["commitment"] + terms["codebook"] if terms else nll,
            "nll": nll,
            **terms,
        }

    def gaussian_loss(self, x: Tensor) -> dict[str, Tensor]:
        """Return the terms for a Gaussian code."""
        mu, log_var = self.moments(x)
        z = (mu + (0.5 * log_var).exp() * gaussians.standard_normal_like(mu)).to(x.dtype)
        drawn = self.kind == CONSISTENCY and self.training
        nll = self.nll(self.decoder.draw(z) if drawn else self.decoder(z), x).mean()
        kl = 0.5 * (mu**2 + log_var.exp() - 1 - log_var).flatten(1).sum(1).mean()
        if self.kind != CONSISTENCY:
            return {"loss": nll + self.beta * kl, "nll": nll, "kl": kl, "elbo": -(nll + kl)}
        consistency = self.consistency(x, z).mean()
        return {"loss": nll + self.beta * kl + consistency, "nll": nll, "kl": kl, "consistency": consistency}

    def consistency(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the consistency term of ConsistencyDecoderVAE, (B, 3, H, W), codes -> (B,)."""
        x, condition = 2 * at_least_float32(x) - 1, self.decoder.condition(z)
        n = (torch.rand(len(x), device=x.device, dtype=x.dtype) * _N_LEVELS).long().clamp(max=_N_LEVELS - 1)
        high, low = _STRIDE * (n + 1), _STRIDE * n
        noise, is_clean = gaussians.standard_normal_like(x), (n == 0)[:, None, None, None]
        found = self.decoder.f(self.decoder.noisy(x, noise, high), high, condition)
        with torch.no_grad():  # second, since autocast would cache weights cast without gradients
            target = x.where(is_clean, self.decoder.f(self.decoder.noisy(x, noise, low), low, condition))
        step = self.decoder.level(high) - self.decoder.level(low).where(n > 0, 0)
        return pseudo_huber(found, target) / step

    def representation_loss(self, x: Tensor, z: Tensor) -> dict[str, Tensor]:
        """Return the terms for AutoencoderRAE, (B, 3, H, H), codes -> {name: ()}."""
        params = self.decoder(self.encoder.noised(z) if self.training else z)
        nll = self.nll(params, x).mean()
        if not self.decoder.net.use_encoder_loss:
            return {"loss": nll, "nll": nll}
        difference = at_least_float32(self.encoder(self.likelihood.mean(params))) - at_least_float32(z)
        features = 0.5 * difference.square().flatten(1).sum(1).mean()
        return {"loss": nll + features, "nll": nll, "features": features}

    def quantisation_terms(self, z: Tensor) -> dict[str, Tensor]:
        """Return codebook and commitment losses of codes and their nearest entries, (B, D, H, W) -> {name: ()}.

        In diffusers, they are means over all values, and the commitment weight multiplies the codebook loss.
        """
        quantise = self.decoder.net.quantize
        k = quantise(z)[2][2]  # (B H W)
        e = at_least_float32(quantise.embedding(k)).unflatten(0, (len(z), *z.shape[2:])).movedim(3, 1)
        z = at_least_float32(z)
        pairs = {"codebook": (z.detach(), e), "commitment": (z, e.detach())}
        return {name: ((a - b) ** 2).flatten(1).sum(1).mean() for name, (a, b) in pairs.items()}
