"""Nothing that is put in a page becomes part of it."""

import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from reports import markup
from reports.charts import chart
from reports.markup import page, picture, section, table, tag
from tests.made_up_run import HOSTILE


class Seen(HTMLParser):
    """The elements, attributes and texts that a parser finds."""

    def __init__(self):
        super().__init__()
        self.tags, self.values, self.texts = [], [], []

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.values += [value for _, value in attributes]

    def handle_data(self, text):
        self.texts.append(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_is_a_text_wherever_it_stands(text):
    grid = table(["class", (text, text)], [[markup.name(text), (text, text)]], name=[text])
    whole = page(text, [section(text, tag("p", text, title=text), grid, id="a")])
    plain = page("t", [section("t", tag("p", "t", title="t"), table(
        ["class", ("t", "t")], [[markup.name("t"), ("t", "t")]], name=["t"]), id="a")])  # fmt: skip
    seen, expected = Seen(), Seen()
    seen.feed(whole)
    expected.feed(plain)
    assert seen.tags == expected.tags
    shown = text.translate(dict.fromkeys([0, 0x1B, 0xD800], "\ufffd"))
    assert seen.texts.count(shown) == expected.texts.count("t")
    assert seen.values.count(shown) == expected.values.count("t") == 4
    whole.encode("utf-8")


def test_attributes_that_are_none_or_false_are_left_out():
    assert tag("a", hidden=None, open=False) == "<a></a>"
    assert (
        tag("input", hidden=True, data_a_b=3, class_="x") == '<input hidden data-a-b="3" class="x">'
    )


def test_lists_and_markup_are_taken_as_they_are():
    assert tag("p", ["a", [tag("b", "<")]], None, 7) == "<p>a<b>&lt;</b>7</p>"


def test_numbers_read_as_they_are_written():
    assert markup.number(None) == "n/a"
    assert markup.number(1234.5, 1, "s") == "1,234.5\u00a0s"
    assert markup.number(-0.25, 2, sign=True) == "\u22120.25"


def test_a_picture_is_inside_and_says_what_it_shows():
    seen = Seen()
    seen.feed(picture(Image.new("RGBA", (30, 70)), 'a "b"', side=20))
    assert seen.tags == ["img"]
    assert 'a "b"' in seen.values
    assert any(value.startswith("data:image/jpeg;base64,") for value in seen.values)


def test_two_charts_share_no_id_and_no_colour_is_matplotlibs():
    def draw(axes):
        axes.plot([1, 2], [3, 4], marker="o")
        axes.set_title("$x$")

    first, second = (chart(draw, 'a "chart"') for _ in range(2))
    ids = [set(re.findall('id="([^"]+)"', part)) for part in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert 'aria-label="a &quot;chart&quot;"' in first
    assert "var(--ink)" in first
    assert "#0101" not in first


def luminance(colour: str) -> float:
    """WCAG 2's, of "#rrggbb"."""
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return sum(w * s for w, s in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_texts_and_marks_stand_out_in_light_and_dark():
    """By WCAG 2: 4.5 to 1 for text, 3 to 1 for what is drawn."""
    style = (markup.ASSETS / "page.css").read_text("utf-8")
    for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]:
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for name, least in {"ink": 4.5, "quiet": 4.5, **{f"c{k}": 3.0 for k in range(8)}}.items():
            for paper in ("paper", "raised"):
                a, b = sorted(luminance(colours[key]) for key in (name, paper))
                assert (b + 0.05) / (a + 0.05) >= least, (name, paper)
