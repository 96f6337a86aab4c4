"""Training on some classes: the samples kept, their labels, and invalid classes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from aezoo.data import DataModule
from aezoo.data.classes import label_names, labels_of, original_labels
from aezoo.errors import AezooError

RNG = np.random.default_rng(0)


def labels(module, stage):
    return set(module.tensors(stage)[1].tolist())


def test_train_and_val_are_filtered_and_test_is_not():
    everything, module = DataModule("digits"), DataModule("digits", train_classes=[3, "7"])
    for stage in ("train", "val"):
        x, y = everything.tensors(stage)
        kept, kept_y = module.tensors(stage)
        chosen = (y == 3) | (y == 7)
        assert torch.equal(kept, x[chosen]) and torch.equal(kept_y, y[chosen])
    assert labels(module, "test") == set(range(10))
    assert torch.equal(module.tensors("test")[0], everything.tensors("test")[0])
    assert module.num_classes == 10 and "1437 train" not in module.describe()


def test_training_batches_contain_only_the_given_classes():
    module = DataModule("digits", train_classes=[5], batch_size=32)
    y = torch.cat([y for _, y in module.train_dataloader()])
    assert set(y.tolist()) == {5} and len(y) == len(module.dataset("train"))


def test_array_classes_are_chosen_by_name():
    x, y = RNG.random((60, 4)), np.array(["cat", "dog", "owl"] * 20)
    module = DataModule.from_arrays(x, y, train_classes=["owl"])
    assert labels(module, "train") == {2} and labels(module, "test") == {0, 1, 2}


@pytest.mark.parametrize("memory", ["on", "off"])
def test_folder_classes_can_be_chosen(tmp_path, memory):
    for name, value in (("cats", 10), ("dogs", 200)):
        (tmp_path / name).mkdir()
        for i in range(20):
            Image.fromarray(np.full((4, 4), value + i, np.uint8)).save(tmp_path / name / f"{i}.png")
    module = DataModule(str(tmp_path), train_classes=["dogs"], memory=memory)
    x, y = module.tensors("train")
    assert set(y.tolist()) == {1} and x.min() * 255 >= 199.5
    assert labels(module, "test") == {0, 1}
    assert labels_of(module.dataset("train")).tolist() == y.tolist()


def test_small_val_split_may_miss_one_class_but_not_all():
    x, y = RNG.random((30, 4)), np.repeat([0, 1, 2], 10)
    splits = {"x_val": x[:4], "y_val": y[:4], "x_test": x, "y_test": y}
    assert labels(DataModule.from_arrays(x, y, train_classes=[0, 1], **splits), "val") == {0}
    with pytest.raises(AezooError, match=r"no val sample of array is of class '1' .* choose from 0"):
        DataModule.from_arrays(x, y, train_classes=[1], **splits).setup()


@pytest.mark.parametrize(
    ("classes", "match"),
    [
        ([0, 12], r"class '12' .* choose from 0, 1, 2"),
        (["0 "], "class '0 '"),
        ([], "is empty: give classes"),
        ([True], "takes a list"),
    ],
)
def test_unknown_classes_are_reported(classes, match):
    with pytest.raises(AezooError, match=match):
        DataModule("digits", train_classes=classes).setup()


def test_data_without_a_label_each_are_refused():
    x = RNG.random((40, 4))
    with pytest.raises(AezooError, match="no labels"):
        DataModule.from_arrays(x, train_classes=[0]).setup()
    with pytest.raises(AezooError, match="several labels"):
        DataModule.from_arrays(x, RNG.random((40, 3)), train_classes=[0]).setup()


def test_labels_are_read_from_samples_if_needed():
    class Plain(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return torch.zeros(2), index % 2

    assert labels_of(Plain()).tolist() == [0, 1, 0]


def test_names_of_numbers_and_fractions():
    assert label_names(torch.tensor([1, 0]), ("a", "b")).tolist() == ["b", "a"]
    assert label_names(torch.tensor([3, 1]), None).tolist() == ["3", "1"]
    assert label_names(torch.tensor([1.0, 0.5]), None).tolist() == ["1", "0.5"]


def test_ambiguous_numeric_class_names_stay_distinct():
    y = torch.tensor([0, 1, -1])
    assert original_labels(y, ("3", "7")) == [3, 7, -1]
    for names in (("1", "01"), ("001", "002"), ("3", "\u00b2")):
        assert original_labels(y, names) == [*names, "-1"]
