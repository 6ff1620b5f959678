"""A captioner and a painter for the demo task: offline, in milliseconds, and sometimes wrong.

They replace LLaVA and Stable Diffusion, with the same interface. The demo draws each picture from a
species and a row of random numbers, its noise (fewshot/demo.py). Here

    looking at a picture   means finding which training picture it is
    repainting it          means drawing a share of its noise again, `strength`
    making a mistake       means painting another petal colour, shape or eye than the prompt says

A real diffusion model makes more kinds of mistakes, and its pictures look less like photos than
these, which come from the task's own renderer.
"""

import functools
import re

import torch
from PIL import Image
from torchvision.transforms import functional as tv

from clip_min import UserError
from fewshot import demo

WRONG = 0.25  # share of repainted pictures with a mistake
TRAITS = (demo.PETALS, list(demo.SHAPES), demo.EYES)
SPECIES = re.compile("({}) ({}) with a ({}) eye".format(*map("|".join, TRAITS)))


class DemoCaptioner:
    """captioner(pictures, class names, seeds) -> captions."""

    name = revision = "demo"

    def __init__(self):
        self.noise = _album()

    def __call__(
        self, images: list[Image.Image], classnames: list[str], seeds: list[int]
    ) -> list[str]:
        return [self.describe(*row) for row in zip(images, classnames, seeds, strict=True)]

    def describe(self, image: Image.Image, classname: str, seed: int) -> str:
        left, low = (-1 if value < 0.5 else 1 for value in _look_up(self.noise, image)[:2])
        side = {-1: "left", 1: "right"}[left], {-1: "lower", 1: "upper"}[low]
        begins = ("The flower", f"One {classname}", "A single bloom")[seed % 3]
        return f"{begins} stands {side[0]} of the middle, in the {side[1]} half, among leaves."


class DemoPainter:
    """painter(pictures, prompts, seeds) -> pictures, 64 x 64."""

    name = revision = "demo"

    def __init__(self, strength: float):
        self.strength = strength
        self.noise = _album()

    def __call__(
        self, images: list[Image.Image], prompts: list[str], seeds: list[int]
    ) -> list[Image.Image]:
        planned = [self.redraw(*row) for row in zip(images, prompts, seeds, strict=True)]
        species, noise = zip(*planned, strict=True)
        pixels = demo.render(demo.indices(species), torch.stack(noise), "photo")
        return [tv.to_pil_image(picture) for picture in pixels]

    def redraw(
        self, image: Image.Image, prompt: str, seed: int
    ) -> tuple[demo.Species, torch.Tensor]:
        """-> the species to paint, and its noise (NOISE,)."""
        found = SPECIES.search(prompt)
        if not found:
            raise UserError(
                f"--painter demo: paints only the demo's flowers, but the prompt {prompt!r} names "
                "none; give a diffusion model"
            )
        generator = torch.Generator().manual_seed(seed)
        anew = torch.rand(demo.NOISE, generator=generator)
        again = torch.rand(demo.NOISE, generator=generator) < self.strength
        species = demo.Species(*found.groups())
        if torch.rand((), generator=generator) < WRONG:
            species = _another(species, generator)
        return species, torch.where(again, anew, _look_up(self.noise, image))


def _another(species: demo.Species, generator: torch.Generator) -> demo.Species:
    """The same flower with a mistake in petal colour, shape or eye."""
    trait = int(torch.randint(3, (), generator=generator))
    others = [kind for kind in TRAITS[trait] if kind not in species]  # not an eye of petal colour
    other = others[int(torch.randint(len(others), (), generator=generator))]
    return species._replace(**{species._fields[trait]: other})


@functools.cache
def _album() -> dict[bytes, torch.Tensor]:
    """Training picture -> the noise it was drawn from."""
    pixels, labels = demo.split("train")
    noise = demo.draw_noise(len(labels), seed=1)
    return {tv.to_pil_image(p).tobytes(): d for p, d in zip(pixels, noise, strict=True)}


def _look_up(album: dict[bytes, torch.Tensor], image: Image.Image) -> torch.Tensor:
    if (key := image.tobytes()) not in album:
        raise UserError(
            "--captioner and --painter demo: know only the demo's own training pictures, and this "
            "is none of them; give a LLaVA and a diffusion model"
        )
    return album[key]
