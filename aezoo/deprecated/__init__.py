"""Old module paths and names, which keep working for one release with a DeprecationWarning.

`aezoo/__init__.py` asks `spec` for a module that no file defines, so this is imported only for old paths.
"""

import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from aezoo.deprecated.paths import ATTRIBUTES, IN_PLACE, MODULES, MOVED

# frames between the import statement and the warning, without those of importlib, which `warnings` skips
_STACK_LEVEL = 3


class _Redirect(ModuleType):
    """A module whose attributes are those of another."""

    def __getattr__(self, name: str) -> Any:
        old = self.__name__.removeprefix("aezoo.")
        if name.startswith("__"):
            raise AttributeError(name)
        module = import_module(MOVED.get(f"{old}.{name}", MODULES[old]))
        renamed = ATTRIBUTES.get(f"{old}.{name}") or ATTRIBUTES.get(name, name)
        return getattr(module, renamed if hasattr(module, renamed) else name)


class _Loader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Redirect(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def spec(fullname: str) -> ModuleSpec | None:
    """How to import a module by its old path, with a DeprecationWarning; None for other paths."""
    old = fullname.removeprefix("aezoo.")
    if old not in MODULES:
        return None
    warnings.warn(
        f"{fullname} is now {MODULES[old]}, and the old path goes with the next release",
        DeprecationWarning,
        stacklevel=_STACK_LEVEL,
    )
    return ModuleSpec(fullname, _Loader())


def renamed(module: str) -> Callable[[str], Any]:
    """A `__getattr__` for a module that gives its attributes by their old names too, with a DeprecationWarning."""

    def get(name: str) -> Any:
        new = IN_PLACE.get(f"{module.removeprefix('aezoo.')}.{name}")
        if new is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} is now {new}, and the old name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(import_module(module), new)

    return get
