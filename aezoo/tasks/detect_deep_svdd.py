"""Deep SVDD as a score (Ruff et al. 2018), https://proceedings.mlr.press/v80/ruff18a.html

A copy of the encoder f, which the autoencoder has pre-trained, learns to map normal samples close to one point:

    one-class       min  1/N sum_i ||f(x_i) - c||^2 + lambda/2 sum_l ||W_l||^2                              (equation 4)
    soft boundary   min  R^2 + 1/(nu N) sum_i max(0, ||f(x_i) - c||^2 - R^2) + lambda/2 sum_l ||W_l||^2     (equation 3)
    score           ||f(x) - c||^2          c = mean of the initial codes, entries near 0 moved to -0.1 or 0.1

R^2 is the 1 - nu quantile of the distances, computed again in every epoch. As in section 3.3, solutions in which f is
the constant c, with score 0 for everything, are excluded. Biases are set to 0 in the copy before c is computed, and are
not trained (with them, weights of 0 would do: proposition 2). c is not 0, the output for weights of 0 (proposition 1).
Activations that saturate at a value other than 0 would replace a bias and are refused (proposition 3), as are those
that are not 0 at 0.

All normal samples are mapped to one point, and so are points between them: one normal class works better than several.
Training distances are too small for calibration: give held-out samples for p-values.

Shapes: B batch, N training samples, D code.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from aezoo.autoencoder import Autoencoder, at_least_float32
from aezoo.errors import AezooError
from aezoo.tasks.samples import progress_bar
from aezoo.training.model_names import display_name

# floats of training samples that are held, 256 MiB
_MAX_VALUES = 2**26
_MAX_EPOCHS = 10**6
_BATCH, _WEIGHT_DECAY, _MIN_ABS_CENTRE = 128, 1e-6, 0.1
_REFUSED = (nn.Tanh, nn.Sigmoid, nn.ELU, nn.Softplus)


@dataclass(frozen=True)
class SVDDSettings:
    """How the copy is trained.

    Attributes:
        epochs: passes over the training samples; 0 uses the initial codes, without biases.
        lr: Adam's learning rate.
        nu: share of the training samples that may lie outside a soft boundary; 0 is the one-class objective without it.
    """

    epochs: int = 50
    lr: float = 5e-4
    nu: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.epochs <= _MAX_EPOCHS or not 0 < self.lr <= 1000 or not 0 <= self.nu < 1:
            raise AezooError(f"deep_svdd takes 0 to {_MAX_EPOCHS:,} epochs, an lr above 0 and at most 1000 and a nu "
                             f"of at least 0 and below 1, got {self.epochs}, {self.lr} and {self.nu}")  # fmt: skip


class DeepSVDDScorer:
    """Squared distance of a fine-tuned code from the centre of the normal ones.

    Args:
        model: is copied for training, and stays unchanged.
        tuning: how the copy is trained.
        title: of the progress bar; empty shows none.

    Raises:
        AezooError: the encoder has an activation with which everything could collapse to one point.
    """

    centre_D: Tensor

    def __init__(self, model: Autoencoder, tuning: SVDDSettings, title: str = "") -> None:
        refused_layer = next((type(m).__name__ for m in model.encoder.modules() if isinstance(m, _REFUSED)), None)
        if refused_layer:
            raise AezooError(f"deep_svdd would map everything to one point by its {refused_layer}: train the model "
                             "with activation relu, leaky_relu, gelu or silu, or use mahalanobis or nap")  # fmt: skip
        self._model, self._tuning, self._title = model, tuning, title

    def max_samples(self, x: Tensor) -> int | None:
        return max(2, _MAX_VALUES // x.numel())

    def codes(self, x: Tensor) -> Tensor:
        """Fine-tuned codes, (B, *shape) -> (B, D)."""
        return at_least_float32(self._copy.encode(x)).flatten(1)

    def distances(self, x: Tensor) -> Tensor:
        """||f(x) - c||^2, (B, *shape) -> (B,)."""
        return (self.codes(x) - self.centre_D).square().sum(1)

    def fit(self, batches: Iterable[Tensor], n: int) -> None:
        self._copy = copy.deepcopy(self._model).eval()  # without its trainer, as Lightning has it
        weights = without_biases(self._copy)
        x = torch.cat([*batches])
        parts = x.split(_BATCH)
        mean_D = sum(self.codes(part).sum(0) for part in parts) / len(x)
        assert isinstance(mean_D, Tensor)
        away_D = torch.where(mean_D < 0, -_MIN_ABS_CENTRE, _MIN_ABS_CENTRE)
        self.centre_D = torch.where(mean_D.abs() < _MIN_ABS_CENTRE, away_D, mean_D)
        with torch.enable_grad():
            if not self.distances(x[:1]).requires_grad:
                raise AezooError(f"deep_svdd needs codes with a gradient, {display_name(type(self._model))} has none: "
                                 "use mahalanobis, sap or nap")  # fmt: skip
        optimizer = torch.optim.Adam(weights, self._tuning.lr, weight_decay=_WEIGHT_DECAY)
        nu, radius2 = self._tuning.nu, x.new_zeros(())
        inside = math.ceil((1 - nu) * len(x))
        with progress_bar(self._title, self._tuning.epochs) as advance:
            for _ in range(self._tuning.epochs):
                if nu:
                    radius2 = torch.cat([self.distances(part) for part in parts]).kthvalue(inside)[0]
                for rows in torch.randperm(len(x)).to(x.device).split(_BATCH):
                    with torch.enable_grad():
                        d2_B = self.distances(x[rows])
                        loss = (d2_B - radius2).relu().mean() / nu if nu else d2_B.mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                advance(1)
        self._copy.requires_grad_(False)

    @property
    def state(self) -> dict[str, Tensor]:
        """Weights and centre."""
        return {"centre": self.centre_D, **{f"weights.{key}": value for key, value in self._copy.state_dict().items()}}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over weights and centre."""
        self._copy = copy.deepcopy(self._model).eval().requires_grad_(False)
        weights = {key.removeprefix("weights."): value for key, value in state.items() if key != "centre"}
        self._copy.load_state_dict(weights)
        self.centre_D = state["centre"].to(self._model.device)

    def __call__(self, x: Tensor) -> Tensor:
        return self.distances(x)

    def leave_one_out(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Unknown without a fit for each sample."""
        return scores


def without_biases(model: nn.Module) -> list[nn.Parameter]:
    """Fix all biases at 0 and other vectors at their values; returns the weights to train."""
    for name, p in model.named_parameters():
        p.requires_grad_(p.ndim > 1)
        last = name.rpartition(".")[2]
        if p.ndim < 2 and (last.startswith(("b_", "bias")) or last.endswith("bias")):
            p.zero_()
    return [p for p in model.parameters() if p.requires_grad]
