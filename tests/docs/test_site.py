"""The documentation as a site: it builds without a warning, its links lead somewhere, it fits.

`pip install -e '.[docs]'`; without it these tests are skipped, and those in a browser without one.
"""

import functools
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.scripts.test_browser import browser  # noqa: F401  a fixture

PROGRAM = shutil.which("mkdocs", path=str(Path(sys.executable).parent)) or shutil.which("mkdocs")
pytestmark = pytest.mark.skipif(not PROGRAM, reason="no mkdocs: pip install -e '.[docs]'")
PAGES = ["", "your-pictures/", "course/2_prompt_tree/", "source/clip_min/prompts.py/"]


def build(config: Path, out: Path) -> subprocess.CompletedProcess:
    command = [PROGRAM, "build", "--strict", "-f", config, "-d", out]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(root, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(root / "mkdocs.yml", out)
    assert done.returncode == 0, done.stderr
    return out


class Links(HTMLParser):
    """What a page links to, what it loads, and the anchors it has."""

    def __init__(self, text: str):
        super().__init__()
        self.to, self.loads, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids.add(found.get("id"))
        if tag == "a" and found.get("href"):
            self.to.append(found["href"])
        if tag in ("script", "img") and found.get("src"):
            self.loads.append(found["src"])
        if tag == "link" and "stylesheet" in (found.get("rel") or ""):
            self.loads.append(found["href"])


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    pages = {file: Links(file.read_text(encoding="utf-8")) for file in site.rglob("*.html")}
    assert len(pages) > 20
    for file, page in pages.items():
        if file.name == "404.html":  # its links begin at the root
            continue
        assert not [address for address in page.loads if address.startswith(("http", "//"))]
        for address in [*page.to, *page.loads]:
            link = urlsplit(address)
            if link.scheme in ("http", "https", "mailto", "data"):
                continue
            target = (file.parent / unquote(link.path)).resolve() if link.path else file
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{file.relative_to(site)}: {address}"
            if link.fragment and target.suffix == ".html":
                assert unquote(link.fragment) in pages[target].ids, f"{file}: {address}"


def test_a_link_to_a_missing_file_ends_the_build(root, tmp_path):
    copy = tmp_path / "copy"
    for name in ("docs", "tools"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("*.ipynb"))
    text = (root / "mkdocs.yml").read_text(encoding="utf-8")
    config = "\n".join(line for line in text.split("\n") if "ipynb" not in line)
    (copy / "mkdocs.yml").write_text(config, encoding="utf-8")
    for page in (copy / "docs").rglob("*.md"):
        page.write_text("# A page\n", encoding="utf-8")
    assert build(copy / "mkdocs.yml", tmp_path / "fine").returncode == 0
    (copy / "docs" / "index.md").write_text("[code](../methods/no_such.py)\n", encoding="utf-8")
    done = build(copy / "mkdocs.yml", tmp_path / "broken")
    assert done.returncode != 0
    assert "docs/index.md: ../methods/no_such.py is not a file" in done.stderr


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.mark.parametrize("size", ["wide", "phone"])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_its_window_and_its_pictures_load(address, browser, page, size):  # noqa: F811
    seen = browser.open(address + page, size)
    assert seen.ask("document.documentElement.scrollWidth <= window.innerWidth")
    pictures = "[...document.images].filter(i => !(i.complete && i.naturalWidth)).length"
    assert seen.ask(pictures) == 0
    assert not [e for e in seen.errors() if e["level"] == "SEVERE"]
