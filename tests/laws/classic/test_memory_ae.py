"""Laws of the memory-augmented autoencoder, MemAE (Gong et al. 2019)."""

import math
from typing import Any

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from stacked_helpers import (
    CODE,
    bernoulli_nll,
    images,
    small,
)
from torch import Tensor, nn

from aezoo.models.classic.memory_ae import MemoryAE

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

# ---- memory: Gong et al. 2019 ----------------------------------------------------------------------------------------


def memory(shifted: Any, **settings: Any) -> Any:
    return small("memory_ae", shifted, **{"n_items": 7, **settings})


def address_of(query: Tensor, items: Tensor, shrinkage: float) -> Tensor:
    """The paper's equations 4 to 7, item by item."""
    rows = []
    for z in query.detach():
        w = torch.stack([F.cosine_similarity(z, m, dim=0).exp() for m in items.detach()])
        w = w / w.sum()
        kept = [v if v > shrinkage / len(items) else 0.0 for v in w]
        rows.append([v / sum(kept) for v in kept])
    return torch.tensor([[float(v) for v in row] for row in rows], dtype=query.dtype)


@pytest.mark.parametrize("shrinkage", [0.0, 0.8, 1.0, 1.1])
def test_address_matches_paper(shrinkage: float, shifted: Any) -> None:
    model, x = memory(shifted, shrinkage=shrinkage), images()
    w = model.address(x)
    expected = address_of(model.encoder(x), model.memory_ND, shrinkage)
    torch.testing.assert_close(w, expected, rtol=1e-9, atol=1e-12)
    assert (int((w == 0).sum()) > 0) == (shrinkage > 0)
    # differs from the softmax without the threshold
    if shrinkage > 0:
        assert (w - address_of(model.encoder(x), model.memory_ND, 0)).abs().max() > 1e-3


@pytest.mark.parametrize("shrinkage", [0.0, 1.0, 3.0, 100.0])
@pytest.mark.parametrize("n_items", [1, 2, 50])
def test_address_weights_sum_to_one(n_items: int, shrinkage: float, shifted: Any) -> None:
    model = memory(shifted, n_items=n_items, shrinkage=shrinkage).float()
    w = model.address(images(20).float())
    torch.testing.assert_close(w.sum(1), torch.ones(20))
    assert (w >= 0).all()
    if shrinkage == 100.0:  # no weight exceeds it, so only the nearest item by angle is used
        nearest = F.cosine_similarity(model.encoder(images(20).float())[:, None], model.memory_ND, dim=2).argmax(1)
        assert torch.equal(w, F.one_hot(nearest, n_items).float())


def test_zero_shrinkage_equals_attention(shifted: Any) -> None:
    model, x = memory(shifted, shrinkage=0.0), images()
    query, keys = F.normalize(model.encoder(x)), F.normalize(model.memory_ND)
    attended = F.scaled_dot_product_attention(query[None], keys[None], model.memory_ND[None], scale=1.0)[0]
    torch.testing.assert_close(model.encode(x), attended, rtol=1e-9, atol=1e-12)
    by_product = F.scaled_dot_product_attention(
        model.encoder(x)[None], model.memory_ND[None], model.memory_ND[None], scale=1.0
    )[0]  # other code uses the inner product instead of the cosine
    assert (model.encode(x) - by_product).abs().max() > 1e-2


def test_single_item_memory_gives_constant_code(shifted: Any) -> None:
    model = memory(shifted, n_items=1)
    code = model.encode(images())
    torch.testing.assert_close(code, model.memory_ND.expand(6, CODE), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(model(images())[0], model(images(seed=8))[3], rtol=1e-12, atol=1e-14)


def test_address_entropy_matches_torch_distributions(shifted: Any) -> None:
    w = memory(shifted).address(images())
    assert 0 < (w == 0).sum() < w.numel()
    torch.testing.assert_close(MemoryAE.entropy(w), D.Categorical(probs=w).entropy(), rtol=1e-6, atol=1e-9)
    one_hot = torch.eye(5, dtype=torch.float64, requires_grad=True)
    found = MemoryAE.entropy(one_hot)
    assert torch.equal(found, torch.zeros(5, dtype=torch.float64))
    assert torch.autograd.grad(found.sum(), one_hot)[0].isfinite().all()
    torch.testing.assert_close(MemoryAE.entropy(torch.full((1, 9), 1 / 9)), torch.tensor([math.log(9)]))


def test_loss_matches_paper(shifted: Any) -> None:
    model, x = memory(shifted, entropy_weight=0.7), images()
    w = address_of(model.encoder(x), model.memory_ND, 1.0)
    nll = bernoulli_nll(model.decoder(w @ model.memory_ND), x).mean()
    entropy = D.Categorical(probs=w).entropy().mean()
    terms = model.loss(x)
    torch.testing.assert_close(terms["nll"], nll)
    torch.testing.assert_close(terms["loss"], nll + 0.7 * entropy, rtol=1e-6, atol=1e-9)
    # the decoder's input is the code, not the query
    torch.testing.assert_close(model.score(x).mean(), nll)


def test_unused_memory_items_get_no_gradient(shifted: Any) -> None:
    model, x = memory(shifted, shrinkage=1.2), images(3)
    w = model.address(x)
    model.loss(x)["loss"].backward()
    used = (w > 0).any(0)
    assert 0 < used.sum() < 7
    moved = model.memory_ND.grad.norm(dim=1)
    assert (moved[used] > 0).all()
    # exactly 0 although these items are in the softmax: Adam would turn rounding errors into full steps
    assert not moved[~used].any()


class LossOf(nn.Module):
    """The loss as a module's output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.model.loss(x)["loss"]
        return value


def test_gradient_matches_finite_differences(shifted: Any) -> None:
    model, x = LossOf(memory(shifted, entropy_weight=0.7, activation="tanh")), images(3)

    def loss(items: Tensor) -> Tensor:
        value: Tensor = torch.func.functional_call(model, {"model.memory_ND": items}, (x,))
        return value

    assert torch.autograd.gradcheck(loss, (model.model.memory_ND.detach().clone().requires_grad_(),))
