"""The charts of a run's page."""

from reports.charts import DASHES, INK, LINE, MARKERS, QUIET, SERIES, chart, legend
from reports.markup import Markup, escape, figure, folded, join, name, number, tag

TITLES = {"base": "base", "novel": "novel", "hm": "HM", "all": "all", "joint": "all names"}


def bars(scores: dict, method: str) -> Markup:
    """Each score beside zero-shot CLIP's."""
    rows = {who: flat(of) for who, of in scores.items()}
    shown = [key for key in TITLES if rows["method"].get(key) is not None]

    def draw(axes):
        for k, who in enumerate(("zero_shot", "method")):
            places = [i + 0.4 * k - 0.2 for i in range(len(shown))]
            values = [rows[who].get(key) for key in shown]
            axes.bar(places, [v or 0 for v in values], 0.38, color=(QUIET, SERIES[0])[k])
            for x, value in zip(places, values, strict=True):
                text = "n/a" if value is None else f"{value:.1f}"
                axes.text(x, (value or 0) + 1.5, text, ha="center", fontsize=9)
        axes.set_xticks(range(len(shown)), [TITLES[key] for key in shown])
        axes.set(ylabel="accuracy (%)", ylim=(0, 112), yticks=range(0, 101, 20))
        axes.grid(visible=False, axis="x")

    values = [(TITLES[key], *(number(rows[who].get(key)) for who in rows)) for key in shown]
    said = "; ".join(f"{key} {mine} %, zero-shot {zero} %" for key, mine, zero in values)
    caption = [
        "Accuracy of ", name(method), " (right bars) beside zero-shot CLIP (left, grey). HM is the "
        "harmonic mean of base and novel; “all names” is the same with all names to choose from.",
    ]  # fmt: skip
    return figure(chart(draw, f"Accuracy: {said}."), caption)


def flat(scores: dict) -> dict:
    """Scores by name; those among all names as their harmonic mean."""
    return {**scores, "joint": (scores.get("joint") or {}).get("hm")}


def curves(training: dict) -> list[Markup]:
    """Loss, and accuracy on validation and training pictures, over epochs."""
    rounds, kept = training["rounds"], training["kept_step"]
    if not rounds:
        return []
    epochs = [line["epoch"] for line in rounds]
    at = next((line["epoch"] for line in rounds if line["step"] == kept), None)
    which = "The dashed line marks the checkpoint that was kept."
    if training["keep"] == "mean":
        which = "The mean of all checkpoints was kept."

    def mark(axes):
        if at is not None:
            axes.axvline(at, color=INK, linestyle="--", linewidth=1.2)
        axes.set_xlabel("epoch")

    def loss(axes):
        axes.plot(epochs, [line["loss"] for line in rounds], marker="o", ms=3, color=SERIES[1])
        axes.set_ylabel("training loss (nats)")
        mark(axes)

    first, last = rounds[0], rounds[-1]
    alt = f"Training loss over epochs: {first['loss']:.4g} at first, {last['loss']:.4g} at last."
    found = [figure(chart(loss, alt), f"Mean training loss between validations. {which}")]
    shown = [("val", "validation"), ("train", "training")]
    shown = [(key, text) for key, text in shown if all(key in line for line in rounds)]
    final = training["train_accuracy"]
    if not shown and final is None:
        return found

    def accuracy(axes):
        for k, (key, _) in enumerate(shown):
            values = [line[key] for line in rounds]
            axes.plot(epochs, values, DASHES[k], marker=MARKERS[k], ms=4, color=SERIES[2 * k])
        if final is not None:
            axes.plot([at if at is not None else epochs[-1]], [final], "^", ms=8, color=SERIES[1])
        axes.set_ylabel("accuracy (%)")
        mark(axes)

    said = [f"{text}, {rounds[-1][key]:.2f} % at last" for key, text in shown]
    said += [] if final is None else [f"training pictures, {final:.2f} % at the end"]
    marks = {"val": "validation pictures (line, circles)", "train": "training pictures (squares)"}
    caption = [marks[key] for key, _ in shown]
    caption += [] if final is None else ["training pictures at the end (triangle)"]
    alt = f"Accuracy over epochs: {'; '.join(said)}."
    return [*found, figure(chart(accuracy, alt), f"Accuracy on {', '.join(caption)}. {which}")]


def reliability(scopes: dict) -> Markup:
    """Accuracy over confidence, of each scope."""

    def draw(axes):
        axes.plot([0, 100], [0, 100], color=QUIET, linewidth=1)
        for k, of in enumerate(scopes.values()):
            rows = [bin for bin in of["calibration"]["bins"] if bin["pictures"]]
            points = [[bin[key] for bin in rows] for key in ("confidence", "accuracy")]
            axes.plot(*points, DASHES[k], marker=MARKERS[k], ms=5, color=SERIES[k])
        axes.set(xlabel="confidence (%)", ylabel="accuracy (%)", xlim=(0, 102), ylim=(0, 102))

    said = {TITLES[key]: of["calibration"]["ece"] for key, of in scopes.items()}
    alt = "Accuracy over confidence; expected calibration error: "
    alt += ", ".join(f"{key} {value:.2f} %" for key, value in said.items())
    entries = [(f"{key}, ECE {value:.2f} %", k) for k, (key, value) in enumerate(said.items())]
    caption = (
        "Pictures in 15 bins by confidence, the probability of the first answer. Below the grey "
        "line the method is overconfident. ECE is the mean distance from that line."
    )
    return figure(chart(draw, alt, 4.6, 3.6), caption, legend(entries))


def counts(of: dict[str, list[int]]) -> Markup:
    """Pictures of each class, in each set from the largest class to the smallest."""

    def draw(axes):
        for k, values in enumerate(of.values()):
            ranks = range(1, len(values) + 1)
            axes.plot(ranks, values, DASHES[k], color=SERIES[k], drawstyle="steps-mid")
        axes.set(xlabel="classes, largest first", ylabel="pictures of a class", ylim=(0, None))

    alt = "Pictures of each class: " + "; ".join(
        f"{which}, {min(values)} to {max(values)}" for which, values in of.items()
    )
    entries = [(which, k) for k, which in enumerate(of)]
    return figure(
        chart(draw, alt), "Pictures of each class in each set.", legend(entries, lines=True)
    )


def by_modality(features: dict) -> Markup:
    """Two components of image and text features, before and after adaptation."""

    def draw(axes, images, texts):
        axes.scatter(*zip(*images, strict=True), s=10, color=SERIES[0], linewidths=0)
        axes.scatter(*zip(*texts, strict=True), s=24, color=SERIES[1], marker="D", linewidths=0)

    caption = "Each mark is a picture or a class name; left before, right after adaptation."
    entries = [("pictures", 0), ("class names", 1, MARKERS.index("D"))]
    return figure(_both(features, draw), caption, legend(entries))


def by_class(features: dict, coloured: list[int]) -> Markup:
    """The same, some classes in colour."""

    def draw(axes, images, texts):
        axes.scatter(*zip(*images, strict=True), s=7, color=LINE, linewidths=0)
        axes.scatter(*zip(*texts, strict=True), s=18, color=LINE, marker="D", linewidths=0)
        for k, c in enumerate(coloured):
            mine = [p for p, label in zip(images, features["labels"], strict=True) if label == c]
            look = {"color": SERIES[k], "marker": MARKERS[k]}
            if mine:
                axes.scatter(*zip(*mine, strict=True), s=24, linewidths=0, **look)
            axes.scatter(*texts[c], s=90, facecolor="none", linewidths=1.6, **look)

    caption = (
        "The same by class: the weakest classes in colour, filled marks for pictures, hollow marks "
        "for names; other classes grey."
    )
    entries = [(name(features["names"][c]), k) for k, c in enumerate(coloured)]
    return figure(_both(features, draw), caption, legend(entries))


def _both(features: dict, draw) -> Markup:
    """draw(axes, images, texts) before and after adaptation, side by side."""
    drawn = []
    for when in ("before", "after"):
        of = features[when]

        def one(axes, of=of, when=when):
            draw(axes, of["images"], of["texts"])
            axes.set_title(f"{when} adaptation: gap {of['gap']:.3f}", fontsize=10)
            x, y = (f"{share:.0f} % of the variance" for share in of["explained"])
            axes.set(xlabel=f"1st component, {x}", ylabel=f"2nd, {y}")

        alt = f"Two principal components of image and text features {when} adaptation; "
        drawn.append(chart(one, f"{alt}modality gap {of['gap']:.3f}.", 4.6, 3.6))
    return tag("div", drawn, class_="charts")


NUMBERED = 30  # classes whose rows and columns have room for a number


def matrix(scope: dict) -> Markup:
    """The confusion matrix: a cell for each pair that occurs, darker for a larger share."""
    names, order = scope["names"], scope["order"]
    totals: dict[int, int] = {}
    for i, _, times in scope["confusions"]:
        totals[i] = totals.get(i, 0) + times
    place = {c: k for k, c in enumerate(order)}
    n, cells = len(order), []
    for i, j, times in scope["confusions"]:
        if i not in place or j not in place:
            continue
        share = times / totals[i]
        text = f"{names[i]} → {names[j]}: {times} of {totals[i]}"
        cells.append(
            f'<rect x="{place[j]}" y="{place[i]}" width="1" height="1" '
            f'fill="var(--c{0 if i == j else 1})" fill-opacity="{0.35 + 0.65 * share:.2f}">'
            f"<title>{escape(text)}</title></rect>"
        )
    marks = []
    for k in range(n) if n <= NUMBERED else ():
        marks.append(f'<text x="{k + 0.5}" y="-0.25" text-anchor="middle">{k + 1}</text>')
        marks.append(f'<text x="-0.25" y="{k + 0.68}" text-anchor="end">{k + 1}</text>')
    right = sum(times for i, j, times in scope["confusions"] if i == j and i in place)
    images = sum(totals.get(c, 0) for c in order)
    alt = f"Confusion matrix of {n} classes: {right} of {images} pictures on the diagonal."
    edge = n / 24 if marks else n / 100  # room for the numbers
    side = f"{-edge} {-edge} {n + 1.5 * edge} {n + 1.5 * edge}"
    svg = (
        f'<svg role="img" aria-label="{escape(alt)}" class="square matrix" viewBox="{side}">'
        f'<rect width="{n}" height="{n}" fill="none" stroke="var(--line)" '
        f'stroke-width="{n / 300:.2f}"/><g shape-rendering="crispEdges">{"".join(cells)}</g>'
        f'<g font-size="{n / 40:.2f}" fill="var(--quiet)">{"".join(marks)}</g></svg>'
    )
    of = "" if n == len(names) else f" The {n} classes with the most confusions of {len(names)}."
    caption = (
        "Rows: true class; columns: predicted class; blue: right, orange: wrong, darker for a "
        f"larger share of the row. Classes that are often confused are next to each other.{of} "
        "Point at a cell to read it."
    )
    listed = tag("ol", [tag("li", name(names[c])) for c in order])
    return join([figure(Markup(svg), caption), folded("The classes in this order", listed)])
