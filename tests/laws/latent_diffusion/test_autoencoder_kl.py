"""Laws of AutoencoderKL of latent diffusion (Rombach et al. 2021)."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributions as D
import torchvision
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from latent_diffusion_laws import (  # noqa: F401
    NETS,
    SHAPE,
    X,
    by_hand,
    images,
    last_layer,
    losses,
    sets,
    small,
    test_missing_feature_file_is_named_before_training,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.image import LearnedPerceptualImagePatchSimilarity
from two_ranks import on_two_ranks

import aezoo
from aezoo.errors import AezooError
from aezoo.io.checkpoint import save_model
from aezoo.nets.blocks.adversarial import last_layer_vjp
from aezoo.nets.blocks.features import FeatureDistance
from aezoo.nets.blocks.pretrained import cached_file
from aezoo.testing import SharedNoise
from aezoo.training.seeding import mix

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- the terms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_terms_match_torch_distributions_and_autograd(net: str, training: bool, shifted: Any) -> None:
    model, x = shifted(small(net=net, beta=0.3, perceptual_weight=0.7)).train(training), images()
    torch.manual_seed(3)
    found = model.loss(x)
    torch.manual_seed(3)
    expected = by_hand(model, x)
    assert found.keys() == {*expected, "elbo"}
    assert expected["kl"] > 1 and expected["perceptual"] > 0.1 and 0 < expected["adaptive_weight"] < 1e4
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)
    torch.testing.assert_close(found["elbo"], -found["nll"] - found["kl"])


@pytest.mark.parametrize("likelihood", ["laplace:learned", "bernoulli", "gaussian:learned", "discretised_logistic"])
def test_each_player_gets_only_its_own_gradient(likelihood: str, shifted: Any) -> None:
    model, x = shifted(small(beta=0.3, perceptual_weight=0.7, likelihood=likelihood)), images()
    torch.manual_seed(3)
    terms = model.loss(x)
    found = {
        player: torch.autograd.grad(terms["loss"], part, retain_graph=True) for player, part in sets(model).items()
    }
    # neither player gets a gradient from the other's loss
    grads = torch.autograd.grad(
        terms["discriminator"], sets(model)["autoencoder"], allow_unused=True, retain_graph=True
    )
    assert all(g is None for g in grads)
    for term in ("nll", "kl", "perceptual", "adversarial"):
        grads = torch.autograd.grad(terms[term], sets(model)["discriminator"], allow_unused=True, retain_graph=True)
        assert all(g is None for g in grads)
    assert not terms["adaptive_weight"].requires_grad
    if likelihood != "laplace:learned":
        return
    torch.manual_seed(3)
    expected = losses(model, x)
    for player, part in sets(model).items():
        for mine, theirs in zip(
            found[player], torch.autograd.grad(expected[player], part, retain_graph=True), strict=True
        ):
            assert theirs.abs().max() > 0
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def test_perceptual_distance_is_scaled_by_number_of_values() -> None:
    """As in the authors' code: the distance, (B, 1, 1, 1), is added to |x - xhat|, (B, C, H, W), before the sum."""
    model, x = small(perceptual_weight=1.0, likelihood="laplace"), images()
    torch.manual_seed(3)
    terms = model.loss(x)
    torch.manual_seed(3)
    mu, log_var = model.posterior(x)
    x_hat = model.decoder(mu + (0.5 * log_var).exp() * torch.randn(mu.shape, dtype=mu.dtype))
    distance = FeatureDistance("random", SHAPE)(x_hat, x)
    summed = ((x - x_hat).abs() + distance[:, None, None, None]).sum() / len(x)
    torch.testing.assert_close(terms["nll"] + terms["perceptual"] - X * math.log(2), summed)
    torch.testing.assert_close(terms["loss"], terms["nll"] + terms["perceptual"] + 1e-6 * terms["kl"])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of torchvision's VGG-16 weights in an empty torch.hub folder."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return cached_file("vgg16")


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_matches_torchmetrics(channels: int, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    # without the classifier, which has 90 % of the weights
    monkeypatch.setattr(torchvision.models, "vgg16", lambda **_: SimpleNamespace(features=layers))
    reference = LearnedPerceptualImagePatchSimilarity(net_type="vgg", normalize=True, reduction="none")
    torch.save({f"features.{key}": value for key, value in layers.state_dict().items()}, hub)
    x, y = (torch.rand(2, channels, 16, 17, requires_grad=i == 0) for i in (0, 1))
    found = FeatureDistance("lpips", (channels, 16, 17))(x, y)
    expected = reference(x.expand(2, 3, -1, -1), y.expand(2, 3, -1, -1))
    torch.testing.assert_close(found, expected)
    slopes = (torch.autograd.grad(value.sum(), x)[0] for value in (found, expected))
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "network"), [("alex", "alexnet"), ("squeeze", "squeezenet1_1")])
def test_smaller_networks_of_lpips_match_torchmetrics(
    kind: str, network: str, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, made = getattr(torchvision.models, network), []

    def without_download(**_: Any) -> Any:
        made.append(build(weights=None))
        return made[-1]

    monkeypatch.setattr(torchvision.models, network, without_download)
    reference = LearnedPerceptualImagePatchSimilarity(net_type=kind, normalize=True)
    torch.save(made[0].state_dict(), cached_file(network))
    x, y = torch.rand(2, 2, 3, 40, 33)
    found = FeatureDistance(f"lpips:{kind}", (3, 40, 33))(x, y)
    each = [reference(a[None], b[None]) for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(found, torch.stack(each).flatten())
    with pytest.raises(aezoo.AezooError, match=f"lpips:{kind} takes images .* at least"):
        FeatureDistance(f"lpips:{kind}", (3, 16, 16)).read()


@pytest.mark.slow
def test_lpips_is_the_default_where_its_weights_are(hub: Path, tmp_path: Path) -> None:
    small, other = {"hidden_dims": (4,)}, [(1, 15, 16), (2, 16, 16), (1, 64)]
    assert {aezoo.create_model("vqgan", shape, **small).features for shape in [(3, 16, 16), *other]} == {"random"}
    hub.touch()
    assert {aezoo.create_model("vqgan", shape, **small).features for shape in other} == {"random"}
    model: Any = aezoo.create_model("vqgan", (3, 16, 16), **small)
    assert model.features == "lpips"
    saved = save_model(model, tmp_path / "saved")
    hub.unlink()
    loaded: Any = aezoo.load_model(saved)
    assert loaded.features == "lpips"
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(loaded(x), model(x))
    with pytest.raises(aezoo.AezooError, match=r"torchvision.models.vgg16\(weights='DEFAULT'\)"):
        loaded.loss(x)
    with pytest.raises(aezoo.AezooError, match="at least 16 x 16"):
        FeatureDistance("lpips", (1, 15, 16)).read()


def test_feature_distance_matches_perceptual_vae() -> None:
    x, y = images(), images(seed=8)
    other: Any = aezoo.create_model("perceptual_vae", SHAPE, weight=1.0, likelihood="gaussian").double()
    torch.testing.assert_close(FeatureDistance("random", SHAPE)(x, y), other.nll(x, y))
    assert FeatureDistance("none", SHAPE)(x, y).tolist() == [0] * 6


def test_loss_without_critic_and_features_is_negative_elbo(shifted: Any) -> None:
    model = shifted(small(beta=1.0, features="none", discriminator_weight=0.0))
    x = images()
    torch.manual_seed(3)
    terms = model.loss(x)
    torch.manual_seed(3)
    mu, log_var = model.posterior(x)
    q, p = D.Normal(mu, (0.5 * log_var).exp()), D.Normal(torch.zeros_like(mu), 1.0)
    x_hat = model.decoder(mu + q.scale * torch.randn(mu.shape, dtype=mu.dtype))
    log_p = D.Laplace(x_hat, model.likelihood.log_scale.exp().expand_as(x_hat)).log_prob(x)
    elbo = (log_p.sum((1, 2, 3)) - D.kl_divergence(q, p).sum((1, 2, 3))).mean()
    torch.testing.assert_close(terms["loss"], -elbo)
    torch.testing.assert_close(terms["elbo"], elbo)
    part = sets(model)["autoencoder"]
    found, expected = (torch.autograd.grad(value, part) for value in (terms["loss"], -elbo))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_without_weight_the_discriminator_is_left_out(shifted: Any) -> None:
    x, found = images(), []
    for settings in ({"discriminator_weight": 0.0}, {"discriminator_start": 10**6}):
        torch.manual_seed(0)
        model = shifted(small(beta=0.3, **settings))
        torch.manual_seed(3)
        terms = model.loss(x)
        found.append((terms["loss"], *torch.autograd.grad(terms["loss"], sets(model)["autoencoder"])))
        assert ("discriminator" in terms) == ("discriminator_start" in settings)
        assert all(p.requires_grad == ("discriminator_start" in settings) for p in model.discriminator.parameters())
    for left_out, not_started in zip(*found, strict=True):
        torch.testing.assert_close(left_out, not_started, rtol=1e-10, atol=1e-12)


def test_draw_densities_match_torch_distributions(shifted: Any) -> None:
    model, x = shifted(small()).eval(), images()
    mu, log_var = model.posterior(x)
    q = D.Independent(D.Normal(mu, (0.5 * log_var).exp()), 3)
    p = D.Independent(D.Normal(torch.zeros_like(mu), 1.0), 3)
    z, log_q = model.sample_posterior(x, 4)
    assert z.shape == (4, 6, *model.code_shape)
    torch.testing.assert_close(log_q, q.log_prob(z))
    torch.testing.assert_close(model.log_prior(z), p.log_prob(z))
    torch.manual_seed(5)
    found = model.log_likelihood(x, 30)
    torch.manual_seed(5)
    z, log_q = model.sample_posterior(x, 30)
    log_px = torch.stack([-model.nll(model.decoder(each), x) for each in z])
    torch.testing.assert_close(found, (log_px + p.log_prob(z) - q.log_prob(z)).logsumexp(0) - math.log(30))
    score = model.nll(model.decoder(mu), x) + D.kl_divergence(q, p)
    torch.testing.assert_close(model.score(x), score)


# ---- the players -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.3, 30.0])
def test_adversarial_gradient_is_invariant_to_critic_scale(factor: float, shifted: Any) -> None:
    """With logits scaled by a factor, lambda is divided by it, and the autoencoder's gradient does not change."""
    model, x = shifted(small(features="none", beta=0.0)), images()
    weights, moves = [], []
    for scale in (1.0, factor):
        with torch.no_grad():
            model.discriminator[-1].weight *= scale
            model.discriminator[-1].bias *= scale
        torch.manual_seed(3)
        terms = model.loss(x)
        weights.append(terms["adaptive_weight"].item())
        part = [p for p in sets(model)["autoencoder"] if p is not model.likelihood.log_scale]
        whole, alone = (torch.autograd.grad(terms[t], part, retain_graph=True) for t in ("loss", "nll"))
        moves.append(torch.cat([(a - b).flatten() for a, b in zip(whole, alone, strict=True)]))
        at_w = last_layer(model)
        whole, alone = (torch.autograd.grad(terms[t], at_w, retain_graph=True)[0] for t in ("loss", "nll"))
        # the norm is w_D = 1/2 of that of the reconstruction's gradient at the last layer
        assert (whole - alone).norm().item() == pytest.approx(0.5 * alone.norm().item(), rel=0.05)  # type: ignore[attr-defined]
    assert weights[0] / weights[1] == pytest.approx(factor, rel=0.05)
    torch.testing.assert_close(moves[0], moves[1], rtol=0.05, atol=1e-3 * moves[0].abs().max().item())


def test_adaptive_weight_is_capped(shifted: Any) -> None:
    model = shifted(small())
    with torch.no_grad():
        model.discriminator[-1].weight.zero_()
    terms = model.loss(images())
    assert terms["adaptive_weight"].item() == 1e4
    terms["loss"].backward()
    assert all(p.grad.isfinite().all() for p in sets(model)["autoencoder"])  # type: ignore[union-attr]


@pytest.mark.parametrize("net", NETS)
def test_the_last_layer_is_found_in_every_network(net: str, shifted: Any) -> None:
    """The gradient at the last weight by autograd; it is the weight of the last layer called."""
    model = shifted(small(net=net))
    z = torch.randn(2, *model.code_shape, dtype=torch.float64)
    out, to_last = last_layer_vjp(model.decoder, z)
    g = torch.randn_like(out)
    (expected,) = torch.autograd.grad(model.decoder(z), last_layer(model), g)
    torch.testing.assert_close(out, model.decoder(z))
    torch.testing.assert_close(to_last(g), expected)
    read: list[nn.Module] = []
    for m in model.decoder.modules():
        m.register_forward_hook(lambda m, *_: read.append(m))
    model.decoder(z)
    weighted = [m for m in read if isinstance(m._parameters.get("weight"), nn.Parameter)]
    assert weighted[-1].weight is last_layer(model)


def test_each_player_has_its_group_with_published_betas() -> None:
    model = small(discriminator_lr=3e-3, lr=2e-3)
    first, second = model.configure_optimizers().param_groups
    ids = {player: {id(p) for p in part} for player, part in sets(model).items()}
    assert {id(p) for p in first["params"]} == ids["autoencoder"]
    assert {id(p) for p in second["params"]} == ids["discriminator"]
    assert (first["lr"], first["betas"], second["lr"], second["betas"]) == (2e-3, (0.5, 0.9), 3e-3, (0.5, 0.9))


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 3, 50])
def test_steps_equal_two_optimisers_with_late_start(
    start: int, shifted: Any, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six steps of the real loop and of two Adam optimisers; before the start the model is a VAE with these terms."""
    monkeypatch.setattr(
        "aezoo.speed.memory_format.to_channels_last", lambda model: False
    )  # noise is drawn as codes lie
    model = shifted(small(discriminator_start=start, lr=2e-3, discriminator_lr=5e-3, beta=0.3))
    other, before = copy.deepcopy(model), copy.deepcopy(model.discriminator.state_dict())
    batches = [images(6, seed) for seed in range(6)]
    torch.manual_seed(11)
    quiet(max_epochs=1).fit(model, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    parts = sets(other)
    rates = {"autoencoder": 2e-3, "discriminator": 5e-3}
    adams = {player: torch.optim.Adam(part, rates[player], (0.5, 0.9)) for player, part in parts.items()}
    for i, x in enumerate(batches):
        torch.manual_seed(mix(11, 0, 0, i))
        own = losses(other, x, i >= start)
        found = {player: torch.autograd.grad(own[player], part, retain_graph=True) for player, part in parts.items()}
        for player, part in parts.items():
            for p, g in zip(part, found[player], strict=True):
                p.grad = g
        for adam in adams.values():
            adam.step()
    for player, part in sets(model).items():
        for mine, theirs in zip(part, parts[player], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)
    moved = any(not torch.equal(p, before[name]) for name, p in model.discriminator.state_dict().items())
    assert moved == (start < 6)


@pytest.mark.parametrize(
    "settings",
    [{}, {"name": "eq_vae", "equivariance": 1.0}, {"name": "asymmetric_kl", "full_mask": 0.3}],
    ids=["autoencoder_kl", "eq_vae", "asymmetric_kl"],
)
def test_two_ranks_equal_one_process(settings: dict[str, Any], shifted: Any) -> None:
    model, x = shifted(small(beta=0.3, **settings)), images()
    one = copy.deepcopy(model)
    with SharedNoise(range(6), 6):
        whole = one.loss(x)
    together = on_two_ranks(model, x)
    for term, value in whole.items():
        torch.testing.assert_close(together.terms[term], value, msg=term)
    expected = torch.autograd.grad(whole["loss"], [*one.parameters()])
    for found, g in zip(together.gradients(), expected, strict=True):
        torch.testing.assert_close(found, g)
    for each in together.copies:
        torch.testing.assert_close(each.standardiser.mean_C, one.standardiser.mean_C)
        torch.testing.assert_close(each.standardiser.std_C, one.standardiser.std_C)
    alone = on_two_ranks(model, x, exchange=False)
    assert (alone.terms["adaptive_weight"] - whole["adaptive_weight"]).abs() > 1e-3
    assert (alone.copies[0].standardiser.std_C - one.standardiser.std_C).abs().max() > 1e-4


# ---- scale of the code -----------------------------------------------------------------------------------------------


def test_bf16_model_keeps_float32_moments() -> None:
    """Moments go from 1 to 1.3 in steps of at most 0.003, where the spacing of bf16 is 1/128."""
    model = small().float().bfloat16()
    module, z = model.standardiser, torch.tensor([0.0, 2.0]).expand(2, 3, 2)
    for step in range(1500):
        module.observe(z * (1.3 if step >= 300 else 1.0), lambda values: values.mean(0))
    torch.testing.assert_close(module.mean_C, torch.full((3,), 1.3), rtol=1e-3, atol=0)
    torch.testing.assert_close(module.std_C, torch.full((3,), 1.3), rtol=1e-3, atol=0)
    assert model.eval().sample(2).dtype == module(z.bfloat16()).dtype == torch.bfloat16
    assert model.double().standardiser.mean_C.dtype == torch.float64


def test_samples_are_decoded_draws_with_the_moments_of_the_codes(shifted: Any, quiet: Any) -> None:
    model = shifted(small())
    quiet(max_epochs=2).fit(model, DataLoader([images(6, seed) for seed in range(4)], batch_size=None))  # type: ignore[arg-type]
    mean, std = model.standardiser.mean_C, model.standardiser.std_C
    assert mean.abs().max() > 0.1 and (std - 1).abs().max() > 0.1
    torch.manual_seed(5)
    found = model.eval().sample(4)
    torch.manual_seed(5)
    eps = torch.randn(4, *model.code_shape, dtype=torch.float64)
    z = eps * std[:, None, None] + mean[:, None, None]
    torch.testing.assert_close(found, model.decode(z))
    before = mean.clone()
    model.loss(images())
    assert torch.equal(model.standardiser.mean_C, before)


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"input_shape": (30,)}, "convolutions take"),
        ({"net": "mlp"}, "feature map"),
        ({"net": "lstm"}, "feature map"),
        ({"features": "vgg"}, "features takes none, random"),
        ({"latent_dim": 0}, "latent_dim must be at least 1"),
        ({"discriminator_start": -1}, "discriminator_start must be at least 0"),
        ({"discriminator_weight": -1.0}, "discriminator_weight must be at least 0"),
    ],
)
def test_invalid_values_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(AezooError, match=words):
        small(**settings)


@pytest.mark.slow
def test_training_with_all_losses_reconstructs_digits(digits: Tensor) -> None:
    torch.manual_seed(0)
    x = digits[:1024].float()
    model: Any = aezoo.create_model("autoencoder_kl", (1, 8, 8), hidden_dims=(16, 16), lr=2e-3)
    optimizer: Any = model.configure_optimizers()
    for _ in range(200):
        terms = model.loss(x[torch.randint(1024, (64,))])
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    assert all(value.isfinite() for value in terms.values())
    with torch.no_grad():
        mse = (model.eval()(x) - x).square().mean() / (x - x.mean(0)).square().mean()
    assert mse < 0.45
