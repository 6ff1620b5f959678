"""The pages in a real browser: headless Chromium, by way of chromedriver.

`apt-get install chromium chromium-driver`; without them these tests are skipped.
"""

import re
import shutil
from pathlib import Path

import pytest

from tests.made_up_run import HOSTILE, make
from tests.scripts.test_report_several import folder, images  # noqa: F401  fixtures

webdriver = pytest.importorskip("selenium.webdriver")

# No window, no sandbox (tests run as root in containers), and no network.
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
FLAGS += ("--no-first-run", "--disable-background-networking", "--disable-component-update")
FLAGS += ("--disable-sync", "--hide-scrollbars", "--window-size=1280,900")
SIZES = {"wide": (1280, 900), "phone": (390, 844)}


class Browser:
    def __init__(self, driver):
        self.driver = driver

    def open(self, page: Path | str, size: str = "wide", scheme: str = "light") -> "Browser":
        width, height = SIZES[size]
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        look = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", look)
        self.driver.get(page if isinstance(page, str) else page.resolve().as_uri())
        return self

    def ask(self, expression: str):
        return self.driver.execute_script(f"return {expression}")

    def all(self, css: str) -> list:
        return self.driver.find_elements("css selector", css)

    def errors(self) -> list[dict]:
        return self.driver.get_log("browser")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no browser: chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield Browser(opened)
    opened.quit()


@pytest.fixture(scope="module")
def pages(script, trained, folder, images, tmp_path_factory) -> dict[str, Path]:  # noqa: F811
    here = tmp_path_factory.mktemp("pages")
    names = {"base": [*HOSTILE[:4], "plain"], "novel": [*HOSTILE[4:6], HOSTILE[7]]}
    hostile = make(here / "hostile", names, each=6, sure=1.0)
    made = {}
    for what, path in (
        ("run", trained.path), ("hostile", hostile), ("several", folder), ("generated", images)
    ):  # fmt: skip
        made[what] = here / f"{what}.html"
        result = script("report", path, "--out", made[what])
        assert result.code == 0, result.err
    return made


KINDS = ("run", "hostile", "several", "generated")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_opens_without_an_error_and_fits_its_window(browser, pages, kind, size, scheme):
    browser.open(pages[kind], size, scheme)
    assert browser.errors() == []
    root = "document.documentElement"
    assert browser.ask(f"{root}.scrollWidth") <= browser.ask(f"{root}.clientWidth")
    assert browser.ask(f"{root}.clientWidth") == SIZES[size][0]
    dark = browser.ask("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    # Also what is folded in.
    browser.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.ask(f"{root}.scrollWidth") <= browser.ask(f"{root}.clientWidth")


@pytest.mark.parametrize("kind", KINDS)
def test_every_picture_loads_and_every_drawing_says_what_it_shows(browser, pages, kind):
    browser.open(pages[kind])
    found = browser.ask(
        "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))"
    )
    assert all(width > 0 for width in found)
    assert bool(found) == (kind in ("run", "generated"))
    assert browser.ask("[...document.images].every(i => i.alt)")
    assert browser.ask("[...document.querySelectorAll('figure svg')].every(s => "
                       "s.closest('.legend') || s.getAttribute('aria-label'))")  # fmt: skip


def test_a_heading_sorts_its_table_and_turns_it_around(browser, pages):
    browser.open(pages["run"])
    (head,) = browser.all("#classes-table th:nth-child(2)")
    head.find_element("css selector", "button").click()

    def column() -> list[float]:
        cells = browser.all("#classes-table tbody td:nth-child(2)")
        return [float(cell.get_attribute("data-value")) for cell in cells]

    assert head.get_attribute("aria-sort") == "descending"
    assert column() == sorted(column(), reverse=True)
    head.find_element("css selector", "button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert column() == sorted(column())
    (head,) = browser.all("#classes-table th:nth-child(1)")
    head.find_element("css selector", "button").click()
    names = [cell.text for cell in browser.all("#classes-table tbody td:nth-child(1)")]
    assert len(names) == 5
    assert names == sorted(names)


def test_classes_are_filtered_by_name_and_part(browser, pages):
    browser.open(pages["run"])
    shown = "[...document.querySelectorAll('#classes-table tbody tr')].filter(r => !r.hidden)"
    (field,) = browser.all("form[data-target=classes-table] input")
    field.send_keys("LILY")
    assert browser.ask(f"{shown}.map(r => r.dataset.name)") == ["amber lily"]
    (count,) = browser.all("form[data-target=classes-table] output")
    assert count.text == "1 of 5"
    field.clear()
    field.send_keys(" \b")
    (part,) = browser.all("form[data-target=classes-table] select[name=part]")
    part.send_keys("novel")
    assert set(browser.ask(f"{shown}.map(r => r.dataset.part)")) == {"novel"}
    assert count.text == "2 of 5"


def test_generated_images_are_filtered_by_state(browser, pages):
    browser.open(pages["generated"])
    (state,) = browser.all("select[name=state]")
    state.send_keys("rejected")
    shown = browser.ask(
        "[...document.querySelectorAll('.tile')].filter(t => t.checkVisibility())"
        ".map(t => t.querySelector('.state').textContent)"
    )
    assert set(shown) == {"rejected"}
    assert len(shown) == len(browser.ask("[...document.querySelectorAll('.state.rejected')]"))


def test_hostile_names_are_shown_as_they_are(browser, pages):
    browser.open(pages["hostile"])
    assert browser.ask("document.scripts.length") == 1
    assert browser.ask("document.querySelectorAll('img').length") == 0
    names = browser.ask(
        "[...document.querySelectorAll('#classes-table .name')].map(n => n.textContent)"
    )
    assert sorted(names) == sorted([*HOSTILE[:4], "plain", *HOSTILE[4:6], HOSTILE[7]])
    titles = browser.ask("[...document.querySelectorAll('.matrix title')].map(t => t.textContent)")
    assert any(HOSTILE[0] in title for title in titles)


def test_a_page_prints_with_everything_open(browser, pages):
    browser.open(pages["run"])
    browser.ask("dispatchEvent(new Event('beforeprint'))")
    assert browser.ask("[...document.querySelectorAll('details')].every(d => d.open)")
    made = browser.driver.execute_cdp_cmd("Page.printToPDF", {})
    assert made["data"].startswith("JVBERi")  # %PDF


def test_a_page_reads_without_its_script(browser, pages, tmp_path):
    """All rows are there, and no form that would do nothing."""
    text = pages["run"].read_text("utf-8")
    still = tmp_path / "still.html"
    still.write_text(re.sub(r"<script>.*</script>", "", text, flags=re.DOTALL), "utf-8")
    browser.open(still)
    assert len(browser.all("#classes-table tbody tr")) == 5
    assert not any(form.is_displayed() for form in browser.all("form"))
