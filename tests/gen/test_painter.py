"""The demo's captioner and painter: repeatable, true to strength and prompt, sometimes wrong."""

import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as tv

from clip_min import UserError
from fewshot import demo
from gen.painter import WRONG, DemoCaptioner, DemoPainter

PIXELS, LABELS = demo.split("train")


def picture(i: int) -> Image.Image:
    return tv.to_pil_image(PIXELS[i])


def prompt(i: int) -> str:
    return f"A realistic photo of a {demo.CLASSNAMES[LABELS[i]]}, a type of flower."


def paint(numbers: list[int], seeds: list[int], strength: float = 0.75) -> torch.Tensor:
    painter = DemoPainter(strength)
    images = painter([picture(i) for i in numbers], [prompt(i) for i in numbers], seeds)
    return torch.stack([tv.pil_to_tensor(image) for image in images])


def test_a_batch_equals_singles_to_the_bit():
    numbers, seeds = [0, 17, 17, 900], [5, 6, 7, 5]
    batch = paint(numbers, seeds)
    singles = [paint([i], [seed]) for i, seed in zip(numbers, seeds, strict=True)]
    assert torch.equal(batch, torch.cat(singles))
    assert not torch.equal(batch[1], batch[2])


def test_strength_goes_from_the_picture_itself_to_a_new_one():
    numbers, seeds = list(range(0, 400, 10)), list(range(40))
    real = PIXELS[numbers].float()
    away = [(paint(numbers, seeds, s).float() - real).abs().mean() for s in (0, 0.1, 0.5, 1)]
    assert away == sorted(away)
    unchanged = (paint(numbers, seeds, 0) == PIXELS[numbers]).all(dim=(1, 2, 3))
    assert unchanged.sum() == 40 - sum(
        wrong(i, seed) for i, seed in zip(numbers, seeds, strict=True)
    )


def wrong(i: int, seed: int) -> bool:
    species, _ = DemoPainter(0.75).redraw(picture(i), prompt(i), seed)
    return species.name != demo.CLASSNAMES[LABELS[i]]


def test_one_look_is_wrong_in_a_quarter_of_the_pictures():
    painter, truth = DemoPainter(0.75), demo.TASK[0]
    painted = [painter.redraw(picture(3), prompt(3), seed)[0] for seed in range(400)]
    off = [sum(a != b for a, b in zip(species, truth, strict=True)) for species in painted]
    assert set(off) == {0, 1}
    assert sum(off) / 400 == pytest.approx(WRONG, abs=0.07)
    assert all(species.colour != species.eye for species in painted)
    demo.indices(painted)  # all of them can be drawn


def test_captions_follow_from_picture_name_and_seed():
    captioner = DemoCaptioner()
    columns = [picture(0), picture(1)], ["red rose", "red rose"], [4, 5]
    both = captioner(*columns)
    assert both == [captioner(*([value] for value in row))[0] for row in zip(*columns, strict=True)]
    assert len({captioner([picture(0)], ["red rose"], [seed])[0] for seed in range(9)}) == 3


def test_strange_pictures_and_prompts_are_refused():
    with pytest.raises(UserError, match="know only the demo's own training pictures"):
        DemoCaptioner()([Image.new("RGB", (64, 64))], ["x"], [0])
    with pytest.raises(UserError, match="a photo of a dog"):
        DemoPainter(0.75)([picture(0)], ["a photo of a dog"], [0])
