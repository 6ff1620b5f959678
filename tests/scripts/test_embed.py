"""embed.py, killed and started again, and with memory that stays as it is."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest
from PIL import Image


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.fixture
def start(root, model):
    """(*flags) -> embed.py, started."""

    def call(*flags) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, root / "embed.py", "--model", model, *map(str, flags)],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return call


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """(count) -> a tar file of that many JPEGs that all differ."""

    def make(count: int):
        file = tmp_path_factory.mktemp("tar") / f"{count}.tar"
        with tarfile.open(file, "w") as out:
            for i in range(count):
                content = io.BytesIO()
                colour = (i % 256, i // 256 % 256, 7 * i % 256)
                Image.new("RGB", (64, 48), colour).save(content, "JPEG")
                info = tarfile.TarInfo(f"{i:06}.jpg")
                info.size = content.tell()
                content.seek(0)
                out.addfile(info, content)
        return file

    return make


def test_killed_and_started_again(start, script, model, pictures, tmp_path):
    tar = pictures(3000)
    flags = ["--data", tar, "--shard-size", 100]
    result = script("embed", "--model", model, *flags, "--out", tmp_path / "whole")
    assert result.code == 0, result.err
    assert "3,000 features" in result.out
    out = tmp_path / "killed"
    with start(*flags, "--out", out) as process:
        deadline = time.monotonic() + 120
        while not list(out.glob("0*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    made = {path: path.stat().st_mtime_ns for path in out.glob("0*.safetensors")}
    assert 0 < len(made) < 30
    result = script("embed", "--model", model, *flags, "--out", out)
    assert result.code == 0, result.err
    assert f"{100 * len(made):,} were there" in result.out
    assert all(path.stat().st_mtime_ns == before for path, before in made.items())
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pictures(start, pictures, tmp_path):
    peaks = []
    for count in (2000, 20_000):
        flags = ("--data", pictures(count), "--out", tmp_path / str(count), "--shard-size", 1000)
        with start(*flags) as process:
            out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        peaks.append(float(re.search(r"([\d,]+) MB at peak", out)[1].replace(",", "")))
    assert peaks[1] < 1.05 * peaks[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data", "none", "--out", "x"], "--data none: there is no such file or folder"),
        (["--out", "x"], "--data is missing"),
        (["--data", ".", "--out", "x", "--shard-size", "0"], "--shard-size 0: expected 1 or more"),
    ],
)
def test_mistakes_are_one_line(flags, said, script, is_one_line):
    assert is_one_line(script("embed", *flags), said)


def test_a_source_without_pictures(script, model, is_one_line, tmp_path):
    (tmp_path / "empty").mkdir()
    flags = ("--model", model, "--data", tmp_path / "empty", "--out", tmp_path / "out")
    assert is_one_line(script("embed", *flags), "holds no pictures; give")
    (tmp_path / "empty/phone.MOV").write_bytes(b"")
    assert is_one_line(script("embed", *flags), "holds no pictures (but 1 .MOV files); give")
    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")  # nothing was made: other data are fine
    (tmp_path / "list.csv").write_text("path\none.png\n")
    result = script("embed", *flags[:2], "--data", tmp_path / "list.csv", *flags[4:])
    assert result.code == 0, result.err
    assert is_one_line(script("embed", *flags), "was started with data")
    result = script("embed", *flags[:4], "--out", tmp_path / "one.png")
    assert is_one_line(result, "one.png: could not be created", "choose another place")


def test_what_is_left_out_is_counted(script, model, tmp_path, pictures):
    photos = tmp_path / "photos"
    (photos / "a/deep").mkdir(parents=True)
    for name in ("a/1.png", "a/deep/2.png"):
        Image.new("RGB", (40, 40)).save(photos / name)
    for name in ("a/3.avi", "a/deep/4.avi", "a/classes.txt", "5", "classes.txt"):
        (photos / name).write_text("one")
    (photos / "a/link").symlink_to(photos / "a/deep")
    out = script("embed", "--model", model, "--data", photos, "--out", tmp_path / "out").out
    assert "note: left out 1 other files, 2 .avi files, 1 .txt files, 1 linked folders\n" in out
    assert "2 features" in out
    shutil.rmtree(photos)
    photos.mkdir()
    shutil.copy(pictures(3), photos / "1.tar")
    with tarfile.open(photos / "1.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("000002.npy"))
    out = script("embed", "--model", model, "--data", photos, "--out", tmp_path / "tar").out
    assert "note: left out 1 .npy files\n" in out
    assert "3 features" in out


def test_features_are_of_the_model_that_is_named(script, model, new_model, is_one_line, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "one.png")
    flags = ("--data", tmp_path / "one.png", "--out", tmp_path / "out")
    assert is_one_line(script("embed", "--model", model, *flags), "expected a folder")
    (tmp_path / "photos").mkdir()
    (tmp_path / "one.png").rename(tmp_path / "photos/one.png")
    flags = ("--data", tmp_path / "photos", "--out", tmp_path / "out2")
    assert script("embed", "--model", model, *flags).code == 0
    other = script("embed", "--model", new_model(1), *flags)
    assert is_one_line(other, "was started with model")
