"""Run what five users do in their first hour, with all defaults: a CSV with one figure per row.

    python -m benchmarks.first_hour                         all five
    python -m benchmarks.first_hour --users table series    only these
    python -m benchmarks.first_hour --package ../before     another checkout of aezoo, into the column `before`
    python -m benchmarks.first_hour --page                  only write docs/design/first_hour.md from the CSV

    student       trains the article's network on digits, and a model on threes only, and detects other digits
    photographs   trains a convolutional VAE on 480 small photographs, and detects photographs with a damaged square
    table         trains a VAE on a table that is not scaled, and detects ill patients; the same in scikit-learn
    series        trains a VAE on windows of a time series, and detects bursts
    researcher    uses another network, writes a plug-in without attributes of the base class, and opens TensorBoard

Users run commands of `aezoo` and call `aezoo.sklearn`, with only the settings that their task needs. AUROC compares
anomalies with normal samples that were not used in training. `flagged` is the share of these normal samples above the
default threshold, which is set for 10 %. Its interval contains it with a probability of 95 % if the held-out samples
that set the threshold are like the new ones. `AUROC, nll` and `AUROC, mse` are those of --score nll and mse.
"""

import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aezoo.errors import AezooError

from .common import ROOT, ResultsCSV, build_parser, command_line, environment, results_folder, run_script
from .recipes import points

PAGE = ROOT / "docs" / "design" / "first_hour.md"
Floats = npt.NDArray[np.float32]
_PLUGIN = """
import torch
import aezoo
from torch import nn

class Loose(aezoo.Autoencoder):
    \"\"\"Encodes and decodes, and sets nothing that the contract names.\"\"\"

    def __init__(self, input_shape, **kwargs):
        super().__init__(input_shape, likelihood="gaussian", **kwargs)
        self.down, self.up = nn.Linear(30, 4), nn.Linear(4, 30)

    def encode(self, x):
        return self.down(x)

    def decode(self, z):
        return self.up(z)

    def loss(self, x, y=None):
        return {"loss": (self(x) - x).square().sum(1).mean()}
"""
_SKLEARN = """
import json, sys
import numpy as np
from aezoo.sklearn import AutoencoderDetector

train, normal = np.load("train.npy"), np.load("normal.npy")
found = AutoencoderDetector(sys.argv[1], random_state=0, **json.loads(sys.argv[2])).fit(train)
print(json.dumps(float((found.predict(normal) < 0).mean())))
"""


class User:
    """A folder to work in, and commands that are timed.

    Args:
        folder: an empty one.
        package: the checkout of aezoo that is used.
    """

    def __init__(self, folder: Path, package: Path) -> None:
        self.folder = folder
        self._variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(package), str(folder)])}

    def run(self, *words: str) -> tuple[str, float]:
        """The output of a command of Python, and its seconds.

        Raises:
            AezooError: it failed; the message is the last line of its output.
        """
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *words], cwd=self.folder, env=self._variables, capture_output=True, text=True, check=False
        )
        took = time.perf_counter() - began
        output = done.stdout + done.stderr
        if done.returncode:
            raise AezooError(output.strip().splitlines()[-1].replace(f"{self.folder}/", "")[:200])
        return output, took

    def aezoo(self, *words: str) -> tuple[str, float]:
        """The output of a command of aezoo, and its seconds."""
        return self.run("-m", "aezoo", *words)

    def fit(self, *words: str) -> tuple[Path, dict[str, Any]]:
        """Train; the run folder, and its figures."""
        before = {*self.folder.glob("runs/*/*")}
        output, seconds = self.aezoo("fit", *words)
        (run,) = {*self.folder.glob("runs/*/*")} - before
        found = points(run)
        parameters = re.search(r": ([\d,]+) parameters", output)
        code = re.search(r"^latent_dim: (\d+)$", (run / "hparams.yaml").read_text(encoding="utf-8"), re.MULTILINE)
        return run, {
            "parameters": parameters and int(parameters[1].replace(",", "")),
            "latent_dim": code and int(code[1]),
            "epochs": len(found["train/loss"]),
            "steps": max(step for curve in found.values() for step, _ in curve),
            "seconds": seconds,
            "test/psnr": found["test/psnr"][-1][1] if "test/psnr" in found else None,
            "test/loss": found["test/loss"][-1][1],
            "checkpoints, MB": sum(path.stat().st_size for path in run.rglob("*.ckpt")) / 1e6,
        }

    def verdict(self, run: Path, command: str, *words: str) -> dict[str, str]:
        """What a command prints about the comparison of a model with other methods."""
        try:
            output, _ = self.aezoo(command, "--ckpt_path", str(run), *words)
        except AezooError as error:
            return {"comparison": str(error)}
        said = re.findall(r"^(?:ahead of|no other method|smaller than|a baseline) .*$", output, re.MULTILINE)
        return {"comparison": "; ".join(said) or "nothing"}

    def detect(self, run: Path, normal: Floats, anomalies: Floats) -> dict[str, Any]:
        """AUROC and the share of normal samples that are flagged, by default and by scores that are named."""
        from scipy.stats import betabinom
        from sklearn.metrics import roc_auc_score

        np.save(self.folder / "mixed.npy", np.concatenate([normal, anomalies]))
        truth = np.repeat([0, 1], [len(normal), len(anomalies)])
        figures: dict[str, Any] = {}
        for score in ("", "nll", "mse"):
            out = self.folder / f"detected-{score}"
            words = ("--score", score) if score else ()
            title = f"AUROC, {score}" if score else "AUROC"
            try:
                output, _ = self.aezoo(
                    *("detect", "--ckpt_path", str(run), "--input", "mixed.npy", "--out", str(out)),
                    *("--baselines", "false", *words),
                )
            except AezooError as error:
                figures[title] = str(error)
                continue
            with (out / "scores.csv").open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            figures[title] = float(roc_auc_score(truth, [float(row["score"]) for row in rows]))
            if not score:
                flagged = [row["is_anomaly"].lower() in ("true", "1") for row in rows[: len(normal)]]
                figures["flagged"] = float(np.mean(flagged))
                if held_out := re.search(r"([\d,]+) held-out samples", output):
                    n = int(held_out[1].replace(",", "")) + 1
                    low, high = betabinom(len(flagged), 0.1 * n, 0.9 * n).ppf([0.025, 0.975]) / len(flagged)
                    figures["flagged, 95 % interval"] = f"{low:.3g} to {high:.3g}"
        return figures


def student(user: User) -> Iterator[tuple[str, dict[str, Any]]]:
    """Digits."""
    import aezoo

    run, figures = user.fit("-c", "dense_article")
    yield "fit -c dense_article", figures
    yield "embed", user.verdict(run, "embed")
    run, figures = user.fit("--model", "vae", "--data.train_classes", "[3]")
    x, y = aezoo.DataModule("mnist5k").tensors("test")
    digits, is_three = x.float().numpy(), np.asarray(y) == 3
    yield "threes", figures | user.detect(run, digits[is_three], digits[~is_three])


def photographs(user: User) -> Iterator[tuple[str, dict[str, Any]]]:
    """480 crops of photographs as files, and 1,000 new ones."""
    from PIL import Image

    import aezoo

    x = aezoo.DataModule("sample_photos").tensors("train")[0].float().numpy()
    rng = np.random.default_rng(0)
    x = x[rng.permutation(len(x))[:1480]]
    (user.folder / "pictures").mkdir()
    for i, picture in enumerate(x[:480]):
        Image.fromarray((picture.transpose(1, 2, 0) * 255).astype(np.uint8)).save(user.folder / f"pictures/{i}.png")
    damaged = x[480:].copy()
    for picture in damaged:
        i, j = rng.integers(0, 48, 2)
        picture[:, i : i + 16, j : j + 16] = rng.random((3, 1, 1))
    run, figures = user.fit("--model", "vae", "--model.net", "conv", "--data", "folder", "--data.root", "pictures")
    yield "480 photographs", figures | user.detect(run, x[480:], damaged)
    yield "compress one of them", user.verdict(run, "compress", "--input", "pictures/0.png")


def table(user: User) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measurements of tumours, 357 benign and 212 malignant; 100 benign ones are new."""
    from sklearn.datasets import load_breast_cancer, load_iris

    np.save(user.folder / "iris.npy", load_iris().data.astype(np.float32))
    yield "a table of 4 columns", user.fit("--model", "vae", "--data", "iris.npy")[1]
    loaded = load_breast_cancer()
    order = np.random.default_rng(0).permutation(np.flatnonzero(loaded.target == 1))
    train, normal = (loaded.data[rows].astype(np.float32) for rows in (order[100:], order[:100]))
    ill = loaded.data[loaded.target == 0].astype(np.float32)
    with (user.folder / "benign.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([loaded.feature_names, *train.tolist()])
    run, figures = user.fit("--model", "vae", "--data", "benign.csv")
    yield "table", figures | user.detect(run, normal, ill)
    np.save(user.folder / "train.npy", train)
    np.save(user.folder / "normal.npy", normal)
    (user.folder / "estimator.py").write_text(_SKLEARN, encoding="utf-8")
    for name, settings in (("dense_ae", {}), ("memory_ae", {}), ("dense_ae", {"max_epochs": 300})):
        output, _ = user.run("estimator.py", name, json.dumps(settings))
        call = ", ".join([repr(name), *(f"{key}={value}" for key, value in settings.items())])
        yield f"AutoencoderDetector({call})", {"flagged": json.loads(output.splitlines()[-1])}


def series(user: User) -> Iterator[tuple[str, dict[str, Any]]]:
    """Windows of a noisy wave; in anomalies a quarter of the window is noise of four times the deviation."""
    rng = np.random.default_rng(0)

    def windows(n: int) -> Floats:
        phase, at = rng.uniform(0, 2 * np.pi, (n, 1)), np.arange(64) * 2 * np.pi / 32
        return (0.5 + 0.3 * np.sin(at + phase) + 0.03 * rng.standard_normal((n, 64))).astype(np.float32)

    np.save(user.folder / "windows.npy", windows(1000))
    normal, bursts = windows(200), windows(200)
    bursts[:, 24:40] += 0.12 * rng.standard_normal((200, 16)).astype(np.float32)
    run, figures = user.fit("--model", "vae", "--data", "windows.npy")
    yield "windows with bursts", figures | user.detect(run, normal, bursts)


def researcher(user: User) -> Iterator[tuple[str, dict[str, Any]]]:
    """One epoch of a residual network, an incomplete plug-in, and groups in TensorBoard."""
    run, figures = user.fit("--model", "vae", "--model.net", "resnet", "--trainer.max_epochs", "1")
    yield "vae with net=resnet, 1 epoch", figures
    np.save(user.folder / "x.npy", np.random.default_rng(0).random((200, 30), dtype=np.float32))
    (user.folder / "loose.py").write_text(_PLUGIN, encoding="utf-8")
    words = ("fit", "--model", "loose.Loose", "--data", "x.npy", "--trainer.max_epochs", "2")
    try:
        user.aezoo(*words)
        says = "trains"
    except AezooError as error:
        says = str(error)
    yield "a plug-in without code_shape", {"result": says}
    first = sorted({tag.partition("/")[0] for tag in points(run)})
    yield "TensorBoard", {"first groups": " ".join(first[:4]), "groups": len(first)}


USERS: dict[str, Callable[[User], Iterator[tuple[str, dict[str, Any]]]]] = {
    function.__name__: function for function in (student, photographs, table, series, researcher)
}


def main() -> None:
    """Run the tasks of the users, and write the figures."""
    parser = build_parser("first_hour", __doc__)
    parser.add_argument("--users", nargs="+", choices=[*USERS], default=[*USERS], metavar="USER", help=", ".join(USERS))
    parser.add_argument(
        "--package", type=Path, default=ROOT, metavar="DIR", help="the checkout of aezoo that users have (this one)"
    )
    parser.add_argument("--page", action="store_true", help=f"run nothing, only write {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    package = arguments.package.resolve()
    column = "here" if package == ROOT else "before"
    path = arguments.results / f"first-hour-{environment(arguments)}.csv"
    written = ResultsCSV(path, ("user", "task", "figure"), command_line("first_hour", sys.argv[1:]), arguments.again)
    for name in [] if arguments.page else arguments.users:
        with tempfile.TemporaryDirectory() as folder:
            for task, figures in USERS[name](User(Path(folder), package)):
                for figure, value in figures.items():
                    if value is not None:
                        row = {"user": name, "task": task, "figure": figure}
                        written.put({**(written.find(row) or {}), **row, column: value})
                        print(f"{name}, {task}, {figure}: {value}", flush=True)
    print(path)
    if PAGE.parent.is_dir() and arguments.results == results_folder():
        PAGE.write_text(page(written.rows), encoding="utf-8")


def page(rows: list[dict[str, str]]) -> str:
    """The figures as a page."""
    lines = [
        "# The first hour of five users",
        "",
        "What users get with all defaults, before (revision 437258a) and after the changes of defaults that the",
        "changelog lists. `python -m benchmarks.first_hour` runs their commands and writes this page.",
        "",
        "AUROC compares anomalies with normal samples that were not used in training. `flagged` is the share of these",
        "normal samples above the default threshold, which is set for 10 %. Its interval contains it with a",
        "probability of 95 % if the held-out samples that set the threshold are like the new ones.",
    ]
    for user, play in USERS.items():
        own = [row for row in rows if row["user"] == user]
        tasks = [row["task"] for row in own]
        own.sort(key=lambda row: tasks.index(row["task"]))
        if own:
            lines += ["", f"## {user.capitalize()}: {(play.__doc__ or '').rstrip('.')}", ""]
            lines += ["| task | figure | before | after |", "|---|---|---|---|"]
            cells = ("task", "figure", "before", "here")
            lines += [f"| {' | '.join(row.get(cell, '') for cell in cells)} |" for row in own]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main)
