"""Few-shot draws that others publish as files: which training pictures are learned from.

    {"path": "jpg/image_06765.jpg", "label": 0}
    {"path": "/elsewhere/oxford_flowers/jpg/image_06734.jpg", "label": "pink primrose"}

A line is a picture; a label is a class's number or name. The folders that a path begins with may be
those of another machine: the picture is the one whose path ends most like it.
"""

import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path, PurePath

import torch
from torch import Tensor

from clip_min.errors import UserError, unknown
from clip_min.files import read_json_lines
from fewshot import coop_split
from fewshot.datasets import Dataset
from fewshot.folder import readable, spoken


def fix(dataset: Dataset, file: Path, seed: int) -> Dataset:
    """The data set with the training pictures of `file` alone, all of which are to be learned from.

    Where it has no validation part, or CoOp's rule draws from it, min(S, 4) pictures a class are
    drawn for validation: from that part, or from the training pictures that the file leaves.
    """
    chosen = read_shots(file, dataset)
    train, val = dataset.train[chosen], dataset.val
    if val is None or dataset.split == "coop":
        left = torch.ones(len(dataset.train), dtype=torch.bool)
        left[chosen] = False
        pool = dataset.train[left.nonzero().flatten()] if val is None else val
        few = min(int(train.labels.bincount().max()), coop_split.FEW_VAL)
        drawn = coop_split.sample(pool.labels.tolist(), few, random.Random(seed))
        val = pool[torch.tensor(drawn, dtype=torch.long)]
    return replace(dataset, train=train, val=val)


def read_shots(file: Path, dataset: Dataset) -> Tensor:
    """The numbers of the training pictures that `file` lists, in its order, each once."""
    lines, names = read_json_lines(file, {"path": str, "label": int | str}), dataset.classnames
    if not lines:
        raise UserError(
            f"--shots-file {file}: lists no pictures, or is no file; expected a line for each, as "
            '{"path": "jpg/image_06765.jpg", "label": 0}'
        )
    called = defaultdict(list)  # the name of a file -> the numbers of the pictures that have it
    for i, picture in enumerate(dataset.train.source):
        if isinstance(picture, Path):
            called[picture.name].append(i)
    chosen: dict[int, int] = {}  # number -> line
    for n, line in enumerate(lines, 1):
        where, path, label = f"{file}, line {n}", PurePath(line["path"]), line["label"]
        alike = {i: _common_end(dataset.train.source[i], path) for i in called[path.name]}
        best = [i for i, length in alike.items() if length == max(alike.values())]
        if len(best) != 1:
            many = f"{len(best)} training pictures end like" if best else "no training picture is"
            raise UserError(f"{where}: {many} {path}; give a path that names one of them")
        truth = int(dataset.train.labels[best[0]])
        if isinstance(label, str):
            ways = (label, spoken(label), readable(label))
            name = next((way for way in ways if way in names), spoken(label))
            if name not in names:
                raise unknown(f"{where}: class", name, names)
            label = truth if name == names[truth] else None
        if label != truth:
            raise UserError(
                f"{where}: {path} is of class {line['label']}, but the data set says {truth} "
                f"({names[truth]})"
            )
        if chosen.setdefault(best[0], n) != n:
            raise UserError(f"{where}: {path} is listed already, in line {chosen[best[0]]}")
    return torch.tensor([*chosen])


def _common_end(path: PurePath, other: PurePath) -> int:
    """How many parts two paths end alike in: a/b/c.jpg and x/b/c.jpg in 2."""
    count = 0
    for mine, theirs in zip(reversed(path.parts), reversed(other.parts), strict=False):
        if mine != theirs:
            break
        count += 1
    return count
