"""Callbacks for the trainers of commands that run in this process."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from aezoo.cli.lightning_cli import AezooCLI


def add_callbacks(*more: pl.Callback, setattr: Callable[[Any, str, Any], None] = setattr) -> None:
    """Add callbacks to the trainers of commands; a test passes monkeypatch.setattr, which undoes it."""
    made = AezooCLI._instantiate_trainer
    setattr(
        AezooCLI,
        "_instantiate_trainer",
        lambda self, config, callbacks: made(self, config, [*callbacks, *more]),
    )
