"""Where a run fails: the classes it confuses, and its most confident mistakes.

Pictures are numbered as in data.json: first base, then novel.
"""

from reports.album import Album
from reports.charts_of_run import matrix
from reports.markup import Markup, folded, name, section, tag

PICTURED = 12  # confused pairs to show


def confusions(found: dict, album: Album) -> Markup | None:
    """For each scope its matrix, and the most confused pairs."""
    if not found["scopes"]:
        return None
    parts, first = [], 0
    order = sorted(found["scopes"], key=lambda key: key != "joint")
    starts = {}
    for key, scope in found["scopes"].items():
        starts[key] = 0 if key == "joint" else first
        first += scope["images"]
    for key in order:
        scope = found["scopes"][key]
        tiles = [_pair(scope, pair, album, starts[key]) for pair in scope["pairs"][:PICTURED]]
        body = [matrix(scope)]
        if tiles:
            body += [tag("h3", "Most confused pairs"), tag("div", tiles, class_="sheet wide")]
        parts.append(folded(_among(key), *body, open=key == order[0]))
    return section("Confusions", parts, id="confusions")


def _among(key: str) -> str:
    told = {"joint": "All pictures among all names", "all": "All classes"}
    return told.get(key, f"The {key} classes among their own names")


def _pair(scope: dict, pair: dict, album: Album, first: int) -> Markup:
    a, b = scope["names"][pair["a"]], scope["names"][pair["b"]]
    ways = ((a, b, pair["a_as_b"]), (b, a, pair["b_as_a"]))
    shown = []
    for (true, taken, times), i in zip(ways, pair["pictures"], strict=True):
        alt = f"{true}, taken for {taken}" if times else true
        if i is not None and (thumb := album.get(first + i, alt)):
            shown.append(tag("figure", thumb, tag("figcaption", name(true))))
    lines = [
        tag("p", name(true), " taken for ", name(taken), f": {times}")
        for true, taken, times in ways
        if times
    ]
    return tag("div", tag("div", shown, class_="pair"), lines, class_="tile")


def mistakes(found: dict, album: Album) -> Markup | None:
    """The most confident wrong answers."""
    if not found["scopes"]:
        return None
    keys = ["joint"] if "joint" in found["scopes"] else list(found["scopes"])
    parts, first = [], 0
    for key in keys:
        scope = found["scopes"][key]
        tiles = [_mistake(scope, one, album, first) for one in scope["mistakes"]]
        if tiles:
            parts += [tag("h3", _among(key)), tag("div", tiles, class_="sheet")]
        first += scope["images"]
    text = "The most confident wrong answers, each with its five likeliest classes."
    return section("Surest mistakes", tag("p", text, class_="quiet"), parts, id="mistakes")


def _mistake(scope: dict, one: dict, album: Album, first: int) -> Markup:
    names, number_of = scope["names"], first + one["picture"]
    true, taken = names[one["label"]], names[one["top"][0]]
    bars = []
    for c, share in zip(one["top"], one["probabilities"], strict=True):
        kind = "true" if c == one["label"] else "wrong" if c == one["top"][0] else None
        fill = tag("i", style=f"width:{share:.1f}%")
        bars.append(tag("li", fill, f"{share:.1f} % ", name(names[c]), class_=kind))
    truth = tag("p", "is ", name(true))
    file = tag("p", album.file(number_of) or "", class_="quiet")
    thumb = album.get(number_of, f"{true}, taken for {taken}")
    return tag("div", thumb, truth, tag("ol", bars, class_="top5"), file, class_="tile")
