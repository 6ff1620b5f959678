"""A cache on disk for decoded pixels and image features.

A file's name is a hash of everything that its content depends on, so a stale file is never read. A
file is written whole or not at all, and has a checksum: a damaged one counts as missing. All files
together take at most 10 GB, or --cache-gb.
"""

import contextlib
import hashlib
import itertools
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from clip_min import UserError
from clip_min.files import read_safetensors, remove_half_written, write_safetensors

KINDS = ("pixels", "hashes", "odd", "features")
limit = 10e9  # largest size in bytes; see `chosen`


@dataclass
class Flags:
    """The flags for the cache, of the scripts that read pictures."""

    cache: Annotated[
        str, "folder for decoded pixels and image features, or none [~/.cache/clip_min]"
    ] = ""
    cache_gb: Annotated[
        float,
        "largest size of the cache: the least recently used files are removed; also the limit for "
        "encoded images in memory",
    ] = 10


def chosen(given: dict) -> Path | None:
    """The cache's folder: --cache, or CLIP_MIN_CACHE, or ~/.cache/clip_min; "none" turns it off.

    The folder can be removed at any time. Also sets its largest size, --cache-gb.
    """
    global limit
    if not 0 <= (gb := given.get("cache_gb", 10)) < float("inf"):
        raise UserError(f"--cache-gb {gb}: expected 0 or more")
    limit = gb * 1e9
    text = given.get("cache") or os.environ.get("CLIP_MIN_CACHE", "")
    if text == "none":
        return None
    return Path(text).expanduser() if text else Path.home() / ".cache" / "clip_min"


FOLDER = chosen({})


def key(*parts) -> str:
    """A name computed from `parts`: tensors, and anything whose repr shows its value."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            flat = part.detach().cpu().contiguous().view(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
            digest.update(repr(part.shape).encode())
        else:
            digest.update(repr(part).encode() + b";")
    return digest.hexdigest()[:32]


def load(folder: Path | None, kind: str, name: str) -> Tensor | None:
    """The tensor stored as `name`; None, if it is missing or damaged."""
    if folder is None:
        return None
    path = folder / kind / f"{name}.safetensors"
    try:
        tensors, header = read_safetensors(path)
    except UserError:
        return None
    tensor = tensors.get(kind)
    if tensor is None or header.get("check") != key(tensor):
        return None
    with contextlib.suppress(OSError):  # the cache may be read-only
        os.utime(path)  # used now: see `_prune`
    return tensor


def save(folder: Path | None, kind: str, name: str, tensor: Tensor) -> None:
    """Store a tensor. If that fails (a full disk), the next run only takes longer."""
    if folder is None:
        return
    try:
        path = folder / kind / f"{name}.safetensors"
        write_safetensors(path, {kind: tensor}, {"check": key(tensor)})
    except UserError:
        return
    _prune(folder)


class Spool:
    """Crops of pictures on disk for a single run, so that each picture is decoded once.

    The file is in the cache's folder without a name, so it vanishes with the process. It takes at
    most --cache-gb, and half of the free disk space. Threads may write and read it at once.
    """

    def __init__(self, folder: Path | None, size: int):
        self.shape, self.bytes = (3, size, size), 3 * size * size
        self.places: dict[str, int] = {}  # sha256 of a picture's file -> index of its crop
        self.file, self.next, self.most = None, itertools.count(), 0
        with contextlib.suppress(OSError):  # without it, a picture is decoded again
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open for the run
                self.most = min(limit, shutil.disk_usage(folder).free / 2) // self.bytes  # crops

    def put(self, digest: str, crop: Tensor) -> None:
        """Store a crop, uint8 (3, size, size), if there is room."""
        new = digest and digest not in self.places
        if new and (place := next(self.next)) < self.most:
            with contextlib.suppress(OSError):
                content = crop.numpy().data
                if os.pwrite(self.file.fileno(), content, place * self.bytes) == self.bytes:
                    self.places[digest] = place  # else the disk is full

    def get(self, digest: str) -> Tensor | None:
        """The crop of the picture whose file has this sha256; None, if it was not stored."""
        if digest not in self.places:
            return None
        content = os.pread(self.file.fileno(), self.bytes, self.places[digest] * self.bytes)
        return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(self.shape)


def _prune(folder: Path) -> None:
    """Remove the least recently used files until the rest is small enough.

    Only files and folders with our own names are touched: there may be others.
    """
    files = []
    with contextlib.suppress(OSError):  # another process has removed one
        for kind in KINDS:
            remove_half_written(folder / kind, age=86_400)  # a day: no write takes so long
    for path in (path for kind in KINDS for path in (folder / kind).glob("*.safetensors")):
        with contextlib.suppress(OSError):  # another process has removed it
            if re.fullmatch("[0-9a-f]{32}", path.stem) and not path.is_symlink():
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    size = sum(count for _, count, _ in files)
    for _, count, path in sorted(files):
        if size <= limit:
            break
        with contextlib.suppress(OSError):
            path.unlink()
        size -= count
