"""What a method reads is what its settings say: crops, features, views after augmentation."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms as tv
from torchvision.transforms import InterpolationMode, RandAugment

from clip_min import crop, normalize
from clip_min.preprocess import OPENAI
from fewshot import batches as module
from fewshot.batches import Batches
from fewshot.pictures import Pictures, Reader


def batches_of(pictures: Pictures, size: int) -> Batches:
    reader = Reader(size, folder=None)
    return Batches(*reader.read(pictures, []), reader)


def test_images_are_normalised_crops_of_the_chosen(pictures, files):
    chosen = torch.tensor([3, 1])
    expected = torch.stack([normalize(crop(Image.open(files[i]), 32)) for i in (3, 1)])
    assert torch.equal(batches_of(pictures, 32).images(chosen), expected)


def test_shots_are_the_pictures_of_the_largest_class(pictures):
    assert batches_of(pictures, 32).shots == 3  # labels 0 1 2 0 1 2 0


def test_features_are_encoded_images_and_computed_once(pictures):
    class Encoder:
        calls, encoder, clip = 0, ("mean of the pixels",), SimpleNamespace(config=None)

        def encode(self, images):
            self.calls += 1
            return images.mean(dim=(2, 3))

    batches, encoder = batches_of(pictures, 32), Encoder()
    expected = normalize(batches.pixels).mean(dim=(2, 3))
    torch.testing.assert_close(batches.encoded(encoder, batch_size=3), expected)
    assert encoder.calls == 3  # 3 + 3 + 1 pictures
    assert batches.encoded(encoder) is batches.encoded(encoder)
    assert encoder.calls == 3


def test_mirrored_are_the_pictures_followed_by_the_mirror_image_of_each_crop(pictures, files):
    batches = batches_of(pictures, 32)
    both = batches.mirrored()
    crops = [tv.functional.to_pil_image(crop(Image.open(file), 32)) for file in files]
    seen = [tv.functional.pil_to_tensor(image) for image in [*crops, *map(ImageOps.mirror, crops)]]
    assert torch.equal(both.images(torch.arange(len(both))), normalize(torch.stack(seen)))
    assert both.labels.tolist() == batches.labels.tolist() * 2
    assert len(both.hashes.unique(dim=0)) == 2 * len(batches.hashes.unique(dim=0))


def test_views_are_encoded_in_parts_and_are_the_same(pictures):
    class Encoder:
        encoder, sizes = ("pixels",), []

        def encode(self, images):
            self.sizes.append(len(images))
            return images.flatten(1)

    batches, method, chosen = batches_of(pictures, 8), Encoder(), torch.arange(150) % 7
    torch.manual_seed(1)
    found = batches.inputs(method, chosen, "crop-flip")
    torch.manual_seed(1)
    assert torch.equal(found, batches.images(chosen, "crop-flip").flatten(1))
    assert method.sizes == [64, 64, 22]


def test_parts_of_pictures_have_the_room_of_the_whole(pictures):
    batches = batches_of(pictures, 8)
    batches.room = None
    others = batches.mirrored(), batches.part(torch.arange(2)), batches.join(batches)
    assert [other.room for other in others] == [None] * 3


RAMP = 64  # pixels; red grows rightwards and green downwards, so a crop says where it comes from


@pytest.fixture(scope="module")
def crops():
    """400 augmented crops (400, 3, 32, 32) of one ramp, each value in [0, 1]."""
    axis = torch.linspace(0, 255, RAMP).round().to(torch.uint8)
    red, green = axis.expand(RAMP, RAMP), axis[:, None].expand(RAMP, RAMP)
    ramp = torch.stack([red, green, torch.zeros_like(red)])[None]  # (1, 3, RAMP, RAMP)
    batches = batches_of(Pictures(ramp, torch.zeros(1, dtype=torch.long)), 32)
    torch.manual_seed(0)
    seen = batches.images(torch.zeros(400, dtype=torch.long), "crop-flip")
    black = normalize(torch.zeros(3, 1, 1, dtype=torch.uint8))
    white = normalize(torch.full((3, 1, 1), 255, dtype=torch.uint8))
    return (seen - black) / (white - black)


def test_augmented_crops_cover_8_to_100_percent_of_the_area(crops):
    width = (crops[:, 0, 16, -2] - crops[:, 0, 16, 1]).abs() * 32 / 29  # 29 of 32 pixels apart
    height = (crops[:, 1, -2, 16] - crops[:, 1, 1, 16]) * 32 / 29
    area = width * height
    assert 0.05 < area.min() < 0.12
    assert 0.9 < area.max() < 1.1
    assert area.mean().item() == pytest.approx((0.08 + 1) / 2, abs=0.06)  # about uniform
    ratio = width / height
    assert 0.6 < ratio.min() < 0.85
    assert 1.2 < ratio.max() < 1.6


def test_augmented_crops_lie_around_the_middle_and_everywhere(crops):
    centre = crops[:, :2].mean(dim=(2, 3))  # (400, 2): x and y
    assert centre.mean(dim=0).tolist() == pytest.approx([0.5, 0.5], abs=0.03)
    assert centre.amin(dim=0).max() < 0.3
    assert centre.amax(dim=0).min() > 0.7


def test_half_of_the_augmented_crops_are_mirrored_and_none_stands_on_its_head(crops):
    mirrored = crops[:, 0, 16, -1] < crops[:, 0, 16, 0]
    assert abs(mirrored.sum().item() - 200) < 4 * (400 * 0.25) ** 0.5
    assert (crops[:, 1, -1, 16] > crops[:, 1, 0, 16]).all()


def test_augmentation_varies_and_repeats_under_one_seed(pictures):
    batches = batches_of(pictures, 32)
    chosen = torch.tensor([0, 0, 5])
    torch.manual_seed(3)
    first = batches.images(chosen, "crop-flip")
    assert first.shape == (3, 3, 32, 32)
    assert not torch.equal(first[0], first[1])  # one picture twice: two crops
    assert not torch.equal(batches.images(chosen, "crop-flip"), first)
    torch.manual_seed(3)
    assert torch.equal(batches.images(chosen, "crop-flip"), first)


@pytest.mark.parametrize("room", [0, 3 * 40 * 36 + 3 * 36 * 40, 1e9])
def test_whole_pictures_are_kept_while_there_is_room_and_crops_are_the_same(
    room, pictures, monkeypatch
):
    chosen = torch.tensor([0, 0, 5, 1, 4])
    torch.manual_seed(3)
    expected = batches_of(pictures, 32).images(chosen, "crop-flip")
    monkeypatch.setattr(module, "KEPT", room)
    batches = batches_of(pictures, 32)
    for _ in range(2):
        torch.manual_seed(3)
        assert torch.equal(batches.images(chosen, "crop-flip"), expected)
    kept = [3 * image.width * image.height for image in batches._originals.values()]
    assert sum(kept) <= room
    assert len(kept) == {0: 0, 1e9: 4}.get(room, 2)


def test_augmentation_sees_what_the_centre_crop_cuts_off():
    wide = torch.zeros(1, 3, 32, 96, dtype=torch.uint8)
    wide[:, :, :, :32] = 255  # white outside the middle
    batches = batches_of(Pictures(wide, torch.zeros(1, dtype=torch.long)), 32)
    black = normalize(torch.zeros(3, 1, 1, dtype=torch.uint8))
    assert (batches.images(torch.tensor([0])) - black).abs().max() < 0.2
    torch.manual_seed(0)
    seen = batches.images(torch.zeros(50, dtype=torch.long), "crop-flip")
    assert (seen - black).amax() > 3


def test_randaugment_is_torchvisions_after_crop_flip_from_the_global_generator(pictures):
    batches, chosen = batches_of(pictures, 32), torch.tensor([0, 3, 3, 6])
    torch.manual_seed(7)
    crops = batches._views(chosen, "crop-flip")
    expected = torch.stack([RandAugment(2, 9)(crop) for crop in crops])
    torch.manual_seed(7)
    seen = batches.images(chosen, "randaugment")
    assert torch.equal(seen, normalize(expected))
    assert not torch.equal(seen, normalize(crops))
    assert not torch.equal(batches.images(chosen, "randaugment"), seen)  # drawn anew each time


RESIZED_CROP = tv.RandomResizedCrop(32, interpolation=InterpolationMode.BICUBIC)


@pytest.mark.parametrize(
    ("augment", "size", "flips", "steps"),
    [
        ("crop-flip", 32, True, [RESIZED_CROP]),
        ("random-crop", 32, True, [tv.Resize(36, InterpolationMode.BICUBIC), tv.RandomCrop(32)]),
        (  # VPT's
            "random-crop",
            224,
            True,
            [tv.Resize(256, InterpolationMode.BICUBIC), tv.RandomCrop(224)],
        ),
        ("randaugment-crop", 32, False, [tv.RandAugment(2, 9), RESIZED_CROP]),  # DISEF's
    ],
)
def test_views_are_those_of_torchvisions_transforms_under_one_seed(
    augment, size, flips, steps, pictures
):
    batches, chosen = batches_of(pictures, size), torch.tensor([0, 4, 4, 6, 1, 2])
    torch.manual_seed(5)
    seen = batches.images(chosen, augment)
    torch.manual_seed(5)
    view = tv.Compose([*steps, tv.PILToTensor()])
    expected = [view(Image.open(pictures.source[i]).convert("RGB")) for i in chosen.tolist()]
    if flips:
        mirrored = (torch.rand(len(chosen)) < 0.5).tolist()
        expected = [x.flip(-1) if m else x for x, m in zip(expected, mirrored, strict=True)]
        assert len(set(mirrored)) == 2
    assert torch.equal(seen, normalize(torch.stack(expected)))


class Encoding:
    """A method whose encoded images are each their pixels `times` over, as a row."""

    encoder, clip = ("pixels",), SimpleNamespace(config=None)

    def __init__(self, times: int = 1):
        self.times, self.seen = times, 0

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return images.flatten(1).repeat(1, self.times)


def six_pictures() -> Batches:
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=rng)
    return Batches(Pictures(pixels, torch.zeros(6, dtype=torch.int64)), pixels, Reader(8))


@pytest.mark.parametrize("room", [6 * 2 * 192 * 4, 6 * 2 * 192 * 4 - 1, 0])
def test_encoded_images_are_kept_as_long_as_there_is_room(room):
    """And are the same in both cases; beyond the room they are computed again, and that is said."""
    few, method, chosen = six_pictures(), Encoding(times=2), torch.tensor([4, 1])
    few.room, enough = room, room == 6 * 2 * 192 * 4
    expected = few.images(chosen).flatten(1).repeat(1, 2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(few.inputs(method, chosen), expected)
    assert method.seen == 1 + (6 if enough else 3 * 2)  # one image to know their size
    assert ["--cache-gb" in str(w.message) for w in said] == ([] if enough else [True])


def test_of_test_images_what_is_larger_than_their_pixels_is_not_kept():
    few, method = six_pictures(), Encoding()
    assert not few.keeps(method)
    assert few.inputs(method, torch.tensor([3])).shape == (1, 192)


def test_augmented_images_are_encoded_each_time():
    few, method = six_pictures(), Encoding()
    few.room = 1e9
    first, second = (few.inputs(method, torch.tensor([0, 2, 4]), "crop-flip") for _ in range(2))
    assert first.shape == (3, 192)
    assert not torch.equal(first, second)


def test_a_method_of_which_nothing_is_frozen_is_given_images():
    few, method = six_pictures(), Encoding()
    few.room, method.encoder, method.encode = 1e9, None, lambda images: images
    assert few.inputs(method, torch.tensor([0, 2])).shape == (2, 3, 8, 8)


def test_images_are_normalised_as_the_models_config_says(pictures, files):
    config = replace(OPENAI, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    reader = Reader(32, folder=None, prepared=config)
    images = Batches(*reader.read(pictures, []), reader).images(torch.tensor([2]))
    expected = crop(Image.open(files[2]), 32) / 255 - torch.tensor(config.mean)[:, None, None]
    expected /= torch.tensor(config.std)[:, None, None]
    torch.testing.assert_close(images[0], expected)


SQUASHED = replace(OPENAI, resize="squash", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.mark.parametrize("prepared", [OPENAI, SQUASHED])
def test_what_is_streamed_equals_what_is_in_memory_to_the_bit(prepared, pictures, tmp_path):
    """Encoded images and single pictures; kept or not, for all batch sizes."""
    reader = Reader(32, folder=tmp_path, prepared=prepared)
    whole = Batches(*reader.read(pictures, []), reader)
    found, hashes = reader.check(pictures, [])
    stream = Batches(found, None, reader, hashes)
    assert torch.equal(stream.hashes, whole.hashes)
    assert torch.equal(stream.images(torch.tensor([4, 1])), whole.images(torch.tensor([4, 1])))
    for view in (stream, whole):
        torch.manual_seed(0)
        view.view = view.images(torch.tensor([2, 6]), "crop-flip")
    assert torch.equal(stream.view, whole.view)
    for encoder in (("pixels",), None):  # kept, or handed on
        method = Encoding()
        method.encoder = encoder
        whole.room = stream.room = 1e9
        for size in (1, 3, 64):
            parts = torch.arange(len(whole)).split(size)
            for x, y in zip(stream.each(method, parts), whole.each(method, parts), strict=True):
                assert torch.equal(x, y)
    assert stream.pixels is None


def test_features_of_what_is_streamed_are_kept_on_disk(pictures, tmp_path, monkeypatch):
    reader = Reader(32, folder=tmp_path)
    found, hashes = reader.check(pictures, [])
    method = Encoding()
    method.encode = lambda images: images.mean(dim=(2, 3))
    first = Batches(found, None, reader, hashes).encoded(method)
    monkeypatch.setattr(Reader, "_decode", None)  # nothing is decoded any more
    again, hashes = reader.check(pictures, [])
    assert torch.equal(Batches(again, None, reader, hashes).encoded(method), first)
