"""What the README and the recipes state is what the scripts wrote and what the code does."""

import json
import re
from pathlib import Path

import pytest

import aezoo
from aezoo import registry
from benchmarks import recipes as benchmark

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_and_heads_are_those_of_the_newest_results():
    rows = benchmark.read(benchmark.newest())
    assert rows.keys() == benchmark.own_recipes().keys()
    assert benchmark.readme(rows) == README
    for name, path in benchmark.own_recipes().items():
        assert benchmark.head(rows[name], benchmark.newest()) in path.read_text(encoding="utf-8").splitlines()


def test_every_model_has_passed_checks_and_laws_that_the_table_counts():
    proofs = json.loads(benchmark.PROOFS.read_text(encoding="utf-8"))
    built_in = {name for name in aezoo.list_models() if registry.find(name).owner == "aezoo"}
    assert built_in <= proofs.keys(), "run what tests/proofs.py names"
    assert all(proofs[name]["contract"] >= 15 and proofs[name]["laws"] >= 3 for name in built_in)


def test_every_picture_and_file_that_the_readme_shows_is_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_model_of_the_readme_keeps_the_contract(tmp_path, monkeypatch):
    source = re.search(r'```python\n("""My autoencoder.*?)```', README, re.DOTALL)[1]
    assert len([line for line in source.split('"""')[-1].splitlines() if line.strip()]) <= 20
    (tmp_path / "my_ae.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    from my_ae import MyAE

    from aezoo.testing import CHECKS, check_ddp

    for check in CHECKS:
        if check is not check_ddp:
            check(MyAE)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = re.search(r"```python\n(import aezoo\n.*?)```", README, re.DOTALL)[1]
    names: dict[str, object] = {}
    exec(source.replace("max_epochs=5", "max_epochs=1"), names)
    assert isinstance(names["model"], aezoo.Autoencoder)
    assert names["z"].shape == (500, 8)
