"""A trainer that prints and writes nothing."""

from typing import Any

import lightning.pytorch as pl

OUTPUTS = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")


def quiet_trainer(**settings: Any) -> pl.Trainer:
    return pl.Trainer(**{"accelerator": "cpu", **dict.fromkeys(OUTPUTS, False), **settings})
