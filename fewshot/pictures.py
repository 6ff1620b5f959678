"""Labelled pictures: their files, and how they are read as uint8 pixels.

A JPEG is decoded and resized once. The result, a uint8 crop, is the exact input of CLIP's
normalisation, so storing it loses nothing. Crops of training and validation pictures are kept in
memory for the run, and in a cache file for the next run (`Reader.read`). Test pictures, which may
be many, are read in batches when they are needed (`Reader.stream`); their crops stay on disk until
the run ends.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as tv
from tqdm import tqdm

from clip_min import CLIPConfig, UserError, crop
from clip_min.memory import check_room, free_memory
from clip_min.preprocess import OPENAI
from fewshot import cache, ranks
from fewshot.mapped import Mapped

with contextlib.suppress(ImportError):  # HEIC files of phones, which Pillow cannot read by itself
    from pillow_heif import register_heif_opener

    register_heif_opener()

# Only these formats are opened: others start programs (EPS), or are rarely tested.
_WANTED = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "HEIF")
_ENDINGS = Image.registered_extensions()  # depends on Pillow's build; fills Image.OPEN
FORMATS = [name for name in _WANTED if name in Image.OPEN]
ENDINGS = {ending for ending, name in _ENDINGS.items() if name in FORMATS} - {".pfm"}  # floats

LONGEST = 100  # largest ratio of a picture's sides
TINY = 16  # pixels; smaller pictures are probably a mistake
READERS = min(os.cpu_count() or 1, 8)  # threads: Pillow and hashes work outside Python's lock
AHEAD = 128  # pictures that are decoded in advance: two batches
ODD = {
    1: "animated, and read as their first frame",
    2: f"under {TINY} pixels wide or high",
    3: "marked as rotated (EXIF), which CLIP's transform ignores",
}
ORIENTATION = 0x0112  # EXIF's tag


@dataclass(frozen=True)
class Pictures:
    """N labelled pictures: files, uint8 images (N, 3, h, w), or a list of both."""

    source: list[Path | Tensor] | Tensor
    labels: Tensor  # (N,) int64
    digests: list[str] | None = None  # sha256 of each; None: not yet read
    features: Mapped | None = None  # if embed.py made them; the files may be gone

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor) -> "Pictures":
        """The pictures with the indices `chosen`, in that order."""
        numbers = chosen.tolist()
        digests = self.digests and [self.digests[i] for i in numbers]
        if isinstance(self.source, Tensor):
            return Pictures(self.source[chosen], self.labels[chosen], digests)
        source, features = [self.source[i] for i in numbers], self.features
        features = None if features is None else features[chosen]
        return Pictures(source, self.labels[chosen], digests, features)

    def joined(self, other: "Pictures") -> "Pictures":
        """These pictures, followed by others; both have digests."""
        features = None
        if self.features is not None and other.features is not None:
            features = self.features.joined(other.features)
        labels = torch.cat([self.labels, other.labels])
        source, made = [*self.source, *other.source], [*self.digests, *other.digests]
        source = torch.stack(source) if isinstance(self.source, Tensor) else source
        return Pictures(source, labels, made, features)

    def name(self, i: int) -> str:
        """The picture's file, or its index if it is in memory."""
        picture = self.source[i]
        return f"picture {i}" if isinstance(picture, Tensor) else str(picture)

    def open(self, i: int) -> Image.Image:
        picture = self.source[i]
        return tv.to_pil_image(picture) if isinstance(picture, Tensor) else open_image(picture)


def open_image(path: Path, content: bytes | None = None) -> Image.Image:
    """A completely decoded picture; UserError with its name, if it is unreadable.

    content: the file's bytes, if they were read already.
    """
    try:
        if content is None and path.exists() and not path.is_file():
            raise OSError("a folder, pipe or device, not a file")  # to open a pipe is to wait
        image = Image.open(path if content is None else io.BytesIO(content), formats=FORMATS)
        image.load()
    except Exception as error:  # Pillow's decoders raise more types than documented
        reason = str(error) or type(error).__name__
        raise UserError(f"{path}: cannot be read as an image ({reason})") from None
    if image.mode.startswith("I") or image.mode == "F":
        raise UserError(
            f"{path}: cannot be used with more than 8 bits a pixel (Pillow's mode {image.mode}): "
            "CLIP's transform would turn values above 255 to white; save it with 8 bits"
        )
    if max(image.size) > LONGEST * min(image.size):  # resized, it would fill memory
        raise UserError(
            f"{path}: cannot be used with {image.width} x {image.height} pixels: CLIP reads the "
            f"middle square, but one side is over {LONGEST} times the other; crop it"
        )
    return image


def cut(image: Image.Image, config: CLIPConfig) -> Tensor:
    """`crop`, for threads: uint8 (3, n, n), contiguous."""
    # NumPy copies in one thread; PyTorch would start several for each decoding thread.
    return torch.from_numpy(np.ascontiguousarray(crop(image, config).numpy()))


def digest(picture: Path | Tensor) -> str:
    """sha256 of a file or of an image in memory; "" if it cannot be read."""
    if isinstance(picture, Tensor):
        return hashlib.sha256(picture.contiguous().numpy().data).hexdigest()
    made = hashlib.sha256()
    try:
        if picture.is_file():  # to open a pipe is to wait
            with picture.open("rb") as file:
                while block := file.read(1 << 20):
                    made.update(block)
            return made.hexdigest()
    except OSError:
        pass
    return ""


def pixel_hash(pixels: Tensor) -> Tensor:
    """sha256 of an image in memory, as a tensor: uint8 (32,)."""
    return torch.frombuffer(bytearray.fromhex(digest(pixels)), dtype=torch.uint8)


def digests(pictures: Pictures) -> list[str]:
    """The digest of each picture; several threads read the files."""
    with ThreadPoolExecutor(READERS) as pool:
        own = list(pool.map(digest, pictures.source[ranks.rank :: ranks.size]))
    every = [own] if ranks.size == 1 else ranks.together(own)
    return [every[i % len(every)][i // len(every)] for i in range(len(pictures))]


def ahead(work: Callable, items: Iterable) -> Iterator:
    """work(item) for each item, in order; threads compute AHEAD of them in advance."""
    pool, started = ThreadPoolExecutor(READERS), deque()
    try:
        for item in items:
            started.append(pool.submit(work, item))
            if len(started) > AHEAD:
                yield started.popleft().result()
        while started:
            yield started.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def check_memory(count: int, size: int) -> None:
    """UserError, if `count` crops of `size` pixels, in each process, do not fit in memory."""
    what = f"{count:,} pictures of {size} x {size} pixels take"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's, on this machine
    todo = "give fewer --shots, learn from features (embed.py)"
    check_room(processes * count * 3 * size * size, free_memory(), what, todo)


@dataclass(frozen=True)
class Reader:
    """How a run reads pictures, and where and in which precision a method computes."""

    size: int  # pixels, the model's
    device: torch.device = torch.device("cpu")
    skip_bad: bool = False  # leave out unreadable files, with a note; else they are an error
    folder: Path | None = cache.FOLDER  # the cache for pixels and features; None: no cache
    precision: str = "fp32"  # of the forward pass, see `Batches.autocast`
    prepared: CLIPConfig = OPENAI  # the model's preprocessing, except for the size

    @functools.cached_property
    def room(self) -> float:
        """Bytes that encoded training images may take in memory; validation images may take as many
        again. A share of what is free when the first images are encoded, at most --cache-gb.
        """
        share = 3 if self.device.type == "cuda" else 3 * ranks.size
        return ranks.same(min(cache.limit, free_memory(self.device) / share))

    def read(self, pictures: Pictures, notes: list[str]) -> tuple[Pictures, Tensor]:
        """Decode and crop -> (the readable pictures, uint8 (N, 3, size, size)).

        Pixels are stored in the cache, under a name that depends on the files' content. Skipped
        files, and oddities of readable pictures, are added to `notes`.
        """
        source = pictures.source
        if isinstance(source, Tensor) and source.shape[-2:] == (self.size, self.size):
            return replace(pictures, digests=pictures.digests or digests(pictures)), source
        check_memory(len(pictures), self.size)
        return self._read(pictures, notes, "pixels")

    @functools.cached_property
    def spool(self) -> cache.Spool:
        """The crops on disk, written by `check` and read by `stream`."""
        return cache.Spool(self.folder, self.size)

    def check(self, pictures: Pictures, notes: list[str]) -> tuple[Pictures, Tensor]:
        """The same, but only `pixel_hash` of the pixels stays in memory -> (…, uint8 (N, 32)).

        For pictures that `stream` reads later: this reports their problems in advance, and
        identifies them.
        """
        return self._read(pictures, notes, "hashes")

    def stream(self, pictures: Pictures, hashes: Tensor, parts: list[Tensor]) -> Iterator[Tensor]:
        """For each part, indices (B,) of checked pictures: their crops, uint8 (B, 3, size, size).
        Threads decode the next parts meanwhile. Pictures whose crops are on disk already, from
        checking or testing, are not decoded again.
        """

        spool = self.spool  # created before the threads start
        names = pictures.digests or [""] * len(pictures)

        def again(i: int) -> Tensor:
            if (kept := spool.get(names[i])) is not None:
                return kept
            pixels, _ = self._decode(pictures, i)
            if not torch.equal(pixel_hash(pixels), hashes[i]):
                raise UserError(f"{pictures.name(i)}: has changed since it was checked; run again")
            spool.put(names[i], pixels)
            return pixels

        crops = ahead(again, (i for part in parts for i in part.tolist()))
        for part in parts:
            yield torch.stack(list(itertools.islice(crops, len(part))))

    def _read(
        self, pictures: Pictures, notes: list[str], kind: Literal["pixels", "hashes"]
    ) -> tuple[Pictures, Tensor]:
        """-> (the readable pictures, the stored data of each).

        The result is a single tensor, written in place, so memory holds it once. All of Flowers102
        is 8,189 x 3 x 224 x 224 = 1.23 GB.
        """
        pictures = replace(pictures, digests=pictures.digests or digests(pictures))
        kept = odd = name = None
        files = not isinstance(pictures.source, Tensor)
        if files and all(pictures.digests):
            way = (self.prepared.resize, self.prepared.interpolation)
            way = () if way == (OPENAI.resize, OPENAI.interpolation) else way  # as ever
            name = cache.key(pictures.digests, self.size, PIL.__version__, *way)
            old = cache.key(name, len(ODD))  # earlier versions knew fewer oddities
            kept, odd = (cache.load(self.folder, *of) for of in ((kind, name), ("odd", old)))
        count, errors = len(pictures), {}
        shape = (count, 3, self.size, self.size) if kind == "pixels" else (count, 32)
        there = None not in (kept, odd) and (kept.shape, odd.shape) == (shape, (count,))
        if not all(ranks.together(there)):
            kept = torch.empty(shape, dtype=torch.uint8).fill_(0)  # other ranks fill the other rows
            odd = torch.zeros(count, dtype=torch.uint8)
            own = ranks.mine(range(count))
            spool = self.spool if kind == "hashes" else None

            def attempt(i: int) -> UserError | tuple[Tensor, int]:
                try:
                    pixels, odd = self._decode(pictures, i)
                    if spool is None:
                        return pixels, odd
                    spool.put(pictures.digests[i], pixels)
                    return pixel_hash(pixels), odd
                except UserError as error:
                    return error

            hide = None if count > 200 else True  # None: only in a terminal
            found = tqdm(ahead(attempt, own), "reading", len(own), leave=False, disable=hide)
            for i, one in zip(own, found, strict=True):
                if isinstance(one, UserError):
                    errors[i] = one
                else:
                    kept[i], odd[i] = one
            errors = dict(sorted(one for of in ranks.together(errors) for one in of.items()))
            ranks.fill(kept)
            ranks.fill(odd)
            if errors:
                self._refuse(errors, count)
                good = torch.tensor([i for i in range(count) if i not in errors])
                pictures, kept, odd = pictures[good], kept[good], odd[good]
            elif name and ranks.rank == 0:
                cache.save(self.folder, kind, name, kept)
                cache.save(self.folder, "odd", old, odd)
        for number, said in ODD.items() if files else ():
            if found := (odd == number).nonzero().flatten().tolist():
                notes.append(f"{len(found)} images are {said}: {few(map(pictures.name, found))}")
        if errors:
            skipped = ", ".join(str(error).split(": cannot")[0] for error in errors.values())
            notes.append(f"skipped {len(errors)} unreadable files: {skipped}")
        return pictures, kept

    def _decode(self, pictures: Pictures, i: int) -> tuple[Tensor, int]:
        """-> the crop of picture `i`, uint8 (3, size, size), and its oddity: 0, or a key of ODD."""
        image = pictures.open(i)
        pixels = cut(image, replace(self.prepared, image_size=self.size))
        if image.format in ("GIF", "PNG", "WEBP", "AVIF") and image.is_animated:
            return pixels, 1
        if min(image.size) < TINY:
            return pixels, 2
        with contextlib.suppress(Exception):  # a faulty tag is of no interest
            return pixels, 3 if image.getexif().get(ORIENTATION, 1) > 1 else 0
        return pixels, 0

    def _refuse(self, errors: dict[int, UserError], count: int) -> None:
        """UserError, unless these of `count` pictures may be left out."""
        first, more = next(iter(errors.values())), len(errors) - 1
        if not self.skip_bad:
            more = f" (and {more} more files)" if more else ""
            raise UserError(f"{first}{more}; replace or remove it, or pass --skip-bad-images")
        if len(errors) == count:
            raise UserError(f"none of {count} image files can be read, as: {first}")


def few(names: Iterable[str], most: int = 5) -> str:
    """The first names of a list: "a, b, c, d, e, …"."""
    shown = [*itertools.islice(names, most + 1)]
    return ", ".join([*shown[:most], "…"] if len(shown) > most else shown)
