"""Load photographs with our code, and with torchvision's ImageFolder and a DataLoader (2 workers).

    python bench/loading.py [--images 1000] [--rounds 2] [--threads 2]
    python bench/loading.py --stream [--device cuda]   test pictures, decoded ahead of the model

1,000 JPEGs of 500 x 600 pixels, made from a seed (soft shapes and grain, about 60 kB each), are
decoded and cropped as for CLIP. "uint8" ends with the crop, which we store; "normalised" is the
image tower's input, the complete transform of OpenAI. First, pixels are compared bit for bit. Our
code reads with threads of a single process, since Pillow decodes and resizes outside Python's lock.
In all cases the files are in the system's page cache.

With --stream, a ViT-B/16 with random weights encodes the pictures: streamed, as `evaluate` does
with test pictures; decoding alone; and computing alone on pixels in memory. The best possible ratio
of streaming to the slower of these two is 1. Then come seconds and peak memory of `eval.py`: on
5,000 and on 50,000 test pictures, and on 5,000 pictures classified into a table (--csv); the demo
model, 100 x 100 pixels, the same 1,000 pictures under other names.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from side_by_side import seconds, show
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

import fewshot.batches
import fewshot.pictures
from clip_min import CLIP, CONFIGS, normalize
from clip_min.preprocess import OPENAI
from fewshot.batches import Batches
from fewshot.pictures import Pictures, Reader
from methods import METHODS

SIZE = 224
BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of ours; workers of DataLoader")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--device", default="cpu")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    for module in (fewshot.batches, fewshot.pictures):
        module.READERS = flags.threads  # threads that decode and hash
    with tempfile.TemporaryDirectory() as folder:
        if flags.stream:
            rows = stream(Path(folder), flags.images, flags.rounds, torch.device(flags.device))
            show(f"encoding {flags.images} JPEGs of 500 x 600, ViT-B/16, {flags.device}", rows)
            rows = [tested(Path(folder) / str(count), count) for count in (5_000, 50_000)]
            grown = rows[1]["peak MB"] - rows[0]["peak MB"]
            rows.append(named(Path(folder) / "5000", 5_000))
            show(f"eval.py on the demo model; memory grows by {grown:.0f} MB", rows, threads=1)
            return
        rows = measure(Path(folder), flags.images, flags.rounds, flags.threads)
    show(f"loading {flags.images} JPEGs of 500 x 600", rows)


def stream(folder: Path, images: int, rounds: int, device: torch.device) -> list[dict]:
    make(folder / "data", images)
    files = sorted(folder.rglob("*.jpg"))
    reader = Reader(SIZE, device, folder=None)
    pictures, hashes = reader.check(Pictures(files, torch.zeros(images, dtype=torch.int64)), [])
    pixels = reader.read(pictures, [])[1]
    parts = torch.arange(images).split(64)
    torch.manual_seed(0)
    method = METHODS["zero_shot"].plain(CLIP(CONFIGS["ViT-B/16"]).to(device), ["a"], "a {}")

    def encoded(*source) -> torch.Tensor:
        return Batches(pictures, source[0], reader, hashes).encoded(method)

    assert torch.equal(encoded(pixels), encoded(None))
    ways = {
        "decoding alone": lambda: [None for _ in reader.stream(pictures, hashes, parts)],
        "computing alone": lambda: encoded(pixels).cpu(),
        "streaming": lambda: encoded(None).cpu(),
    }
    taken = seconds(ways, rounds)
    longer = max(taken["decoding alone"], taken["computing alone"])
    return [
        {
            "way": name,
            "seconds": taken[name],
            "images/s": images / taken[name],
            "of the longer one": taken[name] / longer,
        }
        for name in ways
    ]


def tested(folder: Path, count: int) -> dict:
    """Run eval.py on `count` test pictures of ten classes, in a fresh process."""
    made = folder.with_name("small")
    if not made.exists():
        make(made, 1000, (100, 100))
    for i, file in zip(range(count), itertools.cycle(sorted(made.rglob("*.jpg")))):
        for part in ("train", "test") if i < 100 else ("test",):
            link = folder / part / f"flower {i % 10}" / f"{part}{i}.jpg"
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, link)
    cache = folder.with_name(f"cache of {folder.name}")  # a cache of its own, empty
    flags = ["--method", "zero_shot", "--dataset", "folder", "--data-root", str(folder)]
    return timed("tested", count, *flags, "--cache", str(cache))


def named(folder: Path, count: int) -> dict:
    """Run eval.py --csv: a row for each of `count` pictures without labels."""
    names = ",".join(f"flower {k}" for k in range(10))
    table = str(folder.with_name("answers.csv"))
    flags = ["--method", "zero_shot", "--image", str(folder / "test")]
    return timed("named", count, *flags, "--classes", names, "--csv", table)


def timed(what: str, count: int, *flags: str) -> dict:
    """Seconds and peak memory of `eval.py` with these flags, in a fresh process."""
    # VmHWM, since getrusage also counts the process that started this one.
    code = (
        "import eval; eval.run_script(eval.main); "
        "print(*[line.split()[1] for line in open('/proc/self/status') if line[:5] == 'VmHWM'])"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, "--model", "demo", *flags],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    taken = time.perf_counter() - started
    return {
        "pictures": f"{count:,} {what}",
        "peak MB": int(done.stdout.split()[-1]) * 1024 / 1e6,  # from KiB
        "seconds": taken,
        "images/s": count / taken,
    }


def measure(folder: Path, images: int, rounds: int, workers: int) -> list[dict]:
    make(folder / "data", images)
    cut = [transforms.Resize(SIZE, InterpolationMode.BICUBIC), transforms.CenterCrop(SIZE)]
    crops = ImageFolder(folder / "data", transforms.Compose([*cut, transforms.PILToTensor()]))
    openai = [*cut, transforms.ToTensor(), transforms.Normalize(OPENAI.mean, OPENAI.std)]
    floats = ImageFolder(folder / "data", transforms.Compose(openai))
    paths = [Path(path) for path, _ in crops.samples]
    pictures = Pictures(paths, torch.tensor([label for _, label in crops.samples]))
    cache = folder / "cache"

    def loader(dataset):
        return DataLoader(dataset, batch_size=BATCH, num_workers=workers)

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


def make(folder: Path, count: int, size: tuple[int, int] = (600, 500)) -> None:
    """Two classes of JPEGs: soft coloured shapes with grain, half of them upright."""
    rng = np.random.default_rng(0)
    grain = rng.normal(0, 4, (*size[::-1], 1))
    for i in range(count):
        shapes = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
        photo = np.asarray(shapes.resize(size, Image.Resampling.BICUBIC))
        photo = photo + np.roll(grain, rng.integers(size[1]), axis=0)
        image = Image.fromarray(photo.clip(0, 255).astype(np.uint8))
        if i % 2:
            image = image.transpose(Image.Transpose.ROTATE_90)
        path = folder / ("upright" if i % 2 else "wide") / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=88)


if __name__ == "__main__":
    main()
