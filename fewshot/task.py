"""The protocol: halves of the classes, a few pictures of each, and what is tested on what.

Base-to-novel: base is the first half of the classes (the larger one, if they are odd), novel the
rest. A method learns from S pictures of each base class and chooses by validation pictures of base
classes. Each half of the test set is then scored against its own names alone.

The test pictures are read here and given to the final evaluation; nothing before it sees them.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from clip_min import UserError
from fewshot import cache
from fewshot.datasets import Dataset
from fewshot.images import Batches, Pictures, read

FEW_VAL = 4  # validation pictures a class, at most, where the data set has no validation part


@dataclass
class Test:
    classnames: list[str]
    batches: Batches


@dataclass
class Task:
    classnames: list[str]  # those that are learned: labels of train and val count in this list
    train: Batches
    val: Batches
    tests: dict[str, Test]  # {"base", "novel"}, or {"all"}
    notes: list[str]  # what the user should know: short classes, skipped files


def make_task(
    dataset: Dataset,
    shots: int,
    seed: int,
    classes: str,
    size: int,
    device: torch.device,
    skip_bad: bool = False,
    folder: Path | None = cache.FOLDER,
    precision: str = "fp32",
) -> Task:
    """Split `dataset` (classes: "base-novel" or "all"), draw the shots, read the pictures."""
    count = len(dataset.classnames)
    half = (count + 1) // 2 if classes == "base-novel" else count
    parts = {"base": range(half), "novel": range(half, count)} if half < count else {}
    parts = parts or {"all": range(count)}
    learned = range(half)
    train, val, notes = draw(dataset, learned, shots, seed)

    def batches(pictures: Pictures) -> Batches:
        pictures, pixels, skipped = read(pictures, size, skip_bad, folder)
        if skipped:
            notes.append(f"skipped {len(skipped)} unreadable files: {', '.join(skipped)}")
        return Batches(pictures, pixels, device, folder, precision)

    names = dataset.classnames
    return Task(
        classnames=[names[i] for i in learned],
        train=batches(train),
        val=batches(val),
        tests={
            part: Test([names[i] for i in ids], batches(_of_classes(dataset.test, ids)))
            for part, ids in parts.items()
        },
        notes=notes,
    )


def draw(
    dataset: Dataset, classes: range, shots: int, seed: int
) -> tuple[Pictures, Pictures, list[str]]:
    """`shots` training pictures of each class and its validation pictures -> train, val, notes.

    A class with fewer gives what it has. Without a validation part, min(shots, 4) of a class are
    set aside for validation first, but never more than half of it.
    """
    pool = _of_classes(dataset.train, classes)
    generator = torch.Generator().manual_seed(seed)
    train, val, short = [], [], {}
    for label in range(len(classes)):
        members = (pool.labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        aside = min(shots, FEW_VAL, len(members) // 2) if dataset.val is None else 0
        left = members[aside:]
        val.append(members[:aside])
        train.append(left[:shots])
        if len(left) < shots:
            short[dataset.classnames[classes[label]]] = len(left)
    notes = []
    if short:
        listed = ", ".join(f"{name} {n}" for name, n in list(short.items())[:5])
        more = ", …" if len(short) > 5 else ""
        notes.append(f"fewer than {shots} training images in {len(short)} classes: {listed}{more}")
    val = pool[torch.cat(val)] if dataset.val is None else _of_classes(dataset.val, classes)
    if len(val) == 0:
        raise UserError(
            "no class has more than one training image, so none is left for validation; give more, "
            "or a val/ folder"
        )
    return pool[torch.cat(train)], val, notes


def _of_classes(pictures: Pictures, classes: range) -> Pictures:
    """The pictures of these classes, labels counted from 0."""
    inside = (pictures.labels >= classes.start) & (pictures.labels < classes.stop)
    chosen = pictures[inside.nonzero().flatten()]
    return Pictures(chosen.source, chosen.labels - classes.start)
