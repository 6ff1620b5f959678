"""Pictures, as batches that a method reads: normalised, augmented, or encoded."""

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

from clip_min import UserError, normalize
from clip_min.errors import Note
from fewshot import cache, ranks
from fewshot.pictures import READERS, Pictures, Reader, free_memory, pixel_hash

KEPT = 1e9  # bytes of whole pictures that are kept in memory where crops are drawn anew each time

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """fp32: changes nothing. bf16, fp16: matrix products run in it, weights and sums stay fp32."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


class NeedsPictures(UserError):
    """A method, or what it is to do, needs more of pictures than their features."""


class Batches:
    """N labelled pictures, ready to be fed to a method.

    pixels (N, 3, n, n) uint8 crops, in memory; or None, and pictures are read whenever they are
    needed, and have these hashes (N, 32) of their pixels (`Reader.check`). labels (N,).
    synthetic (N,) bool: which ones gen/ painted; None if all are real. `apart`: are these drawn
    into batches apart from the real ones?
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
        self.apart = False
        self.nbytes = len(self) * 3 * reader.size**2  # of the pixels
        self.room = self.nbytes  # that encoded pictures may take in memory
        self._encoded: dict[tuple, Tensor] = {}  # by what encodes them
        self._fits: dict[tuple | None, bool] = {}
        self._originals: dict[int, Image.Image] = {}
        self._room = KEPT

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def hashes(self) -> Tensor:
        """`pixel_hash` of each picture (N, 32)."""
        if self._hashes is None:
            self._hashes = torch.stack([pixel_hash(pixels) for pixels in self.pixels])
        return self._hashes

    def check(self, method) -> None:
        """UserError, if the method needs what is not there; of pictures, all is."""

    @property
    def shots(self) -> int:
        """Pictures in the largest class, synthetic ones not counted."""
        labels = self.labels if self.synthetic is None else self.labels[~self.synthetic]
        return int(labels.cpu().bincount().max())

    def class_weights(self, count: int) -> Tensor:
        """(K,) N / (K · n_k), for n_k real pictures of each of `count` classes: by these, classes
        weigh alike, and a picture 1 on average.
        """
        labels = self.real().labels
        return len(labels) / (count * labels.bincount(minlength=count).clamp(min=1))

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

    def some(self, most: int) -> "Batches":
        """`most` of the real pictures at most, evenly spread over them."""
        real = self.real()
        return real.part(torch.arange(0, len(real), math.ceil(len(real) / most)))

    def part(self, chosen: Tensor) -> "Batches":
        """The pictures with the numbers `chosen` (B,), as real ones."""
        part = Batches(self.pictures[chosen], self.pixels[chosen], self.reader)
        part._encoded = {encoder: x[chosen] for encoder, x in self._encoded.items()}
        part._fits = dict(self._fits)
        return part

    def join(self, synthetic: "Batches") -> "Batches":
        """These pictures, which are real, and then synthetic ones of the same size."""
        sources = [*self.pictures.source, *synthetic.pictures.source]
        labels = torch.cat([self.pictures.labels, synthetic.pictures.labels])
        pixels = torch.cat([self.pixels, synthetic.pixels])
        known = self.pictures.digests, synthetic.pictures.digests
        digests = None if None in known else known[0] + known[1]
        joined = Batches(Pictures(sources, labels, digests), pixels, self.reader)
        joined.synthetic = torch.arange(len(joined), device=self.device) >= len(self)
        return joined

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
        if self.pixels is None and augment == "none":
            return next(self.stream([chosen]))
        pixels = self.pixels[chosen] if augment == "none" else self._views(chosen, augment)
        if augment == "randaugment":  # after the crop, two operations of magnitude 9
            change = RandAugment(num_ops=2, magnitude=9)
            pixels = torch.stack([change(image) for image in pixels])
        return normalize(pixels.to(self.device), config=self.reader.prepared)

    def stream(self, parts: list[Tensor]) -> Iterator[Tensor]:
        """`images` of each part; what has to be decoded for the next ones, is meanwhile."""
        if self.pixels is not None:
            yield from map(self.images, parts)
            return
        for pixels in self.reader.stream(self.pictures, self.hashes, parts):  # (B, 3, n, n)
            if self.device.type == "cuda":  # copied while the GPU computes with those before
                pixels = pixels.pin_memory()
            pixels = pixels.to(self.device, non_blocking=True)
            yield normalize(pixels, config=self.reader.prepared)

    def inputs(self, method, chosen: Tensor, augment: str = "none") -> Tensor:
        """The pictures with the numbers `chosen`, encoded for `method.classify` (B, …); augmented
        ones each time anew.
        """
        if augment == "none" and self.keeps(method):
            return self.encoded(method)[chosen]
        return self.fresh(method, chosen, augment)

    def fresh(self, method, chosen: Tensor, augment: str = "none") -> Tensor:
        """The same, encoded now, whatever is kept."""
        return method.encode(self.images(chosen, augment))

    def each(self, method, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """Of the pictures with the numbers in each part (B,), those of this rank's parts, encoded
        for `method.classify`, a part (B, …) at a time; see `ranks.collect`.
        """
        if self.keeps(method):
            encoded = self.encoded(method)  # now: each rank has its part in it
            return (encoded[part] for part in ranks.mine(parts))
        return map(method.encode, self.stream(ranks.mine(parts)))

    def keeps(self, method) -> bool:
        """Whether encoded pictures are kept: not if nothing of the method is frozen, so that they
        are the pictures themselves; nor if they take more than `room` bytes.
        """
        if (encoder := method.encoder) not in self._fits:
            with torch.no_grad(), self.autocast():
                one = encoder and method.encode(self.images(torch.tensor([0])))
            size = len(self) * one.nbytes if encoder else 0
            self._fits[encoder] = 0 < size <= self.room
            if size > self.room > self.nbytes:
                warnings.warn(
                    f"encoded training or validation images take {size / 1e9:.1f} GB, more than "
                    f"the {self.room / 1e9:.1f} GB they may (--cache-gb, or half of what is free): "
                    "the frozen blocks compute them again in each step",
                    Note,
                    stacklevel=1,
                )
        return self._fits[encoder]

    def encoded(self, method, batch_size: int = 64) -> Tensor:
        """Every picture as `method.encode` gives it (N, …), computed once.

        What takes no more room than the pixels (features) is kept on disk for the next run, too,
        under a name that follows from the pixels, from what encodes them, from CLIP's config (its
        heads) and from what computes (whose rounding may differ).
        """
        encoder = method.encoder
        if encoder not in self._encoded:
            machine = (torch.__version__, torch.get_num_threads(), self.device.type)
            machine += () if self.precision == "fp32" else (self.precision,)
            name = cache.key(self.hashes, encoder, method.clip.config, batch_size, machine)
            found = cache.load(self.reader.folder, "features", name)
            there = found is not None and found.shape[:1] == (len(self),)
            if not all(ranks.together(there)):  # on all ranks, or all encode
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
        """A fresh random view of each picture, uint8 (B, 3, n, n), from torch's global generator.

        Most are crops of 8 to 100 % of the area, flipped half the time.
        """
        size = self.reader.size
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


def room(device: torch.device) -> float:
    """Bytes that encoded training images may take in memory, and as many those of validation."""
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else free_memory()
    return ranks.same(min(cache.limit, free / 3 / (1 if on_gpu else ranks.size)))
