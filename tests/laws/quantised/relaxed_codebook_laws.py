"""Laws of VQ-VAE-2, the Gumbel VQ-VAE and DALL-E's dVAE: loss, bounds by enumeration, temperature and gradients."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributions as D
from torch import Tensor
from torch.utils.data import DataLoader

import aezoo
import aezoo.distributions.categorical
from aezoo.models.quantised import gumbel_vq_vae

K, P = 3, 2  # codebook size and number of positions, small enough to list all codes of a sample


SHAPE = (1, 11, 9)


SMALL: dict[str, Any] = {"latent_dim": 4, "codebook_size": 7, "hidden_dims": (6, 5)}


GUMBEL = ("gumbel_vq_vae", "dvae")


def tiny(shifted: Any, name: str = "gumbel_vq_vae", **settings: Any) -> Any:
    """A model of vectors of 6 with P positions of K codes, whose posteriors are confident at some positions only."""
    given = {"latent_dim": 4, "codebook_size": K, "places": P, "net": "mlp", "hidden_dims": (12,)}
    made = aezoo.create_model(name, input_shape=(6,), **given | settings)
    model = shifted(made).double()
    with torch.no_grad():
        [*model.encoder.parameters()][-2].mul_(8)
    return model


def vectors(n: int = 5) -> Tensor:
    return torch.rand(n, 6, dtype=torch.float64)


def nll_of(params: Tensor, x: Tensor) -> Tensor:
    """-log p(x | params) of a Bernoulli by torch.distributions, (B,)."""
    return -D.Bernoulli(logits=params, validate_args=False).log_prob(x).flatten(1).sum(1)


# ---- vq_vae_2: layout and use ----------------------------------------------------------------------------------------


def fitted(name: str, quiet: Any, **settings: Any) -> tuple[Any, Tensor, dict[str, float]]:
    """A model trained for 12 steps, its data, and its validation metrics."""
    made = aezoo.create_model(name, input_shape=SHAPE, **SMALL | settings)
    x = (torch.rand(40, 1, 1, 1) * torch.rand(40, *SHAPE)).clamp(0, 1)
    trainer = quiet(max_epochs=3)
    batches = DataLoader(x, batch_size=10)
    trainer.fit(made, batches, batches)
    found = trainer.validate(made, batches, verbose=False)[0]
    return made.eval(), x, found


# ---- gumbel_vq_vae and dvae: the formula -----------------------------------------------------------------------------


def with_noise(monkeypatch: pytest.MonkeyPatch, g_BPK: Tensor) -> None:
    """Return this Gumbel noise in every draw."""
    for module in (aezoo.distributions.categorical, gumbel_vq_vae):
        monkeypatch.setattr(module, "sample_gumbel", lambda like: g_BPK.view_as(like))


def reference_kl(logits_BPK: Tensor) -> Tensor:
    uniform = D.Categorical(logits=torch.zeros_like(logits_BPK))
    return D.kl_divergence(D.Categorical(logits=logits_BPK), uniform).sum(1).mean()


# ---- gumbel_vq_vae and dvae: bounds ----------------------------------------------------------------------------------


def exact(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Log p(x) and the ELBO by enumeration of all K^P codes: (B,), (B,)."""
    every = torch.tensor([*itertools.product(range(K), repeat=P)])
    log_q_BPK = model.encoder(x).movedim(1, 2).log_softmax(2)
    log_px, log_q = [], []
    for one in every:
        z = model.quantiser.code_KC[one].T.expand(len(x), -1, -1)
        log_px.append(-model.nll(model.decoder(z), x))
        log_q.append(log_q_BPK[:, torch.arange(P), one].sum(1))
    log_p = torch.stack(log_px, 1) - P * math.log(K)
    log_q_BM = torch.stack(log_q, 1)
    return torch.logsumexp(log_p, 1), (log_q_BM.exp() * (log_p - log_q_BM)).sum(1)


@pytest.mark.parametrize("name", GUMBEL)
@pytest.mark.parametrize("hard", [False, True])
def test_elbo_with_sampled_codes_is_below_evidence(name: str, hard: bool, shifted: Any) -> None:
    """In evaluation, and in training with hard codes, the mean over draws is the exact ELBO."""
    model, x = tiny(shifted, name, hard=hard), vectors(1)
    with torch.no_grad():
        log_p, elbo = exact(model, x)
        assert elbo < log_p - 0.05
        for training in (False, True):
            parts = [model.train(training).loss(x.expand(500, -1))["elbo"] for _ in range(40)]
            found = torch.stack(parts)
            error = 5 * found.std() / math.sqrt(40) + 1e-6
            if hard or not training:
                assert (found.mean() - elbo).abs() < error
            else:  # relaxed codes have another mean
                assert (found.mean() - elbo).abs() > error


@pytest.mark.parametrize("name", GUMBEL)
def test_loss_at_most_likely_codes_is_not_a_bound(name: str, shifted: Any) -> None:
    """The nll at the most likely codes plus the KL can be below -log p(x), so the loss draws codes in evaluation."""
    model = tiny(shifted, name).eval()
    with torch.no_grad():
        for p in [*model.encoder.parameters()][-2:]:
            p.mul_(0.02)  # nearly uniform, so that the KL is small
        for p in model.decoder.parameters():
            p.mul_(3)
        x = model(vectors(50)).clamp(0, 1)  # the reconstruction from the most likely codes
        log_p, elbo = exact(model, x)
        assert (elbo <= log_p + 1e-9).all()
        assert (-model.score(x) > log_p + 0.1).any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", GUMBEL)
def test_score_is_vae_score_at_most_likely_codes(name: str, training: bool, shifted: Any) -> None:
    """The score is nll + KL: the nll alone leaves out the cost of the code."""
    model, x = tiny(shifted, name, beta=2.5).train(training), vectors()
    with torch.no_grad():
        logits_BPK = model.encoder(x).movedim(1, 2)
        z = (torch.eye(K).double()[logits_BPK.argmax(2)] @ model.quantiser.code_KC).movedim(2, 1)
        kl = torch.stack([reference_kl(logits[None]) for logits in logits_BPK])
        assert (kl > 0.01).all()
        torch.testing.assert_close(model.score(x), model.nll(model.decoder(z), x) + kl)
        if name == "gumbel_vq_vae":
            torch.testing.assert_close(model.score(x), nll_of(model.decoder(z), x) + kl)
    pictures = aezoo.create_model(name, input_shape=SHAPE, **SMALL)
    assert pictures.score(torch.rand(3, *SHAPE)).shape == (3,)


# ---- gumbel_vq_vae and dvae: temperature -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", GUMBEL)
def test_quantiser_temperature_follows_the_schedule(name: str, quiet: Any) -> None:
    model, _, _ = fitted(name, quiet, temperature_steps=20)
    assert model.steps == 11  # the last of 12 steps, counted from 0
    torch.testing.assert_close(model.quantiser.temperature, model.tau())
    assert 0.3 < model.tau() < 0.95


@pytest.mark.parametrize("name", GUMBEL)
def test_low_temperature_codes_are_discrete(name: str, shifted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tau goes to 0, the relaxed code and the training loss tend to those of the largest noisy logit."""
    model, x = tiny(shifted, name), vectors()
    with_noise(monkeypatch, D.Gumbel(torch.zeros(5, P, K).double(), 1.0).sample())
    drawn = model.eval().draw(x)
    far = []
    for tau in (2.0, 0.3, 0.05, 1e-4):
        model.quantiser.temperature.fill_(tau)
        relaxed = model.train().draw(x)
        assert torch.equal(relaxed.indices, drawn.indices)
        far.append(float((relaxed.z_q - drawn.z_q).detach().abs().max()))
    assert far[0] > far[1] > far[2] > far[3] and far[0] > 0.1 and far[3] < 1e-9
    torch.testing.assert_close(model.loss(x)["loss"], model.eval().loss(x)["loss"])


# ---- gumbel_vq_vae and dvae: gradients, codes and samples ------------------------------------------------------------


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("name", GUMBEL)
def test_kl_trains_encoder_and_likelihood_everything(name: str, hard: bool, shifted: Any) -> None:
    model = tiny(shifted, name, hard=hard).train()
    terms, names = model.loss(vectors()), [name for name, _ in model.named_parameters()]
    moved = {}
    for term in ("nll", "kl"):
        found = torch.autograd.grad(terms[term], [*model.parameters()], retain_graph=True, allow_unused=True)
        moved[term] = {name.split(".")[0] for name, g in zip(names, found, strict=True) if g is not None and g.any()}
    assert moved == {"nll": {"encoder", "quantiser", "decoder"}, "kl": {"encoder"}}


@pytest.mark.parametrize("name", GUMBEL)
def test_hard_codes_have_relaxed_gradient(name: str, shifted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    soft, x = tiny(shifted, name, temperature_steps=0, temperature=0.7), vectors()
    with_noise(monkeypatch, D.Gumbel(torch.zeros(5, P, K).double(), 1.0).sample())
    hard = tiny(shifted, name, temperature_steps=0, temperature=0.7, hard=True)
    hard.load_state_dict(soft.state_dict())
    found = {kind: model.train().draw(x) for kind, model in (("soft", soft), ("hard", hard))}
    torch.testing.assert_close(found["hard"].z_q, hard.codes(found["hard"].indices))
    assert (found["soft"].z_q - found["hard"].z_q).abs().max() > 1e-2
    towards = torch.randn_like(found["soft"].z_q)
    one, two = (
        torch.autograd.grad((found[kind].z_q * towards).sum(), [*model.encoder.parameters()])
        for kind, model in (("soft", soft), ("hard", hard))
    )
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", GUMBEL)
def test_indices_roundtrip_after_training(name: str, quiet: Any) -> None:
    model, x, found = fitted(name, quiet, beta=0.01)
    indices = model.encode_indices(x)
    assert torch.equal(indices, model.encoder(x).argmax(1, keepdim=True))
    assert torch.equal(model.codes(indices), model.encode(x))
    torch.testing.assert_close(model.decode_indices(indices), model(x))
    counts = indices.flatten().bincount(minlength=7)
    assert found["val/usage"] == pytest.approx(float((counts > 0).double().mean()))
    assert found["val/bits_per_dim"] == pytest.approx(-found["val/elbo"] / (99 * math.log(2)), rel=1e-5)


@pytest.mark.parametrize("name", GUMBEL)
def test_samples_decode_uniform_codes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = aezoo.create_model(name, SHAPE, **SMALL).eval()
    seen = []
    monkeypatch.setattr(model, "decode_indices", lambda given: seen.append(given) or model.decode(model.codes(given)))
    found = model.sample(500)
    assert found.shape == (500, *SHAPE)
    (indices,) = seen
    assert indices.shape == (500, *model.index_shape) and indices.dtype == torch.long
    n = indices.numel()
    share = indices.flatten().bincount(minlength=7).double() / n
    assert (share - 1 / 7).abs().max() < 5 * math.sqrt(1 / 7 / n)
    at_places = torch.nn.functional.one_hot(indices, 7).double().mean(0)
    assert (at_places - 1 / 7).abs().max() < 6 * math.sqrt(1 / 7 / 500)
    assert torch.equal(found, model.decode(model.codes(indices)))


@pytest.mark.parametrize(
    ("name", "settings", "word"),
    [
        ("vq_vae_2", {"beta": -1.0}, "beta"),
        ("vq_vae_2", {"codebook_size": 0}, "codebook_size"),
        ("vq_vae_2", {"latent_dim": 0}, "latent_dim"),
        ("vq_vae_2", {"net": "mlp"}, "mlp"),
        ("vq_vae_2", {"net": "lstm"}, "lstm"),
        ("vq_vae_2", {"decay": 1.0}, "decay"),
        ("vq_vae_2", {"top_dims": (0,)}, "hidden_dims"),
        *(
            (name, settings, word)
            for name in GUMBEL
            for settings, word in (
                ({"beta": math.inf}, "beta"),
                ({"codebook_size": 1}, "codebook_size"),
                ({"latent_dim": 0}, "latent_dim"),
                ({"temperature": 0.0}, "temperature"),
                ({"start_temperature": 0.001}, "start_temperature"),
                ({"temperature_steps": -1}, "temperature_steps"),
                ({"likelihood": "logit_laplace:0"}, "logit_laplace"),
            )
        ),
        ("dvae", {"kl_steps": -1}, "kl_steps"),
    ],
)
def test_invalid_values_are_refused(name: str, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word) as refusal:
        aezoo.create_model(name, input_shape=(1, 8, 8), **settings)
    assert len(str(refusal.value).splitlines()) == 1
