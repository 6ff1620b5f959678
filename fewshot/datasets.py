"""Data sets: pictures with class names, in train, val and test.

demo        drawn by fewshot/demo.py; nothing to download
folder      a folder of your own: root/train/CLASS/*.jpg and root/test/CLASS/*.jpg (and val/),
            or root/CLASS/*.jpg, split by the seed
flowers102  Oxford's 102 flowers, torchvision's (the official) split, downloaded and md5-checked
"""

import difflib
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from clip_min import UserError
from fewshot import demo
from fewshot.images import ENDINGS, Pictures


@dataclass(frozen=True)
class Dataset:
    classnames: list[str]  # a label is a number in this list
    template: str
    train: Pictures
    val: Pictures | None  # None: the experiment takes a few training pictures
    test: Pictures


def load(name: str, root: Path | None, seed: int) -> Dataset:
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, 1)
        hint = f"did you mean {near[0]}?" if near else f"data sets are {', '.join(DATASETS)}"
        raise UserError(f"--dataset {name}: unknown; {hint}")
    return DATASETS[name].load(root, seed)


def load_demo(root: Path | None, seed: int) -> Dataset:
    """102 species of drawn flowers, 10 pictures each in train, val and test."""
    if root is not None:
        raise UserError(f"--data-root {root}: the demo is drawn, not read; add --dataset folder")
    splits = [Pictures(*demo.split(name)) for name in ("train", "val", "test")]
    return Dataset(list(demo.CLASSNAMES), demo.TEMPLATE, *splits)


def load_flowers102(root: Path | None, seed: int) -> Dataset:
    """Nilsback and Zisserman, "Automated flower classification over a large number of classes",
    2008. 102 classes; torchvision's split: 1020 train, 1020 val, 6149 test images.

    https://www.robots.ox.ac.uk/~vgg/data/flowers/102/
    """
    from torchvision.datasets import Flowers102

    root = root or Path("data")

    def split(name: str) -> Pictures:
        part = Flowers102(root, name, download=True)
        return Pictures([Path(p) for p in part._image_files], torch.tensor(part._labels))

    try:
        train, val, test = split("train"), split("val"), split("test")
    except (urllib.error.URLError, OSError, RuntimeError) as error:  # RuntimeError: a wrong md5
        raise UserError(
            f"--dataset flowers102: could not be had in {root} ({error}); connect to download it "
            "(0.35 GB), or give the folder that holds flowers-102/ as --data-root"
        ) from None
    counts = (len(train), len(val), len(test))
    if counts != (1020, 1020, 6149):
        raise UserError(f"{root}/flowers-102: {counts} images, expected (1020, 1020, 6149)")
    classnames = [name.rstrip("?") for name in Flowers102.classes]  # "pink-yellow dahlia?"
    return Dataset(classnames, "a photo of a {}, a type of flower.", train, val, test)


def load_folder(root: Path | None, seed: int) -> Dataset:
    """Your own pictures; a class is a folder, named as the class is ("-" and "_" are spaces)."""
    if root is None:
        raise UserError("--dataset folder: say where your pictures are with --data-root FOLDER")
    if not root.is_dir():
        raise UserError(f"--data-root {root}: expected a folder of pictures; there is none")
    template = "a photo of a {}."
    if not (root / "train").is_dir() or not (root / "test").is_dir():
        names, pictures = _read_classes(root)
        return Dataset(names, template, *_split(pictures, seed))
    names, train = _read_classes(root / "train")
    test = _read_classes(root / "test", names)[1]
    val = _read_classes(root / "val", names)[1] if (root / "val").is_dir() else None
    return Dataset(names, template, train, val, test)


def _read_classes(root: Path, names: list[str] | None = None) -> tuple[list[str], Pictures]:
    """Class names and pictures of root/CLASS/*; with `names`, the classes that must be there."""
    folders = {}
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and not folder.name.startswith("."):
            files = sorted(  # ".": what file managers hide beside pictures, under their names
                p
                for p in folder.rglob("*")
                if p.suffix.lower() in ENDINGS and not p.name.startswith(".")
            )
            name = " ".join(folder.name.replace("-", " ").replace("_", " ").split())
            if not name:
                raise UserError(f"{folder}: a folder's name is its class, and this names none")
            if name in folders:
                raise UserError(f"{root}: two folders are both the class {name!r}; rename one")
            if files:
                folders[name] = files
    if names is None and len(folders) < 2:
        found = (
            f"only the class {next(iter(folders))!r}" if folders else "no class folder with images"
        )
        raise UserError(f"{root}: has {found}; expected two or more folders CLASS/*.jpg")
    if names is not None and set(folders) != set(names):
        odd = sorted(set(folders) ^ set(names))
        raise UserError(
            f"{root}: its classes are not those of train/: {', '.join(odd)} in one only"
        )
    names = names or list(folders)
    files = [file for name in names for file in folders[name]]
    counts = torch.tensor([len(folders[name]) for name in names])
    return names, Pictures(files, torch.arange(len(names)).repeat_interleave(counts))


def _split(pictures: Pictures, seed: int) -> tuple[Pictures, Pictures, Pictures]:
    """Half of each class to train, a fifth to val, the rest to test, drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    parts = ([], [], [])
    for label in range(int(pictures.labels.max()) + 1):
        members = (pictures.labels == label).nonzero().flatten()
        if len(members) < 3:
            raise UserError(
                f"{pictures.source[members[0]].parent}: {len(members)} images; a class needs 3 or "
                "more, to have one each in train, val and test"
            )
        members = members[torch.randperm(len(members), generator=generator)]
        val = max(1, len(members) // 5)
        test = max(1, round(0.3 * len(members)))
        for part, chosen in zip(
            parts, members.split([len(members) - val - test, val, test]), strict=True
        ):
            part.append(chosen)
    train, val, test = (pictures[torch.cat(part)] for part in parts)
    return train, val, test


@dataclass(frozen=True)
class Entry:
    load: Callable[[Path | None, int], Dataset]
    model: str  # what is tuned if --model is not given
    about: str


DATASETS = {
    "demo": Entry(load_demo, "demo", "102 species of drawn flowers, nothing to download"),
    "folder": Entry(load_folder, "demo", "your own pictures in --data-root"),
    "flowers102": Entry(load_flowers102, "ViT-B/16", "Oxford 102 flowers, downloaded"),
}
