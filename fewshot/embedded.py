"""Features written by embed.py as a data set, for methods that only need features.

    root/index.json …                           of a folder, list or archive of pictures
    root/train/index.json root/test/index.json  of separate parts (and root/val/)

Labels and parts come from the pictures: folders of classes, columns of a CSV, or files beside a
picture in a tar file. Without parts, the pictures are split by the seed. Pictures, their order and
therefore all draws are the same as with `--dataset folder`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from clip_min import UserError
from clip_min.files import read_json, read_safetensors
from clip_min.weights import fingerprint
from fewshot import ranks
from fewshot.batches import Batches, NeedsPictures
from fewshot.folder import (
    CLASSES_FILE,
    PARTS,
    SPLIT,
    Parts,
    check_classes,
    class_of,
    note_numbers,
    parts_of,
    read_classnames,
    split,
    val_is_test,
)
from fewshot.mapped import Mapped
from fewshot.pictures import Pictures, Reader, few
from fewshot.shards import SHARD

CONFIG = {"data": str, "model": str, "fingerprint": str, "precision": str, "image_size": int}
INDEX = {"features": int, "unreadable": list[list[str]], "shards": list}
LISTS = ("names", "labels", "parts", "digests", "unreadable")
HINT = "expected a complete folder of embed.py: run it again, or for pictures --dataset folder"


class Files(Sequence):
    """Paths of pictures, built on access."""

    def __init__(self, names: list[str]):
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Path:
        return Path(self.names[i])


@dataclass
class Rows:
    """What is known about N pictures, in the order of their features."""

    names: list[str]
    labels: list[str]
    parts: list[str]
    digests: list[str]
    features: Mapped
    unreadable: list
    precision: str

    def __len__(self) -> int:
        return len(self.names)

    def __add__(self, other: "Rows") -> "Rows":
        both = {k: getattr(self, k) + getattr(other, k) for k in LISTS}
        of = dict.fromkeys([*self.precision.split(" and "), other.precision])
        both |= {"features": self.features.joined(other.features), "precision": " and ".join(of)}
        return replace(self, **both)

    def pictures(self, chosen: list[int], labels: Tensor) -> Pictures:
        """The rows with the indices `chosen`."""
        names, digests = ([of[i] for i in chosen] for of in (self.names, self.digests))
        return Pictures(Files(names), labels, digests, self.features[torch.tensor(chosen)])

    def notes(self, left_out: int) -> list[str]:
        """Notes for the user."""
        notes = [f"left out {left_out} pictures without a label or a part"] if left_out else []
        if self.unreadable:
            bad = few(name for row in self.unreadable for name in row[:1])
            notes.append(f"{len(self.unreadable)} pictures could not be read by embed.py: {bad}")
        if self.precision != "fp32":
            notes.append(f"the features were made with --precision {self.precision}")
        return notes


def folders(root: Path) -> dict[str, Path]:
    """Part -> its folder of features; {"": root}, if there are no separate folders."""
    if (root / "config.json").is_file():
        return {"": root}
    parts = parts_of(root)[0] if root.is_dir() else {}
    if not parts:
        raise UserError(f"--data-root {root}: holds no features; {HINT}")
    return parts


def made_by(root: str) -> tuple[str, int]:
    """The model and its image size with which the features in `root` were made."""
    if not root:
        return "", 0
    folder = next(iter(folders(Path(root).expanduser()).values()))
    config = read_json(folder / "config.json", HINT, CONFIG)
    return config["model"], config["image_size"]


def read_features(root: Path | None, seed: int) -> Parts:
    """The parts of your own pictures, as features: see above."""
    if root is None:
        raise UserError("--dataset features: give their folder with --data-root FOLDER")
    of = folders(root)
    rows, *others = [read_rows(folder, part) for part, folder in of.items()]
    for more in others:
        if more.features.fingerprint != rows.features.fingerprint:
            raise UserError(
                f"{root}: its parts were made with two models, {rows.features.model} and "
                f"{more.features.model}, or with other weights; make both with one model"
            )
        rows = rows + more
    known = read_classnames(root) or (read_classnames(of["train"]) if "train" in of else {})
    one_tree = not any(rows.parts)
    chosen = [i for i in range(len(rows)) if rows.labels[i] and (rows.parts[i] or one_tree)]
    if not chosen:
        raise UserError(
            f"{root}: no picture has a label; make features of class folders, of a CSV with a "
            "column label, or of tar files with .cls"
        )
    there = dict.fromkeys(rows.parts[i] for i in chosen)
    if not one_tree and ("train" not in there or len(there) == 1):
        has = ", ".join(there)
        raise UserError(f"{root}: has only {has}; expected train and test (or val), or no parts")
    spelled = classnames(root, {rows.labels[i] for i in chosen}, known)
    learned = {spelled[rows.labels[i]] for i in chosen if rows.parts[i] in ("train", "")}
    names = list(dict.fromkeys(known.values())) or [n for n in spelled.values() if n in learned]
    if len(names) < 2:
        raise UserError(f"{root}: trains on {len(names)} classes; expected two or more")
    number = {name: k for k, name in enumerate(names)}
    parts = {}
    for part in there:
        mine = [i for i in chosen if rows.parts[i] == part]
        found = {spelled[rows.labels[i]] for i in mine}
        of = CLASSES_FILE if part in ("train", "") else "train"
        check_classes(f"{root} ({part})" if part else str(root), found, names, of)
        keys = {i: (number[spelled[rows.labels[i]]], rows.names[i].split("/")) for i in mine}
        mine.sort(key=keys.get)  # as folders are read
        parts[part] = rows.pictures(mine, torch.tensor([keys[i][0] for i in mine]))
    notes = rows.notes(len(rows) - len(chosen)) + ([] if known else note_numbers(root, names))
    if one_tree:
        return Parts(names, *split(parts[""], seed), [*notes, SPLIT])
    train, val, test = (parts.get(part) for part in PARTS)
    if test is None:
        test, val = val, None
        notes.append(val_is_test("val", "train"))
    return Parts(names, train, val, test, notes)


def classnames(root: Path, labels: set[str], known: dict[str, str]) -> dict[str, str]:
    """Label -> class name, in the order of the labels; UserError, if two labels share a name."""
    spelled = {label: class_of(label, known, str(root)) for label in sorted(labels)}
    last = {name: label for label, name in spelled.items()}
    for label, name in () if known else spelled.items():
        if last[name] != label or not name:
            other = f" and {last[name]!r}" if name else ""
            raise UserError(f"{root}: {label!r}{other} are read as the class {name!r}; rename one")
    return spelled


def read_rows(folder: Path, part: str) -> Rows:
    """Everything from one run of embed.py; `part`: from its folder's name, if it has one."""
    config = read_json(folder / "config.json", HINT, CONFIG)
    index = read_json(folder / "index.json", HINT, INDEX)
    rows: dict[str, list[str]] = {"names": [], "labels": [], "parts": []}
    digests, tables = [], []
    for number in range(len(index["shards"])):
        file = folder / f"{number:05d}.safetensors"
        told = read_json(file.with_suffix(".json"), HINT, SHARD)
        tensors, count = read_safetensors(file)[0], len(told["names"])
        x, made = (tensors.get(name, torch.empty(0)) for name in ("features", "sha256"))
        whole = (x.dim(), x.dtype, len(x)) == (2, torch.float32, count)
        whole &= (made.dtype, made.shape) == (torch.uint8, (count, 32))
        whole &= not tables or x.shape[1] == tables[0].shape[1]
        if not whole or not {len(told[key]) for key in rows} == {count}:
            raise UserError(f"{file}: does not match {number:05d}.json beside it; {HINT}")
        for key, values in rows.items():
            values += told[key]
        raw = made.numpy().tobytes().hex()
        digests += [raw[i : i + 64] for i in range(0, len(raw), 64)]
        tables.append(x)
    if len(digests) != index["features"] or not tables:
        raise UserError(f"{folder}/index.json: does not match the features in the folder; {HINT}")
    if part:
        if any(rows["parts"]):
            raise UserError(
                f"{folder}: its pictures have parts of their own; give this folder as --data-root, "
                "or make features of each part"
            )
        rows["parts"] = [part] * len(digests)
    data = Path(config["data"])
    data = data.parent if data.suffix in (".csv", ".tar") else data
    counts = torch.tensor([len(x) for x in tables])
    table = torch.arange(len(tables)).repeat_interleave(counts)
    row = torch.cat([torch.arange(n) for n in counts.tolist()])
    made = Mapped(tuple(tables), table, row, str(folder), config["model"], config["fingerprint"])
    rows["names"] = [str(data / name) for name in rows["names"]]
    unreadable, precision = index["unreadable"], config["precision"]
    return Rows(**rows, digests=digests, features=made, unreadable=unreadable, precision=precision)


class FeatureBatches(Batches):
    """N labelled pictures for which there are only features. Rows are read from their files when
    they are needed.
    """

    def __init__(self, pictures: Pictures, reader: Reader):
        super().__init__(pictures, None, reader)
        self.nbytes = pictures.features.nbytes
        self.room: float | None = 0  # test features do not stay in memory

    @property
    def hashes(self) -> Tensor:
        """sha256 of each picture's file (N, 32)."""
        made = bytearray.fromhex("".join(self.pictures.digests))
        return torch.frombuffer(made, dtype=torch.uint8).view(-1, 32)

    def check(self, method) -> None:
        """UserError, unless the features are this CLIP's and the method needs nothing else."""
        made, clip, encoder = self.pictures.features, method.lent[0], method.encoder
        augment = getattr(method.settings, "augment", "none")
        mirror = getattr(method.settings, "mirror", False)
        if (encoder, augment, mirror) in self._fits:
            return
        if (found := fingerprint(clip)) != made.fingerprint:
            raise UserError(
                f"{made.place}: the features were made by {made.model} with fingerprint "
                f"{made.fingerprint}, but this model has {found}; give the right model with "
                "--model, or make features with this one"
            )
        needs = ""
        if encoder != (fingerprint(clip.visual), None, str(torch.float32)):
            needs = f"it learns in the image tower ({method.title})"
        elif augment != "none":
            needs = f"--augment {augment} changes pictures"
        elif mirror:
            needs = "--mirror (see --no-mirror) adds mirror images"
        if needs:
            raise NeedsPictures(
                f"{type(method).__name__} needs the pictures themselves, but {made.place} holds "
                f"only features: {needs}; train on the pictures, with --dataset folder"
            )
        self._fits[encoder, augment, mirror] = True

    def images(self, chosen: Tensor, augment: str = "none") -> Tensor:
        place = self.pictures.features.place
        raise NeedsPictures(f"{place}: holds only features, but this needs the pictures")

    def inputs(self, method, chosen: Tensor, augment: str = "none") -> Tensor:
        """Features of the pictures with the indices `chosen` (B, E)."""
        if augment != "none" or self.keeps(method):
            return super().inputs(method, chosen, augment)
        return self.pictures.features[chosen].read().to(self.device)

    def each(self, method, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        if self.keeps(method):
            return super().each(method, parts)
        return (self.inputs(method, part) for part in ranks.mine(parts))

    def keeps(self, method) -> bool:
        """Whether all features are kept in memory."""
        self.check(method)
        return 0 < self.nbytes <= (self.reader.room if self.room is None else self.room)

    def encoded(self, method, batch_size: int = 64) -> Tensor:
        self.check(method)
        if "rows" not in self._encoded:
            self._encoded["rows"] = self.pictures.features.read().to(self.device)  # (N, E)
        return self._encoded["rows"]

    def part(self, chosen: Tensor) -> "FeatureBatches":
        part = FeatureBatches(self.pictures[chosen], self.reader)
        part.room = self.room
        part._encoded = {name: x[chosen] for name, x in self._encoded.items()}
        return part


def read(pictures: Pictures, reader: Reader, notes: list[str], keep: bool) -> Batches:
    """The readable pictures as batches; oddities are added to `notes`.

    keep: hold their pixels in memory; otherwise they are read again when needed.
    """
    if pictures.features is not None:
        return FeatureBatches(pictures, reader)
    if keep or isinstance(pictures.source, Tensor):  # the demo's are drawn
        return Batches(*reader.read(pictures, notes), reader)
    pictures, hashes = reader.check(pictures, notes)
    return Batches(pictures, None, reader, hashes)
