"""Collectives give the gradients and second derivatives of one process with all samples."""

import pytest
import torch
from torch import distributed, multiprocessing

from aezoo.training.collectives import all_gather_rows, all_reduce_sum

WORLD, WEIGHTS = 3, torch.linspace(-1, 1, 3 * 6 * 4, dtype=torch.float64).view(3, 6, 4)


def values():
    return torch.rand(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def loss_of(rank, seen):
    """A cubic with weights of each rank, so that derivatives up to the second differ between ranks."""
    return ((seen**3) * WEIGHTS[rank, : len(seen)]).sum()


def derivatives(loss, x):
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return first.detach(), second


def of_one_process(collective):
    x = values().requires_grad_()
    if collective is all_gather_rows:
        return derivatives(sum(loss_of(rank, x) for rank in range(WORLD)), x)
    return derivatives(sum(loss_of(rank, sum(x.chunk(WORLD))) for rank in range(WORLD)), x)


def _rank(rank, store, folder):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    for collective in (all_gather_rows, all_reduce_sum):
        # a transposed tensor is not contiguous
        x = values().chunk(WORLD)[rank].T.contiguous().T.requires_grad_()
        seen = collective(x)
        # the square of all first derivatives, of which each process has its own
        torch.save((seen.detach(), *derivatives(loss_of(rank, seen), x)), f"{folder}/{collective.__name__}-{rank}")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.start_processes(_rank, (str(folder / "store"), str(folder)), WORLD, start_method="fork")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("collective", [all_gather_rows, all_reduce_sum])
def test_collectives_match_single_process(folder, collective):
    found = [torch.load(folder / f"{collective.__name__}-{rank}", weights_only=True) for rank in range(WORLD)]
    whole = values() if collective is all_gather_rows else sum(values().chunk(WORLD))
    for seen, *_ in found:
        torch.testing.assert_close(seen, whole)
    for i, wanted in enumerate(of_one_process(collective), 1):
        torch.testing.assert_close(torch.cat([of_rank[i] for of_rank in found]), wanted)
