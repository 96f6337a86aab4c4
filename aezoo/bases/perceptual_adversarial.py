"""Reconstruction losses with a feature distance and a discriminator, in addition to the likelihood.

Shapes: B batch.
"""

from typing import Any

import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.nets.blocks import adversarial
from aezoo.nets.blocks.adversarial import call_frozen, gradient_only, value_and_grad
from aezoo.nets.blocks.features import FeatureDistance
from aezoo.training.limits import at_least


class PerceptualAdversarial(Autoencoder):
    """A model with the losses R, L_G and L_D of vqgan; its constructor calls `build_losses`.

    Attributes:
        distance: P, the feature distance.
        discriminator: D, the patch discriminator.
    """

    perceptual_weight: float
    discriminator_weight: float
    discriminator_start: int
    discriminator_lr: float

    def build_losses(
        self,
        features: str,
        perceptual_weight: float,
        discriminator_weight: float,
        discriminator_start: int,
        discriminator_dims: tuple[int, ...],
        discriminator_lr: float,
    ) -> None:
        """Check the arguments and build D, whose stages have `discriminator_dims` channels."""
        at_least(0, perceptual_weight=perceptual_weight, discriminator_weight=discriminator_weight)
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
        self, x: Tensor, z: Tensor, *decoder_inputs: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """R + w_D lambda L_G + L_D for one draw of the code; the last two contribute only their gradients.

        With w_D = 0 it is R alone, and the discriminator is not trained.

        Args:
            x: samples, (B, *input_shape).
            z: codes, (B, *code_shape), which the decoder takes.
            decoder_inputs: further arguments of the decoder.

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
        weight = adversarial.adaptive_weight(*(self.batch_mean(to_last_layer(g)[None]) for g in (g_R, g_gan)))

        # for the discriminator's step
        scores = self.discriminator(torch.cat([x, image(params).detach().to(x.dtype)]))
        hinge = adversarial.hinge_loss(*scores.chunk(2))
        is_started = self.step_fraction(self.discriminator_start) >= 1
        game = is_started * (self.discriminator_weight * weight * gan + hinge)
        terms |= {"adversarial": gan, "adaptive_weight": weight, "discriminator": hinge}
        return nll + self.perceptual_weight * perceptual + gradient_only(game), terms, g_R
