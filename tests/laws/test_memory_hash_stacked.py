"""Laws of the memory autoencoder, of semantic hashing and of the stacked denoising autoencoder."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import aezoo
from aezoo.models.classic.memory_ae import MemoryAE
from aezoo.models.classic.semantic_hash_ae import BINARISATIONS
from aezoo.training import optimizers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]
SHAPE, CODE = (2, 3, 3), 4


def small(name: str, shifted: Any, **settings: Any) -> Any:
    return shifted(aezoo.create_model(name, SHAPE, **{"latent_dim": CODE, "hidden_dims": (16,), **settings})).double()


def images(n: int = 6, seed: int = 7) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def bernoulli_nll(logits: Tensor, x: Tensor) -> Tensor:
    return -D.Bernoulli(logits=logits, validate_args=False).log_prob(x).flatten(1).sum(1)


def twin_of_denoising_ae(model: Any, **settings: Any) -> Any:
    """A plain autoencoder with the same encoder and decoder."""
    plain = aezoo.create_model("denoising_ae", SHAPE, latent_dim=CODE, hidden_dims=(16,), **settings).double()
    plain.encoder, plain.decoder = copy.deepcopy(model.encoder), copy.deepcopy(model.decoder)
    return plain


# ---- memory: Gong et al. 2019 ----------------------------------------------------------------------------------------


def memory(shifted: Any, **settings: Any) -> Any:
    return small("memory_ae", shifted, **{"n_items": 7, **settings})


def address_of(query: Tensor, items: Tensor, shrinkage: float) -> Tensor:
    """The paper's equations 4 to 7, item by item."""
    rows = []
    for z in query.detach():
        w = torch.stack([F.cosine_similarity(z, m, dim=0).exp() for m in items.detach()])
        w = w / w.sum()
        kept = [v if v > shrinkage / len(items) else 0.0 for v in w]
        rows.append([v / sum(kept) for v in kept])
    return torch.tensor([[float(v) for v in row] for row in rows], dtype=query.dtype)


@pytest.mark.parametrize("shrinkage", [0.0, 0.8, 1.0, 1.1])
def test_the_address_is_the_paper_s(shrinkage: float, shifted: Any) -> None:
    model, x = memory(shifted, shrinkage=shrinkage), images()
    w = model.address(x)
    expected = address_of(model.encoder(x), model.memory_ND, shrinkage)
    torch.testing.assert_close(w, expected, rtol=1e-9, atol=1e-12)
    assert (int((w == 0).sum()) > 0) == (shrinkage > 0)
    # slips: the whole softmax without the threshold, or no renormalisation after it
    if shrinkage > 0:
        assert (w - address_of(model.encoder(x), model.memory_ND, 0)).abs().max() > 1e-3


@pytest.mark.parametrize("shrinkage", [0.0, 1.0, 3.0, 100.0])
@pytest.mark.parametrize("n_items", [1, 2, 50])
def test_the_weights_of_an_address_sum_to_one(n_items: int, shrinkage: float, shifted: Any) -> None:
    model = memory(shifted, n_items=n_items, shrinkage=shrinkage).float()
    w = model.address(images(20).float())
    torch.testing.assert_close(w.sum(1), torch.ones(20))
    assert (w >= 0).all()
    if shrinkage == 100.0:  # no weight reaches it, and the item that is nearest by angle is left
        nearest = F.cosine_similarity(model.encoder(images(20).float())[:, None], model.memory_ND, dim=2).argmax(1)
        assert torch.equal(w, F.one_hot(nearest, n_items).float())


def test_without_shrinkage_it_is_an_attention(shifted: Any) -> None:
    model, x = memory(shifted, shrinkage=0.0), images()
    query, keys = F.normalize(model.encoder(x)), F.normalize(model.memory_ND)
    attended = F.scaled_dot_product_attention(query[None], keys[None], model.memory_ND[None], scale=1.0)[0]
    torch.testing.assert_close(model.encode(x), attended, rtol=1e-9, atol=1e-12)
    by_product = F.scaled_dot_product_attention(
        model.encoder(x)[None], model.memory_ND[None], model.memory_ND[None], scale=1.0
    )[0]  # a rival's slip: an inner product for the cosine
    assert (model.encode(x) - by_product).abs().max() > 1e-2


def test_a_memory_of_one_item_has_one_code(shifted: Any) -> None:
    model = memory(shifted, n_items=1)
    code = model.encode(images())
    torch.testing.assert_close(code, model.memory_ND.expand(6, CODE), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(model(images())[0], model(images(seed=8))[3], rtol=1e-12, atol=1e-14)


def test_the_entropy_is_torch_s_and_zero_at_one_item(shifted: Any) -> None:
    w = memory(shifted).address(images())
    assert 0 < (w == 0).sum() < w.numel()
    torch.testing.assert_close(MemoryAE.entropy(w), D.Categorical(probs=w).entropy(), rtol=1e-6, atol=1e-9)
    one_hot = torch.eye(5, dtype=torch.float64, requires_grad=True)
    found = MemoryAE.entropy(one_hot)
    assert torch.equal(found, torch.zeros(5, dtype=torch.float64))
    assert torch.autograd.grad(found.sum(), one_hot)[0].isfinite().all()
    torch.testing.assert_close(MemoryAE.entropy(torch.full((1, 9), 1 / 9)), torch.tensor([math.log(9)]))


def test_the_loss_is_the_paper_s(shifted: Any) -> None:
    model, x = memory(shifted, entropy_weight=0.7), images()
    w = address_of(model.encoder(x), model.memory_ND, 1.0)
    nll = bernoulli_nll(model.decoder(w @ model.memory_ND), x).mean()
    entropy = D.Categorical(probs=w).entropy().mean()
    terms = model.loss(x)
    torch.testing.assert_close(terms["nll"], nll)
    torch.testing.assert_close(terms["loss"], nll + 0.7 * entropy, rtol=1e-6, atol=1e-9)
    # the code is what the decoder sees, not the query
    torch.testing.assert_close(model.score(x).mean(), nll)


def test_items_below_the_threshold_for_all_samples_learn_nothing(shifted: Any) -> None:
    model, x = memory(shifted, shrinkage=1.2), images(3)
    w = model.address(x)
    model.loss(x)["loss"].backward()
    used = (w > 0).any(0)
    assert 0 < used.sum() < 7
    moved = model.memory_ND.grad.norm(dim=1)
    assert (moved[used] > 0).all()
    # exactly, although these items stand in the softmax: Adam would make full steps of what rounding leaves
    assert not moved[~used].any()


class LossOf(nn.Module):
    """The loss as a module's output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.model.loss(x)["loss"]
        return value


def test_the_gradient_is_that_of_finite_differences(shifted: Any) -> None:
    model, x = LossOf(memory(shifted, entropy_weight=0.7, activation="tanh")), images(3)

    def loss(items: Tensor) -> Tensor:
        value: Tensor = torch.func.functional_call(model, {"model.memory_ND": items}, (x,))
        return value

    assert torch.autograd.gradcheck(loss, (model.model.memory_ND.detach().clone().requires_grad_(),))


# ---- semantic hashing: Salakhutdinov & Hinton 2009, Kaiser & Bengio 2018 ---------------------------------------------


@pytest.mark.parametrize("binarisation", BINARISATIONS)
def test_codes_are_bits_exactly(binarisation: str, shifted: Any) -> None:
    model = small("semantic_hash_ae", shifted, binarisation=binarisation)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = images(200).to(dtype)
        code = model.to(dtype).encode(x)
        assert code.dtype == dtype and set(code.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(code, model.encode(x))  # no noise
        assert torch.equal(code > 0.5, model.encoder(x) > 0)


def test_a_gradient_passes_the_bits_as_it_passes_the_sigmoid(shifted: Any) -> None:
    model, x, g = small("semantic_hash_ae", shifted), images(), torch.randn(6, CODE, dtype=torch.float64)
    parts = [*model.encoder.parameters()]
    through = torch.autograd.grad(model.encode(x), parts, g)
    as_sigmoid = torch.autograd.grad(model.encoder(x).sigmoid(), parts, g)
    for mine, expected in zip(through, as_sigmoid, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)
    assert max(float(p.abs().max()) for p in through) > 1e-3  # rounding alone passes nothing


def noise_of(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("noise_std", [0.0, 1.0, 4.0])
def test_the_noise_stands_before_the_sigmoid(noise_std: float, training: bool, shifted: Any) -> None:
    model, x = small("semantic_hash_ae", shifted, noise_std=noise_std).train(training), images()
    eps, _ = noise_of((6, CODE), 3)
    expected = bernoulli_nll(model.decoder((model.encoder(x) + noise_std * eps).sigmoid()), x).mean()
    torch.manual_seed(3)
    torch.testing.assert_close(model.loss(x)["loss"], expected)
    after = bernoulli_nll(model.decoder(model.encoder(x).sigmoid() + noise_std * eps), x).mean()
    assert noise_std == 0 or (expected - after).abs() > 1e-2


def test_without_noise_it_is_an_autoencoder_with_a_sigmoid_code(shifted: Any) -> None:
    model = small("semantic_hash_ae", shifted, noise_std=0.0)
    plain = aezoo.create_model(
        "dense_ae", SHAPE, latent_dim=CODE, hidden_dims=(16,), code_activation="sigmoid"
    ).double()
    bias = model.decoder[1].b_X.data.zero_()
    names = {
        name: name.replace("encoder.", "encoder.0.").replace("decoder.0.", "decoder.") for name in model.state_dict()
    }
    state = model.state_dict()
    plain.load_state_dict({names[name]: state[name] for name in names if name not in ("decoder.1.b_X", "started")})
    torch.testing.assert_close(model.loss(images())["loss"], plain.loss(images())["loss"], rtol=1e-12, atol=1e-12)
    bias += 1
    assert (model.loss(images())["loss"] - plain.loss(images())["loss"]).abs() > 0.1


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "beta_binomial"])
def test_outputs_start_at_the_mean_of_the_first_batch(likelihood: str, shifted: Any) -> None:
    model, x = small("semantic_hash_ae", shifted, likelihood=likelihood), images()
    model.train().begin_step(x, 0)
    outputs = model.decoder[1](torch.zeros_like(x[:1]))
    torch.testing.assert_close(model.likelihood.mean(outputs)[0], x.mean(0).clamp(0.01, 0.99))
    after = model.decoder[1].b_X.detach().clone()
    model.begin_step(images(seed=8), 1)
    assert torch.equal(model.decoder[1].b_X, after)


def test_a_start_at_the_mean_keeps_units_from_saying_all_the_same(adam: Callable[..., float], mnist5k: Tensor) -> None:
    x, used = mnist5k[:1280].float(), {}
    for data_init in (False, True):
        torch.manual_seed(0)
        model = aezoo.create_model(
            "semantic_hash_ae", (1, 28, 28), latent_dim=8, hidden_dims=(64,), data_init=data_init
        )
        model.begin_step(x[:128], 0)
        adam(model, x, 200, 3e-3, 128)
        ones = model.encode(x).mean(0)
        used[data_init] = int(((ones > 0.1) & (ones < 0.9)).sum())
    assert used[False] <= 4 and used[True] >= 6


def saturating(v: Tensor) -> Tensor:
    return torch.minimum(torch.ones_like(v), torch.maximum(torch.zeros_like(v), 1.2 / (1 + (-v).exp()) - 0.1))


def test_the_improved_code_is_soft_or_a_bit_half_of_the_time_each(shifted: Any) -> None:
    model = small("semantic_hash_ae", shifted, binarisation="improved", noise_std=1.0)
    a = torch.randn(5000, CODE, dtype=torch.float64)
    eps, u = noise_of((5000, CODE), 3)
    torch.manual_seed(3)
    code = model.noisy_code(a)
    v = a + eps
    torch.testing.assert_close(code, torch.where(u < 0.5, (v > 0).double(), saturating(v)), rtol=1e-12, atol=1e-12)
    inside = (saturating(v) > 0) & (saturating(v) < 1)
    bits = ((code == 0) | (code == 1))[inside].double().mean()
    assert float(bits) == pytest.approx(0.5, abs=0.02)
    # each unit by itself: a draw a sample or a batch would make whole rows of one kind
    rows = ((code == 0) | (code == 1)) | ~inside
    assert 0.02 < float(rows.all(1).double().mean()) < 0.3


def test_the_gradient_of_the_improved_code_is_always_that_of_the_soft_one(shifted: Any) -> None:
    model = small("semantic_hash_ae", shifted, binarisation="improved", noise_std=1.0)
    a = (3 * torch.randn(500, CODE, dtype=torch.float64)).requires_grad_()
    eps, _ = noise_of((500, CODE), 3)
    g = torch.randn(500, CODE, dtype=torch.float64)
    torch.manual_seed(3)
    (mine,) = torch.autograd.grad(model.noisy_code(a), a, g)
    v = (a + eps).detach()
    s = v.sigmoid()
    expected = g * torch.where((1.2 * s - 0.1 > 0) & (1.2 * s - 0.1 < 1), 1.2 * s * (1 - s), 0.0)
    torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)
    assert 0.1 < float((mine == 0).double().mean()) < 0.9  # saturated units pass nothing


def test_the_loss_moves_encoder_and_decoder_by_the_chain_rule(shifted: Any) -> None:
    """The improved code's gradient in the encoder: that of the decoder in the code, through the soft code."""
    model, x = small("semantic_hash_ae", shifted, binarisation="improved", noise_std=1.0), images()
    seen: list[Tensor] = []
    hook = model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(3)
    loss = model.loss(x)["loss"]
    hook.remove()
    g = torch.autograd.grad(loss, seen[0], retain_graph=True)[0]
    eps, _ = noise_of((6, CODE), 3)
    parts = [*model.encoder.parameters()]
    mine = torch.autograd.grad(loss, parts)
    expected = torch.autograd.grad(saturating(model.encoder(x) + eps), parts, g)
    for p, q in zip(mine, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_noise_drives_the_code_to_bits(adam: Callable[..., float], digits: Tensor) -> None:
    """Trained with noise the sigmoids are nearly binary, and rounding them costs little; without, it costs much."""
    x, found = digits[:400].float(), {}
    for noise_std in (0.0, 4.0):
        torch.manual_seed(0)
        model = aezoo.create_model(
            "semantic_hash_ae", x.shape[1:], latent_dim=16, hidden_dims=(64,), noise_std=noise_std
        )
        adam(model, x, 500, 1e-2, 50)
        s = model.encoder(x).sigmoid()
        cost = model.score(x).mean() - model.nll(model.decoder(s), x).mean()
        found[noise_std] = (float((s - s.round()).abs().mean().detach()), float(cost.detach()))
    assert found[4.0][0] < 0.5 * found[0.0][0]
    assert found[4.0][1] < 0.5 * found[0.0][1]


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
    """What phase i minimises, from the weights alone: cross-entropy of sigmoids, squared error of tanh."""
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
def test_a_phase_is_the_denoising_of_its_layer(phase: int, activation: str, shifted: Any) -> None:
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
def test_in_a_phase_other_layers_have_no_gradient(phase: int, shifted: Any) -> None:
    model = stacked(shifted, corruption="masking:0.4", likelihood="gaussian:learned").train()
    model.phase = phase
    model.loss(images())["loss"].backward()
    own = {*layer_of(model, phase), *(model.likelihood.parameters() if phase == 0 else [])}
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == (p in own), name
        assert p in own or p.grad is None, name


@pytest.mark.parametrize("phase", range(DEPTH + 1))
def test_on_ranks_the_zeros_of_other_layers_are_taken_away_before_the_step(phase: int, shifted: Any) -> None:
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
        other = twin_of_denoising_ae(model, corruption="gaussian:0.2").train(training)
        found = []
        for each in (model, other):
            torch.manual_seed(3)
            found.append(each.loss(x)["loss"])
            found[-1].backward()
        torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)


def test_evaluation_judges_the_whole_in_every_phase(shifted: Any) -> None:
    """Otherwise the loss of a first layer would win against that of the whole when checkpoints are compared."""
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
def test_a_fit_moves_one_layer_after_the_other_and_then_all(
    optimizer: str, decay: float, quiet: Any, shifted: Any
) -> None:
    """Bit for bit, neither weight decay nor moments move a layer out of its phase, nor do the moments change."""
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
def test_zeros_in_place_of_no_gradient_would_move_the_others(kind: str, decay: float) -> None:
    """The slip that the hook is there for, on torch's own optimisers."""
    p = nn.Parameter(torch.ones(3))
    optimizer = optimizers.build(kind, [p], 0.1, decay)
    p.sum().backward()
    moves = []
    for gradient in (p.grad, torch.zeros(3), None):
        before, p.grad = p.detach().clone(), gradient
        optimizer.step()
        moves.append(not torch.equal(p.detach(), before))
    assert moves == [True, True, False]


def test_a_phase_logs_its_own_loss(quiet: Any, shifted: Any) -> None:
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
def test_by_default_the_layers_share_half_of_the_steps(
    epochs: int, accumulate: int, wanted: list[int], quiet: Any, shifted: Any
) -> None:
    model, watch = stacked(shifted).float(), Watch()
    quiet(max_epochs=epochs, accumulate_grad_batches=accumulate, callbacks=[watch]).fit(model, loader())
    assert watch.phases == wanted


def test_after_a_fit_that_ended_within_a_phase_the_loss_is_the_whole_s(quiet: Any, shifted: Any) -> None:
    model, watch = stacked(shifted, phase_epochs=2).float(), Watch()
    quiet(max_epochs=3, callbacks=[watch]).fit(model, loader())
    assert watch.phases[-1] == 1
    x = images().float()
    torch.testing.assert_close(model.train().loss(x)["loss"], model.eval().loss(x)["loss"])


def test_a_fit_without_an_end_is_refused_in_one_line(quiet: Any, shifted: Any) -> None:
    with pytest.raises(aezoo.AezooError, match="phase_epochs=0 needs a fit with an end") as refusal:
        quiet(max_epochs=-1).fit(stacked(shifted).float(), loader())
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("phase_epochs", [0, 1])
@pytest.mark.parametrize("last_epoch", [0, 1, 3])
def test_a_resumed_fit_is_the_unstopped_one(
    last_epoch: int, phase_epochs: int, quiet: Any, shifted: Any, tmp_path: Path
) -> None:
    """Stopped within a phase, after 3 steps of 2 a phase, at a phase's end, and in fine-tuning."""
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


def test_a_loop_without_a_trainer_sets_the_phase_itself(quiet: Any, shifted: Any) -> None:
    """The same steps as a fit makes."""
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


def test_a_compiled_loss_follows_the_phase(shifted: Any) -> None:
    model, x = stacked(shifted).train(), images()
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, backend="eager")
    for phase in (0, 3, 1):
        model.phase = phase
        torch.testing.assert_close(compiled(x)["loss"], model.loss(x)["loss"], rtol=1e-10, atol=1e-12)
    torch._dynamo.reset()
