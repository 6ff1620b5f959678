"""The page of several runs: which is better, its cost, and the gain from more pictures."""

from reports import generated
from reports.charts import DASHES, MARKERS, QUIET, SERIES, chart, legend
from reports.gather import Found
from reports.markup import Markup, figure, name, notes, number, page, section, table, tag
from reports.run_page import data_named, filters

# Names as in `grid.spread`.
TITLES = {"hm": "HM", "joint_hm": "all names", "all": "all", "base": "base", "novel": "novel"}
TITLES |= {"val": "validation"}


def write(found: dict, of: Found) -> str:
    tasks = found["tasks"]
    count = sum(len(row["folders"]) for task in tasks for row in task["rows"])
    where = "on one task" if len(tasks) == 1 else f"on {len(tasks)} tasks"
    title = f"{count} run{'s' if count != 1 else ''} {where}" if tasks else "Generated images"
    title = title if tasks or found["generated"] else "No finished run"
    sections = [tag("header", tag("h1", title))] if tasks else []
    sections += [_task(task, k) for k, task in enumerate(tasks)]
    for k, (numbers, manifest) in enumerate(zip(found["generated"], of.generated, strict=True)):
        sections += generated.sections(numbers, manifest, k)
    if found["left_out"]:
        sections.append(section("Left out", notes(list(found["left_out"].values())), id="left-out"))
    return page(title, sections)


def _task(task: dict, k: int) -> Markup:
    what = f"{data_named(task)}, model {task['model']}"
    what += ", all classes learned" if task["classes"] == "all" else ""
    rows = sorted(task["rows"], key=lambda row: -(_mean(row, best(task)) or 0))
    methods = list(dict.fromkeys(row["label"] for row in rows))
    drawn = [_against_cost(task, rows, methods), _against_shots(task, rows, methods)]
    drawn.append(_halves(task, rows, methods))
    shots = sorted({str(row["shots"]) for row in rows}, key=lambda text: (len(text), text))
    form = filters(f"runs-{k}", "method", {"shots": shots})
    charts = [chart for chart in drawn if chart]
    body = [
        form,
        _table(task, rows, f"runs-{k}"),
        tag(
            "p",
            "Mean ± standard deviation over seeds, in percent; seconds of training; peak memory of "
            "the process, in MB. Choose by validation: all other accuracies are on test "
            "pictures.",
            class_="quiet",
        ),
        tag("div", charts, class_="charts") if charts else None,
    ]
    return section(what, *body, id=f"task-{k}")


def best(task: dict) -> str:
    """The score that orders the rows; "", if a damaged run has none."""
    return next((key for key in ("hm", "all", "base") if key in task["zero_shot"]), "")


def _mean(row: dict, key: str) -> float | None:
    return row["scores"].get(key, {}).get("mean")


def _shown(score: dict | None) -> tuple:
    if score is None:
        return "n/a", None
    spread = "" if score["std"] is None else f" ± {score['std']:.2f}"
    return f"{score['mean']:.2f}{spread}", score["mean"]


def _table(task: dict, rows: list[dict], id: str) -> Markup:
    every = [{"scores": task["zero_shot"]}, *rows]
    keys = [key for key in TITLES if any(key in row["scores"] for row in every)]
    lines = []
    for row in rows:
        lines.append(
            [
                name(row["label"]),
                (str(row["shots"]), row["shots"] if isinstance(row["shots"], int) else 1e9),
                *(_shown(row["scores"].get(key)) for key in keys),
                (str(len(row["seeds"])), len(row["seeds"])),
                (number(row["parameters"], 0), row["parameters"]),
                (number(row["seconds"], 1), row["seconds"]),
                (number(row["peak_memory_mb"], 0), row["peak_memory_mb"]),
            ]
        )
    scores = (_shown(task["zero_shot"].get(key)) for key in keys)
    blank = ("", None)
    lines.append([name("zero-shot"), blank, *scores, blank, ("0", 0), blank, blank])
    columns = ["method", "shots", *(TITLES[key] for key in keys)]
    columns += ["seeds", "parameters", ("seconds", "of training"), ("MB", "peak memory")]
    shots = [*(str(row["shots"]) for row in rows), ""]
    return table(columns, lines, id, name=[*(row["label"] for row in rows), "zero-shot"],
                 shots=shots)  # fmt: skip


def look(k: int) -> tuple[int, int]:
    """Colour and mark of series k; 64 series have distinct pairs."""
    return k % len(SERIES), (k + k // len(SERIES)) % len(MARKERS)


def _style(k: int) -> dict:
    colour, mark = look(k)
    return {"color": SERIES[colour], "marker": MARKERS[mark]}


def _against_cost(task: dict, rows: list[dict], labels: list[str]) -> Markup | None:
    key = best(task)
    points = [
        (row["seconds"], _mean(row, key), labels.index(row["label"]), row)
        for row in rows
        if row["seconds"] and _mean(row, key) is not None
    ]
    if len(points) < 2:
        return None

    def draw(axes):
        for x, y, k, _ in points:
            axes.plot([x], [y], linestyle="none", ms=8, **_style(k))
        axes.axhline(task["zero_shot"][key]["mean"], color=QUIET, linestyle="--", linewidth=1)
        if max(x for x, *_ in points) > 10 * min(x for x, *_ in points):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="seconds of training", ylabel=f"{TITLES[key]} (%)")

    said = "; ".join(f"{row['label']} {y:.2f} % in {x:.1f} s" for x, y, _, row in points[:12])
    used = sorted({k for _, _, k, _ in points})
    caption = f"{TITLES[key]} against training time; dashed: zero-shot."
    return figure(
        chart(draw, f"{TITLES[key]} against cost: {said}."), caption, _legend(labels, used)
    )


def _legend(labels: list[str], used: list[int]) -> Markup:
    return legend([(name(labels[k]), *look(k)) for k in used])


def _against_shots(task: dict, rows: list[dict], labels: list[str]) -> Markup | None:
    key, series = best(task), {}
    for row in rows:
        if isinstance(row["shots"], int) and _mean(row, key) is not None:
            series.setdefault(labels.index(row["label"]), []).append(row)
    series = {k: sorted(of, key=lambda row: row["shots"]) for k, of in series.items()}
    series = {k: of for k, of in series.items() if len(of) > 1}
    if not series:
        return None

    def draw(axes):
        for k, of in series.items():
            x = [row["shots"] for row in of]
            y = [_mean(row, key) for row in of]
            errors = [row["scores"][key]["std"] or 0 for row in of]
            dash = DASHES[look(k)[1]]
            axes.errorbar(x, y, errors, capsize=3, linestyle=dash, ms=6, **_style(k))
        axes.axhline(task["zero_shot"][key]["mean"], color=QUIET, linestyle="--", linewidth=1)
        shots = sorted({row["shots"] for of in series.values() for row in of})
        axes.set_xscale("log", base=2)
        axes.set_xticks(shots, [str(n) for n in shots])
        axes.minorticks_off()
        axes.set(xlabel="shots (training pictures of a class)", ylabel=f"{TITLES[key]} (%)")

    said = "; ".join(
        f"{labels[k]}: " + ", ".join(f"{row['shots']} shots {_mean(row, key):.2f} %" for row in of)
        for k, of in series.items()
    )
    caption = f"{TITLES[key]} against shots, bars: one standard deviation; dashed: zero-shot."
    drawn = chart(draw, f"{TITLES[key]} against shots. {said}.")
    return figure(drawn, caption, _legend(labels, list(series)))


def _halves(task: dict, rows: list[dict], labels: list[str]) -> Markup | None:
    """Base against novel: up and to the right is better."""
    rows = [row for row in rows if _mean(row, "novel") is not None]
    start = task["zero_shot"]
    if not rows or not {"base", "novel"} <= start.keys():
        return None

    def draw(axes):
        axes.plot([start["base"]["mean"]], [start["novel"]["mean"]], "+", color=QUIET, ms=13, mew=2)
        for row in rows:
            k = labels.index(row["label"])
            curve = [p for p in row["keep_share"] or () if None not in p.values()]
            if curve:
                points = [[point[part] for point in curve] for part in ("base", "novel")]
                axes.plot(*points, color=_style(k)["color"], linewidth=1.2)
            here = [_mean(row, "base")], [_mean(row, "novel")]
            axes.plot(*here, linestyle="none", ms=8, **_style(k))
        axes.set(xlabel="base accuracy (%)", ylabel="novel accuracy (%)")

    said = "; ".join(
        f"{row['label']} {_mean(row, 'base'):.2f}, {_mean(row, 'novel'):.2f}" for row in rows[:12]
    )
    caption = "Base against novel accuracy; the cross is zero-shot CLIP."
    if any(row["keep_share"] for row in rows):
        caption += " Lines: shares of the learned change, from none to all (a share chosen on "
        caption += "these test pictures is not a result)."
    used = sorted({labels.index(row["label"]) for row in rows})
    drawn = chart(draw, f"Base and novel accuracy, %: {said}.")
    return figure(drawn, caption, _legend(labels, used))
