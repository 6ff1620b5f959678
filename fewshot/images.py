"""Labelled pictures: as files, as uint8 pixels, as what a method reads.

A JPEG is decoded and resized once. The uint8 crop that comes out is exactly what CLIP's
normalisation reads, so keeping it loses nothing; it is kept in memory for the run and in a cache
file for the next one.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import PIL
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandAugment, RandomResizedCrop
from torchvision.transforms import functional as tv
from tqdm import tqdm

from clip_min import CLIP, UserError, crop, normalize, weights
from fewshot import cache

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


@dataclass(frozen=True)
class Pictures:
    """N labelled pictures, not yet read: files, uint8 images (N, 3, h, w), or a list of both."""

    source: list[Path | Tensor] | Tensor
    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor) -> "Pictures":
        """The pictures with the numbers `chosen`, in that order."""
        if isinstance(self.source, Tensor):
            return Pictures(self.source[chosen], self.labels[chosen])
        return Pictures([self.source[i] for i in chosen.tolist()], self.labels[chosen])

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
        image = Image.open(path)
        image.load()
    # Pillow's decoders raise these, and more kinds for damaged files than it documents.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from None
    if image.mode.startswith("I") or image.mode == "F":
        raise UserError(
            f"{path}: cannot be used with more than 8 bits a pixel (Pillow's mode {image.mode}): "
            "CLIP's transform would cut all that is above 255 to white; save it with 8"
        )
    return image


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """fp32: changes nothing. bf16, fp16: matrix products run in it, weights and sums stay fp32."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


class Batches:
    """N labelled pictures in memory, ready to be fed to a method.

    pixels (N, 3, n, n) uint8 crops; labels (N,). `folder`: the cache of features (None: no cache).
    `precision`: in which a method computes on them, see `autocast`.
    synthetic (N,) bool: which ones gen/ painted; None if all are real.
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
        self._features = self._originals = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shots(self) -> int:
        """Pictures in the largest class, synthetic ones not counted."""
        return int(self.real().pictures.labels.bincount().max())

    def real(self) -> "Batches":
        """The pictures that are not synthetic, in their order."""
        if self.synthetic is None:
            return self
        chosen = (~self.synthetic).nonzero().flatten().cpu()
        return self._like(self.pictures[chosen], self.pixels[chosen])

    def join(self, synthetic: "Batches") -> "Batches":
        """These pictures, which are real, and then synthetic ones of the same size."""
        sources = [*self.pictures.source, *synthetic.pictures.source]
        labels = torch.cat([self.pictures.labels, synthetic.pictures.labels])
        pixels = torch.cat([self.pixels, synthetic.pixels])
        joined = self._like(Pictures(sources, labels), pixels)
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
        pixels = self.pixels[chosen] if augment == "none" else self._crop_flip(chosen)
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

    def _crop_flip(self, chosen: Tensor) -> Tensor:
        """A fresh random crop of each picture, from 8 to 100 % of its area, flipped half the time.

        Drawn from torch's global generator.
        """
        if self._originals is None:  # decoded once, uncropped
            self._originals = [self.pictures.open(i).convert("RGB") for i in range(len(self))]
        size = self.pixels.shape[-1]
        cut = RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC)
        crops = torch.stack([tv.pil_to_tensor(cut(self._originals[i])) for i in chosen.tolist()])
        flip = torch.rand(len(crops)) < 0.5  # (B,)
        return torch.where(flip[:, None, None, None], crops.flip(-1), crops)  # (B, 3, n, n)


def read(
    pictures: Pictures, size: int, skip_bad: bool = False, folder: Path | None = cache.FOLDER
) -> tuple[Pictures, Tensor, list[str]]:
    """Decode and crop -> (the readable pictures, uint8 (N, 3, size, size), what was skipped).

    An unreadable file is an error, or, with `skip_bad`, left out and listed. `folder` is the
    cache that keeps the pixels for the next run (None: nowhere).
    """
    if isinstance(pictures.source, Tensor) and pictures.source.shape[-2:] == (size, size):
        return pictures, pictures.source, []
    name = None if isinstance(pictures.source, Tensor) else _name(pictures.source, size)
    if name and (pixels := cache.load(folder, "pixels", name)) is not None:
        return pictures, pixels, []

    # One tensor, written in place: as many bytes as are kept, and no more. Flowers102 whole is
    # 8,189 x 3 x 224 x 224 = 1.23 GB.
    pixels = torch.empty(len(pictures), 3, size, size, dtype=torch.uint8)

    def attempt(i: int) -> UserError | None:
        try:
            pixels[i] = crop(pictures.open(i), size)
        except UserError as error:
            return error

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # Pillow works outside Python's lock
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
        pictures, pixels = pictures[good], pixels[good]
    elif name:
        cache.save(folder, "pixels", name, pixels)
    return pictures, pixels, [str(error).split(": cannot")[0] for error in errors]


def _name(paths: list[Path], size: int) -> str | None:
    """Names the pixels of these files: it changes when a file, the size or Pillow changes."""
    try:
        stats = [(str(path.resolve()), path.stat()) for path in paths]
    except OSError:
        return None  # a file is not there: reading it will say so
    described = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return cache.key(described, size, PIL.__version__)
