"""Laws of the representation autoencoder: frozen encoder, moments of codes, noise, and gradients of each player."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributions as D
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from latent_diffusion_laws import (
    SHAPE,
    images,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import aezoo
from aezoo.errors import AezooError
from aezoo.io.checkpoint import save_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

TEACHERS: dict[str, dict[str, Any]] = {
    "mae": {"patch_size": 3, "width": 6, "depth": 1, "decoder_width": 4},
    "simmim": {"patch_size": 3, "width": 6, "depth": 1},
    "vae": {"latent_dim": 5, "hidden_dims": (8,)},
    "autoencoder_kl": {"latent_dim": 3, "hidden_dims": (8, 6)},
}


def taught(name: str, folder: Path, shifted: Any) -> tuple[Any, dict[str, Any]]:
    """A float64 model of the zoo, and the arguments that refer to it."""
    torch.manual_seed(1)
    model = shifted(aezoo.create_model(name, SHAPE, **TEACHERS[name]))
    path = save_model(model, folder / name)
    return model.double().eval(), {"teacher": str(path), "code_shape": model.code_shape}


@pytest.fixture
def teacher(tmp_path: Path, shifted: Any) -> tuple[Any, dict[str, Any]]:
    return taught("mae", tmp_path, shifted)


def small(**settings: Any) -> Any:
    how = {"width": 12, "depth": 1, "discriminator_dims": (4,), **settings}
    return aezoo.create_model("representation_ae", SHAPE, **how).double()


def rows(codes: Tensor) -> Tensor:
    """The values of each channel: (B, C, ...) -> (C, N)."""
    return codes.transpose(0, 1).flatten(1)


def size(value: Tensor, of: list[nn.Parameter]) -> float:
    """The norm of a gradient, or 0 without one."""
    found = torch.autograd.grad(value, of, allow_unused=True, retain_graph=True)
    return math.sqrt(sum(float((g**2).sum()) for g in found if g is not None))


# ---- the encoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEACHERS)
def test_codes_are_standardised_teacher_codes(name: str, tmp_path: Path, shifted: Any) -> None:
    other, how = taught(name, tmp_path, shifted)
    model, x = small(**how).eval(), images(20)
    codes = other.encode(x).detach()
    torch.testing.assert_close(model.encode(x), codes)
    mean, std = torch.rand(len(codes[0])) - 0.5, torch.rand(len(codes[0])) + 0.5
    model.normaliser.mean_C.copy_(mean)
    model.normaliser.std_C.copy_(std)
    expected = torch.stack([(codes[:, i] - m) / s for i, (m, s) in enumerate(zip(mean, std, strict=True))], 1)
    torch.testing.assert_close(model.encode(x), expected)
    torch.testing.assert_close(model(x), model.likelihood.mean(model.decoder(expected)))
    assert model.code_shape == other.code_shape and model(x).shape == x.shape


@pytest.mark.parametrize("name", ["mae", "vae", "none"])
def test_fit_does_not_change_encoder(name: str, tmp_path: Path, shifted: Any, quiet: Any) -> None:
    loader: Any = DataLoader([images(6, seed).float() for seed in range(3)], batch_size=None)  # type: ignore[arg-type]
    how: dict[str, Any] = {}
    if name != "none":
        _, how = taught(name, tmp_path, shifted)
    model = small(**how, lr=1e-2, weight_decay=0.1, optimizer="adamw").float()
    encoder = model.encoder if name == "none" else model.load_teacher()
    before, decoder = copy.deepcopy(encoder.state_dict()), copy.deepcopy(model.decoder.state_dict())
    quiet(max_epochs=1).fit(model, loader)
    assert all(torch.equal(p, encoder.state_dict()[key]) for key, p in before.items()) and before
    assert not any(p.requires_grad or p.grad is not None for p in encoder.parameters())
    assert not all(torch.equal(p, model.decoder.state_dict()[key]) for key, p in decoder.items())
    if name != "none":
        assert not any(module.training for module in model.train().load_teacher().modules())


def test_the_optimiser_has_only_decoder_and_discriminator(teacher: tuple[Any, dict[str, Any]]) -> None:
    for how in ({}, teacher[1]):
        model = small(**how, discriminator_lr=3e-3, likelihood="laplace:learned")
        model.loss(images())
        first, last = model.configure_optimizers().param_groups
        parts = [*model.decoder.parameters(), *model.likelihood.parameters()]
        assert {id(p) for p in first["params"]} == {id(p) for p in parts} and len(first["params"]) == len(parts)
        assert [id(p) for p in last["params"]] == [id(p) for p in model.discriminator.parameters()]
        assert (first["lr"], first["betas"], last["lr"], last["betas"]) == (1e-3, (0.5, 0.9), 3e-3, (0.5, 0.9))


def test_encoder_without_teacher_is_seeded_and_saved(tmp_path: Path) -> None:
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(small().float().eval())
    x = images().float()
    assert torch.equal(models[0].encode(x), models[1].encode(x))
    assert not torch.equal(models[0].encode(x), models[2].encode(x))
    loaded = aezoo.load_model(save_model(models[0], tmp_path / "saved"))
    assert torch.equal(loaded.encode(x), models[0].encode(x))


def test_saved_model_excludes_teacher_and_decodes_without_it(
    teacher: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    model, x = small(**teacher[1]).float(), images().float()
    model.loss(x)
    model.eval()
    assert not any(key.startswith("encoder") for key in model.state_dict())
    saved = save_model(model, tmp_path / "saved")
    loaded, z = aezoo.load_model(saved), model.encode(x)
    torch.testing.assert_close(loaded.encode(x), z)
    torch.testing.assert_close(loaded.score(x), model.score(x))
    Path(teacher[1]["teacher"]).rename(tmp_path / "gone")
    loaded = aezoo.load_model(saved)
    torch.testing.assert_close(loaded.decode(z), model.decode(z))
    for call in (loaded.encode, loaded.loss):
        with pytest.raises(AezooError, match=r"no checkpoint at .*mae") as error:
            call(x)
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_resumed_run_with_teacher_matches_uninterrupted_run(
    teacher: tuple[Any, dict[str, Any]], quiet: Any, tmp_path: Path
) -> None:
    loader: Any = DataLoader([images(6, seed).float() for seed in range(2)], batch_size=None)  # type: ignore[arg-type]
    ends = []
    for epochs in ((2,), (1, 2)):
        for n in epochs:
            torch.manual_seed(0)
            model, trainer = small(**teacher[1], discriminator_start=3).float(), quiet(max_epochs=n)
            trainer.fit(model, loader, ckpt_path=tmp_path / "run.ckpt" if n > epochs[0] else None)
            trainer.save_checkpoint(tmp_path / "run.ckpt")
        ends.append(model.state_dict())
    assert all(torch.equal(p, ends[1][name]) for name, p in ends[0].items())


# ---- moments of codes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mae", "vae", "none"])
def test_training_codes_are_standardised(name: str, tmp_path: Path, shifted: Any, quiet: Any) -> None:
    """Batches have different means, so the moments are those of both epochs."""
    batches = [(seed + 1) / 4 * images(6, seed).float() for seed in range(4)]
    how: dict[str, Any] = {} if name == "none" else taught(name, tmp_path, shifted)[1]
    model = small(**how).float()
    quiet(max_epochs=2).fit(model, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    model.eval()
    codes = rows(model.encode(torch.cat(batches)).detach())
    torch.testing.assert_close(codes.mean(1), torch.zeros(len(codes)), rtol=0, atol=2e-3)
    torch.testing.assert_close(codes.std(1, unbiased=False), torch.ones(len(codes)), rtol=2e-3, atol=0)
    assert model.normaliser.count == 8


def test_normaliser_weighs_batches_equally(teacher: tuple[Any, dict[str, Any]]) -> None:
    """After 399 batches of mean 0 and variance 1, the next one has a weight of 1 / 400."""
    other, how = teacher
    model, x = small(**how), images()
    model.normaliser.count.fill_(399)
    model.loss(x)
    codes = rows(other.encode(x).detach())
    torch.testing.assert_close(model.normaliser.mean_C, codes.mean(1) / 400)
    second = (399 + codes.square().mean(1)) / 400
    torch.testing.assert_close(model.normaliser.std_C, (second - (codes.mean(1) / 400) ** 2).sqrt())


def test_evaluation_does_not_update_moments(teacher: tuple[Any, dict[str, Any]]) -> None:
    model = small(**teacher[1]).eval()
    model.loss(images())
    assert model.normaliser.count == 0 and not model.normaliser.mean_C.any()
    model.train().loss(images())
    assert model.normaliser.count == 1 and model.normaliser.mean_C.all()


# ---- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_noise_scale_is_half_normal_tau() -> None:
    """Moments of n = sigma e with sigma ~ |N(0, tau^2)|, e ~ N(0, I) are products of those of sigma and e.

    E n = 0, E |n| = tau 2 / pi, E n^2 = tau^2, E n^4 = 9 tau^4, and for two positions of a sample E n^2 m^2 = 3 tau^4,
    which would be tau^4 if each position had its own sigma. Bounds are 4 standard errors.
    """
    tau, n = 0.6, 200_000
    model = small(tau=tau)
    torch.manual_seed(0)
    z = torch.randn(n, 2, 1, 1, dtype=torch.float64)
    noise = (model.noised(z) - z).flatten(1)
    one, two = noise.T
    wanted = [(one, 0.0), (one.abs(), tau * 2 / math.pi), (one**2, tau**2), (one**4, 9 * tau**4)]
    wanted += [(one**2 * two**2, 3 * tau**4), (one * two, 0.0)]
    for values, mean in wanted:
        assert abs(values.mean().item() - mean) < 4 * values.std().item() / math.sqrt(n)
    # the mean square of many positions is sigma^2, and sigma is half-normal
    sigma = (model.noised(torch.zeros(2000, 1, 50, 50, dtype=torch.float64)).flatten(1) ** 2).mean(1).sqrt()
    for share in (0.1, 0.5, 0.9):
        below = D.HalfNormal(tau).icdf(torch.tensor(share)).item()
        assert (sigma < below).double().mean().item() == pytest.approx(share, abs=0.045)


@pytest.mark.parametrize("name", ["mae", "vae"])
def test_tau_0_gives_equal_training_and_evaluation_loss(name: str, tmp_path: Path, shifted: Any) -> None:
    _, how = taught(name, tmp_path, shifted)
    model, x = shifted(small(**how, tau=0.0)), images()
    trained = model.train().loss(x)
    # evaluation uses the moments updated by the training step
    evaluated = model.eval().loss(x)
    for term, value in trained.items():
        torch.testing.assert_close(evaluated[term], value, rtol=1e-5, atol=1e-6)
    z = torch.rand(3, 2, 2)
    assert torch.equal(model.noised(z), z)


def test_the_decoder_receives_noise_only_in_training(teacher: tuple[Any, dict[str, Any]], shifted: Any) -> None:
    model, x = shifted(small(**teacher[1], tau=0.7)), images()
    seen: list[Tensor] = []
    model.decoder.register_forward_hook(lambda module, given, out: seen.append(given[0].detach()))
    model.decoder(model.encode(x))
    for seed in (1, 2):
        torch.manual_seed(seed)
        model.eval().loss(x)
    first = seen[0]
    assert all(torch.equal(z, first) for z in seen[1:])
    seen.clear()
    for seed in (1, 2):
        torch.manual_seed(seed)
        model.train().loss(x)
    torch.manual_seed(2)
    sigma, n = torch.randn(len(x), 1, 1, 1, dtype=torch.float64), torch.randn(first.shape, dtype=torch.float64)
    torch.testing.assert_close(seen[1], model.encode(x) + 0.7 * sigma.abs() * n)
    assert (seen[0] - seen[1]).abs().max() > 0.1


# ---- the loss and its players ----------------------------------------------------------------------------------------


def by_hand(model: Any, x: Tensor) -> dict[str, Tensor]:
    """The reconstruction terms and both players' losses in evaluation, differentiable."""
    x_hat = model.decoder(model.encode(x))
    log_p = D.Laplace(x_hat, 1.0).log_prob(x).sum((1, 2, 3))
    pairs = zip(model.distance.read()(x_hat), model.distance.read()(x), strict=True)
    perceptual = x[0].numel() * sum((a - b).square().flatten(1).mean(1) / 2 for a, b in pairs)
    real, fake = model.discriminator(x), model.discriminator(x_hat)
    return {
        "nll": -log_p.mean(),
        "perceptual": perceptual.mean(),  # type: ignore[union-attr]
        "adversarial": -fake.mean(),
        "discriminator": ((1 - real).relu().mean() + (1 + fake).relu().mean()) / 2,
    }


@pytest.mark.parametrize("start", [0, 5])
def test_single_backward_gives_each_network_its_gradient(
    start: int, teacher: tuple[Any, dict[str, Any]], shifted: Any
) -> None:
    weights = {"perceptual_weight": 0.3, "discriminator_weight": 0.6, "discriminator_start": start}
    model, x = shifted(small(**teacher[1], **weights)).eval(), images()
    terms, hand = model.loss(x), by_hand(model, x)
    terms["loss"].backward()
    for term, value in hand.items():
        torch.testing.assert_close(terms[term], value)
    R = hand["nll"] + 0.3 * hand["perceptual"]
    torch.testing.assert_close(terms["loss"], R)
    last = model.decoder[-2].weight
    norms = [torch.autograd.grad(value, last, retain_graph=True)[0].norm() for value in (R, hand["adversarial"])]
    weight = norms[0] / (norms[1] + 1e-4)
    torch.testing.assert_close(terms["adaptive_weight"], weight)
    late = start > 0
    wanted = R if late else R + 0.6 * weight.detach() * hand["adversarial"]
    decoder, judge = [*model.decoder.parameters()], [*model.discriminator.parameters()]
    for p, g in zip(decoder, torch.autograd.grad(wanted, decoder, retain_graph=True), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=1e-9)
    for p, g in zip(judge, torch.autograd.grad(hand["discriminator"], judge), strict=True):
        torch.testing.assert_close(p.grad, 0 * g if late else g, rtol=1e-6, atol=1e-9)
    assert all(p.grad is None for p in model.load_teacher().parameters())


@pytest.mark.parametrize("scale", [1e-3, 0.0])
def test_lambda_is_capped_relative_to_mean_loss(scale: float, shifted: Any) -> None:
    """The authors cap lambda at 1e4 for a mean over the X values, that is, at 1e4 X for a sum."""
    model, x = shifted(small(perceptual_weight=1.0 if scale else 1e4)).eval(), images()
    with torch.no_grad():
        model.discriminator[-1].weight *= scale
    hand, X = by_hand(model, x), x[0].numel()
    players = (hand["nll"] + model.perceptual_weight * hand["perceptual"]) / X, hand["adversarial"]
    of_R, of_G = (torch.autograd.grad(p, model.decoder[-2].weight, retain_graph=True)[0].norm() for p in players)
    uncapped = (of_R / (of_G + 1e-4)).item()
    assert (uncapped > 1e4) == (scale == 0) and X * uncapped > 2e4
    assert model.loss(x)["adaptive_weight"].item() == pytest.approx(X * min(uncapped, 1e4))


def test_no_term_reaches_other_networks(shifted: Any) -> None:
    model, x = shifted(small()), images()
    terms = model.loss(x)
    parts = {"decoder": [*model.decoder.parameters()], "discriminator": [*model.discriminator.parameters()]}
    for term in ("nll", "perceptual", "adversarial", "discriminator"):
        for name, part in parts.items():
            assert (size(terms[term], part) > 1e-6) == ((name == "discriminator") == (term == "discriminator"))
    assert not any(p.requires_grad for p in model.encoder.parameters())


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [1, 2, 3, 4, 5, 8, 9])
def test_each_code_position_is_one_decoder_token(patch: int) -> None:
    other = aezoo.create_model("mae", SHAPE, patch_size=patch, width=4, depth=1, mask_ratio=0.6) if patch < 9 else None
    code_shape = (4, 1, 1) if other is None else other.code_shape
    model = small(code_shape=code_shape)
    assert model.code_shape == code_shape and model.decoder[2].table_ND.shape == (math.prod(code_shape[1:]), 12)
    assert model(images()).shape == (len(images()), *SHAPE)


def test_default_code_shape_matches_mae() -> None:
    for shape in ((1, 28, 28), (3, 32), (1, 5, 6, 7)):
        assert aezoo.create_model("representation_ae", shape).code_shape == aezoo.create_model("mae", shape).code_shape


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"input_shape": (30,)}, "patches need samples"),
        ({"code_shape": (4, 3)}, r"code_shape takes \(C,\), or C and 2 sides"),
        ({"code_shape": (4, 0, 3)}, "code_shape takes"),
        ({"code_shape": (4, 4, 4)}, "a code of shape .* does not fit"),
        ({"code_shape": (4, 90, 90)}, "a code of shape .* does not fit"),
        ({"tau": -0.1}, "tau must be at least 0"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"teacher": "mae"}, "teacher takes none or the path"),
    ],
)
def test_unsupported_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(AezooError, match=words) as error:
        aezoo.create_model("representation_ae", **{"input_shape": SHAPE, **settings})
    assert "\n" not in str(error.value)


def test_teacher_with_other_code_shape_is_refused(teacher: tuple[Any, dict[str, Any]]) -> None:
    with pytest.raises(AezooError, match=r"teacher: .*, \(6, 3, 3\)\), not .*: set code_shape to match") as error:
        small(teacher=teacher[1]["teacher"]).loss(images())
    assert "\n" not in str(error.value)
