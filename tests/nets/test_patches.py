"""Tests of the patches and masks of aezoo/nets/vit.py."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from aezoo.errors import AezooError
from aezoo.nets import vit

SHAPES = [(2, 11), (1, 8, 8), (3, 5, 7), (2, 3, 4, 5)]


SHAPE = (2, 7, 6)  # 4 x 3 patches of 2 x 2, padding is half of the last row


def data(n: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


# ---- patches and masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 2, 3, 50])
@pytest.mark.parametrize("shape", SHAPES)
def test_inverse_patchify_restores_sample(shape: tuple[int, ...], size: int) -> None:
    patchify, x = vit.Patchify(shape, size), data(3, shape)
    patches_BNP = patchify(x)
    assert patches_BNP.shape == (3, patchify.n, patchify.size)
    assert torch.equal(patchify.inverse(patches_BNP), x)
    assert int(patchify.real_NP.sum()) == math.prod(shape)
    assert not patches_BNP[:, patchify.real_NP == 0].any()
    assert patches_BNP.sum().item() == pytest.approx(x.sum().item())
    again = patchify(patchify.inverse(patches_BNP * 3 + 1))  # padding is not part of a sample
    torch.testing.assert_close(again, (patches_BNP * 3 + 1) * patchify.real_NP)


def test_patch_is_image_block_with_all_channels() -> None:
    patchify, x = vit.Patchify((3, 6, 8), 2), data(2, (3, 6, 8))
    for i in range(3):
        for j in range(4):
            block = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            assert torch.equal(patchify(x)[:, 4 * i + j], block.flatten(1))


@pytest.mark.parametrize(
    ("shape", "sides"),
    [((1, 28, 28), (4, 4)), ((3, 224, 224), (16, 16)), ((3, 64, 64), (8, 8)), ((2, 1), (1,)), ((1, 1, 64), (1, 2))],
)
def test_default_patch_size_depends_on_shape(shape: tuple[int, ...], sides: tuple[int, ...]) -> None:
    assert vit.patch_sides(shape) == sides


@pytest.mark.parametrize("n", [2, 3, 16, 49, 100])
@pytest.mark.parametrize("ratio", [0.75, 0.6, 0.5, 0.29])
def test_masked_count_is_floor_of_ratio(n: int, ratio: float) -> None:
    wanted = int(np.floor(np.round(ratio * n, 9)))
    if wanted == 0:
        with pytest.raises(AezooError, match="masks none"):
            vit.count_masked(n, ratio)
        return
    assert vit.count_masked(n, ratio) == wanted
    order_BN = vit.random_order(50, n, torch.device("cpu"))
    assert torch.equal(order_BN.sort(1).values, torch.arange(n).expand(50, -1))
    masked_BN = vit.is_masked(order_BN, wanted)
    assert (masked_BN.sum(1) == wanted).all()
    assert torch.equal(masked_BN.nonzero()[:, 1].view(50, -1), order_BN[:, n - wanted :].sort(1).values)
    hidden_KN = vit.is_masked(vit.fixed_orders(n, wanted), wanted)
    assert (hidden_KN.sum(1) == wanted).all()
    assert hidden_KN.any(0).all() and (~hidden_KN).any(0).all()


def test_masks_are_uniform_and_differ_between_samples() -> None:
    masked_BN = vit.is_masked(vit.random_order(4000, 8, torch.device("cpu")), 6).double()
    assert len(masked_BN.unique(dim=0)) == math.comb(8, 6)
    # five standard deviations
    assert (masked_BN.mean(0) - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 4000)


def test_unshuffle_inverts_shuffle() -> None:
    tokens_BND, order_BN = torch.randn(4, 9, 3), torch.rand(4, 9).argsort(1)
    moved_BND = vit.shuffle(tokens_BND, order_BN)
    assert torch.equal(vit.unshuffle(moved_BND, order_BN), tokens_BND)
    assert torch.equal(moved_BND[2, 5], tokens_BND[2, order_BN[2, 5]])
    assert torch.equal(vit.shuffle(tokens_BND, order_BN[:, :4]), moved_BND[:, :4])
    # shuffling twice is wrong: a permutation is in general not its own inverse
    assert not torch.equal(vit.shuffle(moved_BND, order_BN), tokens_BND)


def test_average_masked_uses_only_hidden_patches() -> None:
    orders_KN = vit.fixed_orders(10, 7)
    hidden_KN = vit.is_masked(orders_KN, 7)
    values_BKNP = torch.randn(3 * len(orders_KN), 10, 2)
    found = vit.average_masked(values_BKNP, orders_KN, 7)
    for b in range(3):
        for i in range(10):
            rows = [b * len(orders_KN) + k for k in range(len(orders_KN)) if hidden_KN[k, i]]
            torch.testing.assert_close(found[b, i], values_BKNP[rows, i].mean(0))
