"""Convolutional autoencoder (Masci et al. 2011), https://doi.org/10.1007/978-3-642-21735-7_7

Minimises the reconstruction's negative log-likelihood in nats per sample through strided convolutions:

    L = -log p(x | g(f(x)))     f: stages of stride 2     g: transposed stages back to the exact size

Accepts sequences, images and volumes of any size, according to the rank of `input_shape`.
"""

from aezoo.bases.convolutional import ConvolutionalAutoencoder


class ConvAE(ConvolutionalAutoencoder, defaults={"activation": "relu"}, tags=("representation",)):
    """Encodes with strided convolutions and decodes with transposed convolutions."""

    net = "conv"
