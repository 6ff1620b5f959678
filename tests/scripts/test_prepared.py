"""Every script prepares pictures as the model's description says; the oracle is open_clip."""

import dataclasses
import json

import open_clip
import pytest
import torch
from PIL import Image

import clip_min
from clip_min import CLIP, CLIPConfig, formats, tokenize
from clip_min.weights import fingerprint

ODD = CLIPConfig(
    *(32, 32, 8, 64, 2, 2, 64, 2, 2),
    activation="gelu",
    mean=(0.5, 0.5, 0.5),
    std=(0.4, 0.4, 0.4),
    resize="squash",
    interpolation="bilinear",
)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """The folder of a model, as open_clip reads one."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "odd"
    formats.save_open_clip(CLIP(ODD), folder)
    return folder


@torch.no_grad()
def predictions(folder, files, names) -> list[str]:
    """Of open_clip itself, with the template that the scripts take."""
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    texts = model.encode_text(tokenize([f"a photo of a {name}." for name in names]))
    images = model.encode_image(torch.stack([transform(Image.open(file)) for file in files]))
    return [names[i] for i in (images @ torch.nn.functional.normalize(texts).T).argmax(dim=1)]


def test_predictions_and_accuracy_are_those_of_the_library_it_comes_from(
    odd, script, data, tmp_path
):
    files = sorted((data / "test").glob("*/*.png"))
    truth = [file.parent.name.replace("_", " ").replace("-", " ") for file in files]
    names = sorted({*truth})
    expected = predictions(odd, files, names)
    assert len({*expected}) > 1
    common = ("--method", "zero_shot", "--model", odd)
    shown = script("eval", *common, "--image", *files, "--classes", ",".join(names))
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    first = [lines[lines.index(str(file)) + 1].split("%")[1].strip() for file in files]
    assert first == expected
    right = [found == true for found, true in zip(expected, truth, strict=True)]
    result = script(
        "train",
        *(*common, "--dataset", "folder", "--data-root", data, "--classes", "all"),
        *("--template", "a photo of a {}.", "--out", tmp_path),
    )
    assert result.code == 0, result.err
    (file,) = tmp_path.rglob("results.json")
    found = json.loads(file.read_text())
    assert found["all"] == pytest.approx(100 * sum(right) / len(right))


def test_another_way_to_prepare_pictures_gives_another_fingerprint(odd):
    clip = clip_min.load(odd)
    before = fingerprint(clip)
    for key, value in {"resize": "shortest", "std": (1, 1, 1), "activation": "quick_gelu"}.items():
        clip.config = dataclasses.replace(ODD, **{key: value})
        assert fingerprint(clip) != before


def test_image_size_belongs_to_the_run(odd, script, data, tmp_path, is_one_line):
    common = ("--method", "zero_shot", "--model", odd, "--dataset", "folder", "--data-root", data)
    result = script("train", *common, "--image-size", 48, "--out", tmp_path)
    assert result.code == 0, result.err
    (path,) = tmp_path.rglob("config.json")
    assert path.parts[-3] == "odd-48px"
    again = script("eval", "--run", path.parent, "--data-root", data)
    assert again.code == 0, again.err
    assert [line for line in again.out.splitlines() if line.startswith("zero-shot")] == [
        line for line in result.out.splitlines() if line.startswith("zero-shot")
    ]
    assert is_one_line(
        script("train", *common, "--image-size", 30, "--out", tmp_path), "30 pixels", "multiple"
    )
    assert is_one_line(
        script("eval", "--run", path.parent, "--image-size", 32), "a run has its own"
    )
    out = tmp_path / "out.safetensors"
    assert script("export", "--run", path.parent, "--format", "safetensors", out).code == 0
    assert clip_min.load(out).config == dataclasses.replace(ODD, image_size=48)
