"""The check of the site finds each kind of mistake."""

import pytest

from tests import site_check

GOOD = """<!doctype html><html lang="en"><head><title>A page</title><link rel="icon" href="dot.svg">
<meta name="viewport" content="width=device-width">
<style>@media (prefers-color-scheme: dark) { body { background: black; color: white } } body { background: white }
@media (prefers-color-scheme: dark) { body { background: black } }</style></head>
<body><h1 id="top">A page</h1><p><a href="other.html#there">There</a> <img src="dot.svg" alt="A dot"></p></body></html>
"""
DOT = '<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"><circle r="2"/></svg>'


@pytest.fixture
def site(tmp_path):
    (tmp_path / "index.html").write_text(GOOD)
    (tmp_path / "other.html").write_text(GOOD.replace('id="top"', 'id="there"'))
    (tmp_path / "dot.svg").write_text(DOT)
    return tmp_path


def changed(site, old, new):
    assert old in GOOD
    (site / "index.html").write_text(GOOD.replace(old, new))
    return site


def test_good_links_pass(site):
    assert site_check.broken_links(site) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("other.html#there", "none.html", "index.html: there is no none.html"),
        ("other.html#there", "other.html#top", "index.html: other.html#top names no anchor"),
        ("other.html#there", "#there", "index.html: #there names no anchor"),
        ("dot.svg", "none.svg", "index.html: there is no none.svg"),
    ],
)
def test_broken_link_is_found(site, old, new, message):
    assert site_check.broken_links(changed(site, old, new)) == [message]


def test_folder_without_pages_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="mkdocs build --strict"):
        site_check.main([str(tmp_path)])


BODY = "<h1"
MISTAKES = {
    "picture": ("dot.svg", "none.svg", "the picture none.svg is missing"),
    "console": (BODY, "<script>console.error('a mistake')</script><h1", "a mistake"),
    "exception": (BODY, "<script>none()</script><h1", "none is not defined"),
    "host": (BODY, "<script src='http://127.0.0.1:9/x.js'></script><h1", "asks for http://127.0.0.1:9/x.js"),
    "wide": (BODY, "<div style='width: 700px'>wide</div><h1", "is wider than a screen of 360 pixels"),
    "dark": ("background: black", "background: white", "has text of brightness 1.00 on 1.00"),
}


@pytest.mark.slow
def test_browser_finds_each_mistake(site):
    if not site_check.chromium():
        pytest.skip("there is no Chromium here")
    pages = {"light": [site / "index.html"], "dark": [site / "index.html"]}
    assert site_check.failures_in_browser(site, pages) == []
    for old, new, message in MISTAKES.values():
        found = site_check.failures_in_browser(changed(site, old, new), pages)
        assert any(message in text for text in found), (message, found)
