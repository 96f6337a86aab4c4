"""Feature spaces for comparing samples: networks or principal components."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from aezoo.errors import AezooError
from aezoo.nets.blocks.classifier import STEPS, Classifier
from aezoo.nets.blocks.pretrained import cached_file, cached_weights
from aezoo.tasks.embed_codes import choose_rows, has_class_labels
from aezoo.tasks.result_store import concatenate
from aezoo.tasks.samples import SampleSet
from aezoo.tasks.samples import progress_bar as progress_bar
from aezoo.training.seeding import forked_rng

# what the small classifier learns from
_MAX_LEARNED, _MAX_VALUES = 20_000, 2**26
_BATCH, _COMPONENTS = 128, 64
# images of 299 x 299 at a time: half a gigabyte
_INCEPTION_BATCH = 32


@dataclass
class Features:
    """A space for `fidelity`; it can be pickled, so that several processes share one.

    Attributes:
        name: its name in the table of metrics.
        extract: maps samples (B, *shape) to features (B, F).
    """

    name: str
    extract: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def all(self, samples: SampleSet, batch_size: int, progress: bool = False) -> Tensor:
        """Features of all samples, (N, F) on the CPU."""
        found = concatenate(
            self.extract(batch) for batch in samples.batches(batch_size, "features" if progress else "")
        )
        if not found.isfinite().all():
            raise AezooError("some samples are NaN or infinite: the model is broken, train it again with a lower rate")
        return found


def choose_features(train: SampleSet, device: torch.device, seed: int, progress: bool) -> Features:
    """The best available space: Inception for images, or a classifier of the set's labels, or principal components.

    Nothing is downloaded: Inception is used if torchvision's weights are already on this machine.
    """
    shape = train.shape
    has_weights = cached_file("inception_v3").is_file()
    if has_weights and len(shape) == 3 and shape[0] in (1, 3) and _in_unit_interval(train):
        return Features("Inception-v3 of torchvision", _inception(device))
    most = min(_MAX_LEARNED, max(100, _MAX_VALUES // math.prod(shape)))
    if train.y is not None and has_class_labels(train) and len(torch.unique(train.y[train.y >= 0])) > 1:
        labelled = torch.nonzero(train.y >= 0)[:, 0]  # -1 means no label, see --data.num_labels
        rows = labelled[choose_rows(len(labelled), most, seed)]
        return _classifier(train, train.y, rows, device, seed, progress)
    return _pca(train.rows(torch.from_numpy(choose_rows(len(train), most, seed))))


# ---- Inception ------------------------------------------------------------------------------------------------------


def _in_unit_interval(train: SampleSet) -> bool:
    x = train.rows(range(min(len(train), 1000)))
    return bool(x.min() >= 0 and x.max() <= 1)


def _inception(device: torch.device) -> Callable[[Tensor], Tensor]:
    """The 2,048 averaged activations before the last layer, as in the FID of Heusel et al. 2017.

    They used other weights, so values are not comparable with published ones.
    """
    from torchvision.models import inception_v3

    network = inception_v3(weights=None, transform_input=False, init_weights=False)
    with cached_weights("inception_v3", "do without") as state:
        network.load_state_dict(state)
    network.fc = nn.Identity()
    return partial(_inception_features, network.to(device).eval(), device)


def _inception_features(network: nn.Module, device: torch.device, x: Tensor) -> Tensor:
    colour = x.to(device).clamp(0, 1).expand(-1, 3, -1, -1)
    found = []
    for part in colour.split(_INCEPTION_BATCH):
        large = nn.functional.interpolate(part, (299, 299), mode="bilinear", antialias=True)
        found.append(network(2 * large - 1))  # [0, 1] to the [-1, 1] that these weights were trained on
    return torch.cat(found)


# ---- a small classifier ---------------------------------------------------------------------------------------------


def _classifier(
    train: SampleSet, labels: Tensor, rows: Tensor, device: torch.device, seed: int, progress: bool
) -> Features:
    """The 64 activations before the last layer of a network that learns the labels, a tenth of them held out."""
    with forked_rng(device), torch.enable_grad():
        torch.manual_seed(seed)
        rows = rows[torch.randperm(len(rows))]
        x, y = train.rows(rows), torch.unique(labels[rows], return_inverse=True)[1]
        held = len(x) // 10
        network = Classifier(train.shape, int(y.max()) + 1).to(device)
        network.standardise(x)
        with progress_bar("classifier" if progress else "", STEPS) as advance:
            network.learn(x[held:], y[held:], advance)
    with torch.no_grad():
        # of variance 1 on average: the scale of activations has no meaning
        unit = torch.cat([network.activations(part.to(device)) for part in x.split(_BATCH)]).var(0).mean().sqrt()

    extract = partial(_scaled_activations, network, unit.clamp_min(1e-12), device)
    name = f"a small classifier of {train.name}"
    if held:
        with torch.no_grad():
            found = concatenate(network.head(extract(part)).argmax(1) for part in x[:held].split(_BATCH))
        name += f" (accuracy {float((found == y[:held]).float().mean()):.3f})"
    return Features(name, extract)


def _scaled_activations(network: Classifier, unit: Tensor, device: torch.device, x: Tensor) -> Tensor:
    return network.activations(x.to(device)) / unit


# ---- principal components -------------------------------------------------------------------------------------------


def _pca(x: Tensor) -> Features:
    """Principal components of raw values; without a network they show only brightness and outline."""
    from sklearn.decomposition import PCA

    flat = x.flatten(1).numpy()
    with np.errstate(invalid="ignore"):  # equal samples have no variance to explain
        fitted = PCA(min(_COMPONENTS, *flat.shape), random_state=0).fit(flat)
    mean, axes = torch.from_numpy(fitted.mean_), torch.from_numpy(fitted.components_)
    name = f"{len(axes)} principal components of raw values (no labels, no Inception weights found)"
    return Features(name, partial(_components, mean, axes))


def _components(mean: Tensor, axes: Tensor, x: Tensor) -> Tensor:
    return (x.cpu().flatten(1) - mean) @ axes.T
