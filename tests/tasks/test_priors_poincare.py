"""The prior of codes in a Poincare ball: its coordinates are isometric along rays, and samples stay inside."""

import numpy as np
import pytest

from aezoo.errors import AezooError
from aezoo.tasks.priors_poincare import Poincare


def codes(radius: float, n: int = 500) -> np.ndarray:
    rng = np.random.default_rng(0)
    v = rng.standard_normal((n, 3)) * [1.5, 0.5, 1.0] + [2.0, 0, 0]
    length = np.linalg.norm(v, axis=1, keepdims=True)
    return v / length * np.tanh(length / (2 * radius)) * radius


@pytest.mark.parametrize("radius", [1.0, 0.7**-0.5, 5.0])
def test_normal_coordinates_keep_radial_distance(radius):
    z = codes(radius)
    prior = Poincare(z, 1, 0, radius)
    v = prior.to_flat(z)
    np.testing.assert_allclose(prior.from_flat(v), z, rtol=1e-9, atol=1e-12)
    # distance in the ball of curvature -1/R^2, by its arcosh form
    x = z / radius
    distance = radius * np.arccosh(1 + 2 * (x**2).sum(1) / (1 - (x**2).sum(1)))
    np.testing.assert_allclose(np.linalg.norm(v, axis=1), distance, rtol=1e-6)


def test_prior_draws_match_code_moments_in_normal_coordinates():
    z = codes(1.0, 4000)
    prior = Poincare(z, 1, 0, 1.0)
    drawn = prior.sample(4000, 1)
    assert drawn.dtype == np.float32 and np.linalg.norm(drawn, axis=1).max() < 1
    v = prior.to_flat(drawn)
    np.testing.assert_allclose(v.mean(0), [2.0, 0, 0], atol=0.1)
    np.testing.assert_allclose(v.std(0), [1.5, 0.5, 1.0], rtol=0.06)


def test_codes_on_the_boundary_and_at_the_centre_are_finite():
    z = np.concatenate([codes(1.0, 50), np.zeros((1, 3)), [[1 - 1e-8, 0, 0]]])
    prior = Poincare(z, 2, 0, 1.0)
    assert np.isfinite(prior.to_flat(z)).all()
    far = prior.from_flat(np.array([[1e9, 0, 0], [0, 0, 0.0]]))
    assert np.linalg.norm(far, axis=1).max() < 1 and np.isfinite(far).all()


def test_codes_outside_the_ball_are_refused():
    with pytest.raises(AezooError, match="outside the ball of radius 1"):
        Poincare(np.full((5, 2), 3.0), 1, 0, 1.0)
    with pytest.raises(AezooError, match="codes in a ball"):
        Poincare(codes(1.0), 1, 0, np.inf)
