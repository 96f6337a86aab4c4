"""Laws of the U-Net autoencoder (Ronneberger et al. 2015)."""

import math
from typing import Any

import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from torch import Tensor

from aezoo.models.classic.unet_ae import UNetAE

# ---- unet: Ronneberger et al. 2015, without connections past the code ------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_output_has_input_shape_for_sizes_20_to_97(channels: int) -> None:
    for n in range(20, 98):
        shape, latent_map = (channels, n, 117 - n), n % 4 < 2
        with torch.device("meta"):
            model = UNetAE(shape, latent_map=latent_map, latent_dim=3, hidden_dims=(2, 4, 4)).eval()
            x = torch.empty(2, *shape)
            z = model.encoder(x)
            assert z.shape == (2, *model.code_shape) and model.decoder(z).shape == x.shape
        grid = tuple(math.ceil(side / 8) for side in shape[1:])
        assert model.code_shape == ((3, *grid) if latent_map else (3,))


def bottleneck_law(reconstruct: Any, encode: Any, x: Tensor) -> None:
    """The Jacobian of the reconstruction by the sample has the rank D of the code."""
    jacobian = torch.autograd.functional.jacobian(lambda v: reconstruct(v[None]).flatten(), x[0]).flatten(1)
    singular = torch.linalg.svdvals(jacobian)
    d = encode(x[:1]).numel()
    assert singular[d - 1] > 1e-8 * singular[0]
    assert singular[d] < 1e-10 * singular[0]


def skipping(model: Any) -> Any:
    """The U-Net as published: feature maps of the encoder go to the decoder in addition to the code."""

    def reconstruct(x: Tensor) -> Tensor:
        first = model.encoder.stages[0](x)
        return model.decoder(model.encode(x)) + first.mean(1, keepdim=True)

    return reconstruct


@pytest.mark.parametrize("shape", [(1, 6, 5), (2, 9)])
def test_output_depends_on_input_through_code_only(shape: tuple[int, ...], shifted: Any) -> None:
    model = UNetAE(shape, latent_dim=3, hidden_dims=(4, 4), activation="tanh", likelihood="gaussian").double()
    model, x = shifted(model).eval(), torch.rand(1, *shape, dtype=torch.float64)
    bottleneck_law(model, model.encode, x)
    with pytest.raises(AssertionError):
        bottleneck_law(skipping(model), model.encode, x)


def test_each_stage_is_connected_to_code_and_output(shifted: Any) -> None:
    model = UNetAE((1, 8, 8), latent_dim=3, hidden_dims=(4, 4, 4), likelihood="gaussian").double()
    model, x = shifted(model).eval(), torch.rand(2, 1, 8, 8, dtype=torch.float64)

    def zero_output(stage: Any) -> Any:
        return stage.register_forward_hook(lambda _, __, output: torch.zeros_like(output))

    z = model.encode(x).detach()
    for i in range(3):
        hooks = [zero_output(stage) for j, stage in enumerate(model.encoder.stages) if j > i]
        codes = model.encode(x)
        assert (codes[0] - codes[1]).abs().max() > 1e-6, "early stage not connected to the code"
        hooks += [zero_output(stage) for j, stage in enumerate(model.decoder.stages) if j < i]
        outputs = model.decode(z)
        assert (outputs[0] - outputs[1]).abs().max() > 1e-6, "code not connected to a late stage"
        for hook in hooks:
            hook.remove()
