"""Reads the file of an offline W&B run, whose records are W&B's own messages.

A LevelDB log with a custom header: blocks of 32 KiB, in which each part of a record has 4 bytes of checksum, 2 of
length and 1 of type: whole (1), first (2), middle (3) or last part (4).
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK, _HEADER = 32768, 7


def records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file."""
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = _HEADER, b""
    while at < len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + _HEADER])
        parts += data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


class OfflineRun:
    """The contents of W&B for the run of a folder, over all of its starts.

    Attributes:
        ids: ids of its starts.
        history: values by key, in order.
        config: the last hyperparameters.
    """

    def __init__(self, folder: Path) -> None:
        self.ids: list[str] = []
        self.history: dict[str, list[Any]] = {}
        self.config: dict[str, Any] = {}
        self.files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
        for record in (record for file in self.files for record in records(file)):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.ids.append(record.run.run_id)
                self._configure(record.run.config)
            elif kind == "config":
                self._configure(record.config)
            elif kind == "history":
                for item in record.history.item:
                    key = item.key or ".".join(item.nested_key)
                    self.history.setdefault(key, []).append(json.loads(item.value_json))

    def _configure(self, config: Any) -> None:
        self.config |= {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in config.update}
