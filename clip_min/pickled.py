"""What PyTorch pickled (.pt, .pth, .bin), read without running anything that stands in it.

A pickle is a program: it names functions and has them called. So does a TorchScript archive, whose
objects may bring a `__setstate__` of their own, which torch.jit.load runs. Here

    torch.save's files      go through torch.load(weights_only=True), which admits tensors and plain
                            containers alone
    TorchScript's archives  are zip files: data.pkl says which object holds which part of which of
                            the storages data/0, data/1, …; it is read here by an unpickler for
                            which every class and function is an inert `Thing`
"""

import io
import pickle
import pickletools
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from clip_min.errors import UserError, first_line

DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_pickled(path: Path) -> object:
    """What a file of torch.save holds, or the tensors of a TorchScript archive by their names."""
    try:
        with warnings.catch_warnings():  # of deprecated formats, which whoever reads cannot help
            warnings.simplefilter("ignore")
            _check_stored(path)
            if _is_torchscript(path):
                return read_torchscript(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # the readers raise a dozen unrelated types
        reason = first_line(error)
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in reason:
            # torch's own message would be the advice to load it the unsafe way
            reason = "no PyTorch file, or one of other objects too, which could run code"
        raise UserError(
            f"{path}: not a state dict of plain tensors ({reason}); nothing in it was run"
        ) from None


def _check_stored(path: Path) -> None:
    """ValueError, where parts of a zip file are compressed: a few bytes could fill the memory.

    TorchScript compresses its code, which is not read.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":  # as torch.load asks
            return
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            code = info.filename.split("/")[1:2] == ["code"]
            if info.compress_type != zipfile.ZIP_STORED and not code:
                raise ValueError(f"{info.filename} is compressed, which PyTorch's are not")


def _is_torchscript(path: Path) -> bool:
    """As torch.load asks, which until torch 2.5 hands such a file to torch.jit.load."""
    with open(path, "rb") as file:
        try:
            return "constants.pkl" in torch._C.PyTorchFileReader(file).get_all_records()
        except RuntimeError:  # no zip file
            return False


class Thing:
    """All that a pickle says of an object: its class or maker, its arguments, its state."""

    kind = ""
    arguments: tuple
    state: object = None

    def __new__(cls, *arguments):  # a pickle may make objects without calling __init__
        thing = object.__new__(cls)
        thing.arguments = arguments
        return thing

    def __setstate__(self, state):
        self.state = state


class _Unpickler(pickle._Unpickler):
    """Python's own, whose memory grows with the file alone, and just what protocol 2 has."""

    dispatch = {
        ord(op.code): pickle._Unpickler.dispatch[ord(op.code)]
        for op in pickletools.opcodes
        if op.proto <= 2
    }

    def find_class(self, module: str, name: str) -> type:
        return type("Thing", (Thing,), {"kind": f"{module}.{name}"})

    def persistent_load(self, pid: object) -> object:
        return pid  # ("storage", its type, its key, its device, its length)


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The parameters, buffers and other tensors of the module in an archive: {"a.b.c": tensor}.

    An object that stands in two places is read at one of them.
    """
    tensors, storages, seen = {}, {}, set()
    with zipfile.ZipFile(path) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("data.pkl") and n.count("/") == 1]
        root = name.removesuffix("data.pkl")

        def tensor(parts: tuple) -> Tensor:
            (_, kind, key, _, _), start, shape, strides = parts[:4]
            if key not in storages:
                whole = bytearray(archive.read(f"{root}data/{key}"))
                dtype = DTYPES[kind.kind.removeprefix("torch.")]
                storages[key] = torch.frombuffer(whole, dtype=dtype) if whole else torch.empty(0)
            found = storages[key].as_strided(shape, strides, start)
            if found.numel() > len(storages[key]):
                raise ValueError("a tensor is larger than what is stored of it")
            return found

        todo = [("", _Unpickler(io.BytesIO(archive.read(name))).load())]
        while todo:
            prefix, thing = todo.pop()
            if not isinstance(thing, Thing) or id(thing) in seen:
                continue
            seen.add(id(thing))
            if len(prefix) > 2000:  # names that grow with every level could fill the memory
                raise ValueError("an object has a name of more than 2,000 letters")
            if thing.kind == "torch._utils._rebuild_tensor_v2":
                tensors[prefix[:-1]] = tensor(thing.arguments)
            elif thing.kind.startswith("__torch__.") and isinstance(thing.state, dict):
                todo += [(f"{prefix}{key}.", part) for key, part in thing.state.items()]
    return tensors
