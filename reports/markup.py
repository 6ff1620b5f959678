"""Build HTML that no content can break: all text is escaped on entry.

    tag("td", "<b>", data_value=3, class_="n")  ->  <td data-value="3" class="n">&lt;b&gt;</td>

`tag` returns a `Markup`, which other tags use unchanged. Everything else, including names from
files, is text: a class name can never become an element, an attribute or a script. A page needs
neither a network nor a server.
"""

import base64
import html
import io
from pathlib import Path

from PIL import Image, ImageOps

ASSETS = Path(__file__).parent / "assets"
VOID = {"br", "hr", "img", "input", "meta"}
# HTML may not contain control characters except tab and line ends; UTF-8 may not contain halves of
# surrogate pairs.
_UNSHOWN = dict.fromkeys([*range(9), 11, 12, *range(14, 32), 127, *range(0xD800, 0xE000)], "\ufffd")


class Markup(str):
    """Text that is HTML already."""


def escape(text) -> str:
    return html.escape(str(text).translate(_UNSHOWN), quote=True)


def tag(element: str, /, *children, **attributes) -> Markup:
    """An element. Children that are None are skipped, lists are flattened. In attributes, `class_`
    means class and `_` a dash; None and False leave an attribute out, True gives it no value.
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
    """The children, concatenated."""
    parts = []
    for child in children:
        if isinstance(child, list | tuple):
            parts.append(join(child))
        elif child is not None:
            parts.append(child if isinstance(child, Markup) else escape(child))
    return Markup("".join(parts))


def name(text: str) -> Markup:
    """A name from a file, isolated, since it may be written from right to left."""
    return tag("bdi", text, class_="name")


def number(value: float | None, digits: int = 2, unit: str = "", sign: bool = False) -> str:
    """ "71.33 %"; n/a for None."""
    if value is None:
        return "n/a"
    shown = f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "\u2212")
    return shown + (f"\u00a0{unit}" if unit else "")


def table(columns: list, rows: list[list], id: str | None = None, **row_data) -> Markup:
    """A table whose columns sort: cells are children of td, or (shown, value to sort by).

    columns: headings, or (heading, explanation). row_data: attribute -> its value in each row, for
    filters.
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
    """A square thumbnail of `side` pixels, embedded in the page; `alt` describes it."""
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
    """The complete page, with its style sheet and the script that sorts and filters tables."""
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
