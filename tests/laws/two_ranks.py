"""A model on two ranks, played by two threads that exchange what two processes would."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aezoo.testing import SharedNoise

_PATIENCE = 20


@dataclass
class TwoRankResult:
    """What two ranks make of a batch.

    Attributes:
        terms: of the loss, averaged over the ranks.
        copies: the model of each rank.
    """

    terms: dict[str, Tensor]
    copies: list[Any]

    def gradients(self) -> list[Tensor]:
        """Of the averaged loss in each parameter, which both ranks hold."""
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
    """The model on half of the batch each, with the noise that one process would draw for these samples.

    Args:
        model: copied for each rank, as each process has its own: functional_call swaps parameters for a while.
        x: samples of both ranks.
        y: labels of both.
        exchange: False computes each rank's loss as if there were no other.
        ranked: False lets each rank take itself for the first.
        prepare: what else is done to a rank's copy.
    """
    barrier, held, n = threading.Barrier(2), [torch.empty(0)] * 2, len(x)
    copies = [copy.deepcopy(model) for _ in range(2)]

    def run(rank: int) -> dict[str, Tensor]:
        own, rows = copies[rank], range(rank * n // 2, (rank + 1) * n // 2)

        def both(values: Tensor) -> list[Tensor]:
            held[rank] = values
            barrier.wait(_PATIENCE)
            found = [*held]
            barrier.wait(_PATIENCE)
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
