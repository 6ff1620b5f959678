"""Tensors kept on disk between runs: decoded pixels, image features.

A file is named by a hash of everything its content follows from, so a stale one is never looked at;
it is written whole or not at all; and it carries a checksum, so a damaged one counts as absent.
"""

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from clip_min import UserError
from clip_min.files import read_safetensors, write_safetensors


def place(flag: str = "") -> Path | None:
    """The cache's folder: as --cache says, else CLIP_MIN_CACHE, else ~/.cache/clip_min.

    "none" is nowhere. Nothing in it is needed: it may be removed at any time.
    """
    text = flag or os.environ.get("CLIP_MIN_CACHE", "")
    if text == "none":
        return None
    return Path(text).expanduser() if text else Path.home() / ".cache" / "clip_min"


FOLDER = place()
HELP = "folder that keeps decoded pixels and image features, or none [~/.cache/clip_min]"


def key(*parts) -> str:
    """A name for what follows from `parts`: tensors, and anything whose repr is its value."""
    digest = hashlib.sha256()
    for part in parts:
        is_tensor = isinstance(part, Tensor)
        digest.update(_bytes(part) if is_tensor else repr(part).encode())
        digest.update(repr(part.shape).encode() if is_tensor else b";")
    return digest.hexdigest()[:32]


def load(folder: Path | None, kind: str, name: str) -> Tensor | None:
    """The tensor kept as `name`; None if it is not there or not whole."""
    if folder is None:
        return None
    try:
        tensors, header = read_safetensors(folder / kind / f"{name}.safetensors")
    except UserError:
        return None
    tensor = tensors.get(kind)
    return tensor if tensor is not None and header.get("check") == key(tensor) else None


def save(folder: Path | None, kind: str, name: str, tensor: Tensor) -> None:
    """Keep a tensor; where that fails (a full disk), the next run only takes longer."""
    if folder is None:
        return
    try:
        path = folder / kind / f"{name}.safetensors"
        write_safetensors(path, {kind: tensor}, {"check": key(tensor)})
    except UserError:
        return


def _bytes(tensor: Tensor):
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(-1).view(torch.uint8).numpy().data
