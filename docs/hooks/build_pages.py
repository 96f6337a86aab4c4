"""The pages of the site that no file in `docs/` holds, and its links: a hook of MkDocs, see `mkdocs.yml`.

- Each model has a page, made from its source, its tests, `aezoo/results.json`, recipes and pretrained weights.
- README, changelog and the like are pages, too. Links lead there, and files outside `docs/` are copied where one does.
- The build fails if a page would load anything from another host.
"""

import importlib.util
import itertools
import posixpath
import re
import sys
from collections.abc import Collection
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import gallery  # noqa: E402
import notebooks  # noqa: E402
import pareto_page  # noqa: E402
import typeset  # noqa: E402

from aezoo import registry  # noqa: E402
from aezoo.cli import measured  # noqa: E402
from aezoo.cli.recipes import recipes  # noqa: E402
from aezoo.training.traits import TAGS  # noqa: E402
from benchmarks import pareto, report  # noqa: E402
from benchmarks import recipes as tables  # noqa: E402

# files of the repository that are pages of the site
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    "CONTRIBUTING.md": "contributing.md",
    "PROMISES.md": "promises.md",
    "SECURITY.md": "security.md",
    "benchmarks/RESULTS.md": "results/index.md",
}
PARETO, GALLERY = "results/pareto.md", "gallery.md"
FOLDERS = {"benchmarks/results": "results/index.md"}
# code, in which brackets are no links, or the text and the target of a link
LINK = re.compile(
    r"(^ *```.*?^ *```$|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))|\[([^\[\]]*)\]\(([^()\s]+)\)",
    re.DOTALL | re.MULTILINE,
)
LOADED = re.compile(r"<(?:script|img|iframe|source|video)\b[^>]*?\bsrc=[\"']?(?:https?:)?//[^\"'>\s]+|"
                    r"<link\b[^>]*?\brel=[\"']?(?:stylesheet|preload|icon)[^>]*?\bhref=[\"']?(?:https?:)?//[^\"'>\s]+|"
                    r"@import\s+[\"'(]*(?:https?:)?//\S+")  # fmt: skip


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Complete the navigation: the models by family, and the pages of results."""
    for entry in config.nav or []:
        if "Models" in entry:
            entry["Models"].append(GALLERY)
            for family, names in tables.families().items():
                entry["Models"].append({family: [{name: f"models/{name}.md"} for name in names]})
        if "Results" in entry:
            entry["Results"].append({"Error and training speed": PARETO})
            entry["Results"] += [f"results/{path.name}" for path in sorted((ROOT / "docs" / "results").glob("*.md"))]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, the pages outside `docs/`, and the files that pages refer to."""
    for origin, uri in PAGES.items():
        _add(files, config, uri, (ROOT / origin).read_text(encoding="utf-8"), origin)
    families = tables.families()
    shipped = [tag.name for names in families.values() for name in names for tag in registry.tags_of(name)]
    traversals = gallery.pictures(shipped)
    explorer = gallery.explorer(shipped, ROOT / "build" / "explorer")
    for place, path in explorer.items():
        files.append(File.generated(config, f"explorer/{place}", abs_src_path=str(path)))
    _add(files, config, GALLERY, gallery.page(shipped, traversals, bool(explorer)), f"docs/{GALLERY}")
    for name, picture in traversals.items():
        files.append(File.generated(config, f"weights/{name}.traversal.png", content=picture))
    related = _relatives([name for names in families.values() for name in names])
    for family, names in families.items():
        for name in names:
            page = model_page(name, family, related[name], traversals)
            _add(files, config, f"models/{name}.md", page, f"docs/models/{name}.md")
    for path in sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")):
        content, pictures = notebooks.page(path, notebooks.colab(path, ROOT / "pyproject.toml"))
        _add(files, config, f"tutorials/{path.stem}.md", content, f"docs/tutorials/{path.stem}.md")
        for name, picture in pictures.items():
            files.append(File.generated(config, f"tutorials/{name}", content=picture))
    panels = pareto.panels(report.compared_models(ROOT / "benchmarks" / "results"))
    _add(files, config, PARETO, pareto_page.page(panels), f"docs/{PARETO}")
    katex = Path(importlib.util.find_spec("sphinxcontrib.katex").origin).parent / "katex.min.js"
    files.append(File.generated(config, "assets/katex.min.js", abs_src_path=str(katex)))
    for file in [*files.documentation_pages()]:
        for *_, target in LINK.findall(file.content_string):
            path = _in_repository(file, target)
            if path and not path.startswith("docs/") and path not in PAGES and (ROOT / path).is_file():
                if path.endswith(".md"):
                    _add(files, config, f"files/{path}", (ROOT / path).read_text(encoding="utf-8"), path)
                elif files.get_file_from_path(f"files/{path}") is None:
                    files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files of the repository to their places in the site, and names of models to their pages.

    In code in tables, code hosts need a backslash before a bar, which Python-Markdown would show.
    """
    if page.file.src_uri in ("models.md", "choose.md"):
        markdown = re.sub(r"^\| `(\w+)` \|", r"| [`\1`](models/\1.md) |", markdown, flags=re.MULTILINE)

    def written(found: re.Match[str]) -> str:
        if found[1]:
            return found[0].replace("\\|", "|") if found["ticks"] else found[0]
        return _link(page.file, found[3], found[4])

    return LINK.sub(written, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Typeset the formulas of the API reference, whose docstrings mkdocstrings has turned into HTML."""
    return typeset.in_html(content) if page.file.src_uri == "api.md" else content


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse pages that load something from another host.

    Raises:
        PluginError: a page does.
    """
    loaded = {
        f"{path.relative_to(config.site_dir)}: {found[0]}"
        for path in Path(config.site_dir).rglob("*.html")
        for found in LOADED.finditer(path.read_text(encoding="utf-8"))
    }
    if loaded:
        raise PluginError("pages load from other hosts: " + "; ".join(sorted(loaded)[:5]))


# ---- links ----------------------------------------------------------------------------------------------------------


def _add(files: Files, config: MkDocsConfig, uri: str, content: str, origin: str) -> None:
    if files.get_file_from_path(uri) is None:
        file = File.generated(config, uri, content=content)
        file.origin = origin
        files.append(file)


def _in_repository(file: File, target: str) -> str | None:
    """The path in the repository that a relative link of a page leads to; None for an address or an anchor."""
    place = target.partition("#")[0]
    if not place or re.match(r"[a-z]+:", place):
        return None
    origin = getattr(file, "origin", f"docs/{file.src_uri}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), place))


def _link(file: File, text: str, target: str) -> str:
    path = _in_repository(file, target)
    if path is None:
        return f"[{text}]({target})"
    # a folder without a page has no place in the site
    if path not in FOLDERS and (ROOT / path).is_dir():
        return text
    _, hash_sign, anchor = target.partition("#")
    uri = PAGES.get(path) or FOLDERS.get(path) or (path[5:] if path.startswith("docs/") else f"files/{path}")
    # other pages lead to a tutorial's page, and that page to the notebook itself
    if uri.startswith("tutorials/") and not file.src_uri.startswith("tutorials/"):
        uri = uri.replace(".ipynb", ".md")
    place = posixpath.relpath(uri, posixpath.dirname(file.src_uri) or ".")
    return f"[{text}]({place}{hash_sign}{anchor})"


# ---- pages of models ------------------------------------------------------------------------------------------------


def model_page(name: str, family: str, related: dict[str, list[str]], traversals: Collection[str]) -> str:
    """The page of a model."""
    card = registry.card(name)
    uses = "".join(f"- **{use}**: {TAGS.get(use, '')}\n" for use in registry.uses_of(name))
    link = f"[{family}](../models.md#{family})"
    sections = [
        f"# {name}\n\n{tables.paper(name)}, family {link}.\n\n{card.about}\n\n{uses}",
        _objective(name, card.text),
        _hyperparameters(name, card.parameters),
        _weights(name, traversals),
        "## Figures\n\n" + _text(measured.lines(name)),
        _laws(name, family),
        _recipes(name),
        _related(related),
        _source(name),
    ]
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def _objective(name: str, text: str) -> str:
    return f"## Objective\n\n{typeset.element(tables.objective(name).strip('`'), 'div')}\n\n{_docstring(text)}"


def _docstring(text: str) -> str:
    """The prose of a docstring as paragraphs, and its formulas, most of which are indented, typeset."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        for indented, group in itertools.groupby(paragraph.splitlines(), key=lambda line: line.startswith("    ")):
            lines = [line.removeprefix("    ") for line in group]
            parts.append(typeset.block(lines) or _text(lines) if indented else _prose("\n".join(lines)))
    return "\n\n".join(parts)


def _prose(text: str) -> str:
    """Text in which only backticks mean something to Markdown, with its symbols typeset."""
    special = re.compile(r"(`[^`]*`)|([*_<>\[\]#|~^\\])")
    return typeset.with_symbols(text, lambda plain: special.sub(lambda found: found[1] or f"&#{ord(found[2])};", plain))


def _text(lines: list[str]) -> str:
    return "```text\n" + "\n".join(lines) + "\n```"


def _hyperparameters(name: str, parameters: tuple[tuple[str, str, str, str], ...]) -> str:
    lines = [
        f"## Hyperparameters\n\n`--model.NAME VALUE`, or `aezoo.create_model({name!r}, NAME=VALUE)`\n",
        "| name | type | default | meaning |",
        "|---" * 4 + "|",
    ]
    for key, kind, default, meaning in parameters:
        if key != "input_shape":
            about = typeset.words(meaning).replace("|", "&#124;")
            lines.append(f"| `{key}` | `{kind}` | `{default}` | {about} |")
    return "\n".join(lines)


def _weights(name: str, traversals: Collection[str]) -> str:
    parts = []
    for tag in registry.tags_of(name):
        page = ROOT / "docs" / "weights" / f"{tag.name}.md"
        if page.is_file():
            figures = ", ".join(map(str, tag.figures[:3]))
            size = f"{tag.bytes / 1e6:.2f} MB, {tag.license}"
            parts.append(f"[`{tag.name}`](../weights/{page.name}): {figures}; {size}")
            if page.with_suffix(".png").is_file():
                parts.append(f"![samples and reconstructions of {tag.name}](../weights/{tag.name}.png)")
            if tag.name in traversals:
                parts.append("Each row moves one number of the code, see the [gallery](../gallery.md).")
                parts.append(f"![one number of the code of {tag.name} a row](../weights/{tag.name}.traversal.png)")
    return "## Pretrained weights\n\n" + "\n\n".join(parts) if parts else ""


def _laws(name: str, family: str) -> str:
    own, shared = tables.laws(name)
    others = [*tables.compared_with().get(name, ()), *(repository for repository, _ in tables.repositories(name))]
    names = re.findall(r"^def test_(\w+)", tables.file_of_laws(name).read_text(encoding="utf-8"), re.MULTILINE)
    listed = "\n".join(f"- {law.replace('_', ' ')}" for law in names)
    text = (
        f"`tests/laws/{family}/test_{name}.py` checks mathematical properties of the model: {own} tests "
        f"written for it, and {shared} shared with models of its family."
    )
    compared = f"\n\nCompared with {', '.join(others)}, see [parity](../parity.md)." if others else ""
    return f"## Tests\n\n{text}{compared}\n\n{listed}"


def _recipes(name: str) -> str:
    found = []
    for recipe, path in recipes().items():
        text = path.read_text(encoding="utf-8")
        if re.search(rf"class_path: {name}\b", text):
            found.append(f"`aezoo fit -c {recipe}`\n\n```yaml\n{text.strip()}\n```")
    return "## Recipes\n\n" + "\n\n".join(found) if found else ""


def _relatives(names: list[str]) -> dict[str, dict[str, list[str]]]:
    """For each model, the models that its class extends and those that extend it."""
    by_class = {registry.model_class(name): name for name in names}
    found: dict[str, dict[str, list[str]]] = {name: {"Extends": [], "Extended by": []} for name in names}
    for cls, name in by_class.items():
        for parent in cls.__mro__[1:]:
            if parent in by_class:
                found[name]["Extends"].append(by_class[parent])
                found[by_class[parent]]["Extended by"].append(name)
    return found


def _related(related: dict[str, list[str]]) -> str:
    lines = [
        f"{title}: {', '.join(f'[`{name}`]({name}.md)' for name in names)}" for title, names in related.items() if names
    ]
    return "## Related models\n\n" + "\n\n".join(lines) if lines else ""


def _source(name: str) -> str:
    path = registry.source_of(registry.find(name))
    assert path is not None
    code = path.read_text(encoding="utf-8").strip().replace("\n", "\n    ").replace("\n    \n", "\n\n")
    shown = path.relative_to(ROOT).as_posix()
    return f'## Source {{ data-search-exclude }}\n\n??? abstract "{shown}"\n\n    ```python\n    {code}\n    ```'
