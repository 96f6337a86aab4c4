"""The plot of error against speed labels its front and standard models; every point has its figures and a link."""

import importlib.util
import sys
from pathlib import Path
from xml.etree import ElementTree

from benchmarks import pareto

HOOKS = Path(__file__).parents[2] / "docs" / "hooks"
spec = importlib.util.spec_from_file_location("pareto_page", HOOKS / "pareto_page.py")
pareto_page = importlib.util.module_from_spec(spec)
sys.modules["pareto_page"] = pareto_page  # named tuples of a module loaded by path look up this entry
spec.loader.exec_module(pareto_page)


def rows():
    """Thirty models on a line, two more on the Pareto front, and a faster one on another processor."""
    found = [(f"m{i}", 0.02 + 0.001 * i, 1000 + 10 * i, "p") for i in range(28)]
    found += [("vae", 0.05, 500, "p"), ("dense_ae", 0.06, 600, "p")]
    found += [("best", 0.01, 900, "p"), ("fastest", 0.03, 9000, "p"), ("elsewhere", 0.005, 20_000, "q")]
    return [
        {"model": name, "family": "f<1>" if error > 0.03 else "g", "dataset": "d", "code_size": "16"}
        | {"mse": str(error), "samples_per_s": str(rate), "pca_mse": "0.025", "processor": processor}
        for name, error, rate, processor in found
    ]


def test_front_and_textbook_models_are_named():
    (panel,) = pareto.panels([*rows(), {"dataset": "d", "model": "failed", "error": "out of memory"}])
    assert len(panel.points) == 33 and (panel.code_size, panel.pca) == ("16", 0.025)
    assert {p.label for p in panel.points} - {""} == {"vae", "dense_ae", *(p.row["model"] for p in on_front(panel))}
    names = [point.row["model"] for point in on_front(panel)]
    assert {"best", "fastest", "m0"} <= {*names} and "elsewhere" not in names
    for speed, error in panel.front:
        assert not any(p.compared and p.speed > speed and p.error < error for p in panel.points)
    (few,) = pareto.panels(rows()[:5])
    assert all(point.label == point.row["model"] for point in few.points)


def on_front(panel):
    return [point for point in panel.points if (point.speed, point.error) in panel.front]


def test_each_point_has_figures_and_a_link():
    (panel,) = pareto.panels(rows())
    page = pareto_page.page([panel])
    figure = ElementTree.fromstring(page[page.index("<figure") : page.index("</figure>") + len("</figure>")])
    links = figure.findall(".//a")
    assert [link.get("href") for link in links] == [f"../models/{row['model']}.html" for row in rows()]
    titles = [link.find("circle/title").text for link in links]
    assert titles[-1] == "elsewhere: mse 0.005, 20,000 samples a second, code of 16"
    assert [link.find("circle").get("fill") == "none" for link in links] == [False] * 32 + [True]
    heights = {title: float(link.find("circle").get("cy")) for title, link in zip(titles, links, strict=True)}
    assert [*sorted(heights, key=heights.get)] == [*sorted(titles, key=lambda t: -float(t.split()[2].strip(",")))]
    assert {text.text for text in figure.findall(".//text[@class='name']")} == {p.label for p in panel.points} - {""}
    assert [span.find("i").tail for span in figure.findall("figcaption/span")] == ["g", "f<1>"]


def test_names_do_not_cover_each_other():
    (panel,) = pareto.panels(rows()[:12])
    page = pareto_page.page([panel])
    figure = ElementTree.fromstring(page[page.index("<figure") : page.index("</figure>") + len("</figure>")])
    places = [(float(t.get("x")), float(t.get("y"))) for t in figure.findall(".//text[@class='name']")]
    for i, (x, y) in enumerate(places):
        assert not any(abs(x - a) < 13 and abs(y - b) < 12 for a, b in places[:i])
