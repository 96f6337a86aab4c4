"""The last lines of `aezoo info NAME`: a command to run, the model's measured figures, and better models.

`python -m benchmarks.report` writes the figures, `aezoo/results.json`, from the results of the benchmarks.
"""

import json
from pathlib import Path
from typing import Any

from aezoo import registry

RESULTS = Path(__file__).parent.parent / "results.json"
# the command that shows a model's first tag; reconstruct by default
_COMMANDS = {
    "anomaly": "detect",
    "generation": "generate",
    "compression": "compress",
    "representation": "embed",
    "disentanglement": "generate --traverse true",
    "interpretability": "embed",
    "denoising": "denoise --corrupt gaussian:0.3",
    "multimodal": "reconstruct --parts 0",
    "imputation": "impute --hide 0.2",
}


def lines(name: str) -> list[str]:
    """The lines for a registered model."""
    return ["Try it", f"  {command(name)}", "", *_figures(name)]


def command(name: str) -> str:
    """A command that trains the model on the data set in the package and shows its main use."""
    uses = registry.uses_of(name)
    command = _COMMANDS.get(uses[0] if uses else "", "reconstruct")
    return f"aezoo fit --model {name} && aezoo {command} --ckpt_path runs/{name}-mnist5k/0"


def _figures(name: str) -> list[str]:
    found = json.loads(RESULTS.read_text(encoding="utf-8")).get(name)
    if found is None:
        return ["Not measured yet: `aezoo benchmark` lists what measures models"]
    text = []
    if row := found["row"]:
        seeds = f"median of {row['seeds']} seeds" if row["seeds"] > 1 else "one seed"
        figures = ", ".join(_written(label, value) for label, value in row["figures"].items())
        text += [f"Measured on {row['data']}: {row['setting']}; test split, {seeds}", f"  {figures}", ""]
    text += ["Better models and baselines, on the same data with the same budget and size of code"]
    text += [line for of in found["compared"] for line in _comparison(of)]
    if pca := found.get("pca"):
        text += [
            "",
            f"Trained to convergence on {pca['data']}: {pca['ratio']:.3g} times the error of PCA with as large a code",
        ]
        text += [f"  {pca['without']:.3g} times with {pca['flags']}", f"  cause: {pca['cause']}"]
    return text


def _comparison(of: dict[str, Any]) -> list[str]:
    named = ", ".join(f"{other} {value:g}" for other, value in of["better"])
    others = f"{of['n_better']} of {of['n_rivals']} others: {named}" if named else f"none of {of['n_rivals']} others"
    others = others if of["n_rivals"] else "no other was measured in the same setting"
    return [
        f"  {of['use']}: {_written(of['measure'], of['value'])} on {of['data']}",
        *([f"    {of['setting']}"] if of["setting"] else []),
        f"    better: {others}",
    ]


def _written(template: str, value: float) -> str:
    return template.format(f"{value:g}")
