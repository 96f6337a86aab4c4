"""Laws of the models that use labels: sums over labels in a loop, exact evidence, training, and known mistakes."""

import math
from typing import Any

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor

import aezoo
from aezoo.models.variational.conditional_vae import ConditionalVAE
from aezoo.models.variational.semi_supervised_vae import SemiSupervisedVAE

K, LATENT = 3, 2


BOTH = ("conditional_vae", "semi_supervised_vae")


SHAPES = {"vector": ((6,), "mlp"), "image by mlp": ((1, 4, 5), "mlp"), "image": ((2, 5, 4), "conv"),
          "sequence": ((2, 9), "resnet")}  # fmt: skip


def make(name: str = "conditional_vae", shape: tuple[int, ...] = (6,), **settings: Any) -> Any:
    """A small float64 model away from its initial weights."""
    given = {"latent_dim": LATENT, "num_classes": K, "hidden_dims": (8,)} | settings
    return moved(aezoo.create_model(name, input_shape=shape, **given).double())


def moved(model: Any, by: float = 0.4) -> Any:
    with torch.no_grad():
        for p in model.parameters():
            p += by * torch.randn_like(p)
    return model


def data(n: int = 5, shape: tuple[int, ...] = (6,)) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


def terms_at(model: Any, x: Tensor, label: int, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-log p(x|z, y), KL and log q(z|x, y) - log p(z) for one label, by torch.distributions: (B,) each."""
    y = torch.zeros(len(x), model.num_classes, dtype=x.dtype)
    y[:, label] = 1
    # the encoder takes a linear map of the label as additional input
    shape = model.label_map.label_shape
    plane = (model.label_map.weight @ y[0]).reshape(1, *shape).expand(len(x), *shape)
    mu, log_var = model.encoder(torch.cat([x, plane], 1)).chunk(2, 1)
    q, p = D.Normal(mu, (0.5 * log_var).exp()), D.Normal(0.0, 1.0)
    z = mu + (0.5 * log_var).exp() * eps
    likelihood = D.Bernoulli(logits=model.decoder(torch.cat([z, y], 1)), validate_args=False)
    ratio = (q.log_prob(z) - p.log_prob(z)).sum(1)
    return -likelihood.log_prob(x).flatten(1).sum(1), D.kl_divergence(q, p).sum(1), ratio


def noise_of(model: Any, x: Tensor) -> Tensor:
    """The noise that the next loss will draw; the generator's state is kept."""
    state = torch.get_rng_state()
    eps = torch.randn(len(x), model.latent_dim, dtype=x.dtype)
    torch.set_rng_state(state)
    return eps


# ---- labelled samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", BOTH)
def test_labelled_loss_is_conditional_elbo(name: str, kind: str) -> None:
    shape, net = SHAPES[kind]
    model, x, y = make(name, shape, net=net), data(5, shape), torch.tensor([0, 2, 1, 1, 0])
    eps = noise_of(model, x)
    terms = model.loss(x, y)
    each = [terms_at(model, x[i : i + 1], int(y[i]), eps[i : i + 1]) for i in range(5)]
    nll, kl = (torch.cat([one[part] for one in each]).mean() for part in (0, 1))
    constant = math.log(K) if name == "semi_supervised_vae" else 0.0  # -log p(y)
    torch.testing.assert_close(terms["nll"], nll)
    torch.testing.assert_close(terms["kl"], kl + constant)
    torch.testing.assert_close(terms["elbo"], -(nll + kl + constant))
    assert len({terms_at(model, x, k, eps)[0].sum().item() for k in range(K)}) == K  # the label changes the likelihood


# ---- unlabelled samples ----------------------------------------------------------------------------------------------


def terms_per_label(model: Any, x: Tensor, eps: Tensor) -> list[Tensor]:
    """The terms of each label, in a loop: -log p(x|z, y), KL and log q - log p, (B, K) each."""
    return [torch.stack(part, 1) for part in zip(*(terms_at(model, x, k, eps) for k in range(K)), strict=True)]


# ---- the evidence ----------------------------------------------------------------------------------------------------


def exact_posterior_model(
    cls: type[ConditionalVAE], noise: float = 0.6, in_span: bool = False
) -> tuple[Any, Tensor, Tensor]:
    """A linear model whose q(z|x, y), and q(y|x) if there is one, are the true posteriors.

    Args:
        cls: the model.
        noise: deviation of x given z and y.
        in_span: whether the effect of a label on x lies in the span of the effects of z.

    Returns:
        the model, samples x (B, 6) and log p(x|y) in closed form (B, K).
    """
    model: Any = cls((6,), latent_dim=LATENT, num_classes=K, hidden_dims=(), likelihood=f"gaussian:{noise}").double()
    W, c = model.decoder[1].weight, model.decoder[1].bias
    lengths = torch.tensor([0.7, 1.8], dtype=torch.float64)
    with torch.no_grad():
        moved(model, 0.7)
        V = torch.linalg.qr(torch.randn(6, LATENT, dtype=torch.float64))[0] * lengths  # a diagonal posterior
        W[:, :LATENT] = V
        if in_span:
            W[:, LATENT:] = V @ (2 * torch.randn(LATENT, K, dtype=torch.float64))
        model.label_map.weight.copy_(torch.eye(K))
        gain = V.T / (lengths**2 + noise**2)[:, None]
        means = c + W[:, LATENT:].T  # of x given each label, (K, 6)
        model.encoder[1].weight.zero_()
        model.encoder[1].weight[:LATENT, :6] = gain
        model.encoder[1].weight[:LATENT, 6:] = -gain @ means.T
        model.encoder[1].bias.copy_(torch.cat([torch.zeros(LATENT), (noise**2 / (lengths**2 + noise**2)).log()]))
        covariance = V @ V.T + noise**2 * torch.eye(6, dtype=torch.float64)
        if isinstance(model, SemiSupervisedVAE):
            model.classifier[1].weight.copy_(means @ covariance.inverse())
            model.classifier[1].bias.copy_(-0.5 * (means @ covariance.inverse() * means).sum(1))
    x = means[torch.arange(5) % K] + torch.randn(5, 6, dtype=torch.float64)
    given = torch.stack([D.MultivariateNormal(mean, covariance).log_prob(x) for mean in means], 1)
    return model, x, given.detach()


@pytest.mark.parametrize("cls", [ConditionalVAE, SemiSupervisedVAE])
def test_true_posteriors_give_exact_bounds(cls: Any) -> None:
    model, x, given = exact_posterior_model(cls)
    evidence = torch.logsumexp(given, 1) - math.log(K)
    torch.testing.assert_close(model.classify(x), given.log_softmax(1))
    for n in (1, 7):
        torch.testing.assert_close(model.log_likelihood(x, n), evidence)
    assert torch.equal(model.encode(x)[:, LATENT:].argmax(1), given.argmax(1))
    # the score differs from -log p(x) by the same constant for all samples
    gap = model.score(x) + evidence
    torch.testing.assert_close(gap, gap.mean().expand(5))
    with torch.no_grad():
        many = x.repeat(4000, 1)
        # log w is the evidence for every draw; U has the closed-form KL, with which it is so on average only
        close = {"rtol": 0, "atol": 1e-6} if cls is ConditionalVAE else {"rtol": 0, "atol": 0.03}
        torch.testing.assert_close(model.loss(many)["elbo"], evidence.mean(), **close)
        y = given.argmax(1)
        labelled = given.gather(1, y[:, None]).mean() - (0 if cls is ConditionalVAE else math.log(K))
        torch.testing.assert_close(model.loss(many, y.repeat(4000))["elbo"], labelled, rtol=0, atol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [ConditionalVAE, SemiSupervisedVAE])
def test_bounds_are_ordered_away_from_true_posterior(cls: Any) -> None:
    model, x, given = exact_posterior_model(cls)
    with torch.no_grad():
        model.encoder[1].bias += 0.4
        if cls is SemiSupervisedVAE:
            model.classifier[1].bias += torch.tensor([0.0, 1.0, -1.0])
        evidence = (torch.logsumexp(given, 1) - math.log(K)).mean()
        low = model.loss(x.repeat(4000, 1))["elbo"]
        ladder = [torch.stack([model.log_likelihood(x, n).mean() for _ in range(rows)]).mean() for n, rows in
                  ((1, 400), (20, 100), (4000, 1))]  # fmt: skip
    assert low < evidence - 0.1
    assert ladder[0] < ladder[1] - 0.1
    assert ladder[1] < ladder[2] + 0.05
    torch.testing.assert_close(ladder[2], evidence, rtol=0, atol=0.05)


# ---- codes, samples and invalid labels -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
def test_samples_have_requested_or_uniform_labels(name: str) -> None:
    model, seen = make(name).eval(), []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    labels = torch.arange(3000) % K
    for y, expected in ((labels, labels), (2, torch.full((3000,), 2))):
        x = model.sample(3000, y)
        assert torch.equal(seen[-1][:, LATENT:], F.one_hot(expected, K).double())
        torch.testing.assert_close(x, model.decoder(seen[-1]).sigmoid())
    model.sample(3000)
    z = seen[-1]
    assert ((z[:, LATENT:].mean(0) - 1 / K).abs() < 5 * (0.25 / 3000) ** 0.5).all()
    assert ((z[:, :LATENT].var(0) - 1).abs() < 5 * math.sqrt(2 / 3000)).all()
    normal = D.Normal(0.0, 1.0).log_prob(z[:, :LATENT]).sum(1) - math.log(K)
    torch.testing.assert_close(model.log_prior(z), normal)
    assert model.sample(0).shape == (0, 6)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    ("y", "word"),
    [
        (torch.tensor([0, 1, 2, 3, 0]), "0 to 2, or -1 for none, got 3"),
        (torch.tensor([0, -2, 2, 1, 0]), "got -2"),
        (torch.rand(5), "whole number"),
        (torch.zeros(5, 2, dtype=torch.long), "whole number"),
    ],
)
def test_invalid_labels_are_refused(name: str, y: Tensor, word: str) -> None:
    model, x = make(name), data()
    for call in (model.loss, model.encode):
        with pytest.raises(aezoo.AezooError, match=word) as refusal:
            call(x, y)
        assert len(str(refusal.value).splitlines()) == 1
    for none in (-1, 7, torch.tensor([0, 1])):
        with pytest.raises(aezoo.AezooError, match="from 0 to 2"):
            model.sample(5, none)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    ("settings", "word"), [({"num_classes": None}, "no classes"), ({"num_classes": 0}, "num_classes")]
)
def test_data_without_classes_are_refused(name: str, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word) as refusal:
        aezoo.create_model(name, input_shape=(4,), **settings)
    assert len(str(refusal.value).splitlines()) == 1
    with pytest.raises(aezoo.AezooError, match="alpha"):
        aezoo.create_model("semi_supervised_vae", input_shape=(4,), alpha=-1.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, at a graph break
@pytest.mark.parametrize("name", BOTH)
def test_compiled_loss_takes_any_share_of_labels(name: str) -> None:
    model, x = make(name), data()
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, backend="aot_eager", dynamic=False)
    for y in (torch.tensor([0, 2, 1, 1, 0]), torch.tensor([-1, 2, 1, -1, 0]), None, torch.tensor([1, 2, 1, 1, 0])):
        found = []
        for loss in (model.loss, compiled):
            torch.manual_seed(0)
            found.append(loss(x, y))
        for term, value in found[0].items():
            torch.testing.assert_close(found[1][term], value)
    with pytest.raises(aezoo.AezooError, match="got 7"):
        compiled(x, torch.tensor([0, 2, 1, 7, 0]))
    torch._dynamo.reset()
