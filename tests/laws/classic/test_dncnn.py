"""Laws of DnCNN, a residual denoising network (Zhang et al. 2016).

The parity with deepinv is in tests/parity. The model was also compared with the authors' code, in float64 on equal
weights, batch and noise. Differences are relative to the largest value, for gradients the largest of all parameters.

    https://github.com/cszn/KAIR, commit fc1732f4a4514e42ce15e5b3a1e18c828af47a1e
        models/network_dncnn.py, DnCNN with act_mode R                x_hat 0
    https://github.com/cszn/DnCNN, commit e93b27812d3ff523a3a79d19e5e50d233d7a8d0a
        TrainingCodes/dncnn_pytorch/data_generator.py                 noise 2.4e-16
        TrainingCodes/dncnn_pytorch/main_train.py, sum_squared_error  loss 5.6e-16, gradients of 12 parameters 5.1e-16
        ... DnCNN, with batch normalisation as mere biases            loss 4.3e-16, gradients of 11 parameters 3.7e-16

Their loss is half the squared error, summed over the batch; ours is a mean over samples. Differs: with the statistics
of a batch, as in the paper, their x_hat is 0.7 to 0.8 off; ours has no batch normalisation, like the networks that the
authors released in KAIR. KAIR's configuration trains with the absolute error; ours and the paper have the squared one.
"""

from typing import Any

import pytest
import torch
from denoising_helpers import (
    noise_law,
)
from gradient_laws import (
    test_gradients_are_derivatives_of_the_terms,  # noqa: F401
    test_gradients_with_other_settings_are_derivatives,  # noqa: F401
)
from noise_to_noise_laws import (  # noqa: F401
    LOG_PI,
    SAMPLES,
    best_linear_law,
    linear,
    positive,
    small,
    test_invalid_values_are_refused,
    test_output_has_input_size_for_any_image_size,
)
from torch import Tensor

import aezoo
from aezoo.models.classic.dncnn import DnCNN
from aezoo.models.classic.noise2noise import Noise2Noise
from aezoo.models.classic.noise2void import Noise2Void

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def network_output(model: Any, y: Tensor) -> Tensor:
    """The output of the network's layers, which a residual model subtracts from y."""
    return model.decoder.last(model.encoder.layers(y))


# ---- dncnn: Zhang et al. 2016 ----------------------------------------------------------------------------------------


def residual_law(model: Any, x: Tensor) -> None:
    """The loss and its gradients are those of ||R(y) - v||^2, summed over values, for the drawn noise v."""
    torch.manual_seed(7)
    v = model.sigma * torch.randn_like(x)
    torch.manual_seed(7)
    terms = model.loss(x)
    R = network_output(model, x + v)
    paper = ((R - v) ** 2).flatten(1).sum(1).mean()
    torch.testing.assert_close(terms["loss"], paper + x[0].numel() / 2 * LOG_PI)
    own = [*model.encoder.parameters(), *model.decoder.parameters()]
    for a, b in zip(torch.autograd.grad(terms["loss"], own), torch.autograd.grad(paper, own), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def with_sigma(make: Any, **settings: Any) -> Any:
    model = small(make, **settings).double()
    model.sigma = settings.get("sigma", 25 / 255)
    return model


def test_residual_form_equals_input_minus_noise(shifted: Any) -> None:
    x = torch.rand(4, 2, 6, 7, dtype=torch.float64)
    residual_law(shifted(with_sigma(DnCNN)), x)
    residual_law(shifted(with_sigma(DnCNN, sigma=0.7)), x)
    model = shifted(with_sigma(DnCNN))
    torch.testing.assert_close(model(x), x - network_output(model, x))
    direct = with_sigma(DnCNN, residual=False)
    direct.load_state_dict(model.state_dict())
    torch.testing.assert_close(direct(x), network_output(model, x))


class AddsPredictedNoise(DnCNN):
    """Adds the predicted noise instead of subtracting it."""

    def decode(self, z: Tensor) -> Tensor:
        return 2 * z[:, : self.decoder.channels] - self.decoder(z)


def test_wrong_residual_sign_is_detected(shifted: Any) -> None:
    x, model = torch.rand(4, 2, 6, 7, dtype=torch.float64), shifted(with_sigma(AddsPredictedNoise))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model(x), x - network_output(model, x))
    with pytest.raises(AssertionError):
        residual_law(shifted(with_sigma(DnCNN, residual=False)), x)


def test_denoiser_takes_any_size_with_local_receptive_field() -> None:
    large, little = small(DnCNN, (1, 30, 25)).eval(), small(DnCNN, (1, 14, 12)).eval()
    little.load_state_dict(large.state_dict())
    x = torch.rand(2, 1, 30, 25)
    # the receptive field of three convolutions reaches three pixels to each side
    inside = large(x)[..., 8:16, 9:15]
    torch.testing.assert_close(little(x[..., 5:19, 6:18])[..., 3:11, 3:9], inside)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(little(x[..., 7:21, 6:18])[..., 1:9, 3:9], inside)


def test_sigma_is_on_the_scale_of_the_data() -> None:
    x = torch.full((1, 1, 500, 500), 0.3)
    for settings, sigma in (({}, 25 / 255), ({"sigma": 0.5}, 0.5)):
        noise = small(DnCNN, (1, 500, 500), **settings).corruption(x) - x
        assert float(noise.std()) == pytest.approx(sigma, rel=0.01)
        assert float(noise.mean()) == pytest.approx(0, abs=0.01 * sigma)


def test_noise_is_fixed_in_evaluation_fresh_in_training(quiet: Any) -> None:
    noise_law(small(DnCNN, (1, 4, 4)), quiet)


# ---- the linear case: on a grid of one pixel a convolution is a matrix between channels ------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("residual", [True, False])
def test_linear_dncnn_matches_wiener_filter(residual: bool) -> None:
    best_linear_law(linear(DnCNN, sigma=0.4, residual=residual), "gaussian:0.4", positive(SAMPLES))


# ---- all three models ------------------------------------------------------------------------------------------------


def test_shapes_without_neighbours_are_refused() -> None:
    for make in (DnCNN, Noise2Noise, Noise2Void):
        with pytest.raises(aezoo.AezooError, match="convolutions take"):
            small(make, (30,))
    with pytest.raises(aezoo.AezooError, match="neighbour"):
        small(Noise2Void, (3, 1, 1))
