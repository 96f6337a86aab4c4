"""Laws of the joint continuous and discrete VAE (Dupont 2018)."""

import math
from typing import Any

import pytest
import torch
import torch.distributions as D
from categorical_laws import (  # noqa: F401
    K,
    N,
    data,
    nll_at,
    reference_kl,
    small,
    steps_of,
    test_invalid_values_are_refused,
)
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from torch import Tensor

import aezoo
from aezoo.distributions.categorical import one_hot
from aezoo.models.variational.joint_vae import JointVAE

# ---- schedules of the capacities -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_capacities_rise_with_the_step_and_resume(quiet: Any, tmp_path: Any) -> None:
    settings = {"max_capacity": 8.0, "max_discrete_capacity": 1.0, "capacity_steps": 6, "n_classes": 4}
    rise = [min(t, 6) / 6 for t in range(9)]
    for term, top in (("capacity", 8.0), ("discrete_capacity", 1.0)):
        whole, parted = steps_of(JointVAE, term, quiet, tmp_path, **settings)
        assert whole == pytest.approx([top * share for share in rise])
        assert parted == whole


# ---- the joint code --------------------------------------------------------------------------------------------------


def joint(**settings: Any) -> Any:
    model = small("joint_vae", latent_dim=2, **settings)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.4 * torch.randn_like(p)
    return model


def test_no_discrete_variables_equals_annealed_vae() -> None:
    settings = {"gamma": 7.0, "max_capacity": 3.0, "capacity_steps": 10}
    model = joint(n_variables=0, **settings)
    parent = aezoo.create_model("annealed_vae", input_shape=(6,), latent_dim=2, hidden_dims=(16,), **settings).double()
    parent.load_state_dict(model.state_dict())
    x = data()
    for steps in (0, 4, 20):
        model.steps.fill_(steps), parent.steps.fill_(steps)
        found = []
        for one in (model, parent):
            torch.manual_seed(0)
            found.append(one.loss(x))
        for term in ("loss", "nll", "kl", "elbo", "capacity"):
            torch.testing.assert_close(found[0][term], found[1][term], rtol=1e-9, atol=1e-12)
        assert found[0]["kl_discrete"] == 0
    torch.testing.assert_close(model.score(x), parent.score(x))
    torch.testing.assert_close(model.encode(x), parent.encode(x))


def test_gamma_one_without_capacities_gives_the_elbo() -> None:
    model, x = joint(gamma=1.0, max_capacity=0.0, max_discrete_capacity=0.0), data()
    seen: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    terms = model.loss(x)
    mu, log_var, log_p = model.parts(x)
    kl_z = D.kl_divergence(D.Normal(mu, (0.5 * log_var).exp()), D.Normal(0.0, 1.0)).sum(1).mean()
    kl_c = reference_kl(log_p).mean()
    torch.testing.assert_close(terms["kl_continuous"], kl_z)
    torch.testing.assert_close(terms["kl_discrete"], kl_c)
    torch.testing.assert_close(terms["loss"], nll_at(model, x, seen[0]).mean() + kl_z + kl_c)
    torch.testing.assert_close(terms["loss"], -terms["elbo"])


def distance_law(cls: type[JointVAE]) -> None:
    """Each part has its own gamma |KL - C|: the gradient lowers a KL above its capacity and raises one below."""
    model = cls((6,), latent_dim=2, n_variables=2, n_classes=3, gamma=7.0, max_capacity=6.0, capacity_steps=4)
    model = model.double()
    mu = torch.full((5, 2), 2.0, dtype=torch.float64).requires_grad_()
    logits = torch.randn(5, 2, 3, dtype=torch.float64).requires_grad_()
    model.parts = lambda x: (mu, torch.zeros_like(mu), logits.log_softmax(2))
    top = 2 * math.log(3)
    for steps in (0, 1, 2, 4, 9):
        model.steps.fill_(steps)
        share = min(1, steps / 4)
        terms = model.loss(data())
        kl_z, kl_c = (mu**2).sum(1).mean() / 2, reference_kl(logits).mean()
        wanted = 7 * (kl_z - 6 * share).abs() + 7 * (kl_c - min(5, top) * share).abs()
        penalty = terms["loss"] - terms["nll"]
        torch.testing.assert_close(penalty, wanted)
        for a, b in zip(torch.autograd.grad(penalty, (mu, logits)), torch.autograd.grad(wanted, (mu, logits)),
                        strict=True):  # fmt: skip
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


class Unbounded(JointVAE):
    """A capacity above N log K, the largest KL of any posterior."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.max_discrete_capacity = 5.0


class OneDistance(JointVAE):
    """gamma |KL_z + KL_c - C_z - C_c|: an excess of one KL can cancel a lack of the other."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        distance = (terms["kl"] - terms["capacity"] - terms["discrete_capacity"]).abs()
        return terms | {"loss": terms["nll"] + self.gamma * distance}


def test_each_latent_type_has_its_own_capacity() -> None:
    distance_law(JointVAE)


@pytest.mark.parametrize("mistake", [Unbounded, OneDistance])
def test_wrong_capacity_distances_are_detected(mistake: Any) -> None:
    with pytest.raises(AssertionError):
        distance_law(mistake)


@pytest.mark.slow
def test_linear_decoder_likelihood_is_gaussian_mixture() -> None:
    """With a linear decoder p(x|c) is Gaussian, so the evidence is a sum over classes."""
    model = small("joint_vae", latent_dim=2, n_variables=1, n_classes=3, hidden_dims=(), likelihood="gaussian:0.7")
    with torch.no_grad():
        for p in model.parameters():
            p += 0.15 * torch.randn_like(p)
    W, bias = model.decoder[1].weight, model.decoder[1].bias
    covariance = W[:, :2] @ W[:, :2].T + 0.49 * torch.eye(6, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)
    each = torch.stack([D.MultivariateNormal(bias + W[:, 2 + k], covariance).log_prob(x) for k in range(3)])
    top = torch.logsumexp(each, 0) - math.log(3)
    found = [
        torch.stack([model.log_likelihood(x, n) for _ in range(rows)]).mean(0)
        for n, rows in ((1, 300), (20, 100), (20_000, 1))
    ]
    assert (found[0] < found[1]).all()
    torch.testing.assert_close(found[2], top, rtol=0, atol=0.05)
    # the mean of p(z) / q(z|x) over draws is one
    codes, log_q = model.sample_posterior(x, 20_000)
    normal = D.Normal(0.0, 1.0).log_prob(codes[..., :2]).sum(2) - math.log(3)
    torch.testing.assert_close(model.log_prior(codes), normal)
    torch.testing.assert_close((normal - log_q).exp().mean(0), torch.ones(4).double(), rtol=0, atol=0.1)


def test_joint_samples_and_codes_have_both_parts() -> None:
    model, x = joint().eval(), data()
    mu, _, log_p = model.parts(x)
    torch.testing.assert_close(model.encode(x), torch.cat([mu, log_p.exp().flatten(1)], 1))
    z = model.sample_prior(4000)
    assert z.dtype == torch.float64
    assert ((z[:, :2].var(0) - 1).abs() < 5 * math.sqrt(2 / 4000)).all()
    classes = z[:, 2:].unflatten(1, (N, K))
    assert torch.equal(classes, one_hot(classes))
    assert ((classes.mean(0) - 1 / K).abs() < 5 * (0.25 / 4000) ** 0.5).all()


def test_joint_evaluation_codes_are_one_hot_with_valid_elbo() -> None:
    model, x, n = joint(temperature=2.0).eval(), data(1), 20_000
    seen: list[Tensor] = []
    hook = model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        found = model.loss(x.expand(n, -1))["elbo"].item()
        hook.remove()
        classes = seen[0][:, 2:].unflatten(1, (N, K))
        assert torch.equal(classes, one_hot(classes))
        codes, log_q = model.sample_posterior(x, n)
        log_w = -nll_at(model, x.expand(n, -1), codes[:, 0]) + model.log_prior(codes[:, 0]) - log_q[:, 0]
        assert found == pytest.approx(log_w.mean().item(), abs=5 * math.sqrt(2 / n) * log_w.std().item())
        assert found < model.log_likelihood(x, n).item()
