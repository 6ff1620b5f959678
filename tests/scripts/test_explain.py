"""eval.py --explain: where the class token looks, as a picture."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def photo(data):
    return data / "test/blue-bell/0.png"


def test_a_run_is_drawn_beside_zero_shot_clip(script, trained, photo, tmp_path):
    out = tmp_path / "out.png"
    result = script("eval", "--run", trained.path, "--image", photo, "--explain", out)
    assert result.code == 0, result.err
    assert f"explained: {out}\n" in result.out
    with Image.open(out) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"), dtype=int)
    third = pixels.shape[1] // 3  # the picture, zero-shot, the run
    parts = [pixels[:, k * third : (k + 1) * third] for k in range(3)]
    assert np.abs(parts[0] - parts[1]).mean() > 5  # a map lies over it
    assert np.abs(parts[1] - parts[2]).mean() > 0.5  # LoRA has changed the tower


def test_zero_shot_clip_alone_is_drawn_too(script, model, photo, tmp_path):
    flags = ["--method", "zero_shot", "--model", model, "--classes", "$a$,<b>"]
    result = script("eval", *flags, "--image", photo, "--explain", tmp_path / "a.png")
    assert result.code == 0, result.err
    assert (tmp_path / "a.png").exists()


def test_more_than_one_picture_or_none_is_one_line(script, is_one_line, trained, photo, tmp_path):
    run = ["--run", trained.path, "--explain", tmp_path / "a.png"]
    assert is_one_line(script("eval", *run, "--image", photo, photo), "draws one picture", "has 2")
    assert is_one_line(script("eval", *run), "works only with --image")
    assert not (tmp_path / "a.png").exists()


def test_a_picture_is_not_drawn_over(script, is_one_line, trained, photo, tmp_path):
    mine = Path(shutil.copy(photo, tmp_path / "mine.png"))
    before = mine.read_bytes()
    (tmp_path / "link.png").symlink_to(mine)
    for out in (mine, tmp_path / "link.png"):
        result = script("eval", "--run", trained.path, "--image", mine, "--explain", out)
        assert is_one_line(result, "is the picture itself; give another name")
    assert mine.read_bytes() == before
    result = script("eval", "--run", trained.path, "--image", mine, "--explain", tmp_path / "a.jpg")
    assert is_one_line(result, "a.jpg: expected a file name with .png")
