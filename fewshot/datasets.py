"""Data sets: pictures with class names, in train, val and test. One row of DATASETS is one of them.

    python -m fewshot.datasets      the table: templates, counts, where from, licences

Where a data set has no validation part, the experiment sets a few training pictures aside. Counts
are checked when a set is loaded: a download that was cut short must not become a number.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from clip_min.errors import UserError, nearest
from clip_min.tokenizer import tokenizer
from fewshot import coop_split, demo
from fewshot.folder import Parts, read_folder
from fewshot.manifest import is_manifest, read_manifest
from fewshot.pictures import Pictures


@dataclass(frozen=True)
class Dataset:
    classnames: list[str]  # a label is a number in this list
    template: str
    train: Pictures
    val: Pictures | None  # None: the experiment takes a few training pictures
    test: Pictures
    split: str = "official"  # or "coop": then shots are drawn by CoOp's rule
    own: bool = False  # pictures of one's own: no protocol says how many to validate on
    notes: Sequence[str] = ()  # what the user should know


@dataclass(frozen=True)
class Entry:
    """What is known of a data set before it is read; 0 or empty: not known, or none."""

    read: Callable[[Path | None, int], Parts]
    about: str
    model: str = "ViT-B/16"  # what is tuned if --model is not given
    template: str = "a photo of a {}."
    classes: int = 0
    images: tuple[int, int, int] | None = None  # train, val, test
    coop_file: str = ""  # CoOp's split of it
    coop_images: tuple[int, int, int] | None = None  # the same three of that split
    url: str = ""
    paper: str = ""
    licence: str = ""


def load(
    name: str, root: Path | None, seed: int, split: str = "official", split_file: Path | None = None
) -> Dataset:
    """A data set by its name, in its own split ("official") or CoOp's ("coop", of `split_file`)."""
    entry = DATASETS[nearest("--dataset", name, DATASETS)]
    if split == "coop":
        read = _read_coop(name, root, split_file)
    elif split_file:
        raise UserError(f"--split-file {split_file}: is for --split coop; add that")
    else:
        read = entry.read(root, seed)
    names, parts = read.names, (read.train, read.val, read.test)
    counts = tuple(0 if part is None else len(part) for part in parts)
    expected = entry.coop_images if split == "coop" else entry.images
    if expected and counts != expected:
        where = root or "data"
        raise UserError(
            f"{where}: {counts} images, expected {expected} (train, val, test) for {name}; if a "
            "download was cut short, remove what is there and start again"
        )
    if entry.classes and len(names) != entry.classes:
        raise UserError(f"{name}: has {len(names)} classes, expected {entry.classes}")
    check_names(str(root or name), names)
    own = name == "folder" and split == "official"
    return Dataset(names, entry.template, *parts, split, own, read.notes)


def check_names(where: str, names: list[str]) -> None:
    """UserError, if two names are one to CLIP, since they would always tie, or one is none.

    It reads tokens: case, HTML, Unicode's ways to write one letter and spaces make no difference.
    """
    first: dict[tuple[int, ...], str] = {}
    for name in names:
        tokens = tuple(tokenizer().encode(name))
        if not tokens:
            raise UserError(f"{where}: a class is called {name!r}, which CLIP reads as nothing")
        if (other := first.get(tokens)) is not None:
            raise UserError(
                f"{where}: {other!r} and {name!r} are one class to CLIP, which reads lower case "
                "and plain letters; rename or remove one"
            )
        first[tokens] = name


def read_demo(root: Path | None, seed: int) -> Parts:
    """102 species of drawn flowers, 10 pictures each in train, val and test."""
    if root is not None:
        raise UserError(f"--data-root {root}: the demo is drawn, not read; add --dataset folder")
    splits = [Pictures(*demo.split(name)) for name in ("train", "val", "test")]
    return Parts(list(demo.CLASSNAMES), *splits)


def read_own(root: Path | None, seed: int) -> Parts:
    """Pictures of one's own: as folders (fewshot/folder.py) or by CSV (fewshot/manifest.py)."""
    root = _own(root)
    return read_manifest(root) if is_manifest(root) else read_folder(root, seed)


def read_flowers102(root: Path | None, seed: int) -> Parts:
    """The official split, as torchvision has it: 10 train and 10 val images a class, and its names,
    of which one is "pink-yellow dahlia?". CoOp's split has names of its own.
    """
    from torchvision.datasets import Flowers102

    def read(root: Path) -> Parts:
        parts = [Flowers102(root, name, download=True) for name in ("train", "val", "test")]
        files = [[Path(file) for file in part._image_files] for part in parts]
        labels = [torch.tensor(part._labels) for part in parts]
        return Parts(list(Flowers102.classes), *map(Pictures, files, labels))

    return _download("flowers102", "flowers-102/", root, read)


EUROSAT_NAMES = {  # folder -> a name that CLIP can read: CoOp's
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


def read_eurosat(root: Path | None, seed: int) -> Parts:
    """torchvision's images. They come without a split, so here 70 % of each class, drawn by a fixed
    seed whatever --seed is, are for training and 30 % for testing; CoOp's split is --split coop.
    """
    from torchvision.datasets import EuroSAT

    def read(root: Path) -> Parts:
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

    return _download("eurosat", "eurosat/", root, read)


def read_cifar100(root: Path | None, seed: int) -> Parts:
    """The official train and test images, 32 x 32 pixels, in memory.

    They are published as pickles. torchvision reads them, after it has found their md5 right.
    """
    from torchvision.datasets import CIFAR100

    def read(root: Path) -> Parts:
        train, test = (CIFAR100(root, train=part, download=True) for part in (True, False))
        names = [name.replace("_", " ") for name in train.classes]
        pixels = [torch.from_numpy(part.data).permute(0, 3, 1, 2) for part in (train, test)]
        labels = [torch.tensor(part.targets) for part in (train, test)]
        train, test = map(Pictures, pixels, labels)
        return Parts(names, train, None, test)

    return _download("cifar100", "cifar-100-python/", root, read)


def read_hymenoptera(root: Path | None, seed: int) -> Parts:
    """Ants and bees: train/, and val/ as test. One file, a GIF, is no picture of either."""
    from torchvision.datasets.utils import download_and_extract_archive

    def read(root: Path) -> Parts:
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

    return _download("hymenoptera", "hymenoptera_data/", root, read)


def _read_coop(name: str, root: Path | None, file: Path | None) -> Parts:
    pattern = DATASETS[name].coop_file
    if not pattern:
        have = ", ".join(key for key, entry in DATASETS.items() if entry.coop_file)
        raise UserError(f"--split coop: CoOp has none for {name}; it has for {have}")
    root = _own(root if name == "folder" else root or Path("data"))
    return coop_split.read_split(file or coop_split.find_split(root, pattern), root)


def _own(root: Path | None) -> Path:
    if root is None:
        raise UserError("--dataset folder: say where your pictures are with --data-root FOLDER")
    if not root.is_dir():
        raise UserError(f"--data-root {root}: expected a folder of pictures; there is none")
    return root


def _download(name: str, folder: str, root: Path | None, read: Callable[[Path], Parts]) -> Parts:
    """What `read` makes of the data in `root`, downloaded to there first if need be."""
    root = root or Path("data")
    try:
        return read(root)
    except (OSError, RuntimeError) as error:  # no network, no space; RuntimeError: a wrong md5
        raise UserError(
            f"--dataset {name}: could not be had in {root} ({error}); connect to download it, or "
            f"give the folder that holds {folder} as --data-root"
        ) from None


JPEG = {".jpg", ".jpeg"}
HYMENOPTERA = "https://download.pytorch.org/tutorial/hymenoptera_data.zip"

DATASETS = {
    "demo": Entry(
        read_demo,
        "drawn flowers of 102 species, nothing to download",
        model="demo",
        template=demo.TEMPLATE,
        classes=102,
        images=(1020, 1020, 1020),
        licence="MIT, as this code",
    ),
    "folder": Entry(
        read_own,
        "your own pictures in --data-root: folders, or a CSV",
        coop_file="split_zhou_*.json",
    ),
    "flowers102": Entry(
        read_flowers102,
        "Oxford 102 flowers (0.35 GB)",
        template="a photo of a {}, a type of flower.",
        classes=102,
        images=(1020, 1020, 6149),
        coop_file="split_zhou_OxfordFlowers.json",
        coop_images=(4093, 1633, 2463),
        url="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        paper="Nilsback and Zisserman, 2008, Automated flower classification over a large number "
        "of classes",
        licence="see URL",
    ),
    "eurosat": Entry(
        read_eurosat,
        "satellite images of land, 64 x 64 pixels (0.09 GB)",
        template="a centered satellite photo of {}.",
        classes=10,
        images=(18900, 0, 8100),
        coop_file="split_zhou_EuroSAT.json",
        coop_images=(13500, 5400, 8100),
        url="https://github.com/phelber/EuroSAT",
        paper="Helber et al., 2019, EuroSAT, arXiv:1709.00029",
        licence="see URL",
    ),
    "cifar100": Entry(
        read_cifar100,
        "things and animals, 32 x 32 pixels (0.17 GB)",
        classes=100,
        images=(50000, 0, 10000),
        url="https://www.cs.toronto.edu/~kriz/cifar.html",
        paper="Krizhevsky, 2009, Learning multiple layers of features from tiny images",
        licence="see URL",
    ),
    "hymenoptera": Entry(
        read_hymenoptera,
        "ants and bees, of PyTorch's transfer-learning tutorial (0.05 GB)",
        template="a photo of a {}, a type of insect.",
        classes=2,
        images=(244, 0, 153),
        url=HYMENOPTERA,
        licence="see URL",
    ),
}


# For --help.
LISTED = "\n".join(f"  {name:<12}{entry.about}" for name, entry in DATASETS.items())


def main() -> None:
    """Print the whole table, as Markdown."""
    print("| `--dataset` | template | classes | train / val / test | CoOp's split | from |")
    print("|---|---|---|---|---|---|")
    for name, entry in DATASETS.items():
        images, theirs = (
            " / ".join(f"{n:,}" for n in counts) if counts else ""
            for counts in (entry.images, entry.coop_images)
        )
        parts = [entry.about, entry.paper, entry.url, entry.licence and f"licence: {entry.licence}"]
        cells = [f"`{name}`", f"`{entry.template}`", entry.classes or "yours", images or "yours"]
        print(f"| {' | '.join(map(str, cells))} | {theirs} | {'; '.join(filter(None, parts))} |")


if __name__ == "__main__":
    from fewshot.experiment import run_script  # which imports this file
    from fewshot.flags import Parser

    run_script(lambda: Parser(description=__doc__).parse(sys.argv[1:]) or main())
