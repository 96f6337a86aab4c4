"""YAML within limits: size, depth and aliases are checked before anything is built.

With nested aliases, a file of one kilobyte can expand to gigabytes (the "billion laughs" attack).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from aezoo.errors import AezooError

MAX_BYTES = 2**20
MAX_DEPTH = 32
# a few aliases are enough to repeat settings; 16 can multiply a text by at most 3^5
MAX_ALIASES = 16
GUARD = "checks_bounds"
# libyaml if PyYAML was built with it: ten times as fast
_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class RefusedYAML(yaml.YAMLError):
    """YAML beyond the limits; a YAMLError, so every reader of YAML handles it."""


def check(text: str) -> None:
    """Reject a text that is too large, too deep or has too many aliases, without building its content.

    Raises:
        RefusedYAML: the text exceeds a limit.
        yaml.YAMLError: the text is not YAML.
    """
    budget = [MAX_ALIASES]
    _check(text, budget, 0)


def load(text: str) -> Any:
    """The content of a YAML text, within limits.

    Raises:
        yaml.YAMLError: beyond the limits, not YAML, or a value that cannot be built.
    """
    check(text)
    try:
        return yaml.safe_load(text)
    except (ValueError, OverflowError, RecursionError, TypeError, AttributeError, KeyError, IndexError) as error:
        # dates such as 2020-13-45, and numbers with thousands of digits
        raise RefusedYAML(f"a value that cannot be read: {error}") from error


def read(path: Path) -> Any:
    """The content of a YAML file, within limits.

    Raises:
        AezooError: unreadable, not YAML, or beyond the limits.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise RefusedYAML(_too_large())
        return load(data.decode("utf-8"))
    except RefusedYAML as error:
        raise AezooError(f"{path} is refused: {' '.join(str(error).split())[:200]}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise AezooError(f"cannot read {path} as YAML: {' '.join(str(error).split())[:200]}") from error


def guarded(loader: Callable[[str], Any]) -> Callable[[str], Any]:
    """A loader of YAML text that checks the text first."""

    def load_within_bounds(text: str) -> Any:
        check(text)
        try:
            return loader(text)
        except yaml.YAMLError:
            raise
        except Exception as error:  # as in `load`
            raise RefusedYAML(f"a value that cannot be read: {error}") from error

    setattr(load_within_bounds, GUARD, True)
    return load_within_bounds


def _check(text: str, budget: list[int], level: int) -> None:
    if len(text) > MAX_BYTES:
        raise RefusedYAML(_too_large())
    depth = 0
    open_anchors: list[str | None] = []
    for event in yaml.parse(text, Loader=_PARSER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            open_anchors.append(event.anchor)
            if depth > MAX_DEPTH:
                raise RefusedYAML(f"it is nested more than {MAX_DEPTH} levels deep: flatten it")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            open_anchors.pop()
        elif isinstance(event, yaml.AliasEvent):
            budget[0] -= 1
            if event.anchor in open_anchors:
                raise RefusedYAML(f"the alias *{event.anchor} refers to a value that contains it")
            if budget[0] < 0:
                raise RefusedYAML(f"it has more than {MAX_ALIASES} aliases (*name): write the values out")
        elif isinstance(event, yaml.ScalarEvent) and level < 4 and "&" in event.value and "*" in event.value:
            # if a list is expected, jsonargparse reads a string as YAML again
            try:
                _check(event.value, budget, level + 1)
            except RefusedYAML:
                raise
            except yaml.YAMLError:
                continue  # an ordinary string


def _too_large() -> str:
    return f"it has more than {MAX_BYTES // 2**20} MiB, which no configuration needs"
