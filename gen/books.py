"""The records of a folder of synthetic images: each image's source, and what the filter decided.

    settings.json     everything that determines the images; others cannot continue the folder
    plan.json         how many images each class is to have
    captions.jsonl    one caption on each line
    manifest.jsonl    one attempt on each line, in order of class and attempt
    seconds.json      time spent so far
    processes/1/…     process 1's own versions of these three, if several share the work; they are
                      merged at the end of a stage, or by the next command
    kept/CLASS/00007.png, rejected/CLASS/predicted_CLASS/00007.png, undecided/CLASS/00007.png

An image is written before the line that lists it, and each of them whole or not at all. If a
process is killed, the records stay correct, and at most one batch is made again, with the same
bits. An image's line determines its place; no other file is ever read, moved or removed.
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
from clip_min.typed import expect
from fewshot import cache, ranks
from fewshot.pictures import Pictures, digests

DONE = ("kept", "waived")  # states of an image that is used in training
BOOKS = ("captions.jsonl", "manifest.jsonl", "seconds.json")  # files that processes write
SETTINGS = {"classnames": list[str]}  # keys that are read from settings.json and plan.json
PLAN = {"quotas": dict[str, int]}


@dataclass
class Caption:
    classname: str
    member: int  # index of the real image in its class, from 0
    picture: str  # the real image's file
    number: int  # of this image's captions, from 0
    seed: int
    text: str
    captioner: str
    revision: str

    @property
    def place(self) -> tuple:
        """Its place in its class."""
        return self.number, self.member


@dataclass
class Attempt:
    classname: str
    attempt: int  # number in this class, from 0
    image: str  # its file, relative to the folder
    state: Literal["kept", "rejected", "waived", "undecided"]  # waived: kept, not recognised
    predicted: str | None  # the class that the filter predicts
    margin: float | None  # logit of the right class minus the largest other one
    captioned: str  # the real image whose caption is in the prompt
    repainted: str  # the real image that was painted over
    caption: str
    prompt: str
    caption_seed: int
    seed: int  # draws both images and the noise
    captioner: str
    captioner_revision: str
    painter: str
    painter_revision: str
    filter: str | None = None
    filter_revision: str | None = None

    @property
    def place(self) -> tuple:
        """Its place in its class."""
        return (self.attempt,)


class Manifest:
    """Reads settings["classnames"] and plan["quotas"]; the rest of both is for people."""

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
                    "the next place of its class and state; restore the file"
                )
        self.seconds = Counter()
        for file in (place / "seconds.json" for place in (folder, *self._parts())):
            self.seconds.update(read_json(file, "", dict[str, float]) if file.exists() else {})

    @classmethod
    def start(cls, folder: Path, settings: dict, plan: dict) -> "Manifest":
        """Start a new folder, or continue one with these settings."""
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
            elif odd := old.settings.keys() ^ settings.keys():  # another program's
                raise UserError(
                    f"{here}: was not written by generate.py (key {min(odd)}); give a new folder"
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
        """Open an existing folder for reading."""
        hint = "expected a folder of images made by generate.py"
        settings = read_json(folder / "settings.json", hint, SETTINGS)
        plan = read_json(folder / "plan.json", hint, PLAN)
        names, quotas = settings["classnames"], plan["quotas"]
        if odd := [name for name in quotas if name not in names or quotas[name] < 0]:
            raise UserError(
                f"{folder}/plan.json: quotas.{odd[0]} is {quotas[odd[0]]}, expected numbers from 0 "
                "for the classes of settings.json"
            )
        if plan.get("f1") is not None:  # null: not measured
            expect(plan["f1"], dict[str, float], f"{folder}/plan.json", "f1")
        return cls(folder, settings, plan)

    @classmethod
    def measured(cls, folder: Path) -> dict[str, float] | None:
        """The F1 of each class by which the folder's images were planned, if there are any."""
        if not (folder / "plan.json").is_file() or not (folder / "settings.json").is_file():
            return None
        manifest = cls.open(folder)
        return manifest.plan.get("f1") if manifest.captions or manifest.attempts else None

    def check_settings(self, settings: dict) -> None:
        """UserError, if the settings differ from the folder's."""
        for key, value in settings.items():
            if (made := self.settings.get(key)) != value:
                raise UserError(
                    f"{self.folder}: its images were made with {key} {made}, not {value}; give the "
                    "same value, or another folder with --synthetic"
                )

    def chosen(self) -> list[Attempt]:
        """The images to train on: the first kept images of each class, as many as planned."""
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
        """The number of images that are still to be made."""
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
        """Write images to the places of their states; an undecided one is then removed."""
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
        """Merge the files of all processes into the common ones, which each process then reads."""
        if ranks.size == 1:
            return
        ranks.wait()
        if ranks.rank == 0:
            with ranks.apart():
                Manifest(self.folder, self.settings, self.plan)._put_together()
        ranks.wait()
        self._read_books()

    def _put_together(self) -> None:
        """Write the common files, then remove those of single processes, which were read."""
        if not (parts := self._parts()):
            return
        self._write("captions.jsonl", self.captions)
        self._write("manifest.jsonl", self.attempts)
        self._write_seconds(self.seconds)
        for part in parts:
            for name in BOOKS:
                (part / name).unlink(missing_ok=True)
        for place in (*parts, self.folder / "processes"):
            with contextlib.suppress(OSError):  # it is not empty
                place.rmdir()

    def _parts(self) -> list[Path]:
        """The folders of single processes."""
        return sorted(p for p in self.folder.glob("processes/*") if p.name.isdecimal())

    def _book(self, name: str) -> Path:
        """The file that this process writes: its own, if others share the work."""
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
        """The lines of a record as `kind`; a process's own line is newer than the common one."""
        found = {}
        for place in (self.folder, *self._parts()):
            lines = self._read_lines(place / name, kind)
            found.update(((line.classname, line.place), line) for line in lines)
        return self._sorted(found.values()) if self._parts() else list(found.values())

    def _read_lines(self, file: Path, kind: type) -> list:
        """The lines of a file as `kind`; UserError for a class that is not the folder's."""
        hints, lines, seen = typing.get_type_hints(kind), [], set()
        for number, row in enumerate(read_json_lines(file, hints), 1):
            where = f"{file}, line {number}"
            if odd := [key for key in row if key not in hints]:
                raise UserError(f"{where}: {odd[0]} is not a key of such a line; remove it")
            named = [row["classname"], row.get("predicted")]
            if odd := [n for n in named if n is not None and n not in self.classnames]:
                raise UserError(f"{where}: {odd[0]!r:.200} is not a class of settings.json")
            if row.get("state") == "rejected" and row["predicted"] is None:
                raise UserError(f"{where}: predicted is null, expected a class")
            lines.append(line := kind(**row))
            if (key := (line.classname, line.place)) in seen:
                raise UserError(f"{where}: repeats an earlier line; remove one of the two")
            seen.add(key)
        return lines

    def _sweep(self) -> None:
        """Remove what killed processes left: temporary files, and images not yet removed."""
        listed = [self.folder / attempt.image for attempt in self.attempts]
        states = [self.folder / state for state in ("kept", "rejected", "undecided")]
        folders = states + [state / slug for state in states for slug in self.slugs.values()]
        folders += [self.folder / "processes", *self._parts()]
        if linked := [f for f in {*folders, *(p.parent for p in listed)} if f.is_symlink()]:
            raise UserError(
                f"{min(linked)}: is a link, but images must be in the folder itself; replace it "
                "with a folder"
            )
        for folder, _, _ in os.walk(self.folder):  # not behind links
            remove_half_written(Path(folder))
        for attempt in self.attempts:
            if attempt.state != "undecided":
                (self.folder / self._place(replace(attempt, state="undecided"))).unlink(True)
        if lost := sorted(path for path in listed if not path.exists()):
            raise UserError(
                f"{lost[0]}: is listed in manifest.jsonl but missing ({len(lost)} files in all); "
                "put it back, or remove the folder to start over"
            )


def _early(path: Path) -> bool:
    """Whether a process killed before it wrote settings.json can have left this file."""
    if path.name == "plan.json":
        read_json(path, "", PLAN)  # an error, if another program wrote it
        return True
    return HALF_WRITTEN.fullmatch(path.name) is not None


def slugs(classnames: list[str]) -> list[str]:
    """Class names as folder names: "ox-eye / daisy?" -> "ox-eye-daisy".

    A number is added if nothing is left, or if two names would be equal up to upper and lower case.
    """
    plain = [re.sub(r"[^\w.]+", "-", name).strip("-.")[:60] for name in classnames]
    count = Counter(slug.lower() for slug in plain)
    made = [
        slug if slug and count[slug.lower()] == 1 else f"{slug}-{k}".strip("-")
        for k, slug in enumerate(plain)
    ]
    if len({slug.lower() for slug in made}) < len(made):  # "c", "c++" and "c-1": the number is one
        made = [f"{k}-{slug}".strip("-") for k, slug in enumerate(plain)]
    return made


def fingerprint(pictures: Pictures) -> str:
    """A hash of the content of the real images, which shows whether images were made from them."""
    source = pictures.source
    if not isinstance(source, torch.Tensor):
        source = pictures.digests or digests(pictures)
    return cache.key(source, pictures.labels.cpu())
