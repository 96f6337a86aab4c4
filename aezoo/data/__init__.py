"""One DataModule, and one file per source."""

from aezoo.data.datamodule import DataModule
from aezoo.data.source import ArrayDataset, Options, Source
from aezoo.data.source_registry import list_data

__all__ = ["ArrayDataset", "DataModule", "Options", "Source", "list_data"]
