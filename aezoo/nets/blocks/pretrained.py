"""Weights of torchvision's networks that torch.hub has already stored on this machine; nothing is downloaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from aezoo.errors import AezooError


def cached_file(name: str) -> Path:
    """The path of the default weights of a torchvision network, once they have been fetched."""
    from torchvision import models

    url = cast(Any, models.get_model_weights(name)).DEFAULT.url
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])


@contextmanager
def cached_weights(name: str, alternative: str, file: Path | None = None) -> Iterator[dict[str, Any]]:
    """Weights by parameter, to be loaded inside the context, so that an error names a file that does not fit.

    Args:
        name: name of a torchvision network, or of a kind of networks if a file is given.
        alternative: what to do without the weights, for the message.
        file: the user's own file; None for torchvision's.

    Raises:
        AezooError: there is no such file, or it does not contain these weights.
    """
    fetch = f"fetch them once, python -c \"import torchvision; torchvision.models.{name}(weights='DEFAULT')\""
    absent, broken = ("give another path",) * 2 if file else (fetch, f"remove it and {fetch}")
    file = file or cached_file(name)
    if not file.is_file():
        raise AezooError(f"no weights of {name} in {file}: {absent}, or {alternative}")
    try:
        yield torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file can end in any error
        reason = type(error).__name__
        raise AezooError(f"{file} contains no weights of {name} ({reason}): {broken}, or {alternative}") from error
