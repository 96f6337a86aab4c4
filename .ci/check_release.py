#!/usr/bin/env python3
"""Check whether this checkout can be tagged; prints one line for each thing to do, and exits with 1 if any.

    python .ci/check_release.py                    requirements at any time
    python .ci/check_release.py --tag v0.1.0       also those of this tag, which the owner fills in before

Needs Python 3.11 and nothing else.
"""

import argparse
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

VERSION = re.compile(r'^__version__ = "(.+)"$', re.M)
CITED = re.compile(r"^version: \"?([^\"\n]+)\"?$", re.M)
ADDRESS = re.compile(r"^repository-code: \"?([^\"\n]+)\"?$", re.M)
SECTION = re.compile(r"^## (\S+)(?: - (\S+))?$", re.M)
DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
FOLDERS = (".ci", ".github", "aezoo", "benchmarks", "docs", "recipes", "tests")
SUFFIXES = {"", ".cfg", ".cff", ".in", ".ipynb", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}
# with options and extras, in any quotes
FROM_INDEX = re.compile(r"""pip3? install (?:-{1,2}[\w-]+ )*['"`]?aezoo\b(?![\w/-]|\.\w)""")


def texts(root: Path) -> Iterator[tuple[str, str]]:
    """Name and content of each text file of the repository."""
    files = [path for path in root.iterdir() if path.is_file()]
    for folder in FOLDERS:
        files += [path for path in (root / folder).rglob("*") if path.suffix in SUFFIXES and path.is_file()]
    for path in sorted(files):
        yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8", errors="replace")


def captured(pattern: re.Pattern[str], text: str) -> str | None:
    """The first group of the first match."""
    match = pattern.search(text)
    return match[1] if match else None


def problems(root: Path, tag: str | None = None) -> list[str]:
    """What prevents a release of a checkout, one line each.

    Args:
        root: the checkout.
        tag: the tag to be made, such as v0.1.0; None checks only the requirements at any time.
    """
    lines = []
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = captured(VERSION, (root / "aezoo" / "__init__.py").read_text(encoding="utf-8"))
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    sections = SECTION.findall((root / "CHANGELOG.md").read_text(encoding="utf-8"))
    if version is None:
        return ['aezoo/__init__.py has no version: write __version__ = "0.1.0"']
    if project.get("version", version) != version:
        lines.append(f"pyproject.toml has version {project['version']}, aezoo/__init__.py {version}: make them equal")
    if captured(CITED, citation) != version:
        lines.append(
            f"CITATION.cff has version {captured(CITED, citation)}, aezoo/__init__.py {version}: make them equal"
        )
    if version not in dict(sections):
        lines.append(f"CHANGELOG.md has no section of {version}: rename the newest to '## {version} - unreleased'")
    for name, text in texts(root):
        for number, line in enumerate(text.splitlines(), 1):
            if FROM_INDEX.search(line):
                lines.append(f"{name}:{number} installs from an index, which has no aezoo: see docs/start.md#extras")
    if tag is None:
        return lines

    repository = project.get("urls", {}).get("Repository", "")
    if not repository.startswith("https://"):
        lines.append('pyproject.toml names no repository: add Repository = "https://..." to [project.urls]')
    elif captured(ADDRESS, citation) != repository:
        lines.append(f"CITATION.cff names another repository than pyproject.toml: write repository-code: {repository}")
    if tag != f"v{version}":
        lines.append(f"the tag {tag} is not that of version {version}: take v{version}, or raise __version__")
    newest, date = sections[0] if sections else ("", "")
    if newest != version or not DATE.fullmatch(date):
        lines.append(f"CHANGELOG.md does not begin with a dated {version}: write '## {version} - YYYY-MM-DD'")
    return lines


def main() -> int:
    """Print the problems of the checkout that contains this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tag", help="the tag to be made, such as v0.1.0")
    tag = parser.parse_args().tag
    lines = problems(Path(__file__).resolve().parents[1], tag)
    print("\n".join(lines) or f"ready{f' for {tag}' if tag else ', but for what --tag asks'}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
