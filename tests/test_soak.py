"""Models train for 120 steps with random hyperparameters: losses stay finite, memory does not grow.

`python -m tests.promises --run soak` trains every registered model for 400 steps with each of two draws.
"""

import gc

import promises
import pytest
import torch
from golden import own_models
from quiet_trainer import quiet_trainer
from representative_models import REPRESENTATIVE
from soak import RANGES, TRIM, Watch, arguments, draw

import aezoo
from aezoo.callbacks import FaultGuard
from aezoo.data import DataModule

STATEFUL = ("sequence_ae", "memory_ae", "rae", "autoencoder_kl", "vdvae", "titok", "index_transformer")
NAMES = own_models() if promises.is_recording() else (*REPRESENTATIVE, *STATEFUL)
SEEDS, EPOCHS, STEPS = ((0, 1), 20, 20) if promises.is_recording() else ((0,), 20, 6)
# bytes per step: a leaked batch takes 64 * 64 * 4 = 16 KiB, a leaked graph more
BOUND = 1024


def soak(model, data, watch):
    limits = {"max_epochs": EPOCHS, "limit_train_batches": STEPS, "limit_val_batches": 1}
    trainer = quiet_trainer(devices=1, **limits, callbacks=[FaultGuard(patience=1), watch])
    gc.collect()
    gc.freeze()  # exclude the objects of imported modules from the collections after each epoch
    try:
        trainer.fit(model, data)
    finally:
        gc.unfreeze()


@pytest.fixture(scope="module")
def data():
    return DataModule("digits", batch_size=64)


@pytest.mark.slow
def test_every_hyperparameter_of_every_model_is_drawn():
    assert {key for name in own_models() for key in arguments(name)} == RANGES.keys()
    for name in own_models():
        for seed in range(4):
            aezoo.create_model(name, (1, 8, 8), **draw(name, seed))


@pytest.mark.slow
@pytest.mark.skipif(TRIM is None, reason="memory cannot be measured on this platform")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", NAMES)
def test_long_training_stays_finite_without_memory_growth(name, seed, data):
    drawn = draw(name, seed)
    for _ in range(2):  # memory allocated once, for caches or threads, is no leak: a leak also appears in a second run
        torch.manual_seed(seed)
        model, watch = aezoo.create_model(name, data.input_shape, **drawn), Watch()
        soak(model, data, watch)
        assert watch.steps == EPOCHS * STEPS and watch.finite, drawn
        assert all(value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point()), drawn
        if watch.growth() < BOUND:
            break
    assert watch.growth() < BOUND, f"{watch.growth():.0f} bytes per step with {drawn}"
    promises.add("soak", f"{name}-{seed}", {"steps": watch.steps})


@pytest.mark.slow
@pytest.mark.skipif(TRIM is None, reason="memory cannot be measured on this platform")
def test_memory_leak_is_detected(data):
    class Leaking(Watch):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
            self.__dict__.setdefault("kept", []).append(batch[0].clone())

    watch = Leaking()
    soak(aezoo.create_model("dense_ae", data.input_shape, hidden_dims=[8]), data, watch)
    assert watch.growth() > BOUND
