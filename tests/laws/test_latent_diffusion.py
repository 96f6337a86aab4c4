"""Laws of the first stages of latent diffusion: who trains what, the adaptive weight, the start, the code's scale."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from torch import Tensor, nn
from torch.utils.data import DataLoader
from two_ranks import on_two_ranks

import aezoo
from aezoo.errors import AezooError
from aezoo.nets.blocks.adversarial import (
    PatchDiscriminator,
    adaptive_weight,
    hinge_loss,
    last_layer_vjp,
    value_and_grad,
)
from aezoo.nets.blocks.channel_stats import Standardiser
from aezoo.nets.blocks.features import FeatureDistance, random_features
from aezoo.testing import SharedNoise
from aezoo.training.seeding import mix

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
SHAPE, X = (2, 9, 7), 126
NETS = ("resnet", "conv", "convnext", "conv_keras", "unet", "dc", "vit", "mixer")


def small(name: str = "autoencoder_kl", **settings: Any) -> Any:
    settings = {"input_shape": SHAPE, "latent_dim": 3, "hidden_dims": (8, 6), "discriminator_dims": (8, 8), **settings}
    return aezoo.create_model(name, **settings).double()


def images(n: int = 6, seed: int = 7, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def last_layer(model: Any) -> nn.Parameter:
    """W of a decoder whose layers stand in a row."""
    return [m.weight for m in model.decoder.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)][-1]


def sets(model: Any) -> dict[str, list[nn.Parameter]]:
    parts = (model.encoder, model.decoder, model.likelihood)
    return {
        "autoencoder": [p for part in parts for p in part.parameters()],
        "discriminator": [*model.discriminator.parameters()],
    }


Tau = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def by_hand(model: Any, x: Tensor, tau: Tau = lambda x, z: (x, z)) -> dict[str, Tensor]:
    """All terms, live in all parameters, by torch.distributions and autograd; tau gives samples and what is decoded."""
    mu, log_var = model.encoder(x).chunk(2, 1)
    q = D.Normal(mu, (0.5 * log_var).exp())
    kl = D.kl_divergence(q, D.Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum((1, 2, 3)).mean()
    x, *decoded = tau(x, mu + q.scale * torch.randn(mu.shape, dtype=mu.dtype))
    x_hat = model.decoder(*decoded)
    scale = model.likelihood.log_scale.exp()
    nll = -D.Laplace(x_hat, scale.expand_as(x_hat)).log_prob(x).sum((1, 2, 3)).mean()
    net = random_features(SHAPE).double()
    pairs = zip(net(x_hat), net(x), strict=True)
    perceptual = x[0].numel() * torch.stack([0.5 * nn.functional.mse_loss(a, b) for a, b in pairs]).sum()
    if model.distance.features == "none":
        perceptual = 0 * perceptual
    gan = -model.discriminator(x_hat).mean()
    rec = nll + model.perceptual_weight * perceptual
    at_w = [torch.autograd.grad(term, last_layer(model), retain_graph=True)[0] for term in (rec, gan)]
    weight = min(float(at_w[0].square().sum().sqrt() / (at_w[1].square().sum().sqrt() + 1e-4)), 1e4)
    real, fake = model.discriminator(x), model.discriminator(x_hat.detach())
    return {
        "nll": nll,
        "kl": kl,
        "perceptual": perceptual,
        "adversarial": gan,
        "adaptive_weight": torch.tensor(weight, dtype=torch.float64),
        "discriminator": (torch.clamp(1 - real, min=0).mean() + torch.clamp(1 + fake, min=0).mean()) / 2,
        "loss": rec + model.beta * kl,
    }


def losses(model: Any, x: Tensor, started: bool = True, tau: Tau = lambda x, z: (x, z)) -> dict[str, Tensor]:
    """What each player minimises."""
    terms = by_hand(model, x, tau)
    game = model.discriminator_weight * terms["adaptive_weight"] * terms["adversarial"]
    return {"autoencoder": terms["loss"] + started * game, "discriminator": started * terms["discriminator"]}


# ---- the terms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_terms_are_those_of_torch_s_distributions_and_of_autograd(net: str, training: bool, shifted: Any) -> None:
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
def test_each_player_gets_the_gradient_of_its_own_loss_and_no_other(likelihood: str, shifted: Any) -> None:
    model, x = shifted(small(beta=0.3, perceptual_weight=0.7, likelihood=likelihood)), images()
    torch.manual_seed(3)
    terms = model.loss(x)
    found = {
        player: torch.autograd.grad(terms["loss"], part, retain_graph=True) for player, part in sets(model).items()
    }
    # nothing of the other player's loss: the discriminator's is cut off from the data term and the reverse
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


def test_a_sum_over_values_counts_a_perceptual_distance_of_an_image_as_often_as_it_has_values() -> None:
    """The authors' reduction: the distance, (B, 1, 1, 1), is added to |x - xhat|, (B, C, H, W), and all is summed."""
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


def test_the_distance_of_features_is_the_perceptual_vae_s() -> None:
    x, y = images(), images(seed=8)
    other: Any = aezoo.create_model("perceptual_vae", SHAPE, weight=1.0, likelihood="gaussian").double()
    torch.testing.assert_close(FeatureDistance("random", SHAPE)(x, y), other.nll(x, y))
    assert FeatureDistance("none", SHAPE)(x, y).tolist() == [0] * 6


def test_it_is_the_negative_elbo_without_players_and_features(shifted: Any) -> None:
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


def test_draws_and_prior_have_the_densities_of_torch_s_distributions(shifted: Any) -> None:
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


def test_hinge_by_hand() -> None:
    real, fake = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([-3.0, 0.0, 2.0])
    # (0 + 0.5 + 2 + 0) / 4 and (0 + 1 + 3) / 3
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * (2.5 / 4 + 4 / 3))
    assert hinge_loss(torch.zeros(4), torch.zeros(4)).item() == 1
    assert hinge_loss(torch.ones(3), -torch.ones(3)).item() == 0


@pytest.mark.parametrize(
    ("rec", "gan", "expected"),
    [
        ([3.0, 4.0], [0.0, 2.0], 5 / 2.0001),
        ([0.3, 0.4], [0.0, 0.0], 5000.0),
        ([30.0, 40.0], [0.0, 0.0], 1e4),
        ([0.0, 0.0], [1.0, 0.0], 0.0),
    ],
)
def test_the_adaptive_weight_by_hand(rec: list[float], gan: list[float], expected: float) -> None:
    found = adaptive_weight(torch.tensor(rec, dtype=torch.float64), torch.tensor(gan, dtype=torch.float64))
    assert found.item() == pytest.approx(expected)
    assert adaptive_weight(torch.ones(3).bfloat16(), torch.ones(3).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("factor", [0.3, 30.0])
def test_the_adversarial_gradient_has_no_scale_that_the_discriminator_could_choose(factor: float, shifted: Any) -> None:
    """Logits a factor larger: lambda is that much smaller, and what reaches the autoencoder the same."""
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
        # w_D = 1/2 of the reconstruction's gradient at the last layer, whatever the discriminator says
        assert (whole - alone).norm().item() == pytest.approx(0.5 * alone.norm().item(), rel=0.05)  # type: ignore[attr-defined]
    assert weights[0] / weights[1] == pytest.approx(factor, rel=0.05)
    torch.testing.assert_close(moves[0], moves[1], rtol=0.05, atol=1e-3 * moves[0].abs().max().item())


def test_the_adaptive_weight_has_an_end(shifted: Any) -> None:
    model = shifted(small())
    with torch.no_grad():
        model.discriminator[-1].weight.zero_()
    terms = model.loss(images())
    assert terms["adaptive_weight"].item() == 1e4
    terms["loss"].backward()
    assert all(p.grad.isfinite().all() for p in sets(model)["autoencoder"])  # type: ignore[union-attr]


@pytest.mark.parametrize("net", NETS)
def test_the_last_layer_is_found_in_every_network(net: str, shifted: Any) -> None:
    """Of the output's gradient in W, by autograd; the weight is the last that the pass reads."""
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo imports what torch itself has deprecated
def test_in_a_graph_gradients_within_a_loss_are_the_same(shifted: Any) -> None:
    net = shifted(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))).double()
    scale, z = nn.Parameter(torch.tensor(0.7, dtype=torch.float64)), torch.randn(6, 3, dtype=torch.float64)

    def found(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, to_last = last_layer_vjp(net, z)
        value, g = value_and_grad(lambda p: (scale * p).square().square().mean(), out)
        return value, g, to_last(g)

    torch._dynamo.reset()
    both = found(z), torch.compile(found, backend="aot_eager", fullgraph=True)(z)
    torch._dynamo.reset()
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(theirs, mine)
    parameters = [scale, *net.parameters()]
    gradients = [torch.autograd.grad(value, parameters) for value, *_ in both]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(theirs, mine)
    assert not any(constant.requires_grad for _, *constants in both for constant in constants)
    torch.testing.assert_close(both[1][2], gradients[0][3])


def test_each_player_has_a_group_of_its_own_and_the_betas_of_the_paper_s_code() -> None:
    model = small(discriminator_lr=3e-3, lr=2e-3)
    first, second = model.configure_optimizers().param_groups
    ids = {player: {id(p) for p in part} for player, part in sets(model).items()}
    assert {id(p) for p in first["params"]} == ids["autoencoder"]
    assert {id(p) for p in second["params"]} == ids["discriminator"]
    assert (first["lr"], first["betas"], second["lr"], second["betas"]) == (2e-3, (0.5, 0.9), 3e-3, (0.5, 0.9))


@pytest.mark.parametrize("start", [0, 3, 50])
def test_its_steps_are_those_of_two_optimisers_the_second_from_the_start_on(
    start: int, shifted: Any, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six steps of the real loop against Adams by hand; before the start the model is a VAE with these terms."""
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
def test_two_ranks_are_one(settings: dict[str, Any], shifted: Any) -> None:
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


@pytest.mark.parametrize("shape", [(2, 9, 7), (1, 1, 1), (3, 11), (1, 5, 4, 3)])
def test_the_discriminator_judges_patches_of_samples_one_by_one(shape: tuple[int, ...], shifted: Any) -> None:
    net, x = PatchDiscriminator(shape, (8, 6)).double(), torch.rand(3, *shape, dtype=torch.float64)
    t = net(x)
    assert t.shape == (3, 1, *(math.ceil(math.ceil(n / 2) / 2) for n in shape[1:]))
    torch.testing.assert_close(torch.cat([net(each[None]) for each in x]), t)


def test_a_patch_s_judgement_reads_its_neighbourhood_alone() -> None:
    net, x = PatchDiscriminator((1, 32), (4,)).double(), torch.rand(1, 1, 32, dtype=torch.float64).requires_grad_()
    for i, t in enumerate(net(x)[0, 0]):
        (g,) = torch.autograd.grad(t, x, retain_graph=True)
        read = g[0, 0].nonzero()[:, 0]
        assert read.min() >= 2 * i - 3 and read.max() <= 2 * i + 3


# ---- the code's scale ------------------------------------------------------------------------------------------------


def test_the_standardiser_has_the_moments_of_all_that_it_saw() -> None:
    module, seen = Standardiser(3).double(), []
    for step in range(9):
        seen.append(torch.randn(5, 3, 4, 2, dtype=torch.float64) * (step + 1) + step)
        module.observe(seen[-1], lambda values: values.mean(0))
    codes = np.concatenate([part.numpy() for part in seen])
    np.testing.assert_allclose(module.mean_C.numpy(), codes.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(module.std_C.numpy(), codes.std((0, 2, 3)), rtol=1e-9)
    z = torch.from_numpy(codes)
    np.testing.assert_allclose(module(z).numpy().mean((0, 2, 3)), 0, atol=1e-9)
    np.testing.assert_allclose(module(z).numpy().std((0, 2, 3)), 1, rtol=1e-9)
    torch.testing.assert_close(module.restore(module(z)), z)


def test_later_its_moments_are_moving_averages_of_a_hundred_steps() -> None:
    module = Standardiser(1).double()
    z = torch.tensor([[[2.0, 4.0]]], dtype=torch.float64)  # mean 3, variance 1
    module.count.fill_(5000)
    module.observe(z, lambda values: values.mean(0))
    assert module.mean_C.item() == pytest.approx(0.03)
    # 0.99 (1 + 0) + 0.01 (1 + 9) - 0.03^2
    assert module.std_C.item() == pytest.approx(math.sqrt(0.99 + 0.1 - 0.0009))


def test_moments_of_a_model_in_bf16_move_by_less_than_its_rounding() -> None:
    """From codes of mean 1 and deviation 1 to 1.3 times that: steps of 0.003 and less, and bf16 has 1/128 about 1."""
    model = small().float().bfloat16()
    module, z = model.standardiser, torch.tensor([0.0, 2.0]).expand(2, 3, 2)
    for step in range(1500):
        module.observe(z * (1.3 if step >= 300 else 1.0), lambda values: values.mean(0))
    torch.testing.assert_close(module.mean_C, torch.full((3,), 1.3), rtol=1e-3, atol=0)
    torch.testing.assert_close(module.std_C, torch.full((3,), 1.3), rtol=1e-3, atol=0)
    assert model.eval().sample(2).dtype == module(z.bfloat16()).dtype == torch.bfloat16
    assert model.double().standardiser.mean_C.dtype == torch.float64


def test_codes_that_are_all_alike_can_be_standardised() -> None:
    module = Standardiser(2)
    module.observe(torch.ones(3, 2, 4), lambda values: values.mean(0))
    assert module(torch.ones(3, 2, 4)).abs().max() < 1e-3


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


# ---- what it takes ---------------------------------------------------------------------------------------------------


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
def test_what_cannot_work_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(AezooError, match=words):
        small(**settings)


@pytest.mark.parametrize("name", ["autoencoder_kl", "asymmetric_kl", "vqgan"])
def test_a_file_of_features_that_is_not_there_is_named_before_training(name: str, quiet: Any, tmp_path: Any) -> None:
    def began(*args: Any) -> None:
        raise AssertionError("training begins")

    model: Any = aezoo.create_model(name, (3, 8, 8), features=str(tmp_path / "gone.pth"))
    model.loss = model.init_from_data = began
    with pytest.raises(AezooError, match=r"gone\.pth"):
        quiet(max_epochs=1).fit(model, DataLoader([torch.rand(2, 3, 8, 8)], batch_size=None))  # type: ignore[arg-type]


def test_it_learns_digits_with_all_players(digits: Tensor) -> None:
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


# ---- EQ-VAE ----------------------------------------------------------------------------------------------------------


def resized(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Between the two nearest points along each axis; points are the middles of cells, which fill the same together."""
    for axis, (n, m) in enumerate(zip(x.shape[2:], grid, strict=True), start=2):
        at = ((torch.arange(m, dtype=torch.float64) + 0.5) * n / m - 0.5).clamp(0, n - 1)
        low = at.floor().long()
        share = (at - low).view(-1, *[1] * (3 - axis))
        x = (1 - share) * x.index_select(axis, low) + share * x.index_select(axis, (low + 1).clamp(max=n - 1))
    return x


def turned(x: Tensor, quarters: int) -> Tensor:
    return torch.from_numpy(np.rot90(x.detach().numpy(), quarters, (2, 3)).copy())


def tau_of_draws(model: Any) -> Tau:
    """Tau by three draws after that of the code."""

    def tau(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        share, turn, factor = (torch.rand(()).item() for _ in range(3))
        if share >= model.equivariance:
            return x, z
        quarters, factor = (1, 2, 3)[int(turn * 3)], 0.25 + 0.75 * factor
        for _ in range(quarters):  # a quarter is a transposition, and the first axis turned over
            x, z = (part.transpose(2, 3).flip(2) for part in (x, z))
        z = resized(z, tuple(max(1, round(side * factor)) for side in z.shape[2:]))
        return resized(x, model.decoder(z).shape[2:]), z

    return tau


def test_its_terms_and_gradients_are_those_of_what_is_turned_and_shrunk(shifted: Any) -> None:
    model, x = shifted(small("eq_vae", beta=0.3, perceptual_weight=0.7)), images()
    by_draws, sizes = tau_of_draws(model), set()

    def tau(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        x, z = by_draws(x, z)
        sizes.add(x.shape[2:])
        return x, z

    for seed in range(10):
        torch.manual_seed(seed)
        found = model.loss(x)
        torch.manual_seed(seed)
        for name, value in by_hand(model, x, tau).items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)
        torch.manual_seed(seed)
        expected = losses(model, x, tau=tau)
        for player, part in sets(model).items():
            mine, theirs = (torch.autograd.grad(t, part, retain_graph=True) for t in (found["loss"], expected[player]))
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert SHAPE[1:] in sizes and len(sizes) > 3


@pytest.mark.parametrize("net", ["resnet", "conv", "convnext", "conv_keras", "gdn", "dc"])
@pytest.mark.parametrize("shape", [SHAPE, (1, 8, 8), (1, 1, 13)])
def test_under_every_tau_images_have_the_size_of_what_is_decoded(net: str, shape: tuple[int, ...]) -> None:
    model, x = small("eq_vae", input_shape=shape, net=net), images(2, shape=shape)
    z, found = torch.randn(2, *model.code_shape, dtype=torch.float64), set()
    for quarters in (1, 2, 3):
        for factor in (0.25, 0.4, 0.6, 0.8, 1.0):
            tau_x, tau_z = model.transformed(x, z, quarters, factor)
            assert model.decoder(tau_z).shape == tau_x.shape
            grid = turned(z, quarters).shape[2:]
            assert tau_z.shape[2:] == tuple(max(1, round(factor * side)) for side in grid)
            torch.testing.assert_close(tau_z, resized(turned(z, quarters), tau_z.shape[2:]))
            torch.testing.assert_close(tau_x, resized(turned(x, quarters), tau_x.shape[2:]))
            found.add(tuple(tau_x.shape[2:]))
    assert len(found) > 1


class Codes(nn.Module):
    """An encoder of what a function makes of images, with a variance next to 0."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        z = self.function(x)
        return torch.cat([z, torch.full_like(z, -1e3)], 1)


class Images(nn.Module):
    """A decoder of a function, after a layer that changes nothing."""

    def __init__(self, function: Callable[[Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels, channels, 1, bias=False)
        nn.init.eye_(self.layer.weight[:, :, 0, 0])
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(self.layer(z))


def test_an_autoencoder_that_turns_and_shrinks_with_its_images_loses_nothing() -> None:
    """The identity does; one that adds to each place another number, and takes it off again, does not."""
    model: Any = small("eq_vae", input_shape=(2, 8, 8), latent_dim=2, hidden_dims=(), equivariance=1.0)
    model.likelihood = small(likelihood="laplace").likelihood
    x, places = images(shape=(2, 8, 8)), torch.arange(64.0, dtype=torch.float64).view(8, 8)
    decoder_inputs, sizes = model.decoder_inputs, []

    def noted(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        x, z = decoder_inputs(x, z)
        sizes.append(x[0].numel())
        return x, z

    model.compared = noted

    def excess(seed: int) -> float:
        torch.manual_seed(seed)
        terms = model.loss(x)
        return (terms["nll"] + terms["perceptual"]).item() - sizes[-1] * math.log(2)

    model.encoder, model.decoder = Codes(lambda x: x), Images(lambda z: z, 2).double()
    assert all(excess(seed) == pytest.approx(0, abs=1e-3) for seed in range(8))
    assert len(set(sizes)) > 3
    model.encoder = Codes(lambda x: x + places)
    model.decoder = Images(lambda z: z - places if z.shape[2:] == places.shape else z, 2).double()
    assert all(excess(seed) > 10 for seed in range(8))
    torch.testing.assert_close(model.eval()(x), x)


def test_average_pooling_turns_with_its_images_and_shrinks_with_those_of_few_parts() -> None:
    model: Any = small("eq_vae", input_shape=(1, 8, 8), hidden_dims=(4,))
    up = Images(lambda z: nn.functional.interpolate(z, scale_factor=2.0), 1).double()
    down = nn.AvgPool2d(2)
    for side, factors in ((2, (1.0,)), (4, (1.0, 0.5))):
        parts = torch.rand(3, 1, 8 // side, 8 // side, dtype=torch.float64)
        x = parts.repeat_interleave(side, 2).repeat_interleave(side, 3)
        for factor in factors:
            for quarters in (1, 2, 3):
                tau_x, tau_z = model.transformed(x, down(x), quarters, factor)
                torch.testing.assert_close(up(tau_z), tau_x)
                assert len({float(part) for part in parts.flatten()}) > 1
    tau_x, tau_z = model.transformed(x, down(x).flip(3), 1, 1.0)
    assert (up(tau_z) - tau_x).abs().max() > 0.1


@pytest.mark.parametrize("training", [True, False])
def test_without_a_share_of_steps_and_in_evaluation_it_is_the_autoencoder(training: bool, shifted: Any) -> None:
    other, x = shifted(small(beta=0.3)), images()
    model = small("eq_vae", beta=0.3, equivariance=0.0 if training else 1.0)
    model.load_state_dict(other.state_dict())
    found = []
    for each in (model.train(training), other.train(training)):
        torch.manual_seed(3)
        terms = each.loss(x)
        gradients = torch.autograd.grad(terms["loss"], [*each.parameters()])
        found.append([*terms.values(), *gradients, torch.rand(())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_tau_is_drawn_by_the_seed_of_the_step(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, drawn = small("eq_vae", equivariance=share), []
    monkeypatch.setattr(model, "transformed", lambda x, z, *tau: drawn.append(tau) or (x, z))
    x, z = torch.zeros(1), torch.zeros(1)
    for _ in range(2):
        torch.manual_seed(5)
        for _ in range(1000):
            model.decoder_inputs(x, z)
    n = len(drawn) // 2
    assert drawn[:n] == drawn[n:]
    assert abs(n / 1000 - share) < 0.05
    quarters, factors = (np.array(column) for column in zip(*drawn[:n], strict=True))
    assert all(abs((quarters == k).mean() - 1 / 3) < 0.1 for k in (1, 2, 3))
    assert 0.25 <= factors.min() < 0.27 and 0.98 < factors.max() < 1
    assert factors.mean() == pytest.approx(0.625, abs=0.05)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"input_shape": (30,)}, "turns images"),
        ({"input_shape": (3, 11)}, "turns images"),
        ({"input_shape": (1, 5, 4, 3)}, "turns images"),
        ({"net": "mlp"}, "feature map"),
        ({"net": "unet"}, "one size alone"),
        ({"net": "vit"}, "one size alone"),
        ({"net": "mixer"}, "one size alone"),
        ({"equivariance": 1.1}, "equivariance must be from 0 to 1"),
    ],
)
def test_what_eq_vae_cannot_do_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(AezooError, match=words):
        small("eq_vae", **settings)


# ---- VQGAN -----------------------------------------------------------------------------------------------------------


def small_vqgan(**settings: Any) -> Any:
    settings = {"latent_dim": 3, "codebook_size": 9, "dead_below": 0.0, "data_init": False, **settings}
    settings = {"input_shape": SHAPE, "hidden_dims": (8, 6), "discriminator_dims": (8, 8), **settings}
    return aezoo.create_model("vqgan", **settings).double()


def vqgan_by_hand(model: Any, x: Tensor) -> dict[str, Tensor]:
    """All terms and what each player minimises, live in all parameters."""
    z, codes = model.encoder(x), model.quantiser.code_KD
    rows = z.movedim(1, -1).flatten(0, -2)
    chosen = codes[(rows[:, None] - codes).square().sum(2).argmin(1)]
    z_q = chosen.unflatten(0, (len(x), *z.shape[2:])).movedim(-1, 1)
    x_hat = model.decoder(z + (z_q - z).detach())
    net = random_features(SHAPE).double()
    pairs = zip(net(x_hat), net(x), strict=True)
    perceptual = X * torch.stack([0.5 * nn.functional.mse_loss(a, b) for a, b in pairs]).sum()
    nll = -D.Laplace(x_hat, torch.ones_like(x_hat)).log_prob(x).sum((1, 2, 3)).mean()
    gan = -model.discriminator(x_hat).mean()
    rec = nll + model.perceptual_weight * perceptual
    at_w = [torch.autograd.grad(term, last_layer(model), retain_graph=True)[0].norm() for term in (rec, gan)]
    real, fake = model.discriminator(x), model.discriminator(x_hat.detach())
    terms = {
        "nll": nll,
        "perceptual": perceptual,
        "commitment": (z - z_q.detach()).square().sum((1, 2, 3)).mean(),
        "codebook": (z.detach() - z_q).square().sum((1, 2, 3)).mean(),
        "adversarial": gan,
        "adaptive_weight": (at_w[0] / (at_w[1] + 1e-4)).detach(),
        "discriminator": (torch.clamp(1 - real, min=0).mean() + torch.clamp(1 + fake, min=0).mean()) / 2,
    }
    terms["loss"] = rec + terms["codebook"] + model.beta * terms["commitment"]
    return terms


@pytest.mark.parametrize("net", NETS)
def test_vqgan_has_the_terms_and_the_gradients_of_torch_s_own(net: str, shifted: Any) -> None:
    model, x = shifted(small_vqgan(net=net, perceptual_weight=0.7, beta=0.6)), images()
    found, expected = model.loss(x), vqgan_by_hand(model, x)
    assert found.keys() == expected.keys() and 0 < expected["adaptive_weight"] < 1e4
    for name, value in expected.items():
        assert value != 0
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)
    game = model.discriminator_weight * expected["adaptive_weight"] * expected["adversarial"]
    judge = [*model.discriminator.parameters()]
    others = [p for p in model.parameters() if all(p is not q for q in judge)]
    for part, loss in ((others, expected["loss"] + game), (judge, expected["discriminator"])):
        mine = torch.autograd.grad(found["loss"], part, retain_graph=True)
        theirs = torch.autograd.grad(loss, part, retain_graph=True)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert any(p is model.quantiser.code_KD for p in others)


def test_vqgan_without_players_and_features_is_the_vq_vae(shifted: Any) -> None:
    model, x = shifted(small_vqgan(features="none", discriminator_weight=0.0)), images()
    settings: dict[str, Any] = {"latent_dim": 3, "codebook_size": 9, "dead_below": 0.0, "data_init": False}
    settings |= {"hidden_dims": (8, 6), "activation": "silu", "update": "gradient", "likelihood": "laplace"}
    other: Any = aezoo.create_model("vq_vae", SHAPE, **settings).double()
    other.load_state_dict({name: model.state_dict()[name] for name in other.state_dict()})
    mine, theirs = model.loss(x), other.loss(x)
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-12, atol=1e-12)
    mine["loss"].backward()
    theirs["loss"].backward()
    own = dict(model.named_parameters())
    for name, p in other.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(own[name].grad, p.grad, rtol=1e-9, atol=1e-12)
    assert torch.equal(model.encode_indices(x), other.encode_indices(x))


def test_before_its_start_vqgan_s_discriminator_and_what_it_says_do_nothing(shifted: Any) -> None:
    model, x = shifted(small_vqgan(discriminator_start=3)), images()
    for steps, moved in ((2, False), (3, True)):
        model.steps.fill_(steps)
        model.zero_grad()
        model.loss(x)["loss"].backward()
        assert any(bool(p.grad.any()) for p in model.discriminator.parameters()) == moved
        plain = torch.autograd.grad(vqgan_by_hand(model, x)["loss"], [*model.decoder.parameters()])
        found = [p.grad for p in model.decoder.parameters()]
        assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(found, plain, strict=True)) != moved


def test_two_ranks_of_vqgan_are_one(shifted: Any) -> None:
    model, x = shifted(small_vqgan()), images()
    whole, together = model.loss(x), on_two_ranks(model, x)
    for term, value in whole.items():
        torch.testing.assert_close(together.terms[term], value, msg=term)
    expected = torch.autograd.grad(whole["loss"], [*model.parameters()])
    for found, g in zip(together.gradients(), expected, strict=True):
        torch.testing.assert_close(found, g)
    alone = on_two_ranks(model, x, exchange=False).terms
    assert (alone["adaptive_weight"] - whole["adaptive_weight"]).abs() > 1e-3


def test_vqgan_trains_its_codes_with_the_autoencoder() -> None:
    model = small_vqgan(discriminator_lr=3e-3, lr=2e-3)
    first, second = model.configure_optimizers().param_groups
    assert {id(p) for p in second["params"]} == {id(p) for p in model.discriminator.parameters()}
    assert any(p is model.quantiser.code_KD for p in first["params"])
    assert (first["lr"], first["betas"], second["lr"], second["betas"]) == (2e-3, (0.5, 0.9), 3e-3, (0.5, 0.9))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"input_shape": (30,)}, "convolutions take"),
        ({"net": "mlp"}, "feature map"),
        ({"features": "vgg"}, "features takes none, random"),
        ({"codebook_size": 0}, "codebook_size must be at least 1"),
        ({"discriminator_start": -1}, "discriminator_start must be at least 0"),
    ],
)
def test_what_vqgan_cannot_do_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(AezooError, match=words):
        small_vqgan(**settings)
