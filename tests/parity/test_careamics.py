"""The loss of Noise2Void in CAREamics, by authors of the paper.

Source: https://github.com/CAREamics/careamics
"""

import copy
import importlib.util
import math
import sys
from collections.abc import Callable
from importlib import metadata
from unittest import mock

import torch
from torch import Tensor

import aezoo


def loss_of_careamics() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Its `n2v_loss` from its module alone, since the package imports readers of microscopy formats."""
    path = metadata.distribution("careamics").locate_file("careamics/losses/n2v_losses.py")
    spec = importlib.util.spec_from_file_location("careamics_n2v_losses", str(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # imports that another loss of the module needs
    names = ("careamics", "careamics.models", "careamics.models.lvae", "careamics.models.lvae.noise_models")
    with mock.patch.dict(sys.modules, dict.fromkeys(names, mock.MagicMock())):
        spec.loader.exec_module(module)
    return module.n2v_loss


def test_loss_of_blind_spots(compare):
    shape, n = (1, 6, 7), 5
    model = aezoo.create_model("noise2void", shape, width=4, depth=3, masked=0.1).double()
    other, x = copy.deepcopy(model), torch.rand(n, *shape)
    torch.manual_seed(3)
    found = model.loss(x)
    torch.manual_seed(3)
    manipulated, masks = model.blind(x)
    assert ((manipulated == x) | masks.view_as(x).bool()).all() and (masks.sum(1) == model.n_masked).all()
    expected = loss_of_careamics()(other.decoder(other.encoder(manipulated)), x, masks.view_as(x))
    pixels = math.prod(shape)
    row = compare("noise2void", "careamics", "n2v_loss")
    reason = "theirs is a mean over masked pixels, ours as if all pixels of a sample had been masked"
    row.scaled("loss without its constant", found["loss"] - pixels / 2 * math.log(math.pi), expected, pixels, reason)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    row.equal_gradients(found["loss"], expected, pairs, scale=pixels, reason=reason)
