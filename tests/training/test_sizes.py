"""A model at other sample sizes: the same weights, other grids, and an error in one line if not possible."""

import copy

import pytest
import torch

import aezoo
from aezoo.errors import AezooError

MAP = {"latent_map": True, "hidden_dims": (4, 8), "latent_dim": 3}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_another_size_equals_plain_convolutions():
    model = aezoo.create_model("conv_ae", (1, 8, 8), **MAP).eval()
    x = torch.rand(2, 1, 24, 40)
    z = model.encoder(x)  # plain convolutions, which accept any size
    assert torch.equal(model.encode(x), z)
    assert torch.equal(model(x), model.likelihood.mean(model.decoder(z)))
    assert torch.equal(model.decode(z), model(x))
    assert torch.equal(model.score(x), model.nll(model.decoder(z), x))


@pytest.mark.parametrize("size", [(23, 41), (1, 1), (9, 2)])
def test_sides_not_divisible_by_strides_are_restored(size):
    model = aezoo.create_model("mean_scale_hyperprior", (3, 8, 8), hidden_dims=(4, 4), latent_dim=2).eval()
    x = torch.rand(1, 3, *size)
    z = model.encode(x)
    assert model(x).shape == x.shape and z.shape[2:] == tuple(-(-n // 4) for n in size)
    assert model.encode_symbols(x).shape == (1, aezoo.at_size(model, size).encode_symbols(x).shape[1])


def test_a_model_of_another_size_shares_weights_and_settings():
    model = aezoo.create_model("gained_hyperprior", (1, 8, 8), hidden_dims=(4,), latent_dim=2).eval()
    model.quality = 1.5
    sized = aezoo.at_size(model, (12, 20))
    own = dict(model.named_parameters())
    assert all(own[name] is weight for name, weight in sized.named_parameters())
    assert sized.quality == 1.5 and not sized.training and sized.input_shape == (1, 12, 20)
    assert aezoo.at_size(model, (8, 8)) is model


def test_random_states_do_not_change():
    model = aezoo.create_model("dncnn", (1, 8, 8), depth=2, width=2).eval()
    before = torch.random.get_rng_state()
    aezoo.at_size(model, (16, 16))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("conv_ae", {"hidden_dims": (2,)}, "its weights belong to this size"),
        ("dense_ae", {"hidden_dims": (2,)}, "its weights belong to this size"),
        pytest.param("diffusers_ae", {}, "use sides that are multiples of 2", marks=pytest.mark.slow),
    ],
)
def test_fixed_size_models_refuse_other_sizes_in_one_line(name, settings, said):
    model = aezoo.create_model(name, (1, 8, 8), **settings).eval()
    with pytest.raises(AezooError, match=said) as refused:
        model(torch.rand(1, 1, 9, 8))
    assert "9x8" in str(refused.value) and "\n" not in str(refused.value)


def test_a_size_that_needs_huge_layers_is_refused_without_memory():
    model = aezoo.create_model("conv_ae", (1, 8, 8), hidden_dims=(2,)).eval()
    with pytest.raises(AezooError, match="its weights belong to this size"):
        aezoo.at_size(model, (2**20, 2**20))


@pytest.mark.parametrize("size", [(8,), (8, 8, 8), (0, 8)])
def test_a_size_of_other_dimensions_is_refused(size):
    model = aezoo.create_model("conv_ae", (1, 8, 8), **MAP).eval()
    with pytest.raises(AezooError, match="needs 2 numbers above 0"):
        aezoo.at_size(model, size)


def test_other_channels_are_refused_as_before():
    model = aezoo.create_model("conv_ae", (1, 8, 8), **MAP).eval()
    with pytest.raises(AezooError, match="forward expects samples of shape Bx1x8x8, got 1x3x16x16"):
        model(torch.rand(1, 3, 16, 16))


def test_models_of_two_sizes_share_trained_weights():
    model = aezoo.create_model("conv_ae", (1, 8, 8), **MAP)
    sized, x = aezoo.at_size(model, (16, 12)), torch.rand(4, 1, 16, 12)
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.SGD(sized.parameters(), 0.1)
    sized.loss(x)["loss"].backward()
    optimiser.step()
    assert all(not torch.equal(value, before[key]) for key, value in model.state_dict().items() if key in before)
