"""Labels and classes of data sets, and subsets by class."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from aezoo.data.source import ArrayDataset, Stage
from aezoo.errors import AezooError
from aezoo.training.seeding import mix

# the label of a sample without one in scikit-learn
UNLABELLED = -1


class LabelledSubset(Subset[Any]):
    """Rows of a data set that is read sample by sample.

    Attributes:
        labels: (N,) the label of each row, None without labels.
    """

    def __init__(self, dataset: Dataset[Any], rows: Tensor, labels: Tensor | None) -> None:
        super().__init__(dataset, rows.tolist())
        self.labels = labels


class Relabelled(Subset[Any]):
    """A data set that is read sample by sample, with other labels.

    Attributes:
        labels: (N,) the label of each sample.
    """

    def __init__(self, dataset: Dataset[Any], labels: Tensor) -> None:
        super().__init__(dataset, range(len(labels)))
        self.labels = labels

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index][0], self.labels[index]

    def __getitems__(self, indices: list[int]) -> Any:
        found: Any = super().__getitems__(indices)
        if isinstance(found, tuple):  # a whole batch
            return found[0], self.labels[torch.as_tensor(indices)]
        return [(sample[0], self.labels[i]) for sample, i in zip(found, indices, strict=True)]


def labels_of(dataset: Dataset[Any]) -> Tensor | None:
    """All labels, (N,) on the CPU; None without labels. Reads no samples if the data set has an attribute `labels`."""
    held = cast(Any, dataset)
    if isinstance(dataset, ArrayDataset):
        return dataset.y
    labels = getattr(held, "labels", None)
    if labels is None and len(held) and len(held[0]) > 1:
        labels = [held[i][1] for i in range(len(held))]
    return None if labels is None else torch.as_tensor(labels)


def subset(dataset: Dataset[Any], rows: Tensor) -> Dataset[Any]:
    """The samples with these indices, with their labels."""
    y = labels_of(dataset)
    y = None if y is None else y[rows]
    if not isinstance(dataset, ArrayDataset):
        return LabelledSubset(dataset, rows, y)
    paths = dataset.paths
    return ArrayDataset(dataset.x[rows], y, None if paths is None else [paths[i] for i in rows.tolist()])


def paths_of(dataset: Dataset[Any]) -> Sequence[str] | None:
    """The file of each sample, (N,); None unless each sample has a separate file."""
    if isinstance(dataset, Subset):
        paths = paths_of(dataset.dataset)
        return None if paths is None else [paths[i] for i in dataset.indices]
    return getattr(dataset, "paths", None)


def label_names(y: Tensor, class_names: tuple[str, ...] | None) -> npt.NDArray[np.str_]:
    """The class name of each sample, (N,); the number for classes without a name and for -1, no class."""
    if class_names is not None:
        return np.array([*class_names, str(UNLABELLED)])[y.numpy()]  # -1 counts from the end
    return np.array([str(int(label)) if float(label).is_integer() else str(label) for label in y.tolist()], dtype=str)


def original_labels(y: Tensor, class_names: tuple[str, ...] | None) -> list[Any]:
    """Labels as in the data: class names, as integers if all of them are integers."""
    if class_names is None:
        return y.tolist()
    names = label_names(y, class_names).tolist()
    # 001 is a name, different from 1
    return [int(name) for name in names] if all(map(_is_integer, set(names))) else names


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal() and str(int(name)) == name


def describe_classes(names: npt.NDArray[np.str_]) -> str:
    """The classes among `names`, at most 20, for a message."""
    known = sorted(set(names.tolist()))
    return ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")


def restrict_training_classes(
    splits: dict[Stage, Dataset[Any]], wanted: Sequence[str | int], class_names: tuple[str, ...] | None, where: str
) -> dict[Stage, Dataset[Any]]:
    """The same splits, with train and val reduced to some classes.

    Args:
        splits: all samples.
        wanted: the classes by name or number.
        class_names: names of the labels 0, 1, ....
        where: the data's name in messages.

    Raises:
        AezooError: there are no labels, several per sample, or no sample of one of the classes.
    """
    kept = dict(splits)
    for stage in ("train", "val"):
        if stage not in splits:
            continue
        y = labels_of(splits[stage])
        if y is None or y.ndim != 1:
            raise AezooError(f"{where} has {'no labels' if y is None else 'several labels per sample'}: drop "
                             "--data.train_classes or give one label per sample")  # fmt: skip
        names = label_names(y, class_names)
        missing = [str(one) for one in wanted if str(one) not in names]
        # a small validation split may lack one of several classes
        if missing and (stage == "train" or len(missing) == len(wanted)):
            raise AezooError(f"no {stage} sample of {where} is of class {missing[0]!r} (--data.train_classes): "
                             f"choose from {describe_classes(names)}")  # fmt: skip
        rows = torch.from_numpy(np.flatnonzero(np.isin(names, [str(one) for one in wanted])))
        kept[stage] = subset(splits[stage], rows)
    return kept


def keep_labels(
    dataset: Dataset[Any], n: int, seed: int, class_names: tuple[str, ...] | None, where: str
) -> Dataset[Any]:
    """The same samples: n of them keep their labels, equally many per class, and all others get -1.

    Args:
        dataset: the samples.
        n: how many keep their labels.
        seed: fixes which.
        class_names: names of the labels 0, 1, ....
        where: the data's name in messages.

    Raises:
        AezooError: there are no classes, n is not a multiple of their number, or a class has too few samples.
    """
    y = labels_of(dataset)
    if y is None or y.ndim != 1 or y.is_floating_point():
        raise AezooError(f"{where} has no classes: drop --data.num_labels or give one whole number per sample as label")
    classes = y[y >= 0].unique()
    each, rest = divmod(n, max(1, len(classes)))
    if rest or not len(classes):
        raise AezooError(f"--data.num_labels {n} cannot be shared evenly by the {len(classes)} classes of {where}: "
                         f"give a multiple of {len(classes)}")  # fmt: skip
    kept = torch.full((len(y),), UNLABELLED, dtype=torch.long)
    generator = torch.Generator().manual_seed(mix(seed, len(y)))  # without n: larger ones contain smaller ones
    for k in classes:
        rows = (y == k).nonzero()[:, 0]
        if len(rows) < each:
            name = str(label_names(k[None], class_names)[0])
            raise AezooError(f"--data.num_labels {n} needs {each} samples of each class, but the training split of "
                             f"{where} has {len(rows)} of {name!r}: lower it")  # fmt: skip
        rows = rows[torch.randperm(len(rows), generator=generator)[:each]]
        kept[rows] = y[rows].long()
    return (
        ArrayDataset(dataset.x, kept, dataset.paths) if isinstance(dataset, ArrayDataset) else Relabelled(dataset, kept)
    )
