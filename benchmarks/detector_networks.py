"""Networks of published detectors that no setting of the zoo's networks gives."""

from torch import nn

# the default of torch's leaky_relu, as in the authors' code; the paper says 0.1
_SLOPE = 0.01


def lenet_autoencoder() -> tuple[nn.Module, nn.Module]:
    """Encoder, (B, 1, 28, 28) -> (B, 32), and decoder of Deep SVDD on MNIST (Ruff et al. 2018).

    Layers are those of https://github.com/lukasruff/Deep-SVDD-PyTorch. None of them has a bias, with which the encoder
    could map all samples to the centre. Batch normalisation has no trained scale and shift.
    """
    encoder = nn.Sequential(
        *(_conv(1, 8, 2), nn.MaxPool2d(2)),
        *(_conv(8, 4, 2), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(4 * 7 * 7, 32, bias=False)),
    )
    decoder = nn.Sequential(
        *(nn.Unflatten(1, (2, 4, 4)), nn.LeakyReLU(_SLOPE), nn.Upsample(scale_factor=2)),
        *(_conv(2, 4, 2), nn.Upsample(scale_factor=2)),
        # 16 to 14 pixels
        *(_conv(4, 8, 1), nn.Upsample(scale_factor=2)),
        *(nn.Conv2d(8, 1, 5, padding=2, bias=False), nn.Sigmoid()),
    )
    return encoder, decoder


def _conv(n_in: int, n_out: int, padding: int) -> nn.Module:
    """A convolution of 5 x 5 pixels, batch normalisation and leaky ReLU."""
    conv = nn.Conv2d(n_in, n_out, 5, padding=padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out, eps=1e-4, affine=False), nn.LeakyReLU(_SLOPE))
