"""compress: samples as a file, lossless by the model's likelihood or lossy as codes or indices, and other formats."""

import math
from typing import Any

from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.bases.entropy_coded import EntropyCoded
from aezoo.data.columns import COLUMNS
from aezoo.distributions.likelihoods import Bernoulli
from aezoo.errors import AezooError
from aezoo.io.checkpoint import save_model
from aezoo.registry import name_of
from aezoo.tasks.codec import indices, lossless, lossy, reproducibility, tables
from aezoo.tasks.codec.compression import Compression, CompressionRun
from aezoo.tasks.codec.container import MAX_BLOCK, MAX_FRAME_VALUES, QUALITIES, max_samples_per_frame
from aezoo.tasks.codec.levels import reason, to_levels
from aezoo.tasks.codec.pictures import PictureRun
from aezoo.tasks.result_store import Store
from aezoo.tasks.results import takes_model
from aezoo.tasks.samples import SampleSet, evaluation_mode
from aezoo.tasks.tiling import Sized

MODES = ("auto", "lossless", "lossy")
_QUALITY = 3.0


@takes_model
def compress(
    model: Autoencoder,
    x: Any,
    *,
    mode: str = "auto",
    quality: float | tuple[float, ...] | None = None,
    steps: str = "fitted",
    binarise: bool = False,
    precision: int = 10,
    compare: bool = True,
    tile: int = 0,
    threads: int = 0,
    fit_on: Any = None,
    out: str | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Compression:
    """Compress samples to .aez files, which decompress reads with the same model, and compare with other formats.

    Lossless (models with a posterior, a prior and likelihood bernoulli, discretised_logistic or beta_binomial):
    bits-back coding; writes samples.aez and comparison.csv. Lossy (any model): quantised codes; writes samples.aez, or
    samples-qQUALITY.aez for each of several qualities, and rate_distortion.csv and .png. If the code of a model
    consists of indices, these are coded with its prior, if it has one, otherwise with tables of their frequencies. If
    a model is trained for the size of its file, integers are coded with its learned distributions. Both write one
    file, because the rate of the model is fixed, or one for each quality of a model of several rates. The model,
    which is needed to decode the files, is written to the same folder, and for a table columns.json, the names and
    units of its columns. A convolutional model whose code is a map compresses pictures of any size, also of different
    sizes into one file; each is coded separately, with the same tables and steps for all.

    Args:
        model: a trained model.
        x: samples (N, *input_shape), a DataModule (its test split) or `SampleSet`; a convolutional model whose code is
            a map takes samples of another size, too, and a list of pictures of several sizes.
        mode: lossless, lossy, or auto: lossless if the model and the data allow it.
        quality: lossy: approximate bits of the code's most important dimension, by default 3; one more halves all
            steps. Several, such as [1,2,3,4], give one file each and a curve. Indices are not quantised again; quality
            then only applies to PCA. For a model of several rates it chooses a rate, by default the one that is set in
            the model, initially its highest: see gained_hyperprior.
        steps: lossy: fitted (to the decoder's sensitivity to a change) or deviation (of each dimension of the code).
        binarise: first set values above 0.5 to one and the others to zero, for likelihood bernoulli.
        precision: lossless: each latent variable has 2^precision bins, 1 to 16.
        compare: add other formats, PCA and the mean sample to the table, on at most 20,000 samples; for samples that
            are not of the model's size, only image formats.
        tile: encode and decode samples with sides larger than this in square tiles with this side, with the memory that
            a tile needs; 0 processes all as a whole. The file records it, and decompress does the same.
        threads: threads of torch on the CPU; 0 keeps the current number. A file is decoded with the same number.
        fit_on: samples that lossy steps, tables, PCA and the mean are fitted to; by default those that are compressed.
            Tables of indices, and all of samples that are not of the model's size, are always fitted to those.
        out: folder for the results; None keeps them in memory.
        batch_size: samples that the model processes at a time, here and when the file is decoded; at most 2^24 values.
        seed: seed of initial bits and subsamples.
        progress: show a bar on a terminal.

    Raises:
        AezooError: samples that cannot be coded in this mode, a bad value, or a folder that cannot be written.
    """
    if quality is None:
        quality = model.quality if isinstance(model, EntropyCoded) and model.max_quality else _QUALITY
    qualities = tuple(map(float, quality if isinstance(quality, tuple | list) else (quality,)))
    _check(mode, qualities, steps, precision, batch_size)
    tables.constriction_stream()
    sized = Sized(model, tile)
    samples = SampleSet.from_data(x).check(model, sized)
    pictures = samples.shapes is not None or sized(samples.shape) is not model
    fit = None if fit_on is None else SampleSet.from_data(fit_on, "train").check(model)
    if binarise:
        samples, fit = _binarised(samples, model), None if fit is None else _binarised(fit, model)
    mode = _mode(mode, model, samples)
    block = 1 if pictures else min(batch_size, max_samples_per_frame(model.input_shape))
    with Store(out) as store, reproducibility.deterministic_kernels(threads) as running, evaluation_mode(model, seed):
        fingerprint = reproducibility.fingerprint(model)
        header = {"model": reproducibility.model_name(model), "fingerprint": fingerprint, "n": len(samples),
                  "shape": model.input_shape, "code_shape": tuple(model.code_shape), "block": block,
                  "kind": samples.kind, "threads": running, "seed": seed}  # fmt: skip
        header |= reproducibility.describe_device(model)
        given = model, samples, header, store, block, seed, "compress" if progress else ""
        job = CompressionRun(*given)
        if pictures:
            coded = indices.lossy_mode(model) if mode == "lossy" else mode
            result = PictureRun(*given, sized=sized).code(coded, qualities, steps, precision, compare)
        elif mode == "lossless":
            result = job.code_lossless(precision, compare)
        elif indices.lossy_mode(model) == "learned":
            result = job.code_learned(qualities, compare, fit)
        elif indices.lossy_mode(model) != "lossy":
            result = job.code_indices(qualities, compare, fit)
        else:
            result = job.code_lossy(qualities, steps, compare, fit)
        store_model(model, fingerprint, store)
        if samples.columns is not None:
            store.file(COLUMNS, samples.columns.to_bytes())
    return result


def store_model(model: Autoencoder, fingerprint: str, store: Store) -> None:
    """Save the model next to its files, which only it can decode: further training of the run changes its weights."""
    # a class that is not registered cannot be saved
    if store.folder is not None and name_of(type(model)) is not None:
        store.files.append(save_model(model, store.folder / reproducibility.model_folder(fingerprint)))


def _mode(mode: str, model: Autoencoder, samples: SampleSet) -> str:
    if mode == "lossy":
        return mode
    try:
        chain = lossless.latent_chain(model)
        most = max(1, min(len(samples), 1024, MAX_FRAME_VALUES // math.prod(samples.shape)))
        if to_levels(samples.rows(range(most)), chain.levels) is None:
            raise AezooError(reason(chain.levels))
    except AezooError:
        if mode == "lossless":
            raise
        return "lossy"
    return "lossless"


class _BinarySamples(SampleSet):
    """Samples of which values above 0.5 count as one."""

    def _as_float(self, x: Tensor) -> Tensor:
        return (super()._as_float(x) > 0.5).float()


def _binarised(samples: SampleSet, model: Autoencoder) -> SampleSet:
    if not isinstance(model.likelihood, Bernoulli):
        raise AezooError("binarise is for models with likelihood bernoulli: leave it out")
    kept = samples.class_names, samples.name, samples.num_workers, samples.columns
    return _BinarySamples(samples.dataset, samples.levels, samples.scaling, *kept)


def _check(mode: str, qualities: tuple[float, ...], steps: str, precision: int, batch_size: int) -> None:
    if mode not in MODES:
        raise AezooError(f"mode is {mode!r}: choose from {', '.join(MODES)}")
    if steps not in lossy.STEPS:
        raise AezooError(f"steps is {steps!r}: choose from {', '.join(lossy.STEPS)}")
    low, high = QUALITIES
    if not qualities or not all(low <= q <= high for q in qualities) or len(set(qualities)) < len(qualities):
        raise AezooError(f"quality is {qualities}: give distinct numbers from {low:g} to {high:g}, as in [1,2,3,4]")
    if not 1 <= precision <= 16:
        raise AezooError(f"precision is {precision}: give a number of bits from 1 to 16")
    if not 1 <= batch_size <= MAX_BLOCK:
        raise AezooError(f"batch_size is {batch_size}: give a number from 1 to {MAX_BLOCK}")
