"""Lightning callbacks. Their arguments have plain types; each works without the others and with any `Autoencoder`."""

from aezoo.callbacks.annealing import BetaAnnealing
from aezoo.callbacks.base import is_enabled
from aezoo.callbacks.checkpoints import Checkpoints, EarlyStop, checkpoint_callback
from aezoo.callbacks.code_statistics import CodeStatistics
from aezoo.callbacks.codebook import Codebook
from aezoo.callbacks.dashboard import Dashboard
from aezoo.callbacks.ema import EMA
from aezoo.callbacks.epoch_metrics import EpochMetrics
from aezoo.callbacks.fault_guard import FaultGuard
from aezoo.callbacks.filters import Filters
from aezoo.callbacks.histograms import Histograms
from aezoo.callbacks.interrupt import Interrupt
from aezoo.callbacks.latents import LatentScatter, Projector
from aezoo.callbacks.learning_curves import LearningCurves
from aezoo.callbacks.predictions import PredictionWriter
from aezoo.callbacks.progress import ProgressBar
from aezoo.callbacks.reconstructions import Reconstructions
from aezoo.callbacks.report import Report
from aezoo.callbacks.samples import Samples
from aezoo.callbacks.summary import Summary
from aezoo.callbacks.throughput import Throughput
from aezoo.callbacks.traversal import Traversal
from aezoo.callbacks.validation_schedule import ValidationSchedule
from aezoo.deprecated import renamed

__all__ = [
    "EMA",
    "BetaAnnealing",
    "Checkpoints",
    "CodeStatistics",
    "Codebook",
    "Dashboard",
    "EarlyStop",
    "EpochMetrics",
    "FaultGuard",
    "Filters",
    "Histograms",
    "Interrupt",
    "LatentScatter",
    "LearningCurves",
    "PredictionWriter",
    "ProgressBar",
    "Projector",
    "Reconstructions",
    "Report",
    "Samples",
    "Summary",
    "Throughput",
    "Traversal",
    "ValidationSchedule",
    "checkpoint_callback",
    "is_enabled",
]

__getattr__ = renamed(__name__)
