"""The sections of the report: the CSVs under each heading, and the explanation of their figures."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from . import report_columns as of
from . import report_detector_papers, report_image_anomalies, report_kodak, report_scaling
from .common import number
from .report_columns import Column, Row


class Section(NamedTuple):
    """The CSVs of one kind.

    Attributes:
        prefix: prefix of their names.
        title: heading.
        text: explanation of the figures.
        columns: columns of the tables; if empty, all columns of the CSV.
        is_shown: whether a row is shown.
        after: text below a table, from all rows of its CSV.
    """

    prefix: str
    title: str
    text: str
    columns: tuple[Column, ...]
    is_shown: Callable[[Row], bool] = lambda row: True
    after: Callable[[Sequence[Row]], str] = lambda rows: ""


def _is_notable_layer(row: Row) -> bool:
    return row.get("chosen") != "torch" or (number(row, "lost") or 1) > 1.1


def is_of_fixed_budget(row: Row) -> bool:
    """Whether a row of `quality` was trained for a fixed budget; rows trained to convergence are on other pages."""
    return not row.get("kind")


SECTIONS = (
    Section(
        "peers-quality-",
        "Bounds compared with pythae",
        "Both parties train the same networks from the same weights, with the same batches and budget. The same "
        "estimator evaluates the trained weights of both. Tighter by: the zoo's log p(x) minus pythae's for the same "
        "seed.",
        of.BOUNDS,
    ),
    Section(
        "disentangle-",
        "Disentanglement",
        "Codes of `shapes` compared with its factors; median over seeds (lowest to highest). Higher is better, except "
        "for mse. `aezoo.metrics` explains MIG to IRS. UDR compares a model's seeds with each other and does not use "
        "the factors.",
        of.DISENTANGLE,
    ),
    Section(
        "dictionaries-",
        "Known dictionaries",
        "Samples are sparse sums of known atoms (`synthetic_dictionary`). Test split, median over seeds (lowest to "
        "highest). MCC: mean absolute cosine similarity between atoms and the latents matched with them. Uniqueness: "
        "the number of atoms that are the nearest atom of some latent, divided by the number of latents. L0: the "
        "number of entries of a code that are not 0. FVU: fraction of variance unexplained; 0 is best. Dead share: "
        "the share of latents that are never active. For cosine, shrinkage and reconstruction bias, 1 is best "
        "(`aezoo.metrics`). Atoms, dimensions, active, correlation and noise describe the sums.",
        of.DICTIONARIES,
    ),
    Section(
        "probe-",
        "Classification of codes",
        "Codes are learned without labels; simple classifiers then predict the class from them. The figures are the "
        "shares of test samples classified correctly; median over seeds (lowest to highest). Pooled: averaged over "
        "the places of a map or over the tokens.",
        of.PROBE,
    ),
    Section(
        "bits-",
        "Errors at equal bits",
        "Quantised models with the same networks, grid and bits per sample. Test split, median over seeds (lowest to "
        "highest). Usage: the share of a codebook's entries that are chosen at least once. Perplexity: the number of "
        "equally likely entries that would be as hard to guess. Bits used: the bits that an ideal entropy code needs, "
        "given how often each entry is chosen.",
        of.BITS,
    ),
    Section(
        "kodak-",
        "Photographs",
        "The Kodak photographs as files: bits of all files divided by all pixels, and errors of the decoded pictures, "
        "as means over the photographs. Models are trained on five other photographs (`sample_photos`), by default for "
        "at most 600 s of one core; `capped` ones were ended by that limit and had not converged. BD-rate: bits "
        "relative to a reference at equal quality, averaged over the qualities that both curves reach; below 0 is "
        "fewer.",
        report_kodak.COLUMNS,
        after=report_kodak.bd_table,
    ),
    Section(
        "image-anomalies-",
        "Image anomalies",
        "Detectors that were fitted to normal samples only; medians over seeds. CV_by: one vector for each picture of "
        "a class of MVTec AD, from a network trained on ImageNet; the split of the good pictures is not that of MVTec "
        "AD. gaussian, nearest and fre are padim, patchcore and fre at a single place; default and the models are "
        "`AutoencoderDetector`s. Other data: models trained on one class with their defaults, until the validation "
        "loss stopped improving or the limit of one core's seconds ended them (capped), and tested on all classes; "
        "those on frozen features have random weights there. pca, knn and isolation_forest are baselines on pixels.",
        report_image_anomalies.COLUMNS,
        after=report_image_anomalies.tables,
    ),
    Section(
        "detector-papers-",
        "Detectors in the settings of their papers",
        "Mean over seeds (lowest to highest) of the area under the ROC curve on held-out samples, beside the published "
        "figure. The docstring of `benchmarks.detector_papers` has each setting and what differs from the paper. "
        "AE-1SVM's authors publish the AUROC of two-valued predictions, which also depends on the threshold; their own "
        "log of ForestCover has 0.44, 0.38, 0.46, 0.39 and 0.95 after epochs 1 to 5, so its figure there is that of "
        "one epoch. Deep SVDD has the network and settings of its authors' PyTorch code; the published figures are of "
        "their earlier code, which also starts the first layer's filters as atoms of a dictionary. Papers whose sets "
        "are not at hand have no row: DAGMM (KDD Cup 99, Thyroid, Arrhythmia), ALAD (KDD Cup 99, Arrhythmia, SVHN, "
        "CIFAR-10), and GANomaly, whose figures for MNIST are only drawn.",
        report_detector_papers.COLUMNS,
        after=report_detector_papers.tables,
    ),
    Section(
        "quantisers-",
        "Quantisers compared with vector-quantize-pytorch",
        "Both sides quantise the same maps with the same sets of codes, in training mode and in turns. A ratio above 1 "
        "means that the zoo is faster; median over rounds (lowest to highest). Places: the points of the maps; each "
        "gets a code. Memory: the peak memory of a step beyond what was allocated before it. Same codes: the share of "
        "places at which both sides choose the same code.",
        of.QUANTISERS,
    ),
    Section(
        "gather-",
        "Decoding of sparse codes",
        "Two ways to decode a sparse code: multiply by the whole dictionary, or gather only its active rows. Times "
        "are for forward and backward on one thread. A sample of `x_dim` numbers has `k` of `latents` active; `ratio` "
        "is latents / k and `speedup` is dense_ms / gather_ms.",
        (),
    ),
    Section(
        "convolutions-",
        "Convolutions",
        "Layers of kernel 3, forward and backward, computed in each way that a CPU offers: by torch (`torch_ms`), by "
        "matrix products (`products_ms`), and by torch with the derivatives computed separately "
        "(`separate_gradients_ms`; older files have `bias_apart_ms`, for the bias only). Transposed layers can also "
        "run as a convolution on the smaller grid (`sub_pixels_ms`) or as overlapping products (`overlap_add_ms`). "
        "`side` is the side of the smaller grid, `channels` is the channel count of the larger grid, and `chosen` is "
        "the way that a layer picks by itself. `speedup` is torch's time divided by the time of the chosen way; "
        "`lost` is the time of the chosen way divided by the time of the fastest way. The CSVs contain all layers. "
        "The tables omit layers for which torch's way was chosen and no other way is a tenth faster.",
        (),
        _is_notable_layer,
    ),
    Section(
        "deviations-",
        "Deviations from authors' code",
        "Small trainings of models as they are (`aezoo`) and with what their authors' code does otherwise; figures of "
        "held-out samples, losses in nats. `benchmarks/deviations.py` has the formulas. The figures show how large an "
        "effect is, not which formula is better.",
        (),
    ),
    Section(
        "published-",
        "Published figures",
        "Recipes of published figures, on all of MNIST. `reached` is `metric` on the test split (or in the last epoch "
        "of training) after `epochs` of `max_epochs`. Losses and likelihoods are in nats. `data` says how grey images "
        "are turned into zeros and ones; `drawn once` replaces Larochelle's files.",
        (),
    ),
    Section(
        "peers-",
        "Comparison with other libraries",
        "All parties train the same network on the same data with the same losses. A party's ratio is its speed "
        "divided by that of a compiled, hand-written PyTorch loop in the same rounds. Samples/s: during training, "
        "without the first epoch. Wall: includes what happens between epochs, such as validation and pictures. First "
        "step: measured from the start of the process, with the compilers' caches as they were. Distance of loss "
        "curves: the largest distance from the loop's curve, relative to it. A party agrees if this distance is at "
        "most the allowed one: 1 %; 2 % for another precision; 3 % for `conv28`, where each party draws its own noise "
        "for the codes, and for Keras, which shuffles the data itself.",
        of.PEERS,
    ),
    Section(
        "speed-train-",
        "Training",
        "A Trainer's fit with progress bar, logger and checkpoints; median over the epochs after the first (lowest to "
        "highest). Peak: the fastest product of square matrices in the same process and precision. Of matmul peak: "
        "the share of a step that all of its FLOPs would take at that peak. GEMMs at peak: the same for its matrix "
        "products only. Products alone: the share of a step that its products and convolutions take when they run by "
        "themselves. Interface: progress bar, logger, checkpoints and fault guard; rows marked 'off' run without "
        "them. The fault guard checks for faults. The shares of the interface and of the guard say what part of a "
        "step they add; a negative share is noise. Compile: how much longer the first step takes than the others; the "
        "next column says what the compiler's cache held (unknown if the cell is empty). Cold start: from the start "
        "of the process to the end of the first step. Scaling efficiency: the rate divided by the combined rate of as "
        "many devices that each work independently.",
        of.TRAIN,
    ),
    Section(
        "speed-infer-",
        "Inference",
        "Inference under inference_mode, compared with the bare networks; the Trainer's predict is compared with a "
        "loop that does the same. Encode / network and reconstruct / network: the speed of the model's methods "
        "divided by the speed of its bare modules. Ms/batch, the share of the peak and the FLOPs describe a "
        "reconstruction.",
        of.INFER,
    ),
    Section(
        "scaling-",
        "Scaling",
        "One thread. Time and additional peak memory along each axis, with everything else fixed: of an epoch for "
        "`samples`, of a training step for the other axes of a model, and of a whole call with defaults for a command. "
        "Models are trained on random bytes of 28x28, commands run on digits of that size that are moved by up to two "
        "pixels. `image_size` is the side of images with 3 channels, `width` that of two hidden layers. Medians of "
        "five repeats, of commands three. An exponent is the a of c n^a, fitted to the three largest values.",
        report_scaling.COLUMNS,
    ),
    Section(
        "speed-startup-",
        "Start-up",
        "Whole processes, timed from outside and run in turns. The ratio is to the time of the imports in the same "
        "turn.",
        of.STARTUP,
    ),
    Section(
        "latency-",
        "One sample",
        "The anomaly score of one sample, a batch of one, on a CPU: the file of `aezoo export --what score` in "
        "onnxruntime, with scaling and threshold, and the model itself in torch, without them. Median and 99th "
        "percentile of single calls in microseconds; the latter depends on what else the machine does.",
        of.LATENCY,
    ),
    Section(
        "quality-recipes-",
        "Recipes",
        "Test split, one seed. Losses are in nats; `val/l0` is the number of active entries in a sparse code.",
        (),
    ),
    Section(
        "quality-",
        "Quality",
        "Test split, median over seeds (lowest to highest). PCA of the same code size gives the lowest error that a "
        "linear code can reach. L0: the number of active entries in a sparse code. PCA's mse at L0: PCA with as many "
        "numbers. Active units: entries of a code that vary with the sample. Linear probe and kNN: the share of test "
        "samples whose class is predicted correctly from the code, by logistic regression and by the 5 nearest "
        "neighbours. Both learn from at most as many training codes as 'probe rows' says. PCA's code and raw pixels "
        "are measured in the same way. Epochs marked 'cut': `--most-seconds` ended a run before it reached its budget "
        "of epochs. Processor: given if the CSV contains it. Rates, and results of budgets in seconds, compare only on "
        "the same processor.",
        of.QUALITY,
        is_of_fixed_budget,
    ),
    Section("", "Others", "", ()),
)
