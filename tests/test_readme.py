"""The README, the pages of `docs/` and the recipes state the measured results and the behaviour of the code."""

import re
import warnings
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from parity import __main__ as parity

import aezoo
from aezoo import registry
from aezoo.bases.entropy_coded import EntropyCoded
from benchmarks import recipes as benchmark
from benchmarks import report
from benchmarks.common import read_csv
from benchmarks.quality import LEFT_OUT

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "benchmarks" / "RESULTS.md"])


def page(name):
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_tables_and_headers_match_newest_results():
    rows = benchmark.read_rows(benchmark.newest_results())
    assert rows.keys() == benchmark.trainable_recipes().keys()
    for path, text in benchmark.updated_pages(rows).items():
        assert text == path.read_text(encoding="utf-8"), "run `python -m benchmarks.report`"
    for name, path in benchmark.trainable_recipes().items():
        line = benchmark.result_line(rows[name], benchmark.newest_results())
        assert line in path.read_text(encoding="utf-8").splitlines()


def test_figures_of_performance_match_result_files():
    """Figures in sentences, which no script writes: edit the sentences after new measurements."""
    rows = {path.stem: read_csv(path)[1] for path in (ROOT / "benchmarks" / "results").glob("*.csv")}
    performance = rest = " ".join(page("performance").split())

    def states(sentence):
        nonlocal rest
        assert sentence in performance
        rest = rest.replace(sentence, "")

    def figures(prefix, column, *ends, **where):
        parts = [part for stem, part in rows.items() if stem.startswith(prefix) and stem.endswith(ends or "")]
        where = {"devices": "1"} | where if prefix.startswith("speed-") else where
        found = [row for part in parts for row in part if all(row.get(key) == value for key, value in where.items())]
        return sorted(column(row) if callable(column) else float(row[column]) for row in found)

    def ratio(workload, precision, end, party="aezoo"):
        (found,) = figures(f"peers-{workload}-{precision}-", "ratio", end, party=party)
        return f"{found:.2f}"

    compiled = figures("peers-dense", "ratio", party="aezoo_compiled")
    convolutional = figures("peers-conv", "ratio", party="aezoo")
    states(f"a dense network trains at {compiled[0]:.2f} to {compiled[-1]:.2f} times the loop's speed")
    states(f"not compiled and train at {convolutional[0]:.2f} to {convolutional[-1]:.2f} times the loop's speed")
    intel = [ratio("dense", precision, "cpu2") for precision in ("fp32", "bf16")]
    zen5 = [ratio("dense", precision, "zen5") for precision in ("fp32", "bf16")]
    states(f"slower than the loop on an Intel processor ({intel[0]} in float32, {intel[1]} in bfloat16)")
    states(f"on a Zen 5 processor it is faster in float32 ({zen5[0]}) and slower in bfloat16 ({zen5[1]})")

    def outside(rows):
        (share,) = figures(f"peers-dense{rows}rows-fp32-", "outside_share", "zen4", party="aezoo")
        return f"{100 * share:.0f}"

    few, *usual = map(outside, (640, 32_000, 3840))
    states(f"{usual[0]} to {usual[1]} % of a run of 60 or 500 steps per epoch, and {few} % with 10 steps")

    def most(end, chosen="products"):
        by_precision = (
            figures(f"convolutions-{precision}-", "speedup", end, chosen=chosen) for precision in ("fp32", "bf16")
        )
        return [f"{found[-1]:.1f}" for found in by_precision]

    best = [*most("cpu2"), *most("zen5"), *most("zen4")]
    sentence = (
        "up to {} times as fast as the convolution that torch would use (in bfloat16 {} times) on an Intel processor "
        "with AMX, {} ({}) on a Zen 5 and {} ({}) on a Zen 4"
    ).format(*best)
    states(sentence)

    states("up to {} times (in bfloat16 {} times) as fast as torch's layers".format(*most("zen5", "batch_inner")))

    def by_torch(precision):
        def found(row):
            return float(row["torch_ms"]) / float(row["separate_gradients_ms"])

        return f"{figures(f'convolutions-{precision}-', found, layer='transposed_odd')[-1]:.1f}"

    longer = by_torch("fp32"), by_torch("bf16")
    states("On a Zen 5, torch's layer takes up to {} times as long, in bfloat16 {} times.".format(*longer))

    *_, each = figures("speed-train-", "guard_share", "zen5")
    intel = figures("speed-train-", lambda row: float(row["guard_share"] or 0), "cpu2")
    states(
        f"takes up to {100 * each:.0f} % of a step on a Zen 5 and up to {100 * intel[-1]:.1f} % on an Intel processor"
    )

    def by_two(name):
        two, one = (
            figures("speed-train-fp32-", "samples_per_s", "zen5", name=name, compile="off", devices=devices)[0]
            for devices in ("2", "1")
        )
        return f"{two / one:.2f}"

    sentence = (
        "two processes train `conv_vae_64` at {} and `conv_vae_28` at {} times the speed of one process. They train "
        "`dense_article` at {} times that speed"
    )
    sentence = sentence.format(*map(by_two, ("conv_vae_64", "conv_vae_28", "dense_article")))
    states(sentence)

    # no other percentage or ratio is stated
    assert re.findall(r"\d+ %|\d\.\d", rest) == []

    runs = [part for stem, part in rows.items() if stem.startswith("quality-") and "-recipes-" not in stem]
    sets = [{row["model"] for row in part if not row["error"]} for part in runs]
    classes = {name: registry.model_class(name) for name in registry.list_models()}
    numbers = {name for name, kind in classes.items() if not kind.discrete_code and not issubclass(kind, EntropyCoded)}
    numbers -= LEFT_OUT.keys()
    assert len(sets) == 4 and all(numbers <= found for found in sets) and "On three other data sets" in performance


@pytest.mark.slow
def test_report_matches_result_files():
    home = ROOT / "benchmarks"
    pages, _ = report.pages(home / "results", home)
    there = {path.name: path.read_text(encoding="utf-8") for path in report.pages_folder(home).glob("*.md")}
    assert there == {name: f"{page}\n" for name, page in pages.items()}, "run `python -m benchmarks.report`"
    assert max(len(page.encode()) for name, page in pages.items() if name != "targets.md") <= 15_100
    assert report.page_list(pages, "../docs/results") in (home / "RESULTS.md").read_text(encoding="utf-8")


def test_parity_page_is_that_of_its_rows():
    rows = parity.read_rows()
    text = parity.page(rows)
    assert parity.PAGE.read_text(encoding="utf-8") == text, "run python tests/parity"
    # the README says that every model was compared with a reference
    assert "only by their laws" not in text, (
        "give the docstring of its laws the repository and commit it was compared with"
    )
    assert {row["model"] for row in rows} <= set(aezoo.list_models())


def test_every_model_has_its_own_law_file():
    built_in = [name for name in aezoo.list_models() if registry.find(name).owner == "aezoo"]
    assert not [name for name in built_in if sum(benchmark.laws(name)) < 3]


def test_models_that_commands_name_exist():
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "recipes").glob("*.yaml"),
    ]
    named = {name for page in pages for name in re.findall(r"--model[ =](\w+)", page.read_text(encoding="utf-8"))}
    # the model defined in docs/extend.md
    assert named - {"my_ae"} <= {*aezoo.list_models()}


def test_names_of_tests_have_at_most_60_characters():
    names = {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert [name for name in names if len(name) > 60] == []


def test_readme_has_at_most_12_kilobytes():
    assert len(README.encode()) <= 12_000


def test_readme_has_the_first_and_the_test_command():
    assert ".venv/bin/pip install . && .venv/bin/aezoo fit -c vae" in README
    assert ".venv/bin/pip install -e '.[test]' && .venv/bin/pytest" in README


def prose(path):
    """A page without its code, where brackets are not links."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", path.read_text(encoding="utf-8"))
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", text)


@cache
def anchors(path):
    """The anchors of a page's headings, as generated by code hosts."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", path.read_text(encoding="utf-8"))
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"(?m)^#+ +(.*)$", text)]
    found, seen = set(), Counter()
    for title in titles:
        slug = re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken_links(path):
    for target in re.findall(r"\]\(([^()\s]+)\)", prose(path)):
        place, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", place):
            continue
        file = path.parent / place if place else path
        if not file.exists() or (anchor and anchor not in anchors(file.resolve())):
            yield target


def test_relative_links_of_pages_resolve():
    assert {path.name for path in PAGES} >= {"README.md", "start.md", "house.md", "vae.mnist.md", "RESULTS.md"}
    broken = {f"{path.relative_to(ROOT)}: {target}" for path in PAGES for target in broken_links(path)}
    assert broken == set()


def test_broken_links_are_found(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(
        "# A `b`: c\n[x](#a-b-c) [x](#a) [x](page.md#a-b-c) ![x](no.png) `[x](code)`\n```\n[x](code)\n```\n"
    )
    assert [*broken_links(path)] == ["#a", "no.png"]


@pytest.mark.slow
def test_model_of_the_documentation_keeps_the_contract(tmp_path, monkeypatch):
    source = re.search(r'```python\n("""My autoencoder.*?)```', page("extend"), re.DOTALL)[1]
    assert len([line for line in source.split('"""')[-1].splitlines() if line.strip()]) <= 20
    (tmp_path / "my_ae.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    from my_ae import MyAE

    from aezoo.testing import CHECKS, check_ddp

    for check in CHECKS:
        if check is not check_ddp:
            check(MyAE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_python_code_of_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = re.search(r"```python\n(import aezoo\n.*?)```", page("python"), re.DOTALL)[1]
    names: dict[str, object] = {}
    exec(source.replace("max_epochs=5", "max_epochs=1"), names)
    assert isinstance(names["model"], aezoo.Autoencoder)
    assert names["z"].shape == (500, 8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_python_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = re.search(r"```python\n(import aezoo\n.*?)```", README, re.DOTALL)[1]
    exec(source.replace("max_epochs=5", "max_epochs=1"), {})
    lines = capsys.readouterr().out.splitlines()
    assert {"vae", "beta_tcvae", "wae_mmd"} <= {line.partition(" ")[0] for line in lines}


def test_names_in_documentation_exist():
    pages = [page.read_text(encoding="utf-8") for pattern in ("*.md", "docs/*.md") for page in ROOT.glob(pattern)]
    named = {name for page in pages for name in re.findall(r"\baezoo\.([a-z_]\w*)", page)}
    assert {"io", "load_model", "metrics"} <= named
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the changelog names old paths, which still work
        assert [name for name in named if not hasattr(aezoo, name)] == []
