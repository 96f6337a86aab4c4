"""Optimisers by name, and learning rates in a real Trainer compared with torch's schedulers."""

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from quiet_trainer import quiet_trainer
from torch.optim import lr_scheduler as S
from torch.utils.data import DataLoader, IterableDataset

import aezoo
from aezoo.errors import AezooError
from aezoo.training.optimizers import OPTIMIZERS, SCHEDULES, align, build

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
LR = 0.05


class Rates(pl.Callback):
    """The learning rate of each optimiser step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def rates(
    loader: Any = None, settings: dict[str, Any] | None = None, callbacks: tuple[Any, ...] = (), **hyperparameters: Any
) -> list[float]:
    """Train linear_ae with 10 batches per epoch; returns the learning rate of every step."""
    model = aezoo.create_model("linear_ae", input_shape=(3,), latent_dim=1, lr=LR, **hyperparameters)
    callback = Rates()
    trainer = quiet_trainer(**{"callbacks": [callback, *callbacks], **(settings or {"max_epochs": 2})})
    trainer.fit(model, DataLoader(torch.rand(40, 3), batch_size=4) if loader is None else loader)
    assert trainer.global_step == len(callback.seen)
    return callback.seen


def expected(name: str, steps: int, warmup: int = 0) -> list[float]:
    """The rates of torch's scheduler of that name after torch's linear warm-up."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], LR)
    rest = steps - warmup
    schedule: Any = {
        "constant": lambda: S.ConstantLR(optimizer, 1.0),
        "cosine": lambda: S.CosineAnnealingLR(optimizer, rest),
        "linear": lambda: S.PolynomialLR(optimizer, rest, power=1.0),
        "exponential": lambda: S.ExponentialLR(optimizer, 1e-3 ** (1 / rest)),
        "step": lambda: S.MultiStepLR(optimizer, [math.ceil(rest / 2), math.ceil(3 * rest / 4)], gamma=0.1),
        "multistep:0.63@0.1,0.35,0.9": lambda: S.MultiStepLR(
            optimizer, [math.ceil(p * rest) for p in (0.1, 0.35, 0.9)], gamma=0.63
        ),
    }[name]()
    tail = []
    for _ in range(rest):
        tail.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [LR * (i + 1) / (warmup + 1) for i in range(warmup)] + tail


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("name", [*SCHEDULES, "multistep:0.63@0.1,0.35,0.9"])
def test_learning_rate_follows_named_schedule(name: str, warmup: int) -> None:
    found = rates(lr_schedule=name, warmup_steps=warmup)
    assert found == pytest.approx(expected(name, 20, warmup), rel=1e-6)
    assert max(found) == pytest.approx(LR)
    if warmup:
        assert found[0] == pytest.approx(LR / 6)  # not 0, so that the first step has an effect
    if name == "cosine":
        assert found[-1] < 0.02 * LR


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, 6),  # the last batches of an epoch are a step as well
        ({"max_epochs": 2, "accumulate_grad_batches": 5}, 4),
        ({"max_steps": 13, "max_epochs": -1}, 13),
        ({"max_steps": 13}, 13),
        ({"max_epochs": 2, "max_steps": 13}, 13),
        ({"max_epochs": 1, "max_steps": 50}, 10),
        ({"max_epochs": 3, "limit_train_batches": 4}, 12),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, 15),
    ],
    ids=str,
)
def test_the_schedule_ends_with_the_training(settings: dict[str, Any], steps: int) -> None:
    found = rates(settings=settings, lr_schedule="cosine", warmup_steps=2)
    assert found == pytest.approx(expected("cosine", steps, 2), rel=1e-6)


@pytest.mark.parametrize(
    ("scheduling", "settings", "steps"),
    [
        ({0: 1, 2: 4}, {"max_epochs": 5}, 29),
        ({1: 5, 3: 2}, {"max_epochs": 4}, 19),
        ({0: 3, 7: 1}, {"max_epochs": 2}, 8),
        ({0: 1, 1: 10}, {"max_epochs": 9, "max_steps": 12}, 12),
    ],
    ids=str,
)
def test_schedule_ends_with_changing_accumulation(
    scheduling: dict[int, int], settings: dict[str, Any], steps: int
) -> None:
    """With the accumulation of the current epoch alone, the schedule would end after half of the steps."""
    found = rates(settings=settings, callbacks=(GradientAccumulationScheduler(scheduling),), lr_schedule="cosine")
    assert found == pytest.approx(expected("cosine", steps), rel=1e-6)


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        while True:
            yield torch.rand(3)


def test_a_schedule_without_an_end_is_refused() -> None:
    with pytest.raises(AezooError, match="needs a last step"):
        rates(settings={"max_epochs": -1, "max_steps": -1}, lr_schedule="cosine")
    with pytest.raises(AezooError, match="max_steps"):
        rates(DataLoader(Endless(), batch_size=4), {"max_epochs": 1}, lr_schedule="cosine")


@pytest.mark.parametrize("settings", [{"max_steps": 6}, {"max_epochs": 5, "max_steps": 6}], ids=str)
def test_schedule_of_unsized_stream_ends_at_max_steps(settings: dict[str, Any]) -> None:
    found = rates(DataLoader(Endless(), batch_size=4), settings, lr_schedule="linear")
    assert found == pytest.approx(expected("linear", 6), rel=1e-6)


def test_constant_schedule_needs_no_end() -> None:
    assert rates() == [LR] * 20
    with_warmup = rates(DataLoader(Endless(), batch_size=4), {"max_steps": 6}, warmup_steps=3)
    assert with_warmup == pytest.approx(expected("constant", 6, 3))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_torch_classes_and_lower_loss(name: str) -> None:
    torch.manual_seed(0)
    model = aezoo.create_model("linear_ae", input_shape=(3,), latent_dim=1, lr=1e-3, optimizer=name, weight_decay=0.01)
    optimizer = model.configure_optimizers()
    assert type(optimizer).__name__.lower() == name
    assert type(optimizer).__module__.startswith("torch.optim")
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.01)
    assert len(group["params"]) == len(list(model.parameters()))
    assert group.get("momentum", 0.9) in (0.9, 0)
    assert name != "sgd" or group["momentum"] == 0.9
    x, losses = torch.rand(32, 3), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model.loss(x)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_at_any_precision(precision: str) -> None:
    """Lightning refuses to clip with fused optimisers if there could be a gradient scaler."""
    found = rates(settings={"max_epochs": 1, "gradient_clip_val": 0.1, "precision": precision})
    assert len(found) == 10


WITH_BETAS = ("adam", "adamw", "adamax", "nadam", "radam")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_settings_match_torch(name: str) -> None:
    usual = OPTIMIZERS[name]([torch.nn.Parameter(torch.zeros(1))]).defaults
    cases: list[tuple[str, dict[str, Any]]] = [("", {})]
    if name != "sgd":
        cases += [(":eps=1e-4", {"eps": 1e-4})]
    if name in WITH_BETAS:
        first, second = usual["betas"]
        cases += [(":beta1=0.5", {"betas": (0.5, second)}), (":beta2=0", {"betas": (first, 0.0)})]
        cases += [(":beta2=0.9,eps=1e-4,beta1=0.2", {"betas": (0.2, 0.9), "eps": 1e-4})]
    for text, given in cases:
        model = aezoo.create_model("linear_ae", input_shape=(3,), optimizer=name + text)
        optimizer = model.configure_optimizers()
        assert type(optimizer).__name__.lower() == name
        for of in (optimizer.defaults, optimizer.param_groups[0]):
            assert {key: of[key] for key in usual if key in ("eps", "betas")} == {
                key: given.get(key, usual[key]) for key in usual if key in ("eps", "betas")
            }


@pytest.mark.parametrize("text", ["adam:beta1=0.5,beta2=0.9", "adamw:beta1=0,eps=1e-3", "adamax:beta2=0.5"])
def test_fit_with_optimizer_settings_matches_torch(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop calls kernels itself, with the settings of the parameter groups."""
    name, _, rest = text.partition(":")
    given = {key: float(value) for key, value in (part.split("=") for part in rest.split(","))}
    x, ends = torch.rand(40, 3), []
    for ours in (True, False):
        torch.manual_seed(0)
        model = aezoo.create_model("linear_ae", input_shape=(3,), latent_dim=1, lr=LR, optimizer=text)
        if ours:
            quiet_trainer(max_epochs=2).fit(model, DataLoader(x, batch_size=4))
        else:
            betas = (given.get("beta1", 0.9), given.get("beta2", 0.999))
            settings: dict[str, Any] = {"betas": betas, "eps": given.get("eps", 1e-8), "weight_decay": 0.0}
            optimizer = OPTIMIZERS[name](model.parameters(), LR, **settings)
            for batch in [*x.split(4)] * 2:
                optimizer.zero_grad()
                model.loss(batch)["loss"].backward()
                optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"optimizer": "adamm"}, "unknown optimizer 'adamm'"),
        ({"optimizer": "adamm:eps=1e-4"}, "unknown optimizer 'adamm:eps=1e-4'"),
        *(
            ({"optimizer": f"adam:{rest}"}, "cannot be read")
            for rest in ("", "1e-4", "eps=x", "eps=0", "eps=nan", "beta=1", "beta1=1", "beta1=-0.1", "beta2=nan")
        ),
        *(
            ({"optimizer": f"adam:{rest}"}, "adam takes eps, beta1, beta2, such as")
            for rest in ("eps=1e-4,", "beta1=0.5,beta1=0.5", "beta1=0.5;eps=1e-4", "betas=0.5")
        ),
        ({"optimizer": "sgd:eps=1e-4"}, "sgd takes none"),
        ({"optimizer": "sgd:beta1=0.5"}, "sgd takes none"),
        ({"optimizer": "rmsprop:beta1=0.5"}, "rmsprop takes eps, such as"),
        *(
            ({"lr_schedule": f"multistep{rest}"}, "cannot be read")
            for rest in ("", ":0.1", ":a@0.5", ":0.1@2", ":0@0.5")
        ),
        ({"lr_schedule": "cosin"}, "unknown lr_schedule 'cosin'"),
        ({"lr": 0.0}, "lr must"),
        ({"lr": -1e-3}, "lr must"),
        ({"lr": math.nan}, "lr takes a finite number"),
        ({"lr": math.inf}, "lr takes a finite number"),
        ({"weight_decay": -0.1}, "weight_decay must"),
        ({"weight_decay": math.nan}, "weight_decay takes a finite number"),
        ({"warmup_steps": -1}, "warmup_steps must"),
    ],
    ids=str,
)
def test_invalid_optimizer_values_are_refused_in_one_line(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(AezooError, match=word) as error:
        aezoo.create_model("dense_ae", input_shape=(3,), **settings)
    assert "\n" not in str(error.value)


def test_custom_parameter_groups_are_kept() -> None:
    class TwoRates(aezoo.model_class("linear_ae")):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.encoder.parameters(), "lr": 1e-2}, {"params": self.decoder.parameters()}]
            return torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.1)

    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(TwoRates(input_shape=(3,), latent_dim=1), DataLoader(torch.rand(8, 3), batch_size=4))
    found = [(group["lr"], group["weight_decay"]) for group in trainer.optimizers[0].param_groups]
    assert found == [(1e-2, 0.1), (1e-4, 0.1)]


def test_restored_moments_take_the_layout_of_their_parameters():
    """A fused kernel reads parameters and moments in memory order, so their layouts must be equal."""
    weight = torch.nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    moment = optimizer.state[weight]["exp_avg"].clone(memory_format=torch.contiguous_format)
    optimizer.state[weight]["exp_avg"] = moment
    assert moment.stride() != weight.stride()
    align(optimizer)
    assert optimizer.state[weight]["exp_avg"].stride() == weight.stride()
    assert torch.equal(optimizer.state[weight]["exp_avg"], moment)
    assert int(optimizer.state[weight]["step"]) == 1


FUSED = ("adam", "adamw", "adagrad", "sgd")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_kernel_is_used_where_torch_has_one(name: str) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    assert bool(build(name, [weight], 0.1, 0.0).defaults.get("fused")) == (name in FUSED)
    assert not build(name, [weight], 0.1, 0.0, fused=False).defaults.get("fused")
    assert not build(name, [torch.nn.Parameter(torch.ones(2, device="meta"))], 0.1, 0.0).defaults.get("fused")


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def test_fused_kernel_matches_plain_steps(name: str, memory_format: torch.memory_format) -> None:
    ends = []
    for fused in (True, False):
        weights = [torch.nn.Parameter(torch.linspace(-1, 1, 54).view(2, 3, 3, 3)), torch.nn.Parameter(torch.ones(5))]
        optimizer = build(f"{name}:eps=1e-3" if name != "sgd" else name, weights, 0.1, 0.01, fused=fused)
        # the layout changes after the optimiser is created, as in a fit
        weights[0].data = weights[0].data.contiguous(memory_format=memory_format)
        align(optimizer)
        for step in range(5):
            optimizer.zero_grad()
            sum((weight - step / 3).pow(2).sum() for weight in weights).backward()
            optimizer.step()
        ends.append([*weights, *(v for state in optimizer.state.values() for v in state.values())])
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("how", ["no such operator", "not on this device", "cannot be asked"])
def test_missing_adagrad_kernel_falls_back_to_plain_steps(how: str, monkeypatch: Any) -> None:
    def ask(operator: str, key: str) -> bool:
        assert (operator, key) == ("aten::_fused_adagrad_", "CPU")
        if how == "no such operator":
            raise RuntimeError("operator aten::_fused_adagrad_ does not exist")
        return False

    if how == "cannot be asked":
        monkeypatch.delattr(torch._C, "_dispatch_has_kernel_for_dispatch_key")
    else:
        monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", ask)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = build("adagrad", [weight], 0.1, 0.0)
    assert not optimizer.defaults["fused"]
    weight.grad = torch.ones(2)
    optimizer.step()
    assert weight.tolist() == pytest.approx([0.9, 0.9])
    assert build("adam", [weight], 0.1, 0.0).defaults["fused"]
