"""Whatever stands in a file that is read back, an error is one line: a seeded search for others."""

import copy
import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import clip_min
from clip_min import UserError, formats, weights
from clip_min.pickled import read_pickled
from fewshot.experiment import Experiment
from fewshot.run import Run
from gen.books import Manifest
from gen.summary import table
from methods import METHODS
from methods.interop.init_from import load_into
from methods.interop.load import described
from methods.interop.load import trained as method_of
from report import of_run
from reports import generated
from reports.gather import read

DEEP = '{"a":' * 3000 + "1" + "}" * 3000
ODD = [None, True, -1, 0, 10**30, 1.5, "", "x", "\ud800", "\0", "../x", [], [1], {}, {"x": 1}]


def mutated(value, rng: random.Random):
    """`value`, of JSON, with one thing in it changed, removed or added."""
    value = copy.deepcopy(value)
    inner, outer, key = value, None, None
    while isinstance(inner, dict | list) and inner and (outer is None or rng.random() < 0.7):
        outer, key = (
            inner,
            rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner))),
        )
        inner = outer[key]
    if outer is None or rng.random() < 0.05:
        return rng.choice(ODD)
    change = rng.random()
    if change < 0.2:
        del outer[key]
    elif change < 0.3 and isinstance(outer, dict):
        outer["stranger"] = rng.choice(ODD)
    else:
        outer[key] = rng.choice([*ODD, 0.1 + (inner if isinstance(inner, float) else 0)])
    return value


def spoiled(content: bytes, rng: random.Random) -> bytes:
    """Bytes of a file with some of them changed: now and then as JSON, else blindly."""
    if rng.random() < 0.6:
        lines = content.decode().split("\n")
        try:
            k = rng.randrange(max(1, len(lines) - 1))
            if len(lines) > 2 and lines[0] == "{":  # one object over many lines
                return json.dumps(mutated(json.loads(content), rng)).encode("utf-8")
            lines[k] = json.dumps(mutated(json.loads(lines[k]), rng))
            return "\n".join(lines).encode("utf-8")
        except ValueError:
            pass
    if rng.random() < 0.1:
        return rng.choice([DEEP.encode(), b"", b"\xff\xfe", b"[" * 10_000, b'{"a": NaN}'])
    at, more = rng.randrange(len(content)), rng.randbytes(rng.randrange(3))
    return content[:at] + more + content[at + rng.randrange(1, 4) :]


def search(file: Path, read: Callable, count: int, seed: int = 0) -> int:
    """Read `file` with `count` mutations in it -> how many were refused; all else is a failure."""
    whole, rng, refused = file.read_bytes(), random.Random(seed), 0
    for _ in range(count):
        spoil = blindly if file.suffix == ".safetensors" else spoiled
        file.write_bytes(content := spoil(whole, rng))
        try:
            read()
        except UserError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{file.name}: {content[:3000]!r}") from error
    file.write_bytes(whole)
    read()
    return refused


def blindly(content: bytes, rng: random.Random) -> bytes:
    header = 8 + int.from_bytes(content[:8], "little")
    at = rng.randrange(header if rng.random() < 0.8 else len(content))
    return content[:at] + rng.randbytes(rng.randrange(3)) + content[at + rng.randrange(1, 3) :]


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained.path, tmp_path / "run"))


@pytest.fixture
def clip(model):
    return clip_min.load(model)


def test_the_files_of_a_run(run, clip, model):
    empty = METHODS["lora"](
        clip, ["a"], "a {}", METHODS["lora"].Settings(image_rank=4, text_rank=3)
    )

    def open_it():
        opened = Run.open(run)
        described(opened)
        Experiment(**pick_known(opened.config["experiment"]))

    def apply():
        method_of(Run.open(run), clip_min.load(model))

    def start_from():
        load_into(empty, run)

    config = json.loads((run / "config.json").read_text())

    def resume():
        opened = Run.resume(run, config)
        opened.load_resume({"step": 0, "best_val": -1.0, "stopped": ""})
        assert all(line["seconds"] + line["loss"] for line in opened.log)

    def show():
        of_run(read(run), None, None, None)

    assert search(run / "config.json", show, 15) > 3
    assert search(run / "results.json", show, 15) == 0  # left out of the page, with a note
    assert search(run / "config.json", open_it, 150) > 30
    assert search(run / "config.json", start_from, 60) > 15
    assert search(run / "config.json", resume, 40) > 20
    assert search(run / "log.jsonl", resume, 120) > 40
    assert search(run / "resume.safetensors", resume, 60) == 60
    assert search(run / "adapter.safetensors", apply, 30) == 30
    vouched = run / "config.json"
    vouched.write_text(json.dumps({k: v for k, v in config.items() if k != "adapter_sha256"}))
    assert search(run / "adapter.safetensors", start_from, 60) > 15


def pick_known(experiment: dict) -> dict:
    return {k: v for k, v in experiment.items() if k in Experiment.__dataclass_fields__}


def test_the_books_of_synthetic_images(synthetic, tmp_path):
    folder = Path(shutil.copytree(synthetic(), tmp_path / "images"))

    def read():
        manifest = Manifest.open(folder)
        manifest.check_settings({"seed": 1, "shots": 10})
        assert all(folder in (folder / a.image).resolve().parents for a in manifest.attempts)
        table(manifest), manifest.missing(), manifest.chosen()
        generated.write(generated.numbers(manifest), manifest)
        manifest._sweep()

    for name in ("manifest.jsonl", "captions.jsonl", "settings.json", "plan.json", "seconds.json"):
        assert search(folder / name, read, 60) > 10, name


def test_a_peft_adapter_and_descriptions_beside_weights(clip, tmp_path):
    from methods.interop.peft import to_peft

    settings = METHODS["lora"].Settings(image_rank=4, text_rank=3)
    lora = METHODS["lora"](clip, ["a"], "a {}", settings)
    tensors, config = to_peft(lora)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config, indent=1))
    assert search(tmp_path / "adapter_config.json", lambda: load_into(lora, tmp_path), 100) > 15

    for save in (formats.save_hugging_face, formats.save_open_clip):
        save(clip_min.load("demo"), tmp_path / save.__name__)
        (weights_file,) = (tmp_path / save.__name__).glob("*.safetensors")
        for file in (tmp_path / save.__name__).glob("*config.json"):
            if file.name in ("config.json", "open_clip_config.json"):
                search(file, lambda path=weights_file: weights.read(path), 50)


def test_weights(model, tmp_path):
    file = Path(shutil.copy(model, tmp_path / "model.safetensors"))
    assert search(file, lambda: clip_min.load(file), 50) > 25

    module = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)))
    module.save(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    whole, rng, refused = parts["a/data.pkl"], random.Random(1), 0
    for _ in range(150):
        at, more = rng.randrange(len(whole)), rng.randbytes(rng.randrange(3))
        parts["a/data.pkl"] = whole[:at] + more + whole[at + rng.randrange(1, 4) :]
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, content)
        try:
            read_pickled(tmp_path / "a.pt")
        except UserError:
            refused += 1
    assert refused > 100
