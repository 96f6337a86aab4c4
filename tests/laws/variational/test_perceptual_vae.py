"""Laws of the deep feature consistent VAE (Hou et al. 2016).

The model was compared with the most used port, on the same features, weights, batch and noise in float64. Differences
are relative to the largest value, for gradients the largest of all parameters, with Gaussian and Bernoulli outputs.

    https://github.com/AntixK/PyTorch-VAE, commit a6896b944c918dd7030e7d795a8c13e5c6345ec7
        models/dfcvae.py, DFCVAE  features 0, distance 2.0e-16, KL 6.0e-16, loss 1.5e-16, gradients of 12 parameters 0

Their beta is weight / 2, their alpha our beta. Differs: the port adds the squared error of the values, a quarter to a
third of its loss here, which neither the paper nor ours has, and reads other layers of VGG-19.

The authors' code is written in Lua and was read line by line: main_cvae_content.lua, KLDCriterion.lua, Sampler.lua,
src/descriptor_net.lua and src/content_loss.lua of

    https://github.com/houxianxu/DFC-VAE, commit aa0307e28710464132d97d776407f0f86fb2867f

It uses relu1_1, relu2_1 and relu3_1 and no error of values, like this model. Differs: their KL is a sum over the
batch, their distances are means over it, of images scaled to 255; ours has means over samples, of images in [0, 1].
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from perceptual_distance_laws import (  # noqa: F401
    SHAPE,
    images,
    small,
    test_distance_is_zero_only_for_perfect_reconstruction,
    test_elbo_and_log_likelihood_are_absent,
    test_only_likelihood_mean_is_used,
    test_the_loss_is_the_weighted_distance_and_the_kl,
    test_training_by_the_distance_reconstructs_digits,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import aezoo
from aezoo.io.checkpoint import save_model
from aezoo.models.variational.perceptual_vae import PerceptualVAE
from aezoo.models.variational.vae import VAE
from aezoo.nets.blocks.features import VGG, FeatureNet
from aezoo.nets.blocks.pretrained import cached_file

# ---- deep features: Hou et al. 2016 ----------------------------------------------------------------------------------


def by_hand(x: Tensor) -> list[Tensor]:
    """The random features, written out."""
    rng, found = np.random.RandomState(0), []
    for width in (16, 32, 64):
        fan_in = 9 * x.shape[1]
        w = torch.from_numpy(rng.standard_normal((width, x.shape[1], 3, 3)) * math.sqrt(2 / fan_in)).float().to(x)
        x = nn.functional.conv2d(x, w, stride=2, padding=1).relu()
        found.append(x)
    return found


def test_feature_distance_matches_paper_per_layer() -> None:
    model, x = small(PerceptualVAE, weight=7.0), images()
    params = torch.randn_like(x)
    expected = torch.zeros(6, dtype=x.dtype)
    for a, b in zip(by_hand(params.sigmoid()), by_hand(x), strict=True):
        n = a[0].numel()
        expected = expected + 7 * ((a - b) ** 2).flatten(1).sum(1) / (2 * n)
    torch.testing.assert_close(model.nll(params, x), expected)
    assert (expected > 0.01).all()


def test_random_features_keep_activation_scale() -> None:
    x = images(64, (3, 32, 32))
    for layer in small(PerceptualVAE, (3, 32, 32)).feature_net()(x):
        assert 0.3 < (layer**2).mean() / (x**2).mean() < 3


def test_random_features_are_fixed_and_use_no_rng() -> None:
    torch.manual_seed(1)
    one = small(PerceptualVAE)
    after = torch.rand(1)
    torch.manual_seed(1)
    small(VAE)
    assert torch.equal(after, torch.rand(1))
    other = small(PerceptualVAE)
    for p, q in zip(one.feature_net().parameters(), other.feature_net().parameters(), strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(one.decoder[1].weight, other.decoder[1].weight)


def test_feature_network_is_frozen_and_not_part_of_the_model(shifted: Any) -> None:
    model = shifted(small(PerceptualVAE)).train()
    net = model.feature_net()
    before = [p.clone() for p in net.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    model.loss(images())["loss"].backward()
    optimizer.step()
    assert not any(module.training for module in net.modules())
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert model.state_dict().keys() == small(VAE).state_dict().keys()
    assert len([*model.parameters()]) == len([*small(VAE).parameters()])
    assert {p.dtype for p in model.float().feature_net().parameters()} == {torch.float32}
    assert {p.dtype for p in model.double().feature_net().parameters()} == {torch.float64}


@pytest.mark.parametrize("shape", [(30,), (3, 128), (1, 12, 12, 12), (1, 27, 35)])
def test_random_features_take_any_data(shape: tuple[int, ...]) -> None:
    model, x = small(PerceptualVAE, shape), images(2, shape)
    terms = model.loss(x)
    terms["loss"].backward()
    assert terms["nll"] > 0
    torch.testing.assert_close(model.nll(torch.logit(x), x), torch.zeros(2, dtype=x.dtype), atol=1e-9, rtol=0)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty cache of torch.hub, and a writer of VGG weights into it."""
    # torch.hub.set_dir cannot be undone, and TORCH_HOME would be ignored afterwards
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()

    def write(name: str) -> nn.Module:
        torch.manual_seed(len(name))
        # up to relu3_1
        layers: nn.Module = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"][:7])
        state = {f"features.{key}": value for key, value in layers.state_dict().items()}
        torch.save(state | {"classifier.0.bias": torch.zeros(3)}, cached_file(name))
        return layers

    return write


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", VGG)
def test_vgg_features_match_torchvision(name: str, channels: int, hub: Any) -> None:
    layers, shape = hub(name), (channels, 16, 18)
    model, x = PerceptualVAE(shape, features=name, hidden_dims=(4,)), images(2, (channels, 16, 18)).float()
    scaled = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(x.expand(2, 3, 16, 18))
    expected, at = [], scaled
    for i, layer in enumerate(layers):
        at = layer(at)
        if i in (1, 6, 11):
            expected.append(at)
    found = model.feature_net()(x)
    assert [f.shape[1] for f in found] == [64, 128, 256]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert (model.nll(torch.zeros_like(x), x) > 0).all()


def test_missing_vgg_weights_are_named_and_codes_work_without(hub: Any, quiet: Any, tmp_path: Path) -> None:
    model = PerceptualVAE(SHAPE, features="vgg19", hidden_dims=(4,))
    x = images().float()
    assert model.encode(x).shape == (6, 16)
    assert model.sample(2).shape == (2, *SHAPE)
    loader: Any = DataLoader([x], batch_size=None)  # type: ignore[arg-type]
    trainer = quiet(max_epochs=1)
    for call in (lambda: model.loss(x), lambda: model.score(x), lambda: trainer.fit(model, loader, loader)):
        with pytest.raises(aezoo.AezooError, match=r"torchvision.models.vgg19\(weights='DEFAULT'\)") as error:
            call()
        assert "\n" not in str(error.value)
    loaded = aezoo.load_model(save_model(model, tmp_path / "saved"))
    torch.testing.assert_close(loaded(x), model(x))
    hub("vgg19")
    assert (loaded.score(x) > 0).all()


def test_vgg_weights_load_from_any_path_others_are_refused(hub: Any, tmp_path: Path) -> None:
    hub("vgg16")
    file = cached_file("vgg16").rename(tmp_path / "mine.pth")
    x = images().float()
    assert (PerceptualVAE(SHAPE, features=str(file), hidden_dims=(4,)).nll(x, x) > 0).all()
    torch.save({"a": x}, file)
    with pytest.raises(aezoo.AezooError, match="contains no weights of a VGG network"):
        PerceptualVAE(SHAPE, features=str(file), hidden_dims=(4,)).nll(x, x)
    with pytest.raises(
        aezoo.AezooError, match=r"no weights of a VGG network in .*: give another path, or use features random$"
    ):
        PerceptualVAE(SHAPE, features=str(tmp_path / "none.pth"), hidden_dims=(4,)).nll(x, x)
    with pytest.raises(aezoo.AezooError, match="1 or 3 channels"):
        PerceptualVAE((2, 8, 8), features="vgg16", hidden_dims=(4,)).nll(x, x)


@pytest.mark.parametrize(("net", "layers"), [("mlp", 2), ("conv", 2), ("resnet", 2)])
def test_saved_encoder_provides_features(net: str, layers: int, tmp_path: Path, shifted: Any) -> None:
    eye = shifted(aezoo.create_model("vae", SHAPE, net=net, hidden_dims=(8, 8), latent_dim=3))
    path, x = save_model(eye, tmp_path / "eye"), images().float()
    model = PerceptualVAE(SHAPE, features=str(path), hidden_dims=(4,)).train()
    found = model.feature_net()(x)
    assert len(found) >= layers
    seen: list[Tensor] = []
    for layer in eye.encoder.children():
        layer.register_forward_hook(lambda *args: seen.append(args[2]))
    eye.encoder(x)
    for features in found:
        assert any(features.shape == layer.shape and torch.allclose(features, layer) for layer in seen)
    assert not any(p.requires_grad for p in model.feature_net().parameters())
    model.loss(x)["loss"].backward()


def test_unsuitable_feature_model_is_refused(tmp_path: Path) -> None:
    x = images().float()
    flat = save_model(aezoo.create_model("vae", SHAPE, hidden_dims=()), tmp_path / "flat")
    other = save_model(aezoo.create_model("vae", (1, 9, 9), hidden_dims=(4,)), tmp_path / "other")
    for path, word in ((flat, "no hidden layers"), (other, r"\(1, 9, 9\)"), (tmp_path / "no" / "where", "no")):
        with pytest.raises(aezoo.AezooError, match=word) as error:
            PerceptualVAE(SHAPE, features=str(path), hidden_dims=(4,)).loss(x)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"features": ""}, "features"), ({"features": "vgg18"}, "vgg16, vgg19"), ({"weight": 0.0}, "weight")],
)
def test_invalid_feature_settings_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word):
        PerceptualVAE(SHAPE, **settings)


def test_linear_layers_alone_give_no_features() -> None:
    assert FeatureNet([nn.Linear(2, 2), nn.Linear(2, 2)]).read == ()
