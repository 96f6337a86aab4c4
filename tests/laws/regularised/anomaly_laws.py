"""Laws of DAGMM and GANomaly."""

import pytest
import torch
from torch import Tensor

import aezoo

SHAPE = (2, 3, 3)


def images(n: int = 6, seed: int = 7) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- the score -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9,), (2, 16), (1, 9, 7), (3, 8, 8), (1, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("name", ["dagmm", "ganomaly"])
def test_every_input_shape_is_scored(name: str, shape: tuple[int, ...]) -> None:
    for net in ("mlp", "conv", "resnet")[: 1 if len(shape) == 1 else 3]:
        model, x = aezoo.create_model(name, shape, net=net, hidden_dims=(4, 4)), torch.rand(5, *shape)
        terms = model.loss(x)
        terms["loss"].backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        score = model.eval().score(x)
        assert score.shape == (5,) and score.isfinite().all()
