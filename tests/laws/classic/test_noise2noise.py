"""Laws of Noise2Noise (Lehtinen et al. 2018).

The parity with deepinv is in tests/parity. The model was also compared with the authors' code, run by TensorFlow, in
float64 on equal outputs of the network, batch and noise. Differences are relative to the largest value.

    https://github.com/NVlabs/noise2noise, commit 7355519e7bfc49e0606cca8867748e736431244b
        train.py, train with noise2noise    loss 2.7e-16, gradient by the network's output 1.4e-16
        train.py, AugmentPoisson, chi = 30  rate of the counts 0, noisy sample 0

Their loss is a mean over the values of a sample, ours a sum; their data lie in [-0.5, 0.5]. Differs: they draw the
strength of the noise again for each sample, sigma in [0, 50] / 255 and chi in [0.001, 50], as in the paper; here it is
an argument. Their network is a U-Net, ours that of dncnn.
"""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from denoising_helpers import (
    RecordingNoise,
)
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from noise_to_noise_laws import (  # noqa: F401
    LOG_PI,
    SAMPLES,
    best_linear_law,
    fitted,
    linear,
    positive,
    small,
    test_invalid_values_are_refused,
    test_output_has_input_size_for_any_image_size,
)
from scipy import stats
from sklearn.linear_model import LinearRegression
from torch import Tensor
from torch.utils.data import DataLoader

import aezoo
from aezoo.models.classic.noise2noise import Noise2Noise, PoissonNoise

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

# ---- the linear case: on a grid of one pixel a convolution is a matrix between channels ------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gaussian:0.4", "poisson:4"])
def test_noisy_targets_have_the_minimiser_of_clean_ones(kind: str) -> None:
    model, x = linear(Noise2Noise, corruption=kind), positive(SAMPLES)
    best_linear_law(model, kind, x)
    matrix, offset = fitted(model, x)
    torch.manual_seed(5)
    y1, y2 = (model.corruption(x)[..., 0] for _ in range(2))
    for target, tolerance in ((y2, 1e-4), (x[..., 0], 0.03)):  # the targets of this draw, and clean targets
        found = LinearRegression().fit(y1.numpy(), target.numpy())
        torch.testing.assert_close(matrix, torch.from_numpy(found.coef_.T.copy()), rtol=0, atol=tolerance)
        torch.testing.assert_close(offset, torch.from_numpy(found.intercept_), rtol=0, atol=tolerance)


# ---- noise2noise: Lehtinen et al. 2018 -------------------------------------------------------------------------------


class SameNoise(Noise2Noise):
    """Takes the same noisy copy for input and target."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        y1 = self.corruption(x)
        return {"loss": self.nll(self.decoder(self.encoder(y1)), y1).mean()}


class Clipped(Noise2Noise):
    """Clips the target to [0, 1], as images are stored: its mean is not the clean sample."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        y1, y2 = self.corruption(x), self.corruption(x).clamp(0, 1)
        return {"loss": self.nll(self.decoder(self.encoder(y1)), y2).mean()}


@pytest.mark.slow
@pytest.mark.parametrize("make", [SameNoise, Clipped])
def test_shared_noise_and_clipped_targets_are_detected(make: Any) -> None:
    with pytest.raises(AssertionError):
        best_linear_law(linear(make, corruption="gaussian:0.4"), "gaussian:0.4", positive(SAMPLES))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["gaussian:0.4", "poisson:4"])
def test_one_noisy_copy_is_predicted_from_another(kind: str, training: bool, shifted: Any) -> None:
    """||f(y1) - y2||^2 summed over values; with x as the target the minimiser would be the same."""
    model, x = shifted(small(Noise2Noise, corruption=kind)).double().train(training), torch.rand(4, 2, 6, 7).double()
    torch.manual_seed(3)
    y1, y2 = model.corruption(x), model.corruption(x)
    torch.manual_seed(3)
    loss = model.loss(x)["loss"]
    expected = (model(y1) - y2).square().flatten(1).sum(1).mean() + 2 * 6 * 7 / 2 * LOG_PI
    torch.testing.assert_close(loss, expected)
    own = [*model.parameters()]
    for a, b in zip(torch.autograd.grad(loss, own), torch.autograd.grad(expected, own), strict=True):
        torch.testing.assert_close(a, b)
    assert (y1 - y2).abs().max() > 0.2


@pytest.mark.parametrize("kind", ["gaussian:0.4", "poisson:4"])
def test_noisy_target_adds_its_variance_to_loss(kind: str, shifted: Any) -> None:
    """E ||f(y1) - y2||^2 = ||f(y1) - x||^2 + Var(y2 | x), for any f; here for one y1."""
    model = shifted(small(Noise2Noise, (3, 1), corruption=kind)).double()
    x = torch.tensor([0.2, 0.5, 1.1], dtype=torch.float64)[None, :, None]
    y1, n = model.corruption(x), 200_000
    draws = model.corruption(x.expand(n, -1, -1))
    f = model(y1).detach()
    variance = 3 * 0.4**2 if kind.startswith("gaussian") else float(x.sum()) / 4
    losses = model.nll(f.expand(n, -1, -1), draws) - 1.5 * LOG_PI
    expected = float((f - x).square().sum()) + variance
    assert float(losses.mean()) == pytest.approx(expected, abs=5 * float(losses.std()) / math.sqrt(n))


def test_poisson_noise_has_the_probabilities_of_counts() -> None:
    n, noise = 200_000, PoissonNoise(5.0)
    for value in (0.0, 0.3, 2.0):
        counts = 5 * noise(torch.full((1, n), value, dtype=torch.float64))
        torch.testing.assert_close(counts, counts.round())
        found = np.bincount(counts.round().long().flatten().numpy(), minlength=40)[:40] / n
        assert np.abs(found - stats.poisson(5 * value).pmf(np.arange(40))).max() < 0.005
    x = torch.rand(3, 8).bfloat16()
    assert noise(x).dtype == torch.bfloat16
    a, b = (noise(x, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["gaussian:0.3", "poisson:20"])
def test_noisy_copies_are_independent_fixed_in_eval(kind: str, quiet: Any) -> None:
    x = 0.2 + 0.6 * torch.rand(12, 1, 8, 8)
    loader = DataLoader(x, batch_size=6)
    model = small(Noise2Noise, (1, 8, 8), corruption=kind)
    model.corruption = RecordingNoise(model)
    seen = model.corruption.seen
    trainer = quiet(max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(model, loader, loader)
    # two draws for a training batch, three in evaluation, where the third is for the reconstruction
    assert [len(seen[mode]) for mode in (True, False)] == [8, 12]
    assert all(torch.equal(a, b) for a, b in zip(seen[False][:6], seen[False][6:], strict=True))
    assert all(not torch.equal(a, b) for a, b in pairwise(seen[True]))
    one, two = (torch.cat(seen[True][i::2]).flatten() for i in (0, 1))
    assert torch.corrcoef(torch.stack([one, two]))[0, 1].abs() < 5 / math.sqrt(len(one))
    assert one.abs().max() > 0


def test_poisson_noise_needs_data_of_at_least_0() -> None:
    model = small(Noise2Noise, (1, 4, 4), corruption="poisson:10")
    x = torch.rand(3, 1, 4, 4)
    model.train().check_batch(x)
    model.eval().check_batch(x - 0.5)  # unseen data may lie a little outside
    with pytest.raises(aezoo.AezooError, match="at least 0"):
        model.train().check_batch(x - 0.5)
    small(Noise2Noise, (1, 4, 4)).train().check_batch(x - 0.5)
