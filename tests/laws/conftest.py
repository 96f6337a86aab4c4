"""Seed all laws, and run laws of several models in the test file of each model."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from law_fixtures import _seed  # noqa: F401

from aezoo import list_models

# pytest rewrites assertions of other modules only on request
pytest.register_assert_rewrite(
    *(path.stem for path in Path(__file__).parent.rglob("*.py") if path.stem.endswith(("_laws", "_helpers")))
)


def _names(value: object) -> Iterator[str]:
    """Names of models in a parameter: strings, and the modules of model classes and their bases."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, type):
        yield from (base.__module__.rsplit(".", 1)[1] for base in value.__mro__ if "aezoo.models." in base.__module__)
    elif isinstance(value, dict | list | tuple):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _names(part)


def _is_of_its_file(item: pytest.Function, known: dict[str, str]) -> bool:
    named = [known[name] for value in item.callspec.params.values() for name in _names(value) if name in known]
    return named[0] == item.path.stem.removeprefix("test_")


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector: pytest.Module, obj: Any) -> Iterator[None]:
    """A law of several models is imported by the test file of each model; only the cases of this model are kept."""
    made = yield
    if not isinstance(made, list) or getattr(obj, "__module__", collector.obj.__name__) == collector.obj.__name__:
        return made
    known = {name: name for name in list_models()} | getattr(sys.modules[obj.__module__], "MODEL_OF", {})
    return [item for item in made if _is_of_its_file(item, known)]
