"""Image autoencoders of the library diffusers (von Platen et al. 2022), https://github.com/huggingface/diffusers

Encoder, decoder and codebook come from diffusers, so that models trained by others can be measured and trained further
here. The objective is the zoo's, in nats per sample; it depends on the kind of code:

    L = -log p(x | g(z)) + beta KL(N(mu(x), diag sigma(x)^2) || N(0, I))          Gaussian; z ~ N(mu, diag sigma^2)
    L = -log p(x | g(e_k)) + ||sg(z) - e_k||^2 + w_C ||z - sg(e_k)||^2            VQModel; e_k the code nearest to z
    L = -log p(x | g(z))                                                          AutoencoderDC and AutoencoderTiny

All terms are sums over the values of a sample or a code. `encode` gives the same as in diffusers: mu of a Gaussian
code, and for VQModel the z that `decode` maps to e_k. `standardiser` gives the codes on which a diffusion model works,
scale (z - shift) with the factors of the model's config, and `standardiser.restore` the way back; taesd learns these.
With a small beta codes lie far from N(0, I), so there is no prior to sample from: `aezoo generate` fits one.
laplace:learned trains a scale that the authors of latent diffusion keep at 1, see autoencoder_kl.

Shapes: B batch, D channels of a code, (H, W) its places.
"""

from pathlib import Path
from typing import Any, Unpack

from torch import Tensor

from aezoo.autoencoder import Autoencoder, at_least_float32
from aezoo.distributions import gaussians
from aezoo.distributions.likelihoods import Gaussian, Laplace, LogCosh
from aezoo.errors import AezooError
from aezoo.nets.blocks import diffusers
from aezoo.training.arguments import OptimizerArgs
from aezoo.training.limits import check_at_least


class DiffusersAE(Autoencoder, tags=("latent diffusion",)):
    """A model of the package diffusers, new or read from a folder: pip install 'aezoo[diffusers]'.

    Args:
        input_shape: (C, H, W), with sides that the model's stages divide.
        kind: its class in diffusers: AutoencoderKL, AsymmetricAutoencoderKL, AutoencoderKLFlux2, AutoencoderKLKVAE,
            AutoencoderKLHunyuanImage, VQModel, AutoencoderDC or AutoencoderTiny.
        config: arguments of that class, such as block_out_channels; the others are those of a small model.
        pretrained: none, or a folder written by its save_pretrained, which determines kind and config.
        beta: weight of the KL term, for a Gaussian code.
        commitment: w_C, for VQModel.
        likelihood: how outputs are compared with data, see vae; for a pretrained model gaussian, laplace or logcosh.
        **kwargs: see `Autoencoder`.
    """

    encoder: diffusers.Encoding
    decoder: diffusers.Decoding

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
            net = diffusers.build(kind, config or {}, self.input_shape[0])
        elif config is not None:
            raise AezooError(f"config is that of {pretrained}: leave it out")
        elif not isinstance(self.likelihood, Gaussian | Laplace | LogCosh):
            # with the others an output is not a value of a sample
            raise AezooError(f"a pretrained model takes likelihood gaussian, laplace or logcosh, got {likelihood!r}")
        else:
            net = diffusers.read(Path(pretrained))
            kind = type(net).__name__
            # so that a checkpoint loads without the folder
            self.hparams.update(kind=kind, config=diffusers.config_of(net), pretrained="none")
        self.beta = beta
        self.commitment = commitment
        self.kind = kind
        self.gaussian = "KL" in kind
        if kind == "AsymmetricAutoencoderKL":
            net.decoder.condition_encoder.requires_grad_(False)  # it reads a masked image, for inpainting
        self.encoder, self.decoder = diffusers.split_autoencoder(net)
        self.code_shape = diffusers.code_shape(self.encoder, self.decoder, self.input_shape, self.gaussian)

    @property
    def standardiser(self) -> diffusers.LatentScaling:
        """The map from codes to those of a diffusion model, and back."""
        return diffusers.LatentScaling(self.decoder)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of a Gaussian code: (B, *input_shape) -> (B, D, H, W), (B, D, H, W)."""
        mu, log_var = at_least_float32(self.encoder(x)).chunk(2, dim=1)
        return mu, log_var.clamp(-30, 20)  # as in diffusers

    def encode(self, x: Tensor) -> Tensor:
        return (self.moments(x)[0] if self.gaussian else self.encoder(x)).to(x.dtype)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        if not self.gaussian:
            z = self.encoder(x).to(x.dtype)
            nll = self.nll(self.decoder(z), x).mean()
            terms = self.quantisation_terms(z) if self.kind == "VQModel" else {}
            return {
                "loss": nll + self.commitment * terms["commitment"] + terms["codebook"] if terms else nll,
                "nll": nll,
                **terms,
            }
        mu, log_var = self.moments(x)
        z = mu + (0.5 * log_var).exp() * gaussians.standard_normal_like(mu)
        nll = self.nll(self.decoder(z.to(x.dtype)), x).mean()
        kl = 0.5 * (mu**2 + log_var.exp() - 1 - log_var).flatten(1).sum(1).mean()
        return {"loss": nll + self.beta * kl, "nll": nll, "kl": kl, "elbo": -(nll + kl)}

    def quantisation_terms(self, z: Tensor) -> dict[str, Tensor]:
        """Codebook loss and commitment loss of codes and their nearest codebook entries: (B, D, H, W) -> {name: ()}.

        In diffusers they are means over all values, and the commitment weight is on the other term.
        """
        quantise = self.decoder.net.quantize
        k = quantise(z)[2][2]  # (B H W)
        e = at_least_float32(quantise.embedding(k)).unflatten(0, (len(z), *z.shape[2:])).movedim(3, 1)
        z = at_least_float32(z)
        pairs = {"codebook": (z.detach(), e), "commitment": (z, e.detach())}
        return {name: ((a - b) ** 2).flatten(1).sum(1).mean() for name, (a, b) in pairs.items()}
