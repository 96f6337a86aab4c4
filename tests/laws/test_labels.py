"""Laws of the models that read labels: sums over labels in a loop, exact evidence, training, and rivals' slips."""

import math
from typing import Any

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import aezoo
from aezoo import DataModule, nets
from aezoo.models.variational.conditional_vae import ConditionalVAE
from aezoo.models.variational.semi_supervised_vae import SemiSupervisedVAE

K, LATENT = 3, 2
BOTH = ("conditional_vae", "semi_supervised_vae")
SHAPES = {"vector": ((6,), "mlp"), "image by mlp": ((1, 4, 5), "mlp"), "image": ((2, 5, 4), "conv"),
          "sequence": ((2, 9), "resnet")}  # fmt: skip


def make(name: str = "conditional_vae", shape: tuple[int, ...] = (6,), **settings: Any) -> Any:
    """A small model off its initial weights, in float64."""
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
    # what the encoder is told of the label is a linear map of it
    shape = model.label_map.label_shape
    plane = (model.label_map.weight @ y[0]).reshape(1, *shape).expand(len(x), *shape)
    mu, log_var = model.encoder(torch.cat([x, plane], 1)).chunk(2, 1)
    q, p = D.Normal(mu, (0.5 * log_var).exp()), D.Normal(0.0, 1.0)
    z = mu + (0.5 * log_var).exp() * eps
    likelihood = D.Bernoulli(logits=model.decoder(torch.cat([z, y], 1)), validate_args=False)
    ratio = (q.log_prob(z) - p.log_prob(z)).sum(1)
    return -likelihood.log_prob(x).flatten(1).sum(1), D.kl_divergence(q, p).sum(1), ratio


def noise_of(model: Any, x: Tensor) -> Tensor:
    """What the loss draws next; the generator is left where it was."""
    state = torch.get_rng_state()
    eps = torch.randn(len(x), model.latent_dim, dtype=x.dtype)
    torch.set_rng_state(state)
    return eps


# ---- a label at hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", BOTH)
def test_with_labels_the_loss_is_the_elbo_of_each_sample_given_its_label(name: str, kind: str) -> None:
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
    assert len({terms_at(model, x, k, eps)[0].sum().item() for k in range(K)}) == K  # labels tell


@pytest.mark.parametrize("kind", SHAPES)
def test_without_a_say_of_the_label_it_is_the_vae(kind: str) -> None:
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
        # without labels the KL is that of the one draw, so the mean over draws is the VAE's
        if y is not None:
            for term in ("loss", "nll", "kl", "elbo"):
                torch.testing.assert_close(found[0][term], found[1][term])
        else:
            torch.testing.assert_close(found[0]["nll"], found[1]["nll"])
    torch.testing.assert_close(model.encode(x)[:, :LATENT], parent.encode(x))
    torch.testing.assert_close(model(x), parent(x))
    torch.testing.assert_close(model.score(x), parent.score(x))


def test_one_label_is_none() -> None:
    model, x = make(num_classes=1), data()
    eps = noise_of(model, x)
    nll, kl, ratio = terms_at(model, x, 0, eps)
    terms = model.loss(x, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(terms["loss"], (nll + kl).mean())
    eps = noise_of(model, x)
    nll, _, ratio = terms_at(model, x, 0, eps)
    torch.testing.assert_close(model.loss(x)["loss"], (nll + ratio).mean())
    torch.testing.assert_close(model.classify(x), torch.zeros(5, 1).double())


# ---- no label at hand -----------------------------------------------------------------------------------------------


def of_every_label(model: Any, x: Tensor, eps: Tensor) -> list[Tensor]:
    """The terms of each label, in a loop: -log p(x|z, y), KL and log q - log p, (B, K) each."""
    return [torch.stack(part, 1) for part in zip(*(terms_at(model, x, k, eps) for k in range(K)), strict=True)]


def enumeration_law(cls: type[ConditionalVAE]) -> None:
    """Without a label a sample counts by -log sum_y p(y) w_y of one draw a label, with one it counts by its ELBO."""
    model, x = moved(cls((6,), latent_dim=LATENT, num_classes=K, hidden_dims=(8,)).double()), data()
    for y in (None, torch.full((5,), -1), torch.tensor([-1, 2, -1, 0, -1])):
        nll, kl, ratio = of_every_label(model, x, noise_of(model, x))
        terms = model.loss(x, y)
        bound = ((-nll - ratio).exp() / K).sum(1).log()
        rest = ((-nll - ratio).softmax(1) * nll).sum(1)
        for i, label in enumerate([] if y is None else y.tolist()):
            if label >= 0:
                bound[i], rest[i] = -(nll + kl)[i, label], nll[i, label]
        torch.testing.assert_close(terms["elbo"], bound.mean())
        torch.testing.assert_close(terms["loss"], -bound.mean())
        torch.testing.assert_close(terms["nll"], rest.mean())
        torch.testing.assert_close(terms["kl"], -(bound + rest).mean())


class ClosedForm(ConditionalVAE):
    """Weights with the closed-form KL: more than log p(x) where the codes are good."""

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
    """The best label's bound in place of the sum."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        eps = torch.randn_like(x[:, : self.latent_dim])
        nll, _, ratio = self.terms_of_every_label(x, eps)
        best = (-nll - ratio).amax(1).mean() - math.log(self.num_classes)
        return {"loss": -best, "elbo": best, "nll": nll.mean(), "kl": -best - nll.mean()}


def test_without_labels_the_bound_is_that_of_the_sum_over_labels() -> None:
    enumeration_law(ConditionalVAE)


@pytest.mark.parametrize("rival", [ClosedForm, NoPrior, MostLikelyAlone])
def test_another_sum_over_labels_breaks_the_law(rival: Any) -> None:
    with pytest.raises(AssertionError):
        enumeration_law(rival)


# ---- the evidence ---------------------------------------------------------------------------------------------------


def at_the_truth(cls: type[ConditionalVAE], noise: float = 0.6, alike: bool = False) -> tuple[Any, Tensor, Tensor]:
    """A linear model whose q(z|x, y), and q(y|x) if there is one, are the true posteriors.

    Args:
        cls: the model.
        noise: deviation of x given z and y.
        alike: what a label does to x, z could do as well.

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
        if alike:
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
def test_under_the_true_posteriors_everything_is_exact(cls: Any) -> None:
    model, x, given = at_the_truth(cls)
    evidence = torch.logsumexp(given, 1) - math.log(K)
    torch.testing.assert_close(model.classify(x), given.log_softmax(1))
    for n in (1, 7):
        torch.testing.assert_close(model.log_likelihood(x, n), evidence)
    assert torch.equal(model.encode(x)[:, LATENT:].argmax(1), given.argmax(1))
    # at the posterior's mean all labels gain the same
    gap = model.score(x) + evidence
    torch.testing.assert_close(gap, gap.mean().expand(5))
    with torch.no_grad():
        many = x.repeat(4000, 1)
        # log w is the evidence whatever the draw; U has the closed-form KL, which is so on average
        close = {"rtol": 0, "atol": 1e-6} if cls is ConditionalVAE else {"rtol": 0, "atol": 0.03}
        torch.testing.assert_close(model.loss(many)["elbo"], evidence.mean(), **close)
        y = given.argmax(1)
        labelled = given.gather(1, y[:, None]).mean() - (0 if cls is ConditionalVAE else math.log(K))
        torch.testing.assert_close(model.loss(many, y.repeat(4000))["elbo"], labelled, rtol=0, atol=0.03)


def test_the_closed_form_kl_in_the_sum_over_labels_exceeds_the_evidence() -> None:
    found = []
    for cls in (ConditionalVAE, ClosedForm):
        torch.manual_seed(1)
        model, x, given = at_the_truth(cls, noise=1.5, alike=True)
        with torch.no_grad():
            found.append(model.loss(x.repeat(4000, 1))["elbo"] - (torch.logsumexp(given, 1) - math.log(K)).mean())
    assert found[0].item() == pytest.approx(0, abs=1e-6)
    assert found[1] > 0.05


@pytest.mark.parametrize("cls", [ConditionalVAE, SemiSupervisedVAE])
def test_off_the_true_posterior_the_bounds_come_in_order(cls: Any) -> None:
    model, x, given = at_the_truth(cls)
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


# ---- codes, samples and labels that are none ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
def test_the_label_of_a_code_is_the_most_likely_one_unless_it_is_given(kind: str) -> None:
    shape, net = SHAPES[kind]
    model, x = make(shape=shape, net=net).eval(), data(20, shape)
    nll, kl, _ = of_every_label(model, x, torch.zeros(20, LATENT, dtype=torch.float64))
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


def test_the_semi_supervised_label_is_the_classifier_s() -> None:
    model, x = make("semi_supervised_vae").eval(), data(20)
    q = D.Categorical(logits=model.classifier(x))
    torch.testing.assert_close(model.classify(x).exp(), q.probs)
    assert torch.equal(model.encode(x)[:, LATENT:].argmax(1), q.probs.argmax(1))
    nll, kl, _ = of_every_label(model, x, torch.zeros(20, LATENT, dtype=torch.float64))
    expected = (q.probs * (nll + kl + math.log(K))).sum(1) - q.entropy()
    torch.testing.assert_close(model.score(x), expected)


@pytest.mark.parametrize("name", BOTH)
def test_samples_have_the_labels_asked_for_and_all_evenly_otherwise(name: str) -> None:
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
def test_labels_that_are_none_are_refused(name: str, y: Tensor, word: str) -> None:
    model, x = make(name), data()
    for call in (model.loss, model.encode):
        with pytest.raises(aezoo.AezooError, match=word) as refusal:
            call(x, y)
        assert len(str(refusal.value).splitlines()) == 1
    for none in (-1, 7, torch.tensor([0, 1])):
        with pytest.raises(aezoo.AezooError, match="from 0 to 2"):
            model.sample(5, none)


def test_m1_refuses_labels_that_the_data_cannot_have() -> None:
    model, x = make("semi_supervised_m1"), data()
    with pytest.raises(aezoo.AezooError, match="from 0 to 2, or -1 for none, got 3"):
        model.loss(x, torch.tensor([0, 2, 1, 3, -1]))


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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, at a break
@pytest.mark.parametrize("name", BOTH)
def test_one_compiled_loss_takes_batches_with_all_some_and_no_labels(name: str) -> None:
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


# ---- M2 -------------------------------------------------------------------------------------------------------------


def unlabelled_law(cls: type[SemiSupervisedVAE]) -> None:
    """U(x) = sum_y q(y|x) (L(x, y) + log q(y|x)) in a loop, L(x, y) + alpha cross-entropy where there is a label."""
    model = moved(cls((6,), latent_dim=LATENT, num_classes=K, hidden_dims=(8,), alpha=7.0).double())
    x = data()
    for y in (None, torch.tensor([-1, -1, -1, -1, -1]), torch.tensor([-1, 2, -1, 0, 1]), torch.tensor([1, 2, 0, 0, 1])):
        nll, kl, _ = of_every_label(model, x, noise_of(model, x))
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
    """U with the sign of the entropy turned, as its usual spelling -U = sum q (-L) + H invites."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss(x, y)
        log_q = self.classify(x)
        entropy = -(log_q.exp() * log_q).sum(1)
        entropy = (entropy if y is None else torch.where(y < 0, entropy, 0.0)).mean()
        return terms | {"elbo": terms["elbo"] - 2 * entropy, "loss": terms["loss"] + 2 * entropy}


class MeanOfLabelled(SemiSupervisedVAE):
    """The cross-entropy averaged over the labelled samples of a batch: another weight in each batch."""

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


@pytest.mark.parametrize("rival", [EntropyAdded, MeanOfLabelled, HardLabel])
def test_another_bound_breaks_the_law(rival: Any) -> None:
    with pytest.raises(AssertionError):
        unlabelled_law(rival)


def test_with_all_labels_and_no_classifier_it_is_the_conditional_vae() -> None:
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


def test_each_part_learns_from_what_it_should() -> None:
    """Labels move the classifier through the cross-entropy alone, which moves nothing else; without, through U."""
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


# ---- on digits ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = DataModule("mnist5k")
    (x, y), (x_test, y_test) = data.tensors("train"), data.tensors("test")
    assert y is not None and y_test is not None
    return x, y, x_test, y_test


def test_a_trained_model_tells_and_draws_digits_of_a_class(labelled_digits: Any) -> None:
    """Chance is 0.1; the judge of the samples is a logistic regression on real digits, right on 85 % of them."""
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
        told = (model.classify(x_test).argmax(1) == y_test).double().mean().item()
    judge = LogisticRegression(max_iter=60, tol=1e-2).fit(x[:1500].flatten(1), y[:1500])
    asked = torch.arange(300) % 10
    drawn = judge.score(model.sample(300, asked).flatten(1), asked)
    other = judge.score(model.sample(300).flatten(1), asked)
    assert told > 0.8
    assert drawn > 0.85
    assert other < 0.25


# ---- with 100 labels of 4,000 samples --------------------------------------------------------------------------------


def few_labels(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = DataModule("mnist5k", num_labels=100, seed=seed)
    (x, y), (x_test, y_test) = data.tensors("train"), data.tensors("test")
    assert y is not None and y_test is not None
    return x, y, x_test, y_test


def accuracy(log_q: Tensor, y: Tensor) -> float:
    return (log_q.argmax(1) == y).double().mean().item()


def supervised(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> float:
    """Accuracy of a classifier of the labelled samples alone: the model's own net at its best step, or a linear one."""
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
    """Accuracy of the model's classifier, a tenth of whose batches has labels."""
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
@pytest.mark.parametrize("seed", [0, 1])
def test_m1_beats_pixels_and_m1_with_m2_beats_both(seed: int) -> None:
    """M1 is the VAE and a classifier of its codes; M1+M2 this model on these codes (table 1 of the paper)."""
    x, y, x_test, y_test = few_labels(seed)
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
