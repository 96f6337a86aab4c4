"""Laws of the models that shape where codes lie: topological, triplet and isometric autoencoders, triplet VAE."""

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import pdist, squareform
from torch import Tensor
from two_ranks import on_two_ranks

import aezoo
from aezoo.bases.triplet import MINING
from aezoo.models.classic.topological_ae import TopologicalAE, distances, pairing
from aezoo.testing import SharedNoise

SHAPE, CODE = (2, 3, 3), 4
WEIGHT = {"topological_ae": "topology", "triplet_ae": "triplet_weight", "isometric_ae": "isometry"}


def small(name: str, shifted: Any, **settings: Any) -> Any:
    return shifted(aezoo.create_model(name, SHAPE, **{"latent_dim": CODE, "hidden_dims": (16,), **settings})).double()


def images(n: int = 6, seed: int = 7) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def points(n: int, dim: int) -> Tensor:
    return torch.randn(n, dim, dtype=torch.float64) * torch.arange(1, dim + 1)


def labels(*values: int) -> Tensor:
    return torch.tensor(values)


LABELS = labels(0, 1, 0, 0, 1, -1)


def plain(model: Any) -> Any:
    """The autoencoder with the same weights and no term beside the likelihood."""
    other = aezoo.create_model("denoising_ae", SHAPE, corruption="none", latent_dim=CODE, hidden_dims=(16,)).double()
    other.load_state_dict({key: value for key, value in model.state_dict().items() if key != "log_unit"})
    return other


def of_nets(model: Any, loss: Tensor) -> list[Tensor]:
    return [*torch.autograd.grad(loss, [*model.encoder.parameters(), *model.decoder.parameters()])]


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    return [*torch.autograd.grad(loss, [*model.parameters()])]


def same(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", WEIGHT)
def test_at_weight_zero_it_is_the_plain_autoencoder(name: str, training: bool, shifted: Any) -> None:
    model, x = small(name, shifted, **{WEIGHT[name]: 0.0}).train(training), images()
    other = plain(model).train(training)
    mine, theirs = model.loss(x, LABELS), other.loss(x)
    torch.testing.assert_close(mine["loss"], theirs["loss"], rtol=1e-12, atol=1e-12)
    assert same(of_nets(model, mine["loss"]), of_nets(other, theirs["loss"]))
    with_weight = small(name, shifted, **{WEIGHT[name]: 3.0})
    with_weight.load_state_dict(model.state_dict())
    assert not same(of_nets(with_weight, with_weight.loss(x, LABELS)["loss"]), of_nets(other, other.loss(x)["loss"]))


@pytest.mark.parametrize("name", WEIGHT)
def test_codes_reconstructions_and_scores_are_the_plain_autoencoder_s(name: str, shifted: Any) -> None:
    model, x = small(name, shifted).eval(), images()
    other = plain(model).eval()
    for mine, theirs in ((model.encode(x), other.encode(x)), (model(x), other(x)), (model.score(x), other.score(x))):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("name", "mining"), [("topological_ae", ""), *(("triplet_ae", mining) for mining in MINING)])
def test_two_ranks_are_one_process(name: str, mining: str, shifted: Any) -> None:
    settings = {"mining": mining} if mining else {}
    model, x = small(name, shifted, **{WEIGHT[name]: 3.0}, **settings).train(), images(8)
    y = labels(0, 1, 0, 2, 1, 0, -1, 2)
    one = model.loss(x, y)
    two = on_two_ranks(model, x, y)
    for term, value in one.items():
        torch.testing.assert_close(two.terms[term], value, rtol=1e-9, atol=1e-12)
    for mine, theirs in zip(two.gradients(), gradients(model, one["loss"]), strict=True):
        # the loss is the mean over ranks, and each holds the gradient of both
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-11)
    alone = on_two_ranks(model, x, y, exchange=False).terms["loss"]
    assert (alone - one["loss"]).abs() > 1e-4
    if name == "triplet_ae":  # a rank that takes itself for the first pairs a sample with itself
        assert (on_two_ranks(model, x, y, ranked=False).terms["loss"] - one["loss"]).abs() > 1e-4


# ---- topology: Moor et al. 2020 --------------------------------------------------------------------------------------


def kruskal(a: np.ndarray) -> list[tuple[int, int]]:
    """A minimum spanning tree by brute force: the shortest edges that join two components."""
    component = list(range(len(a)))
    edges = []
    for _, i, j in sorted((a[i, j], i, j) for i, j in itertools.combinations(range(len(a)), 2)):
        if component[i] != component[j]:
            edges.append((i, j))
            component = [component[i] if c == component[j] else c for c in component]
    return edges


def edges_of(a: Tensor) -> list[tuple[int, int]]:
    return sorted((min(edge), max(edge)) for edge in pairing(a).tolist())


def largest(points_ND: Tensor) -> Tensor:
    return torch.pdist(points_ND).max()


def test_distances_are_scipy_s_over_the_largest_or_a_unit() -> None:
    for n in (2, 9, 40):  # above 25 points torch's cdist would multiply matrices
        x = points(n, 5)
        expected = squareform(pdist(x.numpy()))
        torch.testing.assert_close(distances(x), torch.from_numpy(expected / expected.max()), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(distances(x, torch.tensor(3.0)), torch.from_numpy(expected / 3), rtol=1e-12, atol=0)
    single = distances(points(40, 5).float().repeat(2, 1) + 100)
    assert (single.diagonal(40) == 0).all()


@pytest.mark.parametrize("n", [1, 2, 3, 20, 64])
def test_the_pairing_is_kruskal_s_tree_at_any_scale(n: int) -> None:
    for scale in (1.0, 1e-25, 1e25):
        a = scale * distances(points(n, 5))
        found = edges_of(a)
        assert found == sorted(kruskal(a.numpy()))
        assert len(found) == n - 1


def test_the_pairing_is_the_persistence_of_dimension_zero() -> None:
    ripser = pytest.importorskip("ripser")
    x = points(50, 5)
    deaths = np.sort(ripser.ripser(x.numpy(), maxdim=0)["dgms"][0][:, 1])
    assert np.isinf(deaths[-1])
    a = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    lengths = a[tuple(pairing(a / a.max()).T)].sort().values
    np.testing.assert_allclose(lengths.numpy(), deaths[:-1], rtol=1e-6)


@pytest.mark.parametrize("copies", [2, 3])
def test_samples_that_are_equal_lose_no_edge(copies: int) -> None:
    """Their distance is 0, which SciPy takes for no edge at all."""
    from scipy.sparse.csgraph import minimum_spanning_tree

    x = points(5, 3).repeat(copies, 1)
    a = distances(x)
    found = pairing(a)
    assert len(found) == 5 * copies - 1
    assert int((a[tuple(found.T)] == 0).sum()) == 5 * (copies - 1)
    without = minimum_spanning_tree(a.numpy()).data  # a rival's slip: other edges stand in
    assert without.min() > 0 and without.sum() > 1.5 * float(a[tuple(found.T)].sum())
    component = list(range(len(x)))
    for i, j in found.tolist():
        assert component[i] != component[j]  # a tree has no cycle
        component = [component[i] if c == component[j] else c for c in component]
    assert len(pairing(torch.zeros(4, 4))) == 3


def by_hand(x: Tensor, z: Tensor, unit: float) -> tuple[float, ...]:
    """Equations 3 and 4 with Kruskal's trees, over N."""
    a_x, a_z = (squareform(pdist(v.detach().flatten(1).numpy())) for v in (x, z))
    a_x, a_z = a_x / a_x.max(), a_z / unit
    return tuple(sum(0.5 * (a_x[e] - a_z[e]) ** 2 for e in kruskal(tree)) / len(x) for tree in (a_x, a_z))


def test_the_terms_are_the_paper_s(shifted: Any) -> None:
    model, x = small("topological_ae", shifted, topology=3.0), images(12)
    terms = {name: value.detach() for name, value in model.loss(x).items()}
    x_to_z, z_to_x = by_hand(x, model.encoder(x), math.exp(model.log_unit.item()))
    assert float(terms["x_to_z"]) == pytest.approx(x_to_z, rel=1e-9)
    assert float(terms["z_to_x"]) == pytest.approx(z_to_x, rel=1e-9)
    assert abs(x_to_z - z_to_x) > 1e-4
    torch.testing.assert_close(terms["loss"], terms["nll"] + 3 * (terms["x_to_z"] + terms["z_to_x"]))


def test_an_isometric_copy_has_no_loss_at_any_scale_in_the_unit_of_that_scale() -> None:
    x = points(20, 3)
    turned = torch.linalg.qr(torch.randn(7, 3, dtype=torch.float64)).Q
    for scale in (1.0, 1e-3, 50.0):
        unit = scale * largest(x)
        for term in TopologicalAE.signature_loss(x, scale * x @ turned.T + 5, unit):
            assert float(term) == pytest.approx(0, abs=1e-24)
        assert all(float(term) > 1e-5 for term in TopologicalAE.signature_loss(x, scale * x @ turned.T, 1.1 * unit))
    stretched = x * torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64)
    assert all(float(term) > 1e-5 for term in TopologicalAE.signature_loss(x, stretched, largest(stretched)))


def test_the_terms_do_not_depend_on_the_scale_of_samples_or_of_codes_and_their_unit_or_on_the_order() -> None:
    x, z = points(20, 5), points(20, 2)
    unit, order = largest(z), torch.randperm(20)
    reference = TopologicalAE.signature_loss(x, z, unit)
    for changed in (
        TopologicalAE.signature_loss(7 * x, z, unit),
        TopologicalAE.signature_loss(x, 0.01 * z + 3, 0.01 * unit),
        TopologicalAE.signature_loss(x[order], z[order], unit),
    ):
        for mine, expected in zip(changed, reference, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-14)
    for mine, expected in zip(TopologicalAE.signature_loss(z, x, largest(x)), reversed(reference), strict=True):
        torch.testing.assert_close(mine, expected)  # the two terms are each other's mirror


def test_the_gradient_passes_through_the_distances_and_the_unit() -> None:
    """Not through the largest distance between codes, as if it were their unit."""
    x, z, unit = points(10, 5), points(10, 2).requires_grad_(), torch.tensor(4.0, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: TopologicalAE.signature_loss(x, *given), (z, unit))
    for term in TopologicalAE.signature_loss(x, z, unit):
        to_z, to_unit = torch.autograd.grad(term, (z, unit), retain_graph=True)
        assert to_z.norm() > 1e-4 and to_unit.abs() > 1e-4
        # in the units' ratio the codes' scale: of degree 0 in both together
        assert ((to_z * z).sum() + to_unit * unit).abs() < 1e-9 < (to_z * z).sum().abs()


def test_the_unit_of_codes_starts_at_1_and_is_learned(shifted: Any, adam: Callable[..., float]) -> None:
    model = aezoo.create_model("topological_ae", SHAPE, latent_dim=CODE, hidden_dims=(16,))
    assert model.log_unit == 0
    z, x = model.encoder(images().float()), images().float()
    terms = zip(model.signature_loss(x.flatten(1), z, torch.ones(())), ("x_to_z", "z_to_x"), strict=True)
    assert all(model.loss(x)[name] == value for value, name in terms)
    adam(model, images(32).float(), 30, 1e-2, 32)
    assert abs(model.log_unit) > 0.05


def test_equal_codes_have_finite_gradients() -> None:
    x, z, unit = points(8, 5), points(4, 2).repeat(2, 1).requires_grad_(), torch.ones(())
    for given in (z, torch.zeros(8, 2, requires_grad=True)):
        terms = TopologicalAE.signature_loss(x.to(given.dtype), given, unit)
        assert torch.autograd.grad(sum(terms), given)[0].isfinite().all()  # type: ignore[arg-type]


def test_the_term_keeps_apart_what_a_plain_autoencoder_may_mix(adam: Callable[..., float]) -> None:
    """Trained with it the codes of a ring in 10 dimensions have the ring's tree; a plain autoencoder's need not."""
    angle = torch.rand(64, dtype=torch.float64).sort().values * 2 * math.pi
    ring = torch.stack([angle.cos(), angle.sin()], 1) @ torch.linalg.qr(torch.randn(10, 2, dtype=torch.float64)).Q.T
    x, found = ring.float(), {}
    for topology in (0.0, 500.0):
        torch.manual_seed(0)
        model = aezoo.create_model(
            "topological_ae", (10,), latent_dim=2, hidden_dims=(32,), likelihood="gaussian", topology=topology
        )
        adam(model, x, 100, 1e-2, 64)
        with torch.no_grad():
            z = model.encoder(x)
            found[topology] = float(sum(TopologicalAE.signature_loss(x, z, largest(z))))
    assert found[500.0] < 0.1 * found[0.0]


# ---- triplets: Schroff et al. 2015, Hermans et al. 2017 --------------------------------------------------------------


def triples(y: Any) -> list[tuple[int, int, int]]:
    """Anchor, positive, negative by three loops."""
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


@pytest.mark.parametrize("margin", [0.2, 1.0])
@pytest.mark.parametrize("mining", MINING)
def test_the_triplet_loss_is_torch_s_over_three_loops(mining: str, margin: float, shifted: Any) -> None:
    model = small("triplet_ae", shifted, mining=mining, margin=margin)
    y = labels(0, 1, 0, 0, 2, 1, -1, 2, -1, 1, 3)
    kinds = set()
    for _ in range(5):
        z = torch.randn(11, CODE, dtype=torch.float64).requires_grad_()
        chosen = semi_hard(z.detach(), y) if mining == "semi_hard" else triples(y)
        d = torch.cdist(z, z)
        kinds |= {bool(d[a, n] > d[a, p]) for a, p, n in chosen}
        mine, expected = model.triplet_loss(z, y), by_torch(z, chosen, margin, mining)
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(*(torch.autograd.grad(v, z)[0] for v in (mine, expected)), rtol=1e-8, atol=1e-11)
        squared = F.triplet_margin_with_distance_loss(
            *(z[list(part)] for part in zip(*chosen, strict=True)),
            distance_function=lambda u, v: (u - v).square().sum(1),
            margin=margin,
        )
        assert (mine - squared).abs() > 1e-3
    assert kinds == {True, False}  # both rules of semi-hard mining were at work


@pytest.mark.parametrize(
    "y", [None, labels(-1, -1, -1, -1, -1, -1), labels(3, 3, 3, 3, 3, 3), labels(0, 1, 2, 3, 4, 5)]
)
@pytest.mark.parametrize("mining", MINING)
def test_without_triplets_it_is_the_plain_autoencoder(mining: str, y: Tensor | None, shifted: Any) -> None:
    model, x = small("triplet_ae", shifted, mining=mining), images()
    other = plain(model)
    terms = model.loss(x, y)
    assert float(terms["triplet"].detach()) == 0
    assert same(gradients(model, terms["loss"]), gradients(other, other.loss(x)["loss"]))


@pytest.mark.parametrize("mining", MINING)
def test_classes_apart_by_more_than_the_margin_cost_nothing(mining: str, shifted: Any) -> None:
    model, y = small("triplet_ae", shifted, mining=mining, margin=1.0), labels(0, 0, 1, 1)
    z = torch.tensor([[0.0], [1.0], [4.0], [5.0]], dtype=torch.float64)
    assert float(model.triplet_loss(z, y)) == 0
    # nearest negative at 3, positive at 1: a margin of 2.5 is missed by 0.5 in the two inner triples of eight
    model.margin = 2.5
    wanted = {"all": 2 * 0.5 / 8, "active": 0.5, "semi_hard": 2 * 0.5 / 4}
    assert float(model.triplet_loss(z, y)) == pytest.approx(wanted[mining])


def test_samples_without_a_label_change_nothing_of_the_term(shifted: Any) -> None:
    for mining in MINING:
        model = small("triplet_ae", shifted, mining=mining)
        z, y = torch.randn(8, CODE, dtype=torch.float64), labels(0, 1, 0, 1, 2, 2, -1, -1)
        torch.testing.assert_close(model.triplet_loss(z, y), model.triplet_loss(z[:6], y[:6]), rtol=1e-12, atol=1e-12)


def test_the_triplet_term_trains_the_encoder_alone(shifted: Any) -> None:
    model, x = small("triplet_ae", shifted), images()
    term = model.loss(x, LABELS)["triplet"]
    of_encoder = torch.autograd.grad(term, [*model.encoder.parameters()], retain_graph=True)
    assert max(float(g.norm()) for g in of_encoder) > 1e-3
    of_decoder = torch.autograd.grad(term, [*model.decoder.parameters()], allow_unused=True)
    assert all(g is None for g in of_decoder)


def test_equal_codes_give_triplets_finite_gradients(shifted: Any) -> None:
    for mining in MINING:
        z = torch.zeros(4, CODE, dtype=torch.float64).requires_grad_()
        loss = small("triplet_ae", shifted, mining=mining).triplet_loss(z, labels(0, 0, 1, 1))
        assert float(loss.detach()) == 1.0  # the margin
        assert torch.autograd.grad(loss, z)[0].isfinite().all()


def losses_of_one_noise(models: list[Any], training: bool) -> list[dict[str, Tensor]]:
    found = []
    for model in models:
        torch.manual_seed(3)
        found.append(model.train(training).loss(images(), LABELS))
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mining", MINING)
def test_at_weight_zero_it_is_the_vae_bit_for_bit(mining: str, training: bool, shifted: Any) -> None:
    vae = small("vae", shifted, beta=2.0)
    without, with_it = (small("triplet_vae", shifted, beta=2.0, mining=mining, triplet_weight=w) for w in (0.0, 3.0))
    for model in (without, with_it):
        model.load_state_dict(vae.state_dict())
        model.capacity = vae.capacity = 1.0
    mine, theirs, other = losses_of_one_noise([without, vae, with_it], training)
    assert mine["triplet"] > 0
    for term in ("loss", "nll", "kl", "elbo"):
        assert torch.equal(mine[term], theirs[term])
    for a, b in zip(gradients(without, mine["loss"]), gradients(vae, theirs["loss"]), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(other["loss"] - theirs["loss"], 3 * mine["triplet"])


@pytest.mark.parametrize("mining", MINING)
def test_the_triplets_of_the_vae_are_triplet_ae_s_of_the_means(mining: str, shifted: Any) -> None:
    """Of the posterior's means, whatever is drawn; variances and the decoder get no gradient."""
    settings = {"mining": mining, "margin": 0.7}
    model, ae = small("triplet_vae", shifted, **settings), small("triplet_ae", shifted, **settings)
    mu, log_var = (torch.randn(6, CODE, dtype=torch.float64).requires_grad_() for _ in range(2))
    model.posterior = lambda x: (mu, log_var)
    term = model.loss(images(), LABELS)["triplet"]
    chosen = semi_hard(mu.detach(), LABELS) if mining == "semi_hard" else triples(LABELS)
    torch.testing.assert_close(term, by_torch(mu, chosen, 0.7, mining), rtol=1e-9, atol=1e-12)
    assert torch.equal(term, ae.triplet_loss(mu, LABELS)) and float(term.detach()) > 0.01
    in_mu, in_log_var, *rest = torch.autograd.grad(term, (mu, log_var, *model.decoder.parameters()), allow_unused=True)
    assert float(in_mu.norm()) > 1e-3 and in_log_var is None and all(g is None for g in rest)


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


# ---- isometry: Gropp et al. 2020, Lee et al. 2022 --------------------------------------------------------------------


def jacobians(f: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Of each sample by autograd, one by one: (B, ...) -> (B, outputs, inputs)."""
    found = [torch.autograd.functional.jacobian(lambda v: f(v[None])[0].flatten(), row) for row in at]
    return torch.stack([j.flatten(1) for j in found])


def directions(n: int = 6) -> Tensor:
    return F.normalize(torch.randn(n, CODE, dtype=torch.float64), dim=1)


def linear(scale: float, shifted: Any, **settings: Any) -> Any:
    """A linear decoder with orthonormal columns times a scale, its pseudo-inverse as the encoder, squared error."""
    model = small("isometric_ae", shifted, hidden_dims=(), likelihood="gaussian", **settings)
    basis = torch.linalg.qr(torch.randn(math.prod(SHAPE), CODE, dtype=torch.float64)).Q
    with torch.no_grad():
        model.decoder[1].weight.copy_(scale * basis)
        model.encoder[1].weight.copy_(basis.T / scale)
    return model


NETS: list[dict[str, Any]] = [
    {"net": "mlp"},
    {"net": "mlp", "activation": "gated"},
    {"net": "conv", "hidden_dims": (4,), "activation": "tanh"},
    {"net": "resnet", "hidden_dims": (4,), "likelihood": "gaussian"},
]


@pytest.mark.parametrize("settings", NETS, ids=lambda settings: "-".join(str(v) for v in settings.values()))
def test_products_with_jacobians_are_autograd_s(settings: dict[str, Any], shifted: Any) -> None:
    model, x, u = small("isometric_ae", shifted, **settings), images(), directions()
    z = model.encoder(x).detach()
    at = jacobians(lambda v: model.decode(v), z)
    push, pull = model.linearised(z)
    w = torch.randn(6, math.prod(SHAPE), dtype=torch.float64)
    torch.testing.assert_close(push(u), torch.einsum("bxd,bd->bx", at, u), rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(pull(w), torch.einsum("bxd,bx->bd", at, w), rtol=1e-8, atol=1e-11)
    length = torch.einsum("bxd,bd->bx", at, u).norm(dim=1)
    torch.testing.assert_close(model.iso(z, u), (length - 1) ** 2, rtol=1e-8, atol=1e-11)
    back = torch.einsum("bdx,bd->bx", jacobians(model.encoder, x), u).norm(dim=1)
    torch.testing.assert_close(model.piso(x, u), (back - 1) ** 2, rtol=1e-8, atol=1e-11)
    # slips: the logits' Jacobian for the reconstruction's, and the other product with the encoder's
    if settings.get("likelihood") != "gaussian":
        assert (push(u) - torch.einsum("bxd,bd->bx", jacobians(model.decoder, z), u)).abs().max() > 1e-3


def test_products_are_those_of_forward_mode(shifted: Any) -> None:
    model, u = small("isometric_ae", shifted), directions()
    z = model.encoder(images()).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch 2.13 scripts its rules
        expected = torch.func.jvp(lambda v: model.decode(v).flatten(1), (z,), (u,))[1]
    torch.testing.assert_close(model.linearised(z)[0](u), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("scale", [1.0, 0.5, 3.0])
def test_a_linear_decoder_costs_the_square_of_its_scale_less_one(scale: float, shifted: Any) -> None:
    """0 for orthonormal columns and their transpose; (c - 1)^2 and (1/c - 1)^2 at a scale c, for any direction."""
    model, x = linear(scale, shifted), images()
    terms = model.loss(x)
    assert float(terms["iso"].detach()) == pytest.approx((scale - 1) ** 2, abs=1e-12)
    assert float(terms["piso"].detach()) == pytest.approx((1 / scale - 1) ** 2, abs=1e-12)
    torch.testing.assert_close(terms["loss"], terms["nll"] + 10 * (terms["iso"] + terms["piso"]))


def test_the_pseudo_inverse_is_what_the_encoder_s_term_asks_for(shifted: Any) -> None:
    """An encoder that inverts the decoder on its image but not at right angles reconstructs as well and costs more."""
    model, x = linear(1.0, shifted), images()
    basis = model.decoder[1].weight.detach()
    away = torch.linalg.qr(basis, mode="complete").Q[:, CODE:]
    with torch.no_grad():
        model.encoder[1].weight.add_(0.5 * torch.randn(CODE, away.shape[1], dtype=torch.float64) @ away.T)
        torch.testing.assert_close(model.encoder[1].weight @ basis, torch.eye(CODE, dtype=torch.float64))
    terms = model.loss(x)
    assert float(terms["iso"].detach()) == pytest.approx(0, abs=1e-12)
    assert float(terms["piso"].detach()) > 1e-2


def test_each_term_trains_its_own_map(shifted: Any) -> None:
    model, x = small("isometric_ae", shifted), images()
    for term, own, other in (("iso", model.decoder, model.encoder), ("piso", model.encoder, model.decoder)):
        value = model.loss(x)[term]
        mine = torch.autograd.grad(value, [*own.parameters()], retain_graph=True, allow_unused=True)
        assert max(float(g.norm()) for g in mine if g is not None) > 1e-4
        for g in torch.autograd.grad(value, [*other.parameters()], allow_unused=True):
            assert g is None or not g.any()


class TermOf(torch.nn.Module):
    """One term at fixed codes and directions as a module's output."""

    def __init__(self, model: Any, call: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self) -> Tensor:
        return self.call(self.model)


def test_the_gradients_are_those_of_finite_differences(shifted: Any) -> None:
    x, u = images(3), directions(3)
    model = small("isometric_ae", shifted, activation="tanh", hidden_dims=(5,))
    z = model.encoder(x).detach()
    calls: list[tuple[str, Callable[[Any], Tensor]]] = [
        ("model.decoder.1.weight", lambda m: m.iso(z, u)),
        ("model.encoder.3.weight", lambda m: m.piso(x, u)),
        ("model.decoder.1.weight", lambda m: m.relaxed(z, u)),
    ]
    for name, call in calls:
        term = TermOf(model, call)
        weight = term.get_parameter(name).detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda w, term=term, name=name: torch.func.functional_call(term, {name: w}, ()), (weight,)
        )


def test_directions_are_uniform_on_the_sphere_and_apart(shifted: Any) -> None:
    model, seen = small("isometric_ae", shifted), list[Tensor]()

    def keep(at: Tensor, u: Tensor) -> Tensor:
        seen.append(u)
        return torch.zeros(len(u))

    model.iso = model.piso = keep
    model.loss(images(4000))
    assert len(seen) == 2
    for u in seen:
        torch.testing.assert_close(u.norm(dim=1), torch.ones(4000, dtype=torch.float64))
        torch.testing.assert_close(u.T @ u / 4000, torch.eye(CODE, dtype=torch.float64) / CODE, rtol=0, atol=0.02)
    assert float((seen[0] * seen[1]).sum(1).mean().abs()) < 0.05


@pytest.mark.parametrize("scale", [1.0, 0.2, 7.0])
def test_the_relaxed_term_is_least_at_any_scale_of_an_isometry(scale: float, shifted: Any) -> None:
    model, x = linear(scale, shifted, distortion="relaxed"), images()
    terms = model.loss(x)
    assert float(terms["iso"].detach()) == pytest.approx(1 / CODE, rel=1e-9)
    assert float(terms["piso"]) == 0
    with torch.no_grad():
        model.decoder[1].weight.mul_(torch.tensor([1.0, 1, 1, 2], dtype=torch.float64))
    assert float(model.loss(images(2000))["iso"].detach()) > 1 / CODE + 0.02


def test_the_relaxed_term_is_the_ratio_of_the_traces(shifted: Any) -> None:
    """Against whole Jacobians, with directions that sum to the identity, as on average they do."""
    model, z = small("isometric_ae", shifted, distortion="relaxed"), 3 * torch.randn(3, CODE, dtype=torch.float64)
    jacobian = jacobians(lambda v: model.decode(v), z)
    metric = jacobian.mT @ jacobian
    traces = [torch.einsum("bii->b", part).mean() for part in (metric @ metric, metric)]
    axes = torch.eye(CODE, dtype=torch.float64)
    found = model.relaxed(z.repeat_interleave(CODE, 0), axes.repeat(3, 1))
    torch.testing.assert_close(found, traces[0] / traces[1] ** 2, rtol=1e-8, atol=1e-11)
    per_sample = (torch.einsum("bii->b", metric @ metric) / torch.einsum("bii->b", metric) ** 2).mean()
    assert (found - per_sample).abs() > 1e-4  # a mean of ratios, which allows each place a scale of its own


def test_the_relaxed_term_is_the_same_on_two_ranks(shifted: Any) -> None:
    model, x = small("isometric_ae", shifted, distortion="relaxed").train(), images(8)
    with SharedNoise(range(8), 8):
        one = model.loss(x)["loss"]
    two = on_two_ranks(model, x)
    torch.testing.assert_close(two.terms["loss"], one, rtol=1e-9, atol=1e-12)
    assert (on_two_ranks(model, x, exchange=False).terms["loss"] - one).abs() > 1e-4
