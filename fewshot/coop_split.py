"""CoOp's splits and few-shot sampling, on which most published few-shot results are based.

Zhou et al., "Learning to Prompt for Vision-Language Models", arXiv:2109.01134. A split is one of
their JSON files, split_zhou_NAME.json:

    {"train": [["image_06765.jpg", 0, "pink primrose"], …], "val": …, "test": …}

A path is relative to a folder of images, whose name depends on the data set; "_" in a class name
becomes a space, as in their prompts.

The draw is that of Dassl, the library CoOp runs on: seed Python's `random`; then, for each class in
the order in which train first names it, `random.sample` S of its training pictures, in the order
of the file; then min(S, 4) of its validation pictures likewise, with the same generator. All
classes are drawn before the base half is taken. Draws equal those of a run of Dassl's own code.

A class with fewer pictures is used completely, without a draw, as in Dassl since October 2021, the
version that CoOp's README asks for. Earlier versions, and the copies in Tip-Adapter and CLIP-LoRA,
repeat its pictures (`random.choices`), which also changes the draws of later classes.
"""

import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from clip_min import UserError
from clip_min.files import parse_json
from fewshot.folder import Parts, read_text, spoken
from fewshot.manifest import Row, check_files, check_listed_once
from fewshot.pictures import Pictures, few

DATASETS_MD = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
FEW_VAL = 4  # validation pictures a class, at most


def find_split(places: list[Path], name: str, todo: str = "") -> Path:
    """The one file called `name` (a pattern) in or below the first of these folders that has any.

    todo: what to say besides, if there is none.
    """
    for place in places:
        if (place / name).is_file():
            return place / name
        if found := [file for folder in _folders(place) for file in sorted(folder.glob(name))]:
            break
    if len(found) != 1:
        many = f"{len(found)} files {name}" if found else f"no {name}"
        raise UserError(
            f"--split coop: {place} has {many}; give the right file with --split-file (CoOp's "
            f"DATASETS.md links to them: {DATASETS_MD}){todo and '; '}{todo}"
        )
    return found[0]


def read_split(file: Path, places: list[Path], todo: str = "") -> Parts:
    """The split of `file`, whose pictures lie below one of these folders; `todo`: as above."""
    split = parse_json(read_text(file), object, str(file))
    needed = ["train", "test"] + (["val"] if isinstance(split, dict) and split.get("val") else [])
    if not isinstance(split, dict) or not all(_is_part(split.get(part)) for part in needed):
        raise UserError(
            f'{file}: expected {{"train": [[path, label, classname], …], "val": …, "test": …}}'
        )
    entries = [
        (part, path, label, spoken(name))
        for part in ("train", "val", "test")
        for path, label, name in split.get(part) or []
    ]
    names = {label: name for _, _, label, name in reversed(entries)}
    for part, path, label, name in entries:
        if names[label] != name:
            raise UserError(f"{file}: {part}: {path}: class {label} is {names[label]!r} elsewhere")
    if sorted(names) != list(range(len(names))):
        raise UserError(
            f"{file}: labels are {sorted(names)[:5]} …; expected 0 to K - 1, all of them"
        )
    if len(set(names.values())) < len(names):
        raise UserError(f"{file}: two labels have one class name; expected a name for each")

    base = _image_folder(file, places, [path for _, path, *_ in entries], todo)
    rows = [Row(base / path, name, part, str(file)) for part, path, _, name in entries]
    check_listed_once(rows)
    check_files([row.path for row in rows], [row.where for row in rows])

    def pictures(part: str) -> Pictures:
        mine = [(base / path, label) for p, path, label, _ in entries if p == part]
        return Pictures([path for path, _ in mine], torch.tensor([label for _, label in mine]))

    val = pictures("val") if split.get("val") else None
    train, classnames = pictures("train"), [names[k] for k in range(len(names))]
    notes = []
    if never := sorted({*range(len(names))} - {*train.labels.tolist()}):
        untrained = few(classnames[k] for k in never)
        notes = [f"{len(never)} classes have no training image, and are tested on: {untrained}"]
    return Parts(classnames, train, val, pictures("test"), notes)


def draw(train: Pictures, val: Pictures | None, shots: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the pictures that Dassl would draw from train and from val.

    Without val, the latter are drawn from the rest of train (on ImageNet, CoOp validates on the
    test pictures).
    """
    rng = random.Random(seed)
    chosen = sample(train.labels.tolist(), shots, rng)
    pool, taken = (train, {*chosen}) if val is None else (val, set())
    left = [i for i in range(len(pool)) if i not in taken]
    labels = pool.labels[left].tolist()
    few = [left[i] for i in sample(labels, min(shots, FEW_VAL), rng)]
    return torch.tensor(chosen), torch.tensor(few, dtype=torch.long)


def sample(labels: list[int], count: int, rng: random.Random) -> list[int]:
    """`count` indices for each label, or all, if a label has fewer."""
    members: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        members.setdefault(label, []).append(i)
    chosen = []
    for of_class in members.values():
        chosen += of_class if len(of_class) < count else rng.sample(of_class, count)
    return chosen


def _is_part(entries) -> bool:
    """Whether this is a non-empty list of [path, label, classname]."""
    return bool(entries) and isinstance(entries, list) and all(map(_is_entry, entries))


def _is_entry(entry) -> bool:
    kinds = [str, int, str]
    return isinstance(entry, list) and [type(value) for value in entry] == kinds


def _image_folder(file: Path, places: list[Path], paths: list[str], todo: str) -> Path:
    """The folder, among these and those below them, in which the first path is found."""
    first = Path(paths[0])
    for path in map(Path, paths):
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{file}: {path}: expected paths below a folder of images")
    for place in itertools.chain(*map(_folders, places), [file.parent]):
        if os.path.isfile(place / first):  # also False for an impossible name
            return place
    raise UserError(
        f"{file}: its first picture, {first}, was not found below {places[-1]}; unpack the images "
        f"there, or give the folder that holds them as --data-root{todo and '; '}{todo}"
    )


def _folders(root: Path) -> Iterator[Path]:
    """root and all folders below it, each once; links to folders are followed."""
    seen = set()
    for folder, below, _ in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            below.clear()  # a link back would never end
            continue
        seen.add(real)
        below.sort()
        yield Path(folder)
