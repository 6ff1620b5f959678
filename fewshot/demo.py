"""The demo world: a botany of drawn flowers, so that everything runs with no network and no data.

A species is a petal colour x a petal shape x an eye colour, and its name says how it looks: "pink
star with a yellow eye". 102 species are the task, 51 base and 51 novel as in Flowers102; all the
others are for pretraining, so a model that recognises a task species has put its name together
from words it learned on other flowers. A flower comes in two styles: a `drawing` on plain paper,
and a `photo` with leaves, evening light, tilt, blur and grain. The demo CLIP learned from drawings
alone, so the gap between drawing and photo is what adaptation has to close.

Petals are polar curves: the pixel at angle t and distance r from the eye is petal where r < R(t);
one function R a shape is all there is to it. Everything random about an image comes from its own
row of `dice`, numbers rolled beforehand. So no image depends on its neighbours in a batch, and
dice that are nearly equal make images that are nearly equal.

    python -m fewshot.demo OUT      writes the task as a folder of images
"""

import argparse
from collections import Counter
from collections import Counter
from math import pi
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

TEMPLATE = "a photo of a {}, a type of flower."
PER_CLASS = {"train": 10, "val": 10, "test": 10}  # images
DICE = 256  # numbers rolled for an image
CHUNK = 128  # images rendered at once: about 100 MB at 64 pixels

COLOURS = {  # sRGB, of paint on white paper
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
    "black": (28, 24, 30),  # black and green are colours of eyes only
    "green": (38, 120, 52),
}
PETALS = list(COLOURS)[:12]
EYES = ["yellow", "white", "black", "red", "green", "blue"]
PALETTE = torch.tensor(list(COLOURS.values())) / 255  # (colours, 3)
# Ground and leaves of photos, dark to light: soil, moss, leaf, straw.
GROUND = torch.tensor([(58, 44, 30), (50, 74, 36), (86, 118, 52), (150, 140, 84)]) / 255  # (4, 3)


def _waves(t: Tensor, n: int) -> Tensor:
    return 0.5 + 0.5 * torch.cos(n * t)  # n round petals, 1 at a tip and 0 between two


def _spikes(t: Tensor, n: int) -> Tensor:
    return (2 * (n * t / (2 * pi) % 1) - 1).abs()  # the same, pointed


def _bump(t: Tensor, at: float, width: float) -> Tensor:
    return torch.exp(-((((t - at + pi) % (2 * pi)) - pi) ** 2) / (2 * width**2))


SHAPES = {  # R(t), the distance from the eye to the rim: about 1 at most; t = 0 points up
    "star": lambda t: 0.36 + 0.64 * _spikes(t, 5) ** 1.3,
    "daisy": lambda t: 0.5 + 0.5 * _waves(t, 12) ** 0.4,
    "rose": lambda t: 0.72 + 0.18 * _waves(t, 6) ** 0.5,
    "bell": lambda t: (
        0.62
        + 0.38 * (_bump(t, 2.35, 0.28) + _bump(t, -2.35, 0.28))
        + 0.12 * _bump(t, pi, 0.3)
        + 0.16 * _bump(t, 0, 0.5)
    ),
    "wheel": lambda t: 0.4 + 0.55 * torch.sigmoid(20 * (_waves(t, 8) - 0.3)),
    "cross": lambda t: 0.3 + 0.7 * _waves(t, 4) ** 0.5,
    "clover": lambda t: 0.28 + 0.68 * _waves(t, 3) ** 0.35 - 0.12 * _waves(t, 3) ** 20,
    "windmill": lambda t: 0.36 + 0.64 * (6 * t / (2 * pi) % 1),
    "butterfly": lambda t: (
        0.28
        + 0.72 * (_bump(t, 0.85, 0.38) + _bump(t, -0.85, 0.38))
        + 0.42 * (_bump(t, 2.4, 0.3) + _bump(t, -2.4, 0.3))
    ),
    "tulip": lambda t: (
        0.62 + 0.38 * (_bump(t, 0, 0.12) + _bump(t, 0.7, 0.12) + _bump(t, -0.7, 0.12))
    ),
}
_ANGLES = 720  # R is tabulated, since a table can be indexed by species and a function cannot
_RIMS = torch.stack([R(torch.arange(_ANGLES) * 2 * pi / _ANGLES) for R in SHAPES.values()])


class Species(NamedTuple):
    """Species("pink", "star", "yellow").name is "pink star with a yellow eye"."""

    colour: str
    shape: str
    eye: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape} with a {self.eye} eye"


def _botany(classes: int = 102, seed: int = 0) -> tuple[list[Species], list[Species]]:
    """-> the task's species, base half before novel half, and the species left for pretraining."""
    left = [Species(c, s, e) for c in PETALS for s in SHAPES for e in EYES if c != e]
    shuffle = torch.randperm(len(left), generator=torch.Generator().manual_seed(seed)).tolist()
    left = [left[i] for i in shuffle]
    task = []
    for half in ((classes + 1) // 2, classes // 2):
        had = Counter()
        for _ in range(half):  # always what this half has had least of, so that it gets even shares
            species = min(left, key=lambda s: sum(had[look] ** 2 for look in enumerate(s)))
            had.update(enumerate(species))
            task.append(species)
            left.remove(species)
    return task, left


TASK, PRETRAINING = _botany()
CLASSNAMES = [species.name for species in TASK]


def looks(species: list[Species]) -> Tensor:
    """-> (N, 3): colour, shape and eye as row numbers of COLOURS, SHAPES and COLOURS."""
    colours, shapes = list(COLOURS), list(SHAPES)
    rows = [(colours.index(c), shapes.index(s), colours.index(e)) for c, s, e in species]
    return torch.tensor(rows).reshape(-1, 3)


def roll(n: int, seed: int) -> Tensor:
    """-> dice (n, DICE), uniform in [0, 1); row i is the same for every n > i."""
    return torch.rand(n, DICE, generator=torch.Generator().manual_seed(seed))


class _Dice:
    """Hands out the columns of dice (N, DICE) from left to right."""

    def __init__(self, dice: Tensor):
        self.dice, self.used = dice, 0

    def __call__(self, low: float = 0.0, high: float = 1.0, n: int = 1) -> Tensor:
        """-> (N, n, 1, 1), uniform between low and high."""
        self.used += n
        numbers = self.dice[:, self.used - n : self.used]  # (N, n)
        return low + (high - low) * numbers[:, :, None, None]


def render(species: Tensor, dice: Tensor, style: str, size: int = 64) -> Tensor:
    """species (N, 3) as `looks` gives it, dice (N, DICE) -> images (N, 3, size, size), uint8.

    style: "drawing" or "photo".
    """
    if style not in _STYLES:
        raise ValueError(f"style is {style!r}, but a flower comes as one of {list(_STYLES)}")
    images = torch.empty(len(species), 3, size, size, dtype=torch.uint8)
    for at in range(0, len(species), CHUNK):
        part = slice(at, at + CHUNK)
        image = _STYLES[style](species[part], _Dice(dice[part]), size)  # (n, 3, size, size)
        images[part] = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    return images


def split(name: str, size: int = 64) -> tuple[Tensor, Tensor]:
    """The task's "train", "val" or "test" -> images (N, 3, size, size) uint8, labels (N,) int64.

    Sorted by label, 10 photos of each of the 102 CLASSNAMES. Always the same: an experiment's seed
    picks shots, it does not make another world.
    """
    labels = torch.arange(len(TASK)).repeat_interleave(PER_CLASS[name])
    dice = roll(len(labels), seed=1 + list(PER_CLASS).index(name))
    return render(looks(TASK)[labels], dice, "photo", size), labels


# How an image is painted. Planes are (N, 1, n, n) or (N, 3, n, n), values 0 to 1; lengths are in
# half image widths, so that (0, 0) is the middle, 1 the right or upper edge, at any image size.


def _drawing(species: Tensor, dice: _Dice, size: int) -> Tensor:
    x, y = _pose(dice, size, shift=0.15, turn=0.35, scale=(0.55, 0.82), tilt=1.0)
    paper = dice(0.3, 0.95) + dice(-0.1, 0.1, n=3)  # (N, 3, 1, 1)
    return _flower(paper, species, x, y)


def _photo(species: Tensor, dice: _Dice, size: int) -> Tensor:
    x, y = _pose(dice, size, shift=0.22, turn=0.6, scale=(0.5, 0.8), tilt=0.7)
    image = _ground(dice, size)
    for _ in range(6):
        image = _leaf(image, dice, size)
    shadow = torch.sigmoid((0.75 - torch.hypot(x - 0.15, y + 0.2)) / 0.15)
    image = image * (1 - 0.5 * shadow)
    image = _flower(image, species, x, y)
    image = _leaf(image, dice, size)
    return _camera(image, dice, size)


_STYLES = {"drawing": _drawing, "photo": _photo}


def _grid(size: int) -> tuple[Tensor, Tensor]:
    """-> x (1, 1, 1, size) growing rightwards, y (1, 1, size, 1) growing upwards."""
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    return axis.view(1, 1, 1, -1), -axis.view(1, 1, -1, 1)


def _rotate(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()


def _pose(dice: _Dice, size: int, shift, turn, scale, tilt) -> tuple[Tensor, Tensor]:
    """-> x, y (N, 1, n, n): where every pixel lies on the flower, whose rim is about 1 away.

    shift, turn: how far at most it stands off the middle (half widths), off upright (radians);
    scale: range of its radius; tilt: the most that a slanted view shortens it (1: not at all).
    """
    x, y = _grid(size)
    x, y = x - dice(-shift, shift), y - dice(-shift, shift)
    radius, turn, axis = dice(*scale), dice(-turn, turn), dice(0, pi)
    x, y = _rotate(x / radius, y / radius, axis)
    return _rotate(x / dice(tilt, 1), y, turn - axis)


def _inside(f: Tensor) -> Tensor:
    """1 where f < 0 and 0 where f > 0; a pixel on the border gets about the share that is inside.

    f over its own slope is the distance to the border in pixels: edges come out one pixel soft.
    """
    dy, dx = torch.gradient(f, dim=(-2, -1))
    return (0.5 - f / torch.hypot(dx, dy).clamp(min=1e-6)).clamp(0, 1)


def _flower(canvas: Tensor, species: Tensor, x: Tensor, y: Tensor) -> Tensor:
    colour, shape, eye = species.T[:, :, None, None, None]  # each (N, 1, 1, 1)
    r = torch.hypot(x, y)
    turn = torch.atan2(x, y) / (2 * pi) % 1 * _ANGLES  # clockwise from the top, in table steps
    step = turn.long()
    rim = torch.lerp(_RIMS[shape, step % _ANGLES], _RIMS[shape, (step + 1) % _ANGLES], turn - step)

    shade = (0.62 + 0.38 * rim) * (0.85 + 0.15 * r)  # darker between petals and near the eye
    shade = shade * (1 - 0.3 * torch.sigmoid((r - rim + 0.04) * 40))  # and along the rim
    canvas = torch.lerp(
        canvas, PALETTE[colour[:, 0, 0, 0]][:, :, None, None] * shade, _inside(r - rim)
    )
    disc = PALETTE[eye[:, 0, 0, 0]][:, :, None, None] * (1 - 0.3 * torch.sigmoid((r - 0.24) * 40))
    return torch.lerp(canvas, disc, _inside(r - 0.28))


def _earth(height: Tensor) -> Tensor:
    """height (N, 1, ...) in [0, 1] -> (N, 3, ...), its colour on the scale of GROUND."""
    nearness = [(1 - (3 * height - i).abs()).clamp(min=0) for i in range(4)]
    return sum(w * rgb.view(1, 3, 1, 1) for w, rgb in zip(nearness, GROUND, strict=True))


def _ground(dice: _Dice, size: int) -> Tensor:
    rough = dice(0, 1, 36).view(-1, 1, 6, 6)
    fine = dice(0, 1, 121).view(-1, 1, 11, 11)
    rough, fine = (F.interpolate(g, (size, size), mode="bilinear") for g in (rough, fine))
    return _earth(0.6 * rough + 0.4 * fine)


def _leaf(canvas: Tensor, dice: _Dice, size: int, reach: float = 1.0) -> Tensor:
    x, y = _grid(size)
    x, y = _rotate(x - dice(-1, 1), y - dice(-1, 1), dice(0, 2 * pi))
    length, width = dice(0.3, 0.7), dice(0.1, 0.22)
    blade = _inside(y.abs() / width + (x / length) ** 2 - 1)
    shade = 0.9 + 0.25 * torch.sigmoid(y * 60)  # lit on one side of the midrib
    return torch.lerp(canvas, _earth(dice(0.25, 0.95)) * shade, blade)


def _camera(image: Tensor, dice: _Dice, size: int) -> Tensor:
    x, y = _grid(size)
    angle = dice(0, 2 * pi)
    light = 1 + dice(0.1, 0.4) * (x * angle.cos() + y * angle.sin())
    warm = torch.tensor([1.05, 0.88, 0.68]).view(1, 3, 1, 1) + dice(-0.1, 0.1, 3)
    image = image * light * warm
    image = 0.12 + image * dice(0.6, 0.85)  # haze
    soft = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)
    image = torch.lerp(image, soft, dice(0, 1))
    film = torch.rand(3, 2 * size, 2 * size, generator=torch.Generator().manual_seed(0)) - 0.5
    row, column = (
        (dice(0, size).long() + torch.arange(size).view(shape))[:, 0]
        for shape in ((-1, 1), (1, -1))
    )
    grain = film[:, row, column].transpose(0, 1)  # (3, N, n, n) -> (N, 3, n, n)
    return image + dice(0.05, 0.25) * grain


def write(root: str | Path, size: int = 64) -> None:
    """The task as files root/SPLIT/CLASS/NNN.png, the spaces of a class name as dashes.

    FileExistsError if there is anything in root already.
    """
    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} is not an empty folder: name a new one")
    for name, per_class in PER_CLASS.items():
        images, labels = split(name, size)
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            folder = root / name / CLASSNAMES[label].replace(" ", "-")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = image.permute(1, 2, 0).numpy()  # (3, n, n) -> (n, n, 3)
            Image.fromarray(pixels).save(folder / f"{i % per_class:03d}.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fewshot.demo", description="Write the demo task as a folder of images."
    )
    parser.add_argument("out", metavar="OUT", help="a new or empty folder")
    parser.add_argument("--size", type=int, default=64, help="pixels, square (default 64)")
    args = parser.parse_args(argv)
    try:
        write(args.out, args.size)
    except OSError as error:
        parser.error(str(error))
    print(f"{args.out}: ...")


if __name__ == "__main__":
    main()
