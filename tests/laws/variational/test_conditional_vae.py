"""Laws of the conditional VAE (Sohn et al. 2015)."""

import math
from typing import Any

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from label_laws import (  # noqa: F401
    LATENT,
    SHAPES,
    K,
    data,
    exact_posterior_model,
    make,
    moved,
    noise_of,
    terms_at,
    terms_per_label,
    test_bounds_are_ordered_away_from_true_posterior,
    test_compiled_loss_takes_any_share_of_labels,
    test_data_without_classes_are_refused,
    test_invalid_labels_are_refused,
    test_labelled_loss_is_conditional_elbo,
    test_samples_have_requested_or_uniform_labels,
    test_true_posteriors_give_exact_bounds,
)
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import aezoo
from aezoo import DataModule
from aezoo.models.variational.conditional_vae import ConditionalVAE

# ---- labelled samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
def test_zero_label_weights_equal_vae(kind: str) -> None:
    shape, net = SHAPES[kind]
    settings = {"latent_dim": LATENT, "hidden_dims": (8,), "net": net}
    model, x = make(shape=shape, net=net), data(5, shape)
    parent = aezoo.create_model("vae", input_shape=shape, **settings).double()
    wider = dict(model.named_parameters())
    with torch.no_grad():
        model.label_map.weight.zero_()
        first = next(n for n, p in model.decoder.named_parameters() if p.ndim == 2)
        wider[f"decoder.{first}"][:, LATENT:] = 0
        for name, p in parent.named_parameters():
            grown, keep = wider[name], tuple(slice(n) for n in p.shape)
            p.copy_(grown[keep])
    for y in (torch.tensor([0, 2, 1, 1, 0]), None):
        found = []
        for one, labels in ((model, y), (parent, None)):
            torch.manual_seed(3)
            found.append(one.loss(x, labels))
        # without labels the KL is estimated from the draw, so only its mean equals the VAE's
        if y is not None:
            for term in ("loss", "nll", "kl", "elbo"):
                torch.testing.assert_close(found[0][term], found[1][term])
        else:
            torch.testing.assert_close(found[0]["nll"], found[1]["nll"])
    torch.testing.assert_close(model.encode(x)[:, :LATENT], parent.encode(x))
    torch.testing.assert_close(model(x), parent(x))
    torch.testing.assert_close(model.score(x), parent.score(x))


def test_single_class_needs_no_sum_over_labels() -> None:
    model, x = make(num_classes=1), data()
    eps = noise_of(model, x)
    nll, kl, ratio = terms_at(model, x, 0, eps)
    terms = model.loss(x, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(terms["loss"], (nll + kl).mean())
    eps = noise_of(model, x)
    nll, _, ratio = terms_at(model, x, 0, eps)
    torch.testing.assert_close(model.loss(x)["loss"], (nll + ratio).mean())
    torch.testing.assert_close(model.classify(x), torch.zeros(5, 1).double())


# ---- unlabelled samples ----------------------------------------------------------------------------------------------


def enumeration_law(cls: type[ConditionalVAE]) -> None:
    """The loss is -log sum_y p(y) w_y of one draw per label without a label, and -ELBO with one; with gradients."""
    model, x = moved(cls((6,), latent_dim=LATENT, num_classes=K, hidden_dims=(8,)).double()), data()
    for y in (None, torch.full((5,), -1), torch.tensor([-1, 2, -1, 0, -1]), torch.tensor([1, 2, 0, 0, 2])):
        nll, kl, ratio = terms_per_label(model, x, noise_of(model, x))
        terms = model.loss(x, y)
        bound = ((-nll - ratio).exp() / K).sum(1).log()
        rest = ((-nll - ratio).softmax(1) * nll).sum(1)
        for i, label in enumerate([] if y is None else y.tolist()):
            if label >= 0:
                bound[i], rest[i] = -(nll + kl)[i, label], nll[i, label]
        expected = {"elbo": bound, "loss": -bound, "nll": rest, "kl": -(bound + rest)}
        for term, values in expected.items():
            torch.testing.assert_close(terms[term], values.mean())
            pairs = (
                torch.autograd.grad(
                    each, [*model.parameters()], retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for each in (terms[term], values.mean())
            )
            for a, b in zip(*pairs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


class ClosedForm(ConditionalVAE):
    """Weights with the closed-form KL, with which the bound can exceed log p(x)."""

    def terms(self, x: Tensor, y_BK: Tensor, eps_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nll, kl, _ = super().terms(x, y_BK, eps_BD)
        return nll, kl, kl


class NoPrior(ConditionalVAE):
    """log sum_y w_y, without p(y)."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss(x, y)
        share = 1.0 if y is None else (y < 0).double().mean()
        return {name: value + {"elbo": 1, "kl": -1, "loss": -1, "nll": 0}[name] * share * math.log(self.num_classes)
                for name, value in terms.items()}  # fmt: skip


class MostLikelyAlone(ConditionalVAE):
    """The bound of the most likely label in place of the sum."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        eps = torch.randn_like(x[:, : self.latent_dim])
        nll, _, ratio = self.terms_per_label(x, eps)
        best = (-nll - ratio).amax(1).mean() - math.log(self.num_classes)
        return {"loss": -best, "elbo": best, "nll": nll.mean(), "kl": -best - nll.mean()}


def test_unlabelled_bound_sums_over_labels() -> None:
    enumeration_law(ConditionalVAE)


@pytest.mark.parametrize("mistake", [ClosedForm, NoPrior, MostLikelyAlone])
def test_wrong_sums_over_labels_are_detected(mistake: Any) -> None:
    with pytest.raises(AssertionError):
        enumeration_law(mistake)


# ---- the evidence ----------------------------------------------------------------------------------------------------


def test_closed_form_kl_over_labels_exceeds_evidence() -> None:
    found = []
    for cls in (ConditionalVAE, ClosedForm):
        torch.manual_seed(1)
        model, x, given = exact_posterior_model(cls, noise=1.5, in_span=True)
        with torch.no_grad():
            found.append(model.loss(x.repeat(4000, 1))["elbo"] - (torch.logsumexp(given, 1) - math.log(K)).mean())
    assert found[0].item() == pytest.approx(0, abs=1e-6)
    assert found[1] > 0.05


# ---- codes and scores ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
def test_label_of_code_is_given_or_most_likely(kind: str) -> None:
    shape, net = SHAPES[kind]
    model, x = make(shape=shape, net=net).eval(), data(20, shape)
    nll, kl, _ = terms_per_label(model, x, torch.zeros(20, LATENT, dtype=torch.float64))
    likely = (-nll - kl).argmax(1)
    assert len(likely.unique()) > 1
    torch.testing.assert_close(model.classify(x), (-nll - kl).log_softmax(1))
    torch.testing.assert_close(model.score(x), math.log(K) - torch.logsumexp(-nll - kl, 1))
    asked = torch.arange(20) % (K + 1) - 1
    for y, expected in ((None, likely), (asked, torch.where(asked < 0, likely, asked))):
        code = model.encode(x, y)
        assert torch.equal(code[:, LATENT:], F.one_hot(expected, K).double())
        for i in range(20):
            eps = torch.zeros(1, LATENT, dtype=torch.float64)
            plain = terms_at(model, x[i : i + 1], int(expected[i]), eps)[0]
            found = -D.Bernoulli(probs=model.decode(code[i : i + 1]), validate_args=False).log_prob(x[i]).sum()
            torch.testing.assert_close(found, plain[0], rtol=1e-6, atol=1e-6)


# ---- on digits -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = DataModule("mnist5k")
    (x, y), (x_test, y_test) = data.tensors("train"), data.tensors("test")
    assert y is not None and y_test is not None
    return x, y, x_test, y_test


@pytest.mark.slow
def test_trained_model_classifies_and_generates_digits(labelled_digits: Any) -> None:
    """Samples are classified by a logistic regression that is right on 85 % of real digits; chance is 0.1."""
    x, y, x_test, y_test = labelled_digits
    torch.manual_seed(0)
    model: Any = aezoo.create_model("conditional_vae", (1, 28, 28), hidden_dims=(64,), latent_dim=2)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(500):
        rows = torch.randint(len(x), (100,))
        optimizer.zero_grad()
        model.loss(x[rows], y[rows])["loss"].backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model.classify(x_test).argmax(1) == y_test).double().mean().item()
    classifier = LogisticRegression(max_iter=60, tol=1e-2).fit(x[:1500].flatten(1), y[:1500])
    asked = torch.arange(300) % 10
    drawn = classifier.score(model.sample(300, asked).flatten(1), asked)
    other = classifier.score(model.sample(300).flatten(1), asked)
    assert accuracy > 0.8
    assert drawn > 0.85
    assert other < 0.25
