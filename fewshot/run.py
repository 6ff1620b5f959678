"""The folder of a run: everything to check, repeat, resume or use it.

    config.json          all settings, the command, versions, commit; the run that it replaced; at
                         the end, the sha256 of the adapter
    data.json            the training, validation and test pictures (fewshot/record.py)
    log.jsonl            a line for each round of training: an epoch, or a share of the steps
    adapter.safetensors  the learned tensors (--keep: after which round), and nothing else
    resume.safetensors   everything that the next round depends on (resume.json: its header)
    results.json         base, novel, HM, also among all names and of zero-shot CLIP, per class
    predictions.safetensors  the five likeliest classes of each test picture, from which results
                         are computed (fewshot/predictions.py)
    curves.png           loss and validation accuracy
    grid1/ …             with --grid: a run for each point, without results and curves
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
from clip_min.errors import some
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

# Keys of every config, besides versions and the command.
KEYS = {
    "method": str,
    "recipe": str,
    "settings": dict,
    "experiment": {"seed": int, "shots": int | str, "template": str, "model": str},
    "model": str,
    "fingerprint": str,
    "classnames": dict[str, list[str]],  # {"base", "novel"} or {"all"} -> names
}
# Keys that only a page about a run reads; old runs lack some.
READ = {"argv": list, "versions": dict, "commit": str | None}
LOGGED = {"step": int, "epoch": float, "loss": float, "seconds": float}  # and val, where judged
# Keys that may differ when a run resumes: who computes, and (the last) the result.
FREE = ("argv", "versions", "commit", "threads", "adapter_sha256")

_claimed: int | None = None  # the open folder of this process's run


@dataclass
class Run:
    path: Path
    config: dict
    log: list[dict] = field(default_factory=list)
    learned_last: dict[str, Tensor] | None = field(default=None, repr=False)  # by this process

    @classmethod
    def start(cls, path: Path, config: dict) -> "Run":
        """Start a new run; an earlier run in its folder is renamed."""
        if ranks.rank == 0:  # only rank 0 writes
            if path.exists():
                claim(path)
                remove_half_written(path)
                if not path.is_dir() or any(path.iterdir()):  # else killed before any write
                    config = {**config, "earlier_run": set_aside(path, "run").name}
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                why = f"{path}: could not be created ({error}); choose another place with --out"
                raise UserError(why) from None
            claim(path)
            write_json(path / "config.json", config)
        if ranks.size > 1:
            ranks.wait()
        return cls(path, config)

    @classmethod
    def resume(cls, path: Path, config: dict) -> "Run":
        """Resume the run at `path`, which must have been started with the same settings."""
        if not (path / "config.json").exists():
            raise UserError(
                f"--resume: {path}/config.json: there is no such file, so there is no run; give "
                "the flags of the run, or start a new one without --resume"
            )
        run = cls(path, _read_config(path, dict.fromkeys(KEYS, object)))  # compared below
        config = json.loads(json.dumps(config))  # as after reading: tuples become lists
        if isinstance(settings := run.config.get("settings"), dict):  # an older run lacks some
            run.config["settings"] = dict.fromkeys(config["settings"]) | settings
        for key, value in config.items():
            told = key not in FREE and (key != "data" or key in run.config)  # missing in old runs
            if told and run.config.get(key) != value:
                difference = _difference(key, run.config.get(key), value)
                raise UserError(
                    f"--resume: {path} was started with {difference}; "
                    "give the same flags, or start a new run without --resume"
                )
        if ranks.rank == 0:
            claim(path)
        run._go_on()
        run._note_other_bits(config)
        return run

    def part(self, name: str, settings: dict) -> "Run":
        """The run of a grid's point in this run's folder, resumed or new."""
        run = Run(self.path / name, {**self.config, "settings": settings})
        run.config.pop("adapter_sha256", None)
        run.path.mkdir(exist_ok=True)
        write_json(run.path / "config.json", run.config)
        run._go_on()
        return run

    def _go_on(self) -> None:
        """Remove half-written files of a kill, and a half-written last line, and read the log."""
        log = self.path / "log.jsonl"
        if ranks.rank == 0:
            remove_half_written(self.path)
            if log.exists() and (half := log.read_bytes().rpartition(b"\n")[2]):
                os.truncate(log, log.stat().st_size - len(half))
        ranks.wait()
        judged = {"val": float} if "val" in next(iter(read_json_lines(log)), {}) else {}
        self.log = read_json_lines(log, LOGGED | judged)

    def _note_other_bits(self, config: dict) -> None:
        """Print a note, if torch is not the version of the first part of this run."""
        try:
            before, now = (of["versions"].get("torch") for of in (self.config, config))
        except (KeyError, AttributeError):  # an old config
            return
        if before != now:
            print(
                f"note: this run was started with torch {before}, and continues with torch {now}: "
                "its last bits may differ from those of an uninterrupted run"
            )

    @classmethod
    def open(cls, path: Path) -> "Run":
        """An existing run, to read; UserError, if there is none at `path`."""
        config, file = _read_config(path, KEYS), f"{path}/config.json"
        expect(config, {key: kind for key, kind in READ.items() if key in config}, file)
        expect(config["experiment"].get("image_size", 0), int, file, "experiment.image_size")
        names = config["classnames"]
        if {*names} not in ({"base", "novel"}, {"base"}, {"all"}) or not all(names.values()):
            raise UserError(
                f"{file}: classnames has {some(names) or 'nothing'}, expected names of base and "
                "novel classes, or of all; it is not a config of a run"
            )
        return cls(path, config)

    @property
    def template(self) -> str:
        return self.config["experiment"]["template"]

    @property
    def learned(self) -> list[str]:
        """The names of the learned classes."""
        parts = self.config["classnames"]
        return parts.get("base") or parts["all"]

    def check_model(self, found: str) -> None:
        """UserError, if the run was trained on a CLIP with another fingerprint."""
        if found != (made := self.config["fingerprint"]):
            raise UserError(
                f"{self.path}: was trained on {self.config['model']} with fingerprint {made}, but "
                f"this model has {found}; give the right model with --model"
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
        """Add a line to the log, and remove later lines that a killed run may have left."""
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
        """Write the learned tensors, with method and model in the header.

        last: the adapter is final, so its sha256 is written to config.json.
        """
        for name, tensor in state.items():
            if not tensor.isfinite().all():
                raise UserError(
                    f"{self.path}: training gave numbers that are not finite ({name}), which are "
                    "not saved; lower --lr"
                )
        self.learned_last = state
        if ranks.rank:
            return
        self._check_folder()
        if self.config.pop("adapter_sha256", None):  # of an earlier adapter
            self.write_json("config.json", self.config)
        self._write_adapter(self.path / "adapter.safetensors")
        if last:
            self.config["adapter_sha256"] = sha256_of(self.path / "adapter.safetensors")
            self.write_json("config.json", self.config)

    def _write_adapter(self, file: Path) -> None:
        made = {key: self.config[key] for key in ("method", "model", "fingerprint")}
        # One entry: safetensors writes several in any order, but equal runs must give equal bytes.
        write_safetensors(file, self.learned_last, {"clip_min": json.dumps(made)})

    def _check_folder(self) -> None:
        """UserError, if the folder is gone; the learned tensors are then saved beside it."""
        if (self.path / "config.json").exists():
            return
        kept = "nothing was learned yet"
        if self.learned_last is not None:
            beside = self.path.with_name(f"{self.path.name}.rescued.safetensors")
            self._write_adapter(beside)
            kept = f"the learned tensors are saved as {beside}"
        raise UserError(
            f"{self.path}: was deleted or moved during training, so the run ends here; {kept}"
        )

    def load_adapter(self) -> dict[str, Tensor]:
        file = self.path / "adapter.safetensors"
        if not file.exists():
            raise UserError(f"{file}: there is no such file; finish the run: train.py --resume")
        return read_adapter(file, self.config)

    @ranks.by_first
    def save_resume(self, tensors: dict[str, Tensor], position: dict) -> None:
        """Write both to a single file, so that tensors and position always agree."""
        self._check_folder()
        text = json.dumps({**position, "check": _checksum(tensors, position)})
        write_safetensors(self.path / "resume.safetensors", tensors, {"position": text})
        self.write_json("resume.json", position)

    def load_resume(self, like: dict) -> tuple[dict[str, Tensor], dict] | None:
        """The data of `save_resume`; None, if the run was killed in its first round.

        like: a position; the saved one must have its keys and types.
        """
        file = self.path / "resume.safetensors"
        if not file.exists():
            return None
        tensors, header = read_safetensors(file)
        where = f"{file}: its position"
        position = parse_json(header.get("position", "{}"), dict, where)
        check = position.pop("check", None)  # missing in older files
        if check is not None and check != _checksum(tensors, position):
            raise UserError(
                f"{file}: is damaged: its checksum is wrong; start the run again, without --resume"
            )
        expect(position, {key: type(value) for key, value in like.items()}, where)
        self.write_json("resume.json", position)  # a kill may have left an older one
        return tensors, position


def _checksum(tensors: dict[str, Tensor], position: dict) -> str:
    """A checksum of all data for resuming."""
    parts = [(n, str(tensors[n].dtype), tensors[n]) for n in sorted(tensors)]
    return cache.key(json.dumps(position, sort_keys=True), *(x for part in parts for x in part))


def set_aside(path: Path, what: str) -> Path:
    """Rename an existing file or folder to make room -> its new name, which is printed."""
    n = 1
    while (old := path.with_name(f"{path.name}.old{n}")).exists():
        n += 1
    try:
        path.rename(old)
    except OSError as error:
        raise UserError(f"{path}: could not be renamed to {old} ({error})") from None
    print(f"an earlier {what} is kept as {old}")
    return old


def provenance() -> dict:
    """The command, the versions, and the commit of this code, if it has one."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("clip_min", "torchvision", "numpy", "pillow", "safetensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    try:
        git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    threads = torch.get_num_threads()  # the last bits of sums depend on it
    return {"argv": sys.argv, "versions": versions, "commit": commit, "threads": threads}


def _read_config(path: Path, kind: dict) -> dict:
    config = read_json(path / "config.json", "expected a run folder", kind)
    settings = config.get("settings")
    if isinstance(settings, dict) and isinstance(settings.get("templates"), str):
        settings["templates"] = [t for t in settings["templates"].split("|") if t]  # older runs
    return config


def claim(path: Path, doing: str = "training") -> None:
    """Lock this folder until this process ends or claims another.

    Two trainings in one folder could leave the config of one beside the adapter of the other. The
    system removes the lock when the process ends for any reason.
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
            f"{path}: another process is {doing} there; wait for it, or choose another --out"
        ) from None
    except OSError:
        pass  # a file system without locks; or no folder, an error at the first write


def _difference(name: str, old, new) -> str:
    """The first difference, for an error: "lr 0.002, not 0.001"."""
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(k for k in {**old, **new} if k not in old or k not in new or old[k] != new[k])
        return _difference(key, old.get(key), new.get(key))
    return f"{name} {old!s:.200}, not {new!s:.200}"
