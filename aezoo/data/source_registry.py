"""Names of data sources: built-in ones and plug-ins (entry-point group `aezoo.data`)."""

import difflib
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatch
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from aezoo.data.idx import FAMILIES
from aezoo.data.image_folders import SPLITS
from aezoo.data.object_store import SCHEME
from aezoo.data.source import DEFAULTS, Options, Source
from aezoo.data.vision import VISION_SETS
from aezoo.deprecated import renamed
from aezoo.errors import AezooError
from aezoo.registry import owner_of, unique_points

Factory = Callable[[Options], Source]

# the module is imported when its name is used
_BUILT_IN = {
    "mnist5k": "mnist5k:Mnist5k",
    "digits": "digits:Digits",
    "shapes": "shapes:Shapes",
    "sample_photos": "sample_photos:SamplePhotos",
    "binarized_mnist": "binarized_mnist:BinarizedMnist",
    "folder": "folder:Folder",
    "array": "array:Array",
    "hf": "hf:open_hf",
    "stream": "stream:Stream",
    "synthetic_dictionary": "synthetic_dictionary:SyntheticDictionary",
    "activations": "activations:Activations",
    **dict.fromkeys(FAMILIES, "idx:Idx"),
    **dict.fromkeys(VISION_SETS, "vision:open_vision"),
}
GROUP = "aezoo.data"
# in a message
_MAX_NAMES = 8


def is_built_in(name: str) -> bool:
    """Whether a source is part of this package, not a plug-in."""
    return name in _BUILT_IN


def list_data(pattern: str = "*") -> list[str]:
    """Names of all sources that match a shell pattern, including plug-ins."""
    return sorted(name for name in {*_BUILT_IN, *_plugins()} if fnmatch(name, pattern))


def open_source(options: Options) -> Source:
    """The source that `options.name` names."""
    return _factory(options.name)(options)


def settings_of(name: str, settings: Mapping[str, Any]) -> Collection[str] | None:
    """The settings of a source in addition to those of all sources; None for a plug-in that declares none.

    Args:
        name: the source.
        settings: one may name another source, whose settings this one accepts as well.
    """
    factory = _factory(source_of_path(name) or name)
    own: Collection[str] | None = getattr(factory, "settings", None)
    nested_source = getattr(factory, "nested_source", "")
    other = str(settings.get(nested_source, DEFAULTS[nested_source])) if nested_source else name
    if own is None or other == name:
        return own
    others = settings_of(other, settings)
    return None if others is None else {*own, *others}


def sources_with(key: str) -> str:
    """The sources that have a setting, one of each kind, for a message."""
    kinds = {target: name for name, target in reversed(_BUILT_IN.items())}
    names = [name for name in reversed(kinds.values()) if key in getattr(_factory(name), "settings", ())]
    return ", ".join([*names[:_MAX_NAMES], *["..."] * (len(names) > _MAX_NAMES)])


def _factory(name: str) -> Factory:
    plugins = _plugins()
    if name in _BUILT_IN:
        module, attribute = _BUILT_IN[name].split(":")
        factory: Factory = getattr(import_module(f"aezoo.data.{module}"), attribute)
        return factory
    if name in plugins:
        return _load(plugins[name])
    close = difflib.get_close_matches(name.lower().replace("-", "_"), [*_BUILT_IN, *plugins], n=1)
    hint = f", did you mean {close[0]!r}?" if close else "."
    raise AezooError(f"unknown data {name!r}{hint} Known: {', '.join(list_data())}; or the path of your own")


def source_of_path(name: str) -> str | None:
    """The source that reads a path given as the name; None for a plain name."""
    if name in _BUILT_IN or name in _plugins():
        return None
    if name.startswith(SCHEME):
        return "stream"
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder_kind(path)
    if path.is_file():
        return "array"
    if len(path.parts) > 1 or path.suffix:
        where = "" if path.is_absolute() else f" (looked for in {Path.cwd()})"
        raise AezooError(f"no such file or folder: {name}{where}")
    return None


def _folder_kind(folder: Path) -> str:
    """The source that reads a folder, recognised by the files in it."""
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        return "hf"
    if (folder / "dataset_dict.json").is_file():
        return "hf"
    parts = [folder, *(child for child in folder.iterdir() if child.name.lower() in SPLITS)]
    return "stream" if any((part / "index.json").is_file() and any(part.glob("*.bin")) for part in parts) else "folder"


def _plugins() -> dict[str, EntryPoint]:
    """Entry points by name; an error names both packages that define a name twice."""
    found = unique_points(GROUP)
    for name in found.keys() & _BUILT_IN.keys():
        raise AezooError(
            f"the data name {name!r} is claimed by aezoo and by {owner_of(found[name])}: uninstall that one"
        )
    return found


def _load(point: EntryPoint) -> Factory:
    # a plug-in is only imported when its name is used, so a broken one does not affect the others
    try:
        factory: Factory = point.load()
    except Exception as error:
        raise AezooError(
            f"the data plug-in {point.name!r} of {owner_of(point)} cannot be imported "
            f"({type(error).__name__}: {error}): update or uninstall it"
        ) from error
    return factory


__getattr__ = renamed(__name__)
