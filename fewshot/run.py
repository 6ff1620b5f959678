"""The folder a run leaves: everything needed to trust it, repeat it, resume it or use it.

    config.json          all settings, the command, versions, commit; the run it took the place of;
                         once it has ended, the sha256 of the adapter
    data.json            which pictures it learned from, chose by, was tested on (fewshot/record.py)
    log.jsonl            a line for each round of training: an epoch, or a share of the steps
    adapter.safetensors  what was learned (--keep: after which round), and nothing else
    resume.safetensors   all that the next round depends on (resume.json: its header, to read)
    results.json         base, novel, HM, also among all names, zero-shot beside them, per class
    predictions.safetensors  what these follow from: the five likeliest classes of each test picture
                         (fewshot/predictions.py)
    curves.png           loss and validation accuracy
    grid1/ …             with --grid: the same of each of its points, but results and curves
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

from clip_min import UserError
from clip_min.files import (
    append_line,
    parse_json,
    read_adapter,
    read_json,
    read_json_lines,
    read_safetensors,
    remove_half_written,
    sha256_of,
    write_json,
    write_safetensors,
    write_text,
)
from clip_min.typed import expect
from fewshot import cache, ranks

# What every config has; versions and the command stand beside them.
KEYS = {
    "method": str,
    "recipe": str,
    "settings": dict,
    "experiment": {"seed": int, "template": str, "model": str},
    "model": str,
    "fingerprint": str,
    "classnames": dict[str, list[str]],  # {"base", "novel"} or {"all"} -> names
}
LOGGED = {"step": int, "epoch": float, "loss": float, "seconds": float}  # and val, where judged
# What may differ when a run goes on: it says who computes, or, the last, what came out.
FREE = ("argv", "versions", "commit", "threads", "adapter_sha256")

_claimed: int | None = None  # the open folder of the run that this process writes


@dataclass
class Run:
    path: Path
    config: dict
    log: list[dict] = field(default_factory=list)
    learned_last: dict[str, Tensor] | None = field(default=None, repr=False)  # by this process

    @classmethod
    def start(cls, path: Path, config: dict) -> "Run":
        """A new run; one that stands in its place already is kept, under another name."""
        if ranks.rank == 0:  # who alone writes there
            if path.exists():
                _claim(path)
                remove_half_written(path)
                if not path.is_dir() or any(path.iterdir()):  # else killed before it wrote anything
                    config = {**config, "earlier_run": set_aside(path, "run").name}
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                why = f"{path}: could not be made ({error}); choose another place with --out"
                raise UserError(why) from None
            _claim(path)
            write_json(path / "config.json", config)
        if ranks.size > 1:
            ranks.wait()
        return cls(path, config)

    @classmethod
    def resume(cls, path: Path, config: dict) -> "Run":
        """Go on with the run at `path`, which must have been started with the same settings."""
        if not (path / "config.json").exists():
            raise UserError(
                f"--resume: {path}/config.json: there is no such file, so no run was begun there; "
                "give the flags it had, or start it without --resume"
            )
        run = cls(path, _read_config(path, dict.fromkeys(KEYS, object)))  # compared just below
        config = json.loads(json.dumps(config))  # as it is read back: tuples are lists
        if isinstance(settings := run.config.get("settings"), dict):  # an older run lacks new ones
            run.config["settings"] = dict.fromkeys(config["settings"]) | settings
        for key, value in config.items():
            told = key not in FREE and (key != "data" or key in run.config)  # none in old ones
            if told and run.config.get(key) != value:
                difference = _difference(key, run.config.get(key), value)
                raise UserError(
                    f"--resume: {path} was started with {difference}; "
                    "give the same flags, or start anew without --resume"
                )
        if ranks.rank == 0:
            _claim(path)
        run._go_on()
        run._note_other_bits(config)
        return run

    def part(self, name: str, settings: dict) -> "Run":
        """A run in this one's folder, as it was left or new: of one point of a grid of settings."""
        run = Run(self.path / name, {**self.config, "settings": settings})
        run.config.pop("adapter_sha256", None)
        run.path.mkdir(exist_ok=True)
        write_json(run.path / "config.json", run.config)
        run._go_on()
        return run

    def _go_on(self) -> None:
        """Clear what a kill left half written, also of the log's last line, and read the log."""
        log = self.path / "log.jsonl"
        if ranks.rank == 0:
            remove_half_written(self.path)
            if log.exists() and (half := log.read_bytes().rpartition(b"\n")[2]):
                os.truncate(log, log.stat().st_size - len(half))
        ranks.wait()
        judged = {"val": float} if "val" in next(iter(read_json_lines(log)), {}) else {}
        self.log = read_json_lines(log, LOGGED | judged)

    def _note_other_bits(self, config: dict) -> None:
        """Say so, where what computes is not what computed the first part of this run."""

        def described(config: dict) -> str:
            return f"torch {config['versions'].get('torch')}, {config.get('threads')} threads"

        try:
            before, now = described(self.config), described(config)
        except (KeyError, AttributeError):  # an old config
            return
        if before != now:
            print(
                f"note: this run was begun with {before}, and goes on with {now}: its last bits "
                "may differ from those of a run in one go"
            )

    @classmethod
    def open(cls, path: Path) -> "Run":
        """A run that is there, to read; UserError if `path` is none."""
        config = _read_config(path, KEYS)
        if not config["classnames"].keys() & {"base", "all"}:
            raise UserError(
                f"{path}/config.json: not a config of a run, classnames has neither base nor all"
            )
        return cls(path, config)

    @property
    def template(self) -> str:
        return self.config["experiment"]["template"]

    @property
    def learned(self) -> list[str]:
        """The names of the classes it learned from."""
        parts = self.config["classnames"]
        return parts.get("base") or parts["all"]

    def check_model(self, found: str) -> None:
        """UserError, if this is not the fingerprint of the CLIP it was trained on."""
        made = self.config["fingerprint"]
        if found != made:
            raise UserError(
                f"{self.path}: was trained on {self.config['model']} with fingerprint {made}, but "
                f"the model here has {found}; give the right one with --model"
            )

    @ranks.by_first
    def write_json(self, name: str, value: dict) -> None:
        self._check_folder()
        write_json(self.path / name, value)

    @ranks.by_first
    def write_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        self._check_folder()
        write_safetensors(self.path / name, tensors)

    def log_round(self, entry: dict) -> None:
        """Add a line to the log, in place of any later ones a killed run may have left."""
        log, lines = self.path / "log.jsonl", len(self.log)
        while self.log and self.log[-1]["step"] >= entry["step"]:
            self.log.pop()
        if ranks.rank == 0:
            self._check_folder()
            if len(self.log) < lines:
                write_text(log, "".join(json.dumps(line) + "\n" for line in self.log))
            append_line(log, json.dumps(entry))
        self.log.append(entry)

    def save_adapter(self, state: dict[str, Tensor], last: bool = False) -> None:
        """Write what was learned, and in the header by which method, on which model.

        last: it will not change any more, and config.json is to vouch for it.
        """
        for name, tensor in state.items():
            if not tensor.isfinite().all():
                raise UserError(
                    f"{self.path}: training gave numbers that are not finite ({name}), which are "
                    "not kept; lower --lr, or what else makes them grow"
                )
        self.learned_last = state
        if ranks.rank:
            return
        self._check_folder()
        if self.config.pop("adapter_sha256", None):  # of an earlier one: for now, none is vouched
            self.write_json("config.json", self.config)
        self._write_adapter(self.path / "adapter.safetensors")
        if last:
            self.config["adapter_sha256"] = sha256_of(self.path / "adapter.safetensors")
            self.write_json("config.json", self.config)

    def _write_adapter(self, file: Path) -> None:
        made = {key: self.config[key] for key in ("method", "model", "fingerprint")}
        # One entry: safetensors writes several in any order, and equal runs leave equal bytes.
        write_safetensors(file, self.learned_last, {"clip_min": json.dumps(made)})

    def _check_folder(self) -> None:
        """UserError if the folder is no longer there; what was learned is then kept beside it."""
        if (self.path / "config.json").exists():
            return
        kept = "nothing was learned yet"
        if self.learned_last is not None:
            beside = self.path.with_name(f"{self.path.name}.rescued.safetensors")
            self._write_adapter(beside)
            kept = f"what was learned until now is kept as {beside}"
        raise UserError(
            f"{self.path}: is no longer there; it was deleted or moved while this run, which ends "
            f"here, trained; {kept}"
        )

    def load_adapter(self) -> dict[str, Tensor]:
        file = self.path / "adapter.safetensors"
        if not file.exists():
            raise UserError(f"{file}: there is no such file; finish the run: train.py --resume")
        return read_adapter(file, self.config)

    @ranks.by_first
    def save_resume(self, tensors: dict[str, Tensor], position: dict) -> None:
        """One atomic file holds both, so that tensors and position cannot disagree."""
        self._check_folder()
        text = json.dumps({**position, "check": _checksum(tensors, position)})
        write_safetensors(self.path / "resume.safetensors", tensors, {"position": text})
        self.write_json("resume.json", position)

    def load_resume(self, like: dict | None = None) -> tuple[dict[str, Tensor], dict] | None:
        """What `save_resume` wrote; None if the run was killed before its first round ended.

        like: a position; the saved one has its keys and the types of its values.
        """
        file = self.path / "resume.safetensors"
        if not file.exists():
            return None
        tensors, header = read_safetensors(file)
        where = f"{file}: its position"
        position = parse_json(header.get("position", "{}"), dict, where)
        check = position.pop("check", None)  # none in those of before it was written
        if check is not None and check != _checksum(tensors, position):
            raise UserError(
                f"{file}: is damaged: its checksum is not that of its content; start the run anew, "
                "without --resume"
            )
        expect(position, {key: type(value) for key, value in (like or {}).items()}, where)
        self.write_json("resume.json", position)  # a kill may have come between the two
        return tensors, position


def _checksum(tensors: dict[str, Tensor], position: dict) -> str:
    """A checksum of all that a run goes on from."""
    parts = [(n, str(tensors[n].dtype), tensors[n]) for n in sorted(tensors)]
    return cache.key(json.dumps(position, sort_keys=True), *(x for part in parts for x in part))


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
    threads = torch.get_num_threads()  # sums are split among them, so the last bits follow
    return {"argv": sys.argv, "versions": versions, "commit": commit, "threads": threads}


def _read_config(path: Path, kind: dict) -> dict:
    config = read_json(path / "config.json", "a run folder has one", kind)
    settings = config.get("settings")
    if isinstance(settings, dict) and isinstance(settings.get("templates"), str):
        settings["templates"] = [t for t in settings["templates"].split("|") if t]  # older runs
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
    return f"{name} {old!s:.200}, not {new!s:.200}"
