"""Files that are written whole or not at all, and never with pickle."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_min.errors import UserError

# The temporary files of `replacing`: what a process killed while it was writing leaves behind.
HALF_WRITTEN = ".*.????????.*"


def remove_half_written(folder: Path) -> None:
    """Remove what a killed process left anywhere below `folder`: our temporary files, and those
    that safetensors makes while it writes one (".tmpnRT2eS").
    """
    for pattern in (HALF_WRITTEN, ".tmp??????"):
        for path in folder.rglob(pattern):
            path.unlink()


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[str]:
    """Write to the temporary name this yields; on success it becomes `path`, synced to disk.

    On any failure (a full disk, a kill) the earlier file stays as it was.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The ending stays, because savers of pictures choose the format by it.
        descriptor, temporary = tempfile.mkstemp(path.suffix, f".{path.stem[:40]}.", path.parent)
        os.close(descriptor)
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.umask(umask := os.umask(0))
            os.chmod(temporary, 0o666 & ~umask)  # as any new file: mkstemp's is its owner's alone
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: could not be written ({error}); free space or choose another place; "
            "any earlier file is intact"
        ) from None


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Fill the temporary folder this yields; on success it becomes `path`, which must be new.

    On any failure nothing of it remains.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path}: is there already; choose another place")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
            folder = Path(temporary) / path.name  # a folder in it, since it is for its owner alone
            folder.mkdir()
            yield folder
            folder.rename(path)
    except OSError as error:
        raise UserError(
            f"{path}: could not be written ({error}); free space or choose another place"
        ) from None


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_safetensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    with replacing(path) as temporary:
        save_file(
            {n: t.detach().cpu().contiguous() for n, t in tensors.items()}, temporary, metadata
        )


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and the strings of its header."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); get it again") from None


def read_json(path: Path, hint: str) -> dict:
    """A JSON object; `hint` says, where there is no such file, what was expected."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; {hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value
