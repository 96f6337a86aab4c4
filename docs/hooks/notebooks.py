"""Pages of the tutorials: their notebooks as Markdown, with the outputs that are stored in them."""

import base64
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import nbformat

# pandas writes a style and attributes that are obsolete for each table, and the site has a style for all
_OF_PANDAS = re.compile(
    r'<style scoped>.*?</style>|(?<=<table) border="1" class="dataframe"|(?<=<tr) style="[^"]*"|\n\s*', re.DOTALL
)


def colab(path: Path, pyproject: Path) -> str | None:
    """The address at which Colab opens a notebook of this repository; None as long as no public one is named."""
    urls = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"].get("urls", {})
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", urls.get("Repository", ""))
    place = path.relative_to(pyproject.parent).as_posix()
    return f"https://colab.research.google.com/github/{found[1]}/blob/main/{place}" if found else None


def page(path: Path, colab: str | None = None) -> tuple[str, dict[str, bytes]]:
    """The page of a notebook.

    Args:
        path: the notebook, with its outputs.
        colab: address that opens it in Colab, if the repository has a public one.

    Returns:
        Markdown, and the pictures that it shows, by their paths beside it.
    """
    notebook: Any = nbformat.read(path, as_version=4)
    parts, pictures = [], {}
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", cell.source))
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for j, output in enumerate(_joined(cell.outputs)):
            for kind, content in _shown(output):
                if kind == "image/png":
                    name = f"{path.stem}_{i}_{j}.png"
                    pictures[name] = base64.b64decode(content)
                    parts.append(f"![output of the code above]({name})")
                else:
                    parts.append(content if kind == "text/html" else f"```text\n{content.rstrip()}\n```")
    links = [f"[Download this notebook]({path.name})", *([f"[Open in Colab]({colab})"] if colab else [])]
    heading, _, rest = parts[0].partition("\n")
    return "\n\n".join([heading, " · ".join(links), rest, *parts[1:]]) + "\n", pictures


def _joined(outputs: Iterable[Any]) -> list[Any]:
    """The outputs, with what was printed in several pieces as one."""
    found: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and found and found[-1].get("name") == output.name:
            found[-1] = nbformat.from_dict({**found[-1], "text": found[-1].text + output.text})
        else:
            found.append(output)
    return found


def _shown(output: Any) -> Iterator[tuple[str, str]]:
    """What the page has of an output: a picture, else a table, else text; warnings are for who runs it."""
    if output.output_type == "stream":
        if output.name == "stdout":
            yield "text/plain", output.text
    elif "image/png" in output.data:
        yield "image/png", output.data["image/png"]
    elif "text/html" in output.data:
        yield "text/html", _OF_PANDAS.sub("", output.data["text/html"])
    elif "text/plain" in output.data:
        yield "text/plain", output.data["text/plain"]
