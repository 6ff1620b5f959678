"""The protocol: halves of the classes, a few training pictures of each class, and the test sets.

Base-to-novel: base is the first half of the classes (the larger one, if their number is odd) or the
classes in --base-classes; the rest are novel. A method learns from S pictures of each base class
and makes choices on validation pictures of base classes. Each half of the test set is then scored
among its own names.

Test pictures are checked here: all must be readable, and none may be a training picture. Nothing
else uses them before the final evaluation, which reads them again in batches: they are never all in
memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from clip_min import UserError
from fewshot import coop_split
from fewshot.batches import Batches
from fewshot.coop_split import FEW_VAL  # validation pictures of a class, if they must be few
from fewshot.datasets import Dataset
from fewshot.embedded import read
from fewshot.folder import SPLIT
from fewshot.pictures import Pictures, Reader, check_memory, few
from fewshot.record import Record, rows, unseen

# Your own pictures: as many for validation as for training, within these limits. Choosing a
# checkpoint needs some pictures, and each of them costs time at every validation.
VAL = (200, 1000)


@dataclass
class Test:
    """Test pictures, and the names to choose from."""

    classnames: list[str]
    batches: Batches


@dataclass
class Task:
    classnames: list[str]  # the learned classes: labels of train and val are indices of this list
    template: str
    train: Batches | None  # None, like val, if the task only tests (`make_test`)
    val: Batches | None
    tests: dict[str, Test]  # {"base", "novel"}, or {"all"}
    notes: list[str]  # for the user: short classes, skipped files

    @property
    def tested_names(self) -> list[str]:
        """The class names of all parts of the test set."""
        return [name for test in self.tests.values() for name in test.classnames]

    def record(self, root: str) -> Record:
        """The training, validation and test pictures; files are relative to `root`."""
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

    base: indices of the base classes, if they are not the first half.
    """
    learned, parts = halves(dataset, classes, base)
    train, val, notes = draw(dataset, learned, shots, seed)
    notes = [*dataset.notes, *notes]
    there = isinstance(train.source, Tensor) and train.source[0].shape[-1] == reader.size
    if train.features is None and not there:
        check_memory(len(train) + len(val), reader.size)
    task = Task(
        classnames=[dataset.classnames[i] for i in learned],
        template=dataset.template,
        train=read(train, reader, notes, keep=True),
        val=read(val, reader, notes, keep=True),
        tests={},
        notes=notes,
    )
    task.train.room = task.val.room = None  # as much as both can have
    for part, ids in parts.items():
        tested = read(_of_classes(dataset.test, ids), reader, notes, keep=False)
        task.tests[part] = Test([dataset.classnames[i] for i in ids], tested)
    notes += twice([task.train, task.val], [test.batches for test in task.tests.values()])
    return task


def halves(
    dataset: Dataset, classes: str, base: Sequence[int] | None
) -> tuple[Sequence[int], dict[str, Sequence[int]]]:
    """The learned classes, and the classes of each tested part."""
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
                f"the {part} half has a single class, {dataset.classnames[ids[0]]!r}, so every "
                "answer would be right; add --classes all, or give each half two classes"
            )
    return learned, parts


def twice(learned: list[Batches], tested: list[Batches]) -> list[str]:
    """Notes on pictures that are both learned from and tested on, and on files that are copies of
    another one that is learned from, or tested on.
    """
    each = [  # a hash of each picture's pixels; for an image in memory, its digest
        b.pictures.digests
        if isinstance(b.pictures.source, Tensor)
        else [*map(tuple, b.hashes.tolist())]
        for b in (*learned, *tested)
    ]
    known = {one for of in each[: len(learned)] for one in of}
    features = any(b.pictures.features is not None for b in learned)
    notes, alike = [], "byte" if features else "pixel"  # of features, files are compared
    if count := sum(one in known for of in each[len(learned) :] for one in of):
        notes = [f"{count} test images are also training or validation images, {alike} for {alike}"]
    for some in (learned, tested):
        first: dict[str, Path] = {}
        files = {
            file: made
            for b in some
            for file, made in zip(b.pictures.source, b.pictures.digests, strict=True)
            if isinstance(file, Path)
        }
        copies = [
            f"{file} of {first[made]}"
            for file, made in files.items()
            if first.setdefault(made, file) != file
        ]
        if copies:
            said = f"{len(copies)} ({few(copies)})"
            notes.append(f"images that are copies of others, byte for byte: {said}")
    return notes


def make_test(
    dataset: Dataset,
    reader: Reader,
    classes: str = "all",
    base: Sequence[int] | None = None,
    record: Record | None = None,
    again: bool = False,
) -> Task:
    """The test sets of `make_task`, without training data: for testing a run.

    record: the run's pictures; those it learned from are never tested on. `again`: test on the
    run's test pictures, even if the split has changed.
    """
    learned, parts = halves(dataset, classes, base)
    notes = [note for note in dataset.notes if not (record and again and note == SPLIT)]
    if record:
        test, more = unseen(dataset, record, again)
        dataset, notes = replace(dataset, test=test), notes + more
    tests = {}
    for part, ids in parts.items():
        tested = read(_of_classes(dataset.test, ids), reader, notes, keep=False)
        if len(tested) == 0:
            raise UserError(
                f"no test images of the {len(ids)} {part} classes "
                f"({dataset.classnames[ids[0]]!r} …) are left; give data with some as --data-root"
            )
        tests[part] = Test([dataset.classnames[i] for i in ids], tested)
    learned = [dataset.classnames[i] for i in learned]
    return Task(learned, dataset.template, None, None, tests, notes)


def draw(
    dataset: Dataset, classes: Sequence[int], shots: int | str, seed: int
) -> tuple[Pictures, Pictures, list[str]]:
    """`shots` training pictures of each class ("all": all) and its validation pictures
    -> train, val, notes.

    A class with fewer pictures gives all it has. Without a validation part, min(shots, 4) pictures
    of a class (1 with "all") are set aside for validation first, at most half of it. A class that
    training would use completely gives a fifth, if that is more. Your own pictures give more, from
    those that training does not use, within `VAL`. CoOp's split has its own rule:
    fewshot/coop_split.py.
    """
    if len(dataset.train) == 0:
        raise UserError(
            "there are no training images: this data set is only for testing; test a run on it "
            "with eval.py --run DIR --dataset NAME"
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
        if dataset.own and len(val):
            count, val = len(val), _at_most(most, val, generator)
            if len(val) < count:
                notes.append(f"{len(val)} of {count} validation images are used, {most} per class")
    if len(val) == 0:
        raise UserError(
            "no image is left for validation: all are used for training, or no class has more than "
            "one; give more, or a val/ folder"
        )
    if short:
        notes.append(_note_short(short, shots))
    return pool[torch.cat(train)], val, notes


def _at_most(most: int, pictures: Pictures, generator: torch.Generator) -> Pictures:
    """Draw `most` pictures of each class, or all if there are fewer, in order."""
    kept = []
    for label in pictures.labels.unique():
        members = (pictures.labels == label).nonzero().flatten()
        kept.append(members[torch.randperm(len(members), generator=generator)[:most]])
    return pictures[torch.cat(kept).sort().values]


def draw_coop(
    dataset: Dataset, classes: Sequence[int], shots: int, seed: int
) -> tuple[Pictures, Pictures, list[str]]:
    """The same by CoOp's rule: draw for all classes, then keep these."""
    train, val = coop_split.draw(dataset.train, dataset.val, shots, seed)
    counts = dataset.train.labels.bincount(minlength=len(dataset.classnames)).tolist()
    short = {dataset.classnames[k]: counts[k] for k in classes if counts[k] < shots}
    of = dataset.train if dataset.val is None else dataset.val
    train, val = (
        _of_classes(part[chosen], classes) for part, chosen in ((dataset.train, train), (of, val))
    )
    if len(val) == 0:
        raise UserError("training uses all images, so none is left for validation; lower --shots")
    return train, val, [_note_short(short, shots)] if short else []


def _note_short(short: dict[str, int], shots: int) -> str:
    """A note about classes with fewer pictures than `shots`: name -> number."""
    listed = ", ".join(f"{name} {n}" for name, n in list(short.items())[:5])
    more = ", …" if len(short) > 5 else ""
    return f"fewer than {shots} training images in {len(short)} classes: {listed}{more}"


def _of_classes(pictures: Pictures, classes: Sequence[int]) -> Pictures:
    """The pictures of these classes, with labels from 0."""
    most = max(max(classes), int(pictures.labels.max()) if len(pictures) else 0)
    new = torch.full((most + 1,), -1)  # old label -> new one
    new[torch.tensor(classes)] = torch.arange(len(classes))
    labels = new[pictures.labels]  # (N,)
    inside = labels >= 0
    return replace(pictures[inside.nonzero().flatten()], labels=labels[inside])
