"""What a run learned from, chose by and was tested on, kept with it.

A row for each picture: its file, its class, and the sha256 of what it holds. So a run goes on with
the pictures it was begun on, is tested again on those that it was tested on, though others have
come, and never on one that it has learned from, though the data are split anew.
"""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

from clip_min import UserError
from clip_min.files import read_json
from fewshot import cache
from fewshot.datasets import Dataset
from fewshot.folder import PARTS
from fewshot.pictures import Pictures, digests

# {"train", "val", "test"} -> a row for each picture: its file, its class, sha256 of what it holds.
Record = dict[str, list[list[str]]]


def rows(pictures: Pictures, classnames: list[str], root: str = "") -> list[list[str]]:
    """The rows of a record."""
    base = f"{Path(root).expanduser()}/" if root else ""
    labels = pictures.labels.tolist()
    return [
        [pictures.name(i).removeprefix(base), classnames[label], made]
        for i, (label, made) in enumerate(zip(labels, pictures.digests, strict=True))
    ]


def summary(record: Record) -> dict[str, str]:
    """A record in three lines, which are others if a picture, its class or their order is."""
    bare = {part: [row[1:] for row in record[part]] for part in PARTS}
    return {part: f"{len(rows)} pictures ({cache.key(rows)[:16]})" for part, rows in bare.items()}


def kept(path: Path, config: dict) -> Record | None:
    """The record in a run's folder; None if there is none, as of runs of earlier versions."""
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
        raise UserError(f"{file}: is not the one that belongs to its config.json; put that back")
    return record


def unseen(dataset: Dataset, record: Record, again: bool) -> tuple[Pictures, list[str]]:
    """Pictures to test a run on, and notes on them; see `make_test`."""
    test, names = dataset.test, dataset.classnames
    test = replace(test, digests=test.digests or digests(test))
    seen = {made for part in ("train", "val") for *_, made in record[part]}
    if again:
        # By class and content, since files may have moved: to another part, if a tree that is
        # split by the seed has changed.
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
                notes += [f"{new} test images are not those of the run, and are not tested on"]
            if twice := sum(made in seen for made in tested.digests):
                notes += [f"{twice} test images are also learned from or validated on"]
            return tested, notes
    left = [i for i, made in enumerate(test.digests) if made not in seen]
    if not left:
        raise UserError(
            f"all {len(test)} test images are among those that the run learned from or validated "
            "on; give others with --data-root"
        )
    notes = ["no test image of the run is there, so others are tested on"] if again else []
    if out := len(test) - len(left):
        notes += [
            f"{out} of {len(test)} test images are left out: the run learned from them or "
            "validated on them"
        ]
    return test[torch.tensor(left)], notes
