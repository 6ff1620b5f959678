"""All numbers of a run's page as a dictionary, which report.py --format json writes and the page
shows. Scores come from results.json; the rest is computed from the run's answers
(predictions.safetensors), or None if these are missing.
"""

from collections import Counter

import torch
from torch import Tensor

from clip_min import UserError
from fewshot import predictions
from fewshot.predictions import ZERO_SHOT, Predictions
from reports import measures
from reports.gather import Tested

WEAK = 70.0  # F1 in percent; a class below it is weak, as in gen's plan f1
SCORES = ("base", "novel", "hm", "all")
PART = ("images", "top1", "top5", "macro_accuracy", "macro_f1")  # keys of a part in results.json


def numbers(run: Tested) -> dict:
    """The dictionary. What is missing is added to `run.missing`."""
    config, results = run.config, run.results or {}
    names, method = config["classnames"], config["method"]
    answers = _answers(run)
    known = {who: answers.get(row, {}) for who, row in (("method", method), ("zero", ZERO_SHOT))}
    scopes = {}  # base, novel or all among their own names; joint: all pictures among all names
    for scope, classnames in [*names.items(), ("joint", [n for of in names.values() for n in of])]:
        mine, zero = (_scope(of, scope, names) for of in known.values())
        if mine:
            scopes[scope] = _scope_numbers(classnames, mine, zero)
    return {
        "kind": "run",
        "path": str(run.path),
        "method": method,
        "recipe": config["recipe"],
        "dataset": run.experiment.get("dataset"),
        "model": config["model"],
        "shots": run.experiment.get("shots"),
        "seed": run.experiment["seed"],
        "scores": _scores(results),
        "intervals": _intervals(results),
        "parts": {
            part: {key: of.get(key) for key in PART if key in of}
            for part, of in results.get("parts", {}).items()
        },
        "training": _training(run),
        "classes": _classes(run, scopes),
        "counts": _counts(run),
        "scopes": scopes,
        "features": None,
        "cost": {
            key: results.get(key)
            for key in ("parameters", "seconds", "peak_memory_mb", "steps", "synthetic")
        },
        "settings": config["settings"],
        "experiment": run.experiment,
        "versions": config.get("versions"),
        "command": config.get("argv"),
        "commit": config.get("commit"),
        "missing": run.missing,
    }


def _answers(run: Tested) -> dict[str, dict[str, Predictions]]:
    """Row -> part -> answers; empty, with a line in `missing`, if they were not saved."""
    file = run.path / predictions.FILE
    if not file.exists():
        if run.results:
            run.missing.append(
                f"no {predictions.FILE}: runs of earlier versions and runs that label test images "
                "jointly have none. Confusions, mistakes, calibration and the change of each class "
                "are unknown; train again to get them"
            )
        return {}
    try:
        return predictions.read(file, run.config["classnames"])
    except UserError as error:
        run.missing.append(str(error))
        return {}


Answers = tuple[Tensor, Tensor, Tensor]  # labels (N,), the likeliest (N, 5), probabilities (N, 5)


def _scope(of: dict[str, Predictions], scope: str, names: dict) -> Answers | None:
    """The answers for a part among its own names; for "joint", for all parts among all names."""
    if scope != "joint":
        part = of.get(scope)
        return part and (part.labels.long(), part.top.long(), part.probabilities)
    if len(names) < 2 or not of or any(p.joint_top is None for p in of.values()):
        return None
    first, rows = 0, []
    for part, classnames in names.items():
        if part not in of:
            return None
        p = of[part]
        rows.append((p.labels.long() + first, p.joint_top.long(), p.joint_probabilities))
        first += len(classnames)
    return tuple(torch.cat(column) for column in zip(*rows, strict=True))


def _scope_numbers(names: list[str], mine: Answers, zero: Answers | None) -> dict:
    labels, top, probabilities = mine
    right = top[:, 0] == labels
    matrix = measures.confusion(top[:, 0], labels, len(names))
    found = {
        "images": len(labels),
        "top1": 100 * right.double().mean().item(),
        "interval": measures.wilson_interval(int(right.sum()), len(labels)),
        "by_class": measures.scores_by_class(top[:, 0], labels, len(names)),
        "confusions": [[i, j, int(matrix[i, j])] for i, j in matrix.nonzero().tolist()],
        "order": measures.cluster_order(matrix),
        "pairs": measures.most_confused(matrix),
        "calibration": measures.calibration(probabilities[:, 0], right),
        "names": names,
        "mistakes": [
            {
                "picture": i,
                "label": int(labels[i]),
                "top": top[i].tolist(),
                "probabilities": [100 * p for p in probabilities[i].double().tolist()],
            }
            for i in measures.most_confident_mistakes(top, probabilities, labels)
        ],
        "zero_shot": None,
    }
    for pair in found["pairs"]:  # a picture for each direction
        pair["pictures"] = [
            _surest(labels, top, probabilities, *way)
            for way in ((pair["a"], pair["b"]), (pair["b"], pair["a"]))
        ]
    if zero:
        before = zero[1][:, 0] == zero[0]
        found["zero_shot"] = {
            "top1": 100 * before.double().mean().item(),
            "by_class": measures.scores_by_class(zero[1][:, 0], zero[0], len(names)),
            "calibration": measures.calibration(zero[2][:, 0], before),
            "changed": measures.gained_and_lost(right, before),
        }
    return found


def _surest(labels: Tensor, top: Tensor, probabilities: Tensor, true: int, taken: int):
    """The index of the picture of one class that was mistaken for the other with most confidence;
    if there is none, of a correctly classified picture, or of any.
    """
    mine = labels == true
    for chosen in (mine & (top[:, 0] == taken), mine & (top[:, 0] == true), mine):
        if len(numbers_of := chosen.nonzero().flatten()):
            return int(numbers_of[probabilities[numbers_of, 0].argmax()])
    return None


def _scores(results: dict) -> dict:
    """The scores of results.json: base, novel, hm, all, and joint (among all names)."""
    mine = {key: results.get(key) for key in (*SCORES, "joint")}
    zero = results.get("zero_shot", {})
    return {"method": mine, "zero_shot": {key: zero.get(key) for key in (*SCORES, "joint")}}


def _intervals(results: dict) -> dict[str, list[float]]:
    """The 95 % interval of each part's accuracy, over pictures or a transductive method's tasks."""
    found = {}
    for part, of in results.get("parts", {}).items():
        if of.get("tasks") == 1:  # a single task has no spread
            continue
        if "interval95" in of:
            found[part] = [results[part] - of["interval95"], results[part] + of["interval95"]]
        elif of.get("images"):
            right = round(of["top1"] / 100 * of["images"])
            found[part] = list(measures.wilson_interval(right, of["images"]))
    return found


def _training(run: Tested) -> dict:
    """The log, the checkpoint that was kept, and the final accuracy on training pictures."""
    keep = run.config["settings"].get("keep")
    judged = [line for line in run.log if "val" in line]
    kept = None
    if keep in ("best", "latest-best") and judged:
        best = max(line["val"] for line in judged)
        steps = [line["step"] for line in judged if line["val"] == best]
        kept = steps[-1 if keep == "latest-best" else 0]
    elif keep == "last" and run.log:
        kept = run.log[-1]["step"]
    return {
        "rounds": run.log,
        "keep": keep,
        "kept_step": kept,
        "train_accuracy": (run.results or {}).get("train"),
        "val_accuracy": (run.results or {}).get("val"),
    }


def _classes(run: Tested, scopes: dict) -> list[dict]:
    """Each class of each part: accuracy and F1 beside zero-shot's, and its number of pictures."""
    counts = {part: Counter(name for _, name, _ in rows) for part, rows in _rows(run).items()}
    joint, rows, first = scopes.get("joint"), [], 0
    for part, names in run.config["classnames"].items():
        kept = (run.results or {}).get("parts", {}).get(part, {}).get("classes")
        kept = list(kept.values()) if isinstance(kept, dict) else [{}] * len(names)
        before = ((scopes.get(part) or {}).get("zero_shot") or {}).get("by_class")
        for k, name in enumerate(names):
            mine, old = kept[k] if k < len(kept) else {}, before[k] if before else {}
            rows.append(
                {
                    "name": name,
                    "part": part,
                    "accuracy": mine.get("accuracy"),
                    "f1": mine.get("f1"),
                    "zero_shot_accuracy": old.get("accuracy"),
                    "zero_shot_f1": old.get("f1"),
                    "accuracy_change": _less(mine.get("accuracy"), old.get("accuracy")),
                    "f1_change": _less(mine.get("f1"), old.get("f1")),
                    "weak": None if mine.get("f1") is None else mine["f1"] < WEAK,
                    "joint_accuracy": joint["by_class"][first + k]["accuracy"] if joint else None,
                    **{which: of[name] if of else None for which, of in counts.items()},
                }
            )
        first += len(names)
    return sorted(rows, key=lambda row: (row["f1"] is None, row["f1"]))


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _rows(run: Tested) -> dict:
    return run.record or {"train": [], "val": [], "test": []}


def _counts(run: Tested) -> dict[str, list[int]] | None:
    """Pictures of each class, largest first: in training, validation and each tested part."""
    if not run.record:
        return None
    parts = run.config["classnames"]
    found = {
        "train": (run.record["train"], run.run.learned),
        "val": (run.record["val"], run.run.learned),
    }
    found |= {f"{part} test": (run.record["test"], names) for part, names in parts.items()}
    of = {}
    for which, (rows, names) in found.items():
        count = Counter(name for _, name, _ in rows)
        of[which] = sorted((count[name] for name in names), reverse=True)
    return of
