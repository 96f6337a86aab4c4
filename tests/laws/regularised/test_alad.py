"""Laws of ALAD: gradients of both players in one backward pass, the cycle terms, the score."""

import copy
import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader

import aezoo
from aezoo.tasks.detect import detect
from aezoo.training.seeding import mix

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

SHAPE, CODE = (2, 3, 3), 3


def images(n: int = 6, seed: int = 7) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def alad(**settings: Any) -> Any:
    settings = {
        "input_shape": SHAPE,
        "latent_dim": CODE,
        "hidden_dims": (16,),
        "discriminator_dims": (12, 8),
        **settings,
    }
    return aezoo.create_model("alad", **settings).double()


def players(model: Any) -> dict[str, list[nn.Parameter]]:
    parts = (model.encoder, model.decoder, model.likelihood)
    return {
        "generator": [p for part in parts for p in part.parameters()],
        "discriminator": [*model.discriminator.parameters()],
    }


def discriminate(model: Any, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Features of a pair, a hidden layer with mean 0 and variance 1, and the probability that the pair is real."""
    net = model.discriminator[name]
    h = net.body(torch.cat([a, net.lift(b)], 1))
    f = (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return f, torch.sigmoid(net.head(f))


def losses(model: Any, x: Tensor, z: Tensor) -> dict[str, Tensor]:
    """The loss of each player, by cross-entropies as in https://github.com/houssamzenati."""
    e, made = model.encoder(x), model.decode(z)
    x_hat, z_hat = model.decode(e), model.encoder(made)
    real = {"xz": (x, e), "xx": (x, x), "zz": (z, z)}
    fake = {"xz": (made, z), "xx": (x, x_hat), "zz": (z, z_hat)}

    def entropy(pair: tuple[Tensor, Tensor], name: str, target: int) -> Tensor:
        p = discriminate(model, name, *pair)[1]
        return F.binary_cross_entropy(p, torch.full_like(p, target))

    nll = -model.likelihood.log_prob(model.decoder(e), x).mean()
    tells = {name: entropy(real[name], name, 1) + entropy(fake[name], name, 0) for name in real}
    fools = {name: entropy(real[name], name, 0) + entropy(fake[name], name, 1) for name in real}
    return {
        "generator": model.nll_weight * nll + sum(fools.values()),
        "discriminator": sum(tells.values()),
        "nll": nll,
        "adversarial": fools["xz"],
        "cycle_x": entropy(fake["xx"], "xx", 1),
        "cycle_z": entropy(fake["zz"], "zz", 1),
    }


def drawn(model: Any, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The terms, and the same by hand with the same draws from the prior."""
    torch.manual_seed(5)
    terms = model.loss(x)
    torch.manual_seed(5)
    return terms, losses(model, x, torch.randn(len(x), CODE, dtype=torch.float64))


def size(value: Tensor, of: list[nn.Parameter]) -> float:
    """The norm of a gradient, 0 where there is none."""
    found = torch.autograd.grad(value, of, allow_unused=True, retain_graph=True)
    return math.sqrt(sum(float((g**2).sum()) for g in found if g is not None))


# ---- which loss trains which network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "gaussian:learned"])
def test_single_backward_gives_each_network_its_gradient(likelihood: str, training: bool, shifted: Any) -> None:
    model, x = shifted(alad(likelihood=likelihood, nll_weight=0.3)).train(training), images()
    terms, expected = drawn(model, x)
    terms["loss"].backward()
    # the pairs (x, x) and (z, z), which the generator cannot change, are not in the value
    generator = expected["adversarial"] + expected["cycle_x"] + expected["cycle_z"] + 0.3 * expected["nll"]
    torch.testing.assert_close(terms["loss"], generator)
    for term in ("nll", "adversarial", "cycle_x", "cycle_z", "discriminator"):
        torch.testing.assert_close(terms[term], expected[term])
    for player, part in players(model).items():
        wanted = torch.autograd.grad(expected[player], part, retain_graph=True)
        assert math.sqrt(sum(float((g**2).sum()) for g in wanted)) > 1e-3
        for p, g in zip(part, wanted, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=1e-9)


def test_no_term_reaches_other_networks(shifted: Any) -> None:
    model, x = shifted(alad()), images()
    terms, parts = model.loss(x), players(model)
    for term in ("nll", "adversarial", "cycle_x", "cycle_z"):
        assert size(terms[term], parts["generator"]) > 1e-6
        assert size(terms[term], parts["discriminator"]) == 0
    assert size(terms["discriminator"], parts["discriminator"]) > 1e-6
    assert size(terms["discriminator"], parts["generator"]) == 0
    # these terms train both the encoder and the decoder
    for term in ("adversarial", "cycle_x", "cycle_z"):
        for net in (model.encoder, model.decoder):
            assert size(terms[term], [*net.parameters()]) > 1e-6
    for net in model.discriminator.values():
        assert all(size(terms["discriminator"], [p]) > 0 for p in net.parameters())


def test_networks_partition_all_parameters() -> None:
    model = alad(discriminator_lr=3e-3, likelihood="gaussian:learned")
    first, last = model.configure_optimizers().param_groups
    ids = [id(p) for group in (first, last) for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    assert {id(p) for p in last["params"]} == {id(p) for p in model.discriminator.parameters()}
    # alad/run.py of https://github.com/houssamzenati/Adversarially-Learned-Anomaly-Detection
    assert (first["lr"], first["betas"]) == (1e-3, (0.5, 0.999))
    assert (last["lr"], last["betas"]) == (3e-3, (0.5, 0.999))


def test_training_matches_separate_optimisers(shifted: Any, quiet: Any) -> None:
    batches = [images(6, seed) for seed in range(5)]
    model = shifted(alad(lr=2e-3, discriminator_lr=5e-3, nll_weight=0.7))
    other = copy.deepcopy(model)
    torch.manual_seed(11)
    trainer: pl.Trainer = quiet(max_epochs=1)
    trainer.fit(model, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    parts = players(other)
    adams = {
        "generator": torch.optim.Adam(parts["generator"], 2e-3, (0.5, 0.999)),
        "discriminator": torch.optim.Adam(parts["discriminator"], 5e-3, (0.5, 0.999)),
    }
    for i, x in enumerate(batches):
        torch.manual_seed(mix(11, 0, 0, i))
        found = losses(other, x, torch.randn(6, CODE, dtype=torch.float64))
        grads = {player: torch.autograd.grad(found[player], part, retain_graph=True) for player, part in parts.items()}
        for player, part in parts.items():
            for p, g in zip(part, grads[player], strict=True):
                p.grad = g
            adams[player].step()
    for (key, mine), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8, msg=key)


def test_reconstruction_term_matches_dense_ae(shifted: Any) -> None:
    parent = shifted(
        aezoo.create_model(
            "dense_ae", SHAPE, latent_dim=CODE, hidden_dims=(16,), activation="leaky_relu", likelihood="gaussian"
        ).double()
    )
    x, state = images(), {k.replace("encoder.0.", "encoder."): v for k, v in parent.state_dict().items()}
    found = []
    for weight in (0.0, 2.5):
        model = alad(nll_weight=weight)
        torch.manual_seed(2)
        for p in model.discriminator.parameters():
            p.data.copy_(0.3 * torch.randn_like(p))
        model.load_state_dict(model.state_dict() | state)
        torch.manual_seed(5)
        terms = model.loss(x)
        torch.testing.assert_close(terms["nll"], parent.loss(x)["nll"])
        found.append(torch.autograd.grad(terms["loss"], [*model.encoder.parameters(), *model.decoder.parameters()]))
    expected = torch.autograd.grad(parent.loss(x)["loss"], [*parent.encoder.parameters(), *parent.decoder.parameters()])
    for without, with_it, g in zip(*found, expected, strict=True):
        torch.testing.assert_close(with_it - without, 2.5 * g)


# ---- pairs -----------------------------------------------------------------------------------------------------------


def test_zero_logits_cost_2_log_2_per_discriminator() -> None:
    model = alad()
    with torch.no_grad():
        for net in model.discriminator.values():
            for p in net.head.parameters():
                p.zero_()
    terms = model.loss(images())
    assert terms["discriminator"].item() == pytest.approx(6 * math.log(2))
    assert terms["adversarial"].item() == pytest.approx(2 * math.log(2))
    assert terms["cycle_x"].item() == terms["cycle_z"].item() == pytest.approx(math.log(2))


def identity() -> Any:
    """A model with the identity as encoder and decoder."""
    model = alad(input_shape=(CODE,), hidden_dims=())
    with torch.no_grad():
        for net in (model.encoder, model.decoder):
            for p in net.parameters():
                p.copy_(torch.eye(CODE) if p.ndim == 2 else torch.zeros(CODE))
    return model


def test_cycle_terms_compare_input_with_reconstruction() -> None:
    """With identities the pairs are (x, x) and (z, z); PyOD compares samples with decoded draws from the prior."""
    model, x = identity(), torch.rand(9, CODE, dtype=torch.float64)
    torch.manual_seed(5)
    z = torch.randn(9, CODE, dtype=torch.float64)
    expected = {name: -discriminate(model, name, v, v)[1].log().mean() for name, v in (("xx", x), ("zz", z))}
    torch.manual_seed(5)
    terms = model.loss(x)
    torch.testing.assert_close(terms["cycle_x"], expected["xx"])
    torch.testing.assert_close(terms["cycle_z"], expected["zz"])
    assert not model.score(x).any()
    wrong = -discriminate(model, "xx", x, model.decode(z))[1].log().mean()
    assert (wrong - expected["xx"]).abs() > 1e-3


def test_samples_are_decoded_standard_normal_draws() -> None:
    model = identity()
    assert model.has_prior
    assert all(stats.kstest(column, "norm").pvalue > 1e-3 for column in model.sample(4000).numpy().T)
    seen: list[Tensor] = []
    model.decoder.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    model.loss(torch.rand(4000, CODE, dtype=torch.float64))
    _, z = seen
    assert all(stats.kstest(column, "norm").pvalue > 1e-3 for column in z.numpy().T)


# ---- the score -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_score_is_feature_distance_of_the_two_pairs(likelihood: str, net: str, shifted: Any) -> None:
    model, x = shifted(alad(likelihood=likelihood, net=net)).eval(), images(20)
    with torch.no_grad():
        f, f_hat = discriminate(model, "xx", x, x)[0].numpy(), discriminate(model, "xx", x, model(x))[0].numpy()
        score = model.score(x)
    np.testing.assert_allclose(score, np.linalg.norm(f - f_hat, ord=1, axis=1), rtol=1e-9)
    torch.testing.assert_close(model.score(x[5:6]).detach(), score[5:6], rtol=1e-9, atol=0)


def test_score_is_invariant_to_discriminator_feature_scale(shifted: Any) -> None:
    model, x, found = shifted(alad()), images(), []
    for factor in (1, 1000):
        with torch.no_grad():
            model.discriminator["xx"].body[-2].weight *= factor
            model.discriminator["xx"].body[-2].bias *= factor
        found.append(model.score(x))
        assert (found[-1] > 0).all() and (found[-1] <= 2 * 8).all()
    torch.testing.assert_close(*found, rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(9,), (2, 16), (1, 9, 7), (3, 8, 8), (1, 4, 5, 6)], ids=str)
def test_every_input_shape_is_scored(shape: tuple[int, ...]) -> None:
    for net in ("mlp", "conv", "resnet")[: 1 if len(shape) == 1 else 3]:
        model, x = aezoo.create_model("alad", shape, net=net, hidden_dims=(4, 4)), torch.rand(5, *shape)
        model.loss(x)["loss"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert model.eval().score(x).shape == (5,)


@pytest.mark.slow
def test_one_class_training_detects_other_digits() -> None:
    data = aezoo.DataModule("digits", batch_size=64, train_classes=[3])
    x, y = data.tensors("train")[0], np.asarray(data.tensors("test")[1])
    model = aezoo.create_model("alad", (1, 8, 8), hidden_dims=(32,), lr=2e-3)
    optimizer = model.configure_optimizers()
    for _ in range(150):
        optimizer.zero_grad()
        model.loss(x[torch.randint(len(x), (64,))])["loss"].backward()
        optimizer.step()
    result = detect(model, data, score="nll", normal="3", n_shown=0, baselines=False)
    assert result.rows[0]["auroc"] == pytest.approx(roc_auc_score(y != 3, result.scores))
    assert result.rows[0]["auroc"] > 0.9
