"""Laws of the topological autoencoder (Moor et al. 2020)."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from code_geometry_laws import (  # noqa: F401
    CODE,
    SHAPE,
    images,
    small,
    test_outputs_equal_plain_autoencoder,
    test_two_ranks_equal_one_process,
    test_zero_weight_equals_plain_autoencoder,
)
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

import aezoo
from aezoo.models.classic.topological_ae import TopologicalAE, distances, pairing


def points(n: int, dim: int) -> Tensor:
    return torch.randn(n, dim, dtype=torch.float64) * torch.arange(1, dim + 1)


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


def test_normalised_distances_match_scipy() -> None:
    for n in (2, 9, 40):  # above 25 points torch.cdist would use a matrix product
        x = points(n, 5)
        expected = squareform(pdist(x.numpy()))
        torch.testing.assert_close(distances(x), torch.from_numpy(expected / expected.max()), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(distances(x, torch.tensor(3.0)), torch.from_numpy(expected / 3), rtol=1e-12, atol=0)
    single = distances(points(40, 5).float().repeat(2, 1) + 100)
    assert (single.diagonal(40) == 0).all()


@pytest.mark.parametrize("n", [1, 2, 3, 20, 64])
def test_pairing_matches_kruskal_tree_at_any_scale(n: int) -> None:
    for scale in (1.0, 1e-25, 1e25):
        a = scale * distances(points(n, 5))
        found = edges_of(a)
        assert found == sorted(kruskal(a.numpy()))
        assert len(found) == n - 1


def test_the_pairing_is_the_persistence_of_dimension_zero() -> None:
    import ripser

    x = points(50, 5)
    deaths = np.sort(ripser.ripser(x.numpy(), maxdim=0)["dgms"][0][:, 1])
    assert np.isinf(deaths[-1])
    a = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    lengths = a[tuple(pairing(a / a.max()).T)].sort().values
    np.testing.assert_allclose(lengths.numpy(), deaths[:-1], rtol=1e-6)


@pytest.mark.parametrize("copies", [2, 3])
def test_equal_samples_keep_zero_length_edges(copies: int) -> None:
    """Their distance is 0, which SciPy treats as a missing edge."""
    from scipy.sparse.csgraph import minimum_spanning_tree

    x = points(5, 3).repeat(copies, 1)
    a = distances(x)
    found = pairing(a)
    assert len(found) == 5 * copies - 1
    assert int((a[tuple(found.T)] == 0).sum()) == 5 * (copies - 1)
    without = minimum_spanning_tree(a.numpy()).data  # SciPy takes longer edges instead
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


def test_terms_match_paper(shifted: Any) -> None:
    model, x = small("topological_ae", shifted, topology=3.0), images(12)
    terms = {name: value.detach() for name, value in model.loss(x).items()}
    x_to_z, z_to_x = by_hand(x, model.encoder(x), math.exp(model.log_unit.item()))
    assert float(terms["x_to_z"]) == pytest.approx(x_to_z, rel=1e-9)
    assert float(terms["z_to_x"]) == pytest.approx(z_to_x, rel=1e-9)
    assert abs(x_to_z - z_to_x) > 1e-4
    torch.testing.assert_close(terms["loss"], terms["nll"] + 3 * (terms["x_to_z"] + terms["z_to_x"]))


def test_isometric_copy_has_zero_loss_at_any_scale() -> None:
    x = points(20, 3)
    turned = torch.linalg.qr(torch.randn(7, 3, dtype=torch.float64)).Q
    for scale in (1.0, 1e-3, 50.0):
        unit = scale * largest(x)
        for term in TopologicalAE.signature_loss(x, scale * x @ turned.T + 5, unit):
            assert float(term) == pytest.approx(0, abs=1e-24)
        assert all(float(term) > 1e-5 for term in TopologicalAE.signature_loss(x, scale * x @ turned.T, 1.1 * unit))
    stretched = x * torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64)
    assert all(float(term) > 1e-5 for term in TopologicalAE.signature_loss(x, stretched, largest(stretched)))


def test_topological_terms_are_scale_and_order_invariant() -> None:
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
        torch.testing.assert_close(mine, expected)  # exchanging x and z exchanges the two terms


def test_gradient_flows_through_distances_and_unit() -> None:
    """The unit is a separate variable, not the largest distance between codes."""
    x, z, unit = points(10, 5), points(10, 2).requires_grad_(), torch.tensor(4.0, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: TopologicalAE.signature_loss(x, *given), (z, unit))
    for term in TopologicalAE.signature_loss(x, z, unit):
        to_z, to_unit = torch.autograd.grad(term, (z, unit), retain_graph=True)
        assert to_z.norm() > 1e-4 and to_unit.abs() > 1e-4
        # scaling codes and unit together does not change the terms
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


@pytest.mark.slow
def test_topological_term_preserves_ring_structure(adam: Callable[..., float]) -> None:
    """The codes of a ring in 10 dimensions have the ring's spanning tree if trained with the term."""
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
