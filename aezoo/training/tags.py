"""Tags: pretrained weights by name, such as `vae.mnist`, read from JSON files without torch.

Those of this package are in `aezoo/weights/tags.json`. A third-party package names such a file in an entry point:

    [project.entry-points."aezoo.weights"]
    my_package = "my_package:pretrained.json"

The file maps each tag, `NAME.TAG` with the name of a registered model, to an object with the fields of `Tag`. A source
is a folder next to the file, as `aezoo.save_model` writes it, or an address `hf://owner/name[/path]`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from aezoo.errors import AezooError

GROUP = "aezoo.weights"
HUB = "hf://"
_OWN = Path(__file__).parent.parent / "weights" / "tags.json"
_NAME = re.compile(r"\w+\.\w+", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Figure:
    """A measured or published figure.

    Attributes:
        metric: its name, e.g. `mse` or `log p(x)`.
        value: its value.
        split: the samples that it was measured on, e.g. `test`.
        seeds: seeds of the trainings over which it is the mean; () if unknown.
        note: further information that is needed to compare it.
    """

    metric: str
    value: float
    split: str = "test"
    seeds: tuple[int, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.4g}"


@dataclass(frozen=True)
class Tag:
    """Pretrained weights of a model.

    Attributes:
        name: `NAME.TAG`.
        source: the folder that contains them, or an address on the hub without revision.
        sha256: SHA-256 of each file, by its name in the source.
        license: SPDX identifier of the weights' licence.
        input_shape: shape of one sample.
        input_range: smallest and largest value of a sample.
        data: settings of the DataModule for the data: `name`, and others that change the samples.
        revision: commit of a source on the hub; None for a folder.
        bytes: size of the files; 0 if unknown.
        figures: what we measured, the most important one first.
        authors_figure: what the authors state; None if they state nothing, or for our own weights.
        recipe: settings of the training, or the paper's; empty if unknown.
        command: the command that made the weights; empty if unknown.
        owner: the distribution that provides the entry.
    """

    name: str
    source: str
    sha256: Mapping[str, str]
    license: str
    input_shape: tuple[int, ...]
    input_range: tuple[float, float]
    data: Mapping[str, Any]
    revision: str | None = None
    bytes: int = 0
    figures: tuple[Figure, ...] = field(default=())
    authors_figure: Figure | None = None
    recipe: str = ""
    command: str = ""
    owner: str = "aezoo"

    @property
    def model(self) -> str:
        """The registry name of the model."""
        return self.name.partition(".")[0]

    @property
    def is_remote(self) -> bool:
        """Whether the files are on the hub."""
        return self.source.startswith(HUB)


@lru_cache(maxsize=1)
def all_tags() -> dict[str, Tag]:
    """All tags by name: the package's and those of plug-ins.

    Raises:
        AezooError: the file of a plug-in is missing or damaged, or two packages claim one tag.
    """
    found = dict(read(_OWN, "aezoo")) if _OWN.is_file() else {}
    for point in {(point.name, point.value): point for point in entry_points(group=GROUP)}.values():
        owner = point.dist.name if point.dist else point.value
        for name, tag in read(_file_of(point, owner), owner).items():
            if name in found:
                raise AezooError(
                    f"two packages have weights named {name!r}: {found[name].owner} and {owner}; uninstall one of them"
                )
            found[name] = tag
    return found


def _file_of(point: EntryPoint, owner: str) -> Path:
    """The JSON file that an entry point `package:file.json` names."""
    try:
        spec = find_spec(point.module)
    except (ImportError, ValueError):
        spec = None
    homes = [] if spec is None else spec.submodule_search_locations or []
    files = [path for home in homes if (path := Path(home) / point.attr).is_file()]
    if not files:
        raise AezooError(
            f"{owner} names its weights in {point.value}, which is not a file of a package: give package:file.json as "
            f"the entry point of {GROUP}, or uninstall it"
        )
    return files[0]


def read(path: Path, owner: str) -> dict[str, Tag]:
    """The tags in a JSON file.

    Args:
        path: the file; folders are relative to its folder.
        owner: the distribution that provides it.

    Raises:
        AezooError: it is not such a file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: _tag(name, entry, path.parent, owner) for name, entry in content.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        raise AezooError(
            f"{path} of {owner} does not list pretrained weights ({reason}): fix or uninstall it"
        ) from error


def _tag(name: str, entry: dict[str, Any], home: Path, owner: str) -> Tag:
    given = dict(entry)
    source, sha256, revision = given.pop("source"), given.pop("sha256"), given.pop("revision", None)
    if not _NAME.fullmatch(name):
        raise ValueError(f"the tag {name!r} does not have the form NAME.TAG of letters, digits and _")
    if not sha256 or not all(isinstance(value, str) and _SHA256.fullmatch(value) for value in sha256.values()):
        raise ValueError(f"{name} has no SHA-256 of each of its files")
    if any(part in ("", ".", "..") for file in (source.removeprefix(HUB), *sha256) for part in file.split("/")):
        raise ValueError(f"{name} names files outside of its folder")
    if source.startswith(HUB) and not revision:
        raise ValueError(f"{name} names no revision, but repositories on a hub can change")
    if not isinstance(given.get("data"), dict) or not isinstance(given["data"].get("name"), str):
        raise ValueError(f"{name} does not name its data")
    if not isinstance(given.get("license"), str) or not isinstance(given.get("bytes", 0), int):
        raise ValueError(f"{name} has no licence, or its number of bytes is invalid")
    figures, authors = (given.pop(key, None) for key in ("figures", "authors_figure"))
    shape = tuple(int(size) for size in given.pop("input_shape"))
    low, high = map(float, given.pop("input_range"))
    return Tag(
        name=name,
        source=source if source.startswith(HUB) else str(home / source),
        sha256=dict(sha256),
        revision=revision,
        input_shape=shape,
        input_range=(low, high),
        figures=tuple(map(_figure, figures or ())),
        authors_figure=_figure(authors) if authors else None,
        owner=owner,
        **given,
    )


def _figure(entry: dict[str, Any]) -> Figure:
    return Figure(**{**entry, "value": float(entry["value"]), "seeds": tuple(entry.get("seeds", ()))})
