"""Recipes of published figures: runs, stored results, and the heads of recipe files."""

import re
import shutil
import struct
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from aezoo.cli.recipes import find_recipe
from aezoo.errors import AezooError
from benchmarks import common, published, published_row, recipes


def test_every_target_has_metric_and_conditions():
    assert len(published.published()) >= 13
    for name, path in published.published().items():
        assert re.search(r"(test|train)/\w+ -?\d+\.\d", recipes.published_figure(path)), name
        settings = yaml.safe_load(path.read_text())
        assert settings["data"]["name"] in ("mnist", "binarized_mnist")
        assert settings["trainer"]["max_epochs"] >= 7
        # all epochs, without early stopping
        assert settings["data"].get("val_fraction") == 0 or settings["early_stopping"] == {"patience": 0}, name
        assert name not in recipes.trainable_recipes()


@pytest.fixture
def mnist(tmp_path):
    """A folder in torchvision's format of MNIST, with 240 and 60 random images."""
    folder = tmp_path / "data" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", 240), ("t10k", 60)):
        x, y = rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n, np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, n, 28, 28) + x.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + y.tobytes())
    return tmp_path / "data"


def test_targets_are_the_first_figures():
    found = {name: published.target(path) for name, path in published.published().items()}
    assert found["mnist_vae"] == ("test/log_likelihood", -89.9)
    assert found["mnist_keras_vae"] == ("train/loss", 146.95)


def test_the_test_may_have_other_data(tmp_path):
    arguments = published.parse_arguments(["--root", str(tmp_path), "--keep", str(tmp_path)])
    recipe = published.published()["mnist_poincare"]
    found = published.spec(recipe, 0, arguments)
    assert found["test"] == {"binarise": "none"}
    assert found["row"]["data"] == "mnist, static; test with binarise none"
    assert published.spec(published.published()["mnist_vae"], 0, arguments)["test"] == {}


def test_static_digits_are_drawn_where_files_are_missing(tmp_path):
    recipe = published.published()["mnist_vae"]
    data, flags = published.data_flags(recipe, tmp_path)
    assert data == published.DRAWN_ONCE and "--data.binarise=static" in flags
    (tmp_path / "binarized_mnist_train.amat").touch()
    assert published.data_flags(recipe, tmp_path) == ("binarized_mnist", [f"--data.root={tmp_path}"])
    assert published.data_flags(published.published()["mnist_miwae"], tmp_path)[0] == "mnist, dynamic"


@pytest.mark.slow
def test_runs_are_measured_and_continued(mnist, tmp_path, monkeypatch):
    # a separate process would import everything again
    monkeypatch.setattr(published, "run_rows", lambda _, specs, *rest: [(s, published_row.measure(s)) for s in specs])
    file = tmp_path / "kept" / "mnist_vae-0" / "runs" / "mnist_vae" / "0" / "metrics.csv"

    def monotonic():
        """A clock by which the time limit is reached after one more epoch, however busy the processor is."""
        return 100.0 * len(file.read_text().splitlines()) if file.is_file() else 0.0

    clock = SimpleNamespace(monotonic=monotonic, sleep=lambda seconds: time.sleep(seconds / 10))
    monkeypatch.setattr(published_row, "time", clock)
    argv = ["mnist_vae", "--root", str(mnist), "--keep", str(tmp_path / "kept"), "--results", str(tmp_path)]
    rows = []
    for _ in range(2):
        published.main([*argv, "--seconds", "15"])
        (path,) = tmp_path.glob("published-*.csv")
        commands, (row,) = common.read_csv(path)
        assert not row["error"] and row["data"] == published.DRAWN_ONCE
        assert commands == ["python -m benchmarks.published mnist_vae --root FOLDER --seconds 15"]
        assert float(row["reached"]) == float(row["test/log_likelihood"]) < -100
        rows.append((int(row["epochs"]), float(row["cpu_seconds"])))
    assert 0 < rows[0][0] < rows[1][0] <= 500 and rows[0][1] < rows[1][1]


@pytest.mark.slow
def test_failure_reports_last_output_line(tmp_path):
    with pytest.raises(RuntimeError, match="mnist6k"):
        published_row.fit(tmp_path, "mnist_vae", 0, ["--data.name=mnist6k"], None)


def test_runs_with_most_epochs_make_the_head(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    for name in ("mnist_vae", "mnist_keras_vae", "vae"):
        shutil.copy(find_recipe(name), tmp_path / "recipes")
    monkeypatch.setattr(published, "recipes", lambda: {p.stem: p for p in (tmp_path / "recipes").glob("*.yaml")})
    table = common.ResultsCSV(tmp_path / "published-fp32-here.csv", published.KEY, "command")
    row = {
        "recipe": "mnist_vae",
        "max_epochs": 500,
        "metric": "test/log_likelihood",
        "data": "mnist",
        "cpu_seconds": 90,
    }
    for seed, epochs, value in ((0, 500, -89.5), (1, 500, -90.5), (2, 20, -120.0), (3, "", "")):
        error = "" if epochs else "exit code 1"
        table.put(row | {"seed": seed, "epochs": epochs, "reached": value, "error": error})
    assert [published.is_finished(found) for found in table.rows] == [True, True, False, False]
    before = {name: (tmp_path / "recipes" / f"{name}.yaml").read_text() for name in ("vae", "mnist_keras_vae")}
    published.write_heads(table.path)
    line = (tmp_path / "recipes" / "mnist_vae.yaml").read_text().splitlines()[3]
    assert line == (
        "# reached: test/log_likelihood -90.00 (s.d. 0.71) on mnist (500 of 500 epochs, 2 seeds, "
        "90 s of processor time, fp32-here)"
    )
    assert before == {name: (tmp_path / "recipes" / f"{name}.yaml").read_text() for name in before}


def test_unknown_recipe_is_refused():
    with pytest.raises(AezooError, match="take mnist_pytorch_vae"):
        published.parse_arguments(["mnist_vea"])


@pytest.mark.slow
def test_recipes_are_measured_one_at_a_time(tmp_path, monkeypatch):
    found = {"epochs": "2", "seconds": "3"} | dict.fromkeys(recipes.FIGURES, "1.5")
    monkeypatch.setattr(recipes, "RESULTS", tmp_path)
    monkeypatch.setattr(recipes, "ROOT", tmp_path)
    monkeypatch.setattr(recipes, "trainable_recipes", lambda: {name: tmp_path / f"{name}.yaml" for name in ("b", "a")})
    # compared with the page in tests/test_readme.py
    monkeypatch.setattr(recipes, "models_tables", lambda: "the models")
    monkeypatch.setattr(recipes, "train", lambda name, root: {"recipe": name} | found | {"test/mse": str(len(root))})
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text("# reached: nothing\n")
    (tmp_path / "docs").mkdir()
    pages = {"README.md": ("families",), "docs/models.md": ("models",)}
    pages |= {"docs/choose.md": ("choose",), "docs/recipes.md": ("recipes", "published")}
    for name, marks in pages.items():
        (tmp_path / name).write_text("".join(f"<!-- {mark} -->\n<!-- /{mark} -->\n" for mark in marks))
    for words in (["b", "--root", "1"], ["--root", "22"], ["a", "--root", "333", "--again"]):
        monkeypatch.setattr(sys, "argv", ["recipes", *words])
        recipes.main()
    recipes.write_tables()
    commands, rows = common.read_csv(recipes.newest_results())
    assert commands == [
        f"python -m benchmarks.recipes {words}" for words in ("b --root FOLDER", "--root FOLDER", "a --root FOLDER")
    ]
    assert "the models" in (tmp_path / "docs" / "models.md").read_text()
    # existing results are kept, as after a crash
    assert [(row["recipe"], row["test/mse"], row["epochs"]) for row in rows] == [("b", "1", "2"), ("a", "3", "2")]
    assert "test/mse 3," in (tmp_path / "a.yaml").read_text()
    assert "| `a` | 1.5 | 3 | 1.5 | 1.5 | 2 | 3 |" in (tmp_path / "docs" / "recipes.md").read_text()


def test_failing_recipe_is_reported_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(AezooError, match="recipe vae ends with exit code 1"):
        recipes.train("vae", None)
