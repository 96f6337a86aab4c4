"""LPIPS (Zhang et al. 2018) with one random VGG-16, as the perceptual term of the models.

Source: https://github.com/richzhang/PerceptualSimilarity
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lpips
import pytest
import torch
from torchvision import models
from torchvision.models.vgg import cfgs, make_layers

import aezoo
from aezoo.nets.blocks.pretrained import cached_file

SHAPE = (3, 16, 16)
NAMES = ("autoencoder_kl", "asymmetric_kl", "eq_vae", "va_vae", "vqgan", "representation_ae")


@pytest.fixture
def reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Theirs with the authors' channel weights, and its random VGG-16 as torchvision's weights in torch.hub's cache."""
    # without the classifier, which has 90 % of the weights
    monkeypatch.setattr(models, "vgg16", lambda **_: SimpleNamespace(features=make_layers(cfgs["D"])))
    net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).requires_grad_(False)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    slices = (part for i in range(1, 6) for part in getattr(net.net, f"slice{i}").state_dict().items())
    torch.save({f"features.{key}": value for key, value in slices}, cached_file("vgg16"))
    return net


def test_lpips(compare, reference):
    x, other = torch.rand(2, *SHAPE), torch.rand(2, *SHAPE, requires_grad=True)
    expected = reference(other, x, normalize=True).flatten()
    slope = torch.randn_like(expected)
    net = None
    for name in NAMES:
        model = aezoo.create_model(name, SHAPE).double()
        model.distance.net = net
        with_reference = compare(name, "lpips", "LPIPS")
        found = model.distance.move_to(x)(other, x)
        net = model.distance.read()
        # theirs adds 1e-10 to the lengths of features, ours 1e-8 to their squares, as torchmetrics
        with_reference.equal("perceptual distance", found, expected)
        with_reference.equal_gradients(
            (found * slope).sum(), (expected * slope).sum(), [(other, other)], "gradient of the perceptual distance"
        )


@pytest.mark.parametrize("name", ["autoencoder_kl", "vqgan"])
def test_perceptual_term(compare, reference, name):
    model = aezoo.create_model(name, SHAPE, hidden_dims=(8, 8), discriminator_weight=0.0, likelihood="laplace").double()
    x, z = torch.rand(2, *SHAPE), torch.randn(2, *model.code_shape)
    found, terms, _ = model.adversarial_objective(x, z)
    x_hat = model.decoder(z)
    expected = -torch.distributions.Laplace(x_hat, 1.0).log_prob(x).flatten(1).sum(1).mean()
    # added to the error of each value, as in taming-transformers and latent diffusion
    values = x[0].numel()
    expected = expected + values * reference(x_hat, x, normalize=True).mean()
    with_reference = compare(name, "lpips", "LPIPS")
    with_reference.scaled(
        "perceptual term", terms["perceptual"], reference(x_hat, x, normalize=True).mean(), values,
        "added to each value of a sample, as in the authors' code",
    )  # fmt: skip
    with_reference.equal("reconstruction loss R", found, expected)
    with_reference.equal_gradients(found, expected, [(p, p) for p in model.decoder.parameters()], "gradient of R")
