"""The numbers of several runs. Runs that differ only in their seed form a row, with mean and
standard deviation (of the sample, n - 1).

A table holds only runs on the same task: same data, model, classes and template, and for methods
that label images jointly, the same number of images at once. Zero-shot CLIP is a row of each table.
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path

from clip_min import UserError
from clip_min.files import read_json
from clip_min.typed import expect
from fewshot import grid
from reports import generated
from reports.gather import Found, Tested

# Settings of an experiment that define a task, and settings of a run that define a row.
TASK = ("dataset", "data_root", "model", "image_size", "classes", "base_classes", "split")
TASK += ("split_file", "template")
JOINT = ("tasks", "queries", "k_eff", "k_eff_max")  # settings of jointly labelled test images
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
            tasks[_key(run)].append(run)
    return {
        "kind": "runs",
        "tasks": [_task(runs, left_out) for runs in tasks.values()],
        "generated": [generated.numbers(manifest) for manifest in found.generated],
        "left_out": left_out,
    }


def _key(run: Tested) -> str:
    """What is equal for all runs on one task."""
    task = {name: run.experiment.get(name) for name in TASK}
    jointly = any("tasks" in of for of in run.results.get("parts", {}).values())
    joint = {name: run.config["settings"].get(name) for name in JOINT} if jointly else None
    return json.dumps([task, joint, run.config["fingerprint"], run.config["classnames"]])


def _task(runs: list[Tested], left_out: dict[str, str]) -> dict:
    groups: dict[str, list[Tested]] = defaultdict(list)
    for run in runs:
        what = [run.config["method"], _settings(run)]
        group = groups[json.dumps(what)]
        made_of = run.config["settings"].get("synthetic")
        again = [of for of in group if of.experiment["seed"] == run.experiment["seed"]]
        if not again:
            group.append(run)
        elif again[0].config["settings"].get("synthetic") == made_of:
            left_out[str(run.path)] = f"{run.path}: is the run of {again[0].path} once more"
        else:  # the same seed with other synthetic images
            groups[json.dumps([*what, made_of])].append(run)
    rows = [_row(of) for of in groups.values()]
    _tell_apart(rows, list(groups.values()))
    # The test pictures may depend on the seed, so use one run of each. Validation pictures also
    # depend on the number of shots.
    by_seed: dict[int, dict] = {}
    for run in runs:
        seen = by_seed.setdefault(run.experiment["seed"], dict(run.results["zero_shot"]))
        if seen.get("val") != run.results["zero_shot"].get("val"):
            seen["val"] = None
    if any(of.get("val") is None for of in by_seed.values()):
        by_seed = {seed: of | {"val": None} for seed, of in by_seed.items()}
    first = runs[0]
    return {
        "dataset": first.experiment.get("dataset"),
        "data_root": first.experiment.get("data_root"),
        "model": first.config["model"],
        "classes": first.experiment.get("classes"),
        "zero_shot": grid.spread(list(by_seed.values())),
        "rows": rows,
    }


def _settings(run: Tested) -> dict:
    """What is equal for all runs in a row."""
    of = {name: run.experiment.get(name) for name in ROW}
    of |= {"recipe": run.config["recipe"], "init_from": run.config.get("init_from")}
    return of | {k: v for k, v in run.config["settings"].items() if k != "synthetic"}


def _row(runs: list[Tested]) -> dict:
    """Runs that differ only in their seed."""
    first = runs[0]
    file = first.experiment.get("shots_file")
    costs = {}
    for key in COSTS:
        values = [run.results[key] for run in runs if run.results.get(key) is not None]
        costs[key] = statistics.mean(values) if values else None
    return {
        "method": first.config["method"],
        "label": first.config["method"],
        "shots": Path(file).stem if file else first.experiment.get("shots"),
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
        settings = [_settings(groups[i][0]) for i in numbers_of]
        differ = [
            key
            for key in dict.fromkeys(key for of in settings for key in of)
            if len({json.dumps(of.get(key)) for of in settings}) > 1
        ]
        for i, of in zip(numbers_of, settings, strict=True):
            said = ", ".join(f"{key} {str(of.get(key))[:40]}" for key in differ[:4])
            rows[i]["label"] += f" ({said})" if said else ""
    labels = [(row["label"], row["shots"]) for row in rows]
    for row, label in zip(rows, labels, strict=True):
        if labels.count(label) > 1:  # the differences are too long, or too many
            row["label"] += f" ({row['folders'][0]})"


def _keep_share(runs: list[Tested]) -> list[dict] | None:
    """The curve from zero-shot CLIP to the first run for which eval.py --keep-share has saved one:
    base and novel accuracy at each share of the learned change.
    """
    files = [run.path / "keep_share.json" for run in runs]
    if not (file := next((file for file in files if file.exists()), None)):
        return None
    try:
        points = read_json(file, "", {"points": list[dict]})["points"]
        for point in points:
            expect(point, POINT, str(file))
    except UserError:
        return None
    points.sort(key=lambda of: of["share"])
    return [{key: of[key] for key in POINT} for of in points]
