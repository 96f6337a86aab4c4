"""Laws of the stacked denoising autoencoder (Vincent et al. 2010).

The model was compared with the tutorial of the authors' group, run with torch in place of Theano, and with a port, in
float64 on equal weights, batch and masks. Differences are relative to the largest value, for gradients the largest of
all parameters, over the three layers.

    https://github.com/lisa-lab/DeepLearningTutorials, commit 11c465105026cf87573937fc2d35ab7543678698
        code/dA.py, dA.get_cost_updates, of sigmoids   loss 0, gradients of 4 parameters 2.3e-15
        code/SdA.py, inputs of the layers above        0
    https://github.com/vlukiyanov/pt-sdae, commit 57b2c544cd3f989e87a3037d5ea0bb3a59d05eed
        ptsdae/model.py, train, first layer of ReLUs   loss 0, gradients of 4 parameters 2.7e-16
        ... layers above, reconstructed linearly       loss 1.6e-15, gradients of 4 parameters 3.4e-16

The port's loss is a mean over values, ours a sum. Differs: the tutorial ties the decoder's weights to the encoder's; it
was given ours. The port divides by the share of values that are left, as dropout does; the paper and ours do not. Its
reconstructions of a hidden layer are linear, ours have the layer's activation, as the paper's sigmoids.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from stacked_helpers import (
    CODE,
    SHAPE,
    images,
    small,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import aezoo
from aezoo.training import optimizers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


def denoising_ae_with_same_networks(model: Any, **settings: Any) -> Any:
    """A plain autoencoder with the same encoder and decoder."""
    plain = aezoo.create_model("denoising_ae", SHAPE, latent_dim=CODE, hidden_dims=(16,), **settings).double()
    plain.encoder, plain.decoder = copy.deepcopy(model.encoder), copy.deepcopy(model.decoder)
    return plain


# ---- stacked: Vincent et al. 2010 ------------------------------------------------------------------------------------


DEPTH = 3


def stacked(shifted: Any, **settings: Any) -> Any:
    settings = {"hidden_dims": (8, 6), "latent_dim": CODE, "corruption": "none", "activation": "sigmoid", **settings}
    return small("stacked_dae", shifted, **settings)


def layer_of(model: Any, i: int) -> list[nn.Parameter]:
    """Encoder and decoder of a layer."""
    return [*model.encoder[i].parameters(), *model.decoder[DEPTH - 1 - i].parameters()]


def dense(module: nn.Module) -> nn.Linear:
    return next(m for m in module.modules() if isinstance(m, nn.Linear))


def phase_loss(model: Any, x: Tensor, i: int, corrupt: Callable[[Tensor], Tensor]) -> Tensor:
    """The loss of phase i, computed from the weights: cross-entropy for sigmoids, squared error for tanh."""
    act = torch.sigmoid if isinstance(model.encoder[0][-1], nn.Sigmoid) else torch.tanh
    h = x.flatten(1)
    for j in range(i):
        down = dense(model.encoder[j])
        h = act(h @ down.weight.T + down.bias).detach()
    down, up = dense(model.encoder[i]), dense(model.decoder[DEPTH - 1 - i])
    back = act(corrupt(h) @ down.weight.T + down.bias) @ up.weight.T + up.bias
    if i == 0 or act is torch.sigmoid:
        return F.binary_cross_entropy(back.sigmoid(), h, reduction="none").sum(1).mean()
    return (h - act(back)).square().sum(1).mean() + 0.5 * h.shape[1] * math.log(math.pi)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
@pytest.mark.parametrize("phase", range(DEPTH))
def test_phase_loss_is_denoising_loss_of_its_layer(phase: int, activation: str, shifted: Any) -> None:
    model, x = stacked(shifted, activation=activation, corruption="masking:0.4").train(), images()
    model.phase = phase
    torch.manual_seed(3)
    terms = model.loss(x)

    def corrupt(h: Tensor) -> Tensor:
        torch.manual_seed(3)
        width = h.shape if phase else x.shape
        return h * (torch.rand(width) >= 0.4).flatten(1)

    expected = phase_loss(model, x, phase, corrupt)
    torch.testing.assert_close(terms["loss"], expected, rtol=1e-7, atol=1e-9)
    mine = torch.autograd.grad(terms["loss"], layer_of(model, phase))
    theirs = torch.autograd.grad(expected, layer_of(model, phase))
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
    assert float(terms["phase"]) == phase
    assert (expected - phase_loss(model, x, phase, lambda h: h)).abs() > 1e-5


@pytest.mark.parametrize("phase", range(DEPTH))
def test_phase_gives_other_layers_no_gradient(phase: int, shifted: Any) -> None:
    model = stacked(shifted, corruption="masking:0.4", likelihood="gaussian:learned").train()
    model.phase = phase
    model.loss(images())["loss"].backward()
    own = {*layer_of(model, phase), *(model.likelihood.parameters() if phase == 0 else [])}
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == (p in own), name
        assert p in own or p.grad is None, name


@pytest.mark.parametrize("phase", range(DEPTH + 1))
def test_zero_gradients_of_other_layers_are_removed(phase: int, shifted: Any) -> None:
    """DistributedDataParallel needs a gradient of every parameter; the optimiser must see none of the others."""
    model, alone = stacked(shifted).train(), stacked(shifted)
    alone.load_state_dict(model.state_dict())
    model._across_ranks = lambda: True
    for each in (model, alone):
        each.train()
        each.phase = phase
        each.loss(images())["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    model.on_before_optimizer_step(None)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)


def test_the_last_phase_is_a_denoising_autoencoder(shifted: Any) -> None:
    for training in (True, False):
        model, x = stacked(shifted, corruption="gaussian:0.2").train(training), images()
        other = denoising_ae_with_same_networks(model, corruption="gaussian:0.2").train(training)
        found = []
        for each in (model, other):
            torch.manual_seed(3)
            found.append(each.loss(x)["loss"])
            found[-1].backward()
        torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)


def test_evaluation_uses_whole_model_in_every_phase(shifted: Any) -> None:
    """Otherwise the choice of a checkpoint would compare losses of single layers with that of the whole model."""
    model = stacked(shifted).eval()
    whole = model.loss(images())
    for phase in range(DEPTH):
        model.phase = phase
        assert torch.equal(model.loss(images())["loss"], whole["loss"])
        assert (model.train().loss(images())["loss"] - whole["loss"]).abs() > 1e-2
        model.eval()


class Watch(pl.Callback):
    """The phase, the loss, the weights and the optimiser's state after every step, and what each epoch logs."""

    def __init__(self, last_epoch: int = -1) -> None:
        self.phases: list[int] = []
        self.losses: list[float] = []
        self.weights: list[list[Tensor]] = []
        self.states: list[list[Any]] = []
        self.logged: list[dict[str, float]] = []
        self.last_epoch = last_epoch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        (optimizer,) = trainer.optimizers
        self.phases.append(pl_module.phase)
        self.losses.append(float(outputs["loss"]))
        self.weights.append([p.detach().clone() for p in pl_module.parameters()])
        self.states.append([copy.deepcopy(dict(optimizer.state.get(p, {}))) for p in pl_module.parameters()])

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop |= trainer.current_epoch == self.last_epoch


def loader(n: int = 3) -> DataLoader[Any]:
    return DataLoader([images(5, seed).float() for seed in range(n)], batch_size=None)  # type: ignore[arg-type]


OPTIMIZERS = [("adam", 0.1), ("adamw", 0.1), ("sgd", 0.1), ("rmsprop", 0.1)]


@pytest.mark.parametrize(("optimizer", "decay"), OPTIMIZERS)
def test_fit_trains_layers_in_turn_then_jointly(optimizer: str, decay: float, quiet: Any, shifted: Any) -> None:
    """Outside of its phases a layer's weights and optimiser state stay the same, despite weight decay and momentum."""
    model, watch = stacked(shifted, optimizer=optimizer, weight_decay=decay, phase_epochs=2).float(), Watch()
    start = [p.detach().clone() for p in model.parameters()]
    quiet(max_epochs=2 * DEPTH + 1, callbacks=[watch]).fit(model, loader())
    assert watch.phases == [phase for phase in range(DEPTH) for _ in range(6)] + [DEPTH] * 3
    before, state_before = start, [dict[str, Any]() for _ in start]
    owners = [next(i for i in range(DEPTH) if any(p is q for q in layer_of(model, i))) for p in model.parameters()]
    for step, phase in enumerate(watch.phases):
        for place, owner in enumerate(owners):
            now, state = watch.weights[step][place], watch.states[step][place]
            if phase in (owner, DEPTH):
                assert not torch.equal(now, before[place])
            else:
                assert torch.equal(now, before[place])
                assert state.keys() == state_before[place].keys()
                assert all(torch.equal(value, state_before[place][key]) for key, value in state.items())
        before, state_before = watch.weights[step], watch.states[step]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_zero_gradients_would_move_parameters(kind: str, decay: float) -> None:
    """Why the hook sets gradients to None: torch's optimisers move a parameter with a zero gradient."""
    p = nn.Parameter(torch.ones(3))
    optimizer = optimizers.build(kind, [p], 0.1, decay)
    p.sum().backward()
    moves = []
    for gradient in (p.grad, torch.zeros(3), None):
        before, p.grad = p.detach().clone(), gradient
        optimizer.step()
        moves.append(not torch.equal(p.detach(), before))
    assert moves == [True, True, False]


def test_each_phase_logs_its_loss(quiet: Any, shifted: Any) -> None:
    model, watch = stacked(shifted, phase_epochs=1).float(), Watch()
    quiet(max_epochs=DEPTH + 1, callbacks=[watch]).fit(model, loader())
    for epoch, logged in enumerate(watch.logged[1:]):
        assert logged["train/phase"] == epoch
        assert logged["train/loss"] == pytest.approx(sum(watch.losses[3 * epoch : 3 * epoch + 3]) / 3, rel=1e-5)
    model.train()
    whole = model.loss(images().float())["loss"]
    model.phase = 0
    assert (model.loss(images().float())["loss"] - whole).abs() > 1e-2


@pytest.mark.parametrize(("epochs", "accumulate", "wanted"), [
    (4, 1, [0, 0, 1, 1, 2, 2, *[3] * 6]),
    (5, 1, [0, 0, 1, 1, 2, 2, *[3] * 9]),
    (1, 1, [0, 1, 2]),
    (8, 3, [*[0] * 3, *[1] * 3, *[2] * 3, *[3] * 15]),
])  # fmt: skip
def test_default_phases_take_half_of_the_steps(
    epochs: int, accumulate: int, wanted: list[int], quiet: Any, shifted: Any
) -> None:
    model, watch = stacked(shifted).float(), Watch()
    quiet(max_epochs=epochs, accumulate_grad_batches=accumulate, callbacks=[watch]).fit(model, loader())
    assert watch.phases == wanted


def test_loss_after_partial_fit_is_whole_model_loss(quiet: Any, shifted: Any) -> None:
    model, watch = stacked(shifted, phase_epochs=2).float(), Watch()
    quiet(max_epochs=3, callbacks=[watch]).fit(model, loader())
    assert watch.phases[-1] == 1
    x = images().float()
    torch.testing.assert_close(model.train().loss(x)["loss"], model.eval().loss(x)["loss"])


def test_a_fit_without_an_end_is_refused_in_one_line(quiet: Any, shifted: Any) -> None:
    with pytest.raises(aezoo.AezooError, match="phase_epochs=0 needs a fit with an end") as refusal:
        quiet(max_epochs=-1).fit(stacked(shifted).float(), loader())
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("phase_epochs", [0, 1])
@pytest.mark.parametrize("last_epoch", [0, 1, 3])
def test_resumed_fit_matches_uninterrupted_fit(
    last_epoch: int, phase_epochs: int, quiet: Any, shifted: Any, tmp_path: Path
) -> None:
    """Stopped within a phase, at the end of a phase, and in fine-tuning."""
    settings = {"corruption": "masking:0.4", "phase_epochs": phase_epochs, "weight_decay": 0.1}
    model = stacked(shifted, **settings).float()
    copies = [copy.deepcopy(model) for _ in range(3)]
    whole, first, second = Watch(), Watch(last_epoch), Watch()
    torch.manual_seed(5)
    quiet(max_epochs=5, callbacks=[whole]).fit(copies[0], loader())
    torch.manual_seed(5)
    trainer = quiet(max_epochs=5, callbacks=[first])
    trainer.fit(copies[1], loader())
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    quiet(max_epochs=5, callbacks=[second]).fit(copies[2], loader(), ckpt_path=tmp_path / "stopped.ckpt")
    assert first.phases + second.phases == whole.phases
    assert first.losses + second.losses == whole.losses
    for p, q in zip(copies[0].parameters(), copies[2].parameters(), strict=True):
        assert torch.equal(p, q)


def test_manual_loop_matches_fit_phases(quiet: Any, shifted: Any) -> None:
    model = stacked(shifted, phase_epochs=1, weight_decay=0.1).float()
    by_hand, watch = copy.deepcopy(model), Watch()
    quiet(max_epochs=DEPTH + 2, callbacks=[watch]).fit(model, loader())
    optimizer = torch.optim.Adam(by_hand.parameters(), 1e-3, weight_decay=0.1)
    assert by_hand.phase == DEPTH
    by_hand.train()
    for epoch in range(DEPTH + 2):
        by_hand.phase = min(epoch, DEPTH)
        for x in loader():
            optimizer.zero_grad()
            by_hand.loss(x)["loss"].backward()
            optimizer.step()
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_compiled_loss_follows_the_phase(shifted: Any) -> None:
    model, x = stacked(shifted).train(), images()
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, backend="eager")
    for phase in (0, 3, 1):
        model.phase = phase
        torch.testing.assert_close(compiled(x)["loss"], model.loss(x)["loss"], rtol=1e-10, atol=1e-12)
    torch._dynamo.reset()
