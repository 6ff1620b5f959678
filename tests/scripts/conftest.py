"""train.py and eval.py on a tiny CLIP and a folder of coloured noise."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import clip_min
from clip_min import CLIP, CLIPConfig
from fewshot.catalogue import DATASETS
from fewshot.experiment import Experiment, run_script

COLOURS = {  # class -> the middle of its noise; three base classes and two novel ones
    "amber_lily": (200, 150, 60),
    "blue-bell": (60, 60, 200),
    "cyan lotus": (60, 180, 180),
    "dark-iris": (50, 40, 60),
    "egg flower": (190, 190, 180),
}


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing is kept where a user's pixels and features are, nor read from there."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment.load, "__defaults__", (folder,))
        patch.setenv("CLIP_MIN_CACHE", str(folder))  # for processes of their own
        yield


@pytest.fixture(scope="session")
def new_model(tmp_path_factory):
    """(seed) -> the file of a tiny CLIP."""

    def make(seed: int) -> Path:
        path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
        torch.manual_seed(seed)
        clip_min.save(CLIP(CLIPConfig(32, 32, 8, 64, 2, 2, 64, 2, 2)), path)
        return path

    return make


@pytest.fixture(scope="session")
def model(new_model) -> Path:
    return new_model(0)


@pytest.fixture(scope="session")
def draw():
    """(folder, per class, seed) -> writes that many pictures of each class."""

    def write(folder: Path, count: int, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        for name, colour in COLOURS.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                noise = torch.randint(-50, 51, (36, 40, 3), generator=rng)
                pixels = (noise + torch.tensor(colour)).clamp(0, 255).to(torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / name / f"{i}.png")

    return write


@pytest.fixture(scope="session")
def data(tmp_path_factory, draw) -> Path:
    root = tmp_path_factory.mktemp("data") / "noise"
    draw(root / "train", 8, seed=1)
    draw(root / "test", 4, seed=2)
    return root


@pytest.fixture
def published(tmp_path, monkeypatch) -> Path:
    """$DATA with look-alikes of DTD and Food-101, of 3 classes with 5 test pictures each."""
    rng = torch.Generator().manual_seed(7)
    colours = dict(list(COLOURS.items())[1:4])
    for name, folder, files, val in (
        ("dtd", "dtd", ("labels/train1.txt", "labels/val1.txt", "labels/test1.txt"), 6),
        ("food101", "food-101", ("meta/train.txt", "meta/test.txt"), 0),
    ):
        base = tmp_path / "published" / folder
        for file, count in zip(files, (2, 2, 5) if val else (2, 5), strict=True):
            lines = []
            for kind, colour in colours.items():
                for i in range(count):
                    picture = base / f"images/{kind}/{Path(file).stem}_{i}.jpg"
                    picture.parent.mkdir(parents=True, exist_ok=True)
                    noise = torch.randint(-60, 61, (36, 40, 3), generator=rng)
                    pixels = (noise + torch.tensor(colour)).clamp(0, 255).to(torch.uint8)
                    Image.fromarray(pixels.numpy()).save(picture)
                    lines.append(f"{kind}/{picture.stem}")
            (base / file).parent.mkdir(exist_ok=True)
            (base / file).write_text("\n".join(lines))
        entry = replace(DATASETS[name], classes=3, images=(6, val, 15))
        monkeypatch.setitem(DATASETS, name, entry)
    return tmp_path / "published"


@pytest.fixture(scope="session")
def script():
    """(name, *flags) -> exit code, stdout and stderr of the script, run in this process."""

    def call(name: str, *flags) -> SimpleNamespace:
        out, err, code = io.StringIO(), io.StringIO(), 0
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            patch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
            try:
                run_script(importlib.import_module(name).main)
            except SystemExit as ended:
                code = ended.code or 0
        return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())

    return call


@pytest.fixture(scope="session")
def torchrun(root):
    """(N, script, *flags) -> the N processes, started; their output is read as text."""

    def start(count: int, script: str | Path, *flags) -> subprocess.Popen:
        many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        return subprocess.Popen(
            [sys.executable, *many, "--", str(root / script), *map(str, flags)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def synthetic(script, data, model, tiny_llava, tiny_diffusion, tmp_path_factory):
    """(classes, shots) -> a folder of synthetic images for `data`, two of each class."""
    made = {}

    def make(classes: str = "base-novel", shots: int = 10) -> Path:
        if (classes, shots) not in made:
            folder = tmp_path_factory.mktemp("synthetic") / "images"
            result = script(
                "generate",
                *("--dataset", "folder", "--data-root", data, "--model", model),
                *("--classes", classes, "--shots", shots, "--synthetic", folder),
                *("--captioner", tiny_llava, "--painter", tiny_diffusion, "--per-class", 2),
                *("--steps", 2, "--strength", 0.5, "--caption-tokens", 3, "--captions", 1),
                *("--reject-limit", 2),
            )
            assert result.code == 0, result.err
            made[classes, shots] = folder
        return made[classes, shots]

    return make


@pytest.fixture(scope="session")
def flags(data, model) -> list:
    """A training of LoRA that takes a second."""
    return [
        *("--method", "lora", "--dataset", "folder", "--data-root", data, "--model", model),
        *("--shots", 4, "--epochs", 3, "--batch-size", 4, "--lr", 0.01, "--patience", 0),
        *("--image-rank", 4, "--text-rank", 3),
    ]


@pytest.fixture(scope="session")
def train(script, flags):
    """(out, *more flags) -> the run's folder, after a training that went well."""

    def call(out: Path, *more) -> Path:
        result = script("train", *flags, "--out", out, *more)
        assert result.code == 0, result.err
        return next(path.parent for path in out.rglob("results.json") if ".old" not in str(path))

    return call


@pytest.fixture(scope="session")
def trained(script, flags, tmp_path_factory) -> SimpleNamespace:
    """One training: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("runs")
    result = script("train", *flags, "--out", out)
    assert result.code == 0, result.err
    return SimpleNamespace(path=out / "noise/tiny/lora-s4-seed1", out=result.out, err=result.err)


@pytest.fixture(scope="session")
def is_one_line():
    """(result, *said) -> whether it ended with exit code 2 and one line that says all of this."""

    def check(result, *said: str) -> bool:
        assert result.code == 2, result.out + result.err
        assert "Traceback" not in result.err
        assert result.err.count("\n") == 1
        assert "error: " in result.err
        return all(part in result.err for part in said)

    return check
