"""Data sets: pictures with class names, in train, val and test.

    python -m fewshot.datasets      print all of them: templates, counts, sources, licences

If a data set has no validation part, the experiment sets a few training pictures aside. Counts are
checked when a data set is loaded, so that no result comes from an incomplete download.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clip_min.errors import UserError, unknown
from clip_min.tokenizer import tokenizer
from fewshot import coop_split, readers
from fewshot.catalogue import DATASETS, GROUPS, Entry
from fewshot.folder import Parts
from fewshot.pictures import Pictures


@dataclass(frozen=True)
class Dataset:
    classnames: list[str]  # labels are indices of this list
    template: str
    train: Pictures  # empty, if the data set is only for testing
    val: Pictures | None  # None: the experiment takes a few training pictures
    test: Pictures
    split: str = "official"  # or "coop": then shots are drawn by CoOp's rule
    own: bool = False  # your own pictures, without a protocol for validation
    notes: Sequence[str] = ()  # what the user should know


def load(
    name: str, root: Path | None, seed: int, split: str = "official", split_file: Path | None = None
) -> Dataset:
    """Load a data set by name, with its own split ("official") or CoOp's ("coop", `split_file`)."""
    if name not in DATASETS:
        raise unknown("--dataset", name, DATASETS)
    entry = DATASETS[name]
    split = split if entry.read else "coop"
    root = _parent(entry, root or Path("data")) if entry.folders else root
    if split_file and split != "coop":
        raise UserError(f"--split-file {split_file}: works only with --split coop; add that")
    try:
        coops = split == "coop"
        read = _read_coop(name, root, seed, split_file) if coops else entry.read(root, seed)
    except (OSError, RuntimeError) as error:  # no network, no space; RuntimeError: a wrong md5
        if not entry.folders:
            raise
        todo = f"connect to download it, or give the folder that contains {entry.folders[-1]}/"
        todo = _to_fetch(entry, root) or f"{todo} as --data-root"
        raise UserError(f"--dataset {name}: is not found in {root} ({error}); {todo}") from None
    names, parts = read.names, (read.train, read.val, read.test)
    counts = tuple(0 if part is None else len(part) for part in parts)
    expected = entry.coop_images if split == "coop" else entry.images
    if expected and counts != expected:
        raise UserError(
            f"{root or 'data'}: {counts} images, expected {expected} (train, val, test) for "
            f"{name}; if a download was cut short, remove what is there and start again"
        )
    if entry.classes and len(names) != entry.classes:
        raise UserError(f"{name}: has {len(names)} classes, expected {entry.classes}")
    notes = [*read.notes]
    check_names(str(root or name), names, notes if entry.classes else None)
    own = name in ("folder", "features") and split == "official"
    return Dataset(names, entry.template, *parts, split, own, notes)


def check_names(where: str, names: list[str], notes: list[str] | None = None) -> None:
    """UserError, if CLIP reads two names as equal, which would always tie, or a name as empty.

    CLIP reads tokens: case, HTML, spaces and Unicode variants of a letter make no difference. With
    `notes`, two equal names only give a note: two of ImageNet's classes are published as "missile".
    """
    first: dict[tuple[int, ...], str] = {}
    for name in names:
        tokens = tuple(tokenizer().encode(name))
        if not tokens:
            raise UserError(f"{where}: the class name {name!r} is empty for CLIP; rename it")
        if (other := first.get(tokens)) is None:
            first[tokens] = name
        elif notes is not None:
            notes.append(f"{other!r} and {name!r} are published as two classes, and tie for CLIP")
        else:
            raise UserError(
                f"{where}: {other!r} and {name!r} are one class to CLIP, which reads lower case "
                "and plain letters; rename or remove one"
            )


def _parent(entry: Entry, root: Path) -> Path:
    """--data-root; its parent, if it is the folder of this data set itself."""
    if any((root / folder).is_dir() for folder in entry.folders):
        return root
    own = {Path(folder).parts[0] for folder in entry.folders}
    return root.absolute().parent if root.absolute().name in own else root


def _read_coop(name: str, root: Path | None, seed: int, file: Path | None) -> Parts:
    entry = DATASETS[name]
    if not entry.coop_file and not entry.coop_images:
        have = ", ".join(k for k, e in DATASETS.items() if e.coop_file or e.coop_images)
        raise UserError(f"--split coop: CoOp has none for {name}; it has for {have}")
    if not entry.coop_file and not file:
        return entry.read(root, seed)
    root = readers.own(root) if name == "folder" else root
    places = [*(root / f for f in entry.folders if (root / f).is_dir()), root]
    todo = _to_fetch(entry, root)
    file = file or coop_split.find_split(places, entry.coop_file, todo)
    return coop_split.read_split(file, places, todo)


def _to_fetch(entry: Entry, root: Path) -> str:
    """What to do about files that must be downloaded by hand."""
    return entry.fetch and f"put into {root / entry.folders[0]}: {entry.fetch}; see {entry.url}"


# For --help.
_ABOUT = {name: entry.about for name, entry in DATASETS.items()}
_ABOUT |= {name: f"all of {', '.join(names)}" for name, names in GROUPS.items()}
LISTED = "\n".join(f"  {name:<18}{about}" for name, about in _ABOUT.items())


def main() -> None:
    """Print the whole table, as Markdown."""
    print("| `--dataset` | template | classes | train / val / test | CoOp's split | from |")
    print("|---|---|---|---|---|---|")
    for name, entry in DATASETS.items():
        images, theirs = (
            " / ".join(f"{n:,}" for n in counts) if counts else "" if entry.classes else "yours"
            for counts in (entry.images, entry.coop_images)
        )
        parts = [entry.about, entry.paper, entry.url, entry.licence and f"licence: {entry.licence}"]
        cells = [f"`{name}`", f"`{entry.template}`", entry.classes or "yours", images]
        print(f"| {' | '.join(map(str, cells))} | {theirs} | {'; '.join(filter(None, parts))} |")


if __name__ == "__main__":
    from fewshot.experiment import run_script  # which imports this file
    from fewshot.flags import Parser

    run_script(lambda: Parser(description=__doc__).parse(sys.argv[1:]) or main())
