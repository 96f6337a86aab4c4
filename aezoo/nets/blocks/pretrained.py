"""Weights of torchvision's networks that torch.hub has already stored on this machine; nothing is downloaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from aezoo.errors import AezooError


def cached_file(name: str) -> Path:
    """Return the path where torch.hub stores the default weights of a torchvision network."""
    from torchvision import models

    url = cast(Any, models.get_model_weights(name)).DEFAULT.url
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])


@contextmanager
def cached_weights(name: str, alternative: str, file: Path | None = None) -> Iterator[dict[str, Any]]:
    """Provide weights by parameter, to be loaded inside the context, so that errors name the file.

    Args:
        name: name of a torchvision network, or of a kind of networks if a file is given.
        alternative: what the user can do without the weights, for the message.
        file: the user's file; None for torchvision's file.

    Raises:
        AezooError: the file does not exist or does not contain these weights.
    """
    fetch = f"fetch them once, python -c \"import torchvision; torchvision.models.{name}(weights='DEFAULT')\""
    absent, broken = ("give another path",) * 2 if file else (fetch, f"remove it and {fetch}")
    file = file or cached_file(name)
    if not file.is_file():
        raise AezooError(f"no weights of {name} in {file}: {absent}, or {alternative}")
    try:
        yield torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file, or a file of another kind, can cause any error
        reason = type(error).__name__
        raise AezooError(f"{file} contains no weights of {name} ({reason}): {broken}, or {alternative}") from error
