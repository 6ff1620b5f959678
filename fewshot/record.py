"""The record of a run's training, validation and test pictures.

There is a row for each picture: its file, its class, and its sha256. With the record, a run resumes
on the same pictures and is tested again on the same test pictures, even if others were added. Other
data than its own test pictures never contain one that it learned from.
"""

import hashlib
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from clip_min import UserError
from clip_min.files import read_json
from fewshot.datasets import Dataset
from fewshot.folder import PARTS
from fewshot.pictures import Pictures, digests

# {"train", "val", "test"} -> a row for each picture: its file, its class, its sha256.
Record = dict[str, list[list[str]]]


def rows(pictures: Pictures, classnames: list[str], root: str = "") -> list[list[str]]:
    """The rows of a record."""
    base = f"{Path(root).expanduser()}/" if root else ""
    names = [
        f"picture {i}" if isinstance(one, Tensor) else str(one).removeprefix(base)
        for i, one in enumerate(pictures.source)
    ]
    each = zip(names, pictures.labels.tolist(), pictures.digests, strict=True)
    return [[name, classnames[label], made] for name, label, made in each]


def summary(record: Record) -> dict[str, str]:
    """A summary of a record, which changes if a picture, its class or the order changes."""
    bare = {part: repr([row[1:] for row in record[part]]) + ";" for part in PARTS}
    hashes = {part: hashlib.sha256(text.encode()).hexdigest() for part, text in bare.items()}
    return {part: f"{len(record[part])} pictures ({hashes[part][:16]})" for part in PARTS}


def kept(path: Path, config: dict) -> Record | None:
    """The record in a run's folder; None, if there is none, as in earlier versions."""
    file = path / "data.json"
    if "data" not in config or not file.exists():
        return None
    record = read_json(file, "")
    whole = all(
        isinstance(record.get(part), list)
        and all(isinstance(row, list) and [*map(type, row)] == [str] * 3 for row in record[part])
        for part in PARTS
    )
    if not whole or summary(record) != config["data"]:
        raise UserError(f"{file}: does not belong to config.json beside it; put the right one back")
    return record


def unseen(dataset: Dataset, record: Record, again: bool) -> tuple[Pictures, list[str]]:
    """Pictures to test a run on, and notes about them; see `make_test`."""
    test, names = dataset.test, dataset.classnames
    test = replace(test, digests=test.digests or digests(test))
    seen = {made for part in ("train", "val") for *_, made in record[part]}
    if again:
        # By class and content, since files may have moved to another folder or, if pictures that
        # are split by the seed have changed, to another part.
        wanted = [(name, made) for _, name, made in record["test"]]
        for others in ([], [part for part in (dataset.val, dataset.train) if part]):
            pool = test
            for part in others:
                pool = pool.joined(replace(part, digests=part.digests or digests(part)))
            there = defaultdict(list)
            for i, (_, name, made) in enumerate(rows(pool, names)):
                there[name, made].append(i)
            found = [there[row].pop(0) for row in wanted if there[row]]
            if len(found) == len(wanted):
                break
        if found:
            notes, tested = [], pool[torch.tensor(found)]
            if gone := len(wanted) - len(found):
                notes += [f"{gone} of the run's {len(wanted)} test images are gone or changed"]
            if new := len(test) - sum(i < len(test) for i in found):
                notes += [f"{new} test images are not the run's, and are left out"]
            if twice := sum(made in seen for made in tested.digests):
                notes += [f"{twice} test images are also learned from or validated on"]
            return tested, notes
    left = [i for i, made in enumerate(test.digests) if made not in seen]
    if not left:
        raise UserError(
            f"all {len(test)} test images are training or validation images of the run; give other "
            "data with --data-root"
        )
    notes = ["none of the run's test images was found, so others are used"] if again else []
    if out := len(test) - len(left):
        notes += [
            f"{out} of {len(test)} test images are left out: they are training or validation "
            "images of the run"
        ]
    return test[torch.tensor(left)], notes
