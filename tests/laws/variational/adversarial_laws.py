"""Laws of FactorVAE and the VAE-GAN: which loss trains which network, one optimiser against several, inference."""

import math
import os
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


def player_parameters(model: Any) -> dict[str, list[nn.Parameter]]:
    """The parameters of each player, that is of the networks trained with one loss."""
    players = {"decoder": [*model.decoder.parameters(), *model.likelihood.parameters()]}
    players |= {"encoder": [*model.encoder.parameters()], "discriminator": [*model.discriminator.parameters()]}
    if "features" in dict(model.discriminator.named_children()):
        return players
    return {"vae": players["encoder"] + players["decoder"], "discriminator": players["discriminator"]}


def draw(model: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The KL by torch.distributions, one code for each sample, and the decoder's output for it."""
    mu, log_var = model.posterior(x)
    q = D.Normal(mu, (0.5 * log_var).exp())
    z = mu + q.scale * torch.randn_like(mu)
    kl = D.kl_divergence(q, D.Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum(1).mean()
    return kl, z, model.decoder(z)


def factor_losses(model: Any, x: Tensor) -> dict[str, Tensor]:
    """The loss that each player of FactorVAE minimises."""
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
    """The loss that each player of the VAE-GAN minimises."""
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


# ---- which loss trains which network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", NAMES)
def test_player_parameters_partition_the_model(name: str, likelihood: str) -> None:
    model = small(name, likelihood=likelihood, discriminator_lr=3e-3)
    groups = model.configure_optimizers().param_groups
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters()}
    expected = [{id(p) for p in part} for part in player_parameters(model).values()]
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
def test_one_backward_gives_each_network_its_gradient(name: str, likelihood: str, training: bool, shifted: Any) -> None:
    model, x = shifted(small(name, likelihood=likelihood, gamma=0.7)).train(training), images()
    torch.manual_seed(3)
    terms = model.loss(x)
    terms["loss"].backward()
    torch.manual_seed(3)
    losses = LOSSES[name](model, x)
    for player, part in player_parameters(model).items():
        expected = gradients(losses[player], part)
        assert size(expected) > 1e-3, player
        for p, g in zip(part, expected, strict=True):
            torch.testing.assert_close(p.grad, torch.zeros_like(p) if g is None else g, rtol=1e-7, atol=1e-9)
    first = next(iter(losses))
    torch.testing.assert_close(terms["loss"], losses["vae" if name == "factor_vae" else "encoder"], msg=first)
    torch.testing.assert_close(terms["discriminator"], losses["discriminator"])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", NAMES)
def test_no_term_reaches_other_networks(name: str, likelihood: str, shifted: Any) -> None:
    model, x = shifted(small(name, likelihood=likelihood)), images()
    terms, parts = model.loss(x), player_parameters(model)
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


# ---- one optimiser against several -----------------------------------------------------------------------------------


def trained(model: Any, batches: list[Tensor], quiet: Any, *callbacks: Any, **settings: Any) -> pl.Trainer:
    torch.manual_seed(11)
    trainer: pl.Trainer = quiet(max_epochs=1, callbacks=[*callbacks], **settings)
    ckpt_path = settings.pop("ckpt_path", None)
    trainer.fit(model, DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)  # type: ignore[arg-type]
    return trainer


@pytest.mark.parametrize("name", NAMES)
def test_training_matches_separate_optimisers(name: str, shifted: Any, quiet: Any) -> None:
    """Six steps of the trainer against one Adam for each player; the fast loop is in use unless it is switched off."""
    batches = [images(6, seed) for seed in range(6)]
    model = shifted(small(name, lr=2e-3, discriminator_lr=5e-3, gamma=0.7))
    other = small(name, gamma=0.7)
    other.load_state_dict(model.state_dict())
    plans: list[Any] = []
    look = pl.callbacks.LambdaCallback(
        on_train_epoch_end=lambda t, _: plans.append(getattr(t.fit_loop.epoch_loop, "plan", None))
    )
    trained(model, batches, quiet, look)
    assert plans and (plans[0] is None) == (os.environ.get("AEZOO_SPEED") == "off")
    parts = player_parameters(other)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", [{}, {"lr_schedule": "linear", "warmup_steps": 2}], ids=["constant", "linear"])
def test_resumed_networks_use_requested_learning_rates(
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


# ---- inference and the KL term ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_inference_equals_vae(name: str, shifted: Any) -> None:
    """The discriminator takes no part in inference."""
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
def test_beta_and_capacity_apply_to_kl_term(name: str, shifted: Any) -> None:
    model, x, found = shifted(small(name)), images(), []
    for beta, capacity in ((1.0, 0.0), (0.25, 0.0), (0.25, 90.0)):
        model.beta, model.capacity = beta, capacity
        torch.manual_seed(3)
        found.append(model.loss(x))
    kl = found[0]["kl"]
    assert kl > 0.1
    torch.testing.assert_close(found[1]["loss"], found[0]["loss"] - 0.75 * kl)
    torch.testing.assert_close(found[2]["loss"], found[0]["loss"] - kl + 0.25 * (90 - kl))


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_one_process(name: str, shifted: Any) -> None:
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


# ---- the discriminator's loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "costs"), [("factor_vae", 1), ("vae_gan", 3)])
def test_zero_logits_cost_log_2_per_term(name: str, costs: int, shifted: Any) -> None:
    model = shifted(small(name))
    with torch.no_grad():
        for p in [*model.discriminator.parameters()][-2:]:
            p.zero_()
    terms = model.loss(images())
    assert terms["discriminator"].item() == pytest.approx(costs * math.log(2))
    if name == "factor_vae":
        assert terms["tc"].item() == 0
