"""Residual autoencoder, pre-activation blocks (He et al. 2016), https://arxiv.org/abs/1603.05027

Minimises the reconstruction's negative log-likelihood in nats per sample:

    L = -log p(x | g(f(x)))     f: stages of a stride-2 convolution and x + F(x)     g: its mirror

Group normalisation keeps each sample independent of the rest of its batch.
"""

from aezoo.bases.convolutional import ConvolutionalAutoencoder


class ResNetAE(ConvolutionalAutoencoder, tags=("representation",)):
    """Encodes and decodes with residual stages."""

    net = "resnet"
