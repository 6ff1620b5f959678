"""Pixels are OpenAI's, bit for bit, for pictures of every mode, size and shape."""

import io

import numpy as np
import pytest
import torch
from clip.clip import _transform as openai_transform
from PIL import Image

from clip_min import crop, normalize

SIZES = [224, 64]
SHAPES = [  # width, height
    *[(300, 200), (200, 300), (224, 224), (64, 64), (225, 224), (224, 225), (227, 301), (301, 227)],
    *[(1, 1), (1, 50), (50, 1), (2, 3), (5, 4), (33, 31), (1500, 20), (20, 1500), (1000, 999)],
    *[(65, 64), (64, 67), (449, 448), (640, 427), (427, 640), (127, 128), (500, 333)],
]
# "La" (grey times its alpha) is the one mode that OpenAI's transform raises on, and so do we.
MODES = ["RGB", "L", "LA", "P", "1", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "RGBX", "La"]


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth colours under noise, so that every pixel of a resize is its own number."""
    rng = np.random.default_rng(width * 10_000 + height)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)], axis=-1)
    pixels = 127 + 60 * waves + rng.normal(0, 40, (height, width, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if mode in ("LA", "La", "RGBA"):
        image.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
    if mode == "LAB":  # Pillow converts to it through colour profiles alone
        return Image.merge("LAB", image.split())
    return image.convert("LA").convert(mode) if mode == "La" else image.convert(mode)


def transparent_palette() -> Image.Image:
    image = noise(300, 200, "P")
    image.info["transparency"] = 3
    return image


def reopened(image: Image.Image, form: str, **options) -> Image.Image:
    file = io.BytesIO()
    image.save(file, form, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def rotated_by_exif() -> Image.Image:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to look at it
    image = reopened(noise(300, 200), "JPEG", exif=exif)
    assert image.getexif()[0x0112] == 6
    return image


def sixteen_bits(width: int = 300, height: int = 200) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 2**16, (height, width), dtype=np.uint16))


ODD = {
    "palette with transparency": transparent_palette,
    "palette with transparency, from a file": lambda: reopened(transparent_palette(), "PNG"),
    "transparency per colour": lambda: reopened(
        noise(99, 70, "P"), "PNG", transparency=bytes(range(256))
    ),
    "gif": lambda: reopened(noise(99, 70, "P"), "GIF"),
    "JPEG turned by EXIF": rotated_by_exif,
    "grey JPEG": lambda: reopened(noise(300, 200, "L"), "JPEG"),
    "CMYK JPEG": lambda: reopened(noise(300, 200, "CMYK"), "JPEG"),
    "16-bit PNG": lambda: reopened(sixteen_bits(), "PNG"),
    "I;16, one pixel wide": lambda: sixteen_bits(1, 70),
    "32-bit values out of range": lambda: Image.fromarray(
        np.random.default_rng(0).integers(-(2**31), 2**31 - 1, (70, 99), dtype=np.int32)
    ),
    "float between 0 and 1": lambda: Image.fromarray(
        np.random.default_rng(0).random((70, 99), dtype=np.float32)
    ),
    "webp with alpha": lambda: reopened(noise(99, 70, "RGBA"), "WEBP", lossless=True),
    "tiny, enlarged": lambda: noise(3, 2),
    "all black": lambda: Image.new("RGB", (300, 200)),
    "all white": lambda: Image.new("L", (64, 64), 255),
}


def openai(image: Image.Image, size: int):
    """OpenAI's tensor, or the type of what its transform raises."""
    try:
        return openai_transform(size)(image)
    except Exception as error:  # whatever it is, ours has to raise too
        return type(error)


def assert_equals_openais(image: Image.Image, size: int) -> None:
    """The same bits; where OpenAI's transform raises, the same type of error."""
    oracle = openai(image.copy(), size)
    if isinstance(oracle, type):
        with pytest.raises(oracle):
            crop(image, size)
        return
    pixels = crop(image, size)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, size, size)
    assert torch.equal(normalize(pixels), oracle)


@pytest.mark.parametrize("size", SIZES)
def test_photographs(flowers12, size):
    photographs = sorted(flowers12.rglob("*.jpg"))[::40]
    assert len(photographs) > 10
    rng = np.random.default_rng(0)
    for path in photographs:
        with Image.open(path) as image:
            assert_equals_openais(image, size)
            width, height = rng.integers(40, 700, 2).tolist()
            assert_equals_openais(image.resize((width, height)), size)
            assert_equals_openais(image.crop((0, 10, 224, 10 + height % 190 + 1)), size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_any_shape(shape, size):
    assert_equals_openais(noise(*shape), size)


@pytest.mark.parametrize("size", [8, 63, 65, 336])
def test_any_size_of_crop(size):
    for shape in SHAPES:
        assert_equals_openais(noise(*shape), size)


@pytest.mark.parametrize("shape", [(300, 201), (50, 33), (224, 224), (1, 9)])
@pytest.mark.parametrize("mode", MODES)
def test_any_mode(mode, shape):
    image = noise(*shape, mode)
    assert image.mode == mode
    for size in SIZES:
        assert_equals_openais(image, size)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
@pytest.mark.parametrize("odd", ODD)
def test_odd_pictures(odd):
    for size in SIZES:
        assert_equals_openais(ODD[odd](), size)


def test_normalize_keeps_leading_dimensions_and_its_input():
    pixels = torch.stack([crop(noise(90, 70), 64), crop(noise(70, 90), 64)])
    before = pixels.clone()
    oracle = torch.stack([openai(noise(90, 70), 64), openai(noise(70, 90), 64)])
    assert torch.equal(normalize(pixels), oracle)
    assert torch.equal(normalize(pixels[:, None]), oracle[:, None])
    assert torch.equal(normalize(pixels, torch.float16), oracle.half())
    assert torch.equal(pixels, before)


def test_crop_leaves_the_picture_as_it_was():
    image = noise(300, 200, "P")
    before = image.copy()
    crop(image, 64)
    assert (image.mode, image.size, image.tobytes()) == ("P", (300, 200), before.tobytes())
