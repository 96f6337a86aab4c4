"""DnCNN, noise and the supervised loss of DeepInverse (Tachella et al. 2025); its DnCNN has no batch normalisation.

Source: https://github.com/deepinv/deepinv
"""

import copy
import math
from typing import Any

import pytest
import torch
from deepinv.loss import SupLoss
from deepinv.models import DnCNN
from deepinv.physics import GaussianNoise, PoissonNoise

import aezoo

MEANS = "theirs is a mean over the values of a sample, ours a sum"


def ours(name: str, shape: tuple[int, ...], **settings: Any) -> Any:
    """A model with random offsets added to its initial weights."""
    model = aezoo.create_model(name, shape, width=5, **settings).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


@pytest.mark.parametrize(("shape", "depth"), [((1, 9, 8), 2), ((3, 7, 6), 6), ((2, 4, 5, 6), 4)])
def test_residual_network_and_its_squared_error(compare, shape, depth):
    model = ours("dncnn", shape, depth=depth, sigma=0.25)
    layers = [*model.encoder.layers[::2], model.decoder.last]
    theirs = DnCNN(shape[0], shape[0], depth, nf=5, pretrained=None, dim=len(shape) - 1).double()
    pairs = []
    for a, b in zip(layers, (theirs.in_conv, *theirs.conv_list, theirs.out_conv), strict=True):
        for p, other in zip(a.parameters(), b.parameters(), strict=True):
            other.data.copy_(-p if a is layers[-1] else p)  # theirs adds the noise estimate, ours subtracts it
            pairs.append((p, other))
    x = torch.rand(4, *shape)
    torch.manual_seed(3)
    loss = model.loss(x)["loss"]
    torch.manual_seed(3)
    noisy = GaussianNoise(0.25)(x)
    expected = SupLoss()(theirs(noisy), x)
    row = compare("dncnn", "deepinv", "DnCNN")
    row.equal("x_hat", model(noisy), theirs(noisy))
    values = math.prod(shape)
    row.scaled("loss without its constant", loss - values / 2 * math.log(math.pi), expected, values, MEANS)
    row.equal_gradients(loss, expected, pairs[:-2], scale=values, reason=MEANS)
    reason = f"{MEANS}, and theirs adds that layer's output where ours subtracts it"
    row.equal_gradients(loss, expected, pairs[-2:], "gradient, last layer,", -values, reason)


@pytest.mark.parametrize("corruption", ["gaussian:0.25", "poisson:32"])
def test_loss_of_two_noisy_copies(compare, corruption):
    shape, n = (2, 6, 7), 5
    model = ours("noise2noise", shape, depth=3, corruption=corruption)
    other, x = copy.deepcopy(model), torch.rand(n, *shape)
    noise = GaussianNoise(0.25) if corruption.startswith("gaussian") else PoissonNoise(1 / 32)
    torch.manual_seed(3)
    loss = model.loss(x)["loss"]
    torch.manual_seed(3)
    y1, y2 = (noise(x).double() for _ in range(2))
    expected = SupLoss()(other.decoder(other.encoder(y1)), y2)
    row = compare("noise2noise", "deepinv", f"{type(noise).__name__}, SupLoss")
    values = math.prod(shape)
    row.scaled("loss without its constant", loss - values / 2 * math.log(math.pi), expected, values, MEANS)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    row.equal_gradients(loss, expected, pairs, scale=values, reason=MEANS)
