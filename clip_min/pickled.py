"""Read PyTorch's pickled files (.pt, .pth, .bin) without running any code in them.

A pickle is a program: it names functions and calls them. A TorchScript archive is one as well: its
objects may have a `__setstate__` of their own, which torch.jit.load runs. Here

    torch.save's files      are read by torch.load(weights_only=True), which accepts only tensors
                            and plain containers
    TorchScript's archives  are zip files. data.pkl maps each object to a part of the storages
                            data/0, data/1, …; our own unpickler reads it, and turns every class
                            and function into an inert `Thing`
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
    """The content of a torch.save file, or the tensors of a TorchScript archive by name."""
    try:
        with warnings.catch_warnings():  # about deprecated formats, which the reader cannot change
            warnings.simplefilter("ignore")
            _check_stored(path)
            if _is_torchscript(path):
                return read_torchscript(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # the readers raise a dozen unrelated types
        reason = first_line(error)
        if isinstance(error, pickle.UnpicklingError | KeyError) or "weights_only" in reason:
            # torch's own message would advise loading it the unsafe way
            reason = "no PyTorch file, or it holds other objects, which could run code"
        raise UserError(
            f"{path}: not a state dict of plain tensors ({reason}); nothing in it was run"
        ) from None


def _check_stored(path: Path) -> None:
    """ValueError, if parts of a zip file are compressed: a few bytes could fill the memory.

    TorchScript compresses only its code, which is not read here.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":  # as torch.load asks
            return
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            code = info.filename.split("/")[1:2] == ["code"]
            if info.compress_type != zipfile.ZIP_STORED and not code:
                raise ValueError(f"{info.filename} is compressed, which PyTorch never does")


def _is_torchscript(path: Path) -> bool:
    """The test of torch.load, which until torch 2.5 passes such a file to torch.jit.load."""
    with open(path, "rb") as file:
        try:
            return "constants.pkl" in torch._C.PyTorchFileReader(file).get_all_records()
        except RuntimeError:  # no zip file
            return False


class Thing:
    """What a pickle says about an object: its class or function, its arguments, its state."""

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
    """Python's own unpickler, limited to protocol 2; its memory grows with the file, no faster."""

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

    An object that occurs in two places is read at one of them.
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
                raise ValueError("a tensor is larger than its stored data")
            return found

        todo = [("", _Unpickler(io.BytesIO(archive.read(name))).load())]
        while todo:
            prefix, thing = todo.pop()
            if not isinstance(thing, Thing) or id(thing) in seen:
                continue
            seen.add(id(thing))
            if len(prefix) > 2000:  # names that grow with each level could fill the memory
                raise ValueError("an object has a name of more than 2,000 letters")
            if thing.kind == "torch._utils._rebuild_tensor_v2":
                tensors[prefix[:-1]] = tensor(thing.arguments)
            elif thing.kind.startswith("__torch__.") and isinstance(thing.state, dict):
                todo += [(f"{prefix}{key}.", part) for key, part in thing.state.items()]
    return tensors
