"""Find runs and folders of generated images at the given paths, and say why others are left out."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from clip_min import UserError
from clip_min.files import read_json_lines
from clip_min.typed import expect
from fewshot.grid import read_results
from fewshot.record import Record, kept
from fewshot.run import LOGGED, Run
from gen.books import Manifest


@dataclass
class Tested:
    """A run, as far as it can be read; `missing` says what is missing."""

    run: Run
    results: dict | None
    log: list[dict]
    record: Record | None  # its training, validation and test pictures
    missing: list[str]

    @property
    def path(self) -> Path:
        return self.run.path

    @property
    def config(self) -> dict:
        return self.run.config

    @property
    def experiment(self) -> dict:
        return self.config["experiment"]


@dataclass
class Found:
    runs: list[Tested] = field(default_factory=list)
    generated: list[Manifest] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # path -> why


def find(paths: list[Path]) -> Found:
    """Read everything at the paths; UserError, if there is nothing to report."""
    found = Found()
    for place in dict.fromkeys(place for path in paths for place in _places(path, found)):
        try:
            if (place / "settings.json").exists():
                found.generated.append(Manifest.open(place))
            else:
                found.runs.append(read(place))
        except UserError as error:
            found.left_out[str(place)] = str(error)
    if not found.runs and not found.generated:
        raise UserError("; ".join(list(found.left_out.values())[:3]))
    return found


def read(path: Path) -> Tested:
    """A run; UserError, if it has no readable config."""
    run, missing = Run.open(path), []

    def attempt(read, *arguments):
        try:
            return read(*arguments)
        except UserError as error:
            missing.append(str(error))

    results = None
    if (path / "results.json").exists():
        results = attempt(_read_results, path / "results.json")
    else:
        missing.append(
            "no results.json: training has not ended, or was stopped; continue with "
            "train.py --resume and the flags that started it"
        )
    log = attempt(_read_log, path / "log.jsonl") or []
    if not log and (path / "log.jsonl").exists():
        missing.append(f"{path}/log.jsonl has no readable line")
    record = attempt(kept, path, run.config)
    if record is None:
        missing.append("no data.json of this run: it is unknown which pictures were used")
    return Tested(run, results, log, record, missing)


PARTS = ("base", "novel", "all")
# Keys read from results.json, in addition to those of grids; earlier versions lack some.
_CLASS = {"accuracy": float | None, "f1": float | None}
_PART = {"images": int, "interval95": float}
_PART |= dict.fromkeys(("top1", "top5", "macro_accuracy", "macro_f1"), float)
_COST = dict.fromkeys(("parameters", "steps", "val_images"), int)
_COST |= dict.fromkeys(("seconds", "peak_memory_mb"), float)
_COST |= {"val": float | None, "train": float | None, "parts": dict[str, dict]}
_COST |= {"synthetic": {"images": int, "attempts": int}}


def _read_results(file: Path) -> dict:
    results = read_results(file)
    expect(results, {key: kind for key, kind in _COST.items() if key in results}, str(file))
    for part, of in results.get("parts", {}).items():
        if part not in PARTS:
            raise UserError(f"{file}: parts.{part} is unknown, expected {', '.join(PARTS)}")
        kinds = {key: kind for key, kind in _PART.items() if key in of}
        expect(of, kinds, str(file), f"parts.{part}")
        if isinstance(classes := of.get("classes"), dict):  # a list, if labelled jointly
            expect(classes, dict[str, _CLASS], str(file), f"parts.{part}.classes")
        if "interval95" in of:
            expect(results, {part: float}, str(file))
        if {"images", "top1"} & of.keys() and not 0 <= of.get("top1", -1) <= 100:
            raise UserError(f"{file}: parts.{part}.top1 is not an accuracy, expected 0 to 100")
        if "top1" in of and of.get("images", 0) < 1:
            raise UserError(f"{file}: parts.{part}.images is no count, expected 1 or more")
    return results


def _read_log(file: Path) -> list[dict]:
    log = read_json_lines(file, LOGGED)
    for number, line in enumerate(log, 1):
        for key in ("val", "train"):
            expect(line.get(key, 0.0), float, f"{file}, line {number}", key)
    return log


def _places(path: Path, found: Found) -> list[Path]:
    """The folders at or below `path` that hold a run or generated images.

    A replaced run (NAME.old1) and the points of a grid (grid1) do not count as runs.
    """
    if not path.is_dir():
        reason = "is a file, expected a folder" if path.exists() else "there is no such folder"
        found.left_out[str(path)] = f"{path}: {reason}; give a run, or a folder of runs"
        return []
    if _is_place(path):
        return [path]
    places, before = [], len(found.left_out)
    for here, folders, files in os.walk(path):
        folders.sort()
        if _is_place(Path(here)):
            folders.clear()
            places.append(Path(here))
            continue
        if {"log.jsonl", "results.json", "adapter.safetensors", "manifest.jsonl"} & {*files}:
            found.left_out[here] = f"{here}: has no config.json, so it is not a run"
            folders.clear()
        folders[:] = [name for name in folders if not re.search(r"\.old\d+$", name)]
    if not places and len(found.left_out) == before:
        found.left_out[str(path)] = (
            f"{path}: contains neither runs (config.json) nor generated images (settings.json); "
            "give the folder of a run"
        )
    return places


def _is_place(path: Path) -> bool:
    generated = (path / "settings.json").exists() and (path / "plan.json").exists()
    return generated or (path / "config.json").exists()
