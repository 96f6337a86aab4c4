"""What each value of a sample contributes to its anomaly score.

    deviance, nll   if the score is w sum_d t_d(x) + rest with the term t_d of each value under the likelihood, whose
                    values are independent: w t_d, and the rest, such as the KL of a variational model
    mse             (x_d - x_hat_d)^2 / D
    sap             (x_d - x_hat_d)^2, and the differences in the layers as one term
    combined        shares of its four terms, see `aezoo.tasks.detect_combined`

Contributions and the other terms add up to the score. Other scores, such as distances of codes and energies, are not
sums over the values of a sample.

Shapes: B batch, D values of a sample.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError
from aezoo.tasks.detect_combined import CombinedScore
from aezoo.tasks.detect_scores import Scorer
from aezoo.training.model_names import display_name

EXPLAINED = ("deviance", "nll", "mse", "sap", "combined")
# a power of 2 that is large compared with the rest of a score, so that the weight of -log p is exact
_PROBE = 2.0**20
# by how much of its size a score may differ from the sum of its terms
_ROUNDING = 1e-3


@dataclass
class Contributions:
    """What values contribute to scores; with `terms` they add up to these.

    Attributes:
        values: (B, *shape), in the units of the score.
        terms: (B,) by name, what belongs to no single value.
        parts: (B, *shape) by name, the parts of which `values` is the sum; {} if there is one.
    """

    values: Tensor
    terms: dict[str, Tensor]
    parts: dict[str, Tensor]


def contributions(model: Autoencoder, name: str, scorer: Scorer | None, x: Tensor) -> Contributions:
    """What each value of samples contributes to their score.

    Args:
        model: in evaluation mode.
        name: of the score, one of `EXPLAINED`.
        scorer: computes it; needed for sap and combined.
        x: (B, *input_shape), on the model's device.

    Raises:
        AezooError: the score is not a sum over the values of a sample.
    """
    match name:
        case "deviance":
            return likelihood_contributions(model, model.anomaly_score, x)
        case "nll":
            return likelihood_contributions(model, model.score, x)
        case "mse":
            return Contributions((model(x) - x).double().square() / x[0].numel(), {}, {})
        case "sap" if scorer is not None:
            values = (x - model(x)).double().square()
            return Contributions(values, {"layers": scorer(x).double() - _total(values)}, {})
    if isinstance(scorer, CombinedScore):
        parts = {part: found.reshape(x.shape) for part, found in scorer.contributions(x).items()}
        return Contributions(torch.stack([*parts.values()]).sum(0), {}, parts)
    raise AezooError(f"the score {name} is not a sum over the values of a sample: {', '.join(EXPLAINED)} are")


def likelihood_contributions(model: Autoencoder, score: Callable[[Tensor], Tensor], x: Tensor) -> Contributions:
    """Contributions to a score that adds something to the weighted -log p, or deviance, of one reconstruction.

    How the score depends on -log p is found by giving it other values of that.

    Args:
        model: in evaluation mode.
        score: (B, *shape) -> (B,), such as `model.score`.
        x: (B, *input_shape).

    Raises:
        AezooError: it is another score.
    """
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(part: Autoencoder, params: Tensor, given: Tensor) -> Tensor:
        nll_B = type(part).nll(part, params, given)
        is_by_value = params.numel() % x.numel() == 0 and given.shape == x.shape
        terms = part.likelihood.nll_by_value(params.to(nll_B), given.to(nll_B)) if is_by_value else nll_B
        calls.append((given, nll_B.double(), terms.double()))
        return nll_B

    def probe(value: float) -> Tensor:
        with _nll_replaced(model, lambda part, params, given: given.new_full((len(given),), value)):
            return score(x).double()

    with _nll_replaced(model, record):
        found_B = score(x).double()
    if len(calls) == 1 and calls[0][0].shape == x.shape and torch.equal(calls[0][0].nan_to_num(), x.nan_to_num()):
        _, nll_B, terms = calls[0]
        rest_B = probe(0.0)
        weight = float(((probe(_PROBE) - rest_B) / _PROBE).mean())
        weight = round(weight) if abs(weight - round(weight)) < 1e-6 else weight
        values = weight * terms
        size_B = 1 + nll_B.abs() + rest_B.abs()
        gaps = [_total(terms) - nll_B, found_B - weight * nll_B - rest_B]
        if all(bool((gap_B.abs() <= _ROUNDING * size_B).all()) for gap_B in gaps):
            # with the rounding of float32
            other = {type(model).score_term or "other terms": found_B - _total(values)} if bool(rest_B.any()) else {}
            return Contributions(values, other, {})
    kind = display_name(type(model))
    raise AezooError(f"the score of {kind} is not a sum over the values of a sample: --score mse and combined are")


@contextmanager
def _nll_replaced(model: Autoencoder, nll: Callable[[Autoencoder, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Within it, the model and the models that it consists of have another `nll`."""
    parts = [part for part in model.modules() if isinstance(part, Autoencoder)]
    try:
        for part in parts:
            vars(part)["nll"] = functools.partial(nll, part)
        yield
    finally:
        for part in parts:
            vars(part).pop("nll", None)


def _total(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1)
