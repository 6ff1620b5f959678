"""Time embed.py and its parts: only decoding, and only `encode_image` on pixels in memory.

    python bench/embedding.py [--model demo,ViT-B/32,ViT-B/16] [--images 500] [--rounds 2]

The data are generated JPEGs of 500 x 600 pixels (bench/loading.py) in a tar file, as in WebDataset,
in batches of 64. ViTs have random weights. "of computing" is the speed relative to `encode_image`
alone: 1 if only the model takes time. With few cores it is lower, as decoding also needs some of
their time: "bound" is the largest value that these cores allow,

    bound = t / max(t, d, (c_t + c_d) / cores)

where t and d are the seconds of only computing and only decoding, on all cores, and c_t and c_d
their processor seconds (with a GPU, those of the CPU). "cpu" is processor seconds: embed.py's
should be the sum of the other two; anything above is its own overhead.
"""

import argparse
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import torch
from loading import make
from side_by_side import show

import clip_min
from clip_min import CLIP, CONFIGS, normalize
from fewshot.pictures import ahead, cut, open_image
from fewshot.shards import Shards, embed, items

BATCH = 64
COLUMNS = ("of computing", "bound")


def timed(ways: dict, rounds: int) -> dict[str, tuple[float, float]]:
    """Way -> median seconds and processor seconds over `rounds`, in turn, after one round."""
    found = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            began, cpu = time.perf_counter(), time.process_time()
            way()
            found[name].append((time.perf_counter() - began, time.process_time() - cpu))
    return {
        name: tuple(map(statistics.median, zip(*values[1:], strict=True)))
        for name, values in found.items()
    }


def measure(name: str, tar: Path, device: torch.device, rounds: int) -> list[dict]:
    torch.manual_seed(0)
    clip = clip_min.load(name) if name == "demo" else CLIP(CONFIGS[name])
    clip = clip.to(device).eval()
    # As Experiment.prepare: a small model computes in one thread.
    torch.set_num_threads(1 if name == "demo" else len(os.sched_getaffinity(0)))

    def decode() -> list[torch.Tensor]:
        each = ahead(lambda item: cut(open_image(item.file, item.content), clip.config), items(tar))
        return list(each)

    pixels = torch.stack(decode())  # (N, 3, n, n)

    @torch.no_grad()
    def compute() -> torch.Tensor:
        each = [
            clip.encode_image(normalize(part.to(device), config=clip.config))
            for part in pixels.split(BATCH)
        ]
        return torch.cat(each).cpu()

    def whole() -> torch.Tensor:
        with tempfile.TemporaryDirectory() as folder:
            shards = Shards(Path(folder) / "features", {}, 4096)
            embed(clip, items(tar), shards, BATCH, "fp32")
            return shards.features(0).clone()

    assert torch.allclose(whole(), compute()[:4096], rtol=1e-3, atol=1e-4)
    ways = {"decoding alone": decode, "encode_image alone": compute, "embed.py": whole}
    found = timed(ways, rounds)
    (d, c_d), (t, c_t), (s, _) = found.values()
    bound = t / max(t, d, (c_t + c_d) / len(os.sched_getaffinity(0)))
    rows = [
        {"way": f"{name}: {way}", "images/s": len(pixels) / taken, "cpu": cpu}
        | dict.fromkeys(COLUMNS)
        for way, (taken, cpu) in found.items()
    ]
    rows[-1] |= dict(zip(COLUMNS, (t / s, bound), strict=True))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo,ViT-B/32,ViT-B/16")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    flags = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "data", flags.images)
        tar = Path(folder) / "pictures.tar"
        with tarfile.open(tar, "w") as out:
            for file in sorted((Path(folder) / "data").rglob("*.jpg")):
                out.add(file, file.name)
        for name in flags.model.split(","):
            rows += measure(name, tar, torch.device(flags.device), flags.rounds)
    show(f"{flags.images} JPEGs of 500 x 600 to features, {flags.device}", rows)


if __name__ == "__main__":
    main()
