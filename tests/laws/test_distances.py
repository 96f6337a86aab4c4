"""Laws of the VAEs that compare data by another measure, or a corrupted sample with the clean one."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
import torchvision
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as torchmetrics_ms_ssim

import aezoo
from aezoo.io.checkpoint import save_model
from aezoo.models.variational.denoising_vae import DenoisingVAE
from aezoo.models.variational.logcosh_vae import LogCoshVAE
from aezoo.models.variational.msssim_vae import EXPONENTS, MSSSIMVAE
from aezoo.models.variational.perceptual_vae import PerceptualVAE
from aezoo.models.variational.vae import VAE
from aezoo.nets.blocks.features import VGG, FeatureNet
from aezoo.nets.blocks.pretrained import cached_file

SHAPE, CODE = (1, 8, 8), 4
DISTANCES: list[Any] = [MSSSIMVAE, PerceptualVAE]


def small(make: Any, shape: tuple[int, ...] = SHAPE, **settings: Any) -> Any:
    return make(shape, latent_dim=CODE, hidden_dims=(16,), **settings).double()


def images(n: int = 6, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


def smooth(n: int, shape: tuple[int, ...]) -> Tensor:
    """Images with structure at all scales."""
    parts = [
        nn.functional.interpolate(torch.rand(n, shape[0], s, s, dtype=torch.float64), shape[1:]) for s in (3, 7, 16, 64)
    ]
    return torch.stack(parts).mean(0)


def twins(make: Any, shifted: Any, parent: dict[str, Any], **settings: Any) -> tuple[Any, Any]:
    model, vae = small(make, **settings), shifted(small(VAE, **parent))
    model.load_state_dict(vae.state_dict())
    return model, vae


def losses(*models: Any, training: bool = True) -> list[dict[str, Tensor]]:
    """The loss of each with the same noise, its gradients left at the weights."""
    found, x = [], images()
    for each in models:
        torch.manual_seed(3)
        each.zero_grad()
        found.append(each.train(training).loss(x))
        found[-1]["loss"].backward()
    return found


def same(model: Any, vae: Any, training: bool = True) -> None:
    mine, theirs = losses(model, vae, training=training)
    assert mine.keys() == theirs.keys()
    for term in theirs:
        torch.testing.assert_close(mine[term], theirs[term], rtol=1e-10, atol=1e-12)
    for p, q in zip(model.parameters(), vae.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def decoded(model: Any, call: Any) -> tuple[Any, Tensor]:
    """What a call gives, and what the decoder put out in it."""
    seen: list[Tensor] = []
    hook = model.decoder.register_forward_hook(lambda *args: seen.append(args[2]))
    found = call()
    hook.remove()
    return found, seen[0]


# ---- log-cosh: Chen et al. 2019 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_log_cosh_vae_is_the_vae_with_that_likelihood(training: bool, shifted: Any) -> None:
    same(*twins(LogCoshVAE, shifted, {"likelihood": "logcosh:0.1"}), training)
    same(*twins(LogCoshVAE, shifted, {"likelihood": "logcosh:2", "beta": 3.0}, a=0.5, beta=3.0), training)


def test_its_likelihood_is_a_density_and_the_paper_s_loss_a_multiple_of_it(shifted: Any) -> None:
    a, x = 10.0, images()
    model = shifted(small(LogCoshVAE, a=a, beta=a))
    terms, x_hat = decoded(model, lambda: model.loss(x))
    log_p = stats.hypsecant.logpdf(x.numpy(), x_hat.detach().numpy(), 0.1).reshape(6, -1).sum(1)
    assert terms["nll"].item() == pytest.approx(-log_p.mean(), rel=1e-6)  # a scale is kept in float32
    paper = (torch.log(torch.cosh(a * (x - x_hat))) / a).flatten(1).sum(1).mean() + terms["kl"]
    assert (terms["loss"] / a).item() == pytest.approx((paper + 64 * math.log(math.pi / a) / a).item(), rel=1e-6)


@pytest.mark.parametrize("a", [0.0, -1.0, 1e-9, 1e9])
def test_a_scale_that_no_data_have_is_refused(a: float) -> None:
    with pytest.raises(aezoo.AezooError, match="a must lie"):
        small(LogCoshVAE, a=a)


# ---- denoising: Im et al. 2015 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_without_corruption_the_denoising_vae_is_the_vae(training: bool, shifted: Any) -> None:
    same(*twins(DenoisingVAE, shifted, {"beta": 2.0}, corruption="none", beta=2.0), training)


@pytest.mark.parametrize("corruption", ["gaussian:0.3", "masking:0.4", "salt_and_pepper:0.3"])
def test_the_code_is_that_of_the_corrupted_sample_and_the_likelihood_that_of_the_clean_one(
    corruption: str, shifted: Any
) -> None:
    model, x = shifted(small(DenoisingVAE, corruption=corruption)), images()
    seen: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    terms, params = decoded(model, lambda: model.loss(x))
    assert (seen[0] - x).abs().max() > 0.2
    torch.manual_seed(2)
    expected = model.corruption(x)
    torch.manual_seed(2)
    model.loss(x)
    torch.testing.assert_close(seen[1], expected)
    clean = -D.Bernoulli(logits=params, validate_args=False).log_prob(x).flatten(1).sum(1).mean()
    torch.testing.assert_close(terms["nll"], clean)
    mu, log_var = model.posterior(seen[0])
    q, p = D.Normal(mu, (0.5 * log_var).exp()), D.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    torch.testing.assert_close(terms["kl"], D.kl_divergence(q, p).sum(1).mean())
    torch.testing.assert_close(terms["loss"], terms["nll"] + terms["kl"])


def test_codes_scores_and_likelihoods_take_a_sample_as_it_is(shifted: Any) -> None:
    model, vae = twins(DenoisingVAE, shifted, {})
    x, found = images(), []
    for each in (model.eval(), vae.eval()):
        torch.manual_seed(5)
        found.append([each.encode(x), each(x), each.score(x), each.log_likelihood(x, 20), each.sample(3)])
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


def test_its_bound_lies_below_the_evidence_and_more_so_the_more_noise_there_is(shifted: Any) -> None:
    """Against the exact log p(x) of a linear decoder: whatever posterior the corruption makes, it is a bound."""
    x, found = images(200), []
    for corruption in ("none", "gaussian:0.2", "gaussian:2"):
        torch.manual_seed(0)
        model = DenoisingVAE(SHAPE, latent_dim=CODE, hidden_dims=(), likelihood="gaussian", corruption=corruption)
        model = shifted(model).double().eval()
        with torch.no_grad():
            found.append(torch.stack([model.loss(x)["elbo"] for _ in range(20)]).mean().item())
    W, c = model.decoder[1].weight.detach(), model.decoder[1].bias.detach()
    exact = D.LowRankMultivariateNormal(c, W, torch.full((64,), 0.5).double()).log_prob(x.flatten(1)).mean().item()
    assert exact > found[0] > found[1] + 1e-3 > found[2]


# ---- MS-SSIM: Wang et al. 2003, Snell et al. 2015 --------------------------------------------------------------------


def reference(model: Any, x: Tensor, y: Tensor) -> Tensor:
    weights = EXPONENTS[: model.scales]
    return torchmetrics_ms_ssim(
        x, y, sigma=1.5 * model.window / 11, kernel_size=model.window, data_range=1.0, reduction="none",
        betas=tuple(w / sum(weights) for w in weights),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "settings", "scales", "window"),
    [
        ((1, 192, 192), {}, 5, 11),
        ((1, 177, 200), {}, 5, 11),
        ((3, 64, 64), {}, 3, 11),
        ((1, 32, 32), {}, 2, 11),
        ((1, 28, 28), {}, 2, 11),
        ((1, 28, 28), {"window": 7}, 3, 7),
        ((2, 27, 35), {"window": 5}, 3, 5),
        ((4, 64, 64), {"scales": 1}, 1, 11),
    ],
)
def test_ms_ssim_is_torchmetrics_with_its_gradient(
    shape: tuple[int, ...], settings: dict[str, Any], scales: int, window: int
) -> None:
    model = MSSSIMVAE(shape, latent_dim=2, hidden_dims=(2,), **settings)
    assert (model.scales, model.window) == (scales, window)
    y = smooth(2, shape)
    x = (0.7 * y + 0.3 * torch.rand(2, *shape, dtype=torch.float64)).requires_grad_()
    found, expected = model.ms_ssim(x, y), reference(model, x, y)
    assert (found < 0.95).all()
    # torchmetrics keeps the exponents in float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    a, b = (torch.autograd.grad(v.sum(), x)[0] for v in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("side", "scales", "window"), [(3, 1, 3), (4, 1, 3), (8, 1, 7), (11, 1, 11), (21, 1, 11), (22, 2, 11), (176, 5, 11)]
)
def test_scales_and_window_follow_the_size_of_the_image(side: int, scales: int, window: int) -> None:
    model = MSSSIMVAE((1, side, side + 1), latent_dim=2, hidden_dims=(2,)).double()
    assert (model.scales, model.window) == (scales, window)
    x, y = images(2, (1, side, side + 1)), images(2, (1, side, side + 1))
    torch.testing.assert_close(model.ms_ssim(x, x), torch.ones(2, dtype=x.dtype))
    assert (model.ms_ssim(x, y) < 0.9).all()


def test_it_is_symmetric_and_counts_structure_more_than_brightness() -> None:
    model = MSSSIMVAE((1, 28, 28)).double()
    x, y = smooth(4, (1, 28, 28)), images(4, (1, 28, 28))
    torch.testing.assert_close(model.ms_ssim(x, y), model.ms_ssim(y, x))
    brighter, noisier = x + 0.1, x + 0.1 * (torch.rand_like(x) > 0.5) - 0.1 * (torch.rand_like(x) > 0.5)
    assert (model.ms_ssim(brighter, x) > model.ms_ssim(noisier, x) + 0.03).all()


CONSTANT = torch.zeros(2, 1, 28, 28)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (CONSTANT, CONSTANT),
        (CONSTANT, CONSTANT + 1),
        (CONSTANT + 0.5, torch.eye(28).expand(2, 1, 28, 28)),
        (torch.eye(28).expand(2, 1, 28, 28), torch.eye(28).expand(2, 1, 28, 28)),
        (torch.eye(28).expand(2, 1, 28, 28), 1 - torch.eye(28).expand(2, 1, 28, 28)),
    ],
)
def test_constant_equal_and_opposite_images_have_a_finite_gradient(x: Tensor, y: Tensor) -> None:
    for model in (MSSSIMVAE((1, 28, 28)), MSSSIMVAE((1, 28, 28), window=7)):
        x = x.clone().requires_grad_()
        found = model.ms_ssim(x, y)
        (gradient,) = torch.autograd.grad(found.sum(), x)
        assert found.isfinite().all() and gradient.isfinite().all()
        assert ((found >= 0) & (found < 1 + 1e-5)).all()


def test_a_reconstruction_of_the_opposite_structure_is_still_led_back() -> None:
    """Where a scale's similarity is negative torchmetrics gives 0 and no gradient."""
    y = smooth(2, (1, 28, 28))
    x = (1 - y).requires_grad_()
    model = MSSSIMVAE((1, 28, 28), window=7).double()
    ((dead,), (alive,)) = (
        torch.autograd.grad(f(x, y).sum(), x) for f in (lambda *a: reference(model, *a), model.ms_ssim)
    )
    assert dead.abs().max() == 0
    step = alive / alive.abs().max()
    assert (model.ms_ssim(x + 0.01 * step, y) > model.ms_ssim(x, y)).all()


def test_variances_keep_their_digits_in_float32() -> None:
    y = 0.9 + 0.01 * smooth(8, (1, 28, 28))
    x = y + 0.002 * torch.rand_like(y)
    model = MSSSIMVAE((1, 28, 28))
    exact = model.ms_ssim(x, y)
    assert ((1 - exact) > 1e-4).all()
    torch.testing.assert_close(model.ms_ssim(x.float(), y.float()).double(), exact, atol=1e-4, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.nll(torch.logit(x).float(), y.float())
    torch.testing.assert_close(half.double(), model.weight * (1 - exact), atol=1e-4 * model.weight, rtol=0)


@pytest.mark.parametrize("shape", [(30,), (3, 128), (1, 12, 12, 12), (1, 2, 28), (1, 28, 2)])
def test_what_is_no_image_is_refused_in_one_line(shape: tuple[int, ...]) -> None:
    with pytest.raises(aezoo.AezooError, match=r"\(C, H, W\)") as error:
        MSSSIMVAE(shape)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        *(({"weight": w}, "weight") for w in (0.0, -1.0)),
        *(({"scales": s}, "scales") for s in (0, 6)),
        *(({"window": w}, "window") for w in (1, 4, -3)),
    ],
)
def test_settings_of_ms_ssim_that_cannot_work_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word):
        MSSSIMVAE(SHAPE, **settings)


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


def test_the_distance_is_the_paper_s_of_each_layer() -> None:
    model, x = small(PerceptualVAE, weight=7.0), images()
    params = torch.randn_like(x)
    expected = torch.zeros(6, dtype=x.dtype)
    for a, b in zip(by_hand(params.sigmoid()), by_hand(x), strict=True):
        n = a[0].numel()
        expected = expected + 7 * ((a - b) ** 2).flatten(1).sum(1) / (2 * n)
    torch.testing.assert_close(model.nll(params, x), expected)
    assert (expected > 0.01).all()


def test_random_features_keep_the_size_of_their_input_from_layer_to_layer() -> None:
    x = images(64, (3, 32, 32))
    for layer in small(PerceptualVAE, (3, 32, 32)).feature_net()(x):
        assert 0.3 < (layer**2).mean() / (x**2).mean() < 3


def test_random_features_are_the_same_everywhere_and_draw_nothing() -> None:
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


def test_the_network_is_frozen_and_leaves_no_trace_in_the_model(shifted: Any) -> None:
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
    # set_dir could not undo itself: afterwards TORCH_HOME would no longer count
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
def test_vgg_features_are_those_of_torchvision(name: str, channels: int, hub: Any) -> None:
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


def test_absent_weights_are_named_with_their_cure_and_codes_need_none(hub: Any, quiet: Any, tmp_path: Path) -> None:
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


def test_a_file_of_vgg_weights_may_lie_anywhere_and_another_file_is_refused(hub: Any, tmp_path: Path) -> None:
    hub("vgg16")
    file = cached_file("vgg16").rename(tmp_path / "mine.pth")
    x = images().float()
    assert (PerceptualVAE(SHAPE, features=str(file), hidden_dims=(4,)).nll(x, x) > 0).all()
    torch.save({"a": x}, file)
    with pytest.raises(aezoo.AezooError, match="holds no weights of a VGG network"):
        PerceptualVAE(SHAPE, features=str(file), hidden_dims=(4,)).nll(x, x)
    with pytest.raises(
        aezoo.AezooError, match=r"no weights of a VGG network in .*: give another path, or take features random$"
    ):
        PerceptualVAE(SHAPE, features=str(tmp_path / "none.pth"), hidden_dims=(4,)).nll(x, x)
    with pytest.raises(aezoo.AezooError, match="1 or 3 channels"):
        PerceptualVAE((2, 8, 8), features="vgg16", hidden_dims=(4,)).nll(x, x)


@pytest.mark.parametrize(("net", "layers"), [("mlp", 2), ("conv", 2), ("resnet", 2)])
def test_a_trained_model_of_the_zoo_lends_its_encoder(net: str, layers: int, tmp_path: Path, shifted: Any) -> None:
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


def test_a_model_that_cannot_lend_its_encoder_is_refused(tmp_path: Path) -> None:
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
def test_settings_of_features_that_cannot_work_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word):
        PerceptualVAE(SHAPE, **settings)


def test_reading_needs_a_layer() -> None:
    assert FeatureNet([nn.Linear(2, 2), nn.Linear(2, 2)]).read == ()


# ---- both distances --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", DISTANCES)
def test_the_loss_is_the_weighted_distance_and_the_kl(make: Any, shifted: Any) -> None:
    model, x = shifted(small(make, beta=0.7)), images()
    terms, params = decoded(model, lambda: model.loss(x))
    torch.testing.assert_close(terms["nll"], model.nll(params, x).mean())
    mu, log_var = model.posterior(x)
    q, p = D.Normal(mu, (0.5 * log_var).exp()), D.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    kl_B = D.kl_divergence(q, p).sum(1)
    torch.testing.assert_close(terms["kl"], kl_B.mean())
    torch.testing.assert_close(terms["loss"], terms["nll"] + 0.7 * kl_B.mean())
    model.eval()
    torch.testing.assert_close(model.score(x), model.nll(model.decoder(mu), x) + kl_B)
    model.beta, model.capacity = 2.0, 1000.0
    (held,) = losses(model)
    torch.testing.assert_close(held["loss"], held["nll"] + 2 * (1000 - held["kl"]))
    doubled = small(make, weight=2 * model.weight)
    torch.testing.assert_close(doubled.nll(params, x), 2 * model.nll(params, x))


@pytest.mark.parametrize("make", DISTANCES)
def test_no_density_is_claimed(make: Any) -> None:
    model = small(make)
    assert "elbo" not in model.loss(images())
    assert model.log_likelihood is None


@pytest.mark.parametrize("make", DISTANCES)
def test_a_perfect_reconstruction_is_at_distance_zero_and_any_other_above(make: Any) -> None:
    model, x = small(make), 0.1 + 0.8 * images()
    torch.testing.assert_close(model.nll(torch.logit(x), x), torch.zeros(6, dtype=x.dtype), atol=1e-9, rtol=0)
    assert (model.nll(torch.logit(x) + torch.randn_like(x), x) > 1).all()


@pytest.mark.parametrize("make", DISTANCES)
def test_training_by_the_distance_reconstructs_digits(make: Any, digits: Tensor, adam: Any) -> None:
    x = digits[:512].float()
    model = make(SHAPE, latent_dim=8, hidden_dims=(64,))
    adam(model, x, steps=300, lr=5e-3, batch=64)
    with torch.no_grad():
        mse = (model(x) - x).square().mean()
    assert mse < 0.6 * (x.mean(0) - x).square().mean()


@pytest.mark.parametrize("make", DISTANCES)
def test_of_the_likelihood_only_the_mean_counts(make: Any) -> None:
    x, params = images(), torch.randn(6, *SHAPE, dtype=torch.float64)
    for likelihood, x_hat in (("bernoulli", params.sigmoid()), ("gaussian:learned", params), ("laplace", params)):
        model = small(make, likelihood=likelihood)
        same_as = small(make, likelihood="gaussian")
        torch.testing.assert_close(model.nll(params, x), same_as.nll(x_hat, x))
        terms = model.loss(x)
        terms["loss"].backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        assert not any(p.requires_grad for p in model.likelihood.parameters())
