"""The protocol: halves of the classes, a few pictures of each, and what is tested on what.

Base-to-novel: base is the first half of the classes (the larger one, if they are odd) or those that
are named, novel the rest. A method learns from S pictures of each base class and chooses by
validation pictures of base classes. Each half of the test set is then scored against its own names
alone.

The test pictures are checked here: each can be read, and none is learned from. Nothing else sees
them before the final evaluation, which reads them again, a batch at a time: they are never all in
memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from clip_min import UserError
from fewshot import coop_split
from fewshot.batches import Batches, room
from fewshot.coop_split import FEW_VAL  # validation pictures a class, where they have to be few
from fewshot.datasets import Dataset
from fewshot.embedded import read
from fewshot.pictures import Pictures, Reader, check_memory, few
from fewshot.record import Record, rows, unseen

# One's own pictures: as many for validation as for training, but never below or above these, for
# a choice among epochs needs some, and each costs time after every epoch.
VAL = (200, 1000)


@dataclass
class Test:
    """Test pictures, and the names that they are told apart by."""

    classnames: list[str]
    batches: Batches


@dataclass
class Task:
    classnames: list[str]  # those that are learned: labels of train and val count in this list
    template: str
    train: Batches | None  # None, as val: the task only tests (`make_test`)
    val: Batches | None
    tests: dict[str, Test]  # {"base", "novel"}, or {"all"}
    notes: list[str]  # what the user should know: short classes, skipped files

    @property
    def tested_names(self) -> list[str]:
        """The class names of all parts of the test set."""
        return [name for test in self.tests.values() for name in test.classnames]

    def record(self, root: str) -> Record:
        """What a run learns from, chooses by and is tested on; files are named from `root` on."""
        parts = {"train": [(self.classnames, self.train)], "val": [(self.classnames, self.val)]}
        parts["test"] = [(test.classnames, test.batches) for test in self.tests.values()]
        return {
            part: [row for names, some in of for row in rows(some.pictures, names, root)]
            for part, of in parts.items()
        }


def make_task(
    dataset: Dataset,
    shots: int | str,
    seed: int,
    classes: str,
    reader: Reader,
    base: Sequence[int] | None = None,
) -> Task:
    """Split `dataset` (classes: "base-novel" or "all"), draw the shots, read the pictures.

    base: the base classes' numbers, if they are not the first half.
    """
    learned, parts = halves(dataset, classes, base)
    train, val, notes = draw(dataset, learned, shots, seed)
    notes = [*dataset.notes, *notes]
    if train.features is None:
        check_memory(len(train) + len(val), reader.size)
    task = Task(
        classnames=[dataset.classnames[i] for i in learned],
        template=dataset.template,
        train=read(train, reader, notes, keep=True),
        val=read(val, reader, notes, keep=True),
        tests=_tests(dataset, parts, reader, notes),
        notes=notes,
    )
    task.train.room = task.val.room = room(reader.device)
    seen = (task.train.hashes, task.val.hashes)
    if twice := sum(shared(test.batches.hashes, *seen) for test in task.tests.values()):
        notes.append(f"{twice} test images are also learned from or validated on, pixel for pixel")
    seen = (task.train.pictures, task.val.pictures)
    for which in (seen, [test.batches.pictures for test in task.tests.values()]):
        if found := copies(*which):
            notes.append(
                f"images that are copies of others, byte for byte: {len(found)} ({few(found)})"
            )
    return task


def halves(
    dataset: Dataset, classes: str, base: Sequence[int] | None
) -> tuple[Sequence[int], dict[str, Sequence[int]]]:
    """The classes that are learned, and those of each part that is tested."""
    everything = range(len(dataset.classnames))
    learned = everything
    if classes == "base-novel":
        learned = everything[: (len(everything) + 1) // 2] if base is None else sorted(base)
    parts = {"base": learned, "novel": [k for k in everything if k not in set(learned)]}
    if not parts["novel"]:
        parts = {"all": everything}
    for part, ids in parts.items():
        if len(ids) == 1:
            raise UserError(
                f"the {part} half is one class, {dataset.classnames[ids[0]]!r}, and among one name "
                "every answer is right; add --classes all, or give each half two classes"
            )
    return learned, parts


def copies(*parts: Pictures) -> list[str]:
    """Files that hold what another one holds: "b.jpg of a.jpg"."""
    first: dict[str, Path] = {}
    files = {
        file: made
        for pictures in parts
        for file, made in zip(pictures.source, pictures.digests, strict=True)
        if isinstance(file, Path)
    }
    return [
        f"{file} of {first[made]}"
        for file, made in files.items()
        if first.setdefault(made, file) != file
    ]


def shared(hashes: Tensor, *others: Tensor) -> int:
    """How many of these pictures are among others, by the hashes of their pixels (N, 32) each."""
    known = {tuple(row) for other in others for row in other.tolist()}
    return sum(tuple(row) in known for row in hashes.tolist())


def make_test(
    dataset: Dataset,
    reader: Reader,
    classes: str = "all",
    base: Sequence[int] | None = None,
    record: Record | None = None,
    again: bool = False,
) -> Task:
    """What `make_task` tests on, and nothing to learn from: for a run that is tested.

    record: what the run learned from, which is never tested on. `again`: test on what it was
    tested on, whatever the split is by now.
    """
    learned, parts = halves(dataset, classes, base)
    notes = list(dataset.notes)
    if record:
        test, more = unseen(dataset, record, again)
        dataset, notes = replace(dataset, test=test), notes + more
    tests = _tests(dataset, parts, reader, notes)
    learned = [dataset.classnames[i] for i in learned]
    return Task(learned, dataset.template, None, None, tests, notes)


def _tests(
    dataset: Dataset, parts: dict[str, Sequence[int]], reader: Reader, notes: list[str]
) -> dict[str, Test]:
    """The test pictures of each part's classes: files are checked, to be read when needed."""
    tests = {}
    for part, ids in parts.items():
        batches = read(_of_classes(dataset.test, ids), reader, notes, keep=False)
        tests[part] = Test([dataset.classnames[i] for i in ids], batches)
    return tests


def draw(
    dataset: Dataset, classes: Sequence[int], shots: int | str, seed: int
) -> tuple[Pictures, Pictures, list[str]]:
    """`shots` training pictures of each class ("all": all) and its validation pictures
    -> train, val, notes.

    A class with fewer gives what it has. Without a validation part, min(shots, 4) of a class are
    set aside for validation first, but never more than half of it; of a class that training takes
    whole, a fifth if that is more. One's own pictures give more, of those that training leaves,
    and at most as many as `VAL` says. CoOp's split has a rule of its own: fewshot/coop_split.py.
    """
    if len(dataset.train) == 0:
        raise UserError(
            "there is no training image: the data set is for testing alone; test a run on it with "
            "eval.py --run DIR --dataset NAME"
        )
    if dataset.split == "coop" and shots != "all":
        return draw_coop(dataset, classes, shots, seed)
    pool, notes, whole = _of_classes(dataset.train, classes), [], shots == "all"
    shots = len(pool) if whole else shots
    generator = torch.Generator().manual_seed(seed)
    members = [(pool.labels == label).nonzero().flatten() for label in range(len(classes))]
    members = [some[torch.randperm(len(some), generator=generator)] for some in members]
    most = min(max(VAL[0], sum(min(shots, len(some)) for some in members)), VAL[1])
    most = max(most // len(classes), FEW_VAL)  # of a class
    train, val, short = [], [], {}
    for label, some in enumerate(members):
        aside = 0
        if dataset.val is None:
            aside = min(shots, 1 if whole else FEW_VAL, len(some) // 2)
            if shots >= len(some):
                aside = max(aside, min(len(some) // 5, most))
        left = some[aside:]
        free = left[shots : shots + most - aside] if dataset.val is None and dataset.own else []
        val.append(torch.cat([some[:aside], torch.as_tensor(free, dtype=torch.long)]))
        train.append(left[:shots])
        if len(left) < shots and not whole:
            short[dataset.classnames[classes[label]]] = len(left)
    if dataset.val is None:
        val = pool[torch.cat(val)]
    else:
        val = _of_classes(dataset.val, classes)
        if dataset.own:
            count, val = len(val), _at_most(most, val, generator)
            if len(val) < count:
                notes.append(f"{len(val)} of {count} validation images are used, {most} a class")
    if len(val) == 0:
        raise UserError(
            "no class has more than one training image, so none is left for validation; give more, "
            "or a val/ folder"
        )
    return pool[torch.cat(train)], val, notes + _note_short(short, shots)


def _at_most(most: int, pictures: Pictures, generator: torch.Generator) -> Pictures:
    """`most` pictures of each class, drawn, or all that there are, in their order."""
    kept = []
    for label in pictures.labels.unique():
        members = (pictures.labels == label).nonzero().flatten()
        kept.append(members[torch.randperm(len(members), generator=generator)[:most]])
    return pictures[torch.cat(kept).sort().values]


def draw_coop(
    dataset: Dataset, classes: Sequence[int], shots: int, seed: int
) -> tuple[Pictures, Pictures, list[str]]:
    """The same by CoOp's rule: all classes are drawn, and these are kept."""
    train, val = coop_split.draw(dataset.train, dataset.val, shots, seed)
    counts = dataset.train.labels.bincount(minlength=len(dataset.classnames)).tolist()
    short = {dataset.classnames[k]: counts[k] for k in classes if counts[k] < shots}
    of = dataset.train if dataset.val is None else dataset.val
    train, val = (
        _of_classes(part[chosen], classes) for part, chosen in ((dataset.train, train), (of, val))
    )
    if len(val) == 0:
        raise UserError("training takes every image, so none is left for validation; lower --shots")
    return train, val, _note_short(short, shots)


def _note_short(short: dict[str, int], shots: int) -> list[str]:
    """A note on classes with fewer pictures than `shots`: name -> how many."""
    if not short:
        return []
    listed = ", ".join(f"{name} {n}" for name, n in list(short.items())[:5])
    more = ", …" if len(short) > 5 else ""
    return [f"fewer than {shots} training images in {len(short)} classes: {listed}{more}"]


def _of_classes(pictures: Pictures, classes: Sequence[int]) -> Pictures:
    """The pictures of these classes, labels counted from 0."""
    most = max(max(classes), int(pictures.labels.max()) if len(pictures) else 0)
    new = torch.full((most + 1,), -1)  # old label -> new one
    new[torch.tensor(classes)] = torch.arange(len(classes))
    labels = new[pictures.labels]  # (N,)
    inside = labels >= 0
    return replace(pictures[inside.nonzero().flatten()], labels=labels[inside])
