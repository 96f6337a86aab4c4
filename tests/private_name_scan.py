"""Scan the syntax trees of aezoo for private names of libraries.

`python tests/private_name_scan.py` prints missing and unused entries of the list in `aezoo/training/private_names.py`;
with --write it corrects the files of each entry, and deletes unused entries.
"""

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.mixins import HyperparametersMixin

import aezoo
from aezoo.training import private_names
from aezoo.training.private_names import PRIVATE_NAMES, PrivateName

LIBRARIES = ("torch", "torchvision", "torchmetrics", "lightning", "jsonargparse", "litdata")
ROOT = Path(aezoo.__file__).parents[1]
# documented by Python and IPython
PUBLIC = {"_replace", "_asdict", "_fields", "_make", "_exit", "_getframe", "_repr_png_"}
# keys of Lightning's checkpoints, of weights of other libraries and of a pickle of ours, not attributes
KEYS = {
    "_class_path",
    "_instantiator",
    "_saved",
    "_saved_score",
    "_pc_params",
    "_quantized_cdf",
    "_cdf_length",
    "_offset",
}
# names that libraries give to the model when they set its attributes
_MODEL = "obj|model|module|pl_module|lightning_module"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC and name != "_"


def of_library(module: str) -> bool:
    return module.split(".")[0] in LIBRARIES


@functools.cache
def private_attributes(cls: type) -> frozenset[str]:
    """Private names that a library's class has, or that its methods set or read on its instances."""
    try:
        stored = re.findall(r"\bself(?:\.|, \")(_\w+)", inspect.getsource(cls))
    except (OSError, TypeError):
        stored = []
    return frozenset(name for name in {*vars(cls), *vars(cls).get("__annotations__", {}), *stored} if is_private(name))


@functools.cache
def set_on_models() -> frozenset[str]:
    """Private attributes that Lightning sets on models outside of their classes."""
    texts = [path.read_text() for path in sorted(Path(pl.__file__).parent.rglob("*.py"))]
    found = {name for text in texts for name in re.findall(rf"\b(?:{_MODEL})\.(_\w+)(?:: [^=\n]+)? = ", text)}
    return frozenset(filter(is_private, found))


def inherited(cls: type) -> set[str]:
    """Private names that a class of ours inherits from classes of libraries."""
    bases = [base for base in cls.__mro__ if of_library(base.__module__) or base.__module__ == "argparse"]
    names = {name for base in bases for name in private_attributes(base)}
    return names | (set_on_models() if issubclass(cls, HyperparametersMixin) else set())


class File:
    """One file of aezoo.

    Attributes:
        uses: private names used, with their path if known: torch._C.x, or only x for an attribute of an object.
    """

    def __init__(self, path: Path, own: set[str], theirs: set[str]) -> None:
        self.own, self.theirs = own, theirs
        self.uses: dict[str, int] = {}
        self.paths: dict[str, str] = {}  # dotted paths of local names
        tree = ast.parse(path.read_text())
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        self.module = importlib.import_module(name)
        for node in ast.walk(tree):
            self._import(node)
        for node in tree.body:
            self._visit(node, None)

    def _import(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for alias in filter(lambda alias: of_library(alias.name), node.names):
                self.paths[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                if any(map(is_private, alias.name.split("."))):
                    self.uses[alias.name] = node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module and of_library(node.module):
            for alias in node.names:
                self.paths[alias.asname or alias.name] = path = f"{node.module}.{alias.name}"
                if any(map(is_private, path.split("."))):
                    self.uses[path] = node.lineno

    def _visit(self, node: ast.AST, cls: type | None) -> None:
        if isinstance(node, ast.ClassDef):
            cls = getattr(self.module, node.name, cls)
            theirs = inherited(cls) if isinstance(cls, type) else set()
            for child in ast.walk(node):
                name = getattr(child, "name", "") if isinstance(child, ast.FunctionDef) else ""
                if name in theirs:
                    self.uses[name] = child.lineno
        if isinstance(node, ast.Attribute):
            if (path := self._path(node)) is not None:
                if any(map(is_private, path.split("."))):
                    self.uses[path] = node.lineno
                return
            self._attribute(node.value, node.attr, cls, node.lineno)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            name = node.args[1]
            if node.func.id in ("getattr", "setattr", "hasattr", "delattr") and isinstance(name, ast.Constant):
                path = self._path(node.args[0])
                if path is not None and is_private(name.value):
                    self.uses[f"{path}.{name.value}"] = node.lineno
                else:
                    self._attribute(node.args[0], name.value, cls, node.lineno)
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            self._strings(node.elts)
        elif isinstance(node, ast.Subscript):
            self._strings([node.slice])
        for child in ast.iter_child_nodes(node):
            self._visit(child, cls)

    def _strings(self, nodes: Iterable[ast.AST]) -> None:
        """Names among strings, possibly with dots, that may be used to look up attributes or entries of `vars`."""
        for node in nodes:
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if re.fullmatch(r"\w+(\.\w+)*", text):
                for name in filter(is_private, text.split(".")):
                    if name not in KEYS and (name not in self.own or name in self.theirs):
                        self.uses[name] = node.lineno

    def _attribute(self, value: ast.AST, name: str, cls: type | None, line: int) -> None:
        if not is_private(name):
            return
        is_own = isinstance(value, ast.Name) and value.id in ("self", "cls")
        is_own |= isinstance(value, ast.Call) and ast.unparse(value.func) == "super"
        if name in inherited(cls) if is_own and cls is not None else name not in self.own or name in self.theirs:
            self.uses[name] = line

    def _path(self, node: ast.AST) -> str | None:
        """The dotted path of a member of a library's module, or None."""
        if isinstance(node, ast.Name):
            return self.paths.get(node.id)
        if isinstance(node, ast.Attribute) and (path := self._path(node.value)) is not None:
            return f"{path}.{node.attr}"
        return None


def own_names(tree: ast.AST) -> Iterator[str]:
    """Names that a file defines."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    yield from own
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            # objects of a library rarely have the name of a function of ours
            yield from (
                [node.attr] if isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"} | own else []
            )
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def classes() -> set[type]:
    """The classes that aezoo defines."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "aezoo"]
    return {one for module in modules for one in vars(module).values() if inspect.isclass(one)}


@functools.cache
def uses() -> dict[str, tuple[str, ...]]:
    """The files that use each private name, by its path as far as it is known."""
    for module in pkgutil.walk_packages(aezoo.__path__, "aezoo."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    paths = sorted(Path(aezoo.__file__).parent.rglob("*.py"))
    own = {name for path in paths for name in own_names(ast.parse(path.read_text()))}
    theirs = {entry.name.rpartition(".")[2] for entry in PRIVATE_NAMES}
    theirs |= {name for cls in classes() for name in inherited(cls)}
    found: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        if path.name != "__main__.py" and path != Path(private_names.__file__):
            for name in File(path, own, theirs).uses:
                found[name].append(path.relative_to(ROOT / "aezoo").as_posix())
    return {name: tuple(files) for name, files in sorted(found.items())}


def matches(entry: str, use: str) -> bool:
    """Whether an entry of the list matches a use: the same path, or the same attribute of an object."""
    return entry == use if "." in use else entry.rpartition(".")[2] == use


def files_of(entry: str) -> tuple[str, ...]:
    """The files that use the name of an entry."""
    return tuple(sorted({file for use, files in uses().items() if matches(entry, use) for file in files}))


def unlisted() -> dict[str, tuple[str, ...]]:
    """Uses that no entry matches."""
    names = [entry.name for entry in PRIVATE_NAMES]
    return {use: files for use, files in uses().items() if not any(matches(name, use) for name in names)}


def find(name: str) -> object:
    """The object at a path; for an attribute that only instances have, the class.

    Raises:
        LookupError: says which part of the path is missing.
    """
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:i]))
            break
        except ImportError:
            continue
    else:
        raise LookupError(f"there is no module {parts[0]}")
    for part in parts[i:]:
        if inspect.isclass(found) and not hasattr(found, part) and part in instance_attributes(found):
            return found
        if not hasattr(found, part):
            raise LookupError(f"{getattr(found, '__name__', found)} has no {part}")
        found = getattr(found, part)
    return found


def instance_attributes(cls: type) -> set[str]:
    """Private attributes that the packages of a class and its bases set on objects."""
    packages = {base.__module__.rpartition(".")[0] or base.__module__ for base in cls.__mro__ if base is not object}
    modules = [m for name, m in sys.modules.items() if name.rpartition(".")[0] in packages or name in packages]
    paths = [Path(getattr(m, "__file__", None) or "") for m in modules]
    texts = [path.read_text() for path in paths if path.is_file() and path.suffix == ".py"]
    stored = r"\w\.(_\w+)(?:: [^=\n]+)? = |^    (_\w+): "
    found = {name for text in texts for names in re.findall(stored, text, re.M) for name in names if name}
    return found | (set_on_models() if issubclass(cls, HyperparametersMixin) else set())


def entry_text(entry: PrivateName, files: tuple[str, ...]) -> str:
    """The first lines of an entry with these files."""
    listed = ", ".join(f'"{file}"' for file in files) + ("," if len(files) == 1 else "")
    lines = textwrap.wrap(f"files=({listed}),", 118, initial_indent=" " * 8, subsequent_indent=" " * 15)
    return "\n".join(["    PrivateName(", f'        "{entry.name}",', *lines, ""])


def main() -> None:
    for use, files in unlisted().items():
        print(f"not listed: {use} in {', '.join(files)}")
    path = Path(private_names.__file__)
    text = path.read_text()
    for entry in PRIVATE_NAMES:
        files, start = files_of(entry.name), rf'    PrivateName\(\n        "{re.escape(entry.name)}",\n'
        if not files:
            print(f"no longer used: {entry.name}")
            text = re.sub(rf"{start}(        .*\n)+    \),\n", "", text)
        elif files != entry.files:
            print(f"{entry.name} is used in {', '.join(files)}")
            text = re.sub(rf"{start}        files=\([^)]*\),\n", entry_text(entry, files).replace("\\", r"\\"), text)
    if "--write" in sys.argv:
        path.write_text(text)


if __name__ == "__main__":
    main()
