"""The rows of one model for all commands: train it once and run the commands. Run by `benchmarks.tasks`.

A row has a `method`, its `kind` (ours; baseline: what a user would use without a model; reference: neither of them,
such as real samples or a bound) and the command's figures.
"""

import shutil
import tempfile
import traceback
from pathlib import Path

import lightning.pytorch as pl
import torch

import aezoo
from aezoo.errors import AezooError
from aezoo.tasks.detect import detect
from aezoo.tasks.samples import SampleSet

from . import processes
from .convergence import Budget
from .quality_row import open_data, quiet_trainer, train_to_convergence
from .tasks_commands import BASELINE, COMMANDS, OURS, CommandInputs, Row

# largest number of features for nap; beyond it the covariance takes seconds for each class
_MAX_NAP_FEATURES = 2_000


def measure(spec: Row) -> Row:
    """Rows of each command, `{"commands": {command: rows}}`; a failed command has one row, which records the reason.

    Args:
        spec: model (its name in the tables), registered (its name in the registry), hyperparameters, data (arguments of
            the DataModule), seed, steps, seconds, detect_seconds, commands, fit_rows, test_rows, accelerator; baselines
            (the parts of commands whose baselines are requested), pictures (the commands that should draw pictures)
            and folder (where the pictures go).
    """
    data = open_data(spec["data"], spec["seed"])
    test, train = (
        SampleSet.from_data(data, "test").subsample(spec["test_rows"]),
        SampleSet.from_data(data, "train").subsample(spec["fit_rows"]),
    )
    commands = list(spec["commands"])
    # detect trains on one class at a time
    model = train_model(spec, data, spec["seconds"]) if {*commands} - {"detect"} else None
    found: dict[str, list[Row]] = {}
    for command in commands:
        with tempfile.TemporaryDirectory() as folder:
            out = folder if command in spec["pictures"] else None
            try:
                if command == "detect":
                    found[command] = _detect(spec, data, test, out)
                else:
                    assert model is not None
                    found[command] = COMMANDS[command](
                        CommandInputs(spec, model, train, test, spec["baselines"].get(command, []), out)
                    )
            except Exception as error:
                traceback.print_exc()
                found[command] = [{"method": spec["model"], "kind": OURS, **processes.error_columns(error)}]
            if out is not None:
                _copy_picture(command, Path(folder), Path(spec["folder"]))
    return {"commands": found}


def train_model(spec: Row, data: aezoo.DataModule, seconds: float) -> aezoo.Autoencoder:
    """Train a model for the spec's steps, or else until its validation loss stops improving, at most `seconds`."""
    pl.seed_everything(spec["seed"], workers=True, verbose=False)
    model = aezoo.create_model(spec["registered"], data.input_shape, **spec["hyperparameters"])
    if spec["steps"]:
        trainer = quiet_trainer(spec, max_steps=spec["steps"])
        trainer.fit(model, data)
    else:
        _, trainer = train_to_convergence(spec, model, data, Budget(seconds=seconds))
    return model.to(trainer.strategy.root_device).eval()


def _detect(spec: Row, data: aezoo.DataModule, test: SampleSet, out: str | None) -> list[Row]:
    """One-vs-rest: one model for each class, trained on this class only."""
    if not data.num_classes:
        raise AezooError(f"{data.name} has no classes for one-vs-rest")
    names = data.source.class_names or tuple(map(str, range(data.num_classes)))
    rows: list[Row] = []
    for name in names[: spec["classes"]]:
        part = open_data(spec["data"] | {"train_classes": [name]}, spec["seed"])
        model = train_model(spec, part, spec["detect_seconds"])
        scores = _scores(model)
        found = detect(
            model,
            test,
            score=",".join(scores),
            normal=name,
            baselines="detect" in spec["baselines"],
            fit_on=SampleSet.from_data(part, "train").subsample(spec["fit_rows"]),
            calibrate_on=SampleSet.from_data(part, "val"),
            out=out if name == names[-1] else None,
            seed=spec["seed"],
        )
        for row in found.rows:
            ours = row["method"] in scores
            method = f"{spec['model']}, {row['method']}" if ours else _DETECTORS[row["method"]]
            cells = {"method": method, "kind": OURS if ours else BASELINE, "class": name}
            cells |= {"auroc": row["auroc"], "aupr": row["aupr"], "error": row.get("note") or ""}
            rows.append(cells)
    return rows


_DETECTORS = {
    "pca": "PCA's error", "mean": "distance to the mean sample", "knn": "5th-nearest neighbour",
    "isolation_forest": "isolation forest",
}  # fmt: skip


def _scores(model: aezoo.Autoencoder) -> list[str]:
    """The scores of a model, without nap if there are so many features that it would take minutes.

    elbo and iwae are left out: with 64 draws per sample they would take most of the time.
    """
    from aezoo.tasks.detect_scores import pathway

    with torch.no_grad():
        features = pathway(model, torch.zeros(2, *model.input_shape, device=model.device)).shape[1]
    return ["deviance", "nll", "mse", "mahalanobis", "sap", *(["nap"] if features <= _MAX_NAP_FEATURES else [])]


# ---- help -----------------------------------------------------------------------------------------------------------

# for each command, the picture that is shown in the report
PICTURES = {
    "reconstruct": "reconstructions",
    "generate": "samples",
    "denoise": "denoised",
    "detect": "anomalies",
    "embed": "plane",
    "compress": "rate_distortion",
}


def _copy_picture(command: str, folder: Path, home: Path) -> None:
    source = folder / f"{PICTURES[command]}.png"
    if source.is_file():
        home.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, home / f"task-{command}.png")


if __name__ == "__main__":
    processes.run_measurement(measure)
