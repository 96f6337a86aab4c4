"""Laws of the models with a loss on the geometry of codes: topological, triplet, isometric AE, triplet VAE."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from two_ranks import on_two_ranks

import aezoo
from aezoo.bases.triplet import MINING

SHAPE, CODE = (2, 3, 3), 4


WEIGHT = {"topological_ae": "topology", "triplet_ae": "triplet_weight", "isometric_ae": "isometry"}


def small(name: str, shifted: Any, **settings: Any) -> Any:
    return shifted(aezoo.create_model(name, SHAPE, **{"latent_dim": CODE, "hidden_dims": (16,), **settings})).double()


def images(n: int = 6, seed: int = 7) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels(*values: int) -> Tensor:
    return torch.tensor(values)


LABELS = labels(0, 1, 0, 0, 1, -1)


def plain(model: Any) -> Any:
    """The autoencoder with the same weights and only the likelihood as loss."""
    other = aezoo.create_model("denoising_ae", SHAPE, corruption="none", latent_dim=CODE, hidden_dims=(16,)).double()
    other.load_state_dict({key: value for key, value in model.state_dict().items() if key != "log_unit"})
    return other


def network_gradients(model: Any, loss: Tensor) -> list[Tensor]:
    return [*torch.autograd.grad(loss, [*model.encoder.parameters(), *model.decoder.parameters()])]


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    return [*torch.autograd.grad(loss, [*model.parameters()])]


def same(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", WEIGHT)
def test_zero_weight_equals_plain_autoencoder(name: str, training: bool, shifted: Any) -> None:
    model, x = small(name, shifted, **{WEIGHT[name]: 0.0}).train(training), images()
    other = plain(model).train(training)
    mine, theirs = model.loss(x, LABELS), other.loss(x)
    torch.testing.assert_close(mine["loss"], theirs["loss"], rtol=1e-12, atol=1e-12)
    assert same(network_gradients(model, mine["loss"]), network_gradients(other, theirs["loss"]))
    with_weight = small(name, shifted, **{WEIGHT[name]: 3.0})
    with_weight.load_state_dict(model.state_dict())
    assert not same(
        network_gradients(with_weight, with_weight.loss(x, LABELS)["loss"]),
        network_gradients(other, other.loss(x)["loss"]),
    )


@pytest.mark.parametrize("name", WEIGHT)
def test_outputs_equal_plain_autoencoder(name: str, shifted: Any) -> None:
    model, x = small(name, shifted).eval(), images()
    other = plain(model).eval()
    for mine, theirs in ((model.encode(x), other.encode(x)), (model(x), other(x)), (model.score(x), other.score(x))):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("name", "mining"), [("topological_ae", ""), *(("triplet_ae", mining) for mining in MINING)])
def test_two_ranks_equal_one_process(name: str, mining: str, shifted: Any) -> None:
    settings = {"mining": mining} if mining else {}
    model, x = small(name, shifted, **{WEIGHT[name]: 3.0}, **settings).train(), images(8)
    y = labels(0, 1, 0, 2, 1, 0, -1, 2)
    one = model.loss(x, y)
    two = on_two_ranks(model, x, y)
    for term, value in one.items():
        torch.testing.assert_close(two.terms[term], value, rtol=1e-9, atol=1e-12)
    for mine, theirs in zip(two.gradients(), gradients(model, one["loss"]), strict=True):
        # the gradients of the mean loss, summed over both copies
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-11)
    alone = on_two_ranks(model, x, y, exchange=False).terms["loss"]
    assert (alone - one["loss"]).abs() > 1e-4
    if name == "triplet_ae":  # with the wrong rank a sample would be paired with itself
        assert (on_two_ranks(model, x, y, ranked=False).terms["loss"] - one["loss"]).abs() > 1e-4


# ---- triplets: Schroff et al. 2015, Hermans et al. 2017 --------------------------------------------------------------


def triples(y: Any) -> list[tuple[int, int, int]]:
    """All triplets of anchor, positive and negative, by three loops."""
    y, n, found = y.tolist(), range(len(y)), []
    for a in n:
        for p in n:
            for m in n:
                known = -1 not in (y[a], y[p], y[m])
                if known and a != p and y[a] == y[p] and y[a] != y[m]:
                    found.append((a, p, m))
    return found


def semi_hard(z: Tensor, y: Tensor) -> list[tuple[int, int, int]]:
    d, chosen, found = torch.cdist(z, z), [], triples(y)
    for a, p in sorted({(a, p) for a, p, _ in found}):
        negatives = [m for a2, p2, m in found if (a2, p2) == (a, p)]
        beyond = [m for m in negatives if d[a, m] > d[a, p]]
        best = min(beyond, key=lambda m: d[a, m]) if beyond else max(negatives, key=lambda m: d[a, m])
        chosen.append((a, p, best))
    return chosen


def by_torch(z: Tensor, chosen: list[tuple[int, int, int]], margin: float, mining: str) -> Tensor:
    a, p, n = (list(part) for part in zip(*chosen, strict=True))
    each = F.triplet_margin_loss(z[a], z[p], z[n], margin=margin, eps=0, reduction="none")
    return each[each > 0].mean() if mining == "active" else each.mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["triplet_ae", "triplet_vae"])
@pytest.mark.parametrize("mining", MINING)
def test_training_with_labels_separates_the_classes(mining: str, name: str, adam: Any, digits: Tensor) -> None:
    from sklearn.datasets import load_digits

    x, y = digits[:200].float(), torch.from_numpy(load_digits().target[:200])
    found = {}
    for weight in (0.0, 10.0):
        torch.manual_seed(0)
        model = aezoo.create_model(
            name, x.shape[1:], latent_dim=4, hidden_dims=(32,), mining=mining, triplet_weight=weight
        )
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(60):
            rows = torch.randint(200, (50,))
            optimizer.zero_grad()
            model.loss(x[rows], y[rows])["loss"].backward()
            optimizer.step()
        d = torch.cdist(model.encode(x), model.encode(x)).detach() + 1e9 * torch.eye(200)
        found[weight] = float((y[d.argmin(1)] == y).double().mean())
    assert found[10.0] > found[0.0] + 0.02
