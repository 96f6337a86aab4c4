"""Laws of the adversarial models: who trains what, one optimiser as several, the density ratio, rivals' slips."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from two_ranks import on_two_ranks

import aezoo
from aezoo.testing import SharedNoise
from aezoo.training.seeding import mix

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]
SHAPE, CODE = (2, 3, 3), 5
NAMES = ("factor_vae", "vae_gan")
LIKELIHOODS = ("bernoulli", "gaussian:learned", "discretised_logistic")
ZERO = pytest.approx(0, abs=0)


def small(name: str, **settings: Any) -> Any:
    dims = {} if name == "vae" else {"discriminator_dims": (12, 8)}
    settings = {"input_shape": SHAPE, "latent_dim": CODE, "hidden_dims": (16,), **dims, **settings}
    return aezoo.create_model(name, **settings).double()


def images(n: int = 6, seed: int = 7) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sets(model: Any) -> dict[str, list[nn.Parameter]]:
    """The parameters of each player."""
    players = {"decoder": [*model.decoder.parameters(), *model.likelihood.parameters()]}
    players |= {"encoder": [*model.encoder.parameters()], "discriminator": [*model.discriminator.parameters()]}
    if "features" in dict(model.discriminator.named_children()):
        return players
    return {"vae": players["encoder"] + players["decoder"], "discriminator": players["discriminator"]}


def draw(model: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The KL by torch.distributions, a code of each sample, and its reconstruction's parameters."""
    mu, log_var = model.posterior(x)
    q = D.Normal(mu, (0.5 * log_var).exp())
    z = mu + q.scale * torch.randn_like(mu)
    kl = D.kl_divergence(q, D.Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum(1).mean()
    return kl, z, model.decoder(z)


def factor_losses(model: Any, x: Tensor) -> dict[str, Tensor]:
    """What each player of FactorVAE minimises, all parameters live."""
    kl, z, params = draw(model, x)
    keys = torch.rand_like(z)
    permuted = torch.stack([column[key.sort().indices] for column, key in zip(z.T, keys.T, strict=True)], 1)
    p = model.discriminator(z).sigmoid()
    t = model.discriminator(torch.cat([z, permuted]).detach())[:, 0]
    labels = torch.cat([torch.ones(len(x)), torch.zeros(len(x))]).double()
    return {
        "vae": model.nll(params, x).mean() + kl + model.gamma * torch.log(p / (1 - p)).mean(),
        "discriminator": F.binary_cross_entropy_with_logits(t, labels),
    }


def gan_losses(model: Any, x: Tensor) -> dict[str, Tensor]:
    """What each player of the VAE-GAN minimises, all parameters live but for the code of the decoder's GAN."""
    features, head = model.discriminator["features"], model.discriminator["head"]
    kl, z, params = draw(model, x)
    made = model.likelihood.mean(params)
    drawn = model.likelihood.mean(model.decoder(torch.randn_like(z)))
    own = model.likelihood.mean(model.decoder(z.detach()))
    seen = features(torch.cat([x, made, drawn])).flatten(1).detach().numpy()
    s = math.sqrt(np.var(seen, axis=0).mean())
    density = D.Normal(features(made).flatten(1), s).log_prob(features(x).flatten(1).detach()).sum(1).mean()
    feature_nll = -density - seen.shape[1] * math.log(s * math.sqrt(2 * math.pi))
    real, fake = torch.ones(len(x), 1).double(), torch.zeros(len(x), 1).double()

    def gan(*given: Tensor) -> Tensor:
        costs = [
            F.binary_cross_entropy(head(features(g)).sigmoid(), t)
            for g, t in zip(given, (real, fake, fake), strict=True)
        ]
        return torch.stack(costs).sum()

    scale = 0 if not [*model.likelihood.parameters()] else model.nll(params.detach(), x).mean()
    return {
        "encoder": kl + feature_nll,
        "decoder": model.gamma * feature_nll - gan(x, own, drawn) + scale,
        "discriminator": gan(x, made.detach(), drawn.detach()),
    }


LOSSES: dict[str, Callable[..., dict[str, Tensor]]] = {"factor_vae": factor_losses, "vae_gan": gan_losses}


def gradients(value: Tensor, of: list[nn.Parameter]) -> list[Tensor | None]:
    return [*torch.autograd.grad(value, of, allow_unused=True, retain_graph=True)]


def size(found: list[Tensor | None]) -> float:
    """The norm of a gradient, 0 where there is none."""
    return math.sqrt(sum(float((g**2).sum()) for g in found if g is not None))


# ---- who trains what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", NAMES)
def test_the_players_sets_are_disjoint_and_together_all_parameters(name: str, likelihood: str) -> None:
    model = small(name, likelihood=likelihood, discriminator_lr=3e-3)
    groups = model.configure_optimizers().param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters()}
    expected = [{id(p) for p in part} for part in sets(model).values()]
    assert sorted(map(sorted, ([id(p) for p in g["params"]] for g in groups))) == sorted(map(sorted, expected))
    *others, last = groups
    assert {id(p) for p in last["params"]} == {id(p) for p in model.discriminator.parameters()}
    assert (last["lr"], last["betas"]) == (3e-3, (0.5, 0.9))
    assert all((group["lr"], group["betas"]) == (1e-3, (0.9, 0.999)) for group in others)
    *others, last = small(name, likelihood=likelihood, optimizer="adam:beta1=0.7").configure_optimizers().param_groups
    assert last["betas"] == (0.7, 0.9) and all(group["betas"] == (0.7, 0.999) for group in others)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", NAMES)
def test_one_backward_pass_gives_each_player_the_gradient_of_its_own_loss(
    name: str, likelihood: str, training: bool, shifted: Any
) -> None:
    model, x = shifted(small(name, likelihood=likelihood, gamma=0.7)).train(training), images()
    torch.manual_seed(3)
    terms = model.loss(x)
    terms["loss"].backward()
    torch.manual_seed(3)
    losses = LOSSES[name](model, x)
    for player, part in sets(model).items():
        expected = gradients(losses[player], part)
        assert size(expected) > 1e-3, player
        for p, g in zip(part, expected, strict=True):
            torch.testing.assert_close(p.grad, torch.zeros_like(p) if g is None else g, rtol=1e-7, atol=1e-9)
    first = next(iter(losses))
    torch.testing.assert_close(terms["loss"], losses["vae" if name == "factor_vae" else "encoder"], msg=first)
    torch.testing.assert_close(terms["discriminator"], losses["discriminator"])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", NAMES)
def test_no_term_reaches_another_player(name: str, likelihood: str, shifted: Any) -> None:
    model, x = shifted(small(name, likelihood=likelihood)), images()
    terms, parts = model.loss(x), sets(model)
    reached = {"discriminator": "discriminator"}
    if name == "factor_vae":
        reached |= dict.fromkeys(("tc", "nll", "kl", "elbo"), "vae")
    else:
        reached |= dict.fromkeys(("feature_nll", "kl"), "encoder")
    for term, player in reached.items():
        for other, part in parts.items():
            norm = size(gradients(terms[term], part))
            assert norm > 1e-6 if other == player else norm == ZERO, (term, other)
    if name == "vae_gan" and terms["nll"].requires_grad:
        assert {p for p in model.parameters() if size(gradients(terms["nll"], [p]))} == {model.likelihood.log_scale}


def test_the_leak_of_rivals_would_be_seen(shifted: Any) -> None:
    """Pythae lets FactorVAE's discriminator loss into the encoder; the GAN's into the encoder is the same slip."""
    model, x = shifted(small("factor_vae")), images()
    _, z, _ = draw(model, x)
    leaky = F.softplus(-model.discriminator(z)).mean() + F.softplus(model.discriminator(model.permute_dims(z))).mean()
    assert size(gradients(leaky, sets(model)["vae"])) > 1e-3
    model = shifted(small("vae_gan"))
    _, _, params = draw(model, x)
    t = model.discriminator["head"](model.discriminator["features"](model.likelihood.mean(params)))
    for player in ("encoder", "decoder", "discriminator"):
        assert size(gradients(F.softplus(t).mean(), sets(model)[player])) > 1e-3


# ---- one optimiser is several ----------------------------------------------------------------------------------------


def trained(model: Any, batches: list[Tensor], quiet: Any, *callbacks: Any, **settings: Any) -> pl.Trainer:
    torch.manual_seed(11)
    trainer: pl.Trainer = quiet(max_epochs=1, callbacks=[*callbacks], **settings)
    ckpt_path = settings.pop("ckpt_path", None)
    trainer.fit(model, DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)  # type: ignore[arg-type]
    return trainer


@pytest.mark.parametrize("name", NAMES)
def test_its_steps_are_those_of_an_optimiser_for_each_player(name: str, shifted: Any, quiet: Any) -> None:
    """Six steps of the real loop, the light one, against Adams by hand, each on the gradient of its player's loss."""
    batches = [images(6, seed) for seed in range(6)]
    model = shifted(small(name, lr=2e-3, discriminator_lr=5e-3, gamma=0.7))
    other = small(name, gamma=0.7)
    other.load_state_dict(model.state_dict())
    plans: list[Any] = []
    look = pl.callbacks.LambdaCallback(on_train_epoch_end=lambda t, _: plans.append(t.fit_loop.epoch_loop.plan))
    trained(model, batches, quiet, look)
    assert plans and plans[0] is not None
    parts = sets(other)
    adams = {
        player: torch.optim.Adam(part, 5e-3, (0.5, 0.9)) if player == "discriminator" else torch.optim.Adam(part, 2e-3)
        for player, part in parts.items()
    }
    for i, x in enumerate(batches):
        torch.manual_seed(mix(11, 0, 0, i))
        losses = LOSSES[name](other, x)
        found = {player: gradients(losses[player], part) for player, part in parts.items()}
        for player, part in parts.items():
            for p, g in zip(part, found[player], strict=True):
                p.grad = g
            adams[player].step()
    for (key, mine), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8, msg=key)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", [{}, {"lr_schedule": "linear", "warmup_steps": 2}], ids=["constant", "linear"])
def test_resumed_each_player_has_the_rate_that_is_asked_for(
    name: str, schedule: dict[str, Any], quiet: Any, tmp_path: Path
) -> None:
    batches, rates, file = [images(6, seed) for seed in range(6)], [], tmp_path / "step=3.ckpt"

    def note(trainer: Any, module: Any, optimizer: Any) -> None:
        rates.append([group["lr"] for group in optimizer.param_groups])

    def save(trainer: Any, *args: Any) -> None:
        if trainer.global_step == 3 and not file.exists():
            trainer.save_checkpoint(file)

    def run(discriminator_lr: float, ckpt_path: Path | None = None) -> list[list[float]]:
        rates.clear()
        torch.manual_seed(11)
        look = pl.callbacks.LambdaCallback(on_before_optimizer_step=note, on_train_batch_end=save)
        trainer = quiet(max_epochs=1, callbacks=[look])
        model = small(name, lr=2e-3, discriminator_lr=discriminator_lr, **schedule)
        trainer.fit(model, DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)  # type: ignore[arg-type]
        return [*rates]

    whole = run(1e-4)
    assert all(step[-1] == pytest.approx(step[0] / 20) for step in whole)
    assert run(1e-4, file) == whole[3:]
    for step, before in zip(run(8e-3, file), whole[3:], strict=True):
        assert step[:-1] == before[:-1]
        assert step[-1] == pytest.approx(80 * before[-1])


# ---- FactorVAE -------------------------------------------------------------------------------------------------------


def test_factor_vae_with_gamma_0_trains_like_the_vae(shifted: Any, quiet: Any) -> None:
    batches = [images(6, seed) for seed in range(6)]
    vae = shifted(small("vae", lr_schedule="cosine"))
    start = {name: p.clone() for name, p in vae.state_dict().items()}
    found = {}
    for gamma in (0.0, 5.0):
        model = small("factor_vae", gamma=gamma, lr_schedule="cosine")
        model.load_state_dict(model.state_dict() | start)
        trained(model, batches, quiet)
        found[gamma] = model.state_dict()
    trained(vae, batches, quiet)
    for name, p in vae.state_dict().items():
        torch.testing.assert_close(found[0.0][name], p, rtol=0, atol=1e-5)
        torch.testing.assert_close(found[0.0][name], p, rtol=1e-9, atol=1e-12)
        assert not torch.equal(p, start[name])
    assert max((found[5.0][name] - p).abs().max() for name, p in vae.state_dict().items()) > 1e-4


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_factor_vae_with_gamma_0_has_the_vae_s_loss_and_gradient(training: bool, shifted: Any) -> None:
    vae, model, x, found = shifted(small("vae")), small("factor_vae", gamma=0.0), images(), []
    model.load_state_dict(model.state_dict() | vae.state_dict())
    for each in (model, vae):
        torch.manual_seed(3)
        found.append(each.train(training).loss(x))
        found[-1]["loss"].backward()
    for term in ("loss", "nll", "kl", "elbo"):
        torch.testing.assert_close(found[0][term], found[1][term], rtol=0, atol=1e-5)
        torch.testing.assert_close(found[0][term], found[1][term], rtol=1e-12, atol=1e-12)
    for p, q in zip(sets(model)["vae"], vae.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_inference_is_the_vae_s(name: str, shifted: Any) -> None:
    """Scores and likelihoods are those of the data, whatever a discriminator sees."""
    vae, model, x, found = shifted(small("vae")), small(name), images(), []
    model.load_state_dict(model.state_dict() | vae.state_dict())
    for each in (model.eval(), vae.eval()):
        torch.manual_seed(5)
        found.append([each.encode(x), each(x), each.score(x), each.log_likelihood(x, 20), each.sample(3)])
        torch.manual_seed(5)
        terms = each.loss(x)
        found[-1] += [terms[term] for term in ("nll", "kl", "elbo")]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_callback_reaches_the_kl_term(name: str, shifted: Any) -> None:
    model, x, found = shifted(small(name)), images(), []
    for beta, capacity in ((1.0, 0.0), (0.25, 0.0), (0.25, 90.0)):
        model.beta, model.capacity = beta, capacity
        torch.manual_seed(3)
        found.append(model.loss(x))
    kl = found[0]["kl"]
    assert kl > 0.1
    torch.testing.assert_close(found[1]["loss"], found[0]["loss"] - 0.75 * kl)
    torch.testing.assert_close(found[2]["loss"], found[0]["loss"] - kl + 0.25 * (90 - kl))


def test_permuted_codes_keep_every_marginal_and_lose_the_dependence() -> None:
    model = small("factor_vae")
    z = torch.randn(4000, 1, dtype=torch.float64) + 0.3 * torch.randn(4000, CODE, dtype=torch.float64)
    permuted = model.permute_dims(z)
    assert torch.equal(permuted.sort(0).values, z.sort(0).values)
    off = ~torch.eye(CODE, dtype=torch.bool)
    assert np.corrcoef(z.T.numpy())[off.numpy()].min() > 0.8
    assert np.abs(np.corrcoef(permuted.T.numpy())[off.numpy()]).max() < 0.08
    # whole rows in another order, as after torch.randperm(len(z)), keep the dependence; so do whole columns in another
    assert np.corrcoef(z[torch.randperm(4000)].T.numpy())[off.numpy()].min() > 0.8
    columns = z[:, torch.randperm(CODE)]
    assert np.corrcoef(columns.T.numpy())[off.numpy()].min() > 0.8


def test_every_permutation_of_a_column_is_as_likely() -> None:
    model, z = small("factor_vae"), torch.arange(3, dtype=torch.float64)[:, None].expand(3, CODE)
    orders = torch.cat([model.permute_dims(z).T for _ in range(1200)])
    codes, counts = (orders @ torch.tensor([9.0, 3.0, 1.0]).double()).unique(return_counts=True)
    assert len(codes) == 6
    chi2 = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi2 < 20.5  # 5 degrees of freedom: 0.1 %


def at(model: Any, z: Tensor) -> Any:
    """The model with codes of one's own choice for a batch of their size."""
    model.posterior = lambda x: (z, torch.full_like(z, -60.0))
    return model


def test_at_its_optimum_the_discriminator_is_the_log_density_ratio() -> None:
    """Of a Gaussian of correlation rho: TC = -1/2 log(1 - rho^2), and t(z) is the log ratio at every point."""
    rho, n = 0.8, 1024
    model: Any = aezoo.create_model(
        "factor_vae", input_shape=(1,), latent_dim=2, hidden_dims=(), discriminator_dims=(64, 64)
    )
    joint = D.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, rho], [rho, 1.0]]))
    x = torch.rand(n, 1)
    adam = torch.optim.Adam(model.discriminator.parameters(), 3e-3, (0.5, 0.9))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 500)
    for _ in range(500):
        loss = at(model, joint.sample((n,))).loss(x)["loss"]
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    z = joint.sample((20_000,))
    with torch.no_grad():
        terms = at(model, z).loss(torch.rand(20_000, 1))
        t = model.discriminator(z)[:, 0]
    normal = D.Normal(0.0, 1.0)
    ratio = joint.log_prob(z) - normal.log_prob(z).sum(1)
    tc = -0.5 * math.log(1 - rho**2)
    assert ratio.mean().item() == pytest.approx(tc, abs=0.02)
    assert terms["tc"].item() == pytest.approx(tc, abs=0.04)
    assert (t - ratio).square().mean().sqrt() < 0.15
    # the optimum of its own loss is log 2 less the Jensen-Shannon divergence
    product = normal.sample((20_000, 2))
    other = joint.log_prob(product) - normal.log_prob(product).sum(1)
    least = 0.5 * (F.softplus(-ratio).mean() + F.softplus(other).mean())
    assert least < 0.6
    assert terms["discriminator"].item() == pytest.approx(least.item(), abs=0.01)


def test_of_independent_codes_it_can_tell_nothing() -> None:
    model: Any = aezoo.create_model(
        "factor_vae", input_shape=(1,), latent_dim=2, hidden_dims=(), discriminator_dims=(32,)
    )
    adam = torch.optim.Adam(model.discriminator.parameters(), 3e-3)
    for _ in range(200):
        terms = at(model, torch.rand(1024, 2) ** 2).loss(torch.rand(1024, 1))
        adam.zero_grad()
        terms["loss"].backward()
        adam.step()
    assert terms["discriminator"].item() == pytest.approx(math.log(2), abs=5e-3)
    assert terms["tc"].item() == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_are_one(name: str, shifted: Any) -> None:
    model, x = shifted(small(name, gamma=0.7)), images()
    with SharedNoise(range(6), 6):
        whole = model.loss(x)
    permuted = [torch.empty(0)] * 2

    def watched(own: Any, rank: int) -> None:
        def permute(z: Tensor) -> Tensor:
            permuted[rank] = type(own).permute_dims(own, z)
            return permuted[rank]

        if name == "factor_vae":
            own.permute_dims = permute

    together = on_two_ranks(model, x, prepare=watched)
    for term, value in whole.items():
        torch.testing.assert_close(together.terms[term], value, msg=term)
    expected = torch.autograd.grad(whole["loss"], [*model.parameters()])
    for found, g in zip(together.gradients(), expected, strict=True):
        torch.testing.assert_close(found, g)
    alone = on_two_ranks(model, x, exchange=False).terms
    coupled = "discriminator" if name == "factor_vae" else "feature_nll"
    assert (alone[coupled] - whole[coupled]).abs() > 1e-4
    if name == "factor_vae":
        with SharedNoise(range(6), 6):
            _, z, _ = draw(model, x)
        torch.testing.assert_close(torch.cat(permuted).sort(0).values, z.sort(0).values)


# ---- VAE-GAN ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "costs"), [("factor_vae", 1), ("vae_gan", 3)])
def test_a_discriminator_that_sees_no_difference_pays_log_2_for_each_kind(name: str, costs: int, shifted: Any) -> None:
    model = shifted(small(name))
    with torch.no_grad():
        for p in [*model.discriminator.parameters()][-2:]:
            p.zero_()
    terms = model.loss(images())
    assert terms["discriminator"].item() == pytest.approx(costs * math.log(2))
    if name == "factor_vae":
        assert terms["tc"].item() == 0


def test_an_exact_reconstruction_is_at_distance_0_in_the_features(shifted: Any) -> None:
    model = small("vae_gan", input_shape=(CODE,), hidden_dims=(), likelihood="gaussian")
    with torch.no_grad():
        model.encoder[1].weight.copy_(torch.cat([torch.eye(CODE), torch.zeros(CODE, CODE)]))
        model.encoder[1].bias.copy_(torch.cat([torch.zeros(CODE), torch.full((CODE,), -60.0)]))
        model.decoder[1].weight.copy_(torch.eye(CODE))
        model.decoder[1].bias.zero_()
        x = torch.rand(6, CODE, dtype=torch.float64)
        assert model.loss(x)["feature_nll"].item() == pytest.approx(0, abs=1e-9)
        model.decoder[1].bias += 0.1
        assert model.loss(x)["feature_nll"].item() > 1e-3


@pytest.mark.parametrize("net", ["mlp", "conv", "resnet"])
def test_the_distance_has_no_scale_that_the_discriminator_could_choose(net: str, shifted: Any) -> None:
    """Features a hundred times as large: with s = 1 the distance would be ten thousand times as large."""
    model, x = shifted(small("vae_gan", net=net, hidden_dims=(8,))), images()
    found = []
    for factor in (1, 100):
        with torch.no_grad():
            last = [m for m in model.discriminator["features"].modules() if hasattr(m, "weight")][-1]
            last.weight *= factor
            last.bias *= factor
        torch.manual_seed(3)
        found.append(model.loss(x)["feature_nll"])
    assert found[0] > 0.1
    torch.testing.assert_close(*found)


def test_features_that_are_all_alike_give_finite_losses() -> None:
    """As of images of one colour, once the decoder makes them exactly."""
    model = small("vae_gan")
    with torch.no_grad():
        for p in model.discriminator["features"].parameters():
            p.zero_()
    terms = model.loss(torch.full((6, *SHAPE), 0.5, dtype=torch.float64))
    terms["loss"].backward()
    assert terms["feature_nll"] == 0
    assert all(value.isfinite() for value in terms.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("rate", "gamma"), [(1e-2, 0.0), (1e-2, 1.0), (1e-4, 0.1)])
def test_it_stays_bounded_whoever_is_ahead(rate: float, gamma: float, digits: Tensor) -> None:
    """Neither a discriminator that wins nor a decoder that no reconstruction holds makes a loss grow."""
    torch.manual_seed(0)
    x, worst = digits[:1024].float(), {"feature_nll": 0.0, "discriminator": 0.0}
    model = aezoo.create_model(
        "vae_gan", input_shape=(1, 8, 8), latent_dim=8, hidden_dims=(64,), discriminator_dims=(128,),
        lr=2e-3, discriminator_lr=rate, gamma=gamma,
    )  # fmt: skip
    optimizer = model.configure_optimizers()
    for _ in range(300):
        terms = model.loss(x[torch.randint(1024, (64,))])
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        worst = {name: max(value, terms[name].item()) for name, value in worst.items()}
    assert all(value.isfinite() for value in terms.values())
    assert worst["feature_nll"] < 4 * 128
    assert worst["discriminator"] < 10
    with torch.no_grad():
        mse = (model.eval()(x) - x).square().mean() / (x - x.mean(0)).square().mean()
    if rate < 1e-3:
        assert mse < 0.55
