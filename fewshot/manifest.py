"""Your own pictures in a list: CSV files give the class of each picture.

    root/train.csv, root/test.csv (and root/val.csv)    path,label
                                                        photos/0012.jpg,tiger lily
    root/data.csv, all parts in one file                path,label,split
                                                        photos/0012.jpg,tiger lily,train

A path is absolute, or relative to the CSV's folder; other columns are ignored. The order of the
rows does not matter: pictures are sorted by class and path, so the draw of shots depends only on
the seed. Without a classes.txt or classes.json (fewshot/folder.py), classes are in the order of
their labels.
"""

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from clip_min import UserError
from fewshot.folder import (
    CLASSES_FILE,
    PARTS,
    Parts,
    check_classes,
    class_of,
    read_classnames,
    val_is_test,
)
from fewshot.pictures import Pictures


class Row(NamedTuple):
    path: Path
    label: str
    part: str  # train, val or test
    where: str  # for a message: "/data/train.csv, line 3"


def is_manifest(root: Path) -> bool:
    return any((root / f"{name}.csv").is_file() for name in ("data", "train", "test"))


def csv_files(root: Path) -> list[Path]:
    """data.csv, or the files of the parts."""
    names = [name for name in ("data", *PARTS) if (root / f"{name}.csv").is_file()]
    if names[0] == "data" and len(names) > 1:
        raise UserError(f"{root}: has both data.csv and {names[1]}.csv; keep one")
    return [root / f"{name}.csv" for name in names]


def read_manifest(root: Path) -> Parts:
    """The pictures in the CSV files of root: see above."""
    whole = root / "data.csv"
    if whole in (files := csv_files(root)):
        rows = read_rows(whole)
    else:
        needed = ["train"] if root / "val.csv" in files else ["train", "test"]
        files = dict.fromkeys([*(root / f"{part}.csv" for part in needed), *files])
        rows = [row for file in files for row in read_rows(file, file.stem)]
    notes, there = [], {row.part for row in rows}
    if "test" not in there and "val" in there:
        rows = [row._replace(part="test") if row.part == "val" else row for row in rows]
        notes = [val_is_test("val", "train")]
    check_listed_once(rows)
    check_files([row.path for row in rows], [row.where for row in rows])

    known = read_classnames(root)
    if not known and all(row.label.isdecimal() for row in rows):
        raise UserError(
            f"{rows[0].where}: the labels are numbers, but CLIP reads names; list the names in "
            f"{root}/classes.txt, one on each line"
        )
    first = {row.label: row.where for row in reversed(rows)}  # label -> its first row
    spelled = {label: class_of(label, known, first[label]) for label in sorted(first)}
    if not known:
        labels = {name: label for label, name in spelled.items()}  # the last label with this name
        for label, name in spelled.items():
            if (other := labels[name]) != label:
                said = f"{label!r} and {other!r} are both the class {name!r}"
                raise UserError(f"{first[label]}: {said}; write them alike")
    learned = dict.fromkeys(spelled[row.label] for row in rows if row.part == "train")
    names = list(dict.fromkeys(known.values())) or [n for n in spelled.values() if n in learned]
    if len(names) < 2:
        raise UserError(f"{root}: trains on {len(names)} classes; expected two or more")
    number = {name: k for k, name in enumerate(names)}
    parts = {}
    for part in PARTS:
        mine = [row for row in rows if row.part == part]
        if mine or part != "val":
            file = whole if whole.is_file() else root / f"{part}.csv"
            of = CLASSES_FILE if part == "train" else "train"
            check_classes(f"{file} ({part})", {spelled[row.label] for row in mine}, names, of)
            chosen = sorted((number[spelled[row.label]], row.path) for row in mine)
            labels = torch.tensor([label for label, _ in chosen])
            parts[part] = Pictures([path for _, path in chosen], labels)
    return Parts(names, parts["train"], parts.get("val"), parts["test"], notes)


def read_rows(file: Path, part: str | None = None) -> list[Row]:
    """The rows of a CSV; `part`: the part of all rows, or from the column `split`."""
    needed = ["path", "label"] + ([] if part else ["split"])
    rows = []
    for where, cells in read_cells(file, needed):
        for name, cell in cells.items():
            if not cell:
                raise UserError(f"{where}: its {name} is empty")
        path = Path(os.path.normpath(file.parent / cells["path"]))
        rows.append(Row(path, cells["label"], part or cells["split"], where))
    if not rows:
        raise UserError(f"{file}: lists no pictures")
    return rows


def read_cells(
    file: Path, needed: list[str], others: list[str] | None = None
) -> Iterator[tuple[str, dict[str, str]]]:
    """For each row of a CSV: where it is, and its cells in the columns `needed` and `others`, of
    which the latter may be missing (""). UserError, if `split` is no part.
    """
    columns_read = [*needed, *(others or [])]
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            columns = [(name or "").strip() for name in reader.fieldnames or []]
            if missing := [name for name in needed if name not in columns]:
                has = ", ".join(columns) or "none"
                raise UserError(
                    f"{file}: has no column {missing[0]!r}; its first line should name "
                    f"{', '.join(needed)}, but names {has}"
                )
            if twice := [name for name in columns_read if columns.count(name) > 1]:
                raise UserError(f"{file}: has two columns {twice[0]!r}; rename one")
            reader.fieldnames = columns
            for found in reader:
                where = f"{file}, line {reader.line_num}"
                if any(found.pop(None, ())):  # None: cells beyond the columns, often empty
                    raise UserError(
                        f"{where}: has more cells than the {len(columns)} columns of the first "
                        'line; put text with a comma in quotes: "a, b"'
                    )
                cells = {name: (found.get(name) or "").strip() for name in columns_read}
                if (split := cells.get("split", "")) not in ("", *PARTS):
                    raise UserError(f"{where}: split is {split!r}; expected train, val or test")
                yield where, cells
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file") from None
    except csv.Error as error:
        raise UserError(f"{file}: cannot be read as CSV ({error})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as UTF-8 text ({error})") from None


def check_listed_once(rows: list[Row]) -> None:
    """UserError for a picture that is listed twice, or in both train and test."""
    seen: dict[Path, Row] = {}
    for row in rows:
        if earlier := seen.get(row.path):
            raise UserError(
                f"{row.where}: {row.path} ({row.part}, {row.label}) is listed already "
                f"({earlier.part}, {earlier.label}: {earlier.where}); list each picture once"
            )
        seen[row.path] = row


def check_files(paths: list[Path], where: list[str]) -> None:
    """UserError, if files are missing: it names the first and counts the others."""
    # For an impossible name, os.path returns False, but pathlib raises an OSError.
    if gone := [i for i, path in enumerate(paths) if not os.path.isfile(path)]:
        more = f" (and {len(gone) - 1} more)" if len(gone) > 1 else ""
        raise UserError(f"{where[gone[0]]}: {paths[gone[0]]} is not a file{more}")
