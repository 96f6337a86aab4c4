"""Each tutorial is a notebook and a script with the same cells; its page shows the stored outputs."""

import importlib.util
import re
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "hooks" / "notebooks.py")
notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(notebooks)
of_each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_all_tutorials_are_pairs_and_in_the_navigation():
    assert {path.stem for path in FOLDER.glob("*.py")} == {path.stem for path in NOTEBOOKS} and len(NOTEBOOKS) == 8
    listed = re.findall(r"tutorials/(\w+)\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(listed) == [path.stem for path in NOTEBOOKS]


@of_each
def test_script_and_notebook_have_the_same_cells(path):
    """CONTRIBUTING.md has the command that executes notebooks."""
    notebook, script = nbformat.read(path, as_version=4), jupytext.read(path.with_suffix(".py"))
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in script.cells]


@of_each
def test_notebook_was_executed_without_error(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    # warnings with paths of the machine
    assert not [output for output in outputs if output.get("name") == "stderr"]


@of_each
def test_page_leads_to_files_that_exist(path):
    text, pictures = notebooks.page(path)
    assert text.startswith("# ") and all(content.startswith(b"\x89PNG") for content in pictures.values())
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert sorted(shown) == sorted(pictures)
    for link in re.findall(r"(?<!!)\[[^\]]*\]\(([^)#]+)", text):
        target = FOLDER / link
        assert target.exists() or target.with_suffix(".ipynb").exists(), link


@of_each
def test_outputs_do_not_depend_on_the_machine(path):
    text, _ = notebooks.page(path)
    assert not re.search(r"(?<![\w.])/(tmp|root|home|work|opt|usr)/|site-packages|Warning", text)


def test_colab_opens_the_notebook_of_a_named_repository(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    path = tmp_path / "docs" / "a.ipynb"
    assert notebooks.colab(path, tmp_path / "pyproject.toml") is None
    (tmp_path / "pyproject.toml").write_text("[project.urls]\nRepository = 'https://github.com/o/r.git'\n")
    found = notebooks.colab(path, tmp_path / "pyproject.toml")
    assert found == "https://colab.research.google.com/github/o/r/blob/main/docs/a.ipynb"
    assert "[Open in Colab](https://x)" in notebooks.page(NOTEBOOKS[0], "https://x")[0]
