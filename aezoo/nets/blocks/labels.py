"""Labels of samples: integers from 0 to K - 1, or -1 for unlabelled samples.

Shapes: B batch, D latent, K labels, E = D + K code.
"""

import math

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.errors import AezooError


def check_num_classes(num_classes: int | None) -> int:
    """Return the number of classes of labelled data.

    Raises:
        AezooError: it is None or below 1.
    """
    if num_classes is None:
        raise AezooError("the data have no classes, which this model needs: give data with labels, or use vae")
    if num_classes < 1:
        raise AezooError(f"num_classes must be at least 1, got {num_classes}")
    return num_classes


def check_labels(y: Tensor) -> Tensor:
    """Check labels that are only compared with each other, (B,), and return them.

    Raises:
        AezooError: the labels have another shape.
    """
    if y.ndim != 1:
        raise AezooError(f"labels must be one number per sample, got {y.dtype} of shape {tuple(y.shape)}")
    return y


@torch.compiler.disable  # type: ignore[untyped-decorator]
def all_labelled(y: Tensor, num_classes: int) -> bool:
    """Return whether all samples have a label.

    Raises:
        AezooError: values are not labels for this number of classes.
    """
    if y.is_cuda and torch.cuda.is_current_stream_capturing():
        return False  # a graph cannot wait for values, and the code for missing labels is correct in all cases
    if y.ndim != 1 or y.is_floating_point():
        raise AezooError(f"labels must be one whole number per sample, got {y.dtype} of shape {tuple(y.shape)}")
    low, high = int(y.min()), int(y.max())
    if low < -1 or high >= num_classes:
        wrong = low if low < -1 else high
        raise AezooError(
            f"labels must be from 0 to {num_classes - 1}, or -1 for none, got {wrong}: give the model the data's "
            "num_classes"
        )
    return low >= 0


def resolve_labels(y: Tensor | int | None, n: int, num_classes: int) -> Tensor:
    """Return labels of n samples to draw, (n,): y for all, one y for each, or labels drawn uniformly.

    Raises:
        AezooError: the numbers of labels and samples differ, or values are not labels.
    """
    labels = torch.randint(num_classes, (n,)) if y is None else torch.as_tensor(y)
    labels = labels.expand(n) if labels.ndim == 0 else labels
    if len(labels) != n or (n and not all_labelled(labels, num_classes)):
        raise AezooError(f"{n} samples need one label each, from 0 to {num_classes - 1}, or one for all")
    return labels


def one_hot(y: Tensor, num_classes: int, like: Tensor) -> Tensor:
    """Return one-hot labels with the data type of another tensor: (...) -> (..., K)."""
    return F.one_hot(y.long(), num_classes).to(like.dtype)


def repeat_for_each_label(x: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Repeat all samples with the first label, then the second, and so on: (B, *shape) -> (K B, *shape), (K B, K)."""
    y_KK = torch.eye(num_classes, device=x.device, dtype=x.dtype)
    # torch.export would treat len(x) as a constant
    y_KBK = y_KK[:, None].expand(-1, x.shape[0], -1)
    return x.expand(num_classes, *x.shape).flatten(0, 1), y_KBK.flatten(0, 1)


def select_label(y: Tensor, values_BK: Tensor, default_B: Tensor) -> Tensor:
    """Select the value at each sample's label, or the default without a label: (B,), (B, K), (B,) -> (B,)."""
    return torch.where(y >= 0, values_BK.gather(1, y.long().clamp(min=0)[:, None])[:, 0], default_B)


class ConcatLabel(nn.Linear):
    """A sample concatenated with a linear map of its one-hot label, as input of a network.

    Args:
        num_classes: K.
        input_shape: shape of one sample; the label becomes K more entries of a vector, or else one more channel.

    Attributes:
        label_shape: shape of the label's map.
        joint_shape: shape of sample and label together.
    """

    def __init__(self, num_classes: int, input_shape: tuple[int, ...]) -> None:
        channels, *grid = input_shape
        self.label_shape = (1, *grid) if grid else (num_classes,)
        self.joint_shape = (channels + self.label_shape[0], *grid)
        super().__init__(num_classes, math.prod(self.label_shape), bias=False)

    def forward(self, x: Tensor, y_BK: Tensor) -> Tensor:  # type: ignore[override]
        """(B, *input_shape), (B, K) -> (B, *joint_shape)."""
        label = super().forward(y_BK).unflatten(1, self.label_shape).to(x.dtype)
        return torch.cat([x, label], 1)


class LabelledCode(pl.LightningModule):
    """Mixin, before `VAE`, for models with codes [z, one-hot y] and a uniform prior over labels.

    Attributes:
        latent_dim: D, size of z.
        num_classes: K, number of labels.
    """

    latent_dim: int
    num_classes: int
    decoder: nn.Module

    def log_prior(self, z: Tensor) -> Tensor:
        """Return the log-density log p(z) p(y) of codes in nats, (..., E) -> (...)."""
        log_p: Tensor = super().log_prior(z[..., : self.latent_dim])  # type: ignore[misc]
        return log_p - math.log(self.num_classes)

    def sample_prior(self, n: int, y: Tensor | int | None = None) -> Tensor:
        """Draw n codes, (n, E), with the label y, or (n,) labels, or labels drawn uniformly."""
        weight = next(self.decoder.parameters())
        z = torch.randn(n, self.latent_dim, device=weight.device, dtype=weight.dtype)
        y_n = resolve_labels(y, n, self.num_classes).to(z.device)
        return torch.cat([z, one_hot(y_n, self.num_classes, z)], 1)

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | int | None = None) -> Tensor:
        """Draw n samples, (n, *input_shape), with the label y, or (n,) labels, or labels drawn uniformly."""
        x: Tensor = self.decode(self.sample_prior(n, y))  # type: ignore[operator]
        return x
