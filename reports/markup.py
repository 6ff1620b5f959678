"""HTML that cannot be broken by what is put in it: all text is escaped where it enters.

    tag("td", "<b>", data_value=3, class_="n")  ->  <td data-value="3" class="n">&lt;b&gt;</td>

What `tag` gives is a `Markup`, which other tags take as it is. Everything else, also names from
files, is text: no name of a class can become an element, an attribute or a script. A page needs
nothing from a network and no server.
"""

import base64
import html
import io
from pathlib import Path

from PIL import Image, ImageOps

ASSETS = Path(__file__).parent / "assets"
VOID = {"br", "hr", "img", "input", "meta"}
# Control characters but tab and line ends: no HTML may hold them. Halves of surrogate pairs: no
# UTF-8 may.
_UNSHOWN = dict.fromkeys([*range(9), 11, 12, *range(14, 32), 127, *range(0xD800, 0xE000)], "\ufffd")


class Markup(str):
    """Text that is HTML already."""


def escape(text) -> str:
    return html.escape(str(text).translate(_UNSHOWN), quote=True)


def tag(element: str, /, *children, **attributes) -> Markup:
    """An element. None is left out, lists are taken apart, `class_` is the attribute class, a `_`
    in an attribute is a dash; an attribute that is None or False is left out, True has no value.
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if element in VOID:
        return Markup(f"<{element}{written}>")
    return Markup(f"<{element}{written}>{join(children)}</{element}>")


def join(children) -> Markup:
    """Children one after another."""
    parts = []
    for child in children:
        if isinstance(child, list | tuple):
            parts.append(join(child))
        elif child is not None:
            parts.append(child if isinstance(child, Markup) else escape(child))
    return Markup("".join(parts))


def name(text: str) -> Markup:
    """A name from a file: set apart, since it may run from right to left."""
    return tag("bdi", text, class_="name")


def number(value: float | None, digits: int = 2, unit: str = "", sign: bool = False) -> str:
    """ "71.33 %"; n/a where there is no number."""
    if value is None:
        return "n/a"
    shown = f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "\u2212")
    return shown + (f"\u00a0{unit}" if unit else "")


def table(columns: list, rows: list[list], id: str | None = None, **row_data) -> Markup:
    """A table whose columns sort: cells are children of td, or (shown, value to sort by).

    columns: headings, or (heading, what it means). row_data: attribute -> its value in each row,
    read by filters.
    """
    heads = []
    for k, column in enumerate(columns):
        text, meaning = column if isinstance(column, tuple) else (column, None)
        button = tag("button", text, type="button", title=meaning, data_column=k)
        numeric = any(isinstance(row[k], tuple) for row in rows)
        heads.append(tag("th", button, scope="col", class_="n" if numeric else None))
    body = []
    for i, row in enumerate(rows):
        data = {f"data_{key}": values[i] for key, values in row_data.items()}
        body.append(tag("tr", [_cell(cell) for cell in row], **data))
    whole = [tag("thead", tag("tr", heads)), tag("tbody", body)]
    kind = "scroll long" if len(rows) > 30 else "scroll"
    return tag("div", tag("table", whole, id=id, class_="sorts"), class_=kind, tabindex=0)


def _cell(cell) -> Markup:
    if not isinstance(cell, tuple):
        return tag("td", cell)
    shown, value = cell
    return tag("td", shown, class_="n", data_value="" if value is None else value)


def picture(image: Image.Image, alt: str, side: int = 112, quality: int = 80) -> Markup:
    """A square thumbnail, `side` pixels, inside the page; `alt` says what it shows."""
    file, small = io.BytesIO(), ImageOps.fit(image.convert("RGB"), (side, side))
    small.save(file, "JPEG", quality=quality)
    data = base64.b64encode(file.getvalue()).decode()
    return tag("img", src=f"data:image/jpeg;base64,{data}", alt=alt, width=side, height=side)


def figure(drawing: Markup, caption, legend: Markup | None = None) -> Markup:
    return tag("figure", drawing, legend, tag("figcaption", caption))


def section(title: str, *children, id: str) -> Markup:
    return tag("section", tag("h2", title), children, id=id)


def folded(summary, *children, open: bool = False) -> Markup:
    return tag("details", tag("summary", summary), children, open=open)


def notes(texts: list[str]) -> Markup | None:
    return tag("ul", [tag("li", text) for text in texts], class_="notes") if texts else None


def page(title: str, sections: list[Markup]) -> str:
    """The whole file, with what it needs to look like something and to be sorted and filtered."""
    style, script = ((ASSETS / f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(style)),
    ]
    body = [tag("main", sections), tag("script", Markup(script))]
    return f"<!doctype html>\n{tag('html', tag('head', head), tag('body', body), lang='en')}\n"
