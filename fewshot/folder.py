"""Your own pictures in folders: each folder is a class, with the class's name.

    root/train/CLASS/*.jpg   root/test/CLASS/*.jpg   (and root/val/CLASS/*.jpg)
    root/train/CLASS/*.jpg   root/val/CLASS/*.jpg    val is the test set, with a note
    root/CLASS/*.jpg         without parts: split by the seed

"-" and "_" in a folder's name become spaces. If folders have other names, a file beside them gives
the names of the classes ("_" becomes a space there as well), and their order:

    root/classes.txt         a name on each line; folders have that name, or the line number from 0
    root/classes.json        {"folder": "name", …}, as {"n01440764": "tench"} or {"1": "rose"}
"""

import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from clip_min import UserError
from clip_min.files import parse_json
from fewshot.pictures import ENDINGS, Pictures, few

PARTS = ("train", "val", "test")
CALLED = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
CLASSES_FILE = "classes.txt or classes.json"


SPLIT = (
    "there are no train/ and test/: of each class, half is for training, a fifth for validation, "
    "and the rest is tested on, drawn by --seed"
)


class Parts(NamedTuple):
    """The result of every reader of a data set."""

    names: list[str]
    train: Pictures
    val: Pictures | None  # None: the experiment sets training pictures aside
    test: Pictures
    notes: Sequence[str] = ()  # what the user should know


def read_folder(root: Path, seed: int) -> Parts:
    """Read folders of classes, with parts or without (then split by `seed`): see above."""
    known, left_out, notes = read_classnames(root), {}, []
    parts, alone = parts_of(root)
    if "train" not in parts or len(parts) == 1:
        if parts and (alone or len(parts) > 1):  # one may be a class: a train
            raise UserError(
                f"{root}: has {', '.join(f'{path.name}/' for path in parts.values())} alone; "
                "expected train/ and test/ (or val/), or a folder for each class"
            )
        names, pictures = read_classes(root, known, left_out=left_out)
        found = split(pictures, seed)
        notes.append(SPLIT)
    else:
        for path in visible(root):
            if path not in parts.values() and (path.is_dir() or path.suffix.lower() in ENDINGS):
                left_out.setdefault(f"beside {parts['train'].name}/", []).append(path)
        names, train = read_classes(parts["train"], known, left_out=left_out)
        val, test = (
            read_classes(parts[part], known, names, left_out)[1] if part in parts else None
            for part in ("val", "test")
        )
        if test is None:
            test, val = val, None
            notes.append(val_is_test(parts["val"].name, parts["train"].name))
        found = train, val, test
    notes += [] if known else note_numbers(root, names)
    for why, paths in left_out.items():
        notes.append(f"left out {len(paths)} {why}: {few(str(p.relative_to(root)) for p in paths)}")
    return Parts(names, *found, notes)


def parts_of(root: Path) -> tuple[dict[str, Path], bool]:
    """The folders of `root` that are parts, as "train" -> root/training; and whether a single one
    must be a part, and not a class: there are no other folders, or it holds only folders.
    """
    here = [path for path in visible(root) if path.is_dir()]
    parts: dict[str, Path] = {}
    for path in here:
        part = CALLED.get(path.name.lower(), path.name.lower())
        if part in PARTS and parts.setdefault(part, path) is not path:
            raise UserError(f"{root}: has both {parts[part].name}/ and {path.name}/; keep one")
    inside = visible(parts["train"]) if len(parts) == 1 and "train" in parts else []
    nested = any(path.is_dir() for path in inside)
    nested &= not any(path.suffix.lower() in ENDINGS for path in inside)
    return parts, len(parts) == len(here) or nested


def val_is_test(val: str, train: str) -> str:
    """The note for your own pictures without a test part."""
    return f"there is no test/: {val}/ is tested on, and some of {train}/ are for validation"


def note_numbers(root: Path, names: list[str]) -> list[str]:
    """A note, if class names are numbers."""
    if not all(name.isdecimal() for name in names):
        return []
    return [
        f"the classes are called {few(names, 3)}, but CLIP reads names; give their names in "
        f'{root}/classes.json: {{"{names[0]}": "rose", …}} (or in '
        "classes.txt: its first line names class 0)"
    ]


def readable(label: str) -> str:
    """A label as a name: "tiger-lily" and "tiger_lily" are "tiger lily"."""
    return " ".join(label.replace("-", " ").replace("_", " ").split())


def spoken(name: str) -> str:
    """A name for a prompt: "_" becomes a space, as in CoOp, Tip-Adapter and CLIP-LoRA.

    spoken("ox-eye_daisy") is "ox-eye daisy".
    """
    return " ".join(name.replace("_", " ").split())


def read_classnames(root: Path) -> dict[str, str]:
    """Label -> class name from root/classes.txt or classes.json, in order; {} without a file."""
    text, mapping = root / "classes.txt", root / "classes.json"
    if text.is_file() and mapping.is_file():
        raise UserError(f"{root}: has both classes.txt and classes.json; keep one")
    if text.is_file():
        written = [name for line in read_text(text).splitlines() if (name := line.strip())]
        named = dict(enumerate(written))
    elif mapping.is_file():
        named = parse_json(read_text(mapping), dict[str, str], str(mapping))
        if empty := [label for label, name in named.items() if not spoken(name)]:
            raise UserError(f"{mapping}: the name of {empty[0]!r:.200} is empty; name each class")
        if all(label.isdecimal() for label in named):
            named = {label: named[label] for label in sorted(named, key=int)}
    else:
        return {}
    file = text if text.is_file() else mapping
    names = [spoken(name) for name in named.values()]
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"{file}: {twice!r} occurs twice; name each class once")
    if len(names) < 2:
        raise UserError(f"{file}: names {len(names)} classes; expected two or more")
    known = dict(zip(map(str, named), names, strict=True))
    return known if file == mapping else known | dict(zip(written + names, names * 2, strict=True))


def class_of(label: str, known: dict[str, str], where: str) -> str:
    """The name of the class with this label in `where`."""
    if not known:
        return readable(label)
    name = next((known[x] for x in (label, spoken(label), readable(label)) if x in known), None)
    if name is None:
        near = difflib.get_close_matches(label, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{where}: {label!r} is not in {CLASSES_FILE}{hint}")
    return name


def visible(folder: Path) -> list[Path]:
    """The entries of a folder in order, without hidden ones (".DS_Store")."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def find_pictures(folder: Path, left_out: dict[str, list[Path]]) -> list[Path]:
    """The pictures in and below a folder, in order; others are added to `left_out`, by reason."""
    files = []
    try:
        entries = visible(folder)
    except OSError as error:
        left_out.setdefault(f"unreadable folders ({error.strerror})", []).append(folder)
        return []
    for path in entries:
        if path.is_dir() and path.is_symlink():
            left_out.setdefault("linked folders", []).append(path)
        elif path.is_dir():
            files += find_pictures(path, left_out)
        elif path.suffix.lower() not in ENDINGS:
            why = f"{path.suffix or 'other'} files"
            if path.suffix.lower() in (".heic", ".heif"):
                why += " (which are read after pip install pillow-heif)"
            left_out.setdefault(why, []).append(path)
        elif path.exists() and not path.is_file():
            left_out.setdefault("pipes and the like", []).append(path)
        else:
            files.append(path)
    return sorted(files)


def read_classes(
    root: Path,
    known: dict[str, str],
    expected: list[str] | None = None,
    left_out: dict[str, list[Path]] | None = None,
) -> tuple[list[str], Pictures]:
    """Class names and pictures of root/CLASS/*; `expected`: the classes that must be there.

    Other files are added to `left_out`, by reason.
    """
    folders, left_out = {}, {} if left_out is None else left_out
    for folder in visible(root):
        if folder.is_dir():
            files = find_pictures(folder, left_out)
            if not files:
                left_out.setdefault("folders without a picture", []).append(folder)
            name = class_of(folder.name, known, str(folder)) if files else readable(folder.name)
            if not name:
                raise UserError(
                    f"{folder}: a folder's name is its class, but this is empty; name it"
                )
            if name in folders:
                raise UserError(f"{root}: two folders are both the class {name!r}; rename one")
            if files:
                folders[name] = files
        elif folder.suffix.lower() in ENDINGS:
            left_out.setdefault("pictures outside of class folders", []).append(folder)
    names = expected or list(dict.fromkeys(known.values())) or list(folders)
    if expected is None and len(folders) < 2:
        found = [f"only the class {name!r}" for name in folders] or ["no class folder with images"]
        raise UserError(f"{root}: has {found[0]}; expected two or more folders CLASS/*.jpg")
    check_classes(str(root), set(folders), names, "train/" if expected else CLASSES_FILE)
    files = [file for name in names for file in folders[name]]
    counts = torch.tensor([len(folders[name]) for name in names])
    return names, Pictures(files, torch.arange(len(names)).repeat_interleave(counts))


def check_classes(where: str, found: set[str], expected, of: str) -> None:
    """UserError, unless all parts have the same classes."""
    if odd := sorted(found ^ set(expected)):
        more = ", …" if len(odd) > 5 else ""
        raise UserError(
            f"{where}: its classes are not those of {of}: {', '.join(odd[:5])}{more} in one only"
        )


def split(pictures: Pictures, seed: int) -> tuple[Pictures, Pictures, Pictures]:
    """Draw half of each class for train, a fifth for val, the rest for test."""
    generator = torch.Generator().manual_seed(seed)
    parts = ([], [], [])
    for label in range(int(pictures.labels.max()) + 1):
        members = (pictures.labels == label).nonzero().flatten()
        if len(members) < 3:
            raise UserError(
                f"{pictures.source[members[0]].parent}: {len(members)} images; a class needs 3 or "
                "more, one each for train, val and test"
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


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
