"""Laws of every model: nats per sample, one scale for training and evaluation, float32 where autocast would round."""

import math
from typing import Any

import pytest
import torch
import torch.distributions as D
from torch import Tensor

import aezoo
from aezoo.testing import SharedNoise

SHAPE = (1, 8, 8)
MODELS: dict[str, dict[str, Any]] = {
    "linear_ae": {"latent_dim": 4},
    "dense_ae": {"hidden_dims": (24,), "latent_dim": 6},
    "conv_ae": {"hidden_dims": (6, 8), "latent_dim": 6},
    "resnet_ae": {"hidden_dims": (8, 8), "latent_dim": 6},
    "denoising_ae": {"hidden_dims": (24,), "latent_dim": 6},
    "contractive_ae": {"latent_dim": 20},
    "sparse_ae_l1": {"latent_dim": 20},
    "sparse_ae_kl": {"latent_dim": 20},
    "topk_sae": {"latent_dim": 40, "k": 5, "dead_after": 60},
    "vae": {"hidden_dims": (24,), "latent_dim": 6, "beta": 2.0},
}
# rhohat is a mean over the batch before it enters a logarithm; dead latents are counted over batches
BATCH_COUPLED = ("sparse_ae_kl", "topk_sae")


def build(name: str, shifted: Any, **extra: Any) -> Any:
    torch.manual_seed(0)
    model = shifted(aezoo.create_model(name, input_shape=SHAPE, **MODELS[name], **extra))
    if name == "topk_sae":
        with torch.no_grad():  # a third is dead, with positive pre-activations that the live latents outrank
            model.encoder.bias += 8
            model.encoder.bias[::3] -= 5
        model.since_fired_N[::3] = 10**6
    return model


def loss(model: Any, x: Tensor, rows: Any, total: int = 6) -> dict[str, Tensor]:
    with SharedNoise(rows, total), torch.no_grad():
        found: dict[str, Tensor] = model.loss(x)
    return found


def test_the_table_covers_every_built_in_model() -> None:
    built_in = {name for family in ("classic", "sparse", "variational") for name in aezoo.list_models(family=family)}
    assert set(MODELS) == built_in


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_given_twice_has_the_same_loss(name: str, training: bool, shifted: Any) -> None:
    """A sum over the batch, or an unbiased statistic of it, would show; rhohat and the L0 are plain means."""
    x = torch.rand(6, *SHAPE)
    once = loss(build(name, shifted).double().train(training), x.double(), range(6))
    twice = loss(build(name, shifted).double().train(training), x.double().repeat(2, 1, 1, 1), [*range(6)] * 2)
    assert once.keys() == twice.keys()
    for term in once:
        torch.testing.assert_close(twice[term], once[term], rtol=1e-6, atol=1e-9, msg=lambda m, t=term: f"{t}: {m}")


@pytest.mark.parametrize("name", [name for name in MODELS if name not in BATCH_COUPLED])
def test_the_loss_of_a_batch_is_the_mean_of_its_samples(name: str, shifted: Any) -> None:
    model, x = build(name, shifted).double().eval(), torch.rand(6, *SHAPE, dtype=torch.float64)
    whole = loss(model, x, range(6))
    alone = [loss(model, x[i : i + 1], [i]) for i in range(6)]
    for term in whole:
        mean = torch.stack([one[term] for one in alone]).mean()
        torch.testing.assert_close(whole[term], mean, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_codes_reconstructions_and_scores_ignore_the_batch_mates(name: str, shifted: Any) -> None:
    model, x = build(name, shifted).double().eval(), torch.rand(6, *SHAPE, dtype=torch.float64)
    for call in (model.encode, model, model.score):
        with torch.no_grad():
            torch.testing.assert_close(call(x)[2:4], call(x[2:4]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_training_and_evaluation_compute_the_same_loss_at_the_same_noise(name: str, shifted: Any) -> None:
    x = torch.rand(6, *SHAPE)
    train, evaluation = (loss(build(name, shifted).train(mode), x, range(6)) for mode in (True, False))
    for term in train:
        torch.testing.assert_close(train[term], evaluation[term], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("denoising_ae", "vae")])
def test_nll_is_summed_over_the_data_and_averaged_over_the_batch(name: str, shifted: Any) -> None:
    """Against torch.distributions, summed over the 64 values here: a mean over them would be 64 times less."""
    for likelihood in ("bernoulli", "gaussian:0.3"):
        model, x = build(name, shifted, likelihood=likelihood).eval(), torch.rand(6, *SHAPE)
        x_hat = model(x)
        if likelihood == "bernoulli":
            log_p = D.Bernoulli(probs=x_hat, validate_args=False).log_prob(x)
        else:
            log_p = D.Normal(x_hat, 0.3).log_prob(x)
        expected = -log_p.flatten(1).sum(1)
        torch.testing.assert_close(model.loss(x)["nll"], expected.mean(), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(model.score(x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_weighted_sum_of_its_terms(name: str, shifted: Any) -> None:
    weights = {
        "contractive_ae": {"jacobian": 0.1},
        "sparse_ae_l1": {"l1": 0.1},
        "sparse_ae_kl": {"sparsity": 3.0},
        "topk_sae": {"aux": 1 / 32},
        "vae": {"kl": 2.0},
    }.get(name, {})
    terms = build(name, shifted).double().loss(torch.rand(6, *SHAPE, dtype=torch.float64))
    total = terms["nll"] + sum(weight * terms[term] for term, weight in weights.items())
    torch.testing.assert_close(terms["loss"], total)
    assert all(terms[term] > 0 for term in weights)  # away from the neutral value
    assert all(value.shape == () for value in terms.values())


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "continuous_bernoulli", "discretised_logistic"])
@pytest.mark.parametrize("name", MODELS)
def test_terms_stay_float32_and_close_under_bf16_autocast(name: str, likelihood: str, shifted: Any) -> None:
    model, x = build(name, shifted, likelihood=likelihood).eval(), torch.rand(64, *SHAPE)
    full = loss(model, x, range(64), 64)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(model, x, range(64), 64)
    for term, value in half.items():
        assert value.dtype == torch.float32, term
        if term not in ("dead_latents", "l0"):
            assert value.item() == pytest.approx(full[term].item(), rel=0.02, abs=0.02 * math.log(2)), term
