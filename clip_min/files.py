"""Write files whole or not at all, and never with pickle; check what is read."""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_min.errors import UserError, first_line
from clip_min.typed import expect

# ------------------------------------------------------------------------------------------- write

# A file is written in a temporary folder such as .clip_min-config.json-x7_k2q9a, then renamed. A
# process that is killed leaves that folder behind. No other program uses such names.
HALF_WRITTEN = re.compile(r"\.clip_min-(.*)-[a-z0-9_]{8}", re.DOTALL)


def remove_half_written(folder: Path, name: str | None = None, age: float = 0) -> None:
    """Remove the temporary folders that killed processes left in `folder`: all, or those of the
    file `name`.

    age: seconds. Younger folders stay, as a living process may still be writing in them.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        match = HALF_WRITTEN.fullmatch(path.name)
        mine = match and (name is None or match[1] == name[:40])
        mine = mine and path.is_dir() and not path.is_symlink()
        if mine and (not age or time.time() - path.stat().st_mtime > age):
            shutil.rmtree(path, ignore_errors=True)


def _unwritten(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: could not be written ({error}); free space or choose another place; an earlier "
        "file of this name is intact"
    )


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[str]:
    """Yield a temporary name at which to write a file or make a folder. On success it is renamed to
    `path`, and a file is synced to disk.

    On any failure (a full disk, a kill) the earlier file stays as it was.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=path.parent, prefix=f".clip_min-{path.name[:40]}-", ignore_cleanup_errors=True
        ) as place:
            temporary = Path(place) / path.name  # the suffix names an image's format
            yield str(temporary)
            if temporary.is_file():
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
                os.umask(umask := os.umask(0))
                os.chmod(temporary, 0o666 & ~umask)  # some libraries write private files
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise _unwritten(path, error) from None


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder to fill. On success it is renamed to `path`, which must be new.

    On any failure nothing remains.
    """
    if Path(path).exists():
        raise UserError(f"{path}: exists already; choose another place")
    with replacing(path) as temporary:
        folder = Path(temporary)
        folder.mkdir()
        yield folder


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def append_line(path: Path, text: str) -> None:
    """Add a line to a file and sync it to disk. On failure the file stays as it was.

    A kill may leave part of the line, without its newline.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise _unwritten(path, error) from None


def write_json(path: str | Path, value: dict, **how) -> None:
    """how: as `json.dumps` takes it, where it is to be other than indented, in plain letters."""
    text = json.dumps(value, **{"indent": 2, "ensure_ascii": False, **how}) + "\n"
    with replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def write_safetensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    with replacing(path) as temporary:
        save_file(
            {n: t.detach().cpu().contiguous() for n, t in tensors.items()}, temporary, metadata
        )


# -------------------------------------------------------------------------------------------- read


def read_safetensors(
    path: str | Path, name: str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, or only the tensor `name`, and the strings of its header.

    The file is mapped into memory: a tensor that is not read takes none.
    """
    try:
        open(path, "rb").close()  # safetensors says "no such file" of every file it cannot open
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys() if name is None else [name]
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except MemoryError:
        raise
    except Exception as error:  # SafetensorError, or torch's for an unknown dtype
        raise UserError(
            f"{path}: not a complete safetensors file ({first_line(error)}); get it again"
        ) from None


def read_json(path: Path, hint: str, kind=dict) -> dict:
    """A JSON object of this kind (see typed.py).

    hint: what was expected, for the error if there is no such file.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows may add a mark
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; {hint}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # not UTF-8, or a name that no file can have
        raise UserError(f"{path}: cannot be read as JSON ({first_line(error)})") from None
    return parse_json(text, kind, str(path))


def read_json_lines(path: Path, kind=dict) -> list[dict]:
    """The objects of a file that has one a line; an empty list, if there is no file."""
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would split at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
    if not lines[-1]:
        lines.pop()
    return [parse_json(line, kind, f"{path}, line {n}") for n, line in enumerate(lines, 1)]


def parse_json(text: str, kind, where: str) -> dict:
    """JSON of this kind, with finite numbers and no key twice. where: what an error names."""
    try:
        value = json.loads(
            text, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_once
        )
    except RecursionError:
        raise UserError(f"{where}: cannot be read as JSON (it is nested too deeply)") from None
    except ValueError as error:
        raise UserError(f"{where}: cannot be read as JSON ({first_line(error)})") from None
    expect(value, kind, where)
    return value


def _once(pairs: list[tuple[str, object]]) -> dict:
    if len(value := dict(pairs)) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


def sha256_of(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_adapter(file: Path, config: dict) -> dict[str, Tensor]:
    """A run's learned tensors; UserError, if the file is not the one that config.json describes."""
    tensors, header = read_safetensors(file)
    made = parse_json(header.get("clip_min", "{}"), dict, f"{file}: its header")
    for key in ("method", "model", "fingerprint"):
        if key in made and made[key] != config.get(key):
            raise UserError(
                f"{file}: was made with {key} {made[key]!r:.100}, but config.json beside it says "
                f"{config.get(key)!r:.100}; put this run's own adapter there"
            )
    recorded = config.get("adapter_sha256")  # missing while a run trains, and in old runs
    if recorded is not None and sha256_of(file) != recorded:
        raise UserError(
            f"{file}: is not the adapter that this run saved, whose sha256 is in config.json; put "
            "that one back, or train again"
        )
    return tensors
