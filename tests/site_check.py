"""Check the built site: links, anchors, markup, and every page in Chromium, narrow and wide, light and dark.

    python -m mkdocs build --strict
    npm pack vnu-jar && tar xzf vnu-jar-*.tgz
    python -m tests.site_check build/site --vnu package/build/dist/vnu.jar

Links are checked in the files. Markup is checked by the Nu HTML checker, npm's vnu-jar, which needs Java. Chromium
opens each page from a local server: there must be no console errors, missing images, requests to other hosts or pages
wider than the screen, and the dark scheme must be dark.
"""

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

WIDTHS = (360, 1280)
# errors in mkdocs-material's own templates: a checkbox with autocomplete, an empty tabindex, a label of a list
OF_THE_THEME = (
    'class="md-toggle"',
    'class="md-nav__link[^"]*" for="__nav_.*tabindex=""',
    'class="md-nav__title" for="__',
)
OF_MEDIA = ("img", "script", "source", "iframe", "video", "audio")


# ---- links -----------------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """The anchors and links of a page, including those to files it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := found.get(key))}
        address = found.get("src") if tag in OF_MEDIA else found.get("href") if tag in ("a", "link", "use") else None
        if address is not None:
            self.links.append(address)


def broken_links(site: Path) -> list[str]:
    """Links to missing files or anchors."""
    pages = {path: _Page(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            base = site if parts.path.startswith("/") else path.parent
            target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            where = path.relative_to(site)
            if not target.is_file():
                found.append(f"{where}: there is no {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{where}: {link} names no anchor")
    return found


# ---- markup ----------------------------------------------------------------------------------------------------------


def invalid_markup(site: Path, jar: Path) -> list[str]:
    """Errors that the Nu HTML checker finds in the pages."""
    command = ["java", "-jar", str(jar), "--errors-only", "--skip-non-html", "--format", "json", str(site)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    try:
        messages = json.loads(done.stderr)["messages"]
    except ValueError:
        raise SystemExit(f"{jar} did not run: {(done.stderr or done.stdout).strip()[-300:]}") from None
    found = {}
    for message in messages:
        text = f"{message['message']} {message.get('extract', '')}"
        if not any(re.search(known, text) for known in OF_THE_THEME):
            where = unquote(urlsplit(message["url"]).path).removeprefix(f"{site}/")
            found[message["message"]] = f"{where}:{message.get('lastLine')}: {' '.join(text.split())[:300]}"
    return sorted(found.values())


# ---- the browser -----------------------------------------------------------------------------------------------------

# decode() sometimes never resolves in Chromium, and evaluate has no time limit
MISSING_PICTURES = """async () => {
  const limit = new Promise(resolve => setTimeout(resolve, 30000));
  for (const i of document.images) i.loading = 'eager';
  const loaded = i => new Promise(resolve => i.complete ? resolve() : (i.onload = i.onerror = resolve));
  await Promise.race([limit, Promise.all([...document.images].map(loaded))]);
  return [...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.getAttribute('src'));
}"""
# content beyond the right edge is cut off on phones
AS_WIDE_AS_SCREEN = "() => document.documentElement.scrollWidth <= document.documentElement.clientWidth + 1"
BRIGHTNESS = """() => {
  const ofNumbers = text => { const [r, g, b] = text.match(/[\\d.]+/g).map(Number); return (r + g + b) / 765; };
  const style = getComputedStyle(document.body);
  return [ofNumbers(style.backgroundColor), ofNumbers(style.color)];
}"""


@contextlib.contextmanager
def served(site: Path) -> Iterator[str]:
    """The address of a local server of the folder's files."""

    class Quiet(SimpleHTTPRequestHandler):
        def handle(self) -> None:
            # the browser leaves a page before it is loaded
            with contextlib.suppress(ConnectionError):
                super().handle()

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def chromium() -> str | None:
    """The browser's path, if it is installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Chromium in headless mode."""
    from playwright.sync_api import sync_playwright

    if not (path := chromium()):
        raise SystemExit("there is no Chromium here: install it, for instance by apt-get install chromium")
    with sync_playwright() as playwright:
        # Chromium does not run its sandbox as root, as in a container; the pages are our own
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()


def failures_in_browser(site: Path, pages: Mapping[str, Sequence[Path]]) -> list[str]:
    """Failures of the pages in Chromium for each colour scheme."""
    with served(site) as address, browser() as chrome:
        return [text for scheme in pages for text in _failures(chrome, address, site, pages[scheme], scheme)]


def _failures(chrome: Any, address: str, site: Path, pages: Sequence[Path], scheme: str) -> list[str]:
    found: list[str] = []
    # Playwright waits by evaluating text, which a page's content security policy may forbid
    page = chrome.new_context(color_scheme=scheme, reduced_motion="reduce", bypass_csp=True).new_page()

    def note(text: str) -> None:
        found.append(f"{where}, {scheme}: {text}")

    def asked(request: Any) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            note(f"asks for {request.url}")

    page.on("request", asked)
    page.on("console", lambda message: note(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: note(str(error)))
    page.on("response", lambda answer: note(f"{answer.status} of {answer.url}") if answer.status >= 400 else None)
    for path in pages:
        where = path.relative_to(site).as_posix()
        page.set_viewport_size({"width": WIDTHS[0], "height": 800})
        page.goto(f"{address}/{where}", wait_until="load")
        for source in page.evaluate(MISSING_PICTURES):
            note(f"the picture {source} is missing")
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 800})
            # the menu moves after a change of width, which may take long on a busy machine: reload the page then
            if not (_fits(page, 3000) or (page.reload(wait_until="load") and _fits(page, 10000))):
                note(f"is wider than a screen of {width} pixels")
        background, text = page.evaluate(BRIGHTNESS)
        darker, lighter = (background, text) if scheme == "dark" else (text, background)
        if darker >= lighter:
            note(f"has text of brightness {text:.2f} on {background:.2f}")
    return found


def _fits(page: Any, timeout: int) -> bool:
    """Whether the page is no wider than the screen within this time in milliseconds."""
    try:
        page.wait_for_function(AS_WIDE_AS_SCREEN, timeout=timeout)
    except Exception:
        return False
    return True


def main(argv: Sequence[str] | None = None) -> None:
    """Print failures, and exit with 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m tests.site_check", description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path, help="folder of the built site")
    parser.add_argument("--vnu", type=Path, metavar="JAR", help="the Nu HTML checker (default: no check of the markup)")
    add = partial(parser.add_argument, type=int, default=1, metavar="N")
    add("--every", help="show one in N pages in light (default all)")
    add("--every_dark", help="show one in N pages in dark (default all)")
    arguments = parser.parse_args(argv)
    site = arguments.site.resolve()
    pages = sorted(site.rglob("*.html"))
    if not pages:
        raise SystemExit(f"there are no pages in {arguments.site}: python -m mkdocs build --strict writes them")
    wrong = broken_links(site)
    wrong += invalid_markup(site, arguments.vnu) if arguments.vnu else []
    shown = {"light": pages[:: arguments.every], "dark": pages[:: arguments.every_dark]}
    wrong += failures_in_browser(site, shown)
    print(*wrong, sep="\n")
    if wrong:
        sys.exit(f"{len(wrong)} mistakes on {len(pages)} pages")
    print(f"{len(pages)} pages without a mistake, {len(shown['light'])} seen in light and {len(shown['dark'])} in dark")


if __name__ == "__main__":
    main()
