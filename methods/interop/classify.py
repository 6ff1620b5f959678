"""Classify your own images with a trained run, or with zero-shot CLIP.

    from methods.interop.classify import open_run

    for answer in open_run("runs/demo/demo/lora-s10-seed1").classify(["a.jpg", "folder"]):
        print(answer.path, answer.names[0], answer.probabilities[0])

Threads decode the next images while the model computes. Only a few batches are in memory, however
many images there are.
"""

import csv
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from clip_min import UserError, crop, normalize, weights
from clip_min.files import replacing
from fewshot.batches import PRECISIONS
from fewshot.experiment import Experiment
from fewshot.folder import find_pictures
from fewshot.pictures import ahead, open_image
from fewshot.run import Run
from methods.base import Method
from methods.interop.load import trained

BATCH = 64  # images in a batch
TOP = 5


@dataclass
class Answer:
    """The names of an image with the highest probabilities: five, or all if there are fewer.

    For an image that cannot be read there are none, and `error` says why.
    """

    path: Path
    names: list[str]
    probabilities: list[float]
    error: str = ""

    @property
    def margin(self) -> float:
        """The first probability minus the second."""
        return self.probabilities[0] - sum(self.probabilities[1:2])

    def row(self, threshold: float = 0.0) -> dict:
        """A row of a table; `answer` is the first name, or "" if it is below the threshold."""
        known = bool(self.names) and self.probabilities[0] >= threshold
        row: dict[str, str | float] = {"path": str(self.path)}
        row["answer"] = self.names[0] if known else ""
        row["margin"] = round(self.margin, 6) if self.names else ""
        for i in range(TOP):
            there = i < len(self.names)
            row[f"name{i + 1}"] = self.names[i] if there else ""
            row[f"probability{i + 1}"] = round(self.probabilities[i], 6) if there else ""
        return {**row, "error": self.error}


@dataclass
class Classifier:
    """A trained method, ready to classify among its names."""

    method: Method
    precision: str = "fp32"

    def classify(self, paths: Iterable[str | Path]) -> Iterator[Answer]:
        """The answers for images and for folders of images, in this order."""
        batches = self._encoded([file for path in paths for file in pictures_in(Path(path))])
        if self.method.transductive:  # it labels all jointly
            batches = map(_joined, [batches])
        while answers := self._next(batches):
            yield from answers

    def _next(self, batches: Iterator) -> list[Answer]:
        """The answers for the next batch; [] after the last. Between batches, the caller's settings
        of gradients and autocast are in force.
        """
        device, how = self.method.clip.device, PRECISIONS[self.precision]
        with self.method.inference(), torch.autocast(device.type, **how):
            read, x = next(batches, ([], None))
            rows: Iterator[Tensor] = iter(())
            if x is not None:
                rows = iter(self.method.classify(x).float().softmax(dim=-1))  # (B, K)
            return [
                Answer(path, [], [], why) if why else self._answer(path, next(rows))
                for path, why in read
            ]

    def _answer(self, path: Path, row: Tensor) -> Answer:
        best = row.topk(min(TOP, len(row)))
        return Answer(path, [self.method.classnames[i] for i in best.indices], best.values.tolist())

    def _encoded(self, files: list[Path]) -> Iterator[tuple[list[tuple[Path, str]], Tensor | None]]:
        """Batches: the files, each with the reason why it cannot be read, or ""; and the readable
        images, encoded for `method.classify` (B, …).
        """
        config = self.method.clip.config

        def attempt(path: Path) -> tuple[Path, Tensor | None, str]:
            try:
                return path, crop(open_image(path), config), ""
            except UserError as error:
                return path, None, str(error)

        decoded = ahead(attempt, files)
        while batch := list(itertools.islice(decoded, BATCH)):
            pixels = [picture for _, picture, _ in batch if picture is not None]
            x = None
            if pixels:
                images = torch.stack(pixels).to(self.method.clip.device)
                x = self.method.encode(normalize(images, config=config))  # (B, 3, n, n) -> (B, …)
            yield [(path, why) for path, _, why in batch], x


def _joined(batches: Iterable) -> tuple[list, Tensor | None]:
    batches = list(batches)
    encoded = [x for _, x in batches if x is not None]
    return [one for read, _ in batches for one in read], torch.cat(encoded) if encoded else None


def open_run(
    path: str | Path,
    classnames: list[str] | None = None,
    device: str = "",
    model: str = "",
    share: float | None = None,
) -> Classifier:
    """A run of train.py, ready to classify images.

    classnames: names to choose from; default: all names of the run, or only the learned ones if the
    method cannot name others. model: where CLIP is, if it has moved. share: the share of the
    learned change to keep, see methods/wise_ft.py. On a GPU, convolutions no longer use TF32.
    """
    run = Run.open(Path(path))
    moved = {"device": device} | ({"model": model} if model else {})
    try:
        experiment = Experiment(**{**run.config["experiment"], **moved})
    except TypeError as error:
        raise UserError(f"{run.path}/config.json: not a config of a run ({error})") from None
    clip = weights.load(experiment.model, experiment.device, image_size=experiment.image_size)
    torch.backends.cudnn.allow_tf32 = False  # real float32 in the patch embedding, as in training
    method = trained(run, clip, share=share)
    if classnames is None and method.names_unseen:
        classnames = [name for names in run.config["classnames"].values() for name in names]
    method = method.for_classes(classnames) if classnames else method
    return Classifier(method, experiment.precision)


def pictures_in(path: Path) -> list[Path]:
    """An image file, or all image files below a folder; a note counts the other files."""
    if not path.is_dir():
        return [path]
    left_out: dict[str, list[Path]] = {}
    files = find_pictures(path, left_out)
    for why, others in left_out.items():
        print(f"note: {path}: left out {len(others)} {why}")
    if not files:
        raise UserError(f"--image {path}: is a folder without pictures; give a folder with some")
    return files


def write(answers: Iterable[Answer], file: Path, threshold: float = 0.0) -> tuple[int, int, int]:
    """Write answers to a .csv or .json file as they come -> the numbers of answers in all, of those
    below the threshold, and of unreadable images.
    """
    count = unsure = unread = 0
    with replacing(file) as temporary, _text(temporary) as out:
        for answer in answers:
            row = answer.row(threshold)
            if file.suffix == ".json":
                out.write((",\n" if count else "[\n") + json.dumps(row, ensure_ascii=False))
            else:
                table = csv.DictWriter(out, row)
                if not count:
                    table.writeheader()
                table.writerow(row)
            count += 1
            unsure += bool(answer.names) and not row["answer"]
            unread += bool(answer.error)
        if file.suffix == ".json":
            out.write("\n]\n" if count else "[]\n")
    return count, unsure, unread


def _text(file: str) -> TextIO:
    return open(file, "w", encoding="utf-8", newline="", errors="backslashreplace")  # of odd names
