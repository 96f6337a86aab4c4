"""AAE, adversarial autoencoder (Makhzani et al. 2015), https://arxiv.org/abs/1511.05644

    L = E[-log p(x | g(z))] - E[log D(z)]     z = f(x), or z ~ N(mu(x), diag sigma(x)^2)
    L_D = -E[log D(p)] - E[log(1 - D(z))]     p ~ p(z) = N(0, I)

L is in nats per sample. This is the WAE-GAN of weight 1, with the paper's networks. The paper goes through each batch
twice: a reconstruction phase trains the encoder and decoder, and a regularisation phase trains first the discriminator
and then the encoder. Here the encoder's two gradients are added, and all networks are updated in the same step. Codes
are f(x) or, with `gaussian_posterior`, drawn from the Gaussian of section 2. The third posterior of that section, given
by a noisy network, is not implemented.
"""

from typing import Any

from aezoo.models.regularised.wae_gan import WAEGAN
from aezoo.nets.blocks.adversarial import discriminator_parameter_groups


class AAE(
    WAEGAN,
    hidden_dims={"mlp": (1000, 1000)},
    defaults={
        "latent_dim": 8,
        "adversarial_weight": 1.0,
        "discriminator_dims": (1000, 1000),
        # 5e-4 makes the discriminator so much better than the encoder that codes neither match the prior nor describe x
        "discriminator_lr": 1e-5,
    },
    tags=("generation",),
):
    """An autoencoder whose encoder is also the generator of a GAN: its codes are distributed like the prior.

    Args:
        adversarial_weight: weight of the adversarial loss on the codes.
        discriminator_dims: widths of the discriminator's hidden layers, two of 1000 in the paper.
        discriminator_lr: learning rate of the discriminator, whose betas are 0.5 and 0.999 unless optimizer sets them.
    """

    def parameter_groups(self) -> list[dict[str, Any]]:
        return discriminator_parameter_groups(self, betas=(0.5, 0.999))
