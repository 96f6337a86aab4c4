"""Explanations of the numbers of a run, in sentences: the generalisation gap and the trend of its curves."""

import math
import shlex

from aezoo.report.diagnosis import diagnose
from aezoo.report.runs import Run

# as a share of the improvement by training: a smaller gap is called small
_SMALL = 0.05
# units by the last part of a metric's name
UNITS = {
    "loss": "nats per sample", "nll": "nats per sample", "kl": "nats per sample", "elbo": "nats per sample",
    "log_likelihood": "nats per sample", "bits_per_dim": "bits per dimension", "psnr": "dB", "mse": "squared error",
    "ssim": "1 is identical", "samples_per_s": "samples/s", "active_units": "units", "l0": "units per sample",
    "dead": "share of units", "fvu": "share of variance", "accuracy": "share",
}  # fmt: skip


def number(value: float) -> str:
    """A number as tables have it, with four digits."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else str(value).replace("inf", "∞")
    if abs(value) >= 1e4:
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.3e}"
    return f"{value:.4g}"


def gap(run: Run) -> float:
    """How far the loss of validation is above that of training at the best epoch, in nats; NaN if one is missing."""
    return run.at("val/loss", run.best) - run.at("train/loss", run.best)


def explain(run: Run) -> list[str]:
    """Sentences about a run, the generalisation gap first."""
    return [*_gap_sentences(run), *(_sentence(verdict.text) for verdict in diagnose(run.curves, _name(run)))]


def _gap_sentences(run: Run) -> list[str]:
    if not run.epochs:
        return ["No epoch has ended, so there is nothing to say about its curves."]
    best = run.best
    if best is None:
        return ["No loss of an epoch is a finite number: the training has diverged, or it logged no loss."]
    train, val, epoch = run.at("train/loss", best), run.at("val/loss", best), run.epochs[best]
    if not math.isfinite(val):
        return ["There are no losses of validation samples, so it is not known how well the model does on new data."]
    if not math.isfinite(train):
        return [f"Validation loss is lowest at epoch {epoch}: {number(val)} nats per sample."]
    first = next(value for value in run.metrics["train/loss"] if math.isfinite(value))
    gained, difference = first - train, val - train
    losses = f"At the best epoch, {epoch}, validation loss is {number(val)} and training loss {number(train)} nats per "
    if difference <= 0:
        found = (
            f"{losses}sample: there is no generalisation gap. (Training loss is the mean over an epoch in which the "
            "model still changed, with any noise and dropout of training; validation follows it without these.)"
        )
    elif gained <= 0:
        found = (
            f"{losses}sample: a generalisation gap of {number(difference)}; training loss has not fallen since epoch 1."
        )
    else:
        share = difference / gained
        kind = "a small generalisation gap" if share < _SMALL else "a generalisation gap"
        found = (
            f"{losses}sample: {kind} of {number(difference)}, {share:.1%} of the decrease of training loss since "
            "epoch 1."
        )
    return [found, *_after_best(run, best)]


def _after_best(run: Run, best: int) -> list[str]:
    """How the losses changed after the best epoch, if it is not one of the last."""
    later = len(run.epochs) - 1 - best
    train, val = (run.last(name) for name in ("train/loss", "val/loss"))
    rise, fall = val - run.at("val/loss", best), run.at("train/loss", best) - train
    if later < 3 or not (math.isfinite(rise) and math.isfinite(fall)):
        return []
    went = f"fell by {number(fall)}" if fall > 0 else f"rose by {number(-fall)}" if fall < 0 else "did not change"
    level = f"is {number(rise)} higher" if rise > 0 else f"is {number(-rise)} lower" if rise < 0 else "is the same"
    grown = f"the gap grew to {number(val - train)}" if rise + fall > 0 else f"the gap is now {number(val - train)}"
    return [f"In the {later} epochs after it, training loss {went}, and validation loss {level} at the end: {grown}."]


def _name(run: Run) -> str | None:
    """The run's folder in commands; None if it has no checkpoint to continue from."""
    return shlex.quote(str(run.folder)) if (run.folder / "checkpoints").is_dir() else None


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
