"""Pixels are those of `clip_min.crop`, from files, and from the cache."""

import contextlib
import hashlib
import os
import random
import struct
import time
import tracemalloc
import weakref
import zlib
from dataclasses import replace
from unittest.mock import Mock

import PIL
import pytest
import torch
from PIL import Image, ImageFile, features
from safetensors.torch import load_file, save_file

from clip_min import UserError, crop
from clip_min.preprocess import OPENAI
from fewshot import cache
from fewshot import pictures as module
from fewshot.pictures import ENDINGS, Pictures, Reader


@pytest.fixture
def no_decoder(monkeypatch):
    """() -> from now on, decoding a picture fails the test."""

    def forbid(path):
        raise AssertionError(f"{path} was decoded")

    return lambda: monkeypatch.setattr(module, "open_image", forbid)


def read(pictures, size, notes=None, **settings) -> tuple:
    """-> the readable pictures, their pixels, and the files that a note says were skipped."""
    notes = [] if notes is None else notes
    found = Reader(size, **settings).read(pictures, notes)
    skipped = [note.split(": ")[1].split(", ") for note in notes if note.startswith("skipped ")]
    assert all(note.startswith(f"skipped {len(skipped[0])} ") for note in notes[-1:] if skipped)
    return *found, skipped[0] if skipped else []


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
    real, finished = module.open_image, []

    def slow_at_first(path):
        number = files.index(path)
        time.sleep(0.05 * (len(files) - number))
        finished.append(number)
        return real(path)

    monkeypatch.setattr(module, "open_image", slow_at_first)
    monkeypatch.setattr(module, "READERS", 7)
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
    Image.new("RGB", (32, 32), "red").save(files[2])  # a BMP
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
        module.open_image(files[1])


@pytest.mark.filterwarnings("ignore")
def test_files_with_bits_changed_are_pictures_or_one_line(files, tmp_path):
    rng = random.Random(0)
    for _ in range(100):
        file = rng.choice(files)
        data = bytearray(file.read_bytes())
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
        (tmp_path / "mutated").write_bytes(data)
        with contextlib.suppress(UserError):
            module.open_image(tmp_path / "mutated")


@pytest.mark.parametrize("size", [(1, 65_000), (65_000, 1), (101 * 3, 3)])
def test_a_picture_that_is_a_line_is_refused_before_it_fills_the_memory(size, tmp_path):
    Image.new("L", size).save(tmp_path / "line.png")
    with pytest.raises(UserError, match=f"line.png: cannot be used with {size[0]} x {size[1]}"):
        module.open_image(tmp_path / "line.png")
    Image.new("L", (300, 3)).save(tmp_path / "band.png")
    assert module.open_image(tmp_path / "band.png").size == (300, 3)


def png_of(width: int, height: int) -> bytes:
    size = struct.pack(">II", width, height) + b"\x08\x02\0\0\0"
    chunks = ((b"IHDR", size), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(of)) + k + of + struct.pack(">I", zlib.crc32(k + of))
        for k, of in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


BOMBS = {
    "png": png_of(60_000, 60_000),
    "ppm": b"P6 60000 60000 255\n" + b"\0" * 100,
    "gif": b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + b"\0\0\0,\0\0\0\0" + b"\x60\xea" * 2,
    "bmp": b"BM" + struct.pack("<IIIIiiHHIIIIII", 100, 0, 54, 40, 60_000, 60_000, 1, 24, *[0] * 6),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_few_bytes_that_would_be_gigabytes_of_pixels_are_refused(kind, tmp_path):
    file = tmp_path / f"bomb.{kind}"
    file.write_bytes(BOMBS[kind] + b"\0" * 50)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"cannot be read as an image \(Image size .*bomb"):
        module.open_image(file)
    assert tracemalloc.get_traced_memory()[1] < 1e7


def test_a_link_is_read_as_the_picture_it_leads_to_and_as_nothing_else(pictures, files, tmp_path):
    """It may lead out of the folder; what is no picture there is neither shown nor changed."""
    (tmp_path / "secret").write_text("password")
    os.utime(tmp_path / "secret", (1, 1))
    files[1].rename(tmp_path / "aside.png")
    files[1].symlink_to(tmp_path / "aside.png")
    assert module.open_image(files[1]).size == Image.open(tmp_path / "aside.png").size
    files[1].unlink()
    files[1].symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="cannot be read as an image") as error:
        module.open_image(files[1])
    assert "password" not in str(error.value)
    assert ((tmp_path / "secret").read_text(), os.stat(tmp_path / "secret").st_mtime) == (
        "password",
        1,
    )


def test_an_ending_that_lies_does_no_harm(noise, tmp_path):
    file = noise(tmp_path / "a.png", 1).rename(tmp_path / "a.jpg")
    assert module.open_image(file).format == "PNG"


def test_photos_of_phones_are_read(noise, tmp_path):
    """Two pictures in one JPEG, MPO; and HEIC, where pillow-heif is there."""
    image = Image.open(noise(tmp_path / "a.png", 1))
    image.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[image])
    image.save(tmp_path / "b.jpg", "JPEG")
    two, one = (module.open_image(tmp_path / f"{name}.jpg") for name in "ab")
    assert (two.format, two.tobytes()) == ("MPO", one.tobytes())
    if ".heic" in ENDINGS:
        image.save(tmp_path / "a.heic")
        assert module.open_image(tmp_path / "a.heic").size == image.size


def test_formats_of_phones_and_browsers_are_found_where_pillow_reads_them():
    assert {".jfif", ".jpe", ".jpeg", ".png", ".webp", ".tif", ".gif", ".bmp"} < ENDINGS
    assert (".avif" in ENDINGS) == features.check("avif")
    assert not {".eps", ".ps", ".pdf", ".psd", ".blp", ".mpg", ".h5"} & ENDINGS


def test_odd_pictures_are_noted_from_files_and_from_the_cache(noise, tmp_path):
    still = noise(tmp_path / "still.gif", 1)
    frames = [Image.new("L", (40, 40), grey) for grey in (0, 200)]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    noise(tmp_path / "tiny.png", 2, (40, 15))
    for name, tag in (("turned", 6), ("upright", 1)):
        (exif := Image.Exif())[0x0112] = tag
        Image.new("RGB", (40, 30)).save(tmp_path / f"{name}.jpg", exif=exif)
    names = ("moves.gif", "tiny.png", "turned.jpg", "upright.jpg")
    pictures = Pictures([still, *(tmp_path / name for name in names)], torch.arange(5))
    for _ in range(2):
        notes = []
        read(pictures, 32, folder=tmp_path / "cache", notes=notes)
        assert notes == [
            f"1 images are animated, and read as their first frame: {tmp_path}/moves.gif",
            f"1 images are under 16 pixels wide or high: {tmp_path}/tiny.png",
            "1 images are marked as rotated (EXIF), which CLIP's transform ignores: "
            f"{tmp_path}/turned.jpg",
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
    monkeypatch.setattr(module, "free_memory", lambda: 7 * 3 * 224 * 224 - 1)
    with pytest.raises(
        UserError, match=r"7 pictures of 224 x 224 pixels take 0\.0 GB.*0\.0 GB are"
    ):
        read(pictures, 224, folder=None)


def test_free_memory_is_what_the_system_says():
    assert 1e6 < module.free_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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


def test_pictures_are_prepared_as_the_models_config_says(pictures, files, tmp_path):
    """And kept apart from pixels that were prepared otherwise."""
    for way in ({}, {"resize": "squash"}, {"interpolation": "bilinear"}):
        config = replace(OPENAI, image_size=32, **way)
        expected = torch.stack([crop(Image.open(path), config) for path in files])
        for _ in range(2):  # decoded, and from the cache
            assert torch.equal(read(pictures, 32, folder=tmp_path, prepared=config)[1], expected)
    assert len(cached(tmp_path)) == 3


def hashes_of(pixels: torch.Tensor) -> list[str]:
    """As hashlib and NumPy have it: rows of bytes, red first."""
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in pixels]


def shown(hashes: torch.Tensor) -> list[str]:
    return [bytes(row.tolist()).hex() for row in hashes]


def test_checked_are_the_hashes_of_the_pixels_and_nothing_else_is_kept(
    pictures, files, tmp_path, no_decoder
):
    for _ in range(2):
        readable, hashes = Reader(32, folder=tmp_path / "cache").check(pictures, [])
        assert shown(hashes) == hashes_of(pixels_of(files))
        assert readable.source == files
        no_decoder()  # the second time they come from the cache
    assert sorted(folder.name for folder in (tmp_path / "cache").iterdir()) == ["hashes", "odd"]


def test_a_test_picture_is_decoded_once_in_a_run(pictures, files, tmp_path, no_decoder):
    reader = Reader(32, folder=tmp_path / "cache")
    readable, hashes = reader.check(pictures, [])
    no_decoder()
    parts = [torch.tensor([6, 0]), torch.tensor([3, 3])]
    for pixels, part in zip(reader.stream(readable, hashes, parts), parts, strict=True):
        assert torch.equal(pixels, pixels_of(files)[part])


def test_what_another_run_checked_is_decoded_when_it_is_first_tested(
    pictures, files, tmp_path, no_decoder
):
    Reader(32, folder=tmp_path / "cache").check(pictures, [])
    reader = Reader(32, folder=tmp_path / "cache")
    readable, hashes = reader.check(pictures, [])
    first = list(reader.stream(readable, hashes, [torch.arange(7)]))
    no_decoder()
    again = list(reader.stream(readable, hashes, [torch.arange(7)]))
    assert torch.equal(first[0], pixels_of(files))
    assert torch.equal(again[0], first[0])


@pytest.mark.parametrize("why", ["no folder", "read-only", "no room", "full disk"])
def test_crops_that_cannot_be_kept_on_disk_are_decoded_again(
    why, pictures, files, tmp_path, monkeypatch
):
    folder = tmp_path / "cache"
    if why == "read-only":
        folder.write_text("a file where the folder belongs")
    if why == "no room":
        monkeypatch.setattr(cache, "limit", 3.5 * 3 * 32 * 32)  # of seven crops, three
    if why == "full disk":
        monkeypatch.setattr(cache.os, "pwrite", Mock(side_effect=OSError(28, "no space")))
    reader = Reader(32, folder=None if why == "no folder" else folder)
    readable, hashes = reader.check(pictures, [])
    assert len(reader.spool.places) == (3 if why == "no room" else 0)
    found = list(reader.stream(readable, hashes, [torch.arange(7)]))
    assert torch.equal(found[0], pixels_of(files))


@pytest.mark.parametrize("skip", [True, False])
def test_to_check_says_what_to_read_says(skip, noise, files, tmp_path):
    text_file(files[1])
    gone(files[5])
    source = [*files, noise(tmp_path / "tiny.png", 2, (40, 15))]
    pictures, said = Pictures(source, torch.arange(8)), []
    for way in ("read", "check"):
        notes = []
        try:
            found = getattr(Reader(32, skip_bad=skip, folder=None), way)(pictures, notes)[0]
            notes += [found.source, found.labels.tolist(), found.digests]
        except UserError as error:
            notes.append(str(error))
        said.append(notes)
    assert said[0] == said[1]
    assert len(said[0]) == (5 if skip else 1)


def streamed(pictures, size, parts, hashes=None) -> list[torch.Tensor]:
    reader = Reader(size, folder=None)
    hashes = reader.check(pictures, [])[1] if hashes is None else hashes
    return list(reader.stream(pictures, hashes, [torch.tensor(part) for part in parts]))


def test_a_stream_is_the_pixels_of_each_part_though_threads_end_in_another_order(
    pictures, files, monkeypatch
):
    expected, real, finished = pixels_of(files), module.open_image, []

    def slow_at_first(path):
        time.sleep(0.05 * (len(files) - files.index(path)))
        finished.append(files.index(path))
        return real(path)

    hashes = Reader(32, folder=None).check(pictures, [])[1]
    monkeypatch.setattr(module, "open_image", slow_at_first)
    monkeypatch.setattr(module, "READERS", 7)
    parts = [[0, 1, 2], [6, 5, 5], [4], [3]]
    found = streamed(pictures, 32, parts, hashes)
    assert all(torch.equal(x, expected[part]) for x, part in zip(found, parts, strict=True))
    assert finished != [0, 1, 2, 6, 5, 5, 4, 3]  # else this test shows nothing


def test_a_file_that_is_spoilt_or_changed_after_it_was_checked_is_one_line(pictures, files, noise):
    hashes = Reader(32, folder=None).check(pictures, [])[1]
    noise(files[2], 99)
    with pytest.raises(UserError, match=r"2\.bmp: has changed since it was checked"):
        streamed(pictures, 32, [[0, 1, 2, 3]], hashes)
    text_file(files[0])
    with pytest.raises(UserError, match=r"^\S*0\.png: cannot be read as an image"):
        streamed(pictures, 32, [[0, 1, 2, 3]], hashes)


@pytest.mark.parametrize("ahead", [0, 3, 8])
def test_few_pictures_are_in_memory_at_once_and_none_is_decoded_for_nothing(
    ahead, files, monkeypatch
):
    """However many there are: those of the batch that is asked for, and those read ahead."""
    made, most, real = [], 0, Reader._decode

    def decode(self, pictures, i):
        nonlocal most
        pixels, odd = real(self, pictures, i)
        made.append(weakref.ref(pixels))
        most = max(most, sum(one() is not None for one in made))
        return pixels, odd

    pictures = Pictures(files[:1] * 200, torch.zeros(200, dtype=torch.int64))
    hashes = Reader(32, folder=None).check(pictures, [])[1]
    monkeypatch.setattr(module, "AHEAD", ahead)
    monkeypatch.setattr(Reader, "_decode", decode)
    batches = Reader(32).stream(pictures, hashes, torch.arange(200).split(10))
    for asked, _ in enumerate(batches, 1):
        assert 10 * asked <= len(made) <= 10 * asked + ahead
    assert len(made) == 200
    assert most <= 10 + ahead + 1
    made.clear()
    assert Reader(32, folder=None).check(pictures, [])[1].equal(hashes)
    assert most <= 10 + ahead + 1
    made.clear()
    next(Reader(32).stream(pictures, hashes, torch.arange(200).split(10)))
    assert len(made) <= 10 + ahead  # who stops asking stops the threads
