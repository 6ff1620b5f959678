"""Few-shot draws from published files, which list the training pictures.

    {"path": "jpg/image_06765.jpg", "label": 0}
    {"path": "/elsewhere/oxford_flowers/jpg/image_06734.jpg", "label": "pink primrose"}

Each line is a picture; a label is the number or name of a class. A path may begin with folders of
another machine: it means the picture with the longest common end of paths.
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
    """The data set with only the training pictures of `file`, all of which are used.

    Without a validation part, or with CoOp's rule, min(S, 4) pictures of each class are drawn for
    validation: from that part, or from the training pictures that are not in the file.
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
    """Indices of the training pictures in `file`, in its order, each once."""
    lines, names = read_json_lines(file, {"path": str, "label": int | str}), dataset.classnames
    if not lines:
        raise UserError(
            f"--shots-file {file}: is not a file, or is empty; expected lines such as "
            '{"path": "jpg/image_06765.jpg", "label": 0}'
        )
    called = defaultdict(list)  # file name -> indices of its pictures
    for i, picture in enumerate(dataset.train.source):
        if isinstance(picture, Path):
            called[picture.name].append(i)
    chosen: dict[int, int] = {}  # index -> line
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
                f"({names[truth]}); correct the line, or give the draw of this data set"
            )
        if chosen.setdefault(best[0], n) != n:
            raise UserError(f"{where}: {path} is listed already, in line {chosen[best[0]]}")
    return torch.tensor([*chosen])


def _common_end(path: PurePath, other: PurePath) -> int:
    """The number of equal parts at the ends of two paths: 2 for a/b/c.jpg and x/b/c.jpg."""
    count = 0
    for mine, theirs in zip(reversed(path.parts), reversed(other.parts), strict=False):
        if mine != theirs:
            break
        count += 1
    return count
