"""The page of a single run: how accurate, how confident, where it fails."""

import json
from pathlib import Path
from statistics import median

from reports import charts_of_run as charts
from reports.album import Album
from reports.charts_of_run import TITLES, flat
from reports.failures import confusions, mistakes
from reports.figures_of_run import SCORES, WEAK
from reports.markup import Markup, folded, join, name, notes, number, page, section, table, tag

COLOURED = 8  # classes in colour in the chart of features


def write(found: dict, album: Album) -> str:
    """The page of `figures_of_run.numbers`."""
    title = f"{found['method']} on {data_named(found['experiment'])}"
    sections = [_head(found, title), _missing(found), _scores(found), _training(found)]
    sections += [_per_class(found), confusions(found, album), mistakes(found, album)]
    sections += [_calibration(found), _space(found), _pictures(found), _setup(found)]
    return page(title, [part for part in sections if part])


def data_named(experiment: dict) -> str:
    """The name of the data set, or of the folder of your own pictures."""
    dataset, root = experiment.get("dataset"), experiment.get("data_root")
    return Path(root).name if dataset == "folder" and root else str(dataset)


def _head(found: dict, title: str) -> Markup:
    shots = f"{found['shots']} shots" if found["shots"] != 1 else "1 shot"
    what = [f"{shots}, seed {found['seed']}, model {found['model']}, recipe {found['recipe']}"]
    return tag("header", tag("h1", title), tag("p", what, class_="quiet"), _cards(found))


def _cards(found: dict) -> Markup:
    """The most important numbers."""
    mine, zero = (flat(found["scores"][who]) for who in ("method", "zero_shot"))
    cards = []
    for key, title in TITLES.items():
        if key in ("base", "novel", "hm") and mine["all"] is not None:
            continue
        if mine.get(key) is None and key in ("all", "joint"):
            continue
        lines = [f"zero-shot {number(zero.get(key))}"]
        if key in found["intervals"] and mine[key] is not None:
            low, high = found["intervals"][key]
            lines.append(f"95 % interval {low:.1f} to {high:.1f}")
        if key == "joint":
            lines.append("harmonic mean of base and novel")
        cards.append(_card(f"{title} accuracy, %", number(mine.get(key)), lines))
    for key, scope in found["scopes"].items():
        if key in ("joint", "all") or (key == "base" and "joint" not in found["scopes"]):
            text = "all names" if key != "base" else "base"
            ece = number(scope["calibration"]["ece"])
            sure = f"mean confidence {scope['calibration']['mean_confidence']:.1f} %"
            cards.append(_card(f"calibration error, {text}, %", ece, [sure]))
    judged = [row for row in found["classes"] if row["f1"] is not None]
    if judged:
        weak = sum(row["weak"] for row in judged)
        cards.append(
            _card("classes with F1 below 0.70", str(weak), [f"of {len(judged)} tested classes"])
        )
    train, val = (found["training"][key] for key in ("train_accuracy", "val_accuracy"))
    if train is not None:
        more = [] if val is None else [f"on validation pictures {val:.2f}"]
        cards.append(_card("training accuracy, %", number(train), more))
    elif val is not None:
        cards.append(_card("validation accuracy, %", number(val), []))
    return tag("div", cards, class_="cards")


def _card(title: str, value: str, lines: list[str]) -> Markup:
    return tag(
        "div", tag("span", title), tag("b", value), [tag("span", x) for x in lines], class_="card"
    )


def _missing(found: dict) -> Markup | None:
    if not found["missing"]:
        return None
    return tag("aside", tag("b", "What is missing here"), notes(found["missing"]))


def _scores(found: dict) -> Markup | None:
    mine, zero = found["scores"]["method"], found["scores"]["zero_shot"]
    if not any(value is not None for value in mine.values()):
        return None
    of = {(key, ""): [who.get(key) for who in (zero, mine)] for key in SCORES}
    for key in SCORES[:3]:
        of[key, ", all names"] = [(who.get("joint") or {}).get(key) for who in (zero, mine)]
    rows = []
    for (key, among), (before, after) in of.items():
        if before is not None or after is not None:
            change = None if None in (before, after) else after - before
            low, high = found["intervals"].get(key, (None, None)) if not among else (None, None)
            sure = "" if low is None or after is None else f"{low:.1f} to {high:.1f}"
            numbers = [(number(before), before), (number(after), after)]
            numbers.append((number(change, 2, sign=True), change))
            rows.append([TITLES[key] + among, *numbers, (sure, low)])
    columns = ["accuracy, %", "zero-shot", found["method"], ("change", "points")]
    columns.append(("95 %", "interval of a test set of this size"))
    gained = [
        f"{TITLES[key]}: {of['zero_shot']['changed']['gained']} pictures are right that zero-shot "
        f"had wrong, {of['zero_shot']['changed']['lost']} are wrong that it had right."
        for key, of in found["scopes"].items()
        if of["zero_shot"]
    ]
    numbers = tag("div", table(columns, rows, "scores"), notes(gained), _parts(found))
    body = [charts.bars(found["scores"], found["method"]), numbers]
    return section("Scores", tag("div", body, class_="charts"), id="good")


def _parts(found: dict) -> Markup | None:
    """For each tested part: top-5 accuracy, and means over classes."""
    heads = {"top1": "accuracy, %", "top5": "top 5, %"}
    heads |= {"macro_accuracy": "mean of classes, %", "macro_f1": "mean F1, %"}
    shown = [key for key in heads if any(key in of for of in found["parts"].values())]
    if not shown:
        return None
    rows = [
        [
            TITLES[part],
            (f"{of['images']:,}", of["images"]),
            *((number(of.get(key)), of.get(key)) for key in shown),
        ]
        for part, of in found["parts"].items()
    ]
    return table(["part", "pictures", *(heads[key] for key in shown)], rows, "parts")


def _training(found: dict) -> Markup | None:
    drawn = charts.curves(found["training"])
    if not drawn:
        return None
    return section("Training", tag("div", drawn, class_="charts"), id="training")


def _per_class(found: dict) -> Markup | None:
    rows, data = [], found["classes"]
    if all(row["f1"] is None for row in data):
        return None
    for row in data:
        rows.append(
            [
                name(row["name"]),
                (bar(row["f1"]), row["f1"]),
                (number(row["f1_change"], 1, sign=True), row["f1_change"]),
                (bar(row["accuracy"], f1=False), row["accuracy"]),
                (number(row["accuracy_change"], 1, sign=True), row["accuracy_change"]),
                (number(row["joint_accuracy"], 1), row["joint_accuracy"]),
                row["part"],
                *((number(row[which], 0), row[which]) for which in ("train", "val", "test")),
            ]
        )
    columns = ["class", ("F1, %", "2·precision·recall / (precision + recall)")]
    columns += [("change", "of F1 against zero-shot, points"), "accuracy, %"]
    columns += [("change", "of accuracy against zero-shot, points")]
    columns += [("all names, %", "accuracy among them"), "part"]
    columns += [(text, f"{text} pictures") for text in ("train", "val", "test")]
    states = ["n/a" if row["weak"] is None else "weak" if row["weak"] else "fine" for row in data]
    parts = [row["part"] for row in data]
    grid = table(columns, rows, "classes-table", name=[row["name"] for row in data],
                 part=parts, state=states)  # fmt: skip
    options = {"part": list(dict.fromkeys(parts)), "state": ["weak", "fine"]}
    text = (
        f"Weakest first. The line in each bar of F1 is at {WEAK / 100:.2f}; bars of classes below "
        "it are orange. Changes are relative to zero-shot CLIP, in points."
    )
    form = filters("classes-table", "class", options)
    return section("Classes", tag("p", text, class_="quiet"), form, grid, id="classes")


def bar(value: float | None, f1: bool = True) -> Markup:
    """A percentage with a bar; for an F1, also the line below which a class is weak."""
    if value is None:
        return tag("span", "n/a")
    fill = tag("i", style=f"width:{value:.1f}%")
    line = tag("u", style=f"left:{WEAK:g}%") if f1 else None
    kind = "bar weak" if f1 and value < WEAK else "bar"
    return join([number(value, 1), tag("span", fill, line, class_=kind, aria_hidden="true")])


def filters(target: str, what: str, options: dict[str, list[str]]) -> Markup:
    """The form that page.js reads: part of a name, and a choice among each of these values."""
    label = tag("label", what, tag("input", type="search", name="name", placeholder="part of it"))
    fields = [label]
    for key, values in options.items():
        if len(values) > 1:
            chosen = [tag("option", "any", value="")]
            chosen += [tag("option", value, value=value) for value in values]
            fields.append(tag("label", key, tag("select", chosen, name=key)))
    fields.append(tag("output", class_="quiet"))
    return tag("form", fields, class_="filter", data_target=target, hidden=True)


def _calibration(found: dict) -> Markup | None:
    if not found["scopes"]:
        return None
    before = {
        key: {"calibration": of["zero_shot"]["calibration"]}
        for key, of in found["scopes"].items()
        if of["zero_shot"]
    }
    drawn = [charts.reliability(found["scopes"])]
    if before:
        drawn.append(charts.reliability(before))
    titles = [found["method"], "zero-shot"]
    drawn = [tag("div", tag("h3", name(t)), d) for t, d in zip(titles, drawn, strict=False)]
    return section("Calibration", tag("div", drawn, class_="charts"), id="calibration")


def _space(found: dict) -> Markup | None:
    features = found["features"]
    if not features:
        return None
    weakest = [row["name"] for row in found["classes"] if row["name"] in features["names"]]
    coloured = [features["names"].index(text) for text in weakest[:COLOURED]]
    gaps = [features[when]["gap"] for when in ("before", "after")]
    text = (
        f"The modality gap, the distance of the means of all normalised image features and of all "
        f"normalised text features, is {gaps[0]:.3f} for zero-shot CLIP and {gaps[1]:.3f} after "
        f"adaptation. {len(features['labels'])} test pictures."
    )
    drawn = [charts.by_modality(features), charts.by_class(features, coloured)]
    body = [tag("p", text), tag("div", drawn, class_="charts maps")]
    return section("The shared space", body, id="space")


def _pictures(found: dict) -> Markup | None:
    of = found["counts"]
    if not of:
        return None
    rows = [
        [
            which,
            *(
                (f"{n:,}".removesuffix(".0"), n)
                for n in (len(c), sum(c), min(c), median(c), max(c))
            ),
        ]
        for which, c in of.items()
    ]
    columns = ["set", "classes", "pictures", "smallest class", "median", "largest"]
    chart = tag("div", charts.counts(of), class_="charts")
    return section("Pictures", chart, table(columns, rows, "counts"), id="pictures")


def _setup(found: dict) -> Markup:
    cost = found["cost"]
    told = {
        "trained parameters": number(cost["parameters"], 0),
        "training, s": number(cost["seconds"], 1),
        "memory at peak, MB": number(cost["peak_memory_mb"], 0),
        "gradient steps": number(cost["steps"], 0),
    }
    if made := cost["synthetic"]:
        told["synthetic images"] = f"{made['images']} kept of {made['attempts']} attempts"
    command = " ".join(map(str, found["command"] or []))
    where = {"folder": found["path"], "command": command, "commit": found["commit"] or "n/a"}
    return section(
        "Cost and settings",
        pairs(told),
        folded("Method's settings", pairs(found["settings"])),
        folded("Experiment", pairs(found["experiment"])),
        folded("Versions and command", pairs(where | (found["versions"] or {}))),
        id="setup",
    )


def pairs(of: dict) -> Markup:
    items = []
    for key, value in of.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        items += [tag("dt", key.replace("_", " ")), tag("dd", text or "–")]
    return tag("dl", items)
