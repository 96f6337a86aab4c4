"""Laws of the tiny autoencoder: the losses of its encoder and decoder, and its size."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributions as D
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
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


@pytest.fixture
def teacher(tmp_path: Path, shifted: Any) -> tuple[Any, str]:
    """A float64 first stage of latent diffusion with code moments, and the path where it is saved."""
    model = shifted(aezoo.create_model("autoencoder_kl", SHAPE, latent_dim=3, hidden_dims=(8, 6)))
    model.standardiser.mean_C.copy_(torch.tensor([0.5, -1.0, 2.0]))
    model.standardiser.std_C.copy_(torch.tensor([2.0, 0.5, 3.0]))
    path = save_model(model, tmp_path / "teacher")
    return model.double().eval(), str(path)


def small(**settings: Any) -> Any:
    settings = {"latent_dim": 3, "hidden_dims": (8, 6), **settings}
    return aezoo.create_model("taesd", SHAPE, **settings).double()


def target(model: Any, x: Tensor) -> Tensor:
    """The teacher's mean codes, each channel standardised."""
    mean, _ = model.double().encoder(x).detach().chunk(2, 1)
    return torch.stack([(mean[:, i] - m) / s for i, (m, s) in enumerate(((0.5, 2.0), (-1.0, 0.5), (2.0, 3.0)))], 1)


# ---- distillation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_encoder_and_decoder_have_separate_losses(training: bool, teacher: tuple[Any, str], shifted: Any) -> None:
    other, path = teacher
    model, x = shifted(small(teacher=path)).train(training), images()
    terms, z = model.loss(x), target(other, x)
    log_p = D.Normal(model.decoder(z), 0.5**0.5).log_prob(x).sum((1, 2, 3))
    off = D.Normal(torch.zeros_like(z), 1.0).log_prob(z - z) - D.Normal(z, 1.0).log_prob(model.encoder(x))
    torch.testing.assert_close(terms["nll"], -log_p.mean())
    torch.testing.assert_close(terms["code"], off.sum((1, 2, 3)).mean())
    torch.testing.assert_close(terms["loss"], terms["nll"] + terms["code"])
    assert terms.keys() == {"loss", "nll", "code"} and terms["code"] > 1


def test_losses_do_not_reach_other_half_or_teacher(teacher: tuple[Any, str], shifted: Any) -> None:
    other, path = teacher
    model, x = shifted(small(teacher=path)), images()
    halves = [[*half.parameters()] for half in (model.encoder, model.decoder)]
    terms = model.loss(x)
    for term, own, others in (("code", *halves), ("nll", *halves[::-1])):
        grads = torch.autograd.grad(terms[term], own, retain_graph=True)
        assert all(g.any() for g in grads)
        grads = torch.autograd.grad(terms[term], others, retain_graph=True, allow_unused=True)
        assert all(g is None for g in grads)
    terms["loss"].backward()
    (read,) = model.frozen
    assert all(p.grad is None and not p.requires_grad for p in read.parameters())
    assert not any(module.training for module in read.modules())
    assert all(torch.equal(p, q) for p, q in zip(read.state_dict().values(), other.state_dict().values(), strict=True))


class Given(nn.Module):
    """An encoder that returns given codes."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.z = z

    def forward(self, x: Tensor) -> Tensor:
        return self.z


def test_student_with_teacher_codes_has_zero_code_loss(teacher: tuple[Any, str], shifted: Any) -> None:
    other, path = teacher
    model, x = shifted(small(teacher=path)), images()
    z = target(other, x)
    model.encoder = Given(z)
    assert model.loss(x)["code"].item() == pytest.approx(0, abs=1e-20)
    # then the student decodes the same codes
    torch.testing.assert_close(model.loss(x)["nll"], model.score(x).mean())
    model.encoder = Given(z + 0.5)
    assert model.loss(x)["code"].item() == pytest.approx(0.125 * z[0].numel())


def test_codes_of_teacher_without_moments_are_unscaled(tmp_path: Path, shifted: Any) -> None:
    other = shifted(aezoo.create_model("conv_ae", SHAPE, latent_map=True, latent_dim=3, hidden_dims=(4, 4)))
    path = save_model(other, tmp_path / "teacher")
    model, x = small(teacher=path), images()
    torch.testing.assert_close(model.teacher_codes(x), other.double().encoder(x).detach())


@pytest.mark.slow
def test_training_approaches_teacher_codes(teacher: tuple[Any, str]) -> None:
    other, path = teacher
    torch.manual_seed(0)
    model, x = small(teacher=path).float(), images(16).float()
    z = target(other, x.double())
    optimizer: Any = torch.optim.Adam(model.parameters(), 3e-3)
    before = (model.encode(x) - z).square().mean(), model.loss(x)["nll"]
    for _ in range(40):
        optimizer.zero_grad()
        model.loss(x)["loss"].backward()
        optimizer.step()
    assert (model.encode(x) - z).square().mean() < 0.3 * before[0] and model.loss(x)["nll"] < before[1]


def test_no_teacher_equals_autoencoder(shifted: Any) -> None:
    model, x = shifted(small()), images()
    terms = model.loss(x)
    log_p = D.Normal(model.decoder(model.encoder(x)), 0.5**0.5).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(terms["nll"], -log_p.mean())
    assert terms.keys() == {"loss", "nll"} and torch.equal(terms["loss"], terms["nll"])
    assert all(g.any() for g in torch.autograd.grad(terms["loss"], [*model.parameters()]))
    assert model.frozen == ()


# ---- the teacher's file ----------------------------------------------------------------------------------------------


def test_student_is_saved_and_used_without_teacher(teacher: tuple[Any, str], tmp_path: Path) -> None:
    model, x = small(teacher=teacher[1]).float().eval(), images().float()
    model.loss(x)
    assert model.state_dict().keys() == small().state_dict().keys()
    assert len([*model.parameters()]) == len([*small().parameters()])
    saved = save_model(model, tmp_path / "student")
    Path(teacher[1]).rename(tmp_path / "gone")
    loaded = aezoo.load_model(saved)
    torch.testing.assert_close(loaded(x), model(x))
    torch.testing.assert_close(loaded.score(x), model.score(x))
    with pytest.raises(AezooError, match=r"no checkpoint at .*teacher") as error:
        loaded.loss(x)
    assert "\n" not in str(error.value)


def test_relative_teacher_path_survives_folder_change(
    teacher: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student can be built without its teacher's file, as is done when loading it."""
    monkeypatch.chdir(Path(teacher[1]).parent)
    model = small(teacher="teacher").float()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert model.loss(images().float())["code"] > 0
    Path(teacher[1]).rename(tmp_path / "gone")
    assert aezoo.load_model(save_model(model, tmp_path / "student")).teacher == teacher[1]


def test_teacher_follows_student_dtype(teacher: tuple[Any, str]) -> None:
    model, x = small(teacher=teacher[1]), images()
    assert {p.dtype for p in model.load_teacher().parameters()} == {torch.float64}
    assert {p.dtype for p in model.float().load_teacher().parameters()} == {torch.float32}
    assert model.loss(x.float())["code"].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        rounded, exact = model.encode(x.float()), model.teacher_codes(x.float())
    assert rounded.dtype == torch.bfloat16 and torch.equal(exact, model.teacher_codes(x.float()))


def test_teacher_is_loaded_before_training_and_frozen(teacher: tuple[Any, str], quiet: Any, tmp_path: Path) -> None:
    loader: Any = DataLoader([images(6, seed).float() for seed in range(2)], batch_size=None)  # type: ignore[arg-type]
    model = small(teacher=teacher[1]).float()
    other = copy.deepcopy(teacher[0]).float().state_dict()
    quiet(max_epochs=1).fit(model, loader)
    assert all(torch.equal(p, other[name]) for name, p in model.frozen[0].state_dict().items())
    assert not any(p.requires_grad for p in model.frozen[0].parameters())

    def began(*args: Any) -> None:
        raise AssertionError("training begins")

    model = small(teacher=str(tmp_path / "none")).float()
    model.loss = began
    with pytest.raises(AezooError, match=r"no checkpoint at .*none: give"):
        quiet(max_epochs=1).fit(model, loader)


@pytest.mark.slow
def test_resumed_run_with_teacher_matches_uninterrupted_run(
    teacher: tuple[Any, str], quiet: Any, tmp_path: Path
) -> None:
    loader: Any = DataLoader([images(6, seed).float() for seed in range(2)], batch_size=None)  # type: ignore[arg-type]
    ends = []
    for epochs in ((2,), (1, 2)):
        for n in epochs:
            torch.manual_seed(0)
            model, trainer = small(teacher=teacher[1]).float(), quiet(max_epochs=n)
            trainer.fit(model, loader, ckpt_path=tmp_path / "run.ckpt" if n > epochs[0] else None)
            trainer.save_checkpoint(tmp_path / "run.ckpt")
        ends.append(model.state_dict())
    assert all(torch.equal(p, ends[1][name]) for name, p in ends[0].items())


@pytest.mark.parametrize("student", [{"latent_dim": 4}, {"hidden_dims": (8,)}])
def test_teacher_with_other_code_shape_is_refused(student: dict[str, Any], teacher: tuple[Any, str]) -> None:
    with pytest.raises(AezooError, match=r"teacher: .*, \(3, 3, 2\)\), not .*: set latent_dim and hidden") as error:
        small(teacher=teacher[1], **student).loss(images())
    assert "\n" not in str(error.value)


def test_teacher_with_other_input_shape_is_refused(tmp_path: Path) -> None:
    for name, shape, settings in (
        ("autoencoder_kl", (3, 9, 7), {"hidden_dims": (4, 4)}),
        ("vae", (2, 10, 7), {}),  # this model cannot be built at another size
    ):
        other = aezoo.create_model(name, shape, latent_dim=3, **settings)
        path = save_model(other, tmp_path / name)
        with pytest.raises(AezooError, match=r"teacher: .* has shapes .* not \(\(2, 9, 7\)"):
            small(teacher=path).loss(images())


def test_teacher_of_other_size_is_rebuilt_at_input_size(tmp_path: Path) -> None:
    other = aezoo.create_model("autoencoder_kl", (2, 12, 20), latent_dim=3, hidden_dims=(4, 4)).double().eval()
    path = save_model(other, tmp_path / "teacher")
    found = small(teacher=path).teacher_codes(images())
    with torch.no_grad():
        torch.testing.assert_close(found, aezoo.at_size(other, (9, 7)).encode(images()))


@pytest.mark.parametrize("name", ["", "autoencoder_kl", "hf://user/name"])
def test_invalid_teacher_path_is_refused(name: str) -> None:
    words = "is not downloaded, since this setting" if "://" in name else "teacher takes none or the path"
    with pytest.raises(AezooError, match=words):
        small(teacher=name).loss(images())


# ---- number of parameters --------------------------------------------------------------------------------------------


def test_full_size_parameter_count_matches_original() -> None:
    """As in https://github.com/madebyollin/taesd/blob/main/taesd.py, counted layer by layer."""
    model: Any = aezoo.create_model("taesd", (3, 64, 64), hidden_dims=(64, 64, 64))
    assert model.code_shape == (4, 8, 8)

    def conv(n_in: int, n_out: int, bias: bool = True) -> int:
        return 9 * n_in * n_out + bias * n_out

    inner = 10 * 3 * conv(64, 64) + 3 * conv(64, 64, bias=False)
    expected = [conv(3, 64) + inner + conv(64, 4), conv(4, 64) + inner + conv(64, 3)]
    assert expected == [1_222_532, 1_222_531]
    assert [sum(p.numel() for p in half.parameters()) for half in (model.encoder, model.decoder)] == expected


def test_encoder_and_decoder_match_original_layers(shifted: Any) -> None:
    """By torch's functions: 1, 3, 3 blocks down and 3, 3, 1 up, each relu(x + 3 convolutions); nearest upsampling."""
    model, x = shifted(small()), images()
    F = nn.functional
    parameters = [*model.encoder.parameters()]

    def conv(h: Tensor, stride: int = 1, bias: bool = True) -> Tensor:
        weight = parameters.pop(0)
        return F.conv2d(h, weight, parameters.pop(0) if bias else None, stride=stride, padding=1)

    def block(h: Tensor) -> Tensor:
        return F.relu(h + conv(F.relu(conv(F.relu(conv(h))))))

    h = block(conv(x))
    for _ in range(2):
        h = block(block(block(conv(h, 2, bias=False))))
    z = conv(h)
    assert not parameters
    torch.testing.assert_close(model.encode(x), z)
    parameters = [*model.decoder.parameters()]
    z = 3 * z
    assert z.abs().max() > 3
    h = F.relu(conv(3 * torch.tanh(z / 3)))
    for grid in ((5, 4), (9, 7)):
        h = block(block(block(h)))
        h = conv(h.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : grid[0], : grid[1]], bias=False)
    found = conv(block(h))
    assert not parameters
    torch.testing.assert_close(model.decode(z), found)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"input_shape": (30,)}, "convolutions take"),
        ({"latent_dim": 0}, "latent_dim must be at least 1"),
        ({"hidden_dims": (8, 0)}, "hidden_dims must be whole numbers above 0"),
        ({"activation": "gated"}, "activation"),
    ],
)
def test_unsupported_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(AezooError, match=words):
        aezoo.create_model("taesd", **{"input_shape": SHAPE, **settings})
