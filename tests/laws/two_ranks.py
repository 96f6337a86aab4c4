"""Run a model on two simulated ranks: two threads exchange what two processes would."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aezoo.testing import SharedNoise

_TIMEOUT_S = 20


@dataclass
class TwoRankResult:
    """The result of a batch on two ranks.

    Attributes:
        terms: loss terms, averaged over the ranks.
        copies: the model of each rank.
    """

    terms: dict[str, Tensor]
    copies: list[Any]

    def gradients(self) -> list[Tensor]:
        """Gradients of the averaged loss by each parameter, summed over the copies of both ranks."""
        own = [torch.autograd.grad(self.terms["loss"], [*m.parameters()], retain_graph=True) for m in self.copies]
        return [sum(pair) for pair in zip(*own, strict=True)]  # type: ignore[misc]


def on_two_ranks(
    model: Any,
    x: Tensor,
    y: Tensor | None = None,
    *,
    exchange: bool = True,
    ranked: bool = True,
    prepare: Callable[[Any, int], None] = lambda model, rank: None,
) -> TwoRankResult:
    """Run the model on half of the batch per rank, with the noise that one process would draw for these samples.

    Args:
        model: copied for each rank, since functional_call replaces parameters temporarily.
        x: samples of both ranks.
        y: labels of both.
        exchange: False computes each rank's loss without the other.
        ranked: False gives both ranks the number 0.
        prepare: called with each rank's copy and its number.
    """
    barrier, exchanged, n = threading.Barrier(2), [torch.empty(0)] * 2, len(x)
    copies = [copy.deepcopy(model) for _ in range(2)]

    def run(rank: int) -> dict[str, Tensor]:
        own, rows = copies[rank], range(rank * n // 2, (rank + 1) * n // 2)

        def both(values: Tensor) -> list[Tensor]:
            exchanged[rank] = values
            barrier.wait(_TIMEOUT_S)
            found = [*exchanged]
            barrier.wait(_TIMEOUT_S)
            return found

        if exchange:
            own.batch_mean = lambda values: sum(both(values.mean(0))) / 2
            own.all_gather_batch = lambda values: torch.cat(both(values))
            own.gather_rank = lambda: rank if ranked else 0
        prepare(own, rank)
        with SharedNoise(rows, n):
            terms: dict[str, Tensor] = own.loss(x[list(rows)], None if y is None else y[list(rows)])
        return terms

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    return TwoRankResult({name: (first[name] + second[name]) / 2 for name in first}, copies)
