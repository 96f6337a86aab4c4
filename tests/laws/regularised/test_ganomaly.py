"""Laws of GANomaly (Akcay et al. 2018)."""

import copy
import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from anomaly_laws import (  # noqa: F401
    SHAPE,
    images,
    test_every_input_shape_is_scored,
)
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
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

# ---- GANomaly: which loss trains which network -----------------------------------------------------------------------


LIKELIHOODS = ("laplace", "bernoulli", "gaussian:learned")


def ganomaly(**settings: Any) -> Any:
    settings = {"latent_dim": 4, "hidden_dims": (16,), "discriminator_dims": (12, 8), **settings}
    return aezoo.create_model("ganomaly", SHAPE, **settings).double()


def players(model: Any) -> dict[str, list[nn.Parameter]]:
    parts = (model.encoder, model.decoder, model.second_encoder, model.likelihood)
    return {
        "generator": [p for part in parts for p in part.parameters()],
        "discriminator": [*model.discriminator.parameters()],
    }


def features_by_hand(model: Any, x: Tensor) -> Tensor:
    """The last hidden layer, normalised to mean 0 and variance 1 for each sample."""
    h = model.discriminator.body(x)
    return (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()


def losses(model: Any, x: Tensor) -> dict[str, Tensor]:
    """The loss of each player: the authors' means, times X / 50."""
    z = model.encoder(x)
    params = model.decoder(z)
    x_hat = model.likelihood.mean(params)
    f, f_hat = features_by_hand(model, x), features_by_hand(model, x_hat)
    x_dim = x[0].numel()
    real, fake = (model.discriminator.head(features_by_hand(model, g)).sigmoid() for g in (x, x_hat.detach()))
    adversarial, encoding = F.mse_loss(f_hat, f.detach()), F.mse_loss(z, model.second_encoder(x_hat))
    nll = -model.likelihood.log_prob(params, x).mean()
    return {
        "generator": nll + model.adv_weight * x_dim * adversarial + model.enc_weight * x_dim * encoding,
        "discriminator": F.binary_cross_entropy(real, torch.ones_like(real))
        + F.binary_cross_entropy(fake, torch.zeros_like(fake)),
    }


def size(value: Tensor, of: list[nn.Parameter]) -> float:
    """The norm of a gradient, 0 where there is none."""
    found = torch.autograd.grad(value, of, allow_unused=True, retain_graph=True)
    return math.sqrt(sum(float((g**2).sum()) for g in found if g is not None))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_single_backward_gives_each_network_its_gradient(likelihood: str, training: bool, shifted: Any) -> None:
    model, x = shifted(ganomaly(likelihood=likelihood, adv_weight=0.7, enc_weight=0.3)).train(training), images()
    terms, expected = model.loss(x), losses(model, x)
    terms["loss"].backward()
    torch.testing.assert_close(terms["loss"], expected["generator"])
    torch.testing.assert_close(terms["discriminator"], expected["discriminator"])
    for player, part in players(model).items():
        wanted = torch.autograd.grad(expected[player], part)
        assert math.sqrt(sum(float((g**2).sum()) for g in wanted)) > 1e-3
        for p, g in zip(part, wanted, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=1e-9)


def test_no_term_reaches_other_networks(shifted: Any) -> None:
    model, x = shifted(ganomaly()), images()
    terms, parts = model.loss(x), players(model)
    for term in ("nll", "adversarial", "encoding"):
        assert size(terms[term], parts["generator"]) > 1e-6
        assert size(terms[term], parts["discriminator"]) == 0
    assert size(terms["discriminator"], parts["discriminator"]) > 1e-6
    assert size(terms["discriminator"], parts["generator"]) == 0
    # the codes' distance trains both encoders and the decoder between them
    for net in (model.encoder, model.decoder, model.second_encoder):
        assert size(terms["encoding"], [*net.parameters()]) > 1e-6
    assert size(terms["nll"], [*model.second_encoder.parameters()]) == 0
    # ports of https://github.com/samet-akcay/ganomaly do not detach this output
    leaky = F.softplus(model.discriminator(model(x))[1]).mean()
    assert size(leaky, parts["generator"]) > 1e-6


def test_networks_partition_all_parameters() -> None:
    model = ganomaly(discriminator_lr=3e-3, likelihood="laplace:learned")
    first, last = model.configure_optimizers().param_groups
    ids = [id(p) for group in (first, last) for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    assert {id(p) for p in last["params"]} == {id(p) for p in model.discriminator.parameters()}
    # https://github.com/samet-akcay/ganomaly, lib/model.py: both
    assert (first["lr"], first["betas"]) == (1e-3, (0.5, 0.999))
    assert (last["lr"], last["betas"]) == (3e-3, (0.5, 0.999))
    groups = ganomaly(optimizer="adam:beta1=0.8").configure_optimizers().param_groups
    assert [group["betas"] for group in groups] == [(0.8, 0.999)] * 2
    assert len(ganomaly(optimizer="sgd").configure_optimizers().param_groups) == 2


def test_training_matches_separate_optimisers(shifted: Any, quiet: Any) -> None:
    batches = [images(6, seed) for seed in range(5)]
    model = shifted(ganomaly(lr=2e-3, discriminator_lr=5e-3, adv_weight=0.7))
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
        found = losses(other, x)
        grads = {player: torch.autograd.grad(found[player], part) for player, part in parts.items()}
        for player, part in parts.items():
            for p, g in zip(part, grads[player], strict=True):
                p.grad = g
            adams[player].step()
    for (key, mine), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8, msg=key)


def test_zero_weights_generator_equals_dense_ae(shifted: Any) -> None:
    """Loss and gradients are those of dense_ae for any discriminator."""
    model, x = shifted(ganomaly(adv_weight=0.0, enc_weight=0.0)), images()
    parent = aezoo.create_model(
        "dense_ae", SHAPE, latent_dim=4, hidden_dims=(16,), activation="leaky_relu", likelihood="laplace"
    ).double()
    pairs = [
        *zip(model.encoder.parameters(), parent.encoder.parameters(), strict=True),
        *zip(model.decoder.parameters(), parent.decoder.parameters(), strict=True),
    ]
    for p, q in pairs:
        q.data.copy_(p)
    found, expected = model.loss(x), parent.loss(x)
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=0)
    found["loss"].backward()
    expected["loss"].backward()
    for p, q in pairs:
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-9)


def test_zero_logits_cost_2_log_2() -> None:
    model = ganomaly()
    with torch.no_grad():
        for p in model.discriminator.head.parameters():
            p.zero_()
    assert model.loss(images())["discriminator"].item() == pytest.approx(2 * math.log(2))


def test_feature_scale_of_discriminator_cancels(shifted: Any) -> None:
    model, x, found = shifted(ganomaly()), images(), []
    for factor in (1, 1000):
        with torch.no_grad():
            model.discriminator.body[-2].weight *= factor
            model.discriminator.body[-2].bias *= factor
        found.append(model.loss(x)["adversarial"])
        # at most 4 per feature, for opposite points of a sphere
        assert 0 < found[-1] <= 4 * 18
    torch.testing.assert_close(*found, rtol=1e-3, atol=0)


# ---- GANomaly: the score ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("likelihood", ["laplace", "bernoulli"])
def test_score_is_mean_squared_code_difference(likelihood: str, net: str, shifted: Any) -> None:
    model, x = shifted(ganomaly(likelihood=likelihood, net=net)).eval(), images(20)
    with torch.no_grad():
        z, z_hat = model.encode(x).numpy(), model.second_encoder(model(x)).numpy()
        score = model.score(x)
    # torch.mean(torch.pow((latent_i-latent_o), 2), dim=1) in lib/model.py of https://github.com/samet-akcay/ganomaly
    np.testing.assert_allclose(score.numpy(), np.mean((z - z_hat) ** 2, axis=1), rtol=1e-9)
    torch.testing.assert_close(model.score(x[5:6]).detach(), score[5:6], rtol=1e-9, atol=0)
    # scaled by minimum and maximum, as in the paper and anomalib #1093, a score depends on the other samples
    scaled = [(s - s.min()) / (s.max() - s.min()) for s in (score, score[3:9])]
    assert (scaled[0][3:9] - scaled[1]).abs().max() > 0.01


def test_agreeing_encoders_give_zero_score(shifted: Any) -> None:
    """An exact autoencoder whose second encoder equals its first."""
    model: Any = aezoo.create_model("ganomaly", (6,), latent_dim=6, hidden_dims=(), discriminator_dims=(8,)).double()
    with torch.no_grad():
        for net in (model.encoder, model.decoder, model.second_encoder):
            for p in net.parameters():
                p.copy_(torch.eye(6) if p.ndim == 2 else torch.zeros(6))
        for p in model.discriminator.parameters():  # few bits, so that sums are exact in any order
            p.copy_((256 * p).round() / 256)
    x = (256 * torch.rand(9, 6, dtype=torch.float64)).round() / 256
    terms = model.loss(x)
    assert not model.eval().score(x).any()
    assert terms["encoding"] == 0 and terms["adversarial"] == 0
    assert terms["nll"].item() == pytest.approx(6 * math.log(2))


# ---- detection -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ganomaly_detects_other_digits() -> None:
    """One-vs-rest; results of runs differ much (anomalib #1093), hence the mean of two. Baselines are reported too."""
    data, found = aezoo.DataModule("digits", batch_size=64, train_classes=[3]), []
    x, y = data.tensors("train")[0], np.asarray(data.tensors("test")[1])
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = aezoo.create_model("ganomaly", (1, 8, 8), hidden_dims=(64,), lr=2e-3)
        optimizer = model.configure_optimizers()
        for _ in range(400):
            optimizer.zero_grad()
            model.loss(x[torch.randint(len(x), (64,))])["loss"].backward()
            optimizer.step()
        result = detect(model, data, score="nll,mse", normal="3", n_shown=0)
        assert result.rows[0]["auroc"] == pytest.approx(roc_auc_score(y != 3, result.scores))
        assert {"mse", "pca", "mean", "knn", "isolation_forest"} < {row["method"] for row in result.rows}
        found.append(result.rows[0]["auroc"])
    assert np.mean(found) > 0.9, found
