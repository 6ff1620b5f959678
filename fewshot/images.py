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
from torchvision.transforms import InterpolationMode, RandomResizedCrop
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
        return image
    # Pillow's decoders raise these, and more kinds for damaged files than it documents.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from None


class Batches:
    """N labelled pictures in memory, ready to be fed to a method.

    pixels (N, 3, n, n) uint8 crops; labels (N,). `folder`: the cache of features (None: no cache).
    synthetic (N,) bool: which ones are not photos; None if all are.
    """

    def __init__(
        self,
        pictures: Pictures,
        pixels: Tensor,
        device: torch.device,
        folder: Path | None = cache.FOLDER,
    ):
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
        return Batches(self.pictures[chosen], self.pixels[chosen], self.device, self.folder)

    def join(self, synthetic: "Batches") -> "Batches":
        """These pictures, which are real, and then synthetic ones of the same size."""
        sources = [*self.pictures.source, *synthetic.pictures.source]
        labels = torch.cat([self.pictures.labels, synthetic.pictures.labels])
        pixels = torch.cat([self.pixels, synthetic.pixels])
        joined = Batches(Pictures(sources, labels), pixels, self.device, self.folder)
        joined.synthetic = torch.arange(len(joined), device=self.device) >= len(self)
        return joined

    def targets(self, chosen: Tensor) -> tuple[Tensor, ...]:
        """What a loss compares logits with: labels (B,) and, if some are, which are synthetic."""
        if self.synthetic is None:
            return (self.labels[chosen],)
        return self.labels[chosen], self.synthetic[chosen]

    def images(self, chosen: Tensor, augment: str = "none") -> Tensor:
        """What the image tower reads: (B, 3, n, n), normalised, on the device."""
        pixels = self.pixels[chosen] if augment == "none" else self._crop_flip(chosen)
        return normalize(pixels.to(self.device))

    def inputs(self, method, chosen: Tensor, augment: str = "none") -> Tensor:
        """What this method takes: image features (B, E), or images."""
        if method.input == "features":
            return self.features(method.clip)[chosen]
        return self.images(chosen, augment)

    def features(self, clip: CLIP, batch_size: int = 64) -> Tensor:
        """Image features (N, E), not normalised, under the frozen image tower.

        Computed once; kept for the next run under a name that follows from the pixels, the image
        tower's weights and what computes (whose rounding may differ).
        """
        if self._features is None:
            machine = (torch.__version__, torch.get_num_threads(), self.device.type)
            name = cache.key(self.pixels, weights.fingerprint(clip.visual), batch_size, machine)
            features = cache.load(self.folder, "features", name)
            if features is None:
                parts = torch.arange(len(self)).split(batch_size)
                parts = tqdm(parts, "image features", leave=False, disable=None)
                with torch.no_grad():
                    features = torch.cat([clip.encode_image(self.images(p)) for p in parts])
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

    def attempt(i: int) -> Tensor | UserError:
        try:
            return crop(pictures.open(i), size)
        except UserError as error:
            return error

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # Pillow works outside Python's lock
        numbers = range(len(pictures))
        hide = None if len(pictures) > 200 else True  # None: only where there is a terminal
        results = list(
            tqdm(pool.map(attempt, numbers), "reading", len(numbers), leave=False, disable=hide)
        )
    errors = [result for result in results if isinstance(result, UserError)]
    if errors and not skip_bad:
        more = f" (and {len(errors) - 1} more files)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}; replace or remove it, or pass --skip-bad-images")
    good = torch.tensor([i for i in numbers if not isinstance(results[i], UserError)])
    if len(good) == 0:
        raise UserError(f"none of {len(pictures)} image files can be read, as: {errors[0]}")
    pixels = torch.stack([results[i] for i in good.tolist()])  # (N, 3, size, size)
    if name and not errors:
        cache.save(folder, "pixels", name, pixels)
    return pictures[good], pixels, [str(error).split(": cannot")[0] for error in errors]


def _name(paths: list[Path], size: int) -> str | None:
    """Names the pixels of these files: it changes when a file, the size or Pillow changes."""
    try:
        stats = [(str(path.resolve()), path.stat()) for path in paths]
    except OSError:
        return None  # a file is not there: reading it will say so
    described = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return cache.key(described, size, PIL.__version__)
