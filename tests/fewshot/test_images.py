"""Pixels are those of `clip_min.crop`, from files, from the cache, and after augmentation."""

import contextlib
import hashlib
import os
import random
import struct
import time
from types import SimpleNamespace

import PIL
import pytest
import torch
from PIL import Image, ImageFile, features
from safetensors.torch import load_file, save_file
from torchvision import transforms as tv
from torchvision.transforms import InterpolationMode, RandAugment

from clip_min import UserError, crop, normalize
from fewshot import images
from fewshot.images import ENDINGS, Batches, Pictures, read

SIZES = [(40, 36), (36, 40), (32, 32), (7, 5), (200, 33), (64, 64), (33, 90)]


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


@pytest.fixture
def no_decoder(monkeypatch):
    """() -> from now on, decoding a picture fails the test."""

    def forbid(path):
        raise AssertionError(f"{path} was decoded")

    return lambda: monkeypatch.setattr(images, "open_image", forbid)


def pixels_of(files) -> torch.Tensor:
    return torch.stack([crop(Image.open(path), 32) for path in files])


def cached(folder):
    return sorted(folder.glob("pixels/*.safetensors"))


def test_pixels_equal_crop_of_each_file_in_order(pictures, files):
    readable, pixels, skipped = read(pictures, 32, folder=None)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, pixels_of(files))
    assert readable.source == files
    assert skipped == []


def test_threads_that_finish_in_another_order_do_not_change_it(pictures, files, monkeypatch):
    real, finished = images.open_image, []

    def slow_at_first(path):
        number = files.index(path)
        time.sleep(0.05 * (len(files) - number))
        finished.append(number)
        return real(path)

    monkeypatch.setattr(images, "open_image", slow_at_first)
    monkeypatch.setattr(images, "READERS", 7)
    assert torch.equal(read(pictures, 32, folder=None)[1], pixels_of(files))
    assert finished != sorted(finished)  # else this test shows nothing


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits_are_an_error_since_clip_would_see_white(mode, pictures, files):
    Image.new(mode, (40, 36), 1000).save(files[5])  # a TIFF
    with pytest.raises(UserError, match="5.tiff: cannot be used with more than 8 bits") as error:
        read(pictures, 32, folder=None)
    assert "--skip-bad-images" in str(error.value)
    assert read(pictures, 32, skip_bad=True, folder=None)[2] == [str(files[5])]


def test_pictures_in_memory_are_cropped_unless_they_have_the_size():
    source = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8)
    small = Pictures(source, torch.arange(3))
    assert read(small, 48)[1] is source
    by_hand = [crop(Image.fromarray(image.permute(1, 2, 0).numpy()), 32) for image in source]
    assert torch.equal(read(small, 32)[1], torch.stack(by_hand))


def test_the_second_reading_comes_from_the_cache(pictures, files, tmp_path, no_decoder):
    first = read(pictures, 32, folder=tmp_path / "cache")[1]
    assert len(cached(tmp_path / "cache")) == 1
    no_decoder()
    readable, second, skipped = read(pictures, 32, folder=tmp_path / "cache")
    assert torch.equal(second, first)
    assert readable.source == files
    assert skipped == []


def test_without_a_cache_nothing_is_written(pictures, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    read(pictures, 32, folder=None)
    assert sorted(tmp_path.rglob("*")) == before


def change_unseen(files, monkeypatch):
    """Other pixels, but size and times as before."""
    stat = files[2].stat()
    Image.new("RGB", SIZES[2], "red").save(files[2])  # a BMP
    os.utime(files[2], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert files[2].stat().st_size == stat.st_size
    return files, 32


def change(files, monkeypatch):
    Image.new("RGB", (50, 50), "red").save(files[3])
    return files, 32


def resize(files, monkeypatch):
    return files, 24


def reorder(files, monkeypatch):
    return files[::-1], 32


def new_pillow(files, monkeypatch):
    monkeypatch.setattr(PIL, "__version__", "0.0.1")
    return files, 32


@pytest.mark.parametrize("differ", [change_unseen, change, resize, reorder, new_pillow])
def test_the_cache_is_not_used_when_something_differs(
    differ, files, tmp_path, monkeypatch, no_decoder
):
    labels = torch.arange(7)
    read(Pictures(files, labels), 32, folder=tmp_path / "cache")
    chosen, size = differ(files, monkeypatch)
    expected = torch.stack([crop(Image.open(path), size) for path in chosen])
    pixels = read(Pictures(chosen, labels), size, folder=tmp_path / "cache")[1]
    assert torch.equal(pixels, expected)
    assert len(cached(tmp_path / "cache")) == 2
    no_decoder()  # both are kept from now on
    assert torch.equal(read(Pictures(chosen, labels), size, folder=tmp_path / "cache")[1], expected)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def empty(file):
    file.write_bytes(b"")


def flip_a_bit(file):
    *rest, last = file.read_bytes()
    file.write_bytes(bytes([*rest, last ^ 1]))


def rename_tensor(file):
    save_file({"other": load_file(file)["pixels"]}, file)


def drop_a_picture(file):
    save_file({"pixels": load_file(file)["pixels"][1:].clone()}, file)


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, rename_tensor, drop_a_picture])
def test_a_damaged_cache_file_is_rebuilt(damage, pictures, files, tmp_path, no_decoder):
    read(pictures, 32, folder=tmp_path / "cache")
    (file,) = cached(tmp_path / "cache")
    damage(file)
    assert torch.equal(read(pictures, 32, folder=tmp_path / "cache")[1], pixels_of(files))
    assert cached(tmp_path / "cache") == [file]
    expected = pixels_of(files)
    no_decoder()
    assert torch.equal(read(pictures, 32, folder=tmp_path / "cache")[1], expected)


def test_a_cache_that_cannot_be_written_is_done_without(pictures, files, tmp_path):
    (tmp_path / "occupied").write_text("a file where the folder should be")
    assert torch.equal(read(pictures, 32, folder=tmp_path / "occupied")[1], pixels_of(files))


def text_file(path):
    path.write_text("this is not a picture")


def cut_short(path):
    path.write_bytes(path.read_bytes()[:200])


def no_bytes(path):
    path.write_bytes(b"")


def gone(path):
    path.unlink()


def broken_link(path):
    path.unlink()
    path.symlink_to(path.with_name("nowhere.jpg"))


def folder(path):
    path.unlink()
    path.mkdir()


def eps(path):
    """PostScript, which Pillow hands to Ghostscript: a program that a picture writes."""
    Image.new("RGB", (40, 40)).save(path, "EPS")


def pipe(path):
    path.unlink()
    os.mkfifo(path)  # whoever opens it waits for a writer


SPOILT = [text_file, cut_short, no_bytes, gone, broken_link, folder, eps, pipe]


@pytest.mark.parametrize("spoil", SPOILT)
def test_an_unreadable_file_is_named_or_left_out(spoil, pictures, files, tmp_path):
    spoil(files[1])
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match="cannot be read as an image") as error:
        read(pictures, 32, folder=cache)
    assert str(error.value).startswith(f"{files[1]}: ")
    assert "--skip-bad-images" in str(error.value)
    good = [files[i] for i in (0, 2, 3, 4, 5, 6)]
    readable, pixels, skipped = read(pictures, 32, skip_bad=True, folder=cache)
    assert skipped == [str(files[1])]
    assert readable.source == good
    assert readable.labels.tolist() == [0, 2, 0, 1, 2, 0]
    assert torch.equal(pixels, pixels_of(good))
    assert not cached(cache)  # the file may be mended before the next run


@pytest.mark.parametrize(
    "kind", [NotImplementedError, RuntimeError, struct.error, MemoryError, KeyError, AssertionError]
)
def test_whatever_a_decoder_raises_the_file_is_unreadable(kind, files, monkeypatch):
    def fail(self):
        raise kind("it broke")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(UserError, match=r"1\.jpg: cannot be read as an image \(.?it broke"):
        images.open_image(files[1])


@pytest.mark.filterwarnings("ignore")
def test_files_with_bits_changed_are_pictures_or_one_line(files, tmp_path):
    dice = random.Random(0)
    for _ in range(100):
        file = dice.choice(files)
        data = bytearray(file.read_bytes())
        for _ in range(dice.randint(1, 8)):
            data[dice.randrange(min(len(data), 200))] = dice.randrange(256)
        (tmp_path / "mutated").write_bytes(data)
        with contextlib.suppress(UserError):
            images.open_image(tmp_path / "mutated")


@pytest.mark.parametrize("size", [(1, 65_000), (65_000, 1), (101 * 3, 3)])
def test_a_picture_that_is_a_line_is_refused_before_it_fills_the_memory(size, tmp_path):
    Image.new("L", size).save(tmp_path / "line.png")
    with pytest.raises(UserError, match=f"line.png: cannot be used with {size[0]} x {size[1]}"):
        images.open_image(tmp_path / "line.png")
    Image.new("L", (300, 3)).save(tmp_path / "band.png")
    assert images.open_image(tmp_path / "band.png").size == (300, 3)


def test_an_ending_that_lies_does_no_harm(noise, tmp_path):
    file = noise(tmp_path / "a.png", 1).rename(tmp_path / "a.jpg")
    assert images.open_image(file).format == "PNG"


def test_photos_of_phones_are_read(noise, tmp_path):
    """Two pictures in one JPEG, MPO; and HEIC, where pillow-heif is there."""
    image = Image.open(noise(tmp_path / "a.png", 1))
    image.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[image])
    image.save(tmp_path / "b.jpg", "JPEG")
    two, one = (images.open_image(tmp_path / f"{name}.jpg") for name in "ab")
    assert (two.format, two.tobytes()) == ("MPO", one.tobytes())
    if ".heic" in ENDINGS:
        image.save(tmp_path / "a.heic")
        assert images.open_image(tmp_path / "a.heic").size == image.size


def test_formats_of_phones_and_browsers_are_found_where_pillow_reads_them():
    assert {".jfif", ".jpe", ".jpeg", ".png", ".webp", ".tif", ".gif", ".bmp"} < ENDINGS
    assert (".avif" in ENDINGS) == features.check("avif")
    assert not {".eps", ".ps", ".pdf", ".psd", ".blp", ".mpg", ".h5"} & ENDINGS


def test_odd_pictures_are_noted_from_files_and_from_the_cache(noise, tmp_path):
    still = noise(tmp_path / "still.gif", 1)
    frames = [Image.new("L", (40, 40), grey) for grey in (0, 200)]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    noise(tmp_path / "tiny.png", 2, (40, 15))
    pictures = Pictures([still, tmp_path / "moves.gif", tmp_path / "tiny.png"], torch.arange(3))
    for _ in range(2):
        notes = []
        read(pictures, 32, folder=tmp_path / "cache", notes=notes)
        assert notes == [
            f"1 images are animated, and read as their first frame: {tmp_path}/moves.gif",
            f"1 images are under 16 pixels wide or high: {tmp_path}/tiny.png",
        ]


def test_a_digest_is_what_sha256sum_prints(pictures, files):
    expected = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert read(pictures, 32, folder=None)[0].digests == expected
    assert pictures[torch.tensor([2, 0])].digests is None
    some = read(pictures, 32, folder=None)[0][torch.tensor([2, 0])]
    assert some.digests == [expected[2], expected[0]]


def test_a_copy_elsewhere_is_read_from_the_cache(pictures, files, tmp_path, no_decoder):
    expected = read(pictures, 32, folder=tmp_path / "cache")[1]
    moved = [file.rename(file.with_name(f"moved{file.name}")) for file in files]
    no_decoder()
    again = read(Pictures(moved, pictures.labels), 32, folder=tmp_path / "cache")[1]
    assert torch.equal(again, expected)


def test_what_does_not_fit_in_memory_is_told_before_it_is_read(pictures, monkeypatch, no_decoder):
    no_decoder()
    monkeypatch.setattr(images, "free_memory", lambda: 7 * 3 * 224 * 224 - 1)
    with pytest.raises(
        UserError, match=r"7 pictures of 224 x 224 pixels take 0\.0 GB.*0\.0 GB are"
    ):
        read(pictures, 224, folder=None)


def test_free_memory_is_what_the_system_says():
    assert 1e6 < images.free_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_of_several_unreadable_files_the_first_is_named_and_the_others_counted(pictures, files):
    for i in (2, 4, 5):
        text_file(files[i])
    with pytest.raises(UserError, match=r"2\.bmp.*and 2 more files"):
        read(pictures, 32, folder=None)
    assert read(pictures, 32, skip_bad=True, folder=None)[2] == [str(files[i]) for i in (2, 4, 5)]


def test_nothing_readable_is_an_error_even_when_bad_files_are_skipped(pictures, files):
    for path in files:
        text_file(path)
    with pytest.raises(UserError, match="none of 7 image files can be read"):
        read(pictures, 32, skip_bad=True, folder=None)


def test_choosing_pictures_keeps_order_labels_and_repeats(pictures, files, numbered, numbers):
    chosen = torch.tensor([5, 0, 0, 2])
    assert pictures[chosen].source == [files[5], files[0], files[0], files[2]]
    assert pictures[chosen].labels.tolist() == [2, 0, 0, 2]
    in_memory = numbered([4, 3, 2, 1, 0, 9])[chosen]
    assert numbers(in_memory.source) == chosen.tolist()
    assert in_memory.labels.tolist() == [9, 4, 4, 2]


def batches_of(pictures: Pictures, size: int) -> Batches:
    pictures, pixels, _ = read(pictures, size, folder=None)
    return Batches(pictures, pixels, torch.device("cpu"), None)


def test_images_are_normalised_crops_of_the_chosen(pictures, files):
    chosen = torch.tensor([3, 1])
    expected = torch.stack([normalize(crop(Image.open(files[i]), 32)) for i in (3, 1)])
    assert torch.equal(batches_of(pictures, 32).images(chosen), expected)


def test_shots_are_the_pictures_of_the_largest_class(pictures):
    assert batches_of(pictures, 32).shots == 3  # labels 0 1 2 0 1 2 0


def test_features_are_encoded_images_and_computed_once(pictures):
    class Encoder:
        calls = 0
        visual, config = torch.nn.Linear(1, 1), None

        def encode_image(self, images):
            self.calls += 1
            return images.mean(dim=(2, 3))

    batches, encoder = batches_of(pictures, 32), Encoder()
    expected = normalize(batches.pixels).mean(dim=(2, 3))
    torch.testing.assert_close(batches.features(encoder, batch_size=3), expected)
    assert encoder.calls == 3  # 3 + 3 + 1 pictures
    assert batches.features(encoder) is batches.features(encoder)
    assert encoder.calls == 3


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
    monkeypatch.setattr(images, "KEPT", room)
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


def test_flowers102_whole_is_under_1300_megabytes():
    """8,189 pictures as one tensor, written in place: nothing else of that size is made."""
    one = read(Pictures(torch.zeros(1, 3, 30, 40, dtype=torch.uint8), torch.zeros(1)), 224)[1]
    assert one.nbytes * (1020 + 1020 + 6149) < 1.3e9


def test_reading_makes_one_tensor_and_no_copy_of_it(pictures, monkeypatch):
    made = []
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    pixels = read(pictures, 32, folder=None)[1]
    assert pixels.data_ptr() in [tensor.data_ptr() for tensor in made]


@pytest.mark.parametrize(("augment", "shape"), [("none", (3, 16)), ("crop-flip", (3, 3, 8, 8))])
def test_a_method_on_features_is_given_images_where_they_are_augmented(augment, shape):
    pixels = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    few = Batches(Pictures(pixels, torch.zeros(5, dtype=torch.int64)), pixels, torch.device("cpu"))
    few.features = lambda clip: torch.zeros(5, 16)
    method = SimpleNamespace(input="features", clip=None)
    assert few.inputs(method, torch.tensor([0, 2, 4]), augment).shape == shape
