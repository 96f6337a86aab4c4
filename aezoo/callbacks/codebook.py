"""Usage of the codes of a codebook, their positions in samples, and their embedding.

Shapes: B batch, Q indices per position, K codes of a codebook, C channels of a code.
"""

import re
from collections.abc import Iterator, Sized
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from aezoo.callbacks import media
from aezoo.callbacks.base import Picture, check_count, is_dry_run, preserved_state, unpack
from aezoo.callbacks.latents import write_embedding
from aezoo.errors import AezooError
from aezoo.metrics import CodebookUsage
from aezoo.quantisers.base import Quantiser
from aezoo.training import distributed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from aezoo.autoencoder import Autoencoder
    from aezoo.bases.quantised import DiscreteAutoencoder

# maximum numbers in one picture; all samples are encoded at once
_CODEBOOKS, _LEVELS, _SAMPLES = 4, 8, 128
# TensorBoard draws 30 bars of a histogram
_BUCKETS = 240
_IMAGE, _STRIP = 112, (16, 480)

Codebooks = dict[str, tuple[Tensor, tuple[int, ...]]]


class Codebook(Picture):
    """Draws the codebooks of models with discrete codes, such as vq_vae; has no effect on other models.

    Computed over the whole validation set and all ranks, without a second pass:

    - pictures/codebook_usage.png: one cell per code, row by row, from black (never chosen) to bright (often chosen). In
      codebooks of more than 65,536 codes, a cell is a range of codes; codebooks of more than 2^24 codes are not
      counted.
    - pictures/codebook_frequencies.png and the histogram `codebook use`: codes sorted by how often they were chosen,
      constant if all are used equally.

    Drawn for the same validation samples in each epoch:

    - pictures/codebook_indices.png: the sample, its indices with one colour per code, and the reconstruction.

    The codes are also written as in `Projector`, with their index and how often they were chosen.

    Each codebook has its own pictures, named after it (codebook_usage_top), with one panel for each of the Q indices
    per position; at most 4 codebooks and 8 indices per position are shown. The model itself logs val/usage and
    val/perplexity.

    Args:
        n: number of samples.
        every_n_epochs: epochs between two pictures; 0 disables them and the projector. None: every 5 epochs, or less
            often if all pictures would take more than 3 % of the fit's time.
        n_projected: maximum number of codes of a projected codebook; 0 projects none.
    """

    _metrics: dict[str, CodebookUsage]
    # counts of each codebook, for each of its Q indices, (K,)
    _counts: dict[str, list[Tensor]]

    def __init__(self, n: int = 8, every_n_epochs: int | None = None, n_projected: int = 10_000) -> None:
        super().__init__(every_n_epochs, n_inputs=check_count(self, "n", n, maximum=_SAMPLES))
        self.n, self.n_projected = n, check_count(self, "n_projected", n_projected, 0, 1_000_000)

    def draw(self, model: "Autoencoder", x: Tensor, y: Tensor | None) -> "dict[str, Figure]":
        figures: dict[str, Figure] = {}
        if self._counted_at == self._trainer.global_step:
            for name, counts in self._counts.items():
                figures |= self._plot_usage(name, counts)
        codebooks = self._read(model, x)
        figures["codebook_indices"] = self._indices(model, x, codebooks)
        self._project(model, codebooks)
        return figures

    def is_due(self, epoch: int, last: bool) -> bool:
        # max_steps may end training before max_epochs, and codes are only counted in validation
        return super().is_due(epoch, last or 0 <= self._trainer.max_steps <= self._trainer.global_step)

    # ---- counts ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        wanted = stage == "fit" and self.every_n_epochs > 0 and not is_dry_run(trainer)
        discrete = bool(getattr(pl_module, "discrete_code", False))
        self._counts_here = discrete and wanted
        self._active = self._active and self._counts_here
        distributed.release_collectives_at_exit(trainer)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._metrics, self._failed = {}, False
        if not self._counts_here or trainer.sanity_checking:
            return
        epoch = trainer.current_epoch + 1
        if self.is_due(epoch, epoch == trainer.max_epochs):
            with self._error_as_warning():
                # each rank needs the codebooks, even without a batch
                blank = torch.zeros(1, *cast("Autoencoder", pl_module).input_shape, device=pl_module.device)
                for name, (_, sizes) in [*self._read(pl_module, blank).items()][:_CODEBOOKS]:
                    self._count(name, sizes, pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if self._metrics and dataloader_idx == 0:
            with self._error_as_warning():
                with getattr(pl_module, "computed_once", nullcontext)():
                    codebooks = self._read(pl_module, unpack(batch)[0])
                for name, metric in self._metrics.items():
                    metric.update(codebooks[name][0])

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._metrics:
            counts = [metric.counts for metric in self._metrics.values()]
            failed = counts[0].new_tensor([self._failed])
            # one collective, in which a rank whose counts have failed must also take part
            total = trainer.strategy.reduce(torch.cat([*counts, failed]), reduce_op="sum").cpu()
            if not total[-1]:
                parts = total[:-1].split([len(part) for part in counts])
                self._counted_at, self._counted_in = trainer.global_step, trainer.current_epoch + 1
                self._counts = {
                    name: [*part.split(metric.codebook_sizes)]
                    for (name, metric), part in zip(self._metrics.items(), parts, strict=True)
                }
            self._metrics = {}
        super().on_validation_epoch_end(trainer, pl_module)

    def _reset(self) -> None:
        super()._reset()
        self._counts_here, self._failed, self._noted = False, False, False
        self._counted_at = self._counted_in = -1
        self._metrics, self._counts = {}, {}

    def _read(self, pl_module: pl.LightningModule, x: Tensor) -> Codebooks:
        """Return the indices of samples by codebook."""
        model, plugin = cast("DiscreteAutoencoder", pl_module), self._trainer.precision_plugin
        with preserved_state(pl_module), plugin.forward_context():
            return model.codebooks(model.encode_indices(plugin.convert_input(x.to(pl_module.device))))

    def _count(self, name: str, sizes: tuple[int, ...], device: torch.device) -> None:
        try:
            self._metrics[name] = CodebookUsage(sizes).to(device)
        except AezooError as error:
            if not self._noted:
                self._noted = True
                rank_zero_info(f"Codebook counts no codes: {error}")

    @contextmanager
    def _error_as_warning(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # must not end training
            self._failed = True
            if not self._warned:
                self._warned = True
                rank_zero_warn(f"Codebook could not count codes: {type(error).__name__}: {error}")

    # ---- pictures ----------------------------------------------------------------------------------------------------

    def _plot_usage(self, name: str, counts: list[Tensor]) -> "dict[str, Figure]":
        from aezoo.callbacks import plotting

        postfix, counts = _suffix(name), counts[:_LEVELS]
        for level, counts_K in enumerate(counts):
            tag = f"pictures/codebook use{postfix}{_level_suffix(level, counts)}"
            log_rank_histogram(self._trainer, tag, counts_K)
        labels = [f"{_usage_text(counts_K)} of {len(counts_K):,} codes used" for counts_K in counts]
        if len(counts) > 1:
            labels = [f"{level}: {label}" for level, label in enumerate(labels)]
        title = f"{name}, {self.caption}" if name else self.caption
        return {
            f"codebook_usage{postfix}": plotting.count_figure(counts, labels, "times chosen", title),
            f"codebook_frequencies{postfix}": plotting.rank_figure(
                dict(zip(labels, counts, strict=True)),
                ("codes, sorted by frequency", "relative frequency"),
                f"{title}; dashed: uniform",
            ),
        }

    def _indices(self, model: "Autoencoder", x: Tensor, codebooks: Codebooks) -> "Figure":
        from aezoo.callbacks import plotting

        limits = plotting.value_range(x)
        levels = {
            f"indices {name}{_level_suffix(level, indices.unbind(1))}".strip().replace(" _", " "): index.cpu()
            for name, (indices, _) in codebooks.items()
            for level, index in enumerate(indices.unbind(1))
        }
        levels = dict([*levels.items()][:_LEVELS])
        seen = [plotting.tiles(_as_image(part), limits) for part in (x, self.apply(model, x))]
        size = _tile_size(seen[0].shape[1:3], [*levels.values()], plotting.is_image(model.input_shape))
        maps = [plotting.index_tiles(index, size) for index in levels.values()]
        rows = [plotting.enlarged(seen[0], size), *maps, plotting.enlarged(seen[1], size)]
        labels = ["original", *levels, "output"]
        if not plotting.is_image(model.input_shape):
            # strips of one sample are placed below each other
            rows, labels = [row[i : i + 1] for i in range(len(x)) for row in rows], labels * len(x)
        return plotting.mosaic_figure(rows, labels, title=self.caption, gap=4)

    # ---- projector ---------------------------------------------------------------------------------------------------

    def _project(self, model: "Autoencoder", codebooks: Codebooks) -> None:
        for name, (_, sizes) in [*codebooks.items()][:_CODEBOOKS]:
            quantiser, counts = find_quantiser(model, name, sizes), self._counts.get(name, [])
            for level, size in enumerate(sizes[:_LEVELS]):
                if quantiser is None or size > self.n_projected:
                    continue
                columns = {"index": torch.arange(size)}
                if counts:
                    columns[f"chosen in epoch {self._counted_in}"] = counts[level]
                stem = f"codebook{_suffix(name)}{_level_suffix(level, sizes)}"
                title = f"{stem.replace('_', ' ')} at step {self._trainer.global_step}"
                self._project_level(stem, title, level_codes(quantiser, level), columns)

    def _project_level(self, stem: str, title: str, code_KC: Tensor, columns: dict[str, Tensor]) -> None:
        media.log_embedding(
            self._trainer, stem, code_KC, columns, None,
            lambda folder: write_embedding(folder, title, code_KC, columns, None, f"{stem}_"),
        )  # fmt: skip


def find_quantiser(model: "Autoencoder", name: str, sizes: tuple[int, ...]) -> Quantiser | None:
    """Return the quantiser of a codebook: the only one, or the one whose attribute has the codebook's name."""
    found: dict[str, Quantiser] = {}
    for path, module in model.named_modules():
        within = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, Quantiser) and not within:
            found[path] = module
    if name:
        found = {path: quantiser for path, quantiser in found.items() if name in re.split("[._]", path)}
    fitting = [quantiser for quantiser in found.values() if len(found) == 1 and quantiser.codebook_sizes == sizes]
    return fitting[0] if fitting else None


def level_codes(quantiser: Quantiser, level: int) -> Tensor:
    """Return the codes of one index, (K, C): its term in the sum of levels, or the channels it determines."""
    sizes = quantiser.codebook_sizes
    # an index of -1, a dropped level, adds nothing; otherwise the other indices are constant
    adds = hasattr(quantiser, "dropout")
    index_KQ = torch.full((sizes[level], len(sizes)), -1 if adds else 0, device=next(quantiser.buffers()).device)
    index_KQ[:, level] = torch.arange(sizes[level])
    code_KC = quantiser.codes(index_KQ).float().cpu()
    return code_KC if adds or len(sizes) == 1 else code_KC[:, (code_KC != code_KC[:1]).any(0)]


def log_rank_histogram(trainer: pl.Trainer, tag: str, counts_K: Tensor) -> None:
    """Log a histogram of the codes in order of their frequency, starting with the most frequent one at 0."""
    sorted_K = counts_K.sort(descending=True).values.double()
    total, step = float(sorted_K.sum()), trainer.global_step
    if total:
        size = len(sorted_K)
        edge_N = torch.linspace(0, size, min(size, _BUCKETS) + 1).round().long()
        below_N = torch.cat([sorted_K.new_zeros(1), sorted_K.cumsum(0)])[edge_N]
        rank_K = torch.arange(size).double() + 0.5
        moments = [float((sorted_K * rank_K**power).sum()) for power in (1, 2)]
        bars = below_N.diff()
        media.log_histogram(
            trainer,
            tag,
            lambda writer: writer.add_histogram_raw(
                tag, 0, int((sorted_K > 0).sum()), total, *moments, edge_N[1:].tolist(), bars.tolist(), step
            ),
            lambda: (bars.numpy(), edge_N.numpy()),
        )


# ---- layout ---------------------------------------------------------------------------------------------------------


def _suffix(name: str) -> str:
    return f"_{name}" if name else ""


def _level_suffix(level: int, levels: Sized) -> str:
    return f"_{level}" if len(levels) > 1 else ""


def _usage_text(counts_K: Tensor) -> str:
    share = 100 * float((counts_K > 0).double().mean())
    return f"{share:.3g} %"


def _as_image(x: Tensor) -> Tensor:
    """Convert vectors (B, D) and sequences (B, C, L) of few channels to one-channel images, values in rows."""
    from aezoo.callbacks import plotting

    return x if plotting.is_image(x.shape[1:]) else x.reshape(len(x), 1, -1, x.shape[-1])


def _tile_size(shape: tuple[int, ...], maps: list[Tensor], is_image: bool) -> tuple[int, int]:
    """Return height and width of a tile, whole multiples of the sample's, with at least one pixel per index."""
    from aezoo.callbacks import plotting

    grids = [plotting.index_grid(index).shape[1:] for index in maps]
    needed = [max(-(-grid[i] // shape[i]) for grid in grids) for i in (0, 1)]
    if is_image:
        factor = max(1, _IMAGE // max(shape), *needed)
        return shape[0] * factor, shape[1] * factor
    factors = [max(1, wanted // side, least) for wanted, side, least in zip(_STRIP, shape, needed, strict=True)]
    return shape[0] * factors[0], shape[1] * factors[1]
