"""Tests of aezoo/nets/blocks/dictionary.py."""

from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from aezoo.nets.blocks.dictionary import CROSSOVER, Dictionary, geometric_median, scatter_code

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def distances(x: Tensor, point: Any) -> tuple[float, Any]:
    """The sum of distances to a point, and its gradient."""
    off = point - x.numpy()
    lengths = np.linalg.norm(off, axis=1, keepdims=True)
    return float(lengths.sum()), (off / lengths).sum(0)


def nearest_to_all(x: Tensor) -> Any:
    return scipy.optimize.minimize(
        lambda m: distances(x, m), np.median(x.numpy(), 0), jac=True, method="BFGS", options={"gtol": 1e-9}
    )


# ---- the dictionary --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["normal", "outliers", "off centre"])
def test_geometric_median_matches_numerical_optimiser(case: str) -> None:
    x = torch.randn(40, 5, dtype=torch.float64)
    if case == "outliers":
        x[:12] += 1000
    if case == "off centre":
        x = x.exp() * 3 - 7
    found = geometric_median(x).numpy()
    best = nearest_to_all(x)
    np.testing.assert_allclose(found, best.x, atol=1e-5)
    assert distances(x, found)[0] <= best.fun * (1 + 1e-12)
    assert np.abs(found - x.mean(0).numpy()).max() > 1e-2  # the mean is another point


def test_geometric_median_may_coincide_with_a_sample() -> None:
    """Weiszfeld's plain iteration divides by 0 where a sample is the median, and never leaves one where it is not."""
    x = torch.randn(9, 3, dtype=torch.float64)
    several = torch.cat([x, x[:1].expand(12, 3)])
    torch.testing.assert_close(geometric_median(several), x[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(geometric_median(x[:1].expand(5, 3)), x[0])
    # the mean, where the iteration starts, is a sample
    line = torch.tensor([[-2.0], [-1.5], [-1.0], [0.0], [4.5]], dtype=torch.float64)
    assert line.mean() == 0
    torch.testing.assert_close(geometric_median(line), line[2], rtol=0, atol=1e-6)


def test_bf16_gathered_rows_are_summed_in_float32() -> None:
    values, index = torch.rand(4, 200).bfloat16(), torch.rand(4, 300).topk(200).indices
    dictionary = Dictionary(300, (7,), "gather").bfloat16()
    found = dictionary.sum_of_directions(values, index)
    exact = scatter_code(values, index, 300).double() @ dictionary.W_NX.double()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.bfloat16(), rtol=2**-7, atol=1e-6)
    found.float().sum().backward()
    assert dictionary.W_NX.grad is not None


def test_auto_decode_switches_at_measured_crossover() -> None:
    dictionary = Dictionary(2 * CROSSOVER["cpu"], (7,))
    assert [dictionary.uses_gather(k) for k in (1, 2, 3, 100)] == [True, True, False, False]
    assert not any(Dictionary(2 * CROSSOVER["cpu"], (7,), "dense").uses_gather(k) for k in (1, 2, 3))
    assert not dictionary.to("meta").uses_gather(1)  # a device that nobody has measured
