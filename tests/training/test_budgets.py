"""Settings chosen from the data: the rules, and equal choices by the command line and the scikit-learn interface."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

import aezoo
from aezoo.cli.main import main
from aezoo.data import DataModule
from aezoo.registry import model_class
from aezoo.sklearn import AutoencoderTransformer
from aezoo.training import budgets

OFF = [f"--{name}.every_n_epochs=0" for name in ("reconstructions", "samples", "traversal", "latents", "filters")]


def test_few_samples_get_small_batches_and_many_epochs():
    assert budgets.choose_batch_size(4_000) == 128 and budgets.choose_max_epochs(4_000, 128) == 20  # mnist5k
    assert budgets.choose_batch_size(60_000) == 128 and budgets.choose_max_epochs(60_000, 128) == 20
    assert budgets.choose_batch_size(480) == 16 and budgets.choose_batch_size(5) == 5
    sizes = [budgets.choose_batch_size(n) for n in range(1, 5_000)]
    assert sizes == sorted(sizes)
    for n in (1, 30, 120, 480, 1_000, 2_000, 3_999):
        size = budgets.choose_batch_size(n)
        steps = budgets.choose_max_epochs(n, size) * budgets.steps_per_epoch(n, size)
        assert steps >= min(2_000, 80_000 / size)
        assert steps - budgets.steps_per_epoch(n, size) < 2_000


def test_code_size_follows_the_size_of_samples():
    def size(name, shape):
        cls = model_class(name)
        return budgets.choose_latent_dim(cls, aezoo.create_model(name, (1, 28, 28)).hparams["latent_dim"], shape)

    assert [size("dense_ae", shape) for shape in [(2,), (4,), (30,), (1, 8, 8), (1, 28, 28)]] == [2, 2, 7, 16, 32]
    assert [size("vae", shape) for shape in [(4,), (1, 28, 28), (3, 64, 64)]] == [2, 16, 64]
    assert [size("topk_sae", shape) for shape in [(4,), (3, 64, 64)]] == [512, 512]
    assert size("vq_vae", (4,)) == size("vq_vae", (3, 64, 64))


@pytest.mark.parametrize(
    ("shape", "unbounded", "scale", "likelihood", "rule"),
    [
        ((30,), True, None, "gaussian", "standard"),
        ((2, 64), True, None, "gaussian", "standard"),
        ((30,), False, None, "bernoulli", "auto"),
        ((1, 8, 8), True, None, "bernoulli", "auto"),
        ((1, 8, 8), False, "standard", "gaussian", None),
        ((1, 8, 8), True, "none", "gaussian", None),
        ((30,), True, "unit", "gaussian", None),
    ],
)
def test_likelihood_and_scale_follow_the_values(shape, unbounded, scale, likelihood, rule):
    assert budgets.choose_likelihood("bernoulli", shape, unbounded, scale) == likelihood
    assert budgets.choose_likelihood("laplace", shape, unbounded, scale) == "laplace"
    if rule is not None:
        assert budgets.choose_scale(shape, unbounded, likelihood == "bernoulli") == rule
        assert budgets.choose_scale(shape, unbounded, unit_interval=True) == "auto"


@pytest.mark.slow
@pytest.mark.parametrize("unit", [False, True])
def test_cli_and_sklearn_choose_alike(tmp_path, monkeypatch, capsys, unit):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(budgets, "_STEPS", 84)  # a shorter run
    X = np.random.default_rng(0).uniform(0, 1 if unit else 9, (60, 8))
    np.save("t.npy", X)
    main(["fit", "--model=dense_ae", "--data=t.npy", "--data.val_fraction=0", "--data.test_fraction=0", *OFF])
    words = re.search("chosen from the data, unless given: (.*)", capsys.readouterr().out)[1]
    model = AutoencoderTransformer(random_state=0).fit(X)
    chosen = dict(model.chosen_)
    values = ("none", "bernoulli") if unit else ("standard", "gaussian")
    assert (chosen["scale"], chosen["likelihood"]) == values
    # the command line also chooses no scale, its default
    expected = {"model.latent_dim": 2, "model.likelihood": values[1], "data.batch_size": 16, "trainer.max_epochs": 21}
    assert {f"model.{key}": chosen[key] for key in ("latent_dim", "likelihood")}.items() <= expected.items()
    assert (chosen["batch_size"], chosen["max_epochs"]) == (16, 21)
    shown = dict(part.rsplit(" (")[0].split(" ") for part in words.split(", "))
    assert shown == {key: str(value) for key, value in expected.items()} | ({} if unit else {"data.scale": "standard"})
    config = yaml.safe_load(Path("runs/dense_ae-t/0/config.yaml").read_text())
    assert config["data"]["batch_size"] == 16 and config["trainer"]["max_epochs"] == 21
    run = aezoo.load_model("runs/dense_ae-t/0")
    assert {key: run.hparams[key] for key in ("latent_dim", "likelihood")} == {
        key: model.autoencoder_.hparams[key] for key in ("latent_dim", "likelihood")
    }


@pytest.mark.slow
def test_given_values_win_and_a_resumed_run_keeps_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("t.npy", np.random.default_rng(0).normal(0, 9, (60, 8)))
    Path("mine.yaml").write_text(
        "model: {class_path: dense_ae, init_args: {latent_dim: 3, likelihood: gaussian}}\n"
        "data: {name: t.npy, scale: unit, batch_size: 24}\ntrainer: {max_epochs: 1}\n"
    )
    main(["fit", "-c", "mine.yaml", *OFF])
    assert "chosen by" not in capsys.readouterr().out
    main(["fit", "--model=dense_ae", "--data=t.npy", "--model.latent_dim=3", "--trainer.max_steps=4", *OFF])
    chosen = re.search("chosen from .*: (.*)", capsys.readouterr().out)[1]
    assert chosen == "data.scale standard, model.likelihood gaussian, data.batch_size 16"
    main(["fit", "--ckpt_path=runs/dense_ae-t/0", "--trainer.max_steps=6"])
    assert "chosen by" not in capsys.readouterr().out
    assert aezoo.load_model("runs/dense_ae-t/0").hparams["latent_dim"] == 3
    # initial weights are those of a run with the given values
    main(["fit", "-c", "runs/dense_ae-t/0/config.yaml", "--trainer.max_steps=6"])
    one, other = (aezoo.load_model(f"runs/{run}/0").state_dict() for run in ("dense_ae-t", "config"))
    assert all(np.array_equal(one[key], other[key]) for key in one)


def test_data_module_keeps_its_default_batch_size():
    data = DataModule.from_arrays(np.random.default_rng(0).normal(0, 9, (60, 8)))
    assert data.batch_size == 128 and data.source.is_unbounded()
    data.choose(batch_size=16, scale="standard")
    x, _ = data.tensors("train")
    assert data.hparams["batch_size"] == 16 and abs(float(x.mean())) < 1e-5
    assert not DataModule.from_arrays(
        np.zeros((9, 4, 4), np.uint8) + np.arange(4, dtype=np.uint8)
    ).source.is_unbounded()


def test_detectors_train_1000_steps_in_10_to_40_epochs():
    chosen = {n: budgets.choose_detector_epochs(n, budgets.choose_batch_size(n)) for n in (5, 100, 3_360, 100_000)}
    assert chosen == {5: 40, 100: 40, 3_360: 38, 100_000: 10}
    assert 38 * budgets.steps_per_epoch(3_360, 128) >= 1_000 > 37 * budgets.steps_per_epoch(3_360, 128)
