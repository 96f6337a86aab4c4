"""Structural similarity of pytorch-msssim (Fang 2020) on reconstructions.

Source: https://github.com/VainF/pytorch-msssim
"""

import math

import pytest
import pytorch_msssim
import torch
import torch.nn.functional as F
from comparison import noise
from pytorch_msssim.ssim import _ssim
from scipy.signal.windows import gaussian
from torch import Tensor

import aezoo
from aezoo.models.variational.msssim_vae import EXPONENTS

WINDOW = 3
RANGE = {"data_range": 1.0, "size_average": False}


def window(width: int, channels: int) -> dict[str, Tensor]:
    """Their window in float64; theirs would round it to float32."""
    win = torch.from_numpy(gaussian(width, 1.5 * width / 11))
    return {"win": (win / win.sum()).expand(channels, 1, 1, width)}


def reflected(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (width // 2,) * 4, mode="reflect")


@pytest.mark.parametrize("channels", [1, 3])
def test_multiscale_similarity(compare, channels):
    shape = (channels, 64, 64)
    model = aezoo.create_model("msssim_vae", shape, window=WINDOW, hidden_dims=(8,), likelihood="gaussian").double()
    x, draw = torch.rand(2, channels, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3), torch.randn(2, 16)
    with torch.no_grad():  # so that reconstructions resemble the images
        last = [p for p in model.decoder.parameters() if p.ndim == 1][-1]
        last.copy_(x.mean(0).flatten())
    with noise([draw]):
        found = model.loss(x)
    mu, log_var = model.encoder(x).chunk(2, 1)
    x_hat = model.decoder(mu + (0.5 * log_var).exp() * draw)
    with_reference = compare(
        "msssim_vae", "pytorch-msssim", f"ms_ssim, images of {channels} channel{'s' * (channels > 1)}"
    )
    win = window(WINDOW, channels)
    similarity = model.ms_ssim(x_hat, x)
    border = (
        "theirs has windows inside the image only; here, at the coarsest scale, they also lie on its reflected border, "
        "of which the paper says nothing"
    )
    colour = (
        "; it also takes powers and product for each channel, where here a scale's similarity is that of all channels"
    )
    theirs = pytorch_msssim.ms_ssim(x_hat, x, **RANGE, **win)
    with_reference.deviates("MS-SSIM", similarity, theirs, border + colour * (channels > 1), follows="both")
    # computed from their parts at each scale
    product, a, b = torch.ones(2), x_hat, x
    for m, exponent in enumerate(EXPONENTS):
        coarsest = m == len(EXPONENTS) - 1
        pair = (reflected(a, WINDOW), reflected(b, WINDOW)) if coarsest else (a, b)
        ssim, contrast = _ssim(*pair, 1.0, win["win"])
        product = product * (ssim if coarsest else contrast).mean(1) ** (exponent / sum(EXPONENTS))
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    with_reference.equal("MS-SSIM from their parts of each scale, on a reflection at the coarsest", similarity, product)
    nll = model.weight * (1 - product).mean()
    with_reference.equal("nll", found["nll"], nll)
    params = [(p, p) for p in (*model.encoder.parameters(), *model.decoder.parameters())]
    with_reference.equal_gradients(found["nll"], nll, params, "gradient of nll")


def test_similarity_of_repaired_images(compare):
    model = aezoo.create_model("draem", (3, 24, 20), hidden_dims=(8, 8)).double()
    x = torch.rand(2, 3, 24, 20)
    model.simulate_defects = lambda x: 0.9 * x
    found = model.loss(x)
    x_hat = model.decoder(model.encoder(0.9 * x))
    theirs = pytorch_msssim.ssim(reflected(x, 11), reflected(x_hat, 11), **RANGE, **window(11, 3))
    structure = math.prod(model.input_shape) * (1 - theirs).mean()
    with_reference = compare("draem", "pytorch-msssim", "ssim, images with reflected borders")
    with_reference.equal("structure", found["structure"], structure)
    params = [(p, p) for p in (*model.encoder.parameters(), *model.decoder.parameters())]
    with_reference.equal_gradients(found["structure"], structure, params, "gradient of structure")
