"""The subject of a check and its data, and functions that all checks share."""

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from unittest import SkipTest

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError
from aezoo.registry import model_class, name_of

SHAPES: tuple[tuple[int, ...], ...] = (
    (1, 28, 28),
    (3, 32, 32),
    (1, 27, 35),
    (30,),
    (3, 128),
    (1, 12, 12, 12),
)
BATCH = 7
# metrics that an evaluation adds to the loss terms, see aezoo.metrics
_RESERVED_TERMS = {"mse", "psnr", "ssim", "bits_per_dim", "log_likelihood", "usage", "perplexity"}


@dataclass(frozen=True)
class Subject:
    """What is checked: a model class and the hyperparameters it is built with.

    Attributes:
        cls: the model's class.
        hyperparameters: constructor arguments, `input_shape` left out.
    """

    cls: type[Autoencoder]
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The registry name, or the class's name if it has none, and the hyperparameters."""
        name = name_of(self.cls) or self.cls.__qualname__
        return f"{name}({', '.join(f'{k}={v!r}' for k, v in self.hyperparameters.items())})".removesuffix("()")

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The first of `SHAPES` that the model takes."""
        for shape in SHAPES:
            if self.takes(shape):
                return shape
        raise AssertionError(f"takes none of the shapes {', '.join(map(str, SHAPES))}")

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether the constructor accepts the shape; a refusal is an AezooError of one line."""
        try:
            with torch.random.fork_rng(devices=[]):
                self.build(shape)
        except AezooError as error:
            require(len(str(error).splitlines()) == 1, f"refuses {shape} with a message that is not one line: {error}")
            return False
        except Exception as error:
            raise AssertionError(
                f"the constructor fails on shape {shape} with {one_line(error)}: refuse it with an AezooError"
            ) from error
        return True

    def build(self, shape: Sequence[int] | None = None, **more: Any) -> Autoencoder:
        """A fresh model, for `shape` or the first shape that it takes."""
        make: Callable[..., Autoencoder] = self.cls
        return make(input_shape=self.shape if shape is None else shape, **{**self.hyperparameters, **more})

    def data(self, n: int = BATCH, shape: tuple[int, ...] | None = None, seed: int = 0) -> Tensor:
        """Samples in [0, 1] with structure, a bright spot at a random position in each channel, (n, *shape)."""
        shape = self.shape if shape is None else shape
        channels, grid = (1, shape) if len(shape) == 1 else (shape[0], shape[1:])
        generator = torch.Generator().manual_seed(seed)
        distance = torch.zeros(n, channels, *grid)
        for axis, side in enumerate(grid):
            place = torch.rand((n, channels) + (1,) * len(grid), generator=generator)
            steps = torch.linspace(0, 1, side).reshape([-1 if i == axis else 1 for i in range(len(grid))])
            distance = distance + (steps - place) ** 2
        return (0.05 + 0.9 * torch.exp(-distance / 0.03)).reshape(n, *shape)


Check = Callable[..., None]
Model = str | type[Autoencoder] | Subject


def subject_of(model: Model, **hyperparameters: Any) -> Subject:
    """The subject for a registry name or a class, built with these hyperparameters."""
    if isinstance(model, Subject):
        return Subject(model.cls, {**model.hyperparameters, **hyperparameters})
    return Subject(model_class(model) if isinstance(model, str) else model, hyperparameters)


# ---- how a check runs -----------------------------------------------------------------------------------------------


def as_check(body: Callable[[Subject], None]) -> Check:
    """A check that runs `body` on a subject: it takes the arguments of `subject_of`; errors name the subject."""

    def check(model: Model, /, **hyperparameters: Any) -> None:
        subject = subject_of(model, **hyperparameters)
        with quiet_and_isolated():
            try:
                body(subject)
            except SkipTest:
                raise
            except AssertionError as error:
                raise AssertionError(f"{subject.label} fails {body.__name__}: {error}") from error
            except Exception as error:
                raise AssertionError(f"{subject.label} fails {body.__name__} with {one_line(error)}") from error

    # functools.wraps would also show the signature of the body
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(check, name, getattr(body, name))
    return check


@contextmanager
def quiet_and_isolated() -> Iterator[None]:
    """Seed 0 and silence; afterwards the random state, the warning filters and the loggers are as they were."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # raised inside lightning 2.6.6 and torch 2.13, not by the model
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.script_method.*", category=DeprecationWarning)
        # raised inside Dynamo for each custom gradient of a model
        warnings.filterwarnings("ignore", message=".*Function'> should not be inst", category=DeprecationWarning)
        # advice on workers, logging intervals, missing validation data: none of it matters here
        warnings.filterwarnings("ignore", category=PossibleUserWarning)
        warnings.filterwarnings("ignore", message="GPU available but not used.*")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            torch.manual_seed(0)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def one_line(error: BaseException) -> str:
    """The error's class and words on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# ---- messages of checks ----------------------------------------------------------------------------------------------


def require(condition: bool, message: str) -> None:
    """Fail with the message unless the condition holds."""
    if not condition:
        raise AssertionError(message)


def require_shape(what: str, value: Any, shape: tuple[int, ...]) -> None:
    """A finite tensor of this shape."""
    require(isinstance(value, Tensor), f"{what} gives a {type(value).__name__}, not a tensor")
    require(tuple(value.shape) == shape, f"{what} gives shape {tuple(value.shape)} where {shape} is due")
    require(bool(value.isfinite().all()), f"{what} gives values that are not finite")


def require_terms(what: str, terms: dict[str, Tensor]) -> None:
    """A loss as the base class defines it: finite scalars by name; the model has checked that "loss" is one of them."""
    for name, value in terms.items():
        require(re.fullmatch(r"[a-z][a-z0-9_]*", name) is not None, f"{what} has a term {name!r}: use snake_case")
        require(name not in _RESERVED_TERMS, f"{what} has a term {name!r}, which every evaluation reports by itself")
        require(isinstance(value, Tensor) and value.shape == (), f"{what} has a term {name!r} that is not a scalar")
        require(bool(value.isfinite()), f"{what} has {name} = {float(value.detach())}")


def require_finite_gradients(what: str, model: Autoencoder) -> None:
    """No gradient that is infinite or not a number; `what` says where they come from."""
    for name, p in model.named_parameters():
        require(p.grad is None or bool(p.grad.isfinite().all()), f"the gradient of {name}{what} is not finite")


def require_close(what: str, value: Any, wanted: Any, tolerance: float) -> None:
    """Within the tolerance, relative to the largest value and at least to 1e-3."""
    require(value.shape == wanted.shape, f"{what} has shape {tuple(value.shape)}, not {tuple(wanted.shape)}")
    value, wanted = value.detach().double(), wanted.detach().double()
    off = float((value - wanted).abs().max())
    require(off <= tolerance * max(1e-3, float(wanted.abs().max())), f"{what} is off by {off:.2g}")


def snapshot(model: Autoencoder) -> dict[str, Tensor]:
    """A copy of all parameters and buffers, also of those that are not saved."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: value.detach().clone() for name, value in tensors}


def state_shapes(model: Autoencoder) -> dict[str, tuple[int, ...]]:
    """The keys of the state_dict and the shapes under them."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def equal(one: Any, two: Any) -> bool:
    """Whether two nests of dicts, lists and tensors are the same, bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(value, two[key]) for key, value in one.items())
    return len(one) == len(two) and all(equal(a, b) for a, b in zip(one, two, strict=True))
