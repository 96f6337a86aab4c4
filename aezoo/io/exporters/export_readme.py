"""README.md in the folder of exported files: input, outputs and an example for each file."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aezoo.errors import AezooError
from aezoo.io import atomic_files

NAME = "README.md"
_HEAD = "# Exported by aezoo\n"
_MAX_COLUMNS = 50

_ONNX = """\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{file}")
about = session.get_modelmeta().custom_metadata_map
{name} = np.zeros({shape}, np.{dtype})  # replace with your values
{outputs} = session.run(None, {{"{name}": {name}}})
print({shown})
"""
_PT2 = """\
import torch

about = {{"metadata.json": ""}}  # will contain the metadata
run = torch.export.load("{file}", extra_files=about).module()
{name} = torch.zeros({shape}, dtype=torch.{dtype})  # replace with your values
{outputs} = run({name})
print({shown})
"""
_WEIGHTS = """\
from safetensors import safe_open

with safe_open("{file}", "np") as file:
    about = file.metadata()
    weights = {{name: file.get_tensor(name) for name in file.keys()}}
print(about["model"], about["hyperparameters"], list(weights))
"""


class Readme:
    """README.md of a folder, with a section for each exported file.

    Args:
        folder: the folder.
        force: whether a README.md from another source may be replaced.

    Raises:
        AezooError: there is a README.md from another source.
    """

    def __init__(self, folder: Path, force: bool) -> None:
        self.path = folder / NAME
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else _HEAD
        if not text.startswith(_HEAD):
            if not force:
                raise AezooError(f"{self.path} is not from aezoo: choose another folder with --out DIR, or replace "
                                 "it with --force true")  # fmt: skip
            text = _HEAD
        parts = text.removeprefix(_HEAD).split("\n## ")[1:]
        self._sections = {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}

    def write(self, name: str, section: str, cure: str) -> Path:
        """Add or replace the section of a file; return the path."""
        self._sections[name] = section
        text = _HEAD + "".join(f"\n## {key}\n{part.rstrip()}\n" for key, part in sorted(self._sections.items()))
        atomic_files.write(self.path, lambda file: file.write(text.encode()), cure=cure)
        return self.path


def section(name: str, metadata: Mapping[str, str], checked: str) -> str:
    """Return the section of a file, in Markdown.

    Args:
        name: name of the file.
        metadata: see `aezoo.tasks.export`.
        checked: how the file was checked.
    """
    given, outputs = json.loads(metadata["input"]), json.loads(metadata["outputs"])
    is_graph = not name.endswith(".safetensors")
    lines = ["", f"`{metadata['function']}` of the model `{metadata['model']}`, {checked}.", ""]
    lines += ["| | name | type | shape | values |", "|---|---|---|---|---|"]
    lines.append(f"| input | `{given['name']}` | {given['dtype']} | {_shape(given['shape'])} | {given['range_text']} |")
    for part in outputs:
        name_and_type = f"`{part['name']}` | {part['dtype']} | {_shape(part['shape'])}"
        lines.append(f"| output | {name_and_type} | {_meaning(part['name'], metadata)} |")
    if not is_graph:
        lines += [
            "",
            f"The file contains the {metadata['function']} weights, but no graph. Input scaling: {_scaling(metadata)}.",
        ]
    elif "data_units" in metadata:
        lines += ["", f"Values are in the units of the training data. Scaling in the graph: {_scaling(metadata)}."]
    else:
        lines += ["", "Values are in the scale of the model's input: the graph does not scale them."]
    for key, what in (("columns", "Columns, in this order"), ("class_names", "Classes of the data")):
        if key in metadata:
            lines += ["", f"{what}: {_names(json.loads(metadata[key]))}."]
    if "threshold" in metadata:
        lines += ["", f"Threshold of the score `{metadata['score']}`: {float(metadata['threshold']):.6g}, "
                  f"{metadata['calibration']}. Larger scores are anomalies."]  # fmt: skip
    example = _ONNX if name.endswith(".onnx") else _PT2 if is_graph else _WEIGHTS
    code = example.format(
        file=name, name=given["name"], shape=(2, *given["shape"][1:]), dtype=given["dtype"],
        outputs=", ".join(part["name"] for part in outputs) + "," * (len(outputs) == 1),
        shown=", ".join(part["name"] if len(part["shape"]) == 1 else f"{part['name']}.shape" for part in outputs),
    )  # fmt: skip
    return "\n".join([*lines, "", "```python", code.rstrip(), "```", ""])


def _meaning(name: str, metadata: Mapping[str, str]) -> str:
    return {
        "z": "codes, the mean of a posterior",
        "x_hat": "samples, in the units of the data"
        if "data_units" in metadata
        else "samples, scaled as the model's input",
        "score": "larger is more anomalous",
        "is_anomaly": "whether the score is above the threshold",
        "p_value": "fraction of normal samples with at least this score, a conformal p-value",
        "indices": "indices into the codebooks",
    }[name]


def _scaling(metadata: Mapping[str, str]) -> str:
    units: dict[str, Any] = json.loads(metadata.get("data_units", "{}"))
    if "offset" in units:
        return "(x - offset) / factor, both in `data_units` of the metadata"
    return "bytes are divided by 255" if units.get("white") == 255 and units.get("levels") == 255 else "none"


def _shape(shape: list[Any]) -> str:
    return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"


def _names(names: list[str]) -> str:
    # a name may contain anything, also line breaks and characters of Markdown
    shown = [re.sub(r"\s+", " ", str(name)).replace("`", "'") for name in names[:_MAX_COLUMNS]]
    more = f" and {len(names) - _MAX_COLUMNS:,} more, in the metadata" if len(names) > _MAX_COLUMNS else ""
    return ", ".join(f"`{name}`" for name in shown) + more
