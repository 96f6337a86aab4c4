"""Files of a model of another library, in a folder or in a repository on the hub."""

import contextlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import safe_open
from torch import Tensor

from aezoo.errors import AezooError
from aezoo.io import hub_files
from aezoo.security import json_files, weight_files, weights

_MAX_JSON = 2**24


class _Callback:
    """Placeholder for a class of Lightning."""


# checkpoints of Lightning before 1.5 use these classes as keys of callback states
_KEYS_OF_LIGHTNING: tuple[tuple[Any, str], ...] = tuple(
    (_Callback, f"pytorch_lightning.callbacks.{name}")
    for name in ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping")
)


class WeightSource:
    """The files at an address; files on the hub are downloaded on demand, all from one commit.

    Attributes:
        address: the address given by the user.
        given: the name of the file if the address is that of a file; None for a folder.

    Args:
        address: a file or a folder, or `hf://owner/name[/path][@revision]`.

    Raises:
        AezooError: there is no such file or folder; or as in `aezoo.io.hub_files.Repository`.
    """

    def __init__(self, address: str | Path) -> None:
        self.address = str(address)
        self.given: str | None = None
        self._read: dict[str, Any] = {}
        if hub_files.is_address(address):
            name, inside, revision = hub_files.split(self.address)
            self._repository: hub_files.Repository | None = hub_files.Repository(name, revision)
            if inside in self._repository.files:
                inside, self.given = str(PurePosixPath(inside).parent), PurePosixPath(inside).name
            self._inside = "" if inside == "." else inside
            if not self.names:
                raise AezooError(f"{name} has no file or folder {inside!r}: see its list of files on the hub")
            return
        if "://" in self.address:
            raise AezooError(f"models are read from this disk or hf://, not from {address}: download it first")
        self._repository = None
        self._folder = Path(address)
        if not self._folder.exists():
            raise AezooError(f"there is no file or folder {address}: check the path")
        if not self._folder.is_dir():
            self._folder, self.given = self._folder.parent, self._folder.name

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Sorted names of the files, relative to the folder; for local folders at most two levels deep.

        For an address of a file that is not JSON, only those in its folder.
        """
        if self._repository is not None:
            start = f"{self._inside}/" if self._inside else ""
            return tuple(sorted(name.removeprefix(start) for name in self._repository.files if name.startswith(start)))
        return tuple(sorted(path.relative_to(self._folder).as_posix() for path in self._files()))

    def _files(self) -> Iterator[Path]:
        # a weights file may be in a folder with many other files, so only the folder itself is listed
        depth = 3 if self.given is None or self.given.endswith(".json") else 1
        for pattern in ("*", "*/*", "*/*/*")[:depth]:
            yield from filter(Path.is_file, self._folder.glob(pattern))

    def has(self, *names: str) -> bool:
        """Return whether all these files exist."""
        return all(name in self.names for name in names)

    def one_file(self, *suffixes: str) -> str | None:
        """Return the file of the address, or the only one in its folder, with one of these suffixes, or None."""
        names = [self.given] if self.given is not None else [name for name in self.names if "/" not in name]
        found = [name for name in names if name.endswith(suffixes)]
        return found[0] if len(found) == 1 else None

    def path(self, name: str) -> Path:
        """Return the path of a local file, downloading it if needed.

        Raises:
            AezooError: the file does not exist, is a device or a pipe, or cannot be downloaded.
        """
        if name not in self.names:
            raise AezooError(f"{self.address} has no file {name}")
        if self._repository is not None:
            return self._repository.download(f"{self._inside}/{name}" if self._inside else name)
        return self._folder / name

    @property
    def location(self) -> str:
        """The full address with its folder names, by which some libraries distinguish formats."""
        if self._repository is not None:
            return self.address
        return str(self._folder.resolve() / (self.given or ""))

    def json(self, name: str, most: int = _MAX_JSON) -> dict[str, Any]:
        """Return the content of a JSON file that contains an object.

        Args:
            name: the file.
            most: maximum size in bytes, by default 16 MiB.

        Raises:
            AezooError: as in `path`; or the file is larger or not such a file.
        """
        if name not in self._read:
            content = json_files.read(self.path(name), most, self.label(name))
            if not isinstance(content, dict):
                raise AezooError(
                    f"cannot read {self.label(name)}: it contains a {type(content).__name__} instead of an object"
                )
            self._read[name] = content
        found: dict[str, Any] = self._read[name]
        return found

    def content(self, name: str) -> Any:
        """Return the tensors and plain values of a `.pt`, `.pth`, `.bin` or `.ckpt` file; for others, see `tensors`.

        Raises:
            AezooError: as in `path`; or the file is damaged or contains objects that could run code.
        """
        if name not in self._read:
            self._read[name] = weight_files.read(self.path(name), self.label(name), _KEYS_OF_LIGHTNING)
        return self._read[name]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors, by name, of a file that contains nothing else.

        Raises:
            AezooError: as in `content`; or a value is not a dense tensor.
        """
        return self._dense(self.content(name), name)

    def keys(self, name: str) -> tuple[str, ...]:
        """Return the names of the values in a file, or in its `state_dict` or `model_state_dict`; () for other content.

        For safetensors, only the header is read.

        Raises:
            AezooError: as in `content`.
        """
        if PurePosixPath(name).suffix == ".safetensors" and name not in self._read:
            with self._header(name) as file:
                return tuple(file.keys())
        return tuple(self._state_dict(name) or ())

    def some_tensors(self, name: str, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
        """Return the tensors of a file, or of its state dict as in `keys`, whose names have one of these prefixes.

        For safetensors, only these are read.

        Raises:
            AezooError: as in `content`; or there are no named values, or one is not a dense tensor.
        """
        if PurePosixPath(name).suffix == ".safetensors" and name not in self._read:
            with self._header(name) as file:
                return {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefixes)}  # noqa: SIM118
        if (found := self._state_dict(name)) is None:
            raise AezooError(f"{self.label(name)} contains no named weights")
        return self._dense({key: value for key, value in found.items() if key.startswith(prefixes)}, name)

    def _state_dict(self, name: str) -> dict[str, Any] | None:
        found = self.content(name)
        if isinstance(found, dict):
            found = found.get("state_dict", found.get("model_state_dict", found))
        return found if isinstance(found, dict) and all(isinstance(key, str) for key in found) else None

    def _dense(self, found: object, name: str) -> dict[str, Tensor]:
        if not isinstance(found, dict):
            raise AezooError(f"{self.label(name)} contains a {type(found).__name__} instead of named tensors")
        return weights.check_tensors(found, Path(self.label(name)), "any model")

    @contextlib.contextmanager
    def _header(self, name: str) -> Iterator[Any]:
        path = self.path(name)
        try:
            with safe_open(path, "pt") as file:
                yield file
        except AezooError:
            raise
        except Exception as error:  # an invalid header can cause any exception
            raise AezooError(f"cannot read {self.label(name)}: {_brief(error)}; download it again") from error

    def label(self, name: str) -> str:
        """Return the name of a file for messages."""
        return f"{self.address}: {name}" if self._repository is not None else str(self._folder / name)


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
