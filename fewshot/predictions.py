"""A method's predictions for all test pictures: a run stores them, and scores are computed from
them.

Each part of the test set (base, novel) is scored among its own names, and among the names of all
parts in one list, since a user rarely knows which half a picture is from. For most methods a
class's logit depends only on the image and that class, so a single pass gives both: the part's
logits are its columns of all logits. The five likeliest classes and their probabilities are stored.
"""

import contextlib
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from clip_min import UserError
from clip_min.files import read_safetensors
from fewshot import ranks
from fewshot.metrics import harmonic_mean, likeliest, per_class, share
from fewshot.task import Task

FILE = "predictions.safetensors"
ZERO_SHOT = "zero-shot"  # the row of zero-shot CLIP in tables; not the name of a method


@dataclass
class Predictions:
    """Predictions for the N test pictures of a part, in the order of data.json; on the CPU.

    Probabilities are the softmax of float32 logits, over the part's own names or over all names.
    """

    labels: Tensor  # (N,) int32, indices of the part's own names
    top: Tensor  # (N, 5) int32, the likeliest of these, best first; fewer if there are fewer names
    probabilities: Tensor  # (N, 5) float32, of these
    joint_top: Tensor | None = None  # (N, 5) int32, the likeliest of all names: base, then novel
    joint_probabilities: Tensor | None = None  # (N, 5) float32; None without halves, or if
    # the method cannot name both


_KEPT = [field.name for field in fields(Predictions) if field.name != "labels"]


def predict_task(method, task: Task, batch_size: int = 64) -> dict[str, Predictions]:
    """A method's predictions for each part of the test set that it can name."""
    every, joint = method, len(task.tests) > 1 and method.names_unseen
    if joint:
        every = method.for_classes([name for t in task.tests.values() for name in t.classnames])
    found, first = {}, 0  # first: index of the part's first name among all names
    with every.inference():  # class features are computed once for all parts
        for part, test in task.tests.items():
            if part == "novel" and not method.names_unseen:
                continue
            own, alone = slice(None), None
            if joint and method.logits_apart:
                own = slice(first, first + len(test.classnames))
            elif joint:
                alone = method.for_classes(test.classnames)
            elif method.classnames != test.classnames:  # fewer: it can name no others
                own = [method.classnames.index(name) for name in test.classnames]
            answers = _answers(every, test.batches, own, joint, alone, batch_size)
            found[part] = Predictions(test.batches.labels.cpu().int(), *answers)
            first += len(test.classnames)
    return found


def _answers(every, batches, own, joint: bool, alone, batch_size: int) -> list[Tensor]:
    """`top`, `probabilities` and, if `joint`, those of all names.

    own: the part's columns of the logits of `every`; or `alone`: a method for the part's own
    logits.
    """
    parts = torch.arange(len(batches)).split(batch_size)
    rows, count = [], len(ranks.mine(parts))
    encoded = batches.each(every, parts)  # read and encoded on demand
    encoded = tqdm(encoded, "testing", count, leave=False, disable=count <= 8 or None)

    def keep(logits: Tensor) -> list[Tensor]:  # (B, K) -> (B, 5) each
        top = likeliest(logits)
        return [top.int(), logits.softmax(dim=1).gather(1, top)]

    with batches.autocast(), contextlib.nullcontext() if alone is None else alone.inference():
        for x in encoded:
            logits = every.classify(x).float()  # (B, K)
            mine = logits[:, own] if alone is None else alone.classify(x).float()
            rows.append(keep(mine) + (keep(logits) if joint else []))
    columns = zip(*rows, strict=True) if rows else [()] * (4 if joint else 2)
    return [ranks.collect(parts, column).cpu() for column in columns]


def score(found: dict[str, Predictions], classnames: dict[str, list[str]]) -> dict:
    """Accuracies of `predict_task`'s answers, in percent -> {"base", "novel", "hm", "all", "joint",
    "parts"}.

    classnames: part -> its names. joint: the accuracies {"base", "novel", "hm"} among all names.
    Scores that a method cannot have are None: novel, hm and joint.
    """
    scores = {**dict.fromkeys(("base", "novel", "hm", "all", "joint")), "parts": {}}
    joint, first = {}, 0
    for part, names in classnames.items():
        if part not in found:
            continue
        of = found[part]
        recall, f1 = per_class(of.top[:, 0], of.labels, len(names))
        least, most = of.labels.bincount(minlength=len(names)).aminmax()
        # with an index, if two classes share a name, as in ImageNet
        names = [n if names.count(n) == 1 else f"{n} ({k})" for k, n in enumerate(names)]
        scores[part] = share(of.top[:, :1], of.labels)
        scores["parts"][part] = {
            "images": len(of.labels),
            "top1": scores[part],
            "top5": share(of.top, of.labels),
            "macro_accuracy": recall.nanmean().item(),
            "macro_f1": f1[~recall.isnan()].mean().item(),
            "images_a_class": [least.item(), most.item()],
            "classes": {
                name: dict.fromkeys(("accuracy", "f1"))  # without pictures
                if r.isnan()
                else {"accuracy": r.item(), "f1": f.item()}
                for name, r, f in zip(names, recall, f1, strict=True)
            },
        }
        if of.joint_top is not None:
            joint[part] = share(of.joint_top[:, :1], first + of.labels)
        first += len(names)
    if scores["novel"] is not None:
        scores["hm"] = harmonic_mean(scores["base"], scores["novel"])
    if joint:
        scores["joint"] = {**joint, "hm": harmonic_mean(joint["base"], joint["novel"])}
    return scores


def brief(scores: dict) -> dict:
    """Scores without those of single classes."""
    return {key: value for key, value in scores.items() if key != "parts"}


# ----------------------------------------------------------------------------------- a run's file


def tensors(rows: dict[str, dict[str, Predictions]]) -> dict[str, Tensor]:
    """Row ("zero-shot", "lora") -> part -> predictions  =>  the tensors of predictions.safetensors:

    base/labels                                         (N,) int32
    lora/base/top, lora/base/probabilities              (N, 5) int32 and float32
    lora/base/joint_top, lora/base/joint_probabilities  the same among all names, where scored

    and the same for every row and part ("base" and "novel", or "all"); see `Predictions`.
    """
    named = {}
    for row, parts in rows.items():
        for part, of in parts.items():
            named[f"{part}/labels"] = of.labels
            for kind in _KEPT:
                if getattr(of, kind) is not None:
                    named[f"{row}/{part}/{kind}"] = getattr(of, kind)
    return named


def read(path: Path, classnames: dict[str, list[str]]) -> dict[str, dict[str, Predictions]]:
    """A run's predictions.safetensors, with the names of `tensors` -> row -> part -> predictions.

    classnames: from the run's config.json. UserError, if there is no such file, as in runs of
    earlier versions, or if it does not fit these classes.
    """
    named, _ = read_safetensors(path)
    total = sum(map(len, classnames.values()))
    rows: dict[str, dict[str, Predictions]] = {}
    try:
        for key, tensor in named.items():
            *_, part, kind = key.split("/")
            labels, names = named[f"{part}/labels"], len(classnames[part])
            most = total if kind.startswith("joint") else names
            shape = labels.shape if kind == "labels" else (len(labels), min(5, most))
            dtype = torch.float32 if kind.endswith("probabilities") else torch.int32
            inside = tensor.numel() == 0 or (tensor.min() >= 0 and tensor.max() < most)
            if labels.dim() != 1 or tensor.shape != shape or tensor.dtype != dtype or not inside:
                raise ValueError
        for prefix in sorted({key.rpartition("/")[0] for key in named if key.count("/") > 1}):
            row, part = prefix.split("/")
            joint = f"{row}/base/joint_top" in named  # then all parts have them
            kept = {kind: named[f"{prefix}/{kind}"] for kind in (_KEPT if joint else _KEPT[:2])}
            rows.setdefault(row, {})[part] = Predictions(named[f"{part}/labels"], **kept)
            if joint and not all(f"{row}/{of}/joint_top" in named for of in classnames):
                raise ValueError
    except (KeyError, ValueError):
        raise UserError(
            f"{path}: does not fit config.json beside it, or is of another version; train again"
        ) from None
    return rows
