"""Requirements for tagging a version, and installation instructions in one place only."""

import importlib.util
import re
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import aezoo
from aezoo.errors import install_hint

ROOT = Path(__file__).parents[1]
# the only texts for users and contributors with instructions to install a checkout
PLACES = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/start.md", "mkdocs.yml"}
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


release, dist = script("check_release"), script("check_dist")


def declared_extras():
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


@pytest.fixture
def ready(tmp_path):
    """A checkout that can be tagged."""
    files = {
        "pyproject.toml": '[project]\nname = "aezoo"\n[project.urls]\nRepository = "https://example.org/aezoo"\n',
        "CITATION.cff": "title: aezoo\nversion: 1.2.0\nrepository-code: https://example.org/aezoo\n",
        "CHANGELOG.md": "# Changelog\n\n## 1.2.0 - 2031-05-06\n\n## 1.1.0 - 2030-01-01\n",
        "README.md": f"In a checkout, {install_hint('onnx')}; `pip install aezoo-plugin`\n",
        "aezoo/__init__.py": '__version__ = "1.2.0"\n',
    }
    (tmp_path / "aezoo").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_checkout_keeps_rules_between_releases():
    assert release.problems(ROOT) == []


def test_tag_of_ready_checkout_is_accepted(ready):
    assert release.problems(ready, "v1.2.0") == []


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("pyproject.toml", "Repository", "Homepage", "pyproject.toml names no repository"),
        ("pyproject.toml", "[project.urls]", '[other]\nversion = "1"', "pyproject.toml names no repository"),
        ("CITATION.cff", "org/aezoo", "org/other", "CITATION.cff names another repository"),
        ("CITATION.cff", "1.2.0", "1.1.0", "CITATION.cff has version 1.1.0, aezoo/__init__.py 1.2.0"),
        ("aezoo/__init__.py", "1.2.0", "1.3.0", "CHANGELOG.md has no section of 1.3.0"),
        ("CHANGELOG.md", "2031-05-06", "unreleased", "write '## 1.2.0 - YYYY-MM-DD'"),
        ("CHANGELOG.md", "## 1.2.0", "## 1.3.0 - unreleased\n\n## 1.2.0", "does not begin with a dated 1.2.0"),
        ("README.md", "aezoo-plugin", "aezoo", "README.md:1 installs from an index"),
        ("README.md", "aezoo-plugin`", "aezoo.", "README.md:1 installs from an index"),
        ("README.md", "aezoo-plugin", "-U 'aezoo[onnx]", "README.md:1 installs from an index"),
        ("README.md", "aezoo-plugin", '--upgrade "aezoo>=1', "README.md:1 installs from an index"),
    ],
)
def test_tag_is_refused_with_what_to_do(ready, name, old, new, said):
    text = (ready / name).read_text()
    assert old in text
    (ready / name).write_text(text.replace(old, new, 1))
    assert any(said in line for line in release.problems(ready, "v1.2.0"))


def test_tag_of_another_version_is_refused(ready):
    assert release.problems(ready, "v1.2.1") == [
        "the tag v1.2.1 is not that of version 1.2.0: take v1.2.0, or raise __version__"
    ]


def test_installation_of_a_checkout_is_described_once():
    said = re.compile(r"pip install (?:-e )?['\"]?\.(?:\[|['\"]?(?: in a checkout|, then|\s*&&))")
    texts = {name: text for name, text in release.texts(ROOT) if not name.startswith(("tests/", ".ci/", ".github/"))}
    # cards of pretrained weights contain install_hint
    cards = {name: text.replace(install_hint(), "") for name, text in texts.items() if name.startswith("docs/weights/")}
    assert {name for name, text in (texts | cards).items() if said.search(text)} == PLACES


def test_hints_name_extras_that_exist():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "aezoo").rglob("*.py"))
    named = set(re.findall(r"install_hint\(['\"](\w+)['\"]\)", sources))
    assert named >= {"codec", "onnx", "tune"} and named <= declared_extras()


def test_start_page_lists_every_extra():
    page = (ROOT / "docs" / "start.md").read_text(encoding="utf-8").partition("## Extras")[2]
    assert set(re.findall(r"`(\w+)`", "".join(re.findall(r"(?m)^\| (`[^|]+) \|", page)))) | {"test", "docs"} == (
        declared_extras()
    )


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_has_least_rights_and_pinned_actions(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    writing = {"deploy": {"pages", "id-token"}, "publish": {"id-token"}, "release": {"contents"}, "report": {"issues"}}
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 120
        rights = job.get("permissions", {})
        assert {right for right, level in rights.items() if level != "read"} == writing.get(name, set())
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step.get("uses", "a/b@v1"))


def test_reference_lists_every_public_name():
    listed = re.findall(r"(?m)^::: aezoo\.(?:\w+\.)*(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"))
    assert set(aezoo.__all__) <= set(listed)


def test_image_is_built_from_all_that_the_wheel_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    needed = {name.partition("/")[0] for name in needed | {*wheel["only-include"]} | {*wheel["force-include"]}}
    copied = re.findall(r"(?m)^COPY (?!--from)(.+) /\S+$", (ROOT / "Dockerfile").read_text())
    assert {name for line in copied for name in line.split()} == needed
    assert {*re.findall(r"(?m)^!(\S+)$", (ROOT / ".dockerignore").read_text())} == needed


@pytest.fixture
def archives(tmp_path):
    """An sdist and two equal wheels."""
    files = [*dist.NEEDED, "aezoo/__init__.py", "aezoo-1.0.dist-info/METADATA"]
    wheels = tmp_path / "one.whl", tmp_path / "other.whl"
    for path in wheels:
        with zipfile.ZipFile(path, "w") as archive:
            for name in files:
                archive.writestr(name, "")
    with tarfile.open(tmp_path / "aezoo.tar.gz", "w:gz") as archive:
        for name in ("pyproject.toml", "tests/test_models.py", "CHANGELOG.md", "LICENSE"):
            archive.addfile(tarfile.TarInfo(f"aezoo-1.0/{name}"))
    return tmp_path / "aezoo.tar.gz", *wheels


def test_complete_archives_are_accepted(archives):
    assert dist.problems(*archives) == []


@pytest.mark.parametrize(
    "name",
    ["tests/conftest.py", "aezoo/test_models.py", "aezoo/__pycache__/a.pyc", "docs/start.md", "recipes/vae.yaml"],
)
def test_stray_file_in_wheels_is_reported(archives, name):
    for path in archives[1:]:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, "")
    assert any(line.endswith(name) for line in dist.problems(*archives))


def test_wheels_that_differ_are_reported(archives):
    with zipfile.ZipFile(archives[2], "a") as archive:
        archive.writestr("aezoo/models/new.py", "")
    assert dist.problems(*archives) == ["only one of the two wheels holds aezoo/models/new.py"]
