"""Laws of the masked models: patches, masks, attention, and dependence on visible and masked values."""

import math
from typing import Any

import pytest
import torch
from scipy.stats import laplace, norm
from torch import Tensor

import aezoo
from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError
from aezoo.nets import vit

# cases that are not named like their model, for conftest.py
MODEL_OF = {"mae_norm": "mae", "simmim_mixer": "simmim"}


SHAPE = (2, 7, 6)  # 4 x 3 patches of 2 x 2, of which the last row is half padding


SMALL: dict[str, dict[str, Any]] = {
    "mae": {"width": 12, "depth": 2, "decoder_width": 8, "patch_size": 2},
    "simmim": {"width": 12, "depth": 2, "patch_size": 2},
    "masked_conv_ae": {"hidden_dims": (6,), "latent_dim": 5, "patch_size": 2, "likelihood": "gaussian"},
}


VARIANTS = {"mae_norm": ("mae", {"norm_pix": True}), "simmim_mixer": ("simmim", {"net": "mixer"})}


MODELS = [*SMALL, *VARIANTS]


def build(name: str, shifted: Any, shape: tuple[int, ...] = SHAPE, **extra: Any) -> Any:
    torch.manual_seed(0)
    name, own = VARIANTS.get(name, (name, {}))
    return shifted(aezoo.create_model(name, input_shape=shape, **SMALL[name] | own | extra).double())


def patchify_of(model: Any) -> vit.Patchify:
    found: vit.Patchify = next(part for part in model.modules() if isinstance(part, vit.Patchify))
    return found


def data(n: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


def masks(model: Any, n: int) -> tuple[Tensor, Tensor]:
    """The order of patches and the mask of values drawn with seed 7, (n, N) and (n, *shape)."""
    torch.manual_seed(7)
    patchify = patchify_of(model)
    order_BN = torch.rand(n, patchify.n).argsort(1)
    masked = torch.zeros(n, patchify.n, patchify.size).bool()
    for b in range(n):
        masked[b, order_BN[b, patchify.n - model.masked :]] = True
    return order_BN, patchify.inverse(masked)


def loss(model: Any, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(7)
    found: dict[str, Tensor] = model.loss(x)
    return found


# ---- the losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_visible_targets_do_not_enter_the_loss(name: str, shifted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the gradient of the nll with respect to the target, with a fixed input."""
    model, x = build(name, shifted), data(5)
    _, masked = masks(model, 5)
    before = loss(model, x)["nll"]
    nll, targets = Autoencoder.nll, []

    def tracked(self: Any, params: Tensor, target: Tensor) -> Tensor:
        targets.append(target.detach().clone().requires_grad_())
        return nll(self, params, targets[-1])

    monkeypatch.setattr(Autoencoder, "nll", tracked)
    (gradient,) = torch.autograd.grad(loss(model, x)["nll"], targets[0])
    patchify = patchify_of(model)
    if name == "masked_conv_ae":
        moved = gradient.view_as(x) != 0
    else:
        grid_BNP = gradient.view(5, patchify.n, patchify.size)
        assert not grid_BNP[:, patchify.real_NP == 0].any()
        moved = patchify.inverse(grid_BNP) != 0
    assert torch.equal(moved, masked)  # and all masked values do
    assert before == loss(model, x)["nll"]


@pytest.mark.parametrize("name", ["mae", "simmim", "simmim_mixer", "masked_conv_ae"])
def test_predictions_do_not_depend_on_masked_values(name: str, shifted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The derivative of predictions with respect to masked values is 0, and with respect to visible ones is not."""
    model, x = build(name, shifted), data(3).requires_grad_()
    _, masked = masks(model, 3)
    seen: list[Tensor] = []
    nll = Autoencoder.nll

    def tracked(self: Any, params: Tensor, target: Tensor) -> Tensor:
        seen.append(params)
        return nll(self, params, target)

    monkeypatch.setattr(Autoencoder, "nll", tracked)
    loss(model, x)
    (gradient,) = torch.autograd.grad((seen[0] * torch.randn_like(seen[0])).sum(), x)
    assert not gradient[masked].any()
    assert (gradient[~masked] != 0).double().mean() > 0.9


@pytest.mark.parametrize("name", [*SMALL, "simmim_mixer"])
def test_loss_is_rescaled_masked_likelihood(name: str, shifted: Any) -> None:
    """N/|M| times the sum over masked values of scipy's negative log-density, in training and evaluation."""
    model, x = build(name, shifted), data(5)
    order_BN, masked = masks(model, 5)
    patchify = patchify_of(model)
    n, kept = patchify.n, patchify.n - model.masked
    with torch.no_grad():
        if name == "mae":
            embed, blocks, _ = model.encoder.children()
            visible_BVD = blocks(vit.shuffle(embed(x), order_BN[:, :kept]))
            x_hat = patchify.inverse(model.decoder.out(model.decoder.hidden(visible_BVD, order_BN)))
        elif name.startswith("simmim"):
            x_hat = patchify.inverse(model.head(model.tokens(x, vit.is_masked(order_BN, model.masked))))
        else:
            x_hat = model(torch.where(masked, model.token, x))
        density = laplace(scale=1.0) if name.startswith("simmim") else norm(scale=math.sqrt(0.5))
        nats = -density.logpdf((x - x_hat).numpy())
        wanted = (nats * masked.numpy()).sum() / 5 * n / model.masked
        for training in (True, False):
            assert loss(model.train(training), x)["nll"].item() == pytest.approx(wanted, rel=1e-6)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "given", "words"),
    [
        ("mae", (30,), {}, "denoising_ae, or give it as a sequence, \\(1, 30\\)"),
        ("simmim", (1, 8, 8), {"patch_size": 8}, "masks none of 1 patches"),
        ("mae", (1, 8, 8), {"mask_ratio": 1.0}, "between 0 and 1"),
        ("masked_conv_ae", (1, 8, 8), {"mask_ratio": 0.01}, "smaller patch_size or a larger ratio"),
        ("mae", (1, 8, 8), {"norm_pix": True, "likelihood": "bernoulli"}, "norm_pix"),
        ("mae", (1, 8, 8), {"decoder_depth": 0}, "at least 1"),
        ("simmim", (1, 8, 8), {"depth": 0}, "at least 1"),
        ("simmim", (1, 8, 8), {"net": "conv"}, "net must be vit or mixer"),
        ("masked_conv_ae", (1, 8, 8), {"patch_size": -1}, "patch_size"),
    ],
)
def test_invalid_values_are_refused_with_a_cure(
    name: str, shape: tuple[int, ...], given: dict[str, Any], words: str
) -> None:
    with pytest.raises(AezooError, match=words):
        aezoo.create_model(name, shape, **given)
