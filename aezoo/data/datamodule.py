"""The one DataModule: any source by name, the same batches for the same seed."""

import difflib
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from aezoo.data.loaders import EpochSampler, LazyLoader, collate, make_loader
from aezoo.data.source import STAGES, ArrayDataset, Options, Source, Stage
from aezoo.data.sources import from_path, open_source
from aezoo.errors import AezooError

Scaling = Literal["auto", "none", "unit", "standard"]
Layout = Literal["auto", "vector", "sequence", "image", "image_last", "volume", "volume_last"]
Labels = Literal["auto", "required", "ignore"]


class DataModule(LightningDataModule):
    """Data for every model of the zoo. Batches are `(x,)` or `(x, y)` with x float32.

    Args:
        name: mnist5k (ships with the package), digits, folder, array, a torchvision set such as fashion_mnist or
            cifar10, a name that a plug-in brings, or the path of an image folder or of a file of arrays.
        root: Where the files are, or where downloads go; for `folder` the folder, for `array` the file.
        batch_size: Samples in a batch of each process.
        val_fraction: Share of the training samples taken for validation where the set has no validation split;
            0 trains without validation.
        test_fraction: The same for the test split.
        seed: Fixes the splits and the order of every epoch.
        size: Resize the shorter side of images to this and cut the middle square.
        channels: 1 turns images grey, 3 makes them coloured; by default as they are.
        scale: auto divides uint8 by 255, leaves floats within 0 and 1 alone and brings all others to 0..1 by the
            training split's minimum and maximum (per feature for vectors, else over everything); unit always does
            the latter; standard subtracts the mean and divides by the deviation; none keeps the values.
        layout: What the axes of an array mean; auto reads (N, D) as vectors, (N, A, B) as grey images if uint8 or
            square and else as sequences, four axes as images and five as volumes.
        labels: required refuses data without labels, ignore leaves them out of the batches.
        download: Fetch missing files where there is a network.
        on_error: Whether a broken image ends the run or is skipped with a warning that counts them.
        max_pixels: Refuse images with more pixels, which may be decompression bombs.
        num_workers: Processes that read ahead; sets in memory need none.
        drop_last: Leave out the last training batch of an epoch if it is not full.
    """

    input_shape: tuple[int, ...]
    num_classes: int | None

    def __init__(
        self,
        name: str = "mnist5k",
        root: str = "data",
        batch_size: int = 128,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
        size: int | None = None,
        channels: int | None = None,
        scale: Scaling = "auto",
        layout: Layout = "auto",
        labels: Labels = "auto",
        download: bool = True,
        on_error: Literal["raise", "skip"] = "raise",
        max_pixels: int = 89_478_485,
        num_workers: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        # a Path would end up in checkpoints, which weights_only loading then refuses
        name, root = str(name), str(root)
        self.save_hyperparameters(logger=False)
        for key, value, least in (
            ("batch_size", batch_size, 1), ("seed", seed, 0), ("num_workers", num_workers, 0),
            ("max_pixels", max_pixels, 1), ("size", 1 if size is None else size, 1),
        ):  # fmt: skip
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise AezooError(f"--data.{key} is {value!r}: give a whole number of at least {least}")
        for key, part in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if isinstance(part, bool) or not isinstance(part, int | float) or not 0 <= part < 1:
                raise AezooError(f"--data.{key} is {part!r}: give a share from 0 up to, but not including, 1")
        if val_fraction + test_fraction >= 1:
            raise AezooError(f"--data.val_fraction {val_fraction} and --data.test_fraction {test_fraction} leave "
                             "nothing to train on: their sum must stay below 1")  # fmt: skip
        _one_of("scale", scale, ("auto", "none", "unit", "standard"))
        _one_of("layout", layout, ("auto", "vector", "sequence", "image", "image_last", "volume", "volume_last"))
        _one_of("labels", labels, ("auto", "required", "ignore"))
        _one_of("on_error", on_error, ("raise", "skip"))
        if channels not in (None, 1, 3):
            raise AezooError(f"--data.channels is {channels!r}: give 1 (grey) or 3 (coloured)")

        self.name, self.batch_size, self.seed, self.drop_last = name, batch_size, seed, drop_last
        self.scale, self.labels, self.num_workers = scale, labels, num_workers
        reader = from_path(name)
        options = Options(
            name=reader or name, root=name if reader else root, val_fraction=val_fraction, test_fraction=test_fraction,
            seed=seed, size=size, channels=channels, scale=scale, layout=layout, download=download, on_error=on_error,
            max_pixels=max_pixels,
        )  # fmt: skip
        self.source = self._open(options)
        self.input_shape = tuple(self.source.input_shape)
        self.num_classes = None if labels == "ignore" else self.source.num_classes
        self._splits: dict[Stage, Dataset[Any]] = {}
        self._position = (-1, 0)

    # arrays that `from_arrays` hands to its instance; a class attribute, so that `__init__` keeps plain arguments
    _arrays: dict[str, Any] | None = None

    def _open(self, options: Options) -> Source:
        if self._arrays is None:
            return open_source(options)
        from aezoo.data.array import Array

        return Array(options, self._arrays)

    @classmethod
    def from_arrays(
        cls,
        x: Any,
        y: Any = None,
        *,
        x_val: Any = None,
        y_val: Any = None,
        x_test: Any = None,
        y_test: Any = None,
        **plain: Any,
    ) -> "DataModule":
        """A DataModule of tensors or NumPy arrays; a split that is not given is taken out of x.

        Args:
            x: training samples: (N, D), (N, C, L), (N, H, W), (N, H, W, C), (N, C, H, W) or (N, C, D, H, W).
            y: their labels.
            x_val: validation samples.
            y_val: their labels.
            x_test: test samples.
            y_test: their labels.
            **plain: the arguments of `DataModule`, batch_size and the like.
        """
        if given := {"name", "root"} & set(plain):
            raise AezooError(f"from_arrays has its data already: drop {' and '.join(sorted(given))}")
        module = cls.__new__(cls)
        module._arrays = {"x": x, "y": y, "x_val": x_val, "y_val": y_val, "x_test": x_test, "y_test": y_test}
        cls.__init__(module, name="array", root="", **plain)
        return module

    def prepare_data(self) -> None:
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Read the splits and refuse what cannot be trained on; all splits at once, as they share their statistics."""
        if not self._splits:
            if self.trainer is None:
                self.prepare_data()
            splits = {part: self.source.split(part) for part in STAGES}
            self._splits = {part: dataset for part, dataset in splits.items() if dataset is not None}
        self._check(self._splits.get("train"))
        if self.trainer is not None and stage == "fit" and "val" not in self._splits:
            # an empty loader would make Lightning warn of what was asked for
            self.trainer.limit_val_batches = 0

    def _check(self, train: Dataset[Any] | None) -> None:
        n = 0 if train is None else _length(train)
        _, world = self._rank_and_world()
        if train is None or n < world:
            raise AezooError(f"{self.name}: {n} training samples for {world} process(es): give more data")
        if self.drop_last and n // world < self.batch_size:
            raise AezooError(
                f"{self.name}: {n} training samples for {world} process(es) do not fill one batch of "
                f"{self.batch_size}: lower --data.batch_size or set --data.drop_last false"
            )
        x = train.x if isinstance(train, ArrayDataset) else None
        if x is not None and (x.min() == x.max() if n == 1 else all(torch.equal(row, x[0]) for row in x)):
            raise AezooError(f"{self.name}: constant data, all {n} training samples are the same: check the file")
        if self.labels == "required" and len(collate([cast(Any, train)[0]], labels=True)) == 1:
            raise AezooError(
                f"{self.name} has no labels and --data.labels is required: give y, a column label, or one folder a "
                "class"
            )

    def train_dataloader(self) -> LazyLoader:
        loader = self._loader("train")
        epoch, batches = self._position
        cast(EpochSampler, loader.sampler).skip = (epoch, batches * self.batch_size)
        self._position = (-1, 0)
        return loader

    def state_dict(self) -> dict[str, int]:
        """The position in the training data: the epoch and the batches of it that each rank has seen."""
        if self.trainer is None:
            return {}
        epoch = self.trainer.fit_loop.epoch_progress.state_dict()["current"]
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.state_dict()["current"]
        begun = epoch["processed"] != epoch["ready"]
        return {"epoch": epoch["processed"], "batches": batches["ready"] if begun else 0}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on there; Lightning calls it before it asks for the loader."""
        self._position = (state_dict.get("epoch", -1), state_dict.get("batches", 0))

    def val_dataloader(self) -> LazyLoader:
        return self._loader("val")

    def test_dataloader(self) -> LazyLoader:
        return self._loader("test")

    def predict_dataloader(self) -> LazyLoader:
        return self._loader("test")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Bytes become floats here, on the device: a quarter of the traffic, and no work for the workers."""
        x = batch[0]
        if x.dtype == torch.uint8:
            x = self._as_float(x)
            if self.trainer is not None:
                # Lightning has converted the batch to the precision of the run already, and bytes are left as they are
                x = self.trainer.precision_plugin.convert_input(x)
        return (x, *batch[1:])

    def dataset(self, stage: Stage) -> Dataset[Any]:
        """The samples of a split, x uint8 or float32."""
        if stage not in self._ready():
            raise AezooError(f"{self.name} has no {stage} split: set --data.{stage}_fraction above 0")
        return self._splits[stage]

    def tensors(self, stage: Stage) -> tuple[Tensor, Tensor | None]:
        """All of a split: x float32 as the model sees it, and the labels or None."""
        loader = make_loader(self.dataset(stage), batch_size=1024, labels=self.labels != "ignore")
        x, *y = (torch.cat(part) for part in zip(*loader, strict=True))
        return self._as_float(x), y[0] if y else None

    def splits(self) -> tuple[Stage, ...]:
        """The splits there are, in the order train, val, test."""
        return tuple(self._ready())

    def describe(self) -> str:
        """One line: sizes of the splits, shape, classes."""
        sizes = ", ".join(f"{_length(dataset)} {stage}" for stage, dataset in self._ready().items())
        classes = f"{self.num_classes} classes" if self.num_classes else "no classes"
        return f"{self.name}: {sizes}, {'x'.join(map(str, self.input_shape))}, {classes}"

    def _ready(self) -> dict[Stage, Dataset[Any]]:
        self.setup()
        return self._splits

    def _as_float(self, x: Tensor) -> Tensor:
        return x.float() / 255 if x.dtype == torch.uint8 and self.scale != "none" else x.float()

    def _rank_and_world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _loader(self, stage: Stage) -> LazyLoader:
        rank, world = self._rank_and_world()
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return make_loader(
            self.dataset(stage),
            batch_size=self.batch_size,
            shuffle=stage == "train",
            seed=self.seed,
            rank=rank,
            world=world,
            num_workers=self.num_workers,
            drop_last=self.drop_last and stage == "train",
            pin_memory=on_gpu,
            labels=self.labels != "ignore",
        )


def _length(dataset: Dataset[Any]) -> int:
    return len(cast(Any, dataset))


def _one_of(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise AezooError(f"--data.{key} is {value!r}{hint}; choose from {', '.join(choices)}")
