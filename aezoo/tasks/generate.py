"""generate: new samples from a model's prior or one fitted to its codes, walks between samples, and quality metrics."""

import functools
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.data.columns import Columns
from aezoo.data.source import ArrayDataset
from aezoo.errors import AezooError
from aezoo.tasks import generate_walks, priors, priors_principal
from aezoo.tasks.embed_codes import encode_samples
from aezoo.tasks.generate_walks import GIVE_TRAINING
from aezoo.tasks.passes import current
from aezoo.tasks.priors_base import Prior
from aezoo.tasks.result_store import Row, Store, concatenate, table_text, write_batch
from aezoo.tasks.results import Result, sizes, takes_model
from aezoo.tasks.samples import SampleSet, evaluation_mode, reference_tensor
from aezoo.tasks.samples import progress_bar as progress_bar
from aezoo.training.limits import check_at_least
from aezoo.training.model_names import display_name
from aezoo.training.seeding import mix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]

# codes that a prior is fitted to, and numbers in them: minutes on one core, half a gigabyte
_MAX_CODES, _MAX_VALUES = 50_000, 2**24
# codes drawn at a time; the draws depend on this number
_DRAWN_AT_ONCE = 4096
# number of samples drawn from the model's prior for walks if no others are given
_OWN = 1000
# images and curves in the picture of samples
_MAX_SHOWN, _MAX_PANELS = 256, 16


@dataclass(repr=False)
class Generation(Result):
    """The result of `generate`; samples are a memory-mapped file if a folder was given.

    Attributes:
        samples: (n, *shape) samples, or (walks, steps, *shape) for walks; float32.
        source: where they come from, in words.
        figures: quality metrics, a row for the samples and one for real ones; empty without `quality`.
        features: the feature space of fid, kid, precision and recall.
    """

    samples: Array
    source: str
    figures: list[Row] = field(default_factory=list)
    features: str = ""

    def about(self) -> str:
        return f"{sizes(self.samples.shape)}: {self.samples.shape[0]:,} {self.source}"

    def summary(self) -> str:
        """The metrics and the source of the samples."""
        lines = [f"{self.samples.shape[0]:,} {self.source}"]
        if self.figures:
            lines += [table_text(self.figures), f"fid, kid, precision and recall in the space of {self.features}"]
            lines += [
                "distance: median, to the nearest training sample; closer: how likely a sample is to be closer to one "
                "than a held-out one is (0.5 as close, 1 a copy)"
            ]
        return "\n".join(lines)


@takes_model
def generate(
    model: Autoencoder,
    x: Any = None,
    *,
    n: int = 64,
    prior: str = "auto",
    label: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    fit_on: Any = None,
    n_components: int = 10,
    n_neighbours: int = 5,
    interpolate: bool = False,
    circle: bool = False,
    traverse: bool = False,
    around: Any = None,
    spread: float = 0.5,
    walks: int = 8,
    steps: int = 9,
    quality: int = 0,
    columns: Columns | None = None,
    out: str | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Generation:
    """Generate samples from the model's prior, or from a prior that is fitted to the codes of the training samples.

    Writes samples.npy and samples.png, for a table also samples.csv, in the names and units of its columns. With
    --interpolate, --traverse or --around it writes a walk through code space instead: interpolation, traversal or
    around. With --quality it also writes quality.csv and copies.png.

    Args:
        model: a trained model.
        x: real samples (N, *input_shape), a DataModule (its test split) or `SampleSet`. Walks start from them; with
            fit_on, they are the held-out samples that quality is measured against.
        n: number of samples.
        prior: own (the model's), gaussian, gmm (Gaussian mixture), maf (masked autoregressive flow), knn (between a
            training code and one of its nearest neighbours), two_stage (a second VAE, of the codes), vamp (the mean of
            the posteriors of training samples), riemannian (by a metric that the codes give), sphere (for codes that
            are unit vectors), poincare (for codes in a ball), or auto: the model's if it has one, otherwise gmm.
        label: draw samples of this class, by number, from a model trained with labels, such as conditional_vae.
        temperature: for a prior over indices, pixelcnn or index_transformer: below 1 gives more likely samples, towards
            0 the most likely index each time, above 1 less likely samples.
        top_k: for such a prior: draw each index only from this many of the most likely ones; 0 for all.
        fit_on: training samples that a prior is fitted to and quality is measured against: an array, a DataModule (its
            training split) or `SampleSet`. Without them a prior is fitted to the codes of training samples that
            are stored with pretrained weights, see `aezoo.Autoencoder.data_statistics`.
        n_components: Gaussians in the mixture of gmm; the summary reports how much it increases the log-likelihood of
            held-out codes.
        n_neighbours: neighbours that knn chooses from.
        interpolate: walk from sample to sample, on a straight line between their codes.
        circle: interpolate on a great circle about the origin instead, which suits codes from N(0, I), such as those of
            vae.
        traverse: walk along one dimension of the code after the other, those of largest variance first, over the range
            of the training codes.
        around: samples to vary, given like x (on the command line a file or a folder, like --input): new samples are
            decoded from codes near theirs.
        spread: distance of these codes, as a share of the standard deviation of the training codes.
        walks: number of walks. Without x, a model that has a prior draws samples to walk between.
        steps: samples of each walk.
        quality: number of samples to evaluate by FID, KID, precision, recall and closeness to training samples, at most
            as many as there are in x; use a thousand or more for reliable figures. 0 evaluates none.
        columns: the columns of a table with which the samples are written; by default those of x, of fit_on
            or of the table that the model was trained on.
        out: folder for the results; None keeps them in memory.
        batch_size: samples at a time.
        seed: fixes random draws.
        progress: show a bar on a terminal.

    Raises:
        AezooError: values out of range, no prior and no samples to fit one to, or a folder that cannot be written.
    """
    walking = interpolate or traverse or around is not None
    if label is not None:
        _check_label(model, prior, label, walking)
    if temperature != 1 or top_k != 0:
        _check_draws(model, prior, temperature, top_k, walking)
    _check(
        model, n, prior, interpolate, circle, traverse, around is not None, spread, walks, steps, quality, batch_size
    )
    given = None if x is None else SampleSet.from_data(x).check(model)
    varied = None if around is None else SampleSet.from_data(around).check(model)
    train = None if fit_on is None else SampleSet.from_data(fit_on, "train").check(model)
    known_columns = [part.columns for part in (given, train, varied) if part and part.columns]
    columns = next(iter(known_columns), None) if columns is None else columns
    columns = Columns.of_model(model) if columns is None else columns
    # training samples cannot be the reference
    held_out = None if given is None or (train is not None and given.dataset is train.dataset) else given
    if quality and (train is None or len(train) < 2):
        raise AezooError(f"quality needs two training samples at least to compare with: {GIVE_TRAINING}")
    with Store(out, model.data_units) as store, evaluation_mode(model, seed):
        if interpolate or traverse or varied is not None:
            known = train if train is not None else _own_samples(model, batch_size) if model.has_prior else given
            starts = next((samples for samples in (varied, given, known) if samples is not None), None)
            known = starts if known is None else known
            if known is None or starts is None:
                raise AezooError(
                    "walks start from samples: give x (--input FILE or --data.name SET), or use a model with a prior"
                )
            if interpolate:
                walk = generate_walks.interpolation(model, starts, circle, walks, steps, seed)
            elif traverse:
                walk = generate_walks.traversal(model, starts, known, walks, steps, batch_size, seed)
            else:
                walk = generate_walks.around_sample(model, starts, known, spread, walks, steps, batch_size, seed)
            samples = generate_walks.decode(model, walk, store, batch_size)
            if columns is not None:
                store.table(walk.name, columns.rows(samples))
            draw = functools.partial(generate_walks.picture, walk, samples, columns)
            store.picture(walk.name, draw)
            tabulate = functools.partial(_rows, samples, columns, 2)
            source = f"walks of {steps} steps: {walk.name}"
            return Generation(samples, source, files=store.files, tabulate=tabulate, draw=draw)
        fitted, source = _prior(model, prior, train, held_out, n_components, n_neighbours, batch_size, seed, progress)
        sampling_options: dict[str, Any] = {} if label is None else {"y": label}
        if label is not None:
            source += f", of class {label}"
        if temperature != 1:
            sampling_options["temperature"], source = temperature, f"{source}, at temperature {temperature:g}"
        if top_k:
            sampling_options["top_k"], source = top_k, f"{source}, from the {top_k} likeliest of each index"
        quality_samples = min(quality, len(held_out)) if held_out is not None and len(held_out) > 1 else quality
        samples = store.samples("samples", (n, *model.input_shape))
        n_quality, total = store.scratch((quality_samples, *model.input_shape)), max(n, quality_samples)
        size, passes = batch_size if fitted is None else _DRAWN_AT_ONCE, current.get()
        with progress_bar("generate" if progress else "", total) as advance:
            for start, count in passes.blocks(total, size, seed):
                at = start
                for batch in _draws(
                    model, fitted, count, batch_size, mix(seed, start) if start else seed, sampling_options
                ):
                    for array in (samples, n_quality):
                        write_batch(array, at, batch[: max(0, len(array) - at)])
                    at += len(batch)
                    advance(len(batch))
        passes.finish()
        if columns is not None:
            store.table("samples", columns.rows(samples))
        draw, tabulate = functools.partial(_picture, samples, columns), functools.partial(_rows, samples, columns, 1)
        store.picture("samples", draw)
        found = Generation(samples, f"samples from {source}", files=store.files, tabulate=tabulate, draw=draw)
        if quality_samples and train is not None:
            from aezoo.tasks.fidelity import evaluate_fidelity

            found.figures, found.features = evaluate_fidelity(
                torch.from_numpy(np.array(n_quality)), train, held_out, model.device, store,
                batch_size=batch_size, seed=seed, progress=progress,
            )  # fmt: skip
    return found


def _check(
    model: Autoencoder,
    n: int,
    prior: str,
    interpolate: bool,
    circle: bool,
    traverse: bool,
    around: bool,
    spread: float,
    walks: int,
    steps: int,
    quality: int,
    batch_size: int,
) -> None:
    names = ("auto", "own", *priors.NAMES)
    if prior not in names:
        raise AezooError(f"unknown prior {prior!r}: choose from {', '.join(names)}")
    if prior == "own" and not model.has_prior:
        raise AezooError(
            f"{display_name(type(model))} has no prior of its own: use gmm, maf, gaussian, two_stage or knn"
        )
    if prior == "maf":
        priors_principal.flows()
    if circle and not interpolate:
        raise AezooError("circle is a way to interpolate: give interpolate, too")
    if circle and not model.has_prior:
        raise AezooError(f"circle suits codes from N(0, I), and {display_name(type(model))} has no prior: leave it out")
    if interpolate + traverse + around > 1:
        raise AezooError("interpolate, traverse and around exclude each other: give one at a time")
    if not 0 < spread < math.inf:
        raise AezooError(f"spread must be above 0 and finite, got {spread}")
    if min(n, walks, batch_size) < 1 or steps < 2:
        raise AezooError(
            f"n, walks and batch_size must be at least 1 and steps at least 2, got {n}, {walks}, {batch_size}, {steps}"
        )
    if quality < 0 or quality == 1:
        raise AezooError(f"quality must be 0 or at least 2 samples, got {quality}")
    if quality and (interpolate or traverse or around):
        raise AezooError("quality evaluates samples of a prior: leave out interpolate, traverse and around")


def _check_label(model: Autoencoder, prior: str, label: int, walk: bool) -> None:
    if "y" not in inspect.signature(model.sample).parameters:
        raise AezooError(
            f"{display_name(type(model))} draws no samples of a class: leave label out, or use conditional_vae"
        )
    if prior not in ("auto", "own") or walk:
        raise AezooError(
            "label asks the model's own prior for a class: leave out prior, interpolate, traverse and around"
        )
    classes = int(getattr(model, "num_classes", 0))
    if not 0 <= label < classes:
        raise AezooError(f"label must be from 0 to {classes - 1}, got {label}")


def _check_draws(model: Autoencoder, prior: str, temperature: float, top_k: int, walk: bool) -> None:
    if "temperature" not in inspect.signature(model.sample).parameters:
        raise AezooError(
            f"temperature and top_k are for a prior over indices, and {display_name(type(model))} has none: leave them "
            "out, or use pixelcnn or index_transformer"
        )
    if prior not in ("auto", "own") or walk:
        raise AezooError(
            "temperature and top_k are for the model's own prior: leave out prior, interpolate, traverse and around"
        )
    check_at_least(0, temperature=temperature, top_k=top_k)


def _prior(
    model: Autoencoder,
    name: str,
    train: SampleSet | None,
    held_out: SampleSet | None,
    n_components: int,
    n_neighbours: int,
    batch_size: int,
    seed: int,
    progress: bool,
) -> tuple[Prior | None, str]:
    """The prior that is fitted to training codes, or None for the model's, and its name."""
    hint = ""
    if name == "auto":
        name = "own" if model.has_prior else "gmm"
        if model.discrete_code and not model.has_prior:
            hint = "; a prior over its indices draws better: aezoo fit --model pixelcnn --model.tokenizer RUN"
    if name == "own":
        return None, "the model's own prior"
    stored = None if model.data_statistics is None else model.data_statistics.codes
    max_codes = min(_MAX_CODES, max(1_000, _MAX_VALUES // math.prod(model.code_shape)))
    if train is not None:
        codes = encode_samples(model, train, max_codes, batch_size, seed, progress)[0]
    elif stored is not None:
        codes = stored.cpu().numpy()
    else:
        raise AezooError(f"prior {name} is fitted to the codes of training samples: {GIVE_TRAINING}")
    log_vars = None
    if name == "vamp" and model.normal_prior and train is not None:
        posterior: Any = model.posterior
        log_vars = encode_samples(model, train, max_codes, batch_size, seed, progress, lambda x: posterior(x)[1])[0]
    fitted = priors.fit(
        name,
        codes,
        n_components=n_components,
        n_neighbours=n_neighbours,
        radius=model.code_radius,
        log_vars=log_vars,
        seed=seed,
    )
    source = f"{name}, fitted to {len(codes):,} codes" + ("" if train is not None else " stored with the weights")
    if (
        held_out is not None
        and isinstance(fitted, priors_principal.PrincipalSubspace)
        and name not in ("gaussian", "riemannian")
    ):
        gain = fitted.gain(encode_samples(model, held_out, _MAX_CODES, batch_size, seed, progress)[0])
        warning = f"{gain:.2f} nats more likely" if gain >= 0 else f"{-gain:.2f} nats less likely"
        source += f"; held-out codes are {warning} than under a Gaussian" + (", which fits better" if gain < 0 else "")
    return fitted, source + hint


def _own_samples(model: Autoencoder, batch_size: int) -> SampleSet:
    drawn = concatenate(_draws(model, None, _OWN, batch_size, 0))
    return SampleSet(ArrayDataset(drawn.float()), name="the model's prior")


def _draws(
    model: Autoencoder,
    fitted: Prior | None,
    n: int,
    batch_size: int,
    seed: int,
    sampling_options: dict[str, Any] | None = None,
) -> Iterator[Tensor]:
    """Batches of n samples, from the fitted prior, or the model's if that is None."""
    if fitted is None:
        yield from (
            model.sample(min(batch_size, n - start), **(sampling_options or {})) for start in range(0, n, batch_size)
        )
        return
    rng = np.random.default_rng(seed)
    for start in range(0, n, _DRAWN_AT_ONCE):
        codes = torch.from_numpy(fitted.sample(min(_DRAWN_AT_ONCE, n - start), rng)).unflatten(1, model.code_shape)
        yield from (model.decode(part.to(reference_tensor(model))) for part in codes.split(batch_size))


def _rows(x: Array, columns: Columns | None, leading: int) -> Iterator[Row]:
    flat = x.reshape(*x.shape[:leading], -1)
    return (columns or Columns((), {}, flat.shape[-1])).rows(flat)


def _picture(x: Array, columns: Columns | None) -> "Figure":
    from aezoo.callbacks import plotting

    samples = torch.from_numpy(np.array(x[:_MAX_SHOWN]))
    if not plotting.is_image(samples.shape[1:]):
        return plotting.panel_figure([{"sample": sample} for sample in samples[:_MAX_PANELS]], columns=columns)
    return plotting.mosaic_figure(plotting.square(plotting.tiles(samples, plotting.value_range(samples))))
