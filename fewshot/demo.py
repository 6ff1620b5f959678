"""The demo world: drawn flowers, so that everything runs without a network and without data.

A species is a petal colour x a petal shape x an eye colour, and its name describes it: "pink star
with a yellow eye". The task has 102 species, 51 base and 51 novel as in Flowers102. All others are
for pretraining, so a model recognises a task species by combining words that it learned from other
flowers. There are two styles: a `drawing` on plain paper, and a `photo` with leaves, evening light,
tilt, blur and grain. The demo CLIP was pretrained only on drawings, and adaptation has to close the
gap between drawings and photos.

Petals are polar curves: the pixel at angle t and distance r from the eye is petal if r < R(t), with
a function R for each shape. All randomness of an image comes from its own row of `noise`, random
numbers drawn in advance. An image therefore does not depend on the rest of its batch, and nearly
equal noise gives nearly equal images.

    python -m fewshot.demo OUT      writes the task as a folder of images
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from math import pi
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clip_min.errors import UserError

TEMPLATE = "a photo of a {}, a type of flower."
PER_CLASS = {"train": 10, "val": 10, "test": 10}  # images
NOISE = 256  # random numbers for an image

COLOURS = {  # sRGB; petals come in the first twelve
    "red": (214, 36, 40),
    "orange": (243, 132, 32),
    "yellow": (246, 214, 48),
    "lime": (160, 212, 56),
    "teal": (24, 148, 138),
    "blue": (48, 88, 214),
    "purple": (122, 52, 176),
    "lavender": (186, 164, 236),
    "pink": (246, 152, 192),
    "magenta": (212, 36, 148),
    "white": (250, 250, 246),
    "maroon": (118, 22, 46),
    "black": (28, 24, 30),
    "green": (38, 120, 52),
}
PETALS = list(COLOURS)[:12]
EYES = ["yellow", "white", "black", "red", "green", "blue"]


def _waves(t: Tensor, n: int) -> Tensor:
    return 0.5 + 0.5 * torch.cos(n * t)  # n round petals: 1 at a tip, 0 between two


def _spikes(t: Tensor, n: int) -> Tensor:
    return (2 * (n * t / (2 * pi) % 1) - 1).abs()  # the same, pointed


def _saw(t: Tensor, n: int) -> Tensor:
    s = n * t / (2 * pi) % 1
    return torch.minimum(s / 0.85, (1 - s) / 0.15)  # pointed, and leaning to one side


def _bump(t: Tensor, at: float, width: float) -> Tensor:
    return torch.exp(-(((t - at + pi) % (2 * pi) - pi) ** 2) / (2 * width**2))


def _pair(t: Tensor, at: float, width: float) -> Tensor:
    return _bump(t, at, width) + _bump(t, -at, width)  # one left, one right


SHAPES = {  # R(t), from the eye to the rim, about 1 at most; t runs clockwise from the top
    "star": lambda t: 0.36 + 0.64 * _spikes(t, 5) ** 1.3,
    "daisy": lambda t: 0.5 + 0.5 * _waves(t, 12) ** 0.4,
    "rose": lambda t: 0.72 + 0.18 * _waves(t, 6) ** 0.5,
    "bell": lambda t: 0.62 + 0.38 * _pair(t, 2.35, 0.28) + 0.16 * _bump(t, 0, 0.5),
    "wheel": lambda t: 0.4 + 0.55 * torch.sigmoid(20 * (_waves(t, 8) - 0.3)),
    "cross": lambda t: 0.3 + 0.7 * _waves(t, 4) ** 0.5,
    "clover": lambda t: 0.28 + 0.68 * _waves(t, 3) ** 0.35 - 0.12 * _waves(t, 3) ** 20,
    "windmill": lambda t: 0.36 + 0.64 * _saw(t, 6),
    "butterfly": lambda t: 0.28 + 0.72 * _pair(t, 0.85, 0.38) + 0.42 * _pair(t, 2.4, 0.3),
    "tulip": lambda t: 0.62 + 0.38 * (_bump(t, 0, 0.12) + _pair(t, 0.7, 0.12)),
}
ANGLES = 720  # R is tabulated, as a table can be indexed by species and functions cannot
RIMS = torch.stack([R(torch.arange(ANGLES) * 2 * pi / ANGLES) for R in SHAPES.values()])
PALETTE = torch.tensor(list(COLOURS.values())) / 255  # (colours, 3)


class Species(NamedTuple):
    """Species("pink", "star", "yellow").name is "pink star with a yellow eye"."""

    colour: str
    shape: str
    eye: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape} with a {self.eye} eye"


def _botany() -> tuple[list[Species], list[Species]]:
    """-> the task's species, base before novel, and the species for pretraining."""
    left = [Species(c, s, e) for c in PETALS for s in SHAPES for e in EYES if c != e]
    order = torch.randperm(len(left), generator=torch.Generator().manual_seed(0))
    left = [left[i] for i in order]
    task = []
    for half in (51, 51):
        seen = Counter()
        for _ in range(half):  # the rarest traits so far first, so that a half has equal shares
            species = min(left, key=lambda s: sum(seen[trait] ** 2 for trait in enumerate(s)))
            seen.update(enumerate(species))
            left.remove(species)
            task.append(species)
    return task, left


TASK, PRETRAINING = _botany()
CLASSNAMES = [species.name for species in TASK]


def indices(species: list[Species]) -> Tensor:
    """-> (N, 3) int64: colour, shape, eye as row numbers of COLOURS, SHAPES, COLOURS."""
    colours, shapes = list(COLOURS), list(SHAPES)
    return torch.tensor(
        [(colours.index(c), shapes.index(s), colours.index(e)) for c, s, e in species]
    )


def draw_noise(n: int, seed: int) -> Tensor:
    """-> noise (n, NOISE), uniform in [0, 1); the first rows are the same for every n."""
    return torch.rand(n, NOISE, generator=torch.Generator().manual_seed(seed))


def split(name: str, size: int = 64) -> tuple[Tensor, Tensor]:
    """The task's "train", "val" or "test" -> images (N, 3, size, size) uint8, labels (N,) int64.

    Photos, sorted by label, an index of CLASSNAMES. They are always the same: an experiment's seed
    only chooses the shots.
    """
    labels = torch.arange(len(TASK)).repeat_interleave(PER_CLASS[name])  # (N,)
    noise = draw_noise(len(labels), seed=1 + list(PER_CLASS).index(name))
    return render(indices(TASK)[labels], noise, "photo", size), labels


def render(species: Tensor, noise: Tensor, style: str, size: int = 64, chunk: int = 32) -> Tensor:
    """species (N, 3) from `indices`, noise (N, NOISE) -> images (N, 3, size, size) uint8.

    style: "drawing" or "photo". `chunk` images are painted at once, about 1 MB each at 64 pixels;
    it does not change the pixels.
    """
    paint = {"drawing": _drawing, "photo": _photo}[style]
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    x, y = axis.view(1, 1, 1, -1), -axis.view(1, 1, -1, 1)  # of the pixels
    images = torch.empty(len(species), 3, size, size, dtype=torch.uint8)
    for rows in torch.arange(len(species)).split(chunk):
        painting = paint(species[rows], _Noise(noise[rows]), x, y)  # (n, 3, size, size), 0 to 1
        images[rows] = (painting.clamp(0, 1) * 255).round().to(torch.uint8)
    return images


# Below, N images are planes (N, 1 or 3, n, n) with values from 0 to 1. Lengths are in half image
# widths: (0, 0) is the middle of an image, x = 1 its right edge and y = 1 its upper one.


@dataclass
class _Noise:
    """Returns the columns of noise (N, NOISE) from left to right."""

    left: Tensor

    def __call__(self, low: float, high: float, n: int = 1) -> Tensor:
        """-> (N, n, 1, 1), uniform between low and high."""
        values, self.left = self.left[:, :n, None, None], self.left[:, n:]
        return low + (high - low) * values


def _drawing(species: Tensor, noise: _Noise, x: Tensor, y: Tensor) -> Tensor:
    x, y = _pose(noise, x, y, shift=0.15, turn=0.35, radius=(0.55, 0.82), tilt=1)
    paper = noise(0.3, 0.95) + noise(-0.1, 0.1, n=3)  # (N, 3, 1, 1)
    return _flower(paper, species, x, y)


def _photo(species: Tensor, noise: _Noise, x: Tensor, y: Tensor) -> Tensor:
    size = x.shape[-1]
    u, v = _pose(noise, x, y, shift=0.18, turn=0.45, radius=(0.52, 0.8), tilt=0.8)
    coarse, fine = noise(0, 0.6, 36).view(-1, 1, 6, 6), noise(0, 0.4, 121).view(-1, 1, 11, 11)
    ground = (F.interpolate(g, (size, size), mode="bilinear") for g in (coarse, fine))
    image = _earth(sum(ground))
    for _ in range(6):
        image = _leaf(image, noise, x, y)
    shadow = torch.sigmoid((0.75 - torch.hypot(u - 0.15, v + 0.2)) / 0.15)  # of the flower
    image = image * (1 - 0.5 * shadow)
    image = _flower(image, species, u, v)
    image = _leaf(image, noise, x, y)  # may lie on the flower
    x, _ = _rotate(x, y, noise(0, 2 * pi))
    evening = torch.tensor([1.04, 0.94, 0.84]).view(3, 1, 1) + noise(-0.1, 0.1, n=3)
    image = image * evening * (1 + noise(0.1, 0.4) * x)  # from one side
    image = 0.12 + image * noise(0.6, 0.85)  # haze
    soft = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    image = torch.lerp(image, soft, noise(0, 1))
    # Grain is a window at a random place of a sheet of film: two random numbers, not 3·n².
    film = torch.rand(3, 2 * size, 2 * size, generator=torch.Generator().manual_seed(0)) - 0.5
    down, right = (noise(0, size)[:, 0].long() for _ in range(2))  # (N, 1, 1)
    pixel = torch.arange(size)
    grain = film[:, down + pixel[:, None], right + pixel].transpose(0, 1)  # (3, N, …) -> (N, 3, …)
    return image + noise(0.05, 0.25) * grain


def _rotate(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()


def _pose(noise: _Noise, x, y, shift, turn, radius, tilt) -> tuple[Tensor, Tensor]:
    """-> (N, 1, n, n) twice: where each pixel (x, y) lies on a flower of radius 1.

    The flower is up to `shift` off the middle and rotated by up to `turn` radians, its radius is in
    the range `radius`, and a tilt shortens it in some direction, at most to `tilt`.
    """
    x, y = x - noise(-shift, shift), y - noise(-shift, shift)
    radius, turn, axis = noise(*radius), noise(-turn, turn), noise(0, pi)
    x, y = _rotate(x / radius, y / radius, axis)
    return _rotate(x / noise(tilt, 1), y, turn - axis)


def _inside(f: Tensor) -> Tensor:
    """f (N, 1, n, n) -> 1 where f < 0, 0 where f > 0, with a soft edge one pixel wide.

    f divided by its slope is the distance to the edge in pixels.
    """
    dy, dx = torch.gradient(f, dim=(-2, -1))
    return (0.5 - f / torch.hypot(dx, dy).clamp(min=1e-6)).clamp(0, 1)


def _flower(canvas: Tensor, species: Tensor, x: Tensor, y: Tensor) -> Tensor:
    colour, shape, eye = species.unbind(1)  # (N,) each
    shape = shape.view(-1, 1, 1, 1)
    r, t = torch.hypot(x, y), torch.atan2(x, y) / (2 * pi) % 1 * ANGLES  # (N, 1, n, n)
    rim = RIMS[shape, t.long() % ANGLES]  # (N, 1, n, n), R(t)
    shade = (0.62 + 0.38 * rim) * (0.85 + 0.15 * r)  # darker between petals and near the eye,
    shade = shade * (1 - 0.3 * torch.sigmoid((r - rim + 0.04) * 40))  # and along the rim
    canvas = torch.lerp(canvas, PALETTE[colour][:, :, None, None] * shade, _inside(r - rim))
    shade = 1 - 0.3 * torch.sigmoid((r - 0.24) * 40)
    return torch.lerp(canvas, PALETTE[eye][:, :, None, None] * shade, _inside(r - 0.28))


def _earth(height: Tensor) -> Tensor:
    """height (N, 1, ...), 0 to 1 -> (N, 3, ...): soil, moss, leaf, straw and what is between."""
    colours = torch.tensor([(58, 44, 30), (50, 74, 36), (86, 118, 52), (150, 140, 84)]) / 255
    shares = ((1 - (3 * height - i).abs()).clamp(min=0) for i in range(4))
    return sum(share * rgb.view(3, 1, 1) for share, rgb in zip(shares, colours, strict=True))


def _leaf(canvas: Tensor, noise: _Noise, x: Tensor, y: Tensor) -> Tensor:
    x, y = _rotate(x - noise(-1, 1), y - noise(-1, 1), noise(0, 2 * pi))
    blade = _inside(y.abs() / noise(0.1, 0.22) + (x / noise(0.3, 0.7)) ** 2 - 1)
    shade = 0.9 + 0.25 * torch.sigmoid(y * 60)  # lit on one side of the midrib
    return torch.lerp(canvas, _earth(noise(0.25, 0.95)) * shade, blade)


def write(root: str | Path, size: int = 64) -> None:
    """Write the task as files root/SPLIT/CLASS/NNN.png, with dashes for spaces in class names.

    UserError, if root is not a new or empty folder, or if images would be too small.
    """
    if size < 8:
        raise UserError(f"--size {size}: expected 8 pixels or more")
    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root}: exists and is not empty; give a new or empty folder")
    for name, per_class in PER_CLASS.items():
        for i, (image, label) in enumerate(zip(*split(name, size), strict=True)):
            folder = root / name / CLASSNAMES[label].replace(" ", "-")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = image.permute(1, 2, 0).numpy()  # (3, n, n) -> (n, n, 3)
            Image.fromarray(pixels).save(folder / f"{i % per_class:03d}.png")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fewshot.demo", description="Write the demo task as a folder of images."
    )
    parser.add_argument("out", metavar="OUT", help="a new or empty folder")
    parser.add_argument(
        "--size", type=int, default=64, help="pixels, square (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    try:
        write(arguments.out, arguments.size)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = "/".join(map(str, PER_CLASS.values()))
    print(f"{arguments.out}: {len(TASK)} classes, {counts} images each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
