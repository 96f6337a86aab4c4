"""Corruptions: moments, shares, seeds, shapes and refusals."""

import math

import pytest
import torch

from aezoo.corruptions import CORRUPTIONS, corruption
from aezoo.errors import AezooError

N = 400_000
NAMES = [f"{kind}:0.3" for kind in CORRUPTIONS]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("amount", [0.05, 0.3, 2.0])
def test_gaussian_noise_has_its_moments_unclipped(amount: float) -> None:
    x = torch.full((4, N // 4), 0.9, dtype=torch.float64)
    noise = corruption(f"gaussian:{amount}")(x, seeded(1)) - x
    assert abs(noise.mean()) < 5 * amount / math.sqrt(N)
    assert abs(noise.var() / amount**2 - 1) < 5 * math.sqrt(2 / N)
    assert abs((noise / amount).pow(4).mean() - 3) < 5 * math.sqrt(96 / N)
    rows = torch.corrcoef(noise)
    assert rows.fill_diagonal_(0).abs().max() < 5 / math.sqrt(N / 4)
    assert (x + noise).max() > 1


def test_gaussian_noise_is_scaled_randn_of_the_same_seed() -> None:
    """The noise is that of the seed, the target of denoising score matching (Vincent 2011)."""
    x = torch.rand(3, 2, 9)
    for amount in (0.3, 2.0):
        noise = torch.randn(x.shape, generator=seeded(8))
        torch.testing.assert_close(corruption(f"gaussian:{amount}")(x, seeded(8)), x + amount * noise)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_masking_zeroes_requested_share(share: float) -> None:
    x = torch.rand(4, N // 4) + 0.5
    found = corruption(f"masking:{share}")(x, seeded(2))
    masked = found == 0
    assert abs(masked.double().mean() - share) <= 5 * math.sqrt(share * (1 - share) / N)
    assert torch.equal(found[~masked], x[~masked])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_salt_and_pepper_replaces_requested_share_evenly(share: float) -> None:
    x = torch.full((4, N // 4), 0.5)
    found = corruption(f"salt_and_pepper:{share}")(x, seeded(3))
    half = share / 2
    for value in (0.0, 1.0):
        assert abs((found == value).double().mean() - half) <= 5 * math.sqrt(half * (1 - half) / N)
    assert set(found.unique().tolist()) <= {0.0, 0.5, 1.0}


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_determined_by_the_seed(name: str) -> None:
    c, x = corruption(name), torch.rand(3, 2, 9)
    a, b, other = c(x, seeded(5)), c(x, seeded(5)), c(x, seeded(6))
    assert torch.equal(a, b)
    assert not torch.equal(a, other)
    torch.manual_seed(7)
    first, second = c(x), c(x)
    torch.manual_seed(7)
    c(x, seeded(5))  # a generator does not change the global state
    assert torch.equal(c(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 30), (2, 3, 16), (2, 1, 5, 7), (1, 1, 3, 3, 3)])
def test_shape_dtype_and_device_stay_and_the_input_is_untouched(
    name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = torch.rand(shape).to(dtype)
    before = x.clone()
    found = corruption(name)(x)
    assert (found.shape, found.dtype, found.device) == (x.shape, dtype, x.device)
    assert torch.equal(x, before)
    assert corruption(name)(torch.empty(shape, dtype=dtype, device="meta")).device.type == "meta"


def test_zero_amount_or_none_leaves_input_unchanged() -> None:
    x = torch.rand(5, 8)
    assert corruption("none") is None
    for kind in CORRUPTIONS:
        assert torch.equal(corruption(f"{kind}:0")(x), x)


@pytest.mark.parametrize(
    "name",
    [
        *("", "gauss:0.3", "gaussian", "gaussian:", "gaussian:-0.1", "gaussian:inf", "gaussian:nan", "gaussian:much"),
        *("masking:1.1", "masking", "masking:-0.1", "salt_and_pepper:2", "none:0.3", "dropout:0.5"),
    ],
)
def test_a_bad_name_or_amount_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(AezooError) as error:
        corruption(name)
    assert "\n" not in str(error.value)
    assert repr(name) in str(error.value)
