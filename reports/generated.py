"""The page of a folder of generated images: their sources, the filter's decisions, the classes."""

from collections import Counter
from os.path import isfile
from pathlib import Path

from clip_min import UserError
from fewshot.experiment import Experiment
from fewshot.pictures import Pictures
from fewshot.task import draw, halves
from gen.books import Attempt, Manifest, fingerprint
from reports.album import no_picture, thumbnail
from reports.markup import Markup, name, notes, number, page, picture, section, table, tag
from reports.run_page import WEAK, bar, filters, pairs

MOST = 480  # images on the sheet: four megabytes of thumbnails
STATES = ("kept", "waived", "rejected", "undecided")
SIDE = 84  # pixels of a thumbnail


def numbers(manifest: Manifest) -> dict:
    quotas, f1 = manifest.plan["quotas"], manifest.plan.get("f1")
    counts = {state: manifest.count(state) for state in STATES}
    used = Counter(attempt.classname for attempt in manifest.chosen())
    classes = []
    for key in manifest.classnames:
        of = {state: counts[state][key] for state in STATES}
        judged = of["kept"] + of["waived"] + of["rejected"]
        classes.append(
            {
                "name": key,
                "planned": quotas.get(key, 0),
                "f1": 100 * f1[key] if f1 and key in f1 else None,
                **of,
                "attempts": sum(of.values()),
                "used": used[key],
                "accepted": 100 * of["kept"] / judged if judged else None,
            }
        )
    classes.sort(key=lambda of: (of["f1"] is None, of["f1"], -of["planned"]))  # weakest first
    total = {state: sum(counts[state].values()) for state in STATES}
    judged = total["kept"] + total["waived"] + total["rejected"]
    missing = []
    if left := manifest.missing():
        missing.append(f"{left} images are still missing: continue with generate.py")
    return {
        "kind": "generated",
        "path": str(manifest.folder),
        "settings": manifest.settings,
        "attempts": len(manifest.attempts),
        "captions": len(manifest.captions),
        **total,
        "used": sum(used.values()),
        "accepted": 100 * total["kept"] / judged if judged else None,
        "seconds": sum(manifest.seconds.values()),
        "classes": classes,
        "missing": missing,
    }


def write(found: dict, manifest: Manifest) -> str:
    return page(f"Generated images, {found['path']}", sections(found, manifest))


def sections(found: dict, manifest: Manifest, number_of: int = 0) -> list[Markup]:
    """number_of: the number of this folder on the page."""
    mark = f"generated-{number_of}"
    body, missing = _sheet(found, manifest, f"{mark}-sheet")
    lines = found["missing"] + missing
    parts = [
        _head(found),
        section("What is missing here", notes(lines), id=f"{mark}-missing") if lines else None,
        _classes(found, f"{mark}-classes"),
        body,
        section(
            "Settings",
            pairs({k: v for k, v in found["settings"].items() if k != "classnames"}),
            id=f"{mark}-settings",
        ),
    ]
    return [part for part in parts if part]


def _head(found: dict) -> Markup:
    cards = [
        ("images used in training", f"{found['used']:,}", f"of {found['attempts']:,} attempts"),
        ("accepted, %", number(found["accepted"], 1), "of the judged images"),
        ("rejected", f"{found['rejected']:,}", "recognised as another class"),
        ("waived", f"{found['waived']:,}", "kept without being recognised"),
        ("seconds", number(found["seconds"], 0), f"{found['captions']:,} captions"),
    ]
    shown = [
        tag("div", tag("span", what), tag("b", value), tag("span", more), class_="card")
        for what, value, more in cards
    ]
    title = tag("h1", "Generated images")
    where = tag("p", tag("code", found["path"]), class_="quiet")
    return tag("header", title, where, tag("div", shown, class_="cards"))


def _classes(found: dict, id: str) -> Markup:
    rows = []
    for of in found["classes"]:
        rows.append(
            [
                name(of["name"]),
                (bar(of["f1"]), of["f1"]),
                *((str(of[key]), of[key]) for key in ("planned", "kept", "waived", "rejected")),
                (number(of["accepted"], 0), of["accepted"]),
                (str(of["used"]), of["used"]),
            ]
        )
    columns = ["class", ("F1, %", "on validation; the plan is based on it"), "planned"]
    columns += ["kept", ("waived", "kept without being recognised"), "rejected"]
    columns += [("accepted, %", "of the judged images"), ("used", "in training")]
    names = [of["name"] for of in found["classes"]]
    text = "The plan and its result for each class."
    if any(of["f1"] is not None for of in found["classes"]):
        text += f" The line in each bar is an F1 of {WEAK / 100:.2f}."
    else:
        text += " The plan did not measure F1."
    grid = table(columns, rows, id, name=names)
    return section(
        "Plan and acceptance",
        tag("p", text, class_="quiet"),
        filters(id, "class", {}),
        grid,
        id=f"{id}-section",
    )


def _sheet(found: dict, manifest: Manifest, id: str) -> tuple[Markup | None, list[str]]:
    """The images beside their sources, as many of each class as fit."""
    if not manifest.attempts:
        return None, []
    album, missing = _sources(manifest)
    shown = _some(manifest)
    if len(shown) < len(manifest.attempts):
        count = f"{len(shown)} of {len(manifest.attempts)} images are shown, some of each class."
    else:
        count = f"All {len(shown)} images."
    tiles = [_tile(manifest, attempt, album) for attempt in shown]
    sheet = tag("div", tiles, class_="sheet wide", id=id)
    states = [state for state in STATES if found[state]]
    text = (
        f"{count} Left: the captioned picture; middle: the picture that was painted over; right: "
        "the result. The margin is the logit of the right class minus the largest other one."
    )
    form = filters(id, "class", {"state": states})
    return section(
        "Images", tag("p", text, class_="quiet"), form, sheet, id=f"{id}-section"
    ), missing


def _some(manifest: Manifest) -> list[Attempt]:
    """At most MOST images, from each class and state in turn."""
    ranks: Counter = Counter()
    keyed = []
    for i, attempt in enumerate(manifest.attempts):
        key = (attempt.classname, attempt.state)
        keyed.append((ranks[key], i, attempt))
        ranks[key] += 1
    chosen = sorted(sorted(keyed, key=lambda k: k[:2])[:MOST], key=lambda k: k[1])
    return [attempt for *_, attempt in chosen]


def _tile(manifest: Manifest, attempt: Attempt, album) -> Markup:
    made = thumbnail(
        manifest.folder / attempt.image, f"generated image of {attempt.classname}", SIDE
    )
    sources = [
        album(attempt.captioned, f"captioned picture of {attempt.classname}"),
        album(attempt.repainted, f"painted-over picture of {attempt.classname}"),
    ]
    state = tag("span", attempt.state, class_=f"state {attempt.state}")
    seen = [] if attempt.predicted is None else ["; seen as ", name(attempt.predicted)]
    margin = [] if attempt.margin is None else [f", margin {number(attempt.margin, 2, sign=True)}"]
    return tag(
        "div",
        tag("div", sources, made, class_="pair"),
        tag("p", name(attempt.classname), ": ", state, seen, margin),
        tag("p", attempt.caption, class_="quiet"),
        class_="tile",
        data_name=attempt.classname,
        data_state=attempt.state,
    )


def _sources(manifest: Manifest):
    """(name of a real picture, alt) -> its thumbnail; and notes about missing pictures.

    Thumbnails are small, since the page holds a copy for each use.
    """
    known: dict[str, tuple[Pictures, int]] = {}
    missing = []
    if manifest.settings.get("dataset") == "demo":
        try:
            pictures = _demo(manifest)
            known = {pictures.name(i): (pictures, i) for i in range(len(pictures))}
        except (UserError, TypeError, KeyError) as error:
            missing.append(f"the real pictures were not found: {error}")

    def get(text: str, alt: str) -> Markup:
        if text in known:
            pictures, i = known[text]
            return picture(pictures.open(i), alt, SIDE)
        return thumbnail(Path(text), alt, SIDE) if isfile(text) else no_picture(alt)

    if not known and not missing:
        gone = {a.repainted for a in manifest.attempts if not isfile(a.repainted)}
        if gone:
            missing.append(f"{len(gone)} real pictures are not in their place, such as {min(gone)}")
    return get, missing


def _demo(manifest: Manifest) -> Pictures:
    """The demo's training pictures, drawn again."""
    made = manifest.settings
    kept = {key: made[key] for key in ("dataset", "classes", "shots", "seed")}
    dataset = Experiment(**kept).load_dataset()
    numbers_of = {text: i for i, text in enumerate(dataset.classnames)}
    base = [numbers_of[text] for text in made["classnames"]]
    learned, _ = halves(dataset, made["classes"], base if made["classes"] != "all" else None)
    pictures, _, _ = draw(dataset, learned, made["shots"], made["seed"])
    if fingerprint(pictures) != made["training_pictures"]:
        raise UserError("the demo's training pictures differ from those of this folder")
    return pictures
