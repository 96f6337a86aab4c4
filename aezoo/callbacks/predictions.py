"""Writing of predictions to a file."""

import contextlib
import secrets
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from torch import Tensor
from torch.utils.data import SequentialSampler

import aezoo
from aezoo.callbacks.base import is_dry_run, run_folder
from aezoo.data import DataModule
from aezoo.data.classes import paths_of
from aezoo.data.loaders import EpochSampler
from aezoo.errors import AezooError
from aezoo.io import atomic_files, partial
from aezoo.training.arguments import Checked
from aezoo.training.seeding import forked_rng, mix, seed_all

_CURE = "free disk space, or choose a writable folder with --predictions.folder"
# seed of random numbers that a model draws in a prediction
_SEED = 21
_PARTS = ".predictions"
# number of indices and file names of samples that are written at once
_CHUNK = 2**16


class PredictionWriter(Checked, pl.Callback):
    """Writes predictions.npz: arrays of codes, reconstructions, scores and, if the data have them, labels and files.

    Samples are in the order of the data; `index` is the index of each. Each batch is written to the disk as soon as it
    has been computed, so memory holds only one. Several ranks process whole batches in turn, and rank zero merges their
    arrays into one file, for which the folder needs twice the space. A prediction that was killed is continued if the
    same command is run again on the same data.

    If the order of a loader is not known, there is no `index`, and each rank writes its own file, predictions-rank0.npz
    and so on.

    Args:
        folder: output folder; the run's folder if empty.
    """

    def __init__(self, folder: str = "") -> None:
        super().__init__()
        self.folder = folder
        self.path: Path | None = None
        self._parts: partial.Partial | None = None
        self._ends = contextlib.ExitStack()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "predict":
            folder = Path(self.folder) if self.folder else run_folder(trainer)
            self.path = folder / "predictions.npz"

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.path is not None
        if is_dry_run(trainer):
            return
        self._rows = _Rows(trainer)
        rank, world, folder = trainer.global_rank, trainer.world_size, self.path.parent / _PARTS
        if world > 1 and not self._rows.are_known:
            self.path, folder = self.path.with_stem(f"predictions-rank{rank}"), folder.with_name(f"{_PARTS}-rank{rank}")
            rank, world = 0, 1
        key = self._key(trainer, pl_module)
        if not rank:
            self._parts = partial.Partial(folder, key, _CURE)
        if world > 1:
            trainer.strategy.barrier("predictions started")
        if rank:
            self._parts = partial.Partial(folder, key, _CURE, rank)
        assert self._parts is not None
        done = self._parts.progress()
        self._rows.skip(int(done.get("rows", 0)))
        self._names = dict.fromkeys(done["names"].tolist() if done else ())
        self._ends.enter_context(forked_rng(pl_module.device))

    def _key(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        """Return what the prediction depends on; for a loader with unknown data, a value that is never repeated."""
        identity = getattr(trainer.datamodule, "identity", "")  # type: ignore[attr-defined]
        if not self._rows.resumes or not identity:
            return secrets.token_hex(8)
        settings = {
            key: value
            for key, value in dict(trainer.datamodule.hparams).items()  # type: ignore[attr-defined]
            if key not in ("num_workers", "memory")
        }
        run = trainer.world_size, str(pl_module.device.type), str(trainer.precision), self._rows.n, aezoo.__version__
        return partial.digest(identity, settings, type(pl_module).__qualname__, run, pl_module)

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._parts is not None and self._rows.are_known:
            # random numbers must not depend on earlier batches, which a continued run skips
            seed_all(mix(_SEED, self._rows.next_row()), pl_module.device, others=False)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._parts is None:
            return
        tensors = outputs if isinstance(outputs, dict) else {"prediction": outputs}
        tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
        if not tensors:
            return
        rows = self._rows.take(len(next(iter(tensors.values()))))
        for name, value in tensors.items():
            # numpy has no bfloat16; copied at once, so that no batch stays on the accelerator
            array = (value.float() if value.is_floating_point() else value).cpu().numpy()
            if len(array) != len(rows):
                raise AezooError(f"predictions: {name} has {len(array)} values for {len(rows)} samples: return one per "
                                 "sample")  # fmt: skip
            self._parts.write(name, rows, array, self._rows.n)
            self._names[name] = None
        self._parts.save(self._progress)

    def _progress(self) -> dict[str, Any]:
        return {"rows": self._rows.done, "names": [*self._names]}

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._parts is None or self.path is None:
            return
        parts, merges = self._parts, trainer.world_size > 1 and self._rows.are_known
        parts.save(self._progress, now=True)
        if merges:
            trainer.strategy.barrier("predictions computed")
        if not (merges and trainer.global_rank):
            self._merge(trainer, parts)
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        self._ends.close()
        if self._parts is not None:
            self._parts.close()
            self._parts = None

    def _merge(self, trainer: pl.Trainer, parts: partial.Partial) -> None:
        """Merge the arrays into one file, with only a part of them in memory at a time."""
        assert self.path is not None
        n = self._rows.n if self._rows.are_known else self._rows.done
        files = {name: parts.opened(name) for name in self._names}
        members = {name: ((n, *file.shape), file.dtype, file.chunks()) for name, file in files.items()}
        if not members:
            parts.remove()
            return
        shapes = ", ".join(f"{name} {shape}" for name, (shape, *_) in members.items())
        if self._rows.are_known:
            places = (np.arange(i, min(i + _CHUNK, n)).tobytes() for i in range(0, n, _CHUNK))
            members["index"] = (n,), np.dtype(np.int64), places
            if (paths := self._rows.paths) is not None:
                text = np.dtype(("U", max(map(len, paths))))
                names = (np.array(paths[i : i + _CHUNK], text).tobytes() for i in range(0, n, _CHUNK))
                members["file"] = (n,), text, names
        existing = self.path.exists()
        atomic_files.write(self.path, lambda file: partial.write_npz(file, members), cure=_CURE)
        parts.remove()
        print(f"Predictions: {self.path} ({shapes})", flush=True)
        scaling = getattr(getattr(getattr(trainer, "datamodule", None), "source", None), "scaling", None)
        if "reconstruction" in members and scaling is not None and scaling.state():
            print("reconstructions have the scale of the model's input (--data.scale): `aezoo reconstruct` writes the "
                  "units of the data", flush=True)  # fmt: skip
        if existing:
            print(f"aezoo: the earlier {self.path} is replaced; --predictions.folder DIR keeps both", file=sys.stderr)


class _Rows:
    """The indices of the samples in the batches of this rank.

    Attributes:
        are_known: whether the index of each sample in the data, from 0 to n - 1, is known.
        n: number of samples of all ranks; 0 if unknown.
        done: number of samples that this rank has processed.
        resumes: whether the loader can skip the first samples.
        paths: the file of each sample, if samples are separate files.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        loaders, (limit, *others) = trainer.predict_dataloaders, trainer.num_predict_batches
        loader: Any = loaders[0] if isinstance(loaders, list | tuple) and len(loaders) == 1 else loaders
        # Lightning wraps the sampler of a loader that it recreates in a batch sampler
        batches: Any = getattr(loader, "batch_sampler", None)
        sampler: Any = None if others else getattr(batches, "sampler", getattr(loader, "sampler", None))
        self._sampler = sampler if isinstance(sampler, EpochSampler) and not sampler.shuffle else None
        in_order = trainer.world_size == 1 and isinstance(sampler, SequentialSampler)
        self.are_known, self.done, self._begun, self.n = self._sampler is not None or in_order, 0, 0, 0
        self.resumes, self.paths = False, None
        if self.are_known:
            n = self.n = sampler.n if self._sampler is not None else len(sampler)
            if limit < len(loader):
                size = loader.batch_size or batches.batch_size
                self.n = int(min(n, limit * size * trainer.world_size))
            self.resumes = self._sampler is not None and self.n == n
            module: Any = trainer.datamodule  # type: ignore[attr-defined]
            dataset: Any = (
                module.dataset("test") if isinstance(module, DataModule) else getattr(loader, "dataset", None)
            )
            paths = paths_of(dataset)
            self.paths = None if paths is None else paths[: self.n]

    def skip(self, n: int) -> None:
        """Make the loader skip the first n samples of this rank."""
        if n and self._sampler is not None:
            self._sampler.skip = (self._sampler.epoch, n)
            self.done = self._begun = n

    def next_row(self) -> int:
        """Return the index of the first sample of the next batch."""
        return int(self._own[0]) if self._sampler is not None else self.done

    def take(self, n: int) -> list[int]:
        """Return the indices of the next n samples."""
        own = self._own[:n].tolist() if self._sampler is not None else [*range(self.done, self.done + n)]
        self.done += n
        return own

    @property
    def _own(self) -> Tensor:
        assert self._sampler is not None
        return self._sampler.current[self.done - self._begun :]
