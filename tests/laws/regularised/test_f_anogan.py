"""Laws of f-AnoGAN: the gradient penalty in closed form, three losses in one backward pass, and its score.

The model was compared with the most used port, in float64 on equal networks, weights, batch, codes and interpolates.
Differences are relative to the largest value, for gradients the largest of all parameters, over three networks.

    https://github.com/A03ki/f-AnoGAN, commit 900f9d643525ed0da2ca09b7b3420643e26f6775
        fanogan/train_wgangp.py            gradients of the critic 1.2e-15, of the generator 0
        fanogan/train_encoder_izif.py      gradients of the encoder 1.6e-15
        fanogan/test_anomaly_detection.py  score 4.9e-16, squared error 3.6e-16, loss 3.6e-16

Our scores are X times theirs, which are means, plus the constant of the likelihood. Differs: the port draws the share
of an interpolate for each channel; the authors and ours draw it for each sample.

The authors' code is written in TensorFlow and Python 2 and was read line by line: wgangp_64x64.py, z_encoding_izif.py
and anomaly_detection.py of

    https://github.com/tSchlegl/f-AnoGAN, commit 35b1de9b74764e2843807ed4087528ce265f4d24

It has the same losses and score. Differs: their encoder ends in tanh, so that codes lie in [-1, 1]^D, and is trained
after the other networks, which their comments attribute to the paper. Ours has a linear last layer, and all networks
are trained at once.
"""

import copy
import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributions as D
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

SHAPE, X, CODE, N = (2, 3, 3), 18, 3, 6


def images(n: int = N, seed: int = 7) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small(**settings: Any) -> Any:
    settings = {
        **{"input_shape": SHAPE, "latent_dim": CODE, "hidden_dims": (16,), "discriminator_dims": (12, 8)},
        **settings,
    }
    return aezoo.create_model("f_anogan", **settings).double()


def players(model: Any) -> dict[str, list[nn.Parameter]]:
    return {
        "encoder": [*model.encoder.parameters(), *model.likelihood.parameters()],
        "generator": [*model.decoder.parameters()],
        "critic": [*model.discriminator.parameters()],
    }


def discriminate(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    f = nn.functional.leaky_relu(model.discriminator.body[0](x), 0.2)
    return f, f @ model.discriminator.head.weight[0] + model.discriminator.head.bias


def penalties(model: Any, x: Tensor, made: Tensor, a: Tensor) -> Tensor:
    """As in wgangp_64x64.py of https://github.com/tSchlegl/f-AnoGAN, by torch.autograd."""
    between = (made + a[:, None, None, None] * (x - made)).detach().requires_grad_()
    (g,) = torch.autograd.grad(discriminate(model, between)[1].sum(), between, create_graph=True)
    return (g.square().sum((1, 2, 3)).sqrt() - 1) ** 2


def losses(model: Any, x: Tensor, z: Tensor, a: Tensor) -> dict[str, Tensor]:
    """The loss of each player, and all terms."""
    params, made = model.decoder(model.encoder(x)), model.decode(z)
    nll = -model.likelihood.log_prob(params, x).mean()
    off = (discriminate(model, x)[0] - discriminate(model, model.likelihood.mean(params))[0]).square().mean(1)
    critic = discriminate(model, made)[1].mean() - discriminate(model, x)[1].mean()
    penalty = penalties(model, x, made, a).mean()
    encoder = nll + model.feature_weight * X * off.mean()
    return {
        "encoder": encoder,
        "generator": model.generator_weight * encoder - discriminate(model, made)[1].mean(),
        "critic": critic + model.penalty_weight * penalty,
        "nll": nll,
        "features": X * off.mean(),
        "adversarial": -discriminate(model, made)[1].mean(),
        "discriminator": critic,
        "gradient_penalty": penalty,
    }


def draws(n: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(n, CODE, dtype=torch.float64), torch.rand(n, dtype=torch.float64)


def size(value: Tensor, of: list[nn.Parameter]) -> float:
    """The norm of a gradient, 0 where there is none."""
    found = torch.autograd.grad(value, of, allow_unused=True, retain_graph=True)
    return math.sqrt(sum(float((g**2).sum()) for g in found if g is not None))


# ---- which loss trains which network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "gaussian:learned"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_single_backward_gives_each_network_its_gradient(
    alpha: float, likelihood: str, training: bool, shifted: Any
) -> None:
    settings = {"generator_weight": alpha, "feature_weight": 0.7, "penalty_weight": 4.0, "likelihood": likelihood}
    model, x = shifted(small(**settings)).train(training), images()
    torch.manual_seed(5)
    terms = model.loss(x)
    terms["loss"].backward()
    torch.manual_seed(5)
    expected = losses(model, x, *draws())
    torch.testing.assert_close(terms["loss"], expected["encoder"])
    for term in terms.keys() - {"loss"}:
        torch.testing.assert_close(terms[term], expected[term])
    for player, part in players(model).items():
        wanted = torch.autograd.grad(expected[player], part, retain_graph=True, allow_unused=True)
        assert math.sqrt(sum(float((g**2).sum()) for g in wanted if g is not None)) > 1e-3
        for p, g in zip(part, wanted, strict=True):
            torch.testing.assert_close(p.grad, torch.zeros_like(p) if g is None else g, rtol=1e-6, atol=1e-9)


def test_no_term_reaches_other_networks(shifted: Any) -> None:
    model, x = shifted(small(generator_weight=0.0)), images()
    terms, parts = model.loss(x), players(model)
    moved = {"nll": "encoder", "features": "encoder", "adversarial": "generator"}
    moved |= {"discriminator": "critic", "gradient_penalty": "critic"}
    for term, player in moved.items():
        for other, part in parts.items():
            assert (size(terms[term], part) > 1e-6) == (other == player), (term, other)


def test_networks_partition_all_parameters() -> None:
    model = small(discriminator_lr=5e-3, likelihood="gaussian:learned")
    first, last = model.configure_optimizers().param_groups
    ids = [id(p) for group in (first, last) for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    assert {id(p) for p in last["params"]} == {id(p) for p in model.discriminator.parameters()}
    # wgangp_64x64.py of https://github.com/tSchlegl/f-AnoGAN
    assert (first["lr"], first["betas"]) == (1e-3, (0.0, 0.9))
    assert (last["lr"], last["betas"]) == (5e-3, (0.0, 0.9))


def test_generator_and_critic_train_independently_of_encoder(shifted: Any, quiet: Any) -> None:
    """A loop of WGAN-GP by hand, which has no encoder, gives the same weights."""
    batches = [images(N, seed) for seed in range(5)]
    model = shifted(small(lr=2e-3, discriminator_lr=5e-3, generator_weight=0.0))
    other, start = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    torch.manual_seed(11)
    trainer: pl.Trainer = quiet(max_epochs=1)
    trainer.fit(model, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    parts = players(other)
    adams = {
        "generator": torch.optim.Adam(parts["generator"], 2e-3, (0.0, 0.9)),
        "critic": torch.optim.Adam(parts["critic"], 5e-3, (0.0, 0.9)),
    }
    for i, x in enumerate(batches):
        torch.manual_seed(mix(11, 0, 0, i))
        z, a = draws()
        made = other.decode(z)
        critic = discriminate(other, made.detach())[1].mean() - discriminate(other, x)[1].mean()
        critic = critic + 10 * penalties(other, x, made, a).mean()
        found = {"generator": -discriminate(other, made)[1].mean(), "critic": critic}
        grads = {player: torch.autograd.grad(value, parts[player], retain_graph=True, allow_unused=True)
                 for player, value in found.items()}  # fmt: skip
        for player, adam in adams.items():
            for p, g in zip(parts[player], grads[player], strict=True):
                p.grad = g
            adam.step()
    for key, mine in model.state_dict().items():
        if key.startswith(("decoder.", "discriminator.")):
            torch.testing.assert_close(mine, other.state_dict()[key], rtol=1e-6, atol=1e-8, msg=key)
        assert key == "discriminator.head.bias" or not torch.equal(mine, start[key]), key


def test_reconstruction_loss_and_score_match_dense_ae(shifted: Any) -> None:
    how: dict[str, Any] = {"hidden_dims": (16,), "activation": "leaky_relu", "likelihood": "gaussian"}
    parent = shifted(aezoo.create_model("dense_ae", SHAPE, latent_dim=CODE, **how).double())
    model, x = small(feature_weight=0.0), images()
    model.load_state_dict(
        model.state_dict() | {k.replace("encoder.0.", "encoder."): v for k, v in parent.state_dict().items()}
    )
    torch.testing.assert_close(model.loss(x)["loss"], parent.loss(x)["loss"])
    torch.testing.assert_close(model.score(x), parent.score(x))
    wanted = torch.autograd.grad(parent.loss(x)["loss"], [*parent.encoder.parameters()])
    found = torch.autograd.grad(model.loss(x)["loss"], [*model.encoder.parameters()])
    for g, own in zip(wanted, found, strict=True):
        torch.testing.assert_close(own, g)


# ---- the gradient penalty --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [0.3, 1.0, 2.5])
def test_linear_critic_penalty_is_norm_deviation(norm: float) -> None:
    model, x = small(discriminator_dims=(X,)), images()
    model.discriminator.body = nn.Flatten()
    w, b = model.discriminator.head.weight, model.discriminator.head.bias
    with torch.no_grad():
        w.mul_(norm / w.norm())
        b.fill_(4.0)
    penalty = model.penalty(x, images(seed=8))
    torch.testing.assert_close(penalty, torch.full((N,), (norm - 1) ** 2, dtype=torch.float64))
    g_w, g_b = torch.autograd.grad(penalty.mean(), [w, b], allow_unused=True)
    torch.testing.assert_close(g_w, 2 * (norm - 1) * w / norm)
    assert g_b is None or not g_b.any()


def test_constant_critic_has_finite_gradients() -> None:
    model, x = small(discriminator_dims=(X,)), images()
    model.discriminator.body = nn.Flatten()
    with torch.no_grad():
        model.discriminator.head.weight.zero_()
    terms = model.loss(x)
    assert terms["gradient_penalty"].item() == pytest.approx(1)
    terms["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


class HalfSquare(nn.Module):
    """||x||^2 / 2, whose gradient is x."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x.flatten(1).square().sum(1, keepdim=True)


def test_gradient_penalty_uses_uniform_interpolates() -> None:
    model, n = small(discriminator_dims=(1,)), 4000
    model.discriminator.body = HalfSquare()
    with torch.no_grad():
        model.discriminator.head.weight.fill_(1.0)
    x, made = torch.full((n, *SHAPE), 3.0, dtype=torch.float64), torch.ones(n, *SHAPE, dtype=torch.float64)
    slope = model.penalty(x, made).sqrt() + 1  # the norm is above 1
    a = (slope / math.sqrt(X) - 1) / 2
    assert stats.kstest(a.detach().numpy(), "uniform").pvalue > 1e-3


def test_critic_loss_is_invariant_to_constant_shift(shifted: Any) -> None:
    model, x, found = shifted(small()), images(), []
    for _ in range(2):
        torch.manual_seed(5)
        terms = model.loss(x)
        found.append([terms[term] for term in ("discriminator", "gradient_penalty", "loss")])
        with torch.no_grad():
            model.discriminator.head.bias += 7
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


# ---- the score -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("kappa", [0.0, 0.6])
def test_score_is_number_of_values_times_that_of_paper(kappa: float, net: str, shifted: Any) -> None:
    """A(x) = ||x - G(E(x))||^2 / n + kappa ||f(x) - f(G(E(x)))||^2 / n_d, equation 6; and the Gaussian's constant."""
    model, x = shifted(small(feature_weight=kappa, net=net)).eval(), images(20)
    with torch.no_grad():
        x_hat = model.decoder(model.encoder(x))
        f, f_hat = discriminate(model, x)[0].numpy(), discriminate(model, x_hat)[0].numpy()
        score = model.score(x)
    off, off_f = (x - x_hat).numpy().reshape(20, X), f - f_hat
    paper = (off**2).sum(1) / X + kappa * (off_f**2).sum(1) / off_f.shape[1]
    np.testing.assert_allclose(score, X * paper + X * math.log(math.pi) / 2, rtol=1e-9)
    assert off_f.shape[1] == 8 and (off_f**2).sum(1).min() > 1e-4
    torch.testing.assert_close(model.score(x[5:6]).detach(), score[5:6], rtol=1e-9, atol=0)


def test_zero_feature_weight_scores_negative_log_likelihood(shifted: Any) -> None:
    model, x = shifted(small(feature_weight=0.0, likelihood="bernoulli")).eval(), images()
    expected = -D.Bernoulli(probs=model(x), validate_args=False).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(model.score(x), expected)
    torch.testing.assert_close(model.loss(x)["loss"], expected.mean())


def test_samples_are_decoded_standard_normal_draws() -> None:
    model = small(input_shape=(CODE,), hidden_dims=())
    with torch.no_grad():
        for p in model.decoder.parameters():
            p.copy_(torch.eye(CODE) if p.ndim == 2 else torch.zeros(CODE))
    assert model.has_prior
    assert all(stats.kstest(column, "norm").pvalue > 1e-3 for column in model.sample(4000).numpy().T)
    seen: list[Tensor] = []
    model.decoder.register_forward_hook(lambda module, given, out: seen.append(given[0].detach()))
    model.loss(torch.rand(4000, CODE, dtype=torch.float64))
    assert all(stats.kstest(column, "norm").pvalue > 1e-3 for column in seen[-1].numpy().T)


@pytest.mark.parametrize("shape", [(9,), (2, 16), (1, 9, 7), (1, 4, 5, 6)], ids=str)
def test_every_input_shape_is_scored(shape: tuple[int, ...]) -> None:
    for net in ("mlp", "conv", "resnet")[: 1 if len(shape) == 1 else 3]:
        model, x = aezoo.create_model("f_anogan", shape, net=net, hidden_dims=(4, 4)), torch.rand(5, *shape)
        model.loss(x)["loss"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert model.eval().score(x).shape == (5,)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_one_class_training_detects_other_digits(alpha: float) -> None:
    data = aezoo.DataModule("digits", batch_size=64, train_classes=[3])
    x, y = data.tensors("train")[0], np.asarray(data.tensors("test")[1])
    model = aezoo.create_model("f_anogan", (1, 8, 8), hidden_dims=(32,), lr=2e-3, generator_weight=alpha)
    optimizer = model.configure_optimizers()
    for _ in range(150 if alpha else 300):
        optimizer.zero_grad()
        model.loss(x[torch.randint(len(x), (64,))])["loss"].backward()
        optimizer.step()
    result = detect(model, data, score="nll", normal="3", n_shown=0, baselines=False)
    assert result.rows[0]["auroc"] == pytest.approx(roc_auc_score(y != 3, result.scores))
    assert result.rows[0]["auroc"] > (0.9 if alpha else 0.8)
