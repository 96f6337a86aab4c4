"""Models of compressai imported with `aezoo import`: losses, codes, tables and strings (Bégaint et al. 2020).

Source: https://github.com/InterDigitalInc/CompressAI
"""

import re
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from comparison import Comparison
from torch import Tensor

import aezoo
from aezoo.bases.entropy_coded import AdditiveNoise
from aezoo.io.importers.compressai import _NAMES
from aezoo.nets.blocks.compressai import ARCHITECTURES, GDN, passes_bound
from aezoo.tasks.codec import rans

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # warnings of torch_geometric, which it imports
    from compressai.entropy_models import entropy_models
    from compressai.losses import RateDistortionLoss
    from compressai.models import FactorizedPriorReLU
    from compressai.zoo import image

SHAPE, LAM = (3, 64, 128), 0.013
KINDS = {**image.model_architectures, "bmshj2018-factorized-relu": FactorizedPriorReLU}
Compare = Callable[[str, str, str], Comparison]


def theirs(name: str, width: float) -> Any:
    """A model of compressai with random offsets, codes of a given width, and tables that do not cover wide codes."""
    torch.manual_seed(0)
    net: Any = KINDS[name](8) if "cheng" in name else KINDS[name](8, 12)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        [*net.g_a.parameters()][-2].mul_(width)
        if hasattr(net, "context_prediction"):
            net.context_prediction.weight.mul_(net.context_prediction.mask)
    net.update(update_quantiles=True)
    with torch.no_grad():
        net.entropy_bottleneck.quantiles[:, :, 1] += 0.3
        net.entropy_bottleneck.quantiles[:, :, ::2] = net.entropy_bottleneck.quantiles[:, :, 1:2]
        net.entropy_bottleneck.quantiles[:, :, 0] -= 2.4
        net.entropy_bottleneck.quantiles[:, :, 2] += 3.1
    net.float().update(force=True)
    return net.eval()


def imported(net: Any, folder: Path) -> Any:
    torch.save(net.state_dict(), folder / "model.pth.tar")
    model = aezoo.import_model(folder / "model.pth.tar").model
    settings = {key: value for key, value in model.hparams.items() if key not in ("input_shape", "lam")}
    again = aezoo.create_model("compressai", SHAPE, lam=LAM, **settings).to(model.dtype)
    again.load_state_dict(model.state_dict())
    return again.eval()


def pairs(model: Any, net: Any) -> list[tuple[Tensor, Tensor]]:
    other = dict(net.named_parameters())
    found = []
    for key, parameter in model.named_parameters():
        for pattern, new in _NAMES:
            key = re.sub(pattern, new, key)
        found.append((parameter, other.pop(key)))
    assert not other
    return found


def noise(v: Tensor) -> Tensor:
    """A function of the value, since theirs draws noise several times."""
    return (v.detach() * 1e4).sin() / 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_of_imported_models_in_training(compare: Compare, name: str, tmp_path: Path) -> None:
    net = theirs(name, 1)  # wide codes have a probability of 0 in theirs
    model, x = imported(net, tmp_path).double().train(), torch.rand(2, *SHAPE)
    net.double().train()
    for layer in (layer for layer in model.modules() if isinstance(layer, GDN)):  # ours bounds gradients before steps
        for root, bound in layer.bounded():
            root.register_hook(lambda gradient, root=root, bound=bound: gradient * passes_bound(root, gradient, bound))
    if hasattr(net, "context_prediction"):  # theirs sets masked weights to 0 after a step, ours masks their gradients
        net.context_prediction.weight.register_hook(lambda gradient: gradient * net.context_prediction.mask)

    def quantised(_: Any, inputs: Tensor, mode: str, means: Tensor | None = None) -> Tensor:
        assert mode == "noise"
        return inputs + noise(inputs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(entropy_models.EntropyModel, "quantize", quantised))
        stack.enter_context(mock.patch.object(AdditiveNoise, "transform", lambda _, v, law=None: v + noise(v)))
        for part in net.modules():  # ours has no lower bound of likelihoods
            if isinstance(part, entropy_models.EntropyModel):
                part.use_likelihood_bound = False
        found, output = model.loss(x), net(x)
        expected = RateDistortionLoss(LAM)(output, x)
    per_picture = found["rate"].detach() / found["bpp"].detach()
    comparison = compare("compressai", "compressai", type(net).__name__)
    comparison.equal("bpp", found["bpp"], expected["bpp_loss"])
    comparison.equal("loss of quantiles", found["quantiles"], net.aux_loss())
    why = "nats per picture instead of bits per pixel"
    comparison.scaled("rate", found["rate"], expected["bpp_loss"], float(per_picture), why)
    both = pairs(model, net)
    ours = found["loss"] - found["quantiles"]
    quantity = "gradient of the loss"
    comparison.equal_gradients(ours, expected["loss"], both, quantity, float(per_picture), why)
    comparison.equal_gradients(found["bpp"], expected["bpp_loss"], both, "gradient of the rate")
    comparison.equal_gradients(found["quantiles"], net.aux_loss(), both, "gradient of the loss of quantiles")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_strings_of_imported_models(compare: Compare, name: str, tmp_path: Path) -> None:
    """In float32, as in files, exactly equal: strings, tables, and images decoded from the other's strings."""
    torch.set_default_dtype(torch.float32)
    net = theirs(name, 20)
    model, x = imported(net, tmp_path), torch.rand(1, *SHAPE)
    with torch.no_grad():
        coded = net.compress(x)
        x_hat = net.decompress(coded["strings"], coded["shape"])["x_hat"]
    strings = rans.encode_strings(model, x)
    assert strings == coded["strings"]
    comparison = compare("compressai", "compressai", type(net).__name__)
    for part, ours, other in zip("yz", strings, coded["strings"], strict=False):
        comparison.equal(f"strings of {part}", [*ours[0]], [*other[0]], tolerance=0)
    comparison.equal("pictures of their strings", rans.decode_strings(model, coded["strings"]).clamp(0, 1), x_hat, 0)
    with torch.no_grad():
        back = net.decompress(strings, coded["shape"])["x_hat"]
        comparison.equal("pictures of our strings", model(x).clamp(0, 1), back, 0)
        comparison.equal("codes before rounding", model.encoder(x), net.g_a(x), 0)
    made = imported(net, tmp_path)
    made.table_width = 0
    for field, ours_, kept in zip(
        ("cdf", "length", "offset"), made.frequency_tables(), model.frequency_tables(), strict=True
    ):
        comparison.equal(f"tables made from weights, {field}", ours_, kept, 0)
