"""Seeds derived from numbers, and noise that depends on (seed, rank, epoch, batch) only."""

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from quiet_trainer import quiet_trainer

import aezoo
from aezoo.data import DataModule
from aezoo.training.seeding import forked_rng, mix, seed_all

CPU = torch.device("cpu")


def test_mix_is_a_function_with_few_collisions():
    numbers = [(seed, rank, epoch, batch) for seed in range(8) for rank in range(8) for epoch in range(16) for batch in
               range(64)]  # fmt: skip
    seeds = [mix(*each) for each in numbers]
    assert seeds == [mix(*each) for each in numbers]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # torch's CPU generator uses the lower half; of so many random values, about 0.5 pairs would be equal
    assert len({seed % 2**32 for seed in seeds}) > len(seeds) - 5


def test_mix_depends_on_order_and_count():
    assert len({mix(1, 2), mix(2, 1), mix(1, 2, 0), mix(0, 1, 2), mix(1), mix(2), mix(), mix(0), mix(0, 0)}) == 9


def test_mix_takes_any_whole_number():
    seeds = [mix(n) for n in (0, 1, -1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 2, -(2**62))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_mix_has_avalanche_property():
    rng = random.Random(0)
    for place in range(4):
        moved = []
        for _ in range(200):
            numbers = [rng.getrandbits(40) for _ in range(4)]
            changed = list(numbers)
            changed[place] ^= 1 << rng.randrange(40)
            moved.append((mix(*numbers) ^ mix(*changed)).bit_count())
        # 63 bits: mean 31.5, standard error of 200 means 0.28; the last number is mixed for one round only
        assert 20 < sum(moved) / len(moved) < 40, place


def draws():
    return torch.rand(3).tolist(), random.random(), np.random.rand()


@pytest.mark.parametrize("others", [True, False])
def test_seed_all_seeds_torch_and_optionally_others(others):
    seed_all(5, CPU, others=others)
    one = draws()
    seed_all(5, CPU, others=others)
    other = draws()
    assert one[0] == other[0]
    assert (one[1:] == other[1:]) is others
    seed_all(6, CPU)
    assert draws()[0] != one[0]


def test_seed_all_equals_torch_manual_seed():
    seed_all(7, CPU)
    one = torch.rand(4)
    torch.manual_seed(7)
    assert torch.equal(one, torch.rand(4))
    seed_all(2**63 - 1, CPU)  # NumPy seeds have 32 bits
    np.random.seed((2**63 - 1) % 2**32)


def test_forked_rng_leaves_no_trace_even_after_an_error():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with forked_rng(CPU):
        torch.manual_seed(99)
        inside = torch.rand(2)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ZeroDivisionError), forked_rng(CPU):
        torch.rand(5).tolist()[0] / 0
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(inside, torch.rand(2))


class Noise(aezoo.model_class("vae")):
    """Records the noise of each training step."""

    def loss(self, x, y=None):
        if self.training:
            with forked_rng(CPU):
                self.drawn = [*getattr(self, "drawn", []), tuple(torch.rand(3).tolist())]
        return super().loss(x, y)


class Disturb(pl.Callback):
    """Draws random numbers and sets seeds between steps."""

    def on_train_batch_end(self, *args):
        torch.manual_seed(4)
        torch.rand(7)
        np.random.seed(4)


class Rank(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        trainer.strategy.global_rank = 3


def drawn(*callbacks, seed=0, **plain):
    torch.manual_seed(seed)
    model = Noise((4,), latent_dim=2, hidden_dims=(4,))
    data = DataModule.from_arrays(torch.rand(24, 4), batch_size=4, val_fraction=0.2, test_fraction=0)
    quiet_trainer(**{"max_epochs": 3} | plain, callbacks=list(callbacks)).fit(model, data)
    return model.drawn


@pytest.mark.slow
def test_noise_is_a_function_of_step_epoch_and_rank():
    first = drawn()
    assert len(first) == len(set(first)) == 15
    assert drawn() == first
    assert drawn(Disturb()) == first
    # validation does not change it
    assert drawn(limit_val_batches=0) == first
    assert drawn(num_sanity_val_steps=0, check_val_every_n_epoch=2) == first
    assert not set(drawn(seed=1)) & set(first)
    other_rank = drawn(Rank())
    assert len(set(other_rank)) == 15 and not set(other_rank) & set(first)
