"""U-Net autoencoder (Ronneberger et al. 2015), https://arxiv.org/abs/1505.04597

Minimises the reconstruction's negative log-likelihood in nats per sample:

    L = -log p(x | g(f(x)))     f: stages of two convolutions and a pooling     g: stages of upsampling and the same

A U-Net with its usual skip connections has no code: feature maps of f reach g directly, and the finest of them contains
all of x. Here skip connections stay within f and within g, see `aezoo.nets.unet`. Every stage of f contributes to the
code, and every stage of g receives it. Nothing bypasses the code, so decode needs only the code.
"""

from aezoo.bases.convolutional import ConvolutionalAutoencoder


class UNetAE(ConvolutionalAutoencoder, defaults={"hidden_dims": (16, 32)}, tags=("representation",)):
    """A U-Net split at its code, with skip connections on either side."""

    net = "unet"
