"""The sections of the report: which CSVs stand under which heading, and what their figures are."""

from collections.abc import Callable
from typing import NamedTuple

from . import report_columns as of
from .common import number
from .report_columns import Column, Row


class Section(NamedTuple):
    """CSVs of a kind.

    Attributes:
        prefix: of their names.
        title: heading.
        text: what the figures are.
        columns: of the tables; all of the CSV's if there are none.
        shows: whether a row is worth a line.
    """

    prefix: str
    title: str
    text: str
    columns: tuple[Column, ...]
    shows: Callable[[Row], bool] = lambda row: True


def _is_no_plain_layer(row: Row) -> bool:
    return row.get("chosen") != "torch" or (number(row, "lost") or 1) > 1.1


SECTIONS = (
    Section(
        "peers-quality-",
        "Bounds beside pythae",
        "The same networks, weights, batches and budget; both parties' trained weights are judged by one estimate. "
        "Tighter by: the zoo's log p(x) less pythae's of the same seed.",
        of.BOUNDS,
    ),
    Section(
        "disentangle-",
        "Disentanglement",
        "Codes of `shapes` against its factors, median over seeds (lowest to highest); higher is better but for mse. "
        "MIG to IRS are explained in `aezoo.metrics`; UDR compares a model's seeds with each other, without the "
        "factors.",
        of.DISENTANGLE,
    ),
    Section(
        "dictionaries-",
        "Known dictionaries",
        "Sparse sums of known atoms (`synthetic_dictionary`), test split, median over seeds (lowest to highest). MCC: "
        "mean absolute cosine of atoms and the latents matched with them; uniqueness: atoms that are the nearest of a "
        "latent, over latents; L0: entries of a code that are not 0; FVU: fraction of variance unexplained, best at 0; "
        "dead share: latents that are never active; cosine, shrinkage and reconstruction bias are best at 1 "
        "(`aezoo.metrics`). Atoms, dimensions, active, correlation and noise are of the sums.",
        of.DICTIONARIES,
    ),
    Section(
        "probe-",
        "What codes hold",
        "Shares of test samples whose class simple classifiers read off codes that were learned without labels, median "
        "over seeds (lowest to highest); pooled: over the places of a map or the tokens.",
        of.PROBE,
    ),
    Section(
        "bits-",
        "Errors at equal bits",
        "Quantised models with the same networks, grid and bits a sample; test split, median over seeds (lowest to "
        "highest). Usage: the share of a book's codes that are chosen at all; perplexity: how many codes chosen "
        "equally often would be as hard to guess; bits used: by an ideal code for the shares of choices.",
        of.BITS,
    ),
    Section(
        "quantisers-",
        "Quantisers beside vector-quantize-pytorch",
        "The same codes and maps in training mode, in turns; a ratio above 1 says that ours are faster, median over "
        "rounds (lowest to highest). Places: points of the maps, each of which gets a code; memory: what a step takes "
        "at its peak beyond what lay there before; same codes: the share of places at which both sides choose the "
        "same.",
        of.QUANTISERS,
    ),
    Section(
        "gather-",
        "Decoding of sparse codes",
        "The whole dictionary multiplied, or the active rows gathered; forward and backward, one thread. A sample of "
        "`x_dim` numbers has `k` of `latents` active, `ratio` is latents / k, `speedup` dense_ms / gather_ms.",
        (),
    ),
    Section(
        "convolutions-",
        "Convolutions",
        "Layers of kernel 3, forward and backward, in each way a CPU can: by torch (`torch_ms`), by products of "
        "matrices (`products_ms`), by torch with the derivatives taken apart (`apart_ms`; in older files "
        "`bias_apart_ms`, of the bias alone), of transposed ones as a convolution of the smaller grid "
        "(`sub_pixels_ms`) and as products laid over one another (`overlay_ms`). `side` is that of the smaller grid, "
        "`channels` are those of the larger; `chosen` is what a layer takes by itself. `speedup` is what the chosen "
        "way makes of torch's own time, `lost` its time by that of the fastest. Left out, but not of the CSVs: layers "
        "that torch computes in its own way, where no other way is a tenth faster.",
        (),
        _is_no_plain_layer,
    ),
    Section(
        "published-",
        "Published settings",
        "Recipes of published figures on other data and for a share of their steps: no reproduction. Losses are in "
        "nats; `binarise` is how grey pictures become zeros and ones.",
        (),
    ),
    Section(
        "peers-",
        "Beside others",
        "The same network, data and losses; a party's ratio is to a compiled PyTorch loop by hand, in the same rounds. "
        "Samples/s: in training, without the first epoch; wall: with what happens between epochs, such as validation "
        "and pictures; first step: from the start of the process, with compilers' caches as they were; distance of "
        "loss curves: the largest from the loop's, as a share of it. It agrees if that is as much as is allowed at "
        "most: 1 %, 2 % where another precision is compared, 3 % of `conv28`, where the noise of codes is each "
        "party's own, and of Keras, which shuffles for itself.",
        of.PEERS,
    ),
    Section(
        "speed-train-",
        "Training",
        "A Trainer's fit with bar, logger and checkpoints; median of the epochs after the first (lowest to highest). "
        "Peak: the fastest product of square matrices in the same process and precision. Of matmul peak: the share of "
        "a step in which the device could do all of its FLOPs at that peak; GEMMs at peak: the same of its matrix "
        "products alone; products alone: the share that its products and convolutions take when they run by "
        "themselves. Interface: bar, logger, checkpoints and guard, which are off in rows that say so; its share, and "
        "that of the guard, which looks for faults, is what they add to a step (a negative one is noise). Compile: "
        "what the first step takes beyond the others, with what the compiler's cache held (unknown where the cell is "
        "empty); cold start: from the start of the process to the end of the first step. Scaling efficiency: the rate "
        "by that of as many devices alone.",
        of.TRAIN,
    ),
    Section(
        "speed-infer-",
        "Inference",
        "Under inference_mode; beside the bare networks, and the Trainer's predict beside a loop that does the same. "
        "Encode / network and reconstruct / network: the model's methods by its bare modules; ms a batch, the share of "
        "the peak and FLOPs are those of a reconstruction.",
        of.INFER,
    ),
    Section(
        "speed-startup-",
        "Start-up",
        "Whole processes, timed from outside in turns; the ratio is to the imports of the same turn.",
        of.STARTUP,
    ),
    Section(
        "quality-recipes-",
        "Recipes",
        "Test split, one seed; losses in nats, `val/l0` the numbers of a sparse code in use.",
        (),
    ),
    Section(
        "quality-",
        "Quality",
        "Test split, median over seeds (lowest to highest). PCA of the same code size is the floor of a linear code. "
        "L0: the numbers of a sparse code in use, PCA's mse at L0: with as many; active units: numbers of a code that "
        "vary with the sample; linear probe and kNN: the share of test samples whose class logistic regression and the "
        "5 nearest neighbours read off the code, of at most so many training codes (probe rows), beside PCA's code and "
        "raw pixels. Epochs marked 'cut': `--most-seconds` ended a run before its budget of epochs did. On: the "
        "processor, where a row names it; rates, and what a budget of seconds reaches, compare on one.",
        of.QUALITY,
    ),
    Section("", "Others", "", ()),
)
