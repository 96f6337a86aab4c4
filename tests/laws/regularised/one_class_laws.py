"""Laws of both one-class models, AE-1SVM and Deep SVDD."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score
from torch import Tensor
from two_ranks import on_two_ranks

import aezoo

SHAPE, CODE = (2, 3, 3), 3


def images(n: int = 6, seed: int = 7, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small(name: str, **settings: Any) -> Any:
    settings = {"input_shape": SHAPE, "latent_dim": CODE, "hidden_dims": (16,), **settings}
    return aezoo.create_model(name, **settings).double()


def all_grads(value: Tensor, of: Any) -> list[Tensor]:
    parameters = [*of]
    found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


# ---- several ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ae1svm", "deep_svdd"])
def test_two_ranks_equal_one_process(name: str, shifted: Any) -> None:
    settings = {"nu": 0.25} | ({"n_frequencies": 20} if name == "ae1svm" else {})
    model, x = shifted(small(name, **settings)).train(), images(18)
    if name == "deep_svdd":
        model.loss(images(18, seed=1))
    whole = copy.deepcopy(model)
    terms = whole.loss(x)
    together = on_two_ranks(model, x)
    for term, value in terms.items():
        torch.testing.assert_close(together.terms[term], value, rtol=1e-9, atol=1e-12)
    expected = torch.autograd.grad(terms["loss"], [*whole.parameters()])
    for mine, theirs in zip(together.gradients(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)
    for own in together.copies:
        for buffer_name, buffer in own.named_buffers():
            torch.testing.assert_close(buffer, whole.get_buffer(buffer_name), rtol=1e-9, atol=1e-12)
    if name == "deep_svdd":  # without exchange each rank has a radius of its own
        separate = on_two_ranks(model, x, exchange=False)
        assert (separate.copies[0].radius - whole.radius).abs() > 1e-4


# ---- detection -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [("ae1svm", {}), ("deep_svdd", {"nu": 0.1})],
)
def test_one_class_training_detects_malignant_tumours(name: str, settings: Any, adam: Any) -> None:
    """On tabular data; about a share nu of the training samples lies outside."""
    found = load_breast_cancer()
    benign, malignant = found.data[found.target == 1], found.data[found.target == 0]
    train, x = (
        torch.from_numpy((part - benign.mean(0)) / benign.std(0)).float()
        for part in (benign[:250], np.concatenate([benign[250:], malignant]))
    )
    model: Any = aezoo.create_model(name, (30,), hidden_dims=(32,), **settings)
    if name == "deep_svdd":
        with torch.no_grad():
            model.init_from_data(train)
    adam(model, train, steps=600, lr=2e-3, batch=64)
    y = np.repeat([0, 1], [len(benign) - 250, len(malignant)])
    with torch.no_grad():
        assert roc_auc_score(y, model.score(x)) > 0.92
        assert 0.02 < (model.score(train) > 0).double().mean() < 0.2
