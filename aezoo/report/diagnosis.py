"""Diagnoses from the loss curves of a run, in one line each; docs/training.md explains every line."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# One-sided normal quantile of 0.001: of a thousand level curves with independent noise, one seems to have a trend.
_Z = 3.09
# The smallest change that is reported: 1 % of the improvement over the whole run.
_GAIN = 0.01
# Epochs from which on the test for a trend has a normal approximation (Kendall 1970); fewer must all be in order.
_MANY = 8
_BLOCKS = 512
# Adam at its usual learning rate of 0.001 changes a weight by at most 0.5 in this number of steps.
_FEW_STEPS = 500
# Share of dead units up to which no line is written.
_DEAD = 0.1
# PCA is fitted to a few hundred validation samples; a model that is 10 % worse than that is worse than PCA.
_PCA_MARGIN = 1.1
# After these verdicts more epochs do not help.
_SETTLED = ("level", "overfitting")
# In low precision, a mean may be outside of [0, 1] by this much.
_ROUNDING = 0.01


@dataclass(frozen=True)
class Curves:
    """The history of a run.

    Attributes:
        epochs: the epochs that have ended, counted from 1.
        train: the mean training loss of each; NaN if unknown.
        val: the validation loss after each; NaN after an epoch without validation.
        steps: optimiser steps in all.
        limit: the setting that ended the run, max_epochs or max_steps.
        patience: epochs without improvement after which early stopping ended the run; 0 if it did not.
        stopped_by: the metric that early stopping watched.
        dead_units: units of the code without information.
        units: the size of the code; 0 if its units cannot be counted.
        mse: the best mean squared error on validation samples; NaN if it cannot be compared with that of PCA.
        pca_mse: that of PCA with as many components as the code has units.
        has_posterior: whether codes have a distribution, which may collapse to the prior.
        has_beta: whether the model has a hyperparameter beta, the weight of its KL.
        decoded: the smallest and the largest decoded value, if the likelihood is one of values in [0, 1].
        one_epoch: whether one epoch is enough for the model, which collects statistics of the samples.
    """

    epochs: Sequence[int]
    train: Sequence[float]
    val: Sequence[float]
    steps: int = 0
    limit: str = "max_epochs"
    patience: int = 0
    stopped_by: str = ""
    dead_units: int = 0
    units: int = 0
    mse: float = math.nan
    pca_mse: float = math.nan
    has_posterior: bool = False
    has_beta: bool = False
    decoded: tuple[float, float] = (0.0, 1.0)
    one_epoch: bool = False


@dataclass(frozen=True)
class Verdict:
    """One line about a run.

    Attributes:
        section: the heading of docs/training.md that explains it, as an anchor.
        text: the diagnosis, and what to do.
    """

    section: str
    text: str

    def __str__(self) -> str:
        return f"{self.text}; see {docs_page()}#{self.section}"


def docs_page() -> Path:
    """The page about these diagnoses: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).parent.parent
    found = [docs for docs in (package / "docs", package.parent / "docs") if docs.is_dir()]
    path = (found or [Path("docs")])[0] / "training.md"
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def diagnose(curves: Curves, run: str | None = None) -> list[Verdict]:
    """Diagnoses from the curves of a run, the most important first; none if they are too short.

    Args:
        curves: the history.
        run: the run's folder, for commands; None if it cannot be continued.
    """
    if curves.one_epoch:
        return []
    name, epochs, losses = _monitored(curves)
    # if nothing is decoded from the code, or into another space, more epochs do not help
    broken = _logits(curves) or _collapsed(curves)
    found = [_overfitting(curves), _stopped_early(curves, name, epochs, losses)]
    if broken:
        return [broken, *(verdict for verdict in found if verdict is not None)]
    if not any(found):
        found += [_too_few_steps(curves, losses, run) or _trend(curves, name, epochs, losses, run)]
    settled = any(verdict is not None and verdict.section in _SETTLED for verdict in found)
    found += [_worse_than_pca(curves, settled), _dead_units(curves)]
    return [verdict for verdict in found if verdict is not None]


# ---- verdicts -------------------------------------------------------------------------------------------------------


def _overfitting(curves: Curves) -> Verdict | None:
    pairs = [
        (epoch, train, val)
        for epoch, train, val in zip(curves.epochs, curves.train, curves.val, strict=True)
        if math.isfinite(train) and math.isfinite(val)
    ]
    if not pairs:
        return None
    val = [pair[2] for pair in pairs]
    best = val.index(min(val))
    later = pairs[best + 1 :]  # without the best epoch, which is below its neighbours in any noise
    rise = _mean([pair[2] for pair in later[-3:]]) - val[best] if later else 0.0
    # an increase at the very end may be noise, so a few epochs are not enough
    if len(later) < 5 or rise <= _GAIN * _range(val) or not _rises([pair[2] for pair in later]):
        return None
    if not _falls([pair[1] for pair in later]):
        return None
    return Verdict(
        "overfitting",
        f"training loss falls, validation loss has risen since epoch {pairs[best][0]}: overfitting; the best "
        "checkpoint is from that epoch; try more data, --model.weight_decay 1e-4, or a smaller network or code",
    )


def _stopped_early(curves: Curves, name: str, epochs: list[int], losses: list[float]) -> Verdict | None:
    if not curves.patience or not losses:
        return None
    after = f" after epoch {epochs[losses.index(min(losses))]}" if curves.stopped_by == name else ""
    waited = f"{curves.patience} epoch{'s' * (curves.patience > 1)}"
    return Verdict(
        "stopped-early",
        f"stopped early: {waited} without improvement of {curves.stopped_by}{after}; a larger "
        "--early_stopping.patience waits longer",
    )


def _too_few_steps(curves: Curves, losses: list[float], run: str | None) -> Verdict | None:
    undecided = len(losses) < 3 or _gain(losses) is not None
    if not 0 < curves.steps < _FEW_STEPS or not undecided:
        return None
    # a few epochs more would give the same diagnosis
    steps = max(_FEW_STEPS, 2 * curves.steps)
    many = math.ceil(len(curves.epochs) * steps / curves.steps)
    limit = f"--trainer.max_epochs {many}" if curves.limit == "max_epochs" else f"--trainer.max_steps {steps}"
    return Verdict(
        "too-few-steps",
        f"{curves.steps} step{'s' * (curves.steps > 1)} only: {_continuation(run, limit)}; a smaller "
        "--data.batch_size gives more steps per epoch",
    )


def _trend(curves: Curves, name: str, epochs: list[int], losses: list[float], run: str | None) -> Verdict | None:
    gain = _gain(losses)
    if gain is not None:
        last = _window(losses)
        now = curves.epochs[-1] if curves.limit == "max_epochs" else curves.steps
        return Verdict(
            "still-improving",
            f"still improving ({name} fell by {gain:.3g} in the last {epochs[-1] - epochs[-last] + 1} epochs): "
            f"{_continuation(run, f'--trainer.{curves.limit} {2 * now}')}",
        )
    if len(losses) < _MANY:
        return None
    level = losses[-_window(losses) :]
    if _rises(level):
        return Verdict("rising", f"{name} rises and training loss does not fall: try a smaller --model.lr")
    n_epochs = epochs[-1] - epochs[-len(level)] + 1
    return Verdict("level", f"{name} has been level for {n_epochs} epochs: more epochs will hardly help")


def _worse_than_pca(curves: Curves, settled: bool) -> Verdict | None:
    if not curves.mse > _PCA_MARGIN * curves.pca_mse:  # also if one is NaN
        return None
    if curves.has_posterior and curves.has_beta:
        cure = "a smaller --model.beta, which weights the KL term less than the reconstruction"
    else:
        cure = ("" if settled else "more epochs, ") + "another --model.lr or a wider network"
    return Verdict(
        "worse-than-pca",
        f"worse than PCA of the same size: mean squared error {curves.mse:.3g}, PCA with {curves.units} components "
        f"{curves.pca_mse:.3g}; try {cure}",
    )


def _logits(curves: Curves) -> Verdict | None:
    low, high = curves.decoded
    if low >= -_ROUNDING and high <= 1 + _ROUNDING:
        return None
    return Verdict(
        "decode-gives-logits",
        f"decode gives values from {low:.3g} to {high:.3g} for data in [0, 1]: logits must become means by "
        "self.likelihood.mean(logits); for means that may be any number use --model.likelihood gaussian",
    )


def _collapsed(curves: Curves) -> Verdict | None:
    if not curves.units or curves.dead_units < curves.units:
        return None
    units = f"all {curves.units} units of the code" if curves.units > 1 else "the one unit of the code"
    alike = f"{units} are the same for every sample" if curves.units > 1 else f"{units} is the same for every sample"
    if not curves.has_posterior:
        return Verdict("posterior-collapse", f"the code is dead: {alike}; try another --model.lr or a wider network")
    cure = "a smaller --model.beta, or BetaAnnealing" if curves.has_beta else "another --model.lr or a larger network"
    return Verdict("posterior-collapse", f"posterior collapse: {alike}, and the decoder ignores it; try {cure}")


def _dead_units(curves: Curves) -> Verdict | None:
    if curves.dead_units < max(1, _DEAD * curves.units):
        return None
    dead = f"{curves.dead_units} dead unit{'s' * (curves.dead_units > 1)}"
    return Verdict(
        "dead-units",
        f"the code has {dead} of {curves.units}: they are the same for every sample; a smaller code is enough",
    )


# ---- statistics -----------------------------------------------------------------------------------------------------


def _monitored(curves: Curves) -> tuple[str, list[int], list[float]]:
    """The validation loss, or the training loss of a run without validation: its name, epochs and values."""
    for name, values in (("val/loss", curves.val), ("train/loss", curves.train)):
        known = [(epoch, loss) for epoch, loss in zip(curves.epochs, values, strict=True) if math.isfinite(loss)]
        if known:
            return name, [epoch for epoch, _ in known], [loss for _, loss in known]
    return "loss", [], []


def _window(losses: Sequence[float]) -> int:
    """How many of the last epochs show where a curve goes: a third of them, or a few."""
    return min(len(losses), max(_MANY, len(losses) // 3))


def _gain(losses: Sequence[float]) -> float | None:
    """By how much a loss fell in its last epochs, if this is significant and large enough to report."""
    last = losses[-_window(losses) :]
    if len(last) < 2 or not _falls(last):
        return None
    half = len(last) // 2
    # the means of two halves lie half a window apart
    gain = 2 * (_mean(last[:half]) - _mean(last[-half:])) if half > 1 else last[0] - last[-1]
    return gain if gain > _GAIN * _range(losses) else None


def _falls(values: Sequence[float]) -> bool:
    return _rises([-value for value in values])


def _rises(values: Sequence[float]) -> bool:
    """Whether values rise by the test of Mann (1945), which does not assume a shape of the curve or the noise."""
    size = -(-len(values) // _BLOCKS)
    # the latest values in blocks of one size; all pairs of more would take long
    means_N = np.asarray(values[len(values) % size :], float).reshape(-1, size).mean(1)
    n = len(means_N)
    score = np.sign(np.triu(means_N[None] - means_N[:, None])).sum()
    if n < _MANY:
        return bool(score == n * (n - 1) // 2)
    return bool((score - 1) / math.sqrt(n * (n - 1) * (2 * n + 5) / 18) > _Z)


def _range(losses: Sequence[float]) -> float:
    """The improvement over a run."""
    return max(losses[0] - min(losses), 0.0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _continuation(run: str | None, limit: str) -> str:
    return f"aezoo fit --ckpt_path {run} {limit} continues" if run else f"{limit} continues"
