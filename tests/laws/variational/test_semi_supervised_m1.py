"""Laws of the semi-supervised variational autoencoder, M1 (Kingma et al. 2014)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from label_laws import (
    data,
    make,
)
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import aezoo
from aezoo.errors import AezooError

SIZE = {"hidden_dims": (12,), "latent_dim": 4}


def pair() -> tuple[aezoo.Autoencoder, aezoo.Autoencoder]:
    torch.manual_seed(0)
    model = aezoo.create_model("semi_supervised_m1", (1, 8, 8), num_classes=3, **SIZE).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    plain = aezoo.create_model("vae", (1, 8, 8), **SIZE).double()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "classifier" not in name})
    return model, plain


def test_without_classifier_term_equals_vae() -> None:
    model, plain = pair()
    x, y = torch.rand(9, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, -1, -1, 0, 2, 2, -1])
    torch.manual_seed(3)
    terms = model.loss(x, y)
    torch.manual_seed(3)
    expected = plain.loss(x)
    for name, value in expected.items():
        if name != "loss":
            torch.testing.assert_close(terms[name], value, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms["loss"], expected["loss"] + terms["classifier"], rtol=1e-12, atol=0)
    terms["loss"].backward()
    expected["loss"].backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, p.grad, rtol=1e-9, atol=1e-12)
    assert all(p.grad.abs().max() > 0 for p in model.classifier.parameters())


@pytest.mark.parametrize("labels", [[0, 1, 2, 1], [0, -1, -1, 2], [-1, -1, -1, -1], None])
def test_cross_entropy_counts_labelled_samples_once(labels: list[int] | None) -> None:
    model, _ = pair()
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    y = None if labels is None else torch.tensor(labels)
    log_q = model.classify(x).detach()
    assert torch.allclose(log_q.exp().sum(1), torch.ones(4, dtype=torch.float64))
    expected = sum(-float(log_q[i, label]) for i, label in enumerate(labels or []) if label >= 0) / 4
    assert model.loss(x, y)["classifier"].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.slow
def test_classifier_of_fixed_codes_is_logistic_regression() -> None:
    model, _ = pair()
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.random((60, 1, 8, 8)))
    with torch.no_grad():
        codes = model.encode(x)
    y = torch.from_numpy(rng.integers(0, 3, 60))
    weight = 1e-2  # so that the optimum is unique
    optimizer = torch.optim.LBFGS(model.classifier.parameters(), max_iter=500, tolerance_grad=1e-10, tolerance_change=0)
    layer = next(m for m in model.classifier.modules() if isinstance(m, torch.nn.Linear))

    def closure() -> Tensor:
        optimizer.zero_grad()
        torch.manual_seed(0)
        loss = model.loss(x, y)["classifier"] + weight / 2 * (layer.weight**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    known = LogisticRegression(C=1 / (weight * 60), tol=1e-10, max_iter=5000).fit(codes.numpy(), y.numpy())
    np.testing.assert_allclose(model.classify(x).exp().detach().numpy(), known.predict_proba(codes.numpy()), atol=1e-5)


def test_undetached_classifier_code_is_detected() -> None:
    """Without the detach the labels would have an effect on the encoder."""
    model, _ = pair()
    x, y = torch.rand(6, 1, 8, 8, dtype=torch.float64), torch.arange(6) % 3
    F.nll_loss(model.log_q(model.posterior(x)[0]), y).backward()
    assert max(float(p.grad.abs().max()) for p in model.encoder.parameters()) > 1e-4
    model.zero_grad()
    torch.manual_seed(0)
    model.loss(x, y)["classifier"].backward()
    assert all(p.grad is None for p in model.encoder.parameters())


def test_data_without_classes_are_refused_in_one_line() -> None:
    with pytest.raises(AezooError, match="have no classes"):
        aezoo.create_model("semi_supervised_m1", (4,), num_classes=None)
    with pytest.raises(AezooError, match="num_classes"):
        aezoo.create_model("semi_supervised_m1", (4,), num_classes=0)


# ---- invalid labels --------------------------------------------------------------------------------------------------


def test_m1_refuses_out_of_range_labels() -> None:
    model, x = make("semi_supervised_m1"), data()
    with pytest.raises(aezoo.AezooError, match="from 0 to 2, or -1 for none, got 3"):
        model.loss(x, torch.tensor([0, 2, 1, 3, -1]))
