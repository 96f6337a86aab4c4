"""The classes that a configuration may name: those of aezoo, of listed parts of lightning and torch, and of plug-ins.

A `class_path` in YAML is an import and a call, so it executes code. jsonargparse consults this policy before it imports
anything that a value names. Only the command line and the environment can extend the policy; a file cannot.
"""

import os
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import yaml

from aezoo.errors import AezooError
from aezoo.security import yaml_text

FLAG, VARIABLE = "--allow", "AEZOO_ALLOW"
REMOTE_FLAG = "--allow_remote"
# parts of lightning with objects that a Trainer takes; not its cli, and not its utilities, which load pickles
PACKAGES = (
    "aezoo",
    "torch.nn",
    "torch.optim",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "lightning.fabric.plugins",
)
# modules that start runs or processes; users call them, but a file must not name them
_DENIED_MODULES = ("aezoo.cli", "aezoo.cli.lightning_cli", "aezoo.security", "aezoo.testing")
_GROUPS = ("aezoo.models", "aezoo.data")
_opened: set[str] = set()
_remote = False


def allow_remote(argv: Iterable[str]) -> list[str]:
    """Arguments without `--allow_remote`, which lets sources of data open addresses until the next call.

    Raises:
        AezooError: the flag has another value than true or false.
    """
    global _remote
    kept, values = _split(argv, REMOTE_FLAG, lambda rest: rest.pop(0) if _is_truth(rest[:1]) else "true")
    _remote = False
    for value in values:
        if not _is_truth([value]):
            raise AezooError(f"{REMOTE_FLAG} takes no value, got {value!r}")
        _remote = value.lower() == "true"
    return kept


def allows_remote() -> bool:
    """Whether `--allow_remote` is on this process's command line."""
    return _remote


def take_flags(argv: Iterable[str]) -> tuple[list[str], list[str]]:
    """Arguments without `--allow PKG`, and the names from these flags and `AEZOO_ALLOW` (comma-separated).

    Raises:
        AezooError: a flag without a package, or with another kind of value.
    """
    kept, values = _split(argv, FLAG, lambda rest: rest.pop(0) if rest else "")
    allowed = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()] + values
    for name in allowed:
        if not _is_dotted_name(name) or name.partition(".")[0] == "jsonargparse":
            raise AezooError(f"{FLAG} takes an importable package such as my_package, got {name!r}")
    return kept, allowed


def _split(argv: Iterable[str], flag: str, next_value: Callable[[list[str]], str]) -> tuple[list[str], list[str]]:
    """Arguments without a flag, and its values; `next_value` takes one without = from the arguments after the flag."""
    kept: list[str] = []
    values: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name != flag:
            kept.append(word)
        else:
            values.append(value if equals else next_value(rest))
    return kept, values


def _is_truth(words: list[str]) -> bool:
    return [word.lower() for word in words] in (["true"], ["false"])


def typed_class(path: str, base: type) -> str:
    """Import a class that the user has typed after `--model`, and return the path of its definition.

    Args:
        path: dotted path such as `my_package.MyModel`.
        base: required base class.

    Raises:
        AezooError: it cannot be imported, or is not a subclass of `base`.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # the module may raise anything while it is imported
        reason = " ".join(str(error).split())
        raise AezooError(
            f"--model {path} cannot be imported ({type(error).__name__}: {reason}): give a name of `aezoo list` or the "
            "path of a class"
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise AezooError(f"--model {path} is not a subclass of aezoo.{base.__name__}: give a name of `aezoo list`")
    return f"{found.__module__}.{found.__qualname__}"


def is_class_path(text: str) -> bool:
    """Whether a word after `--model` is a dotted path and not a name, a file or inline YAML."""
    return "." in text and _is_dotted_name(text) and not Path(text).exists()


def enforce(allowed: Iterable[str] = ()) -> None:
    """Apply the policy to all parsers of this process; permissions from an earlier call are withdrawn.

    Args:
        allowed: additional packages or classes that the user trusts.
    """
    # first, because this import enables reading of remote configurations
    import lightning.pytorch.cli  # noqa: F401
    from jsonargparse import get_loader, set_loader, set_parsing_settings

    if not hasattr(get_loader("yaml"), yaml_text.GUARD):
        set_loader("yaml", yaml_text.guarded(get_loader("yaml")), exceptions=(yaml.YAMLError,))
    plugins = {point.module.partition(".")[0] for group in _GROUPS for point in entry_points(group=group)}
    opened = {*PACKAGES, *plugins, *allowed}
    _opened.update(opened)
    # the most specific entry decides, so an old entry below a new one must be allowed like the new one
    valid = {entry for entry in _opened if any(f"{entry}.".startswith(f"{root}.") for root in opened)}
    set_parsing_settings(
        import_path_denylist=["*", *sorted(_opened - valid), *_DENIED_MODULES],
        import_path_allowlist=sorted(valid),
        instantiate_subclass_spec_in_any=False,
        config_read_mode_urls_enabled=False,
        config_read_mode_fsspec_enabled=False,
    )


def refusal(path: str, entry: str) -> str:
    """The one-line message for a class path that the policy rejects; `entry` is the responsible entry of the policy."""
    rule = (
        "a configuration can name only classes of aezoo, torch.nn, torch.optim, installed plug-ins, and lightning's "
        "callbacks, loggers, plugins, profilers and strategies"
    )
    if entry == "*" or entry in _opened:
        return f"{path} is not imported: {rule}; if you trust that package, add {FLAG} {path.partition('.')[0]}"
    return f"{path} is not run: {rule}, and never {entry} unless you add {FLAG} {path}"


def _is_dotted_name(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))
