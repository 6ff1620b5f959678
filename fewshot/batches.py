"""Batches of pictures for a method: normalised, augmented, or encoded."""

import math
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

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

from clip_min import UserError, fast, normalize
from clip_min.errors import Note
from fewshot import cache, ranks
from fewshot.pictures import READERS, Pictures, Reader, pixel_hash

KEPT = 1e9  # bytes of uncropped pictures to keep in memory for random crops

# For torch.autocast: precision of matrix products; weights and sums stay fp32.
PRECISIONS: dict[str, dict] = {
    "fp32": {"enabled": False},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
}


class NeedsPictures(UserError):
    """A method, or its settings, needs pictures, but there are only features."""


class Batches:
    """N labelled pictures, ready for a method.

    pixels (N, 3, n, n): uint8 crops in memory; or None, if pictures are read when needed, with
    `hashes` (N, 32) of their pixels (`Reader.check`). labels (N,). synthetic (N,) bool: the
    synthetic ones; None if all are real. drawn: indices of pictures that are drawn together: all,
    or real and synthetic separately.
    """

    def __init__(
        self,
        pictures: Pictures,
        pixels: Tensor | None,
        reader: Reader,
        hashes: Tensor | None = None,
    ):
        self.pictures, self.pixels, self.reader = pictures, pixels, reader
        self._hashes = hashes
        self.device, self.precision = reader.device, reader.precision
        self.labels = pictures.labels.to(self.device)
        self.synthetic: Tensor | None = None
        self.drawn = [torch.arange(len(self))]
        self.nbytes = len(self) * 3 * reader.size**2  # of the pixels
        self.room: float | None = self.nbytes  # for encoded pictures in memory; None: reader.room
        self._encoded: dict[tuple, Tensor] = {}  # by encoder
        self._fits: dict[tuple, bool] = {}
        self._some: dict[int, Batches] = {}  # by number
        self._originals: dict[int, Image.Image] = {}
        self._left = KEPT

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def hashes(self) -> Tensor:
        """`pixel_hash` of each picture (N, 32)."""
        if self._hashes is None:
            self._hashes = torch.stack([pixel_hash(pixels) for pixels in self.pixels])
        return self._hashes

    @property
    def shots(self) -> int:
        """The number of real pictures in the largest class."""
        labels = self.labels if self.synthetic is None else self.labels[~self.synthetic]
        return int(labels.cpu().bincount().max())

    def class_weights(self, count: int) -> Tensor:
        """Weights (K,): N / (K · n_k), for n_k real pictures in each of `count` classes. They give
        all classes equal weight, and pictures a weight of 1 on average.
        """
        labels = self.real().labels
        return len(labels) / (count * labels.bincount(minlength=count).clamp(min=1))

    def draw_apart(self) -> None:
        """From now on, draw real and synthetic pictures separately, if there are any."""
        if self.synthetic is not None and self.synthetic.any():
            synthetic = self.synthetic.cpu()
            self.drawn = [(~synthetic).nonzero().flatten(), synthetic.nonzero().flatten()]

    def real(self) -> "Batches":
        """The real pictures, in order."""
        if self.synthetic is None:
            return self
        return self.part((~self.synthetic).nonzero().flatten().cpu())

    def some(self, most: int) -> "Batches":
        """At most `most` of the real pictures, evenly spaced."""
        if most not in self._some:
            real = self.real()
            numbers = torch.arange(0, len(real), math.ceil(len(real) / most))
            self._some[most] = real.part(numbers)
        return self._some[most]

    def part(self, chosen: Tensor) -> "Batches":
        """The pictures with the indices `chosen` (B,), as real ones."""
        part = Batches(self.pictures[chosen], self.pixels[chosen], self.reader)
        part._encoded = {encoder: x[chosen] for encoder, x in self._encoded.items()}
        part._fits, part.room = dict(self._fits), self.room
        return part

    def join(self, synthetic: "Batches") -> "Batches":
        """These real pictures, followed by synthetic ones of the same size."""
        sources = [*self.pictures.source, *synthetic.pictures.source]
        labels = torch.cat([self.pictures.labels, synthetic.pictures.labels])
        pixels = torch.cat([self.pixels, synthetic.pixels])
        known = self.pictures.digests, synthetic.pictures.digests
        digests = None if None in known else known[0] + known[1]
        joined = Batches(Pictures(sources, labels, digests), pixels, self.reader)
        joined.synthetic = torch.arange(len(joined), device=self.device) >= len(self)
        joined.room = self.room
        return joined

    def mirrored(self) -> "Batches":
        """These pictures, followed by their mirror images."""
        pictures = self.pictures[torch.arange(len(self)).repeat(2)]
        both = Batches(pictures, torch.cat([self.pixels, self.pixels.flip(-1)]), self.reader)
        both.room = self.room
        return both

    def targets(self, chosen: Tensor) -> tuple[Tensor, ...]:
        """The targets for `method.loss`: labels (B,) and, if there are synthetic pictures, which
        of these are synthetic (B,).
        """
        if self.synthetic is None:
            return (self.labels[chosen],)
        return self.labels[chosen], self.synthetic[chosen]

    def autocast(self) -> torch.autocast:
        """The autocast context of a method's forward pass on these pictures."""
        return torch.autocast(self.device.type, **PRECISIONS[self.precision])

    def images(self, chosen: Tensor, augment: str = "none") -> Tensor:
        """The pictures with the indices `chosen` (B,), as input of the image tower: (B, 3, n, n),
        normalised, on the device.
        """
        if self.pixels is None and augment == "none":
            return next(self.stream([chosen]))
        pixels = self.pixels[chosen] if augment == "none" else self._views(chosen, augment)
        return normalize(pixels.to(self.device), config=self.reader.prepared)

    def stream(self, parts: list[Tensor]) -> Iterator[Tensor]:
        """`images` of each part; pictures of the next parts are decoded meanwhile."""
        if self.pixels is not None:
            yield from map(self.images, parts)
            return
        for pixels in self.reader.stream(self.pictures, self.hashes, parts):  # (B, 3, n, n)
            if self.device.type == "cuda":  # copied while the GPU computes with the previous ones
                pixels = pixels.pin_memory()
            pixels = pixels.to(self.device, non_blocking=True)
            yield normalize(pixels, config=self.reader.prepared)

    def inputs(self, method, chosen: Tensor, augment: str = "none") -> Tensor:
        """The pictures with the indices `chosen`, encoded for `method.classify` (B, …); with new
        random views, if augmented.
        """
        if augment == "none" and self.keeps(method):
            return self.encoded(method)[chosen]
        images = self.images(chosen, augment)
        if method.encoder is None:
            return method.encode(images)
        return torch.cat([method.encode(part) for part in images.split(64)])  # with less memory

    def each(self, method, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """For each of this rank's parts, the pictures with its indices (B,), encoded for
        `method.classify` (B, …); see `ranks.collect`.
        """
        if self.keeps(method):
            encoded = self.encoded(method)  # at once, since all ranks take part
            return (encoded[part] for part in ranks.mine(parts))
        return map(method.encode, self.stream(ranks.mine(parts)))

    def stored(self) -> tuple[dict, ...]:
        """What is stored of encoded pictures, for `restore`."""
        return {**self._encoded}, {**self._fits}, {**self._some}

    def restore(self, stored: tuple[dict, ...]) -> None:
        """Forget what was encoded since `stored`."""
        self._encoded, self._fits, self._some = stored

    def keeps(self, method) -> bool:
        """Whether encoded pictures are stored: not if no part of the method is frozen, nor if they
        take more than `room` bytes.
        """
        if (encoder := method.encoder) is None:
            return False
        if encoder not in self._fits:
            room = self.reader.room if self.room is None else self.room
            with torch.no_grad(), self.autocast():
                size = len(self) * method.encode(self.images(torch.tensor([0]))).nbytes
            self._fits[encoder] = size <= room
            if size > room and self.room != self.nbytes:  # the limit for test images
                warnings.warn(
                    f"encoded training or validation images take {size / 1e9:.1f} GB, more than "
                    f"the limit of {room / 1e9:.1f} GB (--cache-gb, or a share of free memory): "
                    "the frozen blocks are computed again in each step",
                    Note,
                    stacklevel=1,
                )
        return self._fits[encoder]

    def encoded(self, method, batch_size: int = 64) -> Tensor:
        """All pictures, encoded by `method.encode` (N, …), computed once.

        If the result is no larger than the pixels (features), it is also stored on disk for the
        next run. The file's name depends on the pixels, the encoder, CLIP's config (its heads), and
        on the hardware and versions, whose rounding may differ.
        """
        encoder = method.encoder
        if encoder not in self._encoded:
            machine = (torch.__version__, torch.get_num_threads(), self.device.type)
            if self.device.type == "cuda":
                machine += (torch.cuda.get_device_name(self.device),)
            else:
                machine += (fast.enabled, *fast.processor())
            machine += () if self.precision == "fp32" else (self.precision,)
            name = cache.key(self.hashes, encoder, method.clip.config, batch_size, machine)
            found = cache.load(self.reader.folder, "features", name)
            there = found is not None and found.shape[:1] == (len(self),)
            if not all(ranks.together(there)):  # unless all ranks have it, all encode
                parts = torch.arange(len(self)).split(batch_size)
                images = self.stream(ranks.mine(parts))
                count = len(ranks.mine(parts))
                shown = tqdm(images, "encoding images", count, leave=False, disable=None)
                with torch.no_grad(), self.autocast():
                    found = ranks.collect(parts, map(method.encode, shown))
                if found.nbytes <= self.nbytes and ranks.rank == 0:
                    cache.save(self.reader.folder, "features", name, found)
            self._encoded[encoder] = found.to(self.device)
        return self._encoded[encoder]

    def _views(self, chosen: Tensor, augment: str) -> Tensor:
        """A new random view of each picture, uint8 (B, 3, n, n), with torch's global generator.

        Most kinds are crops of 8 to 100 % of the area, flipped half the time.
        """
        size = self.reader.size
        bicubic = InterpolationMode.BICUBIC  # as CLIP's own crop
        cut = RandomResizedCrop(size, interpolation=bicubic)
        change = RandAugment(num_ops=2, magnitude=9)  # two operations of magnitude 9
        if augment == "random-crop":  # VPT's: at 224 pixels, of 256
            cut = Compose([Resize(size * 8 // 7, bicubic), RandomCrop(size)])
        elif augment == "randaugment-crop":  # DISEF's
            cut = Compose([change, cut])
        crops = torch.stack([tv.pil_to_tensor(cut(whole)) for whole in self._whole(chosen)])
        if augment == "randaugment-crop":  # which does not flip
            return crops
        flip = torch.rand(len(crops)) < 0.5  # (B,)
        crops = torch.where(flip[:, None, None, None], crops.flip(-1), crops)  # (B, 3, n, n)
        return torch.stack([change(x) for x in crops]) if augment == "randaugment" else crops

    def _whole(self, chosen: Tensor) -> list[Image.Image]:
        """The uncropped pictures, decoded once, as long as memory allows."""
        numbers = chosen.tolist()
        new = [i for i in dict.fromkeys(numbers) if i not in self._originals]
        with ThreadPoolExecutor(READERS) as pool:
            images = pool.map(lambda i: self.pictures.open(i).convert("RGB"), new)
            opened = dict(zip(new, images, strict=True))
        for i, image in opened.items():
            needed = 3 * image.width * image.height
            if needed <= self._left:
                self._originals[i] = image
                self._left -= needed
        return [self._originals.get(i) or opened[i] for i in numbers]
