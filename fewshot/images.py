"""Labelled pictures: as files, as uint8 pixels, as what a method reads.

A JPEG is decoded and resized once. The uint8 crop that comes out is exactly what CLIP's
normalisation reads, so keeping it loses nothing; it is kept in memory for the run and in a cache
file for the next one.
"""

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import PIL
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import (
    Compose,
    InterpolationMode,
    RandAugment,
    RandomCrop,
    RandomResizedCrop,
    Resize,
)
from torchvision.transforms import functional as tv
from tqdm import tqdm

from clip_min import CLIP, UserError, crop, normalize, weights
from fewshot import cache

with contextlib.suppress(ImportError):  # phones' HEIC, which Pillow reads with this alone
    from pillow_heif import register_heif_opener

    register_heif_opener()

# All that is opened, whatever a file is called: others start programs (EPS), or are seldom tried.
_WANTED = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "HEIF")
_ENDINGS = Image.registered_extensions()  # of what Pillow was built with; fills Image.OPEN
FORMATS = [name for name in _WANTED if name in Image.OPEN]
ENDINGS = {ending for ending, name in _ENDINGS.items() if name in FORMATS} - {".pfm"}  # floats

LONGEST = 100  # sides: a picture's longer one is at most so many times its shorter one
TINY = 16  # pixels: what is smaller is seldom meant
READERS = min(os.cpu_count() or 1, 8)  # threads: Pillow and hashes work outside Python's lock
KEPT = 1e9  # bytes of whole pictures that are kept in memory where crops are drawn anew each time


@dataclass(frozen=True)
class Pictures:
    """N labelled pictures: files, uint8 images (N, 3, h, w), or a list of both."""

    source: list[Path | Tensor] | Tensor
    labels: Tensor  # (N,) int64
    digests: list[str] | None = None  # sha256 of what each holds; None: they are not yet read

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor) -> "Pictures":
        """The pictures with the numbers `chosen`, in that order."""
        numbers = chosen.tolist()
        digests = self.digests and [self.digests[i] for i in numbers]
        if isinstance(self.source, Tensor):
            return Pictures(self.source[chosen], self.labels[chosen], digests)
        return Pictures([self.source[i] for i in numbers], self.labels[chosen], digests)

    def name(self, i: int) -> str:
        """Its file, or its number where it is not a file."""
        picture = self.source[i]
        return f"picture {i}" if isinstance(picture, Tensor) else str(picture)

    def open(self, i: int) -> Image.Image:
        picture = self.source[i]
        return tv.to_pil_image(picture) if isinstance(picture, Tensor) else open_image(picture)


def open_image(path: Path) -> Image.Image:
    """A picture, decoded to its last byte; an unreadable one is an error that names it."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("a folder, pipe or device, not a file")  # to open a pipe is to wait
        image = Image.open(path, formats=FORMATS)
        image.load()
    except Exception as error:  # Pillow's decoders raise more kinds than it documents
        reason = str(error) or type(error).__name__
        raise UserError(f"{path}: cannot be read as an image ({reason})") from None
    if image.mode.startswith("I") or image.mode == "F":
        raise UserError(
            f"{path}: cannot be used with more than 8 bits a pixel (Pillow's mode {image.mode}): "
            "CLIP's transform would cut all that is above 255 to white; save it with 8"
        )
    if max(image.size) > LONGEST * min(image.size):  # resized, it would fill the memory
        raise UserError(
            f"{path}: cannot be used with {image.width} x {image.height} pixels: CLIP reads the "
            f"middle square, and one side is over {LONGEST} times the other; cut it"
        )
    return image


def digest(picture: Path | Tensor) -> str:
    """sha256 of what a file or an image in memory holds; "" if it cannot be read."""
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


def digests(pictures: Pictures) -> list[str]:
    """The digest of each picture, files read by several threads."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(digest, pictures.source))


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """fp32: changes nothing. bf16, fp16: matrix products run in it, weights and sums stay fp32."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


class Batches:
    """N labelled pictures in memory, ready to be fed to a method.

    pixels (N, 3, n, n) uint8 crops; labels (N,). `folder`: the cache of features (None: no cache).
    `precision`: in which a method computes on them, see `autocast`.
    synthetic (N,) bool: which ones gen/ painted; None if all are real. `apart`: are these drawn
    into batches apart from the real ones?
    """

    def __init__(
        self,
        pictures: Pictures,
        pixels: Tensor,
        device: torch.device,
        folder: Path | None = cache.FOLDER,
        precision: str = "fp32",
    ):
        self.precision = precision
        self.pictures, self.pixels, self.device, self.folder = pictures, pixels, device, folder
        self.labels = pictures.labels.to(device)
        self.synthetic: Tensor | None = None
        self.apart = False
        self._features = None
        self._originals: dict[int, Image.Image] = {}
        self._room = KEPT

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shots(self) -> int:
        """Pictures in the largest class, synthetic ones not counted."""
        return int(self.real().pictures.labels.bincount().max())

    @property
    def drawn(self) -> list[Tensor]:
        """Numbers of the pictures that are drawn together: all, or the real and the synthetic."""
        if self.synthetic is None or not self.apart:
            return [torch.arange(len(self))]
        synthetic = self.synthetic.cpu()
        return [(~synthetic).nonzero().flatten(), synthetic.nonzero().flatten()]

    def real(self) -> "Batches":
        """The pictures that are not synthetic, in their order."""
        if self.synthetic is None:
            return self
        return self.part((~self.synthetic).nonzero().flatten().cpu())

    def part(self, chosen: Tensor) -> "Batches":
        """The pictures with the numbers `chosen` (B,), as real ones."""
        part = self._like(self.pictures[chosen], self.pixels[chosen])
        if self._features is not None:
            part._features = self._features[chosen]
        return part

    def join(self, synthetic: "Batches") -> "Batches":
        """These pictures, which are real, and then synthetic ones of the same size."""
        sources = [*self.pictures.source, *synthetic.pictures.source]
        labels = torch.cat([self.pictures.labels, synthetic.pictures.labels])
        pixels = torch.cat([self.pixels, synthetic.pixels])
        known = self.pictures.digests, synthetic.pictures.digests
        digests = None if None in known else known[0] + known[1]
        joined = self._like(Pictures(sources, labels, digests), pixels)
        joined.synthetic = torch.arange(len(joined), device=self.device) >= len(self)
        return joined

    def _like(self, pictures: Pictures, pixels: Tensor) -> "Batches":
        return Batches(pictures, pixels, self.device, self.folder, self.precision)

    def targets(self, chosen: Tensor) -> tuple[Tensor, ...]:
        """What `method.loss` takes besides inputs: labels (B,) and, if any picture here is
        synthetic, which ones of these are (B,).
        """
        if self.synthetic is None:
            return (self.labels[chosen],)
        return self.labels[chosen], self.synthetic[chosen]

    def autocast(self) -> torch.autocast:
        """What a method's forward pass on these pictures runs in."""
        return autocast(self.device, self.precision)

    def images(self, chosen: Tensor, augment: str = "none") -> Tensor:
        """The pictures with the numbers `chosen` (B,), as the image tower reads them: (B, 3, n, n),
        normalised, on the device.
        """
        pixels = self.pixels[chosen] if augment == "none" else self._views(chosen, augment)
        if augment == "randaugment":  # after the crop, two operations of magnitude 9
            change = RandAugment(num_ops=2, magnitude=9)
            pixels = torch.stack([change(image) for image in pixels])
        return normalize(pixels.to(self.device))

    def inputs(self, method, chosen: Tensor, augment: str = "none") -> Tensor:
        """What this method takes: image features (B, E), or images, which augmented ones are."""
        if method.input == "features" and augment == "none":
            return self.features(method.clip)[chosen]
        return self.images(chosen, augment)

    def features(self, clip: CLIP, batch_size: int = 64) -> Tensor:
        """Image features (N, E), not normalised, under the frozen image tower.

        Computed once; kept for the next run under a name that follows from the pixels, the image
        tower's weights, CLIP's config (its heads) and what computes (whose rounding may differ).
        """
        if self._features is None:
            machine = (torch.__version__, torch.get_num_threads(), self.device.type)
            machine += () if self.precision == "fp32" else (self.precision,)
            tower = weights.fingerprint(clip.visual) if self.folder else ""
            name = cache.key(self.pixels, tower, clip.config, batch_size, machine)
            features = cache.load(self.folder, "features", name)
            if features is None or features.shape[:1] != (len(self),):
                parts = torch.arange(len(self)).split(batch_size)
                parts = tqdm(parts, "image features", leave=False, disable=None)
                with torch.no_grad(), self.autocast():
                    features = torch.cat([clip.encode_image(self.images(p)) for p in parts])
                features = features.float()
                cache.save(self.folder, "features", name, features)
            self._features = features.to(self.device)
        return self._features

    def _views(self, chosen: Tensor, augment: str) -> Tensor:
        """A fresh random view of each picture, uint8 (B, 3, n, n), from torch's global generator.

        Most are crops of 8 to 100 % of the area, flipped half the time.
        """
        size = self.pixels.shape[-1]
        bicubic = InterpolationMode.BICUBIC  # as CLIP's own crop
        cut = RandomResizedCrop(size, interpolation=bicubic)
        if augment == "random-crop":  # VPT's: at 224 pixels, of 256
            cut = Compose([Resize(size * 8 // 7, bicubic), RandomCrop(size)])
        elif augment == "randaugment-crop":  # DISEF's
            cut = Compose([RandAugment(num_ops=2, magnitude=9), cut])
        crops = torch.stack([tv.pil_to_tensor(cut(whole)) for whole in self._whole(chosen)])
        if augment == "randaugment-crop":  # which does not flip
            return crops
        flip = torch.rand(len(crops)) < 0.5  # (B,)
        return torch.where(flip[:, None, None, None], crops.flip(-1), crops)  # (B, 3, n, n)

    def _whole(self, chosen: Tensor) -> list[Image.Image]:
        """The pictures, uncropped; decoded once, as long as there is room for them."""
        numbers = chosen.tolist()
        new = [i for i in dict.fromkeys(numbers) if i not in self._originals]
        with ThreadPoolExecutor(READERS) as pool:
            images = pool.map(lambda i: self.pictures.open(i).convert("RGB"), new)
            opened = dict(zip(new, images, strict=True))
        for i, image in opened.items():
            self._room -= (needed := 3 * image.width * image.height)
            if self._room >= 0:
                self._originals[i] = image
            else:
                self._room += needed
        return [self._originals.get(i) or opened[i] for i in numbers]


def free_memory() -> float:
    """The bytes that this process can still take, as far as the system tells; else infinity."""
    free = float("inf")
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line[:12] == "MemAvailable")
    with contextlib.suppress(OSError, ValueError):  # a container has a limit of its own, or "max"
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{n}").read_text()) for n in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        files = sum(int(stat.get(f"{kind}_file", 0)) for kind in ("active", "inactive"))
        free = min(free, limit - used + files)  # copies of files give way
    return free


def check_memory(count: int, size: int) -> None:
    """UserError, if `count` crops of `size` pixels do not fit in memory."""
    needed, free = count * 3 * size * size, free_memory()
    if needed > free:
        raise UserError(
            f"{count:,} pictures of {size} x {size} pixels take {needed / 1e9:,.1f} GB of memory, "
            f"and {max(free, 0) / 1e9:,.1f} GB are free; test on fewer, or use a larger machine"
        )


def read(
    pictures: Pictures,
    size: int,
    skip_bad: bool = False,
    folder: Path | None = cache.FOLDER,
    notes: list[str] | None = None,
) -> tuple[Pictures, Tensor, list[str]]:
    """Decode and crop -> (the readable pictures, uint8 (N, 3, size, size), what was skipped).

    An unreadable file is an error, or, with `skip_bad`, left out and listed. `folder` is the
    cache that keeps the pixels for the next run (None: nowhere), named by what the files hold.
    What is odd about pictures that can be read is added to `notes`.
    """
    pictures = replace(pictures, digests=pictures.digests or digests(pictures))
    if isinstance(pictures.source, Tensor) and pictures.source.shape[-2:] == (size, size):
        return pictures, pictures.source, []
    name = None
    if not isinstance(pictures.source, Tensor) and all(pictures.digests):
        name = cache.key(pictures.digests, size, PIL.__version__)
        pixels, odd = (cache.load(folder, kind, name) for kind in ("pixels", "odd"))
        expected = (len(pictures), 3, size, size), (len(pictures),)
        if None not in (pixels, odd) and (pixels.shape, odd.shape) == expected:
            _tell_odd(pictures, odd, notes)
            return pictures, pixels, []

    # One tensor, written in place: as many bytes as are kept, and no more. Flowers102 whole is
    # 8,189 x 3 x 224 x 224 = 1.23 GB.
    check_memory(len(pictures), size)
    pixels = torch.empty(len(pictures), 3, size, size, dtype=torch.uint8)
    odd = torch.zeros(len(pictures), dtype=torch.uint8)  # 0: nothing, else a number in ODD

    def attempt(i: int) -> UserError | None:
        try:
            image = pictures.open(i)
            pixels[i] = crop(image, size)
            moves = image.format in ("GIF", "PNG", "WEBP", "AVIF") and image.is_animated
            odd[i] = 1 if moves else 2 if min(image.size) < TINY else 0
        except UserError as error:
            return error

    with ThreadPoolExecutor(READERS) as pool:
        numbers = range(len(pictures))
        hide = None if len(pictures) > 200 else True  # None: only where there is a terminal
        results = list(
            tqdm(pool.map(attempt, numbers), "reading", len(numbers), leave=False, disable=hide)
        )
    errors = [result for result in results if result]
    if errors and not skip_bad:
        more = f" (and {len(errors) - 1} more files)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}; replace or remove it, or pass --skip-bad-images")
    if errors and len(errors) == len(pictures):
        raise UserError(f"none of {len(pictures)} image files can be read, as: {errors[0]}")
    if errors:
        good = torch.tensor([i for i in numbers if not results[i]])
        pictures, pixels, odd = pictures[good], pixels[good], odd[good]
    elif name:
        cache.save(folder, "pixels", name, pixels)
        cache.save(folder, "odd", name, odd)
    _tell_odd(pictures, odd, notes)
    return pictures, pixels, [str(error).split(": cannot")[0] for error in errors]


ODD = {1: "animated, and read as their first frame", 2: f"under {TINY} pixels wide or high"}


def _tell_odd(pictures: Pictures, odd: Tensor, notes: list[str] | None) -> None:
    if notes is None or isinstance(pictures.source, Tensor):
        return
    for kind, said in ODD.items():
        if found := (odd == kind).nonzero().flatten().tolist():
            notes.append(f"{len(found)} images are {said}: {few(map(pictures.name, found))}")


def few(names: Iterable[str], most: int = 5) -> str:
    """The first names of a list: "a, b, c, d, e, …"."""
    shown = [*itertools.islice(names, most + 1)]
    return ", ".join([*shown[:most], "…"] if len(shown) > most else shown)
