"""Convert models of scaled samples to models of raw samples by folding the scale into the weights."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError

Folded = TypeVar("Folded", bound=Autoencoder)
_TRIALS, _NEAR = 16, 1e-6
_ONE = torch.ones((), dtype=torch.float64)


@torch.no_grad()
def fold(model: Folded, scaling: Mapping[str, Tensor] | Tensor | float) -> Folded:
    """Return a copy of a trained model for raw activations: reconstructions of a are c times those of a / c.

    Weights that read samples are divided by c, weights that write them are multiplied by c, and codes do not change. In
    a model that uses one weight for both, such as k_sparse, the biases are multiplied by c, and so are the codes. The
    role of each weight is determined by experiments on random samples, for which weights are perturbed so that none is
    zero.

    The loss differs from that of the model, since the scale of the likelihood is not changed. Weights may no longer
    have unit norm.

    Args:
        model: model trained on normalised activations.
        scaling: c, or `scaling` from `aezoo.io.checkpoint.load_run` or from `state()` of the DataModule's source.

    Raises:
        AezooError: c cannot be folded into the weights, or the data also have an offset.
    """
    factor = scaling
    if isinstance(factor, Mapping):
        if not factor or bool(factor["offset"].any()):
            raise AezooError("fold needs the scaling of normalised activations: the model was trained on other data")
        factor = factor["factor"]
    c = torch.as_tensor(factor, dtype=torch.float64).cpu().expand(model.input_shape)
    probe = copy.deepcopy(model).cpu().double().eval()
    generator = torch.Generator().manual_seed(0)
    weights = [p for p in (*probe.parameters(), *probe.buffers()) if p.is_floating_point()]
    for p in weights:
        p += 0.05 * torch.rand(p.shape, dtype=p.dtype, generator=generator)
    x = torch.randn(_TRIALS, *model.input_shape, dtype=torch.float64, generator=generator)
    code = probe.encode(x)
    factor_search = _FactorSearch(weights, probe.decode, lambda: probe.encode(x * c), code, probe.decode(code) * c)
    factors = factor_search.search([_per_channel(p, c) for p in weights], _ONE)
    if factors is None and bool((c == c.flatten()[0]).all()):
        single = c.flatten()[0]
        factors = factor_search.search([[single, _ONE] if p.ndim < 2 else [_ONE] for p in weights], single)
    if factors is None:
        raise AezooError(f"{type(model).__name__} cannot fold the scale of its data into its weights: divide "
                         "activations by the scale first, and multiply reconstructions by it")  # fmt: skip
    folded = copy.deepcopy(model)
    own = [p for p in (*folded.parameters(), *folded.buffers()) if p.is_floating_point()]
    for p, by in zip(own, factors, strict=True):
        p.copy_(p.cpu().double() * by)
    return folded


@dataclass
class _FactorSearch:
    """Searches for factors of a model's weights.

    Attributes:
        weights: the model's weights, which are changed in place.
        decode: maps codes to reconstructions.
        encode: computes the codes of the samples times c.
        code: the codes of the samples themselves.
        x_hat: the target reconstructions.
    """

    weights: list[Tensor]
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[], Tensor]
    code: Tensor
    x_hat: Tensor

    def search(self, choices: list[list[Tensor]], of_code: Tensor) -> tuple[Tensor, ...] | None:
        """Return a factor for each weight such that codes are multiplied by `of_code`, or None if there is none."""
        kept = [p.clone() for p in self.weights]
        code = self.code * of_code

        def assign(factors: Sequence[Tensor]) -> None:
            for p, old, by in zip(self.weights, kept, factors, strict=True):
                p.copy_(old * by)

        def affects(i: int, call: Callable[[], Tensor]) -> bool:
            given = []
            for by in (1.0, 1e3, 1e-3):
                self.weights[i].copy_(kept[i] * by)
                given.append(call())
            self.weights[i].copy_(kept[i])
            return not all(_is_close(one, given[0]) for one in given)

        def candidates(options: list[list[Tensor]], call: Callable[[], Tensor], wanted: Tensor) -> Iterator[Any]:
            for factors in product(*options):
                assign(factors)
                if _is_close(call(), wanted):
                    yield factors

        n = range(len(kept))
        # weights that write samples come first: combinations of all weights would be too many
        write = [affects(i, lambda: self.decode(code)) for i in n]
        read = [affects(i, self.encode) for i in n]
        try:
            written = [choices[i] if write[i] else [_ONE] for i in n]
            for way in candidates(written, lambda: self.decode(code), self.x_hat):
                rest = [choices[i] if read[i] and not write[i] else [way[i]] for i in n]
                for factors in candidates(rest, self.encode, code):
                    return cast(tuple[Tensor, ...], factors)
            return None
        finally:
            assign([_ONE for _ in n])


def _per_channel(weight: Tensor, c: Tensor) -> list[Tensor]:
    """Return possible factors of a weight with axes of samples or of one of their streams."""
    streams = [c.flatten(), c, *(c if c.ndim > 1 else ())]
    found: list[Tensor] = []
    for part in streams:
        for start in range(weight.ndim - part.ndim + 1):
            if weight.shape[start : start + part.ndim] == part.shape:
                factors = part.reshape(*part.shape, *[1] * (weight.ndim - start - part.ndim))
                found += [factors, 1 / factors]
    # several axes may have the same length, and several streams the same scale
    unique = [by for i, by in enumerate(found) if not any(_is_similar(by, other, weight) for other in found[:i])]
    return [*unique, _ONE] if weight.ndim < 2 or not unique else unique


def _is_similar(one: Tensor, other: Tensor, weight: Tensor) -> bool:
    return torch.equal(one.expand(weight.shape), other.expand(weight.shape))


def _is_close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= _NEAR * wanted.abs().max())
