"""The books of a folder of synthetic images: what was made, from what, and what became of it.

    settings.json     all that the images follow from; a folder is not continued with others
    plan.json         how many images each class is to have
    captions.jsonl    a line a caption
    manifest.jsonl    a line an attempt, in order of class and attempt
    seconds.json      time spent so far
    processes/1/…     the same three books of process 1, where several share the work, until they
                      are put together: at the end of a stage, or when the next command begins
    kept/CLASS/00007.png, rejected/CLASS/predicted_CLASS/00007.png, undecided/CLASS/00007.png

An image is written before the line that lists it, and both whole or not at all. So a process killed
at any moment leaves books that are true, and at most one batch to be made again, to the same bits.
Where an image lies follows from its line, and no other file is ever read, moved or removed.
"""

import contextlib
import json
import os
import re
import typing
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from clip_min import UserError
from clip_min.files import (
    HALF_WRITTEN,
    read_json,
    read_json_lines,
    remove_half_written,
    replacing,
    write_json,
    write_text,
)
from fewshot import cache, ranks
from fewshot.pictures import Pictures, digests

DONE = ("kept", "waived")  # states of an image that is used in training
BOOKS = ("captions.jsonl", "manifest.jsonl", "seconds.json")  # that processes write
SETTINGS = {"classnames": list[str]}  # what is read of settings.json, and of plan.json
PLAN = {"quotas": dict[str, int]}


@dataclass
class Caption:
    classname: str
    member: int  # which real picture of the class, from 0
    picture: str  # its file
    number: int  # of the captions of this picture, from 0
    seed: int
    text: str
    captioner: str
    revision: str

    @property
    def place(self) -> tuple:
        """Where it stands among those of its class."""
        return self.number, self.member


@dataclass
class Attempt:
    classname: str
    attempt: int  # of this class, from 0
    image: str  # its file, relative to the folder
    state: Literal["kept", "rejected", "waived", "undecided"]  # waived: kept, not recognised
    predicted: str | None  # the class the filter sees
    margin: float | None  # right logit minus the largest other
    captioned: str  # the real picture whose caption is in the prompt
    repainted: str  # the real picture that was painted over
    caption: str
    prompt: str
    caption_seed: int
    seed: int  # of the draw of both pictures and of the noise
    captioner: str
    captioner_revision: str
    painter: str
    painter_revision: str
    filter: str | None = None
    filter_revision: str | None = None

    @property
    def place(self) -> tuple:
        """Where it stands among those of its class."""
        return (self.attempt,)


class Manifest:
    """settings["classnames"], plan["quotas"] are read here; all else is for people to read."""

    def __init__(self, folder: Path, settings: dict, plan: dict):
        self.folder, self.settings, self.plan = folder, settings, plan
        self.classnames = settings["classnames"]
        self.slugs = dict(zip(self.classnames, slugs(self.classnames), strict=True))
        self.number = {name: k for k, name in enumerate(self.classnames)}
        self._read_books()

    def _read_books(self) -> None:
        folder, count = self.folder, Counter()
        self.own, self.own_seconds = set(), Counter()  # classes this process worked at; its time
        self.captions = self._read("captions.jsonl", Caption)
        self.attempts = self._read("manifest.jsonl", Attempt)
        for row in self.attempts:
            place = self._place(replace(row, attempt=count[row.classname]))
            count[row.classname] += 1
            if row.image != place:  # it could be anywhere: "../mine.png"
                raise UserError(
                    f"{folder}/manifest.jsonl: image is {row.image!r:.200}, expected {place!r}, "
                    "where the next one of its class and state lies"
                )
        self.seconds = Counter()
        for file in (place / "seconds.json" for place in (folder, *self._parts())):
            self.seconds.update(read_json(file, "", dict[str, float]) if file.exists() else {})

    @classmethod
    def start(cls, folder: Path, settings: dict, plan: dict) -> "Manifest":
        """A new folder, or one that was begun with these settings."""
        if ranks.rank == 0:
            with ranks.apart():
                cls._begin(folder, settings, plan)
        ranks.wait()
        return cls(folder, settings, plan)

    @classmethod
    def _begin(cls, folder: Path, settings: dict, plan: dict) -> None:
        here = folder / "settings.json"
        if here.exists():
            old = cls.open(folder)
            if old.captions or old.attempts:
                old.check_settings(settings)
            elif odd := old.settings.keys() ^ settings.keys():  # someone else's: not overwritten
                raise UserError(
                    f"{here}: is none of generate.py's, by its {min(odd)}; give a new folder"
                )
        elif folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file, expected a folder; give another one")
        elif folder.exists() and not all(_early(path) for path in folder.iterdir()):
            raise UserError(f"{folder}: is not empty and has no settings.json; give a new folder")
        write_json(folder / "plan.json", plan)
        write_json(here, settings)
        manifest = cls(folder, settings, plan)
        manifest._sweep()
        manifest._put_together()

    @classmethod
    def open(cls, folder: Path) -> "Manifest":
        """A folder that exists, to read."""
        hint = "generate.py leaves one in a folder of images"
        settings = read_json(folder / "settings.json", hint, SETTINGS)
        plan = read_json(folder / "plan.json", hint, PLAN)
        names, quotas = settings["classnames"], plan["quotas"]
        if odd := [name for name in quotas if name not in names or quotas[name] < 0]:
            raise UserError(
                f"{folder}/plan.json: quotas.{odd[0]} is {quotas[odd[0]]}, expected numbers from 0 "
                "for the classes of settings.json"
            )
        return cls(folder, settings, plan)

    def check_settings(self, settings: dict) -> None:
        """Refuse to go on with other settings."""
        for key, value in settings.items():
            if (made := self.settings.get(key)) != value:
                raise UserError(
                    f"{self.folder}: its images were made with {key} {made}, not {value}; give the "
                    "same, or another folder with --synthetic"
                )

    def chosen(self) -> list[Attempt]:
        """The images to train on: of every class the first that were kept, as many as planned."""
        left = Counter(self.plan["quotas"])
        chosen = []
        for attempt in self.attempts:
            if attempt.state in DONE and left[attempt.classname] > 0:
                left[attempt.classname] -= 1
                chosen.append(attempt)
        return chosen

    def count(self, *states: str) -> Counter:
        """Class name -> attempts in one of these states."""
        return Counter(a.classname for a in self.attempts if a.state in states)

    def missing(self) -> int:
        """Images still to be kept."""
        done = self.count(*DONE)
        return sum(max(0, n - done[name]) for name, n in self.plan["quotas"].items())

    def add_captions(self, captions: list[Caption]) -> None:
        self.captions = self._sorted(self.captions + captions)
        self.own.update(caption.classname for caption in captions)
        self._write("captions.jsonl", self.captions)

    def add(self, attempts: list[Attempt], images: list[Image.Image]) -> None:
        """Write new images, then the lines that list them."""
        self.attempts += attempts
        self.file(attempts, images)

    def file(self, attempts: list[Attempt], images: list[Image.Image]) -> None:
        """Put images where their states say; an undecided one leaves its old place last."""
        old = [attempt.image for attempt in attempts]
        for attempt, image in zip(attempts, images, strict=True):
            attempt.image = self._place(attempt)
            with replacing(self.folder / attempt.image) as temporary:
                image.save(temporary)
        self.attempts = self._sorted(self.attempts)
        self.own.update(attempt.classname for attempt in attempts)
        self._write("manifest.jsonl", self.attempts)
        for place, attempt in zip(old, attempts, strict=True):
            if place and place != attempt.image:
                (self.folder / place).unlink()

    def spent(self, stage: str, seconds: float) -> None:
        self.seconds[stage] += seconds
        self.own_seconds[stage] += seconds
        self._write_seconds(self.seconds if ranks.size == 1 else self.own_seconds)

    def share(self) -> None:
        """All that the processes wrote, to the books of all, which each process then reads."""
        if ranks.size == 1:
            return
        ranks.wait()
        if ranks.rank == 0:
            with ranks.apart():
                Manifest(self.folder, self.settings, self.plan)._put_together()
        ranks.wait()
        self._read_books()

    def _put_together(self) -> None:
        """Write the books of all; then those of single processes, which are read here, may go."""
        if not (parts := self._parts()):
            return
        self._write("captions.jsonl", self.captions)
        self._write("manifest.jsonl", self.attempts)
        self._write_seconds(self.seconds)
        for part in parts:
            for name in BOOKS:
                (part / name).unlink(missing_ok=True)
        for place in (*parts, self.folder / "processes"):
            with contextlib.suppress(OSError):  # it holds something else
                place.rmdir()

    def _parts(self) -> list[Path]:
        """The folders of books of single processes."""
        return sorted(p for p in self.folder.glob("processes/*") if p.name.isdecimal())

    def _book(self, name: str) -> Path:
        """Where this process writes a book: for itself, where others share the work."""
        return self.folder / (name if ranks.size == 1 else f"processes/{ranks.rank}/{name}")

    def _place(self, attempt: Attempt) -> str:
        state = "kept" if attempt.state == "waived" else attempt.state
        folder = f"{state}/{self.slugs[attempt.classname]}"
        if attempt.state == "rejected":
            folder += f"/predicted_{self.slugs[attempt.predicted]}"
        return f"{folder}/{attempt.attempt:05d}.png"

    def _write(self, name: str, lines: list) -> None:
        if ranks.size > 1:
            lines = [line for line in lines if line.classname in self.own]
        texts = (json.dumps(asdict(line), ensure_ascii=False) + "\n" for line in lines)
        write_text(self._book(name), "".join(texts))

    def _write_seconds(self, seconds: Counter) -> None:
        write_json(self._book("seconds.json"), {k: round(s, 3) for k, s in seconds.items()})

    def _sorted(self, lines: list) -> list:
        return sorted(lines, key=lambda line: (self.number[line.classname], line.place))

    def _read(self, name: str, kind: type) -> list:
        """The lines of a book, as `kind`; one of a single process is newer than that of all."""
        found = {}
        for place in (self.folder, *self._parts()):
            lines = self._read_lines(place / name, kind)
            found.update(((line.classname, line.place), line) for line in lines)
        return self._sorted(found.values()) if self._parts() else list(found.values())

    def _read_lines(self, file: Path, kind: type) -> list:
        """The lines of a file, as `kind`; every class in them is one of this folder's."""
        hints, lines, seen = typing.get_type_hints(kind), [], set()
        for number, row in enumerate(read_json_lines(file, hints), 1):
            where = f"{file}, line {number}"
            if odd := [key for key in row if key not in hints]:
                raise UserError(f"{where}: {odd[0]} is no key of such a line")
            known = [row["classname"], *filter(None, [row.get("predicted")])]
            if odd := [name for name in known if name not in self.classnames]:
                raise UserError(f"{where}: {odd[0]!r:.200} is no class of settings.json")
            if row.get("state") == "rejected" and row["predicted"] is None:
                raise UserError(f"{where}: predicted is null, expected the class it was taken for")
            lines.append(line := kind(**row))
            if (key := (line.classname, line.place)) in seen:
                raise UserError(f"{where}: tells what a line above tells; remove one of the two")
            seen.add(key)
        return lines

    def _sweep(self) -> None:
        """Remove what a killed process left half-written, or had moved and not yet removed."""
        listed = [self.folder / attempt.image for attempt in self.attempts]
        states = [self.folder / state for state in ("kept", "rejected", "undecided")]
        folders = states + [state / slug for state in states for slug in self.slugs.values()]
        folders += [self.folder / "processes", *self._parts()]
        if linked := [f for f in {*folders, *(p.parent for p in listed)} if f.is_symlink()]:
            raise UserError(
                f"{min(linked)}: is a link, and images are kept in the folder itself; put a folder "
                "there"
            )
        for folder, _, _ in os.walk(self.folder):  # not behind links
            remove_half_written(Path(folder))
        for attempt in self.attempts:
            if attempt.state != "undecided":
                (self.folder / self._place(replace(attempt, state="undecided"))).unlink(True)
        if lost := sorted(path for path in listed if not path.exists()):
            raise UserError(
                f"{lost[0]}: manifest.jsonl lists it, but it is gone ({len(lost)} files are); put "
                "it back, or remove the folder to start anew"
            )


def _early(path: Path) -> bool:
    """Can it have been left by a process killed before it had written settings.json?"""
    if path.name == "plan.json":
        read_json(path, "", PLAN)  # else an error: it is someone else's
        return True
    return HALF_WRITTEN.fullmatch(path.name) is not None


def slugs(classnames: list[str]) -> list[str]:
    """Class names as names of folders: "ox-eye / daisy?" -> "ox-eye-daisy".

    Where nothing is left, or two would be the same (also where A and a are), a number is added.
    """
    plain = [re.sub(r"[^\w.]+", "-", name).strip("-.")[:60] for name in classnames]
    count = Counter(slug.lower() for slug in plain)
    return [
        slug if slug and count[slug.lower()] == 1 else f"{slug}-{k}".strip("-")
        for k, slug in enumerate(plain)
    ]


def fingerprint(pictures: Pictures) -> str:
    """Tells whether images were made from these real pictures, by what they hold."""
    source = pictures.source
    if not isinstance(source, torch.Tensor):
        source = pictures.digests or digests(pictures)
    return cache.key(source, pictures.labels.cpu())
