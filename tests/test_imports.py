"""Imports follow the layers of the package, without cycles, and the root imports nothing heavy."""

import ast
import sys
from pathlib import Path

import pytest
from importlinter import cli

import aezoo

PACKAGE = Path(aezoo.__file__).parent
ROOT_FILES = {"__init__", "__main__", "autoencoder", "corruptions", "errors", "registry", "sklearn"}


@pytest.mark.slow
@pytest.mark.parametrize("contract", ["layers", "circles", "speed"])
def test_imports_keep_the_contract(contract, capsys):
    config = PACKAGE.parent / "pyproject.toml"
    code = cli.lint_imports(str(config), limit_to_contracts=(contract,), no_cache=True, no_logo=True)
    assert code == cli.EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_package_root_contains_listed_files_only():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert files == ROOT_FILES
    assert len(rooms | files) <= 25


def runtime_imports(tree):
    """Modules that a file imports outside of functions and `if TYPE_CHECKING`."""
    found, waiting = set(), [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef):
            waiting += ast.iter_child_nodes(node)
    return found


def test_the_package_imports_only_the_standard_library():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assert {name.partition(".")[0] for name in runtime_imports(tree)} <= sys.stdlib_module_names


@pytest.mark.slow
def test_modules_of_the_package_are_imported_by_their_paths():
    """`aezoo.load_model` inside the package would be an import that the import linter does not see."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        hidden = [
            f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "aezoo" and node.attr != "__version__"
        ]
        assert not hidden
