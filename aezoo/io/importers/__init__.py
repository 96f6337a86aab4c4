"""Import of weights of other libraries: each importer reads one format.

An importer is a module of this package, listed in `IMPORTERS`, with

    NAME: str                                  name of the format
    recognise(source: WeightSource) -> bool    from the names of the files, small JSON files and the keys of tensors
    read(source: WeightSource) -> Imported     the model, after all checks

Formats are tried in the order of the list, so formats with an explicit marker come before those recognised by their
keys. Files must not specify code: `.pt` is read with `weights_only=True`, `.npz` without pickles.
"""

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError
from aezoo.io.importers.source import WeightSource

IMPORTERS: tuple[str, ...] = (
    "sae_lens",
    "sparsify",
    "dictionary_learning",
    "pythae",
    "multivae",
    "gemma_scope",
    "gemma_scope_2",
    "llama_scope",
    "qwen_scope",
    "openai_sae",
    "diffusers",
    "taming",
    "compressai",
    "mae",
)


@dataclass(frozen=True)
class Imported:
    """A model that was read from files of another library.

    Attributes:
        model: the model, in eval mode, float32 on the CPU.
        found: description of the files, one line, e.g. "SAELens, JumpReLU, 2,304 inputs, 16,384 latents".
        notes: changes by the conversion, one line each, e.g. "decoder bias folded into the encoder's".
    """

    model: Autoencoder
    found: str
    notes: tuple[str, ...] = field(default=())


class Importer(Protocol):
    """Interface of the modules of this package."""

    NAME: str

    def recognise(self, source: WeightSource) -> bool: ...

    def read(self, source: WeightSource) -> Imported: ...


def find(source: WeightSource) -> Importer | None:
    """Return the importer for the format of the files, or None if there is none.

    Raises:
        AezooError: a file needed to determine the format is damaged or unsafe.
    """
    for name in IMPORTERS:
        importer = cast(Importer, importlib.import_module(f"{__name__}.{name}"))
        if importer.recognise(source):
            return importer
    return None


def import_model(address: str | Path) -> Imported:
    """Read a model written by another library.

    Args:
        address: a file or a folder, or `hf://owner/name[/path][@revision]` with a file or folder of the repository.

    Returns:
        The model, the format found and the changes made; `aezoo.save_model(imported.model, FOLDER)` saves it.

    Raises:
        AezooError: there is no such path; its format is unknown; or it is damaged, unsafe or of a kind that no model of
            the zoo represents.
    """
    source = WeightSource(address)
    importer = find(source)
    if importer is None:
        formats = ", ".join(importlib.import_module(f"{__name__}.{name}").NAME for name in IMPORTERS)
        raise AezooError(f"{address} has an unknown format: aezoo reads {formats}")
    return importer.read(source)


def import_if_known(address: str | Path, lenient: bool = False) -> Imported | None:
    """Like `import_model`, but return None for an unknown format and, if lenient, for unreadable files."""
    source = WeightSource(address)
    try:
        importer = find(source)
    except AezooError:
        if lenient:
            return None
        raise
    return None if importer is None else importer.read(source)
