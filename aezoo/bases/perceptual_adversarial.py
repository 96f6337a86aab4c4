"""Reconstruction losses with a feature distance and a discriminator, in addition to the likelihood.

Shapes: B batch.
"""

from typing import Any, TypedDict

import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.nets.blocks import adversarial
from aezoo.nets.blocks.adversarial import call_frozen, gradient_only, value_and_grad
from aezoo.nets.blocks.features import FeatureDistance, default_features
from aezoo.training.limits import check_at_least


class AdversarialArgs(TypedDict, total=False):
    """Arguments of `PerceptualAdversarial`."""

    features: str
    perceptual_weight: float
    discriminator_weight: float
    discriminator_start: int
    discriminator_dims: tuple[int, ...]
    discriminator_lr: float


class PerceptualAdversarial(Autoencoder):
    """A model with the losses R, L_G and L_D of vqgan; its constructor calls `build_adversarial_losses`.

    Args:
        features: what P compares: lpips, the learned similarity of images that the authors use, with VGG-16, or
            lpips:alex or lpips:squeeze with a smaller network; random, a network with random weights; vgg16, vgg19, the
            path of a .pth file of VGG weights, torchvision:NAME or timm:NAME, for images; none. auto takes lpips
            if torch.hub has torchvision's weights of vgg16 on this machine and images are at least 16 x 16 with 1 or 3
            channels, else random.
        perceptual_weight: w_P.
        discriminator_weight: w_D.
        discriminator_start: optimiser steps before the adversarial loss is used.
        discriminator_dims: channels of the discriminator's stages, each of stride 2. Empty: hidden_dims, or 64.
        discriminator_lr: learning rate of the discriminator. All betas are 0.5 and 0.9 unless optimizer sets them.

    Attributes:
        distance: P, the feature distance.
        discriminator: D, the patch discriminator.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        features: str = "auto",
        perceptual_weight: float = 1.0,
        discriminator_weight: float = 0.8,
        discriminator_start: int = 0,
        discriminator_dims: tuple[int, ...] = (),
        discriminator_lr: float = 1e-4,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_shape, **kwargs)
        if features == "auto":
            features = default_features(self.input_shape)
            if "features" in self.hparams:  # a checkpoint keeps the choice
                self.update_hyperparameters(features=features)
        self.features = features
        self.perceptual_weight = perceptual_weight
        self.discriminator_weight = discriminator_weight
        self.discriminator_start = discriminator_start
        self.discriminator_dims = tuple(discriminator_dims)
        self.discriminator_lr = discriminator_lr

    def build_adversarial_losses(self, default_dims: tuple[int, ...]) -> None:
        """Build P and D; after encoder and decoder.

        Args:
            default_dims: channels of D's stages if `discriminator_dims` is empty; if this is empty too, 64.

        Raises:
            AezooError: an invalid argument of the discriminator.
        """
        dims = self.discriminator_dims or tuple(default_dims) or (64,)
        self.set_adversarial_losses(
            self.features,
            self.perceptual_weight,
            self.discriminator_weight,
            self.discriminator_start,
            dims,
            self.discriminator_lr,
        )

    def set_adversarial_losses(
        self,
        features: str,
        perceptual_weight: float,
        discriminator_weight: float,
        discriminator_start: int,
        discriminator_dims: tuple[int, ...],
        discriminator_lr: float,
    ) -> None:
        """Set the attributes and build P and D, for a constructor that names the arguments itself."""
        check_at_least(0, perceptual_weight=perceptual_weight, discriminator_weight=discriminator_weight)
        adversarial.check_discriminator(discriminator_dims, discriminator_lr, discriminator_start)
        self.perceptual_weight = perceptual_weight
        self.discriminator_weight = discriminator_weight
        self.discriminator_start = discriminator_start
        self.discriminator_lr = discriminator_lr
        self.distance = FeatureDistance(features, self.input_shape)
        self.discriminator = adversarial.PatchDiscriminator(self.input_shape, discriminator_dims)
        self.discriminator.requires_grad_(discriminator_weight > 0)
        self.enable_step_counter()

    def parameter_groups(self) -> list[dict[str, Any]]:
        return adversarial.discriminator_parameter_groups(
            self, betas=(0.5, 0.9), for_all=True
        )  # as in the code of VQGAN's authors

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.distance.read()

    def adversarial_objective(
        self, x: Tensor, z: Tensor, *decoder_inputs: Tensor, max_weight: float = 1e4
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """R + w_D lambda L_G + L_D for one draw of the code; the last two contribute only their gradients.

        With w_D = 0 it is R alone, and the discriminator is not trained.

        Args:
            x: samples, (B, *input_shape).
            z: codes, (B, *code_shape), which the decoder takes.
            decoder_inputs: further arguments of the decoder.
            max_weight: largest lambda, relative to R, which is a sum over values.

        Returns:
            The loss, a scalar in nats per sample, its terms, and R's gradient at the decoder's output.
        """
        params, to_last_layer = adversarial.last_layer_vjp(self.decoder, z, *decoder_inputs)

        # for the step of encoder and decoder, in which the discriminator is constant
        image, distance = self.likelihood.mean, self.distance.move_to(x)
        nll, g_nll = value_and_grad(lambda p: self.nll(p, x).mean(), params)
        perceptual, g_P = value_and_grad(lambda p: x[0].numel() * distance(image(p), x).mean(), params)
        g_R = g_nll + self.perceptual_weight * g_P
        terms = {"nll": nll, "perceptual": perceptual}
        if self.discriminator_weight == 0:
            return nll + self.perceptual_weight * perceptual, terms, g_R
        gan, g_gan = value_and_grad(lambda p: -call_frozen(self.discriminator, image(p).to(x.dtype)).mean(), params)
        # from the gradients of all ranks: the mean of their separate weights would differ
        at_last_layer = (self.batch_mean(to_last_layer(g)[None]) for g in (g_R, g_gan))
        weight = adversarial.adaptive_weight(*at_last_layer, max_weight=max_weight)

        # for the discriminator's step
        scores = self.discriminator(torch.cat([x, image(params).detach().to(x.dtype)]))
        hinge = adversarial.hinge_loss(*scores.chunk(2))
        is_started = self.step_fraction(self.discriminator_start) >= 1
        game = is_started * (self.discriminator_weight * weight * gan + hinge)
        terms |= {"adversarial": gan, "adaptive_weight": weight, "discriminator": hinge}
        return nll + self.perceptual_weight * perceptual + gradient_only(game), terms, g_R
