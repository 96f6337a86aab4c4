"""The losses of GANomaly in anomalib (Akcay et al. 2022), by an author of the paper.

Source: https://github.com/open-edge-platform/anomalib
"""

import copy
import importlib.util
import math
from importlib import metadata
from typing import Any
from unittest import mock

import torch

import aezoo

D, CODE, BATCH = 6, 3, 8


def losses() -> Any:
    """Its module of losses alone, which needs nothing but torch: the package loads all models and what they need."""
    path = metadata.distribution("anomalib").locate_file("anomalib/models/image/ganomaly/loss.py")
    spec = importlib.util.spec_from_file_location("anomalib_ganomaly_loss", str(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_losses_of_generator_and_discriminator(compare):
    theirs = losses()
    settings = {"latent_dim": CODE, "hidden_dims": (5,), "discriminator_dims": (7,), "adv_weight": 0.1}
    model = aezoo.create_model("ganomaly", (D,), enc_weight=0.3, **settings).double()
    other, x = copy.deepcopy(model), torch.rand(BATCH, D)
    found = model.loss(x)
    z = other.encoder(x)
    back = other.decoder(z)
    again = other.second_encoder(back)
    assert (z - again).abs().max() < 1, "beyond 1, theirs is linear"
    frozen = copy.deepcopy(other.discriminator).requires_grad_(False)
    real, fake = (frozen(images) for images in (x, back))
    row = compare("ganomaly", "anomalib", "GeneratorLoss")
    # its distance of codes is half the square up to 1
    generator = theirs.GeneratorLoss(wadv=0.1, wcon=1, wenc=2 * 0.3)(z, again, x, back, real[0], fake[0])
    constant = D * math.log(2)
    reason = "theirs has means over values, ours the sum over a sample's values"
    value = found["loss"] - constant
    row.scaled("generator's loss without its constant, of features", value, generator, D, reason)
    names = ("encoder", "decoder", "second_encoder")
    pairs = [p for n in names for p in zip(getattr(model, n).parameters(), getattr(other, n).parameters(), strict=True)]
    row.equal_gradients(found["loss"], generator, pairs, "gradient of the generator", D, reason)
    means = theirs.GeneratorLoss()
    half = "theirs is the smooth absolute error, half the square up to 1, and a mean over values"
    row.scaled("encoding", found["encoding"], means.loss_enc(z, again), 2 * D, half)
    of_outputs = D * means.loss_adv(real[1].sigmoid(), fake[1].sigmoid())
    reason = "theirs compares the discriminator's outputs, the paper and ours its features"
    row.deviates("adversarial", found["adversarial"], of_outputs, reason, follows="ours")
    outputs = [other.discriminator(images)[1].sigmoid() for images in (x, back.detach())]
    # its targets are float32
    with mock.patch("torch.float32", torch.float64):
        discriminator = theirs.DiscriminatorLoss()(*outputs)
    row = compare("ganomaly", "anomalib", "DiscriminatorLoss")
    reason = "theirs is the mean of both terms, ours their sum"
    row.scaled("discriminator", found["discriminator"], discriminator, 2, reason)
    pairs = [*zip(model.discriminator.parameters(), other.discriminator.parameters(), strict=True)]
    row.equal_gradients(found["loss"], discriminator, pairs, "gradient of the discriminator", 2, reason)
