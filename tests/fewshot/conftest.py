"""Pictures whose content says which they are, in memory and as files."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from fewshot.pictures import Pictures

SIZES = [(40, 36), (36, 40), (32, 32), (7, 5), (200, 33), (64, 64), (33, 90)]


@pytest.fixture
def noise():
    """(file, seed, size) -> writes a picture of coloured noise, and returns its path."""

    def write(path: Path, seed: int, size: tuple[int, int] = (40, 36)) -> Path:
        rng = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=rng, dtype=torch.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
        return path

    return write


@pytest.fixture
def numbered():
    """(labels, first) -> Pictures of 4 x 4 pixels that show their number, from `first` on."""

    def make(labels: list[int], first: int = 0) -> Pictures:
        numbers = torch.arange(first, first + len(labels))
        pixels = torch.stack([numbers // 256, numbers % 256, numbers * 0], dim=1)  # (N, 3)
        pixels = pixels.to(torch.uint8)[:, :, None, None].repeat(1, 1, 4, 4)  # (N, 3, 4, 4)
        return Pictures(pixels, torch.tensor(labels))

    return make


@pytest.fixture
def numbers():
    """pixels (N, 3, h, w) of `numbered` pictures -> the N numbers they show."""

    def read(pixels: torch.Tensor) -> list[int]:
        return (pixels[:, 0, 0, 0].int() * 256 + pixels[:, 1, 0, 0].int()).tolist()

    return read


@pytest.fixture
def files(noise, tmp_path):
    """Seven pictures of different shapes and formats."""
    endings = ["png", "jpg", "bmp", "gif", "webp", "tiff", "ppm"]
    return [
        noise(tmp_path / f"{i}.{ending}", i, size)
        for i, (ending, size) in enumerate(zip(endings, SIZES, strict=True))
    ]


@pytest.fixture
def pictures(files):
    return Pictures(files, torch.arange(7) % 3)
