"""The demo world: what it promises about its species, its pictures and its noise."""

from collections import Counter
from itertools import combinations
from math import pi

import pytest
import torch
from PIL import Image

from clip_min import load, normalize, tokenize
from clip_min.errors import UserError
from fewshot import demo

HALVES = demo.TASK[:51], demo.TASK[51:]
STYLES = ["drawing", "photo"]


@pytest.fixture(scope="module")
def val():
    return demo.split("val")


def middle_of_every_range(n):
    """Noise of flowers that stand upright, in the middle, at mean size, on mid-grey paper."""
    return torch.full((n, demo.NOISE), 0.5)


# --------------------------------------------------------------------------------------- species


def test_no_task_species_is_for_pretraining_and_none_is_forgotten():
    every = [demo.Species(c, s, e) for c in demo.PETALS for s in demo.SHAPES for e in demo.EYES]
    every = {species for species in every if species.colour != species.eye}
    assert set(demo.TASK) | set(demo.PRETRAINING) == every
    assert len(demo.TASK) + len(demo.PRETRAINING) == len(every)  # so they share none
    assert len(demo.TASK) == 102


def test_a_name_is_unique_and_says_what_the_species_looks_like():
    assert demo.CLASSNAMES[0] == demo.TASK[0].name
    assert demo.Species("pink", "star", "yellow").name == "pink star with a yellow eye"
    every = demo.TASK + demo.PRETRAINING
    assert len({species.name for species in every}) == len(every)
    for species, row in zip(every, demo.indices(every).tolist(), strict=True):
        colour, shape, _, _, eye, _ = species.name.split()
        assert (colour, shape, eye) == species
        assert row == [
            list(demo.COLOURS).index(colour),
            list(demo.SHAPES).index(shape),
            list(demo.COLOURS).index(eye),
        ]


def test_words_of_names_are_single_tokens():
    words = [*demo.COLOURS, *demo.SHAPES, "eye"]
    lengths = (tokenize(words) > 0).sum(1)  # start, word, end
    assert dict(zip(words, lengths.tolist(), strict=True)) == dict.fromkeys(words, 3)


@pytest.mark.parametrize("half", HALVES, ids=["base", "novel"])
def test_each_half_has_even_shares_of_every_trait(half):
    columns = zip(*half, strict=True)
    for traits, all_traits in zip(columns, (demo.PETALS, demo.SHAPES, demo.EYES), strict=True):
        counts = Counter(traits)
        assert set(counts) == set(all_traits)
        assert max(counts.values()) - min(counts.values()) <= 1


def grid(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (1, 1, 1, n), y (1, 1, n, 1) of the pixels, from -1 to 1."""
    axis = (torch.arange(size) * 2 + 1) / size - 1
    return axis.view(1, 1, 1, -1), -axis.view(1, 1, -1, 1)


# ---------------------------------------------------------------------------------------- splits


def test_a_split_is_ten_photos_a_class_and_always_the_same(val):
    images, labels = val
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert images.shape == (1020, 3, 64, 64)
    assert labels.tolist() == sorted(list(range(102)) * 10)
    small, _ = demo.split("val", size=16)
    torch.manual_seed(123)  # of no effect: the world has seeds of its own
    assert demo.split("val", size=16)[0].equal(small)


def test_no_picture_is_in_two_splits_or_twice_in_one():
    seeds = range(1, 4)  # those of the three splits
    noise = torch.cat([demo.draw_noise(1020, seed) for seed in seeds])
    assert len(noise.unique(dim=0)) == len(noise)
    images = torch.cat([demo.split(name, size=8)[0] for name in demo.PER_CLASS])
    assert len(images.flatten(1).unique(dim=0)) == len(images) == 3060


def test_an_image_depends_on_its_own_noise_alone(val):
    species = demo.indices(demo.TASK)[torch.arange(40) // 10]
    noise = demo.draw_noise(40, seed=2)  # the seed of "val"
    assert noise.equal(demo.draw_noise(1020, seed=2)[:40])
    for rows in (slice(0, 40), slice(7, 20), slice(33, 34)):
        images = demo.render(species[rows], noise[rows], "photo", chunk=7)
        assert images.equal(val[0][:40][rows])


# -------------------------------------------------------------------------------------- pictures


def test_petals_and_eye_have_the_colours_of_the_name():
    species = demo.indices(demo.TASK)
    images = demo.render(species, middle_of_every_range(102), "drawing").float()
    colours = torch.tensor(list(demo.COLOURS.values())).float()  # (colours, 3)
    eyes = images[:, :, 31:33, 31:33].mean((2, 3))  # (N, 3)
    assert (eyes - colours[species[:, 2]]).abs().max() < 4
    x, y = grid(64)
    around_the_eye = (torch.hypot(x, y)[0, 0] * 2 / (0.55 + 0.82) - 0.55).abs() < 0.2  # (n, n)
    for image, row in zip(images, species, strict=True):
        differs = (image - image[:, :1, :1]).abs().amax(0) > 25  # from the paper
        petals = image[:, differs & around_the_eye]  # (3, pixels)
        light = petals.sum(0) >= petals.sum(0).quantile(0.7)  # outside the folds
        distances = (colours - petals[:, light].mean(1)).norm(dim=1)
        assert distances[: len(demo.PETALS)].argmin() == row[0]


def test_every_shape_has_an_outline_of_its_own():
    species = [demo.Species("red", shape, "yellow") for shape in demo.SHAPES]
    images = demo.render(demo.indices(species), middle_of_every_range(len(species)), "drawing")
    flowers = (images.int() - images[:, :, :1, :1].int()).abs().amax(1) > 25  # (N, n, n)
    for one, other in combinations(flowers, 2):
        assert (one & other).sum() / (one | other).sum() < 0.9
    rims = demo.RIMS
    assert rims.min() > 0.279  # the eye's radius is 0.28, and it must not stick out
    assert rims.max() < 1.1


def test_drawings_have_plain_paper_and_photos_a_ground():
    species, noise = demo.indices(demo.TASK[:20]), demo.draw_noise(20, seed=4)
    edges = {}
    for style in STYLES:
        images = demo.render(species, noise, style).float()
        edges[style] = torch.cat([images[:, :, :2].flatten(2), images[:, :, -2:].flatten(2)], 2)
    assert edges["drawing"].std(2).max() == 0
    assert edges["photo"].std(2).min() > 3
    with pytest.raises(KeyError):
        demo.render(species, noise, "painting")


@pytest.mark.parametrize("style", STYLES)
def test_similar_noise_makes_similar_images(style):
    species, noise = demo.indices(demo.TASK[:30]), demo.draw_noise(30, seed=5)
    image = demo.render(species, noise, style).float()
    nearly = demo.render(species, noise + 1e-3 * (0.5 - noise), style).float()
    other = demo.render(species, demo.draw_noise(30, seed=6), style).float()
    assert 0 < (image - nearly).abs().mean() < 0.2 * (image - other).abs().mean()


def test_no_die_is_used_twice_and_an_image_has_enough():
    noise, numbers = demo._Noise(demo.draw_noise(3, seed=7)), demo.draw_noise(3, seed=7)
    assert noise(0, 1)[:, :, 0, 0].equal(numbers[:, :1])
    assert noise(-1, 1, n=2)[:, :, 0, 0].equal(2 * numbers[:, 1:3] - 1)

    class Counting(demo._Noise):
        def __call__(self, low, high, n=1):
            used.append(n)
            return super().__call__(low, high, n)

    used = []
    demo._photo(demo.indices(demo.TASK[:1]), Counting(demo.draw_noise(1, seed=7)), *grid(16))
    assert 150 < sum(used) <= demo.NOISE


def test_edges_are_smooth_and_in_the_right_place():
    x, y = grid(64)
    inside = demo._inside(torch.hypot(x - 0.1, y + 0.05) - 0.5)  # a disc of radius 0.5
    assert inside.sum() * (2 / 64) ** 2 == pytest.approx(pi * 0.5**2, rel=0.005)
    assert ((inside > 0.05) & (inside < 0.95)).sum() > 64  # soft pixels all around
    row, column = (inside[0, 0].nonzero() + 0.5).mean(0) / 32 - 1
    assert column == pytest.approx(0.1, abs=0.02)  # to the right ...
    assert row == pytest.approx(0.05, abs=0.02)  # ... and down: y points up


def test_a_larger_drawing_is_the_same_drawing():
    species, noise = demo.indices(demo.TASK[:30]), demo.draw_noise(30, seed=8)
    small, large = (demo.render(species, noise, "drawing", size=n).float() for n in (64, 128))
    halved = torch.nn.functional.avg_pool2d(large, 2)
    assert (small - halved).abs().mean() < 3  # of 255
    assert (small - halved.flip(3)).abs().mean() > 9  # what a mirrored one would give


# ----------------------------------------------------------------------------------------- files


def test_the_folder_holds_the_same_pixels(tmp_path, capsys):
    out = tmp_path / "flowers"
    assert demo.main([str(out), "--size", "16"]) == 0
    assert capsys.readouterr().out == f"{out}: 102 classes, 10/10/10 images each\n"
    assert len(list(out.rglob("*.*"))) == 3060
    for name in demo.PER_CLASS:
        images, labels = demo.split(name, size=16)
        for i in range(0, len(images), 37):
            folder = out / name / demo.CLASSNAMES[labels[i]].replace(" ", "-")
            with Image.open(folder / f"{i % 10:03d}.png") as picture:
                pixels = torch.tensor(list(picture.tobytes())).view(16, 16, 3).permute(2, 0, 1)
            assert pixels.equal(images[i].long())


def test_nothing_is_written_among_other_files(tmp_path, capsys):
    mine = tmp_path / "mine.txt"
    mine.write_text("keep")
    for root in (tmp_path, mine):  # a folder with something in it, and no folder
        with pytest.raises(UserError, match="new or empty folder"):
            demo.write(root)
        assert demo.main([str(root)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(f"error: {root}")
        assert printed.err.count("\n") == 1
    assert demo.main([str(tmp_path / "new"), "--size", "0"]) == 2
    assert demo.main([str(mine / "new")]) == 2  # the system's own complaint, in one line
    assert capsys.readouterr().err.count("\n") == 2
    assert list(tmp_path.iterdir()) == [mine]
    assert mine.read_text() == "keep"


# ----------------------------------------------------------------------------------------- model


@torch.no_grad()
def test_the_demo_model_knows_drawings_and_is_fair_on_both_halves_of_the_photos(val):
    clip = load("demo")
    photos, labels = (values[::2] for values in val)  # (510, ...), five a class
    drawings = demo.render(demo.indices(demo.TASK)[labels], demo.draw_noise(510, seed=9), "drawing")
    accuracy = {}
    for style, images in (("drawing", drawings), ("photo", photos)):
        features = torch.cat([clip.encode_image(normalize(x)) for x in images.split(128)])
        for first in (0, 51):
            names = demo.CLASSNAMES[first : first + 51]
            text = clip.encode_text(tokenize([demo.TEMPLATE.replace("{}", n) for n in names]))
            mine = labels // 51 == first // 51
            right = clip.logits(features[mine], text).argmax(1) == labels[mine] - first
            accuracy[style, first] = right.double().mean().item()
    assert min(accuracy["drawing", first] for first in (0, 51)) > 0.95
    for first in (0, 51):  # fair, and far from solved
        assert 0.5 < accuracy["photo", first] < 0.75
    assert abs(accuracy["photo", 0] - accuracy["photo", 51]) < 0.1
