"""Names, families, tags, classes and pretrained weights of all models: `aezoo/models/` and installed plug-ins.

A built-in model is a file `aezoo/models/<family>/<name>.py` with one subclass of `Autoencoder`; no other registration
is needed. A third-party package registers its models with entry points:

    [project.entry-points."aezoo.models"]
    my_ae = "my_package.my_module:MyAE"

Nothing here imports torch until a class is requested.
"""

import ast
import difflib
import inspect
import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import resolve_name
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aezoo.errors import AezooError
from aezoo.training import tags
from aezoo.training.model_names import GROUP
from aezoo.training.model_names import name_of as name_of
from aezoo.training.traits import TAGS, check_tag

if TYPE_CHECKING:
    from aezoo.autoencoder import Autoencoder

ALIASES = {
    "dense": "dense_ae",
    "convolutional": "conv_ae",
    "denoising": "denoising_ae",
    "sparse": "sparse_ae_l1",
    "variational": "vae",
}
_HOME = Path(__file__).parent / "models"
# largest number of modules that may re-export a class before its definition
_MAX_ALIAS_HOPS = 8
# large packages of others, which contain no arguments of models
_WITHOUT_MODELS = ("lightning", "torch", "typing")


@dataclass(frozen=True)
class Entry:
    """One registered model.

    Attributes:
        name: the name that `create_model` and `--model` take.
        family: the folder of a built-in model; `plugin` for one from another package.
        owner: the distribution that provides it, e.g. `aezoo`.
        module: the dotted module that defines it.
        attribute: the class in that module; empty for built-ins, where it is the one `Autoencoder` defined there.
    """

    name: str
    family: str
    owner: str
    module: str
    attribute: str = ""


def owner_of(point: EntryPoint) -> str:
    """The distribution that declares an entry point."""
    return point.dist.name if point.dist else point.value


def unique_points(group: str) -> dict[str, EntryPoint]:
    """Entry points of a group by name; a package that is found twice on the path counts once.

    Raises:
        AezooError: two packages claim one name.
    """
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        first = points.setdefault(point.name, point)
        if (first.value, owner_of(first)) != (point.value, owner_of(point)):
            raise AezooError(
                f"two packages register {point.name!r} in {group}: {owner_of(first)} ({first.value}) and "
                f"{owner_of(point)} ({point.value}); uninstall one of them"
            )
    return points


@lru_cache(maxsize=1)
def entries() -> dict[str, Entry]:
    """All registered models by name.

    Raises:
        AezooError: two packages register the same name.
    """
    found: dict[str, Entry] = {}

    def add(entry: Entry) -> None:
        first = found.setdefault(entry.name, entry)
        if first is not entry:
            raise AezooError(
                f"two models are named {entry.name!r}: one of {first.owner} ({first.module}) and one of "
                f"{entry.owner} ({entry.module}); rename one or uninstall its package"
            )

    for path in sorted(_HOME.glob("*/[!_]*.py")):
        family, stem = path.parent.name, path.stem
        add(Entry(stem, family, "aezoo", f"aezoo.models.{family}.{stem}"))
    for name, point in unique_points(GROUP).items():
        if name in ALIASES:
            raise AezooError(f"{owner_of(point)} registers {name!r}, a word that aezoo reserves for {ALIASES[name]}")
        add(Entry(name, "plugin", owner_of(point), point.module, point.attr))
    return found


def _natural_sort_key(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def list_models(
    pattern: str | Iterable[str] = "*", family: str | None = None, pretrained: bool = False, tag: str | None = None
) -> list[str]:
    """Names of models in natural order (`ae_2` before `ae_10`), or the tags of pretrained weights.

    Args:
        pattern: a shell pattern such as `*vae*`, or several, one of which must match.
        family: only this family: `classic`, `sparse`, `variational`, ... or `plugin`.
        pretrained: list tags such as `vae.mnist`, which `load_model` takes; a pattern matches a model's name or a tag.
        tag: only models for this use, such as `anomaly` or `generation`; `aezoo.training.traits.TAGS` explains each.

    Raises:
        AezooError: the family or the tag does not exist.
    """
    families = sorted({entry.family for entry in entries().values()} | {"plugin"})
    if family is not None and family not in families:
        raise AezooError(f"unknown family {family!r}: choose from {', '.join(families)}")
    use = None if tag is None else check_tag(tag)
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    chosen = [
        entry.name
        for entry in entries().values()
        if family in (None, entry.family)
        and (pretrained or any(fnmatch(entry.name, p) for p in patterns))
        and (use is None or use in uses_of(entry.name))
    ]
    if pretrained:
        known = [weights for weights in tags.all_tags().values() if weights.model in chosen]
        chosen = [each.name for each in known if any(fnmatch(each.name, p) or fnmatch(each.model, p) for p in patterns)]
    return sorted(chosen, key=_natural_sort_key)


def uses_of(name: str) -> tuple[str, ...]:
    """The tags of a model, read from its source without importing it: what its class or the nearest ancestor gives.

    A model without tags, or whose source cannot be read, has ().

    Raises:
        AezooError: the model does not exist.
    """
    entry = find(name)
    try:
        entry, tree = _home(entry)
        own = [node for node in tree.body if isinstance(node, ast.ClassDef) and entry.attribute in ("", node.name)]
        # ancestors only if a class gives none itself: their files take a while to read
        given = _first_tags(own) or _first_tags([cls for _, cls in _ancestry(_defined(entry)[0])])
    except AezooError:
        given = None
    return given or ()


def _first_tags(classes: Iterable[ast.ClassDef]) -> tuple[str, ...] | None:
    """The tags of the first of some classes that gives any."""
    return next((given for cls in classes if (given := _given_tags(cls)) is not None), None)


def _given_tags(cls: ast.ClassDef) -> tuple[str, ...] | None:
    """What the first line of a class gives as tags; None if it gives none."""
    given = next((keyword.value for keyword in cls.keywords if keyword.arg == "tags"), None)
    values = given.elts if isinstance(given, ast.Tuple) else ()
    return None if given is None else tuple(str(value.value) for value in values if isinstance(value, ast.Constant))


def tags_of(name: str) -> list[tags.Tag]:
    """The pretrained weights of a model, in natural order; none if it is not registered."""
    resolved = resolve(name)
    return [tags.all_tags()[tag] for tag in list_models(resolved, pretrained=True)] if resolved else []


def find_tag(text: str) -> tags.Tag | None:
    """Pretrained weights by `NAME.TAG`, with the model's name spelled as `resolve` takes it; None if there are none."""
    name, _, tag = text.partition(".")
    resolved = resolve(name) if tag else None
    return tags.all_tags().get(f"{resolved}.{tag}")


def suggest_tags(text: str) -> str:
    """The tags most similar to a text, as a question for an error message; empty if none is similar.

    For a registered model, all of its tags are suggested.
    """
    name, dot, _ = text.partition(".")
    near = difflib.get_close_matches(f"{resolve(name) or name}{text[len(name) :]}", tags.all_tags(), n=2, cutoff=0.7)
    if not near and dot and "/" not in text:
        near = [tag.name for tag in tags_of(name)]
    return f"did you mean {' or '.join(map(repr, near))}?" if near else ""


def resolve(name: str) -> str | None:
    """The registered name of a model that is spelled `DenseAE`, `dense-ae` or `dense`; None if there is none."""
    resolved = ALIASES.get(name, name)
    if resolved in entries():
        return resolved
    same = [known for known in (*entries(), *ALIASES) if _letters(known) == _letters(name)]
    return ALIASES.get(same[0], same[0]) if len(same) == 1 else None


def _letters(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()


def search(words: Iterable[str], family: str | None = None, tag: str | None = None) -> list[str]:
    """Names of models in natural order that match one of some words.

    Args:
        words: shell patterns such as `*vae*` for whole names, or parts of names, families or tags.
        family: see `list_models`.
        tag: see `list_models`.
    """
    words = list(words)
    names = list_models(family=family, tag=tag)
    return [name for name in names if any(_matches(word, entries()[name]) for word in words)]


def search_tags(words: Iterable[str], family: str | None = None, tag: str | None = None) -> list[tags.Tag]:
    """Pretrained weights in natural order whose model matches as in `search`, or whose tag has or matches a word."""
    words = list(words)
    models = set(search(words, family, tag))
    known = [tags.all_tags()[name] for name in list_models(family=family, pretrained=True, tag=tag)]
    return [
        each
        for each in known
        if each.model in models or any(word in each.name or fnmatch(each.name, word) for word in words)
    ]


def _matches(word: str, entry: Entry) -> bool:
    if set("*?[") & set(word):
        return fnmatch(entry.name, word)
    texts = (entry.name, entry.family, *(alias for alias, name in ALIASES.items() if name == entry.name))
    if any(_letters(word) in _letters(text) for text in texts):
        return True
    # sources are read only for a word that may be a tag
    uses = {tag for tag in TAGS if _letters(word) in _letters(tag)}
    return bool(uses) and not uses.isdisjoint(uses_of(entry.name))


def find(name: str) -> Entry:
    """The entry of a model by name or by one of the five words dense, convolutional, denoising, sparse, variational.

    Raises:
        AezooError: the model does not exist; the message suggests the nearest names.
    """
    resolved = resolve(name)
    if resolved is not None:
        return entries()[resolved]
    near = difflib.get_close_matches(name.lower().replace("-", "_"), [*entries(), *ALIASES], n=2, cutoff=0.5)
    hint = f", did you mean {' or '.join(repr(n) for n in near)}?" if near else "."
    raise AezooError(
        f"unknown model {name!r}{hint} See `aezoo list` (aezoo.list_models()); one of a plug-in needs its package"
    )


def model_class(name: str) -> type["Autoencoder"]:
    """The class of a model.

    Raises:
        AezooError: the model does not exist, or a plug-in cannot be imported.
    """
    from aezoo.autoencoder import Autoencoder

    entry = find(name)
    try:
        module = import_module(entry.module)
        classes: list[Any]
        if entry.attribute:
            classes = [attrgetter(entry.attribute)(module)]
        else:
            classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == entry.module]
            classes = [c for c in classes if issubclass(c, Autoencoder)]
    except (Exception, SystemExit) as error:
        if entry.owner == "aezoo":
            raise
        raise AezooError(f"the plug-in {name!r} of package {entry.owner} is broken: {_one_line(error)}") from error
    if len(classes) != 1 or not (isinstance(classes[0], type) and issubclass(classes[0], Autoencoder)):
        raise AezooError(
            f"the model {name!r}, {entry.module} of package {entry.owner}, must give one subclass of aezoo.Autoencoder"
        )
    return classes[0]


def create_model(
    name: str, input_shape: tuple[int, ...] | None = None, *, pretrained: str | None = None, **hyperparameters: Any
) -> "Autoencoder":
    """Build a model.

    Args:
        name: one of `list_models()` or one of the words dense, convolutional, denoising, sparse, variational.
        input_shape: shape of one sample: (D,), (C, L), (C, H, W) or (C, D, H, W); by default (1, 28, 28), or that of
            the pretrained weights.
        pretrained: the tag of weights to start from, such as `mnist`; `list_models(NAME, pretrained=True)` lists them.
            The model is then in eval mode, as `load_model` returns it.
        **hyperparameters: the class's keyword arguments; `aezoo info NAME` lists them. With pretrained weights, those
            that are not given are the ones of the weights, and others must not change the shapes of the weights.

    Raises:
        AezooError: an unknown model, tag or hyperparameter, or a value that the model or the weights reject.
    """
    cls = model_class(name)
    if "pretrained" in inspect.signature(cls).parameters and f"{find(name).name}.{pretrained}" not in tags.all_tags():
        # for diffusers_ae it is a folder
        hyperparameters |= {} if pretrained is None else {"pretrained": pretrained}
        pretrained = None
    check_hyperparameters(cls, hyperparameters, find(name).name)
    if pretrained is not None:
        # by name, since files are of a higher layer
        load: Any = import_module("aezoo.io.pretrained")
        model: Autoencoder = load.create(find(name).name, pretrained, input_shape, hyperparameters)
        return model
    try:
        # the constructor rejects an int and says what to give
        input_shape = (1, 28, 28) if input_shape is None else input_shape
        shape = tuple(input_shape) if isinstance(input_shape, Iterable) else input_shape
        return cls(input_shape=shape, **hyperparameters)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise AezooError(out_of_memory_message(name)) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory to create a model."""
    said = isinstance(error, RuntimeError) and ("alloc" in str(error) or "overflow" in str(error))
    return said or isinstance(error, MemoryError)


def out_of_memory_message(name: str) -> str:
    """A one-line message about a model that does not fit into memory, with advice."""
    return f"{name} of this size does not fit in memory: lower latent_dim or hidden_dims"


def check_hyperparameters(cls: type, hyperparameters: Iterable[str], name: str) -> None:
    """Reject keyword arguments that a class does not have.

    Raises:
        AezooError: names the argument and the nearest existing one.
    """
    parameters = inspect.signature(cls).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return  # a plug-in whose parent defines the arguments
    known = [p.name for p in parameters if p.name != "input_shape"]
    for key in hyperparameters:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise AezooError(f"{name} has no hyperparameter {key!r}: {hint}It has {', '.join(known)}.")


def hyperparameters(name: str) -> list[str]:
    """Names of a model's keyword arguments."""
    return [key for key in inspect.signature(model_class(name)).parameters if key != "input_shape"]


def import_plugins() -> list[str]:
    """Import every plug-in model, warn about each that fails, and return the names of the working ones."""
    working = []
    for entry in entries().values():
        if entry.owner != "aezoo":
            try:
                model_class(entry.name)
            except AezooError as error:
                warnings.warn(f"{error}; it is left out", stacklevel=2)
            else:
                working.append(entry.name)
    return working


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def source_of(entry: Entry) -> Path | None:
    """The file that defines a model, found without importing it or its package; None if there is no such file."""
    search: list[str] | None = None
    origin = ""
    parts = entry.module.split(".")
    for i in range(1, len(parts) + 1):
        specs = (finder.find_spec(".".join(parts[:i]), search) for finder in sys.meta_path)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None:
            return None
        search, origin = list(spec.submodule_search_locations or []), spec.origin or ""
    return Path(origin) if origin.endswith(".py") else None


@lru_cache(maxsize=1024)
def _tree(path: Path, changed: int) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _parsed(entry: Entry) -> tuple[ast.Module, Entry | None]:
    """The source of a model's module, and where the class comes from if the module only re-exports it."""
    path = source_of(entry)
    if path is None:
        raise AezooError(
            f"no source file for {entry.module} of package {entry.owner}: is the plug-in installed completely?"
        )
    try:
        tree = _tree(path, path.stat().st_mtime_ns)
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise AezooError(
            f"the plug-in {entry.name!r} of package {entry.owner} is broken: {_one_line(error)}"
        ) from error
    package = entry.module if path.name == "__init__.py" else entry.module.rpartition(".")[0]
    for node in [node for node in tree.body if isinstance(node, ast.ImportFrom)]:
        for alias in node.names:
            if entry.attribute == (alias.asname or alias.name):
                module = "." * node.level + (node.module or "")
                return tree, replace(entry, module=resolve_name(module, package), attribute=alias.name)
    return tree, None


def _home(entry: Entry) -> tuple[Entry, ast.Module]:
    """The entry for the module that defines a class, which others may re-export, and that module."""
    tree, origin = _parsed(entry)
    for _ in range(_MAX_ALIAS_HOPS):
        if origin is None or origin.module.partition(".")[0] in _WITHOUT_MODELS or source_of(origin) is None:
            break
        entry = origin
        tree, origin = _parsed(entry)
    return entry, tree


def _defined(entry: Entry) -> tuple[Entry, ast.ClassDef | None]:
    """The entry for the place where a class is defined, and the class if it is found."""
    entry, tree = _home(entry)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    if entry.attribute:
        return entry, next((cls for cls in classes if cls.name == entry.attribute), None)
    for cls in reversed(classes):
        own = replace(entry, attribute=cls.name)
        if any(base.name == "Autoencoder" for _, base in _ancestry(own)):
            return own, cls
    return entry, None


def _ancestry(entry: Entry, before: tuple[str, ...] = ()) -> list[tuple[Entry, ast.ClassDef]]:
    """A class and its ancestors, in the order of inheritance, as far as their sources can be found."""
    entry, cls = _defined(entry)
    where = f"{entry.module}.{entry.attribute}"
    if cls is None or where in before:
        return []
    found = [(entry, cls)]
    for base in cls.bases:
        if isinstance(base, ast.Name):
            found += _ancestry(replace(entry, attribute=base.id), (*before, where))
    names = [(of.module, of.attribute) for of, _ in found]
    # an ancestor that several classes share comes after all of them
    return [pair for i, pair in enumerate(found) if names[i] not in names[i + 1 :]]


def _constructor(cls: ast.ClassDef) -> ast.FunctionDef | None:
    return next((f for f in cls.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)


def _arguments(init: ast.FunctionDef) -> dict[str, tuple[str, str]]:
    """Type and default of each argument of one constructor."""
    arguments = [*init.args.args[1:], *init.args.kwonlyargs]
    positional = [None] * (len(init.args.args) - 1 - len(init.args.defaults)) + list(init.args.defaults)
    return {
        argument.arg: (ast.unparse(argument.annotation) if argument.annotation else "", ast.unparse(d) if d else "")
        for argument, d in zip(arguments, [*positional, *init.args.kw_defaults], strict=True)
    }


def _forwarded(entry: Entry, init: ast.FunctionDef) -> set[str]:
    """The names of the arguments that a constructor takes as **kwargs: Unpack[...]."""
    kind = init.args.kwarg.annotation if init.args.kwarg else None
    if not isinstance(kind, ast.Subscript) or not isinstance(kind.slice, ast.Name):
        return set()
    group = _ancestry(replace(entry, attribute=kind.slice.id))
    fields = [field for _, cls in group for field in cls.body if isinstance(field, ast.AnnAssign)]
    return {field.target.id for field in fields if isinstance(field.target, ast.Name)}


def _defaults(cls: ast.ClassDef) -> dict[str, str]:
    """The defaults of inherited arguments that a class gives in its first line."""
    given = next((keyword.value for keyword in cls.keywords if keyword.arg == "defaults"), None)
    pairs = zip(given.keys, given.values, strict=True) if isinstance(given, ast.Dict) else ()
    return {str(key.value): ast.unparse(value) for key, value in pairs if isinstance(key, ast.Constant)}


def _parameters(lineage: list[tuple[Entry, ast.ClassDef]]) -> tuple[tuple[str, str, str, str], ...]:
    """Name, type, default and meaning of each argument, from the constructors of the class and its parents."""
    written = [(entry, init) for entry, cls in lineage if (init := _constructor(cls)) is not None]
    if not written:
        return ()
    found = _arguments(written[0][1])
    taken = _forwarded(*written[0])
    for _, init in written[1:]:
        found |= {key: value for key, value in _arguments(init).items() if key in taken and key not in found}
    defaults: dict[str, str] = {}
    meanings: dict[str, str] = {}
    for _, cls in reversed(lineage):
        init = _constructor(cls)
        defaults |= {key: default for key, (_, default) in _arguments(init).items()} if init else {}
        defaults |= _defaults(cls)
        meanings |= _descriptions(cls)
    return tuple((key, kind, defaults[key], meanings.get(key, "")) for key, (kind, _) in found.items())


def _descriptions(cls: ast.ClassDef) -> dict[str, str]:
    """What the docstring of a class says about each argument."""
    text = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", ast.get_docstring(cls) or "", re.MULTILINE | re.DOTALL)
    entries = re.findall(r"^ {4}(\w+): (.+?)(?=^ {4}[\w*]+: |\Z)", text[1] if text else "", re.MULTILINE | re.DOTALL)
    return {key: " ".join(value.split()) for key, value in entries}


@dataclass(frozen=True)
class Card:
    """A model's description, read from its source without importing it.

    Attributes:
        summary: first line of the module's docstring: name, authors, year, address of the paper.
        text: the rest of that docstring: the objective.
        about: first paragraph of the class's docstring.
        parameters: (name, type, default, meaning) of each argument of its constructor, which may be inherited.
    """

    summary: str
    text: str
    about: str
    parameters: tuple[tuple[str, str, str, str], ...]


def summary(name: str) -> str:
    """The first line of a model's source file: name, authors, year, address of the paper.

    Raises:
        AezooError: the model does not exist, or its source cannot be found or read.
    """
    return (ast.get_docstring(_home(find(name))[1]) or "").partition("\n")[0]


def card(name: str) -> Card:
    """Read a model's card from its source file.

    Raises:
        AezooError: the model does not exist, or its source cannot be found or read.
    """
    _, tree = _home(find(name))
    entry, cls = _defined(find(name))
    first, _, text = (ast.get_docstring(tree) or "").partition("\n")
    about = ((ast.get_docstring(cls) if cls else None) or "").partition("\n\n")[0]
    return Card(first, text.strip("\n"), about, _parameters(_ancestry(entry)) if cls else ())
