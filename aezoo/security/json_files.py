"""Reading of untrusted JSON files up to a maximum size."""

import json
from pathlib import Path
from typing import Any

from aezoo.errors import AezooError


def read(path: Path, most: int, label: str) -> Any:
    """The content of a JSON file.

    Args:
        path: the file.
        most: its largest size in bytes.
        label: what messages call it.

    Raises:
        AezooError: it cannot be read, is larger, or is not JSON.
    """
    try:
        with path.open("rb") as file:
            text = file.read(most + 1)
        if len(text) > most:
            raise ValueError(f"it has more than {most} bytes")
        return json.loads(text.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AezooError(f"cannot read {label}: {' '.join(str(error).split())[:200]}") from error
