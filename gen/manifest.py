"""The books of a folder of synthetic images: what was made, from what, and what became of it.

    settings.json     all that the images follow from; a folder is not continued with others
    plan.json         how many images each class is to have
    captions.jsonl    a line a caption
    manifest.jsonl    a line an attempt, in order of class and attempt
    seconds.json      time spent so far
    kept/CLASS/00007.png, rejected/CLASS/predicted_CLASS/00007.png, undecided/CLASS/00007.png

An image is written before the line that lists it, and both whole or not at all. So a process killed
at any moment leaves books that are true, and at most one batch to be made again, to the same bits.
"""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from clip_min import UserError
from clip_min.files import (
    HALF_WRITTEN,
    read_json,
    remove_half_written,
    replacing,
    write_json,
    write_text,
)
from fewshot import cache
from fewshot.images import Pictures, digests

DONE = ("kept", "waived")  # states of an image that is used in training


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


@dataclass
class Attempt:
    classname: str
    attempt: int  # of this class, from 0
    image: str  # its file, relative to the folder
    state: str  # kept, rejected, waived (kept though not recognised), undecided
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


class Manifest:
    """settings["classnames"], plan["quotas"] are read here; all else is for people to read."""

    def __init__(self, folder: Path, settings: dict, plan: dict):
        self.folder, self.settings, self.plan = folder, settings, plan
        self.classnames = settings["classnames"]
        self.slugs = slugs(self.classnames)
        self.captions = _read(folder / "captions.jsonl", Caption)
        self.attempts = _read(folder / "manifest.jsonl", Attempt)
        seconds = folder / "seconds.json"
        self.seconds = Counter(read_json(seconds, "") if seconds.exists() else {})

    @classmethod
    def start(cls, folder: Path, settings: dict, plan: dict) -> "Manifest":
        """A new folder, or one that was begun with these settings."""
        if (folder / "settings.json").exists():
            old = cls.open(folder)
            if old.captions or old.attempts:
                old.check(settings)
        elif folder.exists() and not all(_early(path) for path in folder.iterdir()):
            raise UserError(f"{folder}: is not empty and has no settings.json; give a new folder")
        write_json(folder / "plan.json", plan)
        write_json(folder / "settings.json", settings)
        manifest = cls(folder, settings, plan)
        manifest._sweep()
        return manifest

    @classmethod
    def open(cls, folder: Path) -> "Manifest":
        """A folder that exists, to read."""
        hint = "generate.py leaves one in a folder of images"
        settings = read_json(folder / "settings.json", hint)
        return cls(folder, settings, read_json(folder / "plan.json", hint))

    def check(self, settings: dict) -> None:
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
        self.captions += captions
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
        order = {name: k for k, name in enumerate(self.classnames)}
        self.attempts.sort(key=lambda a: (order[a.classname], a.attempt))
        self._write("manifest.jsonl", self.attempts)
        for place, attempt in zip(old, attempts, strict=True):
            if place and place != attempt.image:
                (self.folder / place).unlink()

    def spent(self, stage: str, seconds: float) -> None:
        self.seconds[stage] += seconds
        write_json(self.folder / "seconds.json", {k: round(s, 3) for k, s in self.seconds.items()})

    def _place(self, attempt: Attempt) -> str:
        slug = dict(zip(self.classnames, self.slugs, strict=True))
        folder = f"{attempt.state}/{slug[attempt.classname]}"
        if attempt.state == "waived":
            folder = f"kept/{slug[attempt.classname]}"
        if attempt.state == "rejected":
            folder += f"/predicted_{slug[attempt.predicted]}"
        return f"{folder}/{attempt.attempt:05d}.png"

    def _write(self, name: str, lines: list) -> None:
        texts = (json.dumps(asdict(line), ensure_ascii=False) + "\n" for line in lines)
        write_text(self.folder / name, "".join(texts))

    def _sweep(self) -> None:
        """Remove what a killed process left half-written or had not listed yet."""
        listed = {self.folder / attempt.image for attempt in self.attempts}
        remove_half_written(self.folder)
        for state in ("kept", "rejected", "undecided"):
            for path in (self.folder / state).rglob("[0-9]*.png"):
                if path not in listed:
                    path.unlink()
        if lost := sorted(path for path in listed if not path.exists()):
            raise UserError(
                f"{lost[0]}: manifest.jsonl lists it, but it is gone ({len(lost)} files are); put "
                "it back, or remove the folder to start anew"
            )


def _early(path: Path) -> bool:
    """Can it have been left by a process killed before it had written settings.json?"""
    return path.name == "plan.json" or path.match(HALF_WRITTEN)


def _read(path: Path, kind: type) -> list:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # not at U+2028, as splitlines does
    try:
        return [kind(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: has a line that is none of its own ({error})") from None


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
