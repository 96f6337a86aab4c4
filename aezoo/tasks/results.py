"""The interface of the results of all commands: a table, a figure and a summary."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError
from aezoo.tasks.result_store import Row, Samples, SeparateArrays

if TYPE_CHECKING:
    from matplotlib.figure import Figure


P = ParamSpec("P")
T = TypeVar("T")


def takes_model(command: Callable[P, T]) -> Callable[P, T]:
    """Refuse, in one line, an argument that is not a model, such as a path."""

    @wraps(command)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        model = args[0] if args else kwargs.get("model")
        if not isinstance(model, Autoencoder):
            given = f"aezoo.load_model({str(model)!r})" if isinstance(model, str | Path) else "an aezoo.Autoencoder"
            raise AezooError(f"{command.__name__} takes a model, not a {type(model).__name__}: give {given}")
        return command(*args, **kwargs)

    return checked


@dataclass(kw_only=True, repr=False)
class Result:
    """Base of the results.

    Attributes:
        files: the files written.
        tabulate: gives the rows of `table`.
        draw: draws `figure`; None if no sample is to be shown.
    """

    files: list[Path] = field(default_factory=list)
    tabulate: Callable[[], Iterable[Row]] | None = field(default=None, compare=False)
    draw: "Callable[[], Figure] | None" = field(default=None, compare=False)

    @cached_property
    def table(self) -> Any:
        """A pandas DataFrame: a row for each sample or, of `denoise` and `compress`, for each method.

        Raises:
            AezooError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise AezooError("a table is a DataFrame, which needs pandas: pip install pandas") from None
        return pandas.DataFrame(list(self.tabulate() if self.tabulate is not None else ()))

    @cached_property
    def figure(self) -> "Figure":
        """The picture, a matplotlib Figure, which a notebook shows; drawn when it is first used.

        Raises:
            AezooError: no samples are to be shown.
        """
        from aezoo.callbacks.plotting import displayable

        if self.draw is None:
            raise AezooError("n_shown is 0, so there are no samples to draw: give at least 1")
        return displayable(self.draw())

    def about(self) -> str:
        """What it is, in one line."""
        return ""

    def summary(self) -> str:
        """Lines for the terminal."""
        return self.about()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.about()}; see .table, .figure and .summary())"


def sizes(shape: Iterable[int]) -> str:
    """A shape in words: 1x28x28."""
    return "x".join(map(str, shape))


def count_of(x: Samples) -> str:
    """How many samples there are, of which size, in words."""
    shape = "several sizes" if isinstance(x, SeparateArrays) else sizes(x.shape[1:])
    return f"{len(x):,} samples of {shape}"
