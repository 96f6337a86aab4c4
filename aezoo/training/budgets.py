"""Settings that follow the number, the size and the values of the samples, where a user gives none.

The command line and `aezoo.sklearn` choose by the same rules.
"""

import math
from collections.abc import Sequence

# values of a sample of mnist5k, for which the default code sizes of models are chosen
_USUAL_VALUES = 28 * 28
# models whose latent_dim is the number of values in a code, fewer than those of a sample
_FAMILIES = ("classic", "regularised", "variational")
# codes grow in multiples of this; a smaller default, such as 2 for codes that are plotted, is used for all samples
_UNIT = 8
# smallest number of batches in an epoch of few samples
_BATCHES = 32
_LEAST_BATCH, _LARGEST_BATCH = 16, 128
# with few samples: the number of steps or of seen samples, whichever is reached first
_STEPS, _SEEN = 2_000, 80_000
_LEAST_EPOCHS = 20
_DETECTOR_STEPS, _DETECTOR_EPOCHS = 1_000, (10, 40)


def has_narrow_code(model: type) -> bool:
    """Whether a model's `latent_dim` is the number of values in a code, fewer than those of a sample."""
    return model.__module__.startswith(tuple(f"aezoo.models.{family}." for family in _FAMILIES))


def choose_latent_dim(model: type, default: int, input_shape: Sequence[int]) -> int:
    """The size of a code: at most a quarter of a sample's values, and more than the default for large samples.

    It grows with the square root of the number of values. Sparse, quantised and compressing models, whose `latent_dim`
    means something else, and plug-ins keep their defaults.

    Args:
        model: the class.
        default: the default of its argument, which suits 28x28 values.
        input_shape: shape of a sample.
    """
    if not has_narrow_code(model):
        return default
    n_values = math.prod(input_shape)
    if n_values < _USUAL_VALUES:
        return min(default, max(2, n_values // 4))
    size = default * math.sqrt(n_values / _USUAL_VALUES)
    return default if default < _UNIT else max(default, round(size / _UNIT) * _UNIT)


def choose_likelihood(default: str, input_shape: Sequence[int], unbounded: bool, scale: str | None) -> str:
    """A model's default likelihood, or gaussian if that is bernoulli and the scaled values leave the range from 0 to 1.

    Args:
        default: the default of the model.
        input_shape: shape of a sample.
        unbounded: whether values are outside this range before they are scaled.
        scale: how they are scaled; None if `choose_scale` decides.
    """
    leaves = scale == "standard" or (unbounded and (scale == "none" or not _is_picture(input_shape)))
    return "gaussian" if leaves and default == "bernoulli" else default


def choose_scale(input_shape: Sequence[int], unbounded: bool, unit_interval: bool) -> str:
    """Standard for tables and series with values outside the range from 0 to 1, otherwise auto.

    Args:
        input_shape: shape of a sample.
        unbounded: whether values are outside this range.
        unit_interval: whether the likelihood is one of values in this range.
    """
    return "standard" if unbounded and not unit_interval and not _is_picture(input_shape) else "auto"


def choose_batch_size(n_samples: int) -> int:
    """Samples in a batch: the power of two that is nearest to a 32nd of all, from 16 to 128.

    Args:
        n_samples: training samples of one process.
    """
    n_samples = max(1, n_samples)
    size = 2 ** round(math.log2(n_samples / _BATCHES))
    return min(max(size, _LEAST_BATCH), _LARGEST_BATCH, n_samples)


def choose_max_epochs(n_samples: int, batch_size: int) -> int:
    """Epochs: at least 20, and for few samples enough that the run takes 2,000 steps or trains on 80,000 samples.

    Args:
        n_samples: training samples of one process.
        batch_size: samples in a batch.
    """
    return max(_LEAST_EPOCHS, math.ceil(min(_STEPS, _SEEN / batch_size) / steps_per_epoch(n_samples, batch_size)))


def choose_detector_epochs(n_samples: int, batch_size: int) -> int:
    """Epochs of a detector of anomalies in tables: 1,000 steps, at least 10 and at most 40 epochs.

    The samples include anomalies, and a network that is trained on few samples for long also learns these.

    Args:
        n_samples: training samples.
        batch_size: samples in a batch.
    """
    fewest, most = _DETECTOR_EPOCHS
    return min(most, max(fewest, math.ceil(_DETECTOR_STEPS / steps_per_epoch(n_samples, batch_size))))


def steps_per_epoch(n_samples: int, batch_size: int) -> int:
    """Steps of an epoch whose last batch may be smaller."""
    return math.ceil(max(1, n_samples) / batch_size)


def _is_picture(input_shape: Sequence[int]) -> bool:
    """Whether samples are images or volumes, not vectors or series."""
    return len(input_shape) > 2
