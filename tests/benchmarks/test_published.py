"""Recipes: what is run, what is read, what is kept, and what the heads of those of published figures say."""

import re
import shutil
import sys

import pytest
import yaml

from aezoo.cli.recipes import find_recipe
from aezoo.errors import AezooError
from benchmarks import common, published, recipes

ROW = {"data": "mnist5k", "binarise": "static", "steps": "40", "importance_samples": "5"}


def test_every_target_has_metric_and_conditions():
    assert len(published.published()) >= 13
    for name, path in published.published().items():
        assert re.search(r"(test|train)/\w+ -?\d+\.\d", recipes.published_figure(path)), name
        settings = yaml.safe_load(path.read_text())
        assert settings["data"]["name"] in ("mnist", "binarized_mnist")
        assert settings["trainer"]["max_epochs"] >= 7
        assert name not in recipes.trainable_recipes()


def test_binarisation_follows_recipe():
    found = {name: published.binarisation(path) for name, path in published.published().items()}
    assert found["mnist_vae"] == "static" and found["mnist_miwae"] == "dynamic" and found["mnist_keras_vae"] == "none"


@pytest.mark.slow
def test_run_is_limited_in_steps_and_returns_metrics(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = published.run({"recipe": "mnist_vae", **ROW}, None)
    assert "error" not in row
    assert row["test/log_likelihood"] < -100 and row["test/nll"] > 0 and row["seconds"] > 0


@pytest.mark.slow
def test_failure_reports_last_output_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = published.run({"recipe": "mnist_vae", **ROW, "data": "mnist6k"}, None)
    assert "mnist6k" in row["error"] and "\n" not in row["error"]


def test_recipe_headers_match_csv_rows(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    for name in ("mnist_vae", "mnist_keras_vae", "vae"):
        shutil.copy(find_recipe(name), tmp_path / "recipes")
    monkeypatch.setattr(published, "recipes", lambda: {p.stem: p for p in (tmp_path / "recipes").glob("*.yaml")})
    table = common.ResultsCSV(tmp_path / "published-fp32-here.csv", published.KEY, "command")
    for data, value in (("mnist5k", -101.5), ("fashion_mnist", -150.0)):
        table.put({"recipe": "mnist_vae", **ROW, "data": data, "test/log_likelihood": value})
    table.put({"recipe": "mnist_keras_vae", **ROW, "binarise": "none", "test/loss": 200.25})
    table.put({"recipe": "mnist_keras_vae", **ROW, "binarise": "none", "steps": 39, "test/loss": 300.5})
    before = (tmp_path / "recipes" / "vae.yaml").read_text()
    published.write_heads(table)
    line = (tmp_path / "recipes" / "mnist_vae.yaml").read_text().splitlines()[3]
    assert line == (
        "# reached: test/log_likelihood -101.5 on static mnist5k, test/log_likelihood -150 on static fashion_mnist "
        "(40 steps, 5 importance samples, fp32-here, seed 0)"
    )
    assert (
        "# reached: test/loss 200.25 on mnist5k (40 steps, fp32"
        in (tmp_path / "recipes" / "mnist_keras_vae.yaml").read_text()
    )
    assert (tmp_path / "recipes" / "vae.yaml").read_text() == before


def test_unknown_recipe_is_refused():
    with pytest.raises(AezooError, match="take mnist_ciwae"):
        published.parse_arguments(["mnist_vea"])


@pytest.mark.slow
def test_recipes_are_measured_one_at_a_time(tmp_path, monkeypatch):
    found = {"epochs": "2", "seconds": "3"} | dict.fromkeys(recipes.FIGURES, "1.5")
    monkeypatch.setattr(recipes, "RESULTS", tmp_path)
    monkeypatch.setattr(recipes, "ROOT", tmp_path)
    monkeypatch.setattr(recipes, "trainable_recipes", lambda: {name: tmp_path / f"{name}.yaml" for name in ("b", "a")})
    monkeypatch.setattr(recipes, "train", lambda name, root: {"recipe": name} | found | {"test/mse": str(len(root))})
    for path in (tmp_path / "a.yaml", tmp_path / "b.yaml", tmp_path / "README.md"):
        path.write_text("# reached: nothing\n<!-- recipes -->\n<!-- /recipes -->\n")
    for words in (["b", "--root", "1"], ["--root", "22"], ["a", "--root", "333", "--again"], ["--tables"]):
        monkeypatch.setattr(sys, "argv", ["recipes", *words])
        recipes.main()
    commands, rows = common.read_csv(recipes.newest_results())
    assert commands == [
        f"python -m benchmarks.recipes {words}" for words in ("b --root 1", "--root 22", "a --root 333")
    ]
    # what is there is kept, as after a crash
    assert [(row["recipe"], row["test/mse"], row["epochs"]) for row in rows] == [("b", "1", "2"), ("a", "3", "2")]
    assert "test/mse 3," in (tmp_path / "a.yaml").read_text()
    assert "| `a` | 1.5 | 3 | 1.5 | 1.5 | 2 | 3 |" in (tmp_path / "README.md").read_text()


def test_failing_recipe_is_reported_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(AezooError, match="recipe vae ends with exit code 1"):
        recipes.train("vae", None)
