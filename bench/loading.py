"""Loading photographs, beside torchvision's ImageFolder and a DataLoader with 2 workers.

    python bench/loading.py [--images 1000] [--rounds 2] [--threads 2]

1,000 JPEGs of 500 x 600 pixels, made here from a seed (soft shapes and grain, some 60 kB each),
are brought to CLIP's crops. "uint8" ends with the crop, which is what we keep; "normalised" is
what the image tower reads, OpenAI's transform to its end. Pixels are compared bit for bit first.
Ours reads in threads of one process, since Pillow decodes and resizes outside Python's lock. The
files lie in memory (the system's page cache) for all ways alike.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from side_by_side import seconds, show
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

from clip_min import normalize
from clip_min.preprocess import OPENAI
from fewshot.pictures import Pictures, Reader

SIZE = 224
BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="ours; DataLoader has 2 workers")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), flags.images, flags.rounds)
    show(f"loading {flags.images} JPEGs of 500 x 600", rows)


def measure(folder: Path, images: int, rounds: int) -> list[dict]:
    make(folder / "data", images)
    cut = [transforms.Resize(SIZE, InterpolationMode.BICUBIC), transforms.CenterCrop(SIZE)]
    crops = ImageFolder(folder / "data", transforms.Compose([*cut, transforms.PILToTensor()]))
    openai = [*cut, transforms.ToTensor(), transforms.Normalize(OPENAI.mean, OPENAI.std)]
    floats = ImageFolder(folder / "data", transforms.Compose(openai))
    paths = [Path(path) for path, _ in crops.samples]
    pictures = Pictures(paths, torch.tensor([label for _, label in crops.samples]))
    cache = folder / "cache"

    def loader(dataset):
        return DataLoader(dataset, batch_size=BATCH, num_workers=2)

    def pixels(keep: Path | None = None) -> torch.Tensor:
        return Reader(SIZE, folder=keep).read(pictures, [])[1]

    def first() -> None:
        shutil.rmtree(cache, ignore_errors=True)
        pixels(cache)

    kept = pixels(cache)
    for ours, (theirs, _), (read_by_model, _) in zip(
        kept.split(BATCH), loader(crops), loader(floats), strict=True
    ):
        assert torch.equal(ours, theirs)
        assert torch.equal(normalize(ours), read_by_model)

    def normalised(tensor: torch.Tensor) -> None:
        for batch in tensor.split(BATCH):
            normalize(batch)

    ways = {
        "ImageFolder + DataLoader, uint8": lambda: [None for _ in loader(crops)],
        "ours, uint8": pixels,
        "ours, uint8, and to the disk cache": first,
        "ours, uint8, from the disk cache": lambda: pixels(cache),
        "ImageFolder + DataLoader, normalised": lambda: [None for _ in loader(floats)],
        "ours, normalised": lambda: normalised(pixels()),
        "ours, normalised, every later epoch": lambda: normalised(kept),
    }
    taken = seconds(ways, rounds)
    return [
        {
            "way": name,
            "seconds": taken[name],
            "images/s": images / taken[name],
            "faster by": taken[f"ImageFolder + DataLoader, {_kind(name)}"] / taken[name],
        }
        for name in ways
    ]


def _kind(name: str) -> str:
    return "normalised" if "normalised" in name else "uint8"


def make(folder: Path, count: int) -> None:
    """Soft coloured shapes with grain, half of them upright: two classes of JPEGs."""
    dice = np.random.default_rng(0)
    grain = dice.normal(0, 4, (500, 600, 1))
    for i in range(count):
        shapes = Image.fromarray(dice.integers(0, 256, (20, 24, 3), dtype=np.uint8))
        photo = np.asarray(shapes.resize((600, 500), Image.Resampling.BICUBIC))
        photo = photo + np.roll(grain, dice.integers(500), axis=0)
        image = Image.fromarray(photo.clip(0, 255).astype(np.uint8))
        if i % 2:
            image = image.transpose(Image.Transpose.ROTATE_90)
        path = folder / ("upright" if i % 2 else "wide") / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=88)


if __name__ == "__main__":
    main()
