"""The folder a run leaves: everything needed to trust it, repeat it, resume it or use it.

    config.json          all settings, the command, versions, commit; the run it took the place of
    data.json            which pictures it learned from, chose by, was tested on (fewshot/record.py)
    log.jsonl            a line for each round of training: an epoch, or a share of the steps
    adapter.safetensors  what was learned (--keep: after which round), and nothing else
    resume.safetensors   all that the next round depends on (resume.json: its header, to read)
    results.json         base, novel, HM, zero-shot beside them, per class
    curves.png           loss and validation accuracy

Every file is written whole or not at all, so that a run killed at any moment can be resumed.
"""

import fcntl
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from clip_min import CLIP, UserError, weights
from clip_min.files import (
    read_json,
    read_safetensors,
    remove_half_written,
    write_json,
    write_safetensors,
    write_text,
)

# What every config has; versions and the command stand beside them.
KEYS = {
    "method": str,
    "recipe": str,
    "settings": dict,
    "experiment": dict,
    "model": str,
    "fingerprint": str,
    "classnames": dict,  # {"base", "novel"} or {"all"} -> names
}


_claimed: int | None = None  # the open folder of the run that this process writes


@dataclass
class Run:
    path: Path
    config: dict
    log: list[dict] = field(default_factory=list)

    @classmethod
    def start(cls, path: Path, config: dict) -> "Run":
        """A new run; one that stands in its place already is kept, under another name."""
        if path.exists():
            _claim(path)
            config = {**config, "earlier_run": set_aside(path, "run").name}
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"{path}: could not be made ({error}); choose another place with --out"
            ) from None
        _claim(path)
        run = cls(path, config)
        run.write_json("config.json", config)
        return run

    @classmethod
    def resume(cls, path: Path, config: dict) -> "Run":
        """Go on with the run at `path`, which must have been started with the same settings."""
        if not (path / "config.json").exists():
            raise UserError(
                f"--resume: {path}/config.json: there is no such file, so no run was begun there; "
                "give the flags it had, or start it without --resume"
            )
        run = cls(path, _read_config(path))
        for key, value in config.items():
            told = key not in ("argv", "versions", "commit")
            told &= key != "data" or key in run.config  # earlier versions kept none
            if told and run.config.get(key) != value:
                difference = _difference(key, run.config.get(key), value)
                raise UserError(
                    f"--resume: {path} was started with {difference}; "
                    "give the same flags, or start anew without --resume"
                )
        _claim(path)
        remove_half_written(path)
        log = path / "log.jsonl"
        if log.exists():
            try:
                run.log = [json.loads(line) for line in log.read_text().splitlines()]
            except ValueError as error:
                raise UserError(f"{log}: a line cannot be read as JSON ({error})") from None
        return run

    @classmethod
    def open(cls, path: Path) -> "Run":
        """A run that is there, to read; UserError if `path` is none."""
        config = _read_config(path)
        here = f"{path}/config.json: not a config of a run"
        if odd := [key for key, kind in KEYS.items() if not isinstance(config[key], kind)]:
            raise UserError(f"{here}, {odd[0]} is {config[odd[0]]!r}")
        if not config["classnames"].keys() & {"base", "all"}:
            raise UserError(f"{here}, classnames has neither base nor all")
        return cls(path, config)

    @property
    def template(self) -> str:
        return self.config["experiment"]["template"]

    @property
    def learned(self) -> list[str]:
        """The names of the classes it learned from."""
        parts = self.config["classnames"]
        return parts.get("base") or parts["all"]

    def check_model(self, clip: CLIP) -> None:
        """UserError, if this is not the CLIP it was trained on."""
        found, made = weights.fingerprint(clip), self.config["fingerprint"]
        if found != made:
            raise UserError(
                f"{self.path}: was trained on {self.config['model']} with fingerprint {made}, but "
                f"the model here has {found}; give the right one with --model"
            )

    def write_json(self, name: str, value: dict) -> None:
        write_json(self.path / name, value)

    def log_round(self, entry: dict) -> None:
        """Add a line to the log, in place of any later ones a killed run may have left."""
        self.log = [line for line in self.log if line["step"] < entry["step"]] + [entry]
        write_text(self.path / "log.jsonl", "".join(json.dumps(line) + "\n" for line in self.log))

    def save_adapter(self, state: dict[str, Tensor]) -> None:
        """Write what was learned, and in the header by which method, on which model."""
        made = {key: self.config[key] for key in ("method", "model", "fingerprint")}
        # One entry: safetensors writes several in any order, and equal runs leave equal bytes.
        header = {"clip_min": json.dumps(made)}
        write_safetensors(self.path / "adapter.safetensors", state, header)

    def load_adapter(self) -> dict[str, Tensor]:
        file = self.path / "adapter.safetensors"
        if not file.exists():
            raise UserError(f"{file}: there is no such file; finish the run: train.py --resume")
        return read_safetensors(file)[0]

    def save_resume(self, tensors: dict[str, Tensor], position: dict) -> None:
        """One atomic file holds both, so that tensors and position cannot disagree."""
        text = json.dumps(position)
        write_safetensors(self.path / "resume.safetensors", tensors, {"position": text})
        self.write_json("resume.json", position)

    def load_resume(self) -> tuple[dict[str, Tensor], dict] | None:
        """What `save_resume` wrote; None if the run was killed before its first round ended."""
        if not (self.path / "resume.safetensors").exists():
            return None
        tensors, header = read_safetensors(self.path / "resume.safetensors")
        return tensors, json.loads(header["position"])


def set_aside(path: Path, what: str) -> Path:
    """Rename what stands where a new one is to be written -> its new place, which is printed."""
    n = 1
    while (old := path.with_name(f"{path.name}.old{n}")).exists():
        n += 1
    try:
        path.rename(old)
    except OSError as error:
        raise UserError(f"{path}: could not be set aside as {old} ({error})") from None
    print(f"an earlier {what} is kept as {old}")
    return old


def provenance() -> dict:
    """The command, the versions of what computes, and the commit of this code, if it has one."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("clip_min", "torchvision", "numpy", "pillow", "safetensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    try:
        here = Path(__file__).parent
        git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"argv": sys.argv, "versions": versions, "commit": commit}


def _read_config(path: Path) -> dict:
    config = read_json(path / "config.json", "a run folder has one")
    if missing := [key for key in KEYS if key not in config]:
        raise UserError(f"{path}/config.json: not a config of a run, {missing[0]} is missing")
    return config


def _claim(path: Path) -> None:
    """Keep other processes out of this folder until this one ends or goes on to another run.

    Two trainings in one folder would leave the config of one beside the adapter of the other. The
    system drops the lock when the process ends, however it ends.
    """
    global _claimed
    if _claimed is not None:
        os.close(_claimed)
        _claimed = None
    try:
        _claimed = os.open(path, os.O_RDONLY)
        fcntl.flock(_claimed, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{path}: another process is training there; wait for it, or choose another --out"
        ) from None
    except OSError:
        pass  # a file system without locks; or no folder, which the first write will say


def _difference(name: str, old, new) -> str:
    """The first setting that differs, for a message: "lr 0.002, not 0.001"."""
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(k for k in {**old, **new} if old.get(k) != new.get(k))
        return _difference(key, old.get(key), new.get(key))
    return f"{name} {old}, not {new}"
