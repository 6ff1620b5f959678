"""Charts as SVG inside the page, drawn by matplotlib, in the page's light and dark colours.

matplotlib draws in placeholder colours, which are replaced with the page's CSS variables. Charts
hold no text from files: names are in HTML legends beside the charts.
"""

import io
import itertools
import re
import warnings
from collections.abc import Callable

from reports.markup import Markup, escape, tag

INK, QUIET, LINE = "#010101", "#020202", "#030303"  # text, secondary text, grids
SERIES = [f"#0401{k:02x}" for k in range(8)]
_PAGE = {INK: "var(--ink)", QUIET: "var(--quiet)", LINE: "var(--line)"}
_PAGE |= {colour: f"var(--c{k})" for k, colour in enumerate(SERIES)}
MARKERS = "osD^vPX*"  # distinguishable without colour
DASHES = ["-", "--", ":", "-.", (0, (5, 1, 1, 1)), (0, (3, 3)), (0, (1, 1)), (0, (8, 2))]
_numbers = itertools.count()


def chart(
    draw: Callable, alt: str, width: float = 5.0, height: float = 3.2, across: int = 1, **grid
) -> Markup:
    """The SVG of draw(axes), or of draw(list of axes) for several axes `across`. Sizes are in
    inches of 80 pixels.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "clip_min",
        "font.size": 9.5,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": QUIET,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": LINE,
        "grid.linewidth": 0.7,
        "xtick.color": QUIET,
        "ytick.color": QUIET,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 1.8,
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters missing in matplotlib's font
        figure, axes = plt.subplots(
            1, across, figsize=(width, height), layout="constrained", squeeze=False, **grid
        )
        draw(axes[0, 0] if across == 1 else list(axes[0]))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    return _inline(file.getvalue(), alt)


def _inline(svg: str, alt: str) -> Markup:
    """The SVG element, with unique ids, the page's colours, and a description in words."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    mark = f"g{next(_numbers)}-"
    svg = re.sub(r'\bid="', f'id="{mark}', svg)
    svg = re.sub(r"url\(#", f"url(#{mark}", svg)
    svg = re.sub(r'xlink:href="#', f'xlink:href="#{mark}', svg)
    svg = re.sub("|".join(_PAGE), lambda m: _PAGE[m[0]], svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    head = f'<svg role="img" aria-label="{escape(alt)}"'
    return Markup(svg.replace("<svg", head, 1).strip())


def legend(entries: list[tuple], lines: bool = False) -> Markup:
    """Colour and marker (or dashes) of each entry: [(text or markup, number of both), …], or
    (text, number of the colour, number of the marker).
    """
    items = []
    for text, colour, *shape in entries:
        k = shape[0] if shape else colour
        colour = f"var(--c{colour % len(SERIES)})"
        if lines:
            dash = ("", "4 2", "1.5 2", "5 2 1 2", "5 1 1 1", "3 3", "1 1", "8 2")[k % 8]
            mark = tag("path", d="M0 7H14", stroke=colour, stroke_width=2.4, stroke_dasharray=dash)
        else:
            mark = tag("path", d=_SHAPES[MARKERS[k % len(MARKERS)]], fill=colour)
        items.append(tag("li", tag("svg", mark, viewBox="0 0 14 14", aria_hidden="true"), text))
    return tag("ul", items, class_="legend")


_SHAPES = {
    "o": "M7 2a5 5 0 1 0 .01 0z",
    "s": "M3 3h8v8h-8z",
    "D": "M7 1l6 6-6 6-6-6z",
    "^": "M7 2l5 9h-10z",
    "v": "M7 12l5-9h-10z",
    "P": "M5 2h4v3h3v4h-3v3h-4v-3h-3v-4h3z",
    "X": "M4 2l3 3 3-3 2 2-3 3 3 3-2 2-3-3-3 3-2-2 3-3-3-3z",
    "*": "M7 1l1.7 4h4.3l-3.4 2.7 1.3 4.3-3.9-2.6-3.9 2.6 1.3-4.3-3.4-2.7h4.3z",
}
