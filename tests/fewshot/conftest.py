"""Pictures whose content says which they are, in memory and as files."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from fewshot.images import Pictures


@pytest.fixture
def noise():
    """(file, seed, size) -> writes a picture of coloured noise, and returns its path."""

    def write(path: Path, seed: int, size: tuple[int, int] = (40, 36)) -> Path:
        dice = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=dice, dtype=torch.uint8)
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
