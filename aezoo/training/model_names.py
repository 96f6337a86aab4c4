"""The name under which a class of models is registered."""

import sys
from contextlib import suppress
from importlib.metadata import entry_points
from operator import attrgetter

GROUP = "aezoo.models"


def is_built_in(cls: type) -> bool:
    """Whether a class is defined in a file `aezoo/models/<family>/<name>.py`."""
    return cls.__module__.startswith("aezoo.models.")


def display_name(cls: type) -> str:
    """The registry name of a class as shown in messages; the name of the class if it is not registered."""
    return name_of(cls) or cls.__name__


def name_of(cls: type) -> str | None:
    """The registry name of a class, or None if it is not registered."""
    if is_built_in(cls):
        return cls.__module__.rpartition(".")[2]
    for point in entry_points(group=GROUP):
        if (cls.__module__, cls.__qualname__) == (point.module, point.attr):
            return point.name
        with suppress(AttributeError):
            if attrgetter(point.attr)(sys.modules.get(point.module)) is cls:
                return point.name
    return None
