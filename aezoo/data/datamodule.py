"""The DataModule: any source by name, the same batches for the same seed."""

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Unpack, cast

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset, Subset

from aezoo.autoencoder import Autoencoder
from aezoo.data import augmentation
from aezoo.data import binarise as binarise_rules
from aezoo.data.array import Array
from aezoo.data.augmentation import Augmentation
from aezoo.data.classes import keep_labels, restrict_training_classes
from aezoo.data.columns import Columns, column_names
from aezoo.data.identity import data_identity, other_data_message
from aezoo.data.in_memory import InMemory
from aezoo.data.loaders import (
    EpochSampler,
    LazyLoader,
    Transform,
    Transforms,
    collate,
    default_num_workers,
    local_processes,
    make_loader,
    sample_blocks,
)
from aezoo.data.readers import TableArrays, check_columns
from aezoo.data.resident import ResidentLoader, dataset_bytes, load_into_memory, memory_excess, to_device
from aezoo.data.settings import Binarising, Labels, Memory, Scaling, SourceArgs, check_settings, check_source_settings
from aezoo.data.shared_arrays import share
from aezoo.data.source import DEFAULT_ROOT, STAGES, ArrayDataset, Options, Source, Stage, byte_divisor, to_float32
from aezoo.data.source_registry import open_source, source_of_path
from aezoo.errors import AezooError
from aezoo.training.data_units import DataUnits
from aezoo.training.hyperparameters import ConstructorHyperparameters
from aezoo.training.keyword_groups import complete
from aezoo.training.model_names import display_name
from aezoo.training.seeding import mix

# settings that are not passed to sources
_NOT_OF_SOURCES = {"batch_size", "binarise", "labels", "train_classes", "num_labels", "num_workers", "drop_last"}
_NOT_OF_SOURCES |= {*augmentation.SETTINGS}
# arguments that cannot be given in a file and are not stored in files
PERMISSIONS = ("allow_remote",)


class DataModule(ConstructorHyperparameters, LightningDataModule):
    """Data for every model of the zoo. Batches are `(x,)` or `(x, y)` with x float32.

    Args:
        name: mnist5k (included in the package), digits, shapes (sprites drawn from known factors), synthetic_dictionary
            (sparse sums of known atoms), activations (the output of a network's layer for another set), folder, array,
            hf (a Hugging Face set), stream (chunks of litdata, which need not fit into memory), a torchvision set
            such as fashion_mnist or cifar10, a name that a plug-in adds, or a path: a folder of images, a set that
            save_to_disk or litdata wrote, or a file of arrays.
        root: Where the files are, or where downloads go. For `folder` and `stream` the folder, for `stream` also
            s3://bucket/prefix, for `array` the file, for `hf` a folder or a name on the hub.
        batch_size: Samples in a batch of each process.
        val_fraction: Share of the training samples to validate on if the set has no validation split; 0 trains without
            validation.
        test_fraction: The same for the test split.
        seed: Fixes the splits and the order of every epoch.
        scale: auto divides uint8 by 255, keeps floats between 0 and 1, and scales all others to 0..1 by the training
            split's minimum and maximum (per feature for vectors, else over everything); unit always does the latter;
            standard subtracts the mean and divides by the standard deviation; none keeps the values.
        binarise: Turn values from 0 to 1 into zeros and ones. threshold compares with 1/2; static draws each value
            once, with the value as the probability of a one; dynamic draws training values again in every epoch, and
            once for commands such as `aezoo detect`.
        labels: required refuses data without labels, ignore leaves them out of the batches.
        train_classes: Train and validate on these classes only, by name or number; the test split keeps all classes. A
            model then learns normal samples, for `aezoo detect`. The statistics of `scale` are those of all classes.
        num_labels: Keep the labels of this many training samples, equally many of each class, and give all others -1,
            as for semi_supervised_vae; 0 keeps all labels. Validation and test keep theirs.
        download: Download missing files if there is a network.
        memory: on loads the samples of a split into memory, or onto the GPU that trains on them; off reads batches
            by a DataLoader; auto loads a split if it needs at most a quarter of the free memory there. Arrays, sets
            whose files are arrays and binarised sets are always read into memory.
        num_workers: Processes that read ahead if samples are not in memory; by default one for each free core, up to 8.
        drop_last: Leave out the last training batch of an epoch if it is not full.
        hflip: Training images are mirrored left to right with this probability, drawn again in every epoch.
        vflip: The same, top to bottom.
        crop_padding: Training images are padded by this many pixels on each side by reflection, and cropped to their
            size at a random position.
        color_jitter: Brightness, contrast and saturation of training images are multiplied by factors from 1 minus
            this to 1 plus this, such as 0.4.
        allow_remote: Whether the root may be an address, which is then opened with boto3's credentials. It is not a
            hyperparameter and cannot be given in a file; on the command line, give `--allow_remote`.
    """

    input_shape: tuple[int, ...]
    num_classes: int | None
    # bytes are not scaled here if the training step scales them
    leaves_bytes = True

    def __init__(
        self,
        name: str = "mnist5k",
        root: str = DEFAULT_ROOT,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
        scale: Scaling = "auto",
        binarise: Binarising = "none",
        labels: Labels = "auto",
        train_classes: list[str | int] | None = None,
        num_labels: int = 0,
        download: bool = True,
        memory: Memory = "auto",
        num_workers: int | None = None,
        drop_last: bool = False,
        hflip: float = 0.0,
        vflip: float = 0.0,
        crop_padding: int = 0,
        color_jitter: float = 0.0,
        allow_remote: bool = False,
        **settings: Unpack[SourceArgs],
    ) -> None:
        left_out = ("self", "settings", "__class__", *PERMISSIONS)
        shared = {key: value for key, value in locals().items() if key not in (*left_out, "left_out")}
        super().__init__()
        given = shared | complete(SourceArgs, settings)
        # a Path would end up in checkpoints, which weights_only loading then refuses
        given |= {key: str(given[key]) for key in ("name", "root", "network", "of", "cache_dir")}
        self.save_hyperparameters(given, ignore=PERMISSIONS, logger=False)
        self.allow_remote = allow_remote
        check_settings(given)
        self.name, self.batch_size, self.seed, self.drop_last = given["name"], batch_size, seed, drop_last
        self.scale, self.labels, self.memory, self.num_workers = scale, labels, memory, num_workers
        self.train_classes, self.num_labels, self.binarise = train_classes, num_labels, binarise
        self.missing = given["missing"]
        reader = source_of_path(self.name)
        place = {"name": reader, "root": self.name} if reader else {}
        of_source = {key: given[key] for key in given if key not in _NOT_OF_SOURCES} | place
        self.source = self._open(Options(**of_source, allow_remote=allow_remote))
        self.input_shape = tuple(self.source.input_shape)
        augmentation.check(given, self.input_shape)
        self.augmentation = {key: given[key] for key in augmentation.SETTINGS}
        self.num_classes = None if labels == "ignore" else self.source.num_classes
        self._splits: dict[Stage, Dataset[Any]] = {}
        self._blocks: dict[Stage, Tensor | None] = {}
        self._on_gpu: dict[Stage, ArrayDataset] = {}
        self._binarised_train: ArrayDataset | None = None
        self._memory_reason: dict[Stage, str] = {}
        self._shared: set[Stage] = set()
        self._position = (-1, 0)
        self._saved_val_limit: int | float | None = None

    # arrays from `from_arrays`; a class attribute, so that `__init__` only has plain arguments
    _arrays: dict[str, Any] | None = None

    def _open(self, options: Options) -> Source:
        check_source_settings(options)
        return open_source(options) if self._arrays is None else Array(options, self._arrays)

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
        """A DataModule of tensors, NumPy arrays or DataFrames; missing splits are taken from x.

        Args:
            x: training samples: (N, D), (N, C, L), (N, H, W), (N, H, W, C), (N, C, H, W) or (N, C, D, H, W).
            y: their labels.
            x_val: validation samples.
            y_val: their labels.
            x_test: test samples.
            y_test: their labels.
            **plain: the arguments of `DataModule`, such as batch_size.
        """
        if given := {"name", "root"} & set(plain):
            raise AezooError(f"from_arrays has its data already: drop {' and '.join(sorted(given))}")
        plain |= {"name": "array", "root": ""}
        module = cls.__new__(cls, **plain)  # __new__ checks the arguments
        columns = column_names(x)
        for name, other in (("x_val", x_val), ("x_test", x_test)):
            check_columns(name, column_names(other), columns)
        arrays = {"x": x, "y": y, "x_val": x_val, "y_val": y_val, "x_test": x_test, "y_test": y_test}
        module._arrays = TableArrays(arrays, columns)
        cls.__init__(module, **plain)
        return module

    def choose(self, **settings: Any) -> None:
        """Set `batch_size` or, before the data are read, `scale`, if the user has given none."""
        for key, value in settings.items():
            setattr(self, key, value)
        if "scale" in settings and isinstance(self.source, InMemory):
            self.source.set_scale(settings["scale"])
        self.save_hyperparameters(settings, logger=False)

    def prepare_data(self) -> None:
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Read and check the splits; all at once, as they share their statistics."""
        model = None if self.trainer is None else self.trainer.lightning_module
        if self.missing == "keep" and not getattr(model, "takes_missing", True):
            raise AezooError(f"--data.missing keep is for models of samples that lack whole parts, such as mvae, "
                             f"which {display_name(type(model))} is not: drop it")  # fmt: skip
        if not self._splits:
            if self.trainer is None:
                self.prepare_data()
            # a caller may have set a larger number for a later run
            self.source.processes = max(self.source.processes, local_processes(self.trainer))
            self.source.reads_once = stage == "predict"
            splits = {part: self.source.split(part) for part in STAGES}
            self._splits = {part: dataset for part, dataset in splits.items() if dataset is not None}
            if self.train_classes is not None:
                self._splits = restrict_training_classes(
                    self._splits, self.train_classes, self.source.class_names, str(self.name)
                )
            if self.num_labels and "train" in self._splits:
                named = self.source.class_names, str(self.name)
                self._splits["train"] = keep_labels(self._splits["train"], self.num_labels, self.seed, *named)
            # samples that are read into memory later keep the order of their files
            self._blocks = {part: sample_blocks(dataset) for part, dataset in self._splits.items()}
            if self.binarise != "none":
                self._binarise()
            if self.augmentation["color_jitter"] and "train" in self._splits:
                first = self._splits["train"][0][0]
                augmentation.check_values(first, self.source.value_range, str(self.name))
        if stage is not None and self.trainer is not None:
            self._hold_once_a_machine(stage)
        self._check(self._splits.get("train"))
        if stage == "fit" and isinstance(model, Autoencoder):
            model.data_units = self.units
        if self.trainer is not None and stage == "fit" and "val" not in self._splits:
            # with an empty loader Lightning would warn, although the user has chosen this
            if self._saved_val_limit is None:
                self._saved_val_limit = self.trainer.limit_val_batches
            self.trainer.limit_val_batches = 0

    def _hold_once_a_machine(self, stage: str) -> None:
        """Share samples in memory with the other processes of this machine; Lightning calls all of them."""
        wanted: dict[str, tuple[Stage, ...]] = {"fit": ("train", "val"), "validate": ("val",)}
        for part in wanted.get(stage, ("test",)):
            if part in self._splits and local_processes(self.trainer) > 1:
                self._stored_split(part, torch.device("cpu"))
        held = {part: split for part, split in self._splits.items() if isinstance(split, ArrayDataset)}
        new = {part: split for part, split in held.items() if part not in self._shared}
        self._shared |= {*new}
        arrays = {f"{part} {name}": getattr(split, name) for part, split in new.items() for name in ("x", "y")}
        share({name: array for name, array in arrays.items() if array is not None}, cast(Trainer, self.trainer))

    def _binarise(self) -> None:
        for number, (stage, dataset) in enumerate(self._splits.items()):
            held = dataset if isinstance(dataset, ArrayDataset) else load_into_memory(dataset, str(self.name))
            binarise_rules.check_probabilities(held.x, str(self.name))
            if not self._is_resampled(stage):
                held = binarise_rules.binarise_dataset(held, self.binarise, mix(self.seed, number))
            self._splits[stage] = held

    def _is_resampled(self, stage: Stage) -> bool:
        """Whether a split is stored as probabilities, from which values are drawn in every epoch."""
        return self.binarise == "dynamic" and stage == "train"

    def _check(self, train: Dataset[Any] | None) -> None:
        n = 0 if train is None else _length(train)
        _, world = self._rank_and_world()
        if train is None or n < world:
            raise AezooError(f"{self.name}: {n} training samples for {world} process(es) are too few: give more data")
        if self.drop_last and n // world < self.batch_size:
            raise AezooError(
                f"{self.name}: {n} training samples for {world} process(es) do not fill one batch of "
                f"{self.batch_size}: lower --data.batch_size or set --data.drop_last false"
            )
        x = train.x if isinstance(train, ArrayDataset) else None
        # by index, since `for row in x` would make tensors of all rows before the first comparison
        if x is not None and (x.min() == x.max() if n == 1 else all(torch.equal(x[i], x[0]) for i in range(n))):
            raise AezooError(f"{self.name}: constant data, all {n} training samples are the same: check the file")
        if self.labels == "required" and len(collate([cast(Any, train)[0]], labels=True)) == 1:
            raise AezooError(
                f"{self.name} has no labels and --data.labels is required: give y, a column label, or one folder per "
                "class"
            )

    def train_dataloader(self) -> LazyLoader | ResidentLoader:
        loader = self._loader("train")
        why = self._memory_reason.get("train")
        rank_zero_info(f"{self.name}: {_storage(loader)}{f': {why}' if why else ''}")
        epoch, batches = self._position
        cast(EpochSampler, loader.sampler).skip = (epoch, batches * cast(int, loader.batch_size))
        self._position = (-1, 0)
        return loader

    @cached_property
    def identity(self) -> str:
        """Identifies this set, see `data_identity`; empty for arrays in memory."""
        if self._arrays is not None:
            return ""
        root, of = (str(self.hparams[key]) for key in ("root", "of"))
        return data_identity(str(self.name), root, of, self.allow_remote)

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data, and the settings that fix the order of batches.

        Also the scaling, so that a task can scale other samples in the same way, and the column names of a table.
        """
        if self.trainer is None:
            return {}
        epoch = self.trainer.fit_loop.epoch_progress.state_dict()["current"]
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.state_dict()["current"]
        begun = epoch["processed"] != epoch["ready"]
        _, world = self._rank_and_world()
        position = {"epoch": epoch["processed"], "batches": batches["ready"] if begun else 0}
        position |= {"world": world, "batch_size": self.batch_size, "seed": self.seed}
        units = self.units
        white = {} if units.white is None else {"white": units.white}
        columns = {"columns": list(units.columns)} if units.columns else {}
        identity = {"identity": self.identity} if self.identity else {}
        return position | identity | white | columns | ({"scaling": units.scaling} if units.scaling else {})

    @property
    def units(self) -> DataUnits:
        """The units of the data before scaling."""
        scaling = getattr(self.source, "scaling", None)
        state = {} if scaling is None else scaling.state()
        levels = byte_divisor(self.scale)
        return DataUnits(state, self.source.white, tuple(self.source.columns), self.source.is_table, levels)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from that position; Lightning calls this before it asks for the loader.

        The seed fixes the order of an epoch, which is distributed over the processes in batches: with another seed,
        batch size or number of processes a run can begin an epoch, but not continue within one.
        """
        check_columns(str(self.hparams["root"] if self.name == "array" else self.name), self.source.columns,
                      state_dict.get("columns", ()))  # fmt: skip
        self.report_other_scaling(state_dict.get("scaling", {}), state_dict.get("white"))
        _, world = self._rank_and_world()
        # evaluation does not continue the epoch
        trains = self.trainer is None or self.trainer.state.fn in (None, "fit")
        if trains and self.identity and state_dict.get("identity", self.identity) != self.identity:
            raise AezooError(other_data_message("the checkpoint"))
        for key, now, flag, words in (
            ("world", world, "trainer.devices", "{} processes"),
            ("batch_size", self.batch_size, "data.batch_size", "batch size {}"),
            ("seed", self.seed, "data.seed", "seed {}"),
        ):
            was = state_dict.get(key, now)
            if was != now and state_dict.get("batches") and trains:
                raise AezooError(
                    f"the checkpoint was saved within an epoch, with {words.format(was)}; with {now} the run cannot "
                    f"continue: give --{flag} {was}, or a checkpoint from the end of an epoch, such as best-*.ckpt"
                )
        self._position = (state_dict.get("epoch", -1), state_dict.get("batches", 0))

    def report_other_scaling(self, trained: Mapping[str, Tensor], white: int | None) -> None:
        """Warn if these data are scaled by other statistics than a model's training data.

        Args:
            trained: the scaling of the training data, as in `state_dict`.
            white: their value of white; given if they needed no scaling.
        """
        if self._splits and not self.units.has_scaling(trained) and (trained or white is not None):
            rank_zero_info(
                f"{self.name}: values are scaled by the statistics of its own training split, not of the data that the "
                "model was trained on (--data.scale); commands scale the samples of --input like those data"
            )

    def val_dataloader(self) -> LazyLoader | ResidentLoader:
        return self._loader("val")

    def test_dataloader(self) -> LazyLoader | ResidentLoader:
        return self._loader("test")

    def predict_dataloader(self) -> LazyLoader | ResidentLoader:
        # nothing is averaged over ranks, so their numbers of batches may differ by one
        return self._loader("test", by_batch=True)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Convert bytes to floats on the device: this transfers a quarter of the data, and workers do not have to."""
        x = batch[0]
        if x.dtype == torch.uint8:
            if self._step_takes_bytes():
                return batch
            x = to_float32(x, byte_divisor(self.scale))
            if self.trainer is not None:
                # Lightning has already converted the batch to the run's precision, except bytes
                x = self.trainer.precision_plugin.convert_input(x)
        return (x, *batch[1:])

    def dataset(self, stage: Stage) -> Dataset[Any]:
        """The samples of a split, x uint8 or float32; with dynamic binarisation train is drawn as static does."""
        held = self._split(stage)
        if not self._is_resampled(stage):
            return held
        if self._binarised_train is None:
            seed = mix(self.seed, list(self._splits).index(stage))
            self._binarised_train = binarise_rules.binarise_dataset(cast(ArrayDataset, held), "static", seed)
        return self._binarised_train

    def _split(self, stage: Stage) -> Dataset[Any]:
        if stage not in self._prepared_splits():
            raise AezooError(f"{self.name} has no {stage} split: set --data.{stage}_fraction above 0 before training")
        return self._splits[stage]

    def tensors(self, stage: Stage, rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor | None]:
        """A split, or these rows of it: x float32, scaled for the model, and the labels or None."""
        dataset = self.dataset(stage)
        dataset = dataset if rows is None else Subset(dataset, rows)
        loader = make_loader(dataset, batch_size=1024, labels=self.labels != "ignore")
        x, *y = (torch.cat(part) for part in zip(*loader, strict=True))
        return to_float32(x, byte_divisor(self.scale)), y[0] if y else None

    def splits(self) -> tuple[Stage, ...]:
        """The existing splits, in the order train, val, test."""
        return tuple(self._prepared_splits())

    @property
    def columns(self) -> Columns | None:
        """The columns of a table, with the scaling of its samples; None of other data."""
        if not self.source.is_table:
            return None
        train = self._prepared_splits()["train"]
        state = self.units.scaling
        if not state and isinstance(train, ArrayDataset) and train.x.dtype == torch.uint8 and self.scale != "none":
            state = {"offset": torch.zeros(()), "factor": torch.tensor(float(byte_divisor(self.scale)))}
        return Columns(self.source.columns, state, self.input_shape[0])

    def describe(self) -> str:
        """Sizes of the splits, shape and classes in one line."""
        sizes = ", ".join(f"{_length(dataset)} {stage}" for stage, dataset in self._prepared_splits().items())
        classes = f"{self.num_classes} classes" if self.num_classes else "no classes"
        return f"{self.name}: {sizes}, {'x'.join(map(str, self.input_shape))}, {classes}"

    def __repr__(self) -> str:
        if not self._splits:
            root = str(self.hparams["root"])
            place = f" in {root}" if root not in ("", DEFAULT_ROOT) else ""
            sizes = f"samples of {'x'.join(map(str, self.input_shape))}{place}, not read yet"
        else:
            sizes = self.describe().removeprefix(f"{self.name}: ")
        return f"DataModule({self.name}: {sizes}, batches of {self.batch_size})"

    # Lightning's makes a loader of every split
    __str__ = __repr__

    def _prepared_splits(self) -> dict[Stage, Dataset[Any]]:
        self.setup()
        return self._splits

    def _rank_and_world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _overfits(self) -> bool:
        """Whether the trainer overfits a few batches, which must then be the same in every epoch."""
        return bool(getattr(self.trainer, "overfit_batches", 0))

    def _step_takes_bytes(self) -> bool:
        """Whether the batch goes to a compiled training step, which scales bytes in one pass with what follows."""
        trainer = self.trainer
        return (
            trainer is not None
            and trainer.training
            and self.scale != "none"
            and getattr(trainer.lightning_module, "takes_bytes", False)
        )

    def _loader(self, stage: Stage, by_batch: bool = False) -> LazyLoader | ResidentLoader:
        rank, world = self._rank_and_world()
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        dataset = self._stored_split(stage, device, reads_once=by_batch)
        resident = isinstance(dataset, ArrayDataset) and self.memory != "off"
        shared: dict[str, Any] = {
            "batch_size": self.batch_size,
            "shuffle": stage == "train" and not self._overfits(),
            "seed": self.seed,
            "rank": rank,
            "world": world,
            "drop_last": self.drop_last and stage == "train",
            "blocks": self._blocks[stage],
            "by_batch": by_batch,
        }
        transform = self._transform(stage, device)
        if resident:
            held = cast(ArrayDataset, dataset)
            y = None if self.labels == "ignore" else held.y
            pin_memory = device.type == "cuda" and held.x.device.type == "cpu"
            loader = ResidentLoader(held.x, y, pin_memory=pin_memory, **shared)
            loader.transform = transform
            return loader
        num_workers = self.num_workers
        if num_workers is None:
            num_workers = 0 if isinstance(dataset, ArrayDataset) else default_num_workers(local_processes(self.trainer))
        lazy = make_loader(
            dataset,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            labels=self.labels != "ignore",
            **shared,
        )
        lazy.transform = transform
        return lazy

    def _transform(self, stage: Stage, device: torch.device) -> Transform | None:
        """The transforms with new random values in every epoch of training."""
        parts: list[Transform] = []
        if stage == "train" and any(self.augmentation.values()) and not self._overfits():
            parts.append(Augmentation(**self.augmentation, device=device if device.type == "cuda" else None))
        if self._is_resampled(stage):
            parts.append(binarise_rules.resample_batches)
        return parts[0] if len(parts) == 1 else Transforms(*parts) if parts else None

    def _stored_split(self, stage: Stage, device: torch.device, reads_once: bool = False) -> Dataset[Any]:
        """The samples of a split, in memory or on the GPU depending on `memory`."""
        dataset = self._split(stage)
        if self.memory == "off" or (self.memory == "auto" and reads_once and not isinstance(dataset, ArrayDataset)):
            return dataset
        if not isinstance(dataset, ArrayDataset):
            if self._exceeds_memory(stage, torch.device("cpu"), local_processes(self.trainer)):
                return dataset
            dataset = self._splits[stage] = load_into_memory(dataset, str(self.name))
        if device.type == "cuda":
            if stage not in self._on_gpu and not self._exceeds_memory(stage, device, 1):
                self._on_gpu[stage] = to_device(dataset, device, str(self.name))
            return self._on_gpu.get(stage, dataset)
        return dataset

    def _exceeds_memory(self, stage: Stage, device: torch.device, processes: int) -> bool:
        """Whether auto decides not to load a split into that memory; the log line at the start says why."""
        self._memory_reason[stage] = (
            memory_excess(dataset_bytes(self._splits[stage]), device, processes) if self.memory == "auto" else ""
        )
        return bool(self._memory_reason[stage])

    def teardown(self, stage: str) -> None:
        self._on_gpu.clear()
        self._restore_limit()

    def on_exception(self, exception: BaseException) -> None:
        # Lightning does not call teardown then
        self._restore_limit()

    def _restore_limit(self) -> None:
        """Restore the trainer's limit: it may fit other data next, with a validation split."""
        if self._saved_val_limit is not None and self.trainer is not None:
            self.trainer.limit_val_batches, self._saved_val_limit = self._saved_val_limit, None


def stored_settings() -> dict[str, inspect.Parameter]:
    """The arguments of the DataModule that files may contain, in their order."""
    parameters = inspect.signature(DataModule).parameters
    return {name: parameter for name, parameter in parameters.items() if name not in PERMISSIONS}


def _storage(loader: LazyLoader | ResidentLoader) -> str:
    """Where a loader's samples are, as a short text."""
    if isinstance(loader, ResidentLoader):
        place = "in memory" if loader.x.device.type == "cpu" else f"on {loader.x.device}"
        dtype = str(loader.x.dtype).removeprefix("torch.")
        return f"samples held {place} ({loader.x.nbytes / 2**20:,.1f} MiB, {dtype})"
    readers = f"{loader.num_workers} persistent worker(s)" if loader.num_workers else "the training process"
    return f"samples read by {readers}{', into pinned memory' if loader.pin_memory else ''}"


def _length(dataset: Dataset[Any]) -> int:
    return len(cast(Any, dataset))
