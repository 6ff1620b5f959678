"""Files that are written whole or not at all, and never with pickle; and read as what they are."""

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

# The folder in which a file is made before it takes its name: .clip_min-config.json-x7_k2q9a. A
# process that is killed leaves it behind; nobody else's file is called so.
HALF_WRITTEN = re.compile(r"\.clip_min-(.*)-[a-z0-9_]{8}", re.DOTALL)


def remove_half_written(folder: Path, name: str | None = None, age: float = 0) -> None:
    """Remove what killed processes left in `folder`, of every file or of the one of this name.

    age: seconds; what is younger stays, where a process that lives may be writing it.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        match = HALF_WRITTEN.fullmatch(path.name)
        mine = match and (name is None or match[1] == name[:40])
        mine = mine and path.is_dir() and not path.is_symlink()
        if mine and (not age or time.time() - path.stat().st_mtime > age):
            shutil.rmtree(path, ignore_errors=True)


def _unwritten(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: could not be written ({error}); free space or choose another place; any earlier "
        "file is intact"
    )


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[str]:
    """Write a file to the temporary name this yields, or make a folder there; on success it becomes
    `path`, a file synced to disk.

    On any failure (a full disk, a kill) the earlier file stays as it was.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=path.parent, prefix=f".clip_min-{path.name[:40]}-", ignore_cleanup_errors=True
        ) as place:
            temporary = Path(place) / path.name  # its ending tells savers of pictures the format
            yield str(temporary)
            if temporary.is_file():
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
                os.umask(umask := os.umask(0))
                os.chmod(temporary, 0o666 & ~umask)  # as any new file: some savers' are private
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise _unwritten(path, error) from None


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Fill the temporary folder this yields; on success it becomes `path`, which must be new.

    On any failure nothing of it remains.
    """
    if Path(path).exists():
        raise UserError(f"{path}: is there already; choose another place")
    with replacing(path) as temporary:
        folder = Path(temporary)
        folder.mkdir()
        yield folder


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def append_line(path: Path, text: str) -> None:
    """Add a line to a file, synced to disk; where that fails, the file stays as it was.

    A kill may leave half of the line, which then lacks its end.
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


def write_json(path: str | Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


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
    """The tensors of a safetensors file, or the one of this name, and the strings of its header.

    They lie in the file, mapped into memory: what is not looked at takes none.
    """
    try:
        open(path, "rb").close()  # safetensors calls all that it cannot open "no such file"
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
    except Exception as error:  # SafetensorError, and torch's where it lacks a type of numbers
        raise UserError(
            f"{path}: not a whole safetensors file ({first_line(error)}); get it again"
        ) from None


def read_json(path: Path, hint: str, kind=dict) -> dict:
    """A JSON object of this kind (see typed.py).

    hint: says, where there is no such file, what was expected.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; {hint}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as JSON ({first_line(error)})") from None
    return parse_json(text, kind, str(path))


def read_json_lines(path: Path, kind=dict) -> list[dict]:
    """The objects of a file of one a line; none where there is no file."""
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not at U+2028, as splitlines does
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
    if not lines[-1]:
        lines.pop()
    return [parse_json(line, kind, f"{path}, line {n}") for n, line in enumerate(lines, 1)]


def parse_json(text: str, kind, where: str) -> dict:
    """JSON of this kind, whose numbers are all finite and whose keys stand once. where: what to
    name in an error.
    """
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
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value


def sha256_of(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_adapter(file: Path, config: dict) -> dict[str, Tensor]:
    """What a run learned; UserError unless it is that of the run whose config.json this is."""
    tensors, header = read_safetensors(file)
    made = parse_json(header.get("clip_min", "{}"), dict, f"{file}: its header")
    for key in ("method", "model", "fingerprint"):
        if key in made and made[key] != config.get(key):
            raise UserError(
                f"{file}: is of {key} {made[key]!r:.100}, but config.json beside it says "
                f"{config.get(key)!r:.100}; put this run's own adapter there"
            )
    recorded = config.get("adapter_sha256")  # none in a run that has not ended, or an old one
    if recorded is not None and sha256_of(file) != recorded:
        raise UserError(
            f"{file}: is not the adapter that this training ended with, whose sha256 is in "
            "config.json; put that one back, or train again"
        )
    return tensors
