"""The numbers of several runs. Runs that differ only in their seed form a row, with mean and
standard deviation (of the sample, n - 1).

A table holds only runs on the same task: same data, model, classes and template. Zero-shot CLIP is
a row of each table.
"""

import json
import statistics
from collections import defaultdict

from clip_min import UserError
from clip_min.files import read_json
from clip_min.typed import expect
from fewshot import grid
from reports import generated
from reports.gather import Found, Tested

# Settings of an experiment that define a task, and settings of a run that define a row.
TASK = ("dataset", "data_root", "model", "image_size", "classes", "base_classes", "split")
TASK += ("split_file", "template")
ROW = ("shots", "shots_file", "precision")
POINT = {"share": float, "base": float | None, "novel": float | None}  # a point in keep_share.json
COSTS = ("parameters", "seconds", "peak_memory_mb")


def numbers(found: Found) -> dict:
    """The rows of each task; and what was left out, with reasons: unreadable or unfinished runs."""
    left_out = dict(found.left_out)
    tasks: dict[str, list[Tested]] = defaultdict(list)
    for run in found.runs:
        if run.results is None:
            left_out[str(run.path)] = f"{run.path}: {run.missing[0]}"
        else:
            key = {name: run.experiment.get(name) for name in TASK}
            tasks[json.dumps([key, run.config["fingerprint"]])].append(run)
    return {
        "kind": "runs",
        "tasks": [_task(runs) for runs in tasks.values()],
        "generated": [generated.numbers(manifest) for manifest in found.generated],
        "left_out": left_out,
    }


def _task(runs: list[Tested]) -> dict:
    groups: dict[str, list[Tested]] = defaultdict(list)
    for run in runs:
        what = {name: run.experiment.get(name) for name in ROW}
        settings = {k: v for k, v in run.config["settings"].items() if k != "synthetic"}
        init = run.config.get("init_from")
        groups[json.dumps([run.config["method"], what, settings, init])].append(run)
    rows = [_row(of) for of in groups.values()]
    _tell_apart(rows, list(groups.values()))
    # The test pictures may depend on the seed, so use one run of each.
    by_seed = {run.experiment["seed"]: run.results["zero_shot"] for run in runs}
    first = runs[0]
    return {
        "dataset": first.experiment.get("dataset"),
        "data_root": first.experiment.get("data_root"),
        "model": first.config["model"],
        "classes": first.experiment.get("classes"),
        "zero_shot": grid.spread(list(by_seed.values())),
        "rows": rows,
    }


def _row(runs: list[Tested]) -> dict:
    """Runs that differ only in their seed."""
    first = runs[0]
    costs = {}
    for key in COSTS:
        values = [run.results[key] for run in runs if run.results.get(key) is not None]
        costs[key] = statistics.mean(values) if values else None
    return {
        "method": first.config["method"],
        "label": first.config["method"],
        "shots": first.experiment.get("shots"),
        "seeds": [run.experiment["seed"] for run in runs],
        "folders": [str(run.path) for run in runs],
        "scores": grid.spread([run.results for run in runs]),
        **costs,
        "keep_share": _keep_share(runs),
    }


def _tell_apart(rows: list[dict], groups: list[list[Tested]]) -> None:
    """Add the settings that differ to labels that are equal."""
    alike: dict[tuple, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        alike[row["method"], row["shots"]].append(i)
    for numbers_of in alike.values():
        settings = [
            {"recipe": groups[i][0].config["recipe"], **groups[i][0].config["settings"]}
            for i in numbers_of
        ]
        differ = [
            key
            for key in dict.fromkeys(key for of in settings for key in of)
            if key != "synthetic" and len({json.dumps(of.get(key)) for of in settings}) > 1
        ]
        for i, of in zip(numbers_of, settings, strict=True):
            said = ", ".join(f"{key} {of.get(key)}" for key in differ[:4])
            rows[i]["label"] += f" ({said})" if said else ""


def _keep_share(runs: list[Tested]) -> list[dict] | None:
    """The curve from zero-shot CLIP to the first run, if eval.py --keep-share has saved one: base
    and novel accuracy at each share of the learned change.
    """
    file = runs[0].path / "keep_share.json"
    if not file.exists():
        return None
    try:
        points = read_json(file, "", {"points": list[dict]})["points"]
        for point in points:
            expect(point, POINT, str(file))
    except UserError:
        return None
    return [{key: of[key] for key in POINT} for of in points]
