"""The files of published data sets, and their official splits.

A reader takes --data-root and --seed and returns `Parts`. It raises OSError or RuntimeError if
files are missing or cannot be downloaded; fewshot/datasets.py then says what to do. CoOp's splits
are read by fewshot/coop_split.py.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from clip_min import UserError
from fewshot import demo
from fewshot.folder import Parts, check_classes, read_folder, read_text, spoken, visible
from fewshot.manifest import check_files, is_manifest, read_manifest
from fewshot.pictures import ENDINGS, Pictures


def read_demo(root: Path | None, seed: int) -> Parts:
    """102 species of drawn flowers, 10 pictures each in train, val and test."""
    if root is not None:
        raise UserError(f"--data-root {root}: the demo needs none; add --dataset folder")
    splits = [Pictures(*demo.split(name)) for name in ("train", "val", "test")]
    return Parts(list(demo.CLASSNAMES), *splits)


def read_own(root: Path | None, seed: int) -> Parts:
    """Your own pictures: folders (fewshot/folder.py) or CSV files (fewshot/manifest.py)."""
    root = own(root)
    return read_manifest(root) if is_manifest(root) else read_folder(root, seed)


def own(root: Path | None) -> Path:
    if root is None:
        raise UserError("--dataset folder: give your pictures' folder with --data-root FOLDER")
    if not root.is_dir():
        raise UserError(f"--data-root {root}: there is no such folder; give a folder of pictures")
    if (root / "index.json").is_file() and (root / "config.json").is_file():
        raise UserError(f"--data-root {root}: holds features; add --dataset features")
    return root


def read_flowers102(root: Path, seed: int) -> Parts:
    """The official split in torchvision: 10 train and 10 val images of each class, with its names,
    one of which is "pink-yellow dahlia?". CoOp's split has its own names.
    """
    from torchvision.datasets import Flowers102

    parts = [Flowers102(root, name, download=True) for name in ("train", "val", "test")]
    files = [[Path(file) for file in part._image_files] for part in parts]
    labels = [torch.tensor(part._labels) for part in parts]
    return Parts(list(Flowers102.classes), *map(Pictures, files, labels))


EUROSAT_NAMES = {  # folder -> CoOp's name, which CLIP can read
    "AnnualCrop": "Annual Crop Land",
    "Forest": "Forest",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "River": "River",
    "SeaLake": "Sea or Lake",
}


def read_eurosat(root: Path, seed: int) -> Parts:
    """torchvision's images. They have no official split: 70 % of each class, drawn with a fixed
    seed, are for training and 30 % for testing. CoOp's split is --split coop.
    """
    from torchvision.datasets import EuroSAT

    whole = EuroSAT(root, download=True)
    labels = torch.tensor([label for _, label in whole.samples])
    everything = Pictures([Path(file) for file, _ in whole.samples], labels)
    names = [EUROSAT_NAMES.get(name, name) for name in whole.classes]
    train, test = [], []
    generator = torch.Generator().manual_seed(0)
    for label in range(len(names)):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        few = round(0.3 * len(members))
        test.append(members[:few].sort().values)
        train.append(members[few:].sort().values)
    return Parts(names, everything[torch.cat(train)], None, everything[torch.cat(test)])


def read_cifar100(root: Path, seed: int) -> Parts:
    """The official train and test images, 32 x 32 pixels, in memory.

    They are published as pickles, which torchvision reads after checking their md5.
    """
    from torchvision.datasets import CIFAR100

    train, test = (CIFAR100(root, train=part, download=True) for part in (True, False))
    names = [spoken(name) for name in train.classes]
    pixels = [torch.from_numpy(part.data).permute(0, 3, 1, 2) for part in (train, test)]
    labels = [torch.tensor(part.targets) for part in (train, test)]
    train, test = map(Pictures, pixels, labels)
    return Parts(names, train, None, test)


HYMENOPTERA = "https://download.pytorch.org/tutorial/hymenoptera_data.zip"


def read_hymenoptera(root: Path, seed: int) -> Parts:
    """Ants and bees: train/, and val/ as test. One file, a GIF, shows neither."""
    from torchvision.datasets.utils import download_and_extract_archive

    base = root if (root / "train").is_dir() else root / "hymenoptera_data"
    if not (base / "train").is_dir():
        download_and_extract_archive(HYMENOPTERA, root)
    folders = {"ant": "ants", "bee": "bees"}
    parts = []
    for part in ("train", "val"):
        files = [
            sorted(p for p in (base / part / name).iterdir() if p.suffix.lower() in JPEG)
            for name in folders.values()
        ]
        labels = [label for label in range(len(files)) for _ in files[label]]
        parts.append(Pictures(files[0] + files[1], torch.tensor(labels)))
    return Parts(list(folders), parts[0], None, parts[1])


JPEG = {".jpg", ".jpeg"}


def read_cars(root: Path, seed: int) -> Parts:
    """The official split, from its MATLAB files; names begin with the year, as in CoOp: "2012 Tesla
    Model S Sedan".
    """
    from torchvision.datasets import StanfordCars

    parts = [StanfordCars(root, name) for name in ("train", "test")]
    rows = [[(Path(file), int(label)) for file, label in part._samples] for part in parts]
    files = [file for part in rows for file, _ in part]
    check_files(files, [str(root)] * len(files))
    train, test = (
        Pictures([file for file, _ in part], torch.tensor([label for _, label in part]))
        for part in rows
    )
    names = [name.rpartition(" ")[::-2] for name in parts[0].classes]  # (year, the rest)
    return Parts([" ".join(name) for name in names], train, None, test)


@dataclass(frozen=True)
class Lists:
    """An official split in text files with a picture on each line; pictures are in images/.

    With line = "(?P<file>(?P<name>.+)/.+)", "apple_pie/1005649" is images/apple_pie/1005649.jpg, of
    the class "apple pie". Classes are in the order of the alphabet, or of the file `classes`.
    """

    folders: tuple[str, ...]  # below root: CoOp's name, torchvision's
    torchvision: str  # the torchvision class that downloads it
    train: str
    test: str
    line: str
    val: str = ""
    classes: str = ""

    def __call__(self, root: Path, seed: int) -> Parts:
        import torchvision.datasets

        places = [*(root / folder for folder in self.folders), root]
        base = next((place for place in places if (place / self.train).is_file()), None)
        if base is None:
            getattr(torchvision.datasets, self.torchvision)(root, download=True)
            base = root / self.folders[-1]
        train, test = self.rows(base, self.train), self.rows(base, self.test)
        val = self.rows(base, self.val) if self.val else []
        found = {name for _, name in train + val + test}
        names = sorted(found, key=str.lower)
        if self.classes:
            names = [spoken(line) for line in read_text(base / self.classes).splitlines()]
            check_classes(str(base), found, names, self.classes)
        number = {name: k for k, name in enumerate(names)}
        train, val, test = (
            Pictures([file for file, _ in rows], torch.tensor([number[name] for _, name in rows]))
            for rows in (train, val, test)
        )
        return Parts(names, train, val if self.val else None, test)

    def rows(self, base: Path, file: str) -> list[tuple[Path, str]]:
        """The pictures of a list, and their classes; OSError, if one is missing."""
        rows = []
        for line in read_text(base / file).splitlines():
            if not (found := re.fullmatch(self.line, line.strip())):
                raise UserError(f"{base / file}: has an unreadable line: {line!r}")
            picture = base / "images" / f"{found['file'].removesuffix('.jpg')}.jpg"
            rows.append((picture, spoken(found["name"])))
        check_files([picture for picture, _ in rows], [str(base / file)] * len(rows))
        return rows


@dataclass(frozen=True)
class ImageNet:
    """ImageNet or a variant: a folder for each class, as n01440764/*.JPEG, or as 0/*.jpeg (V2).

    CoOp's classnames.txt has the names of all 1,000 classes, as "n01440764 tench". Labels count the
    existing classes in its order. The file is also looked for in imagenet/.
    """

    folder: str  # below root
    test: str
    train: str = ""  # empty: the data set is only for testing

    def __call__(self, root: Path, seed: int) -> Parts:
        base = root / self.folder if (root / self.folder).is_dir() else root
        file = base / "classnames.txt"
        file = file if file.is_file() else root / "imagenet/classnames.txt"
        lines = file.read_text(encoding="utf-8").splitlines()
        called = dict(line.strip().partition(" ")[::2] for line in lines)  # n01440764 -> tench
        test = files_of(base / self.test, file, [*called])
        train = files_of(base / self.train, file, [*called]) if self.train else {}
        ids = [wnid for wnid in called if wnid in train or wnid in test]

        def pictures(part: dict[str, list[Path]]) -> Pictures:
            counts = torch.tensor([len(part.get(wnid, [])) for wnid in ids])
            files = [picture for wnid in ids for picture in part.get(wnid, [])]
            return Pictures(files, torch.arange(len(ids)).repeat_interleave(counts))

        return Parts([spoken(called[n]) for n in ids], pictures(train), None, pictures(test))


def files_of(folder: Path, of: Path, ids: list[str]) -> dict[str, list[Path]]:
    """The pictures in the class folders below `folder`, each named by one of `ids` or its index."""
    found = {}
    for place in visible(folder):
        if place.is_dir():
            name = place.name
            name = ids[int(name)] if name.isdecimal() and int(name) < len(ids) else name
            if name not in ids:
                raise UserError(f"{place}: is not the folder of a class that {of} names")
            # os.listdir, as there may be a million files.
            names = sorted(name for name in os.listdir(place) if not name.startswith("."))
            found[name] = [place / n for n in names if os.path.splitext(n)[1].lower() in ENDINGS]
    if not found:
        raise UserError(f"{folder}: has no class folders n01440764/ and so on; make such folders")
    return found
