"""Laws of the semi-supervised variational autoencoder, M2 (Kingma et al. 2014)."""

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
    make,
    moved,
    noise_of,
    terms_per_label,
    test_bounds_are_ordered_away_from_true_posterior,
    test_compiled_loss_takes_any_share_of_labels,
    test_data_without_classes_are_refused,
    test_invalid_labels_are_refused,
    test_labelled_loss_is_conditional_elbo,
    test_samples_have_requested_or_uniform_labels,
    test_true_posteriors_give_exact_bounds,
)
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import aezoo
from aezoo import DataModule, nets
from aezoo.models.variational.semi_supervised_vae import SemiSupervisedVAE

# ---- codes and scores ------------------------------------------------------------------------------------------------


def test_predicted_label_matches_classifier() -> None:
    model, x = make("semi_supervised_vae").eval(), data(20)
    q = D.Categorical(logits=model.classifier(x))
    torch.testing.assert_close(model.classify(x).exp(), q.probs)
    assert torch.equal(model.encode(x)[:, LATENT:].argmax(1), q.probs.argmax(1))
    nll, kl, _ = terms_per_label(model, x, torch.zeros(20, LATENT, dtype=torch.float64))
    expected = (q.probs * (nll + kl + math.log(K))).sum(1) - q.entropy()
    torch.testing.assert_close(model.score(x), expected)


# ---- M2 --------------------------------------------------------------------------------------------------------------


def unlabelled_law(cls: type[SemiSupervisedVAE]) -> None:
    """U(x) = sum_y q(y|x) (L(x, y) + log q(y|x)) in a loop, or L(x, y) + alpha cross-entropy for a labelled sample."""
    model = moved(cls((6,), latent_dim=LATENT, num_classes=K, hidden_dims=(8,), alpha=7.0).double())
    x = data()
    for y in (None, torch.tensor([-1, -1, -1, -1, -1]), torch.tensor([-1, 2, -1, 0, 1]), torch.tensor([1, 2, 0, 0, 1])):
        nll, kl, _ = terms_per_label(model, x, noise_of(model, x))
        terms = model.loss(x, y)
        losses, cross = [], []
        for i in range(5):
            label = -1 if y is None else int(y[i])
            log_q = model.classifier(x[i : i + 1]).log_softmax(1)[0]
            U = sum(log_q[k].exp() * (nll[i, k] + kl[i, k] - math.log(1 / K) + log_q[k]) for k in range(K))
            losses.append(U if label < 0 else nll[i, label] + kl[i, label] - math.log(1 / K))
            cross.append(0 * log_q[0] if label < 0 else F.cross_entropy(log_q, torch.tensor(label)))
        torch.testing.assert_close(terms["elbo"], -torch.stack(losses).mean())
        torch.testing.assert_close(terms["cross_entropy"], torch.stack(cross).mean())
        torch.testing.assert_close(terms["loss"], (torch.stack(losses) + 7 * torch.stack(cross)).mean())
        torch.testing.assert_close(terms["elbo"], -(terms["nll"] + terms["kl"]))


class EntropyAdded(SemiSupervisedVAE):
    """U with the wrong sign of the entropy, by misreading the usual form -U = sum q (-L) + H."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss(x, y)
        log_q = self.classify(x)
        entropy = -(log_q.exp() * log_q).sum(1)
        entropy = (entropy if y is None else torch.where(y < 0, entropy, 0.0)).mean()
        return terms | {"elbo": terms["elbo"] - 2 * entropy, "loss": terms["loss"] + 2 * entropy}


class MeanOfLabelled(SemiSupervisedVAE):
    """The cross-entropy averaged over the labelled samples of a batch, which gives each batch another weight."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss(x, y)
        share = 1.0 if y is None else (y >= 0).double().mean().clamp(min=1e-9)
        cross = terms["cross_entropy"] / share
        return terms | {"cross_entropy": cross, "loss": -terms["elbo"] + self.alpha * cross}


class HardLabel(SemiSupervisedVAE):
    """The most likely label in place of the sum."""

    def classify(self, x: Tensor) -> Tensor:
        return (1e3 * super().classify(x)).log_softmax(1)


def test_the_bound_of_unlabelled_samples_is_the_sum_over_labels() -> None:
    unlabelled_law(SemiSupervisedVAE)


@pytest.mark.parametrize("mistake", [EntropyAdded, MeanOfLabelled, HardLabel])
def test_wrong_unlabelled_bounds_are_detected(mistake: Any) -> None:
    with pytest.raises(AssertionError):
        unlabelled_law(mistake)


def test_full_labels_equal_conditional_vae() -> None:
    for shape, net in SHAPES.values():
        model, parent = make("semi_supervised_vae", shape, net=net, alpha=0.0), make(shape=shape, net=net)
        missing = parent.load_state_dict(model.state_dict(), strict=False)
        assert not missing.missing_keys
        assert all(key.startswith("classifier") for key in missing.unexpected_keys)
        x, y = data(5, shape), torch.tensor([0, 2, 1, 1, 0])
        found = []
        for one in (model, parent):
            torch.manual_seed(0)
            found.append(one.loss(x, y))
            found[-1]["loss"].backward()
        torch.testing.assert_close(found[0]["loss"], found[1]["loss"] + math.log(K))
        torch.testing.assert_close(found[0]["nll"], found[1]["nll"])
        gradients = dict(model.named_parameters())
        for name, p in parent.named_parameters():
            torch.testing.assert_close(gradients[name].grad, p.grad)
        assert all(p.grad is None or not p.grad.any() for p in model.classifier.parameters())


def test_terms_train_expected_networks() -> None:
    """With labels the classifier is trained by the cross-entropy only, without labels by U."""
    x, y, none = data(), torch.tensor([0, 2, 1, 1, 0]), torch.full((5,), -1)

    def reached(term: str, labels: Tensor) -> set[str]:
        model = make("semi_supervised_vae")
        model.loss(x, labels)[term].backward()
        return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    generative = {"encoder", "decoder", "label_map"}
    assert reached("elbo", y) == generative
    assert reached("cross_entropy", y) == {"classifier"}
    assert reached("loss", y) == {*generative, "classifier"}
    assert reached("elbo", none) == {*generative, "classifier"}
    assert reached("cross_entropy", none) == set()


# ---- with 100 labels of 4,000 samples --------------------------------------------------------------------------------


def few_labels() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = DataModule("mnist5k", num_labels=100, seed=0)
    (x, y), (x_test, y_test) = data.tensors("train"), data.tensors("test")
    assert y is not None and y_test is not None
    return x, y, x_test, y_test


def accuracy(log_q: Tensor, y: Tensor) -> float:
    return (log_q.argmax(1) == y).double().mean().item()


def supervised(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> float:
    """Accuracy with the labelled samples only: the best of a linear classifier and all steps of the model's network."""
    rows = (y >= 0).nonzero()[:, 0]
    found = [LogisticRegression(max_iter=1000).fit(x[rows].flatten(1), y[rows]).score(x_test.flatten(1), y_test)]
    torch.manual_seed(0)
    net = nets.encoder("mlp", tuple(x.shape[1:]), (10,), (64,))
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(40):
        for _ in range(10):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
        found.append(accuracy(net(x_test), y_test))
    return max(found)


def semi_supervised(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, steps: int, **settings: Any) -> float:
    """Accuracy of the model's classifier, with labels of at least a tenth of each batch."""
    rows = (y >= 0).nonzero()[:, 0]
    torch.manual_seed(0)
    model: Any = aezoo.create_model(
        "semi_supervised_vae", tuple(x.shape[1:]), hidden_dims=(64,), latent_dim=4, alpha=4.0, **settings
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        batch = torch.cat([torch.randint(len(x), (90,)), rows[torch.randint(len(rows), (10,))]])
        optimizer.zero_grad()
        model.loss(x[batch], y[batch])["loss"].backward()
        optimizer.step()
    return accuracy(model.eval().classify(x_test), y_test)


@pytest.mark.slow
def test_samples_without_labels_help_the_classifier() -> None:
    """On 16 principal components, which train in seconds."""
    x, y, x_test, y_test = few_labels()
    pca = PCA(16, whiten=True, random_state=0).fit(x.flatten(1))
    codes, test = (torch.from_numpy(pca.transform(part.flatten(1))).float() for part in (x, x_test))
    alone = supervised(codes, y, test, y_test)
    together = semi_supervised(codes, y, test, y_test, 700, likelihood="gaussian:learned")
    assert together > alone + 0.02


@pytest.mark.slow
def test_m1_beats_pixels_and_m1_with_m2_beats_both() -> None:
    """M1 is the VAE and a classifier of its codes; M1+M2 this model on these codes (table 1 of the paper)."""
    x, y, x_test, y_test = few_labels()
    torch.manual_seed(0)
    m1: Any = aezoo.create_model("vae", (1, 28, 28), hidden_dims=(200,), latent_dim=16)
    optimizer = torch.optim.Adam(m1.parameters(), 2e-3)
    for _ in range(1200):
        optimizer.zero_grad()
        m1.loss(x[torch.randint(len(x), (100,))])["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        codes, test = m1.eval().encode(x), m1.encode(x_test)
    mean, deviation = codes.mean(0), codes.std(0)
    codes, test = (codes - mean) / deviation, (test - mean) / deviation
    m1_alone = supervised(codes, y, test, y_test)
    assert m1_alone > supervised(x, y, x_test, y_test) - 0.02
    assert semi_supervised(codes, y, test, y_test, 2000, likelihood="gaussian:learned") > m1_alone + 0.05
