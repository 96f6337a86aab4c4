"""Losses of kornia (Riba et al. 2020), which anomalib uses for DRAEM.

Source: https://github.com/kornia/kornia
"""

import copy
import math

import torch
from kornia.losses import BinaryFocalLossWithLogits, SSIMLoss

import aezoo


def test_loss_of_repairs_and_segmentation(compare):
    shape, n = (1, 16, 16), 6
    settings = {"latent_dim": 3, "net": "mlp", "hidden_dims": (5,), "segmentation_dims": (3, 4)}
    model = aezoo.create_model("draem", shape, ssim_weight=0.7, segmentation_weight=0.4, **settings).double()
    other, x = copy.deepcopy(model), torch.rand(n, *shape)
    torch.manual_seed(3)
    found = model.loss(x)
    torch.manual_seed(3)
    damaged = model.simulate_defects(x)
    changed = (damaged != x).double()
    assert 0 < changed.mean() < 1
    back = other.decoder(other.encoder(damaged))
    pixels = math.prod(shape)
    nll = (x - back).square().flatten(1).sum(1).mean() + pixels / 2 * math.log(math.pi)
    # SSIMLoss is half of 1 - SSIM
    structure = 2 * SSIMLoss(11)(back, x)
    focal = BinaryFocalLossWithLogits(alpha=None, gamma=2.0, reduction="mean")
    segmentation = focal(other.segmentation(torch.cat([damaged, back], 1)), changed)
    expected = nll + pixels * (0.7 * structure + 0.4 * segmentation)
    row = compare("draem", "kornia", "SSIMLoss, BinaryFocalLossWithLogits")
    row.equal("loss", found["loss"], expected)
    reason = "theirs is a mean over pixels, ours their sum"
    row.scaled("structure", found["structure"], structure, pixels, reason)
    row.scaled("segmentation", found["segmentation"], segmentation, pixels, reason)
    row.equal_gradients(found["loss"], expected, zip(model.parameters(), other.parameters(), strict=True))
