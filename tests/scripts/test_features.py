"""Training and testing on features that embed.py wrote ends where the pictures themselves end."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewshot.mapped import Mapped
from fewshot.predictions import predict_task

ON_FEATURES = [
    "linear_probe",
    "lp_plus_plus",
    "tip_adapter",
    "tip_adapter_f",
    "gda",
    "clip_adapter",
    "coop",
]


@pytest.fixture(scope="module")
def features(script, data, model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("features") / "noise"
    result = script("embed", "--data", data, "--model", model, "--out", out, "--shard-size", 9)
    assert result.code == 0, result.err
    return out


@pytest.fixture(scope="module")
def both(script, data, model, features, tmp_path_factory):
    """(method) -> its runs on pictures and on features, and what these printed."""
    kept = {}

    def run(method: str) -> list:
        if method not in kept:
            kept[method] = []
            for where in (
                ("--dataset", "folder", "--data-root", data, "--model", model),
                ("--dataset", "features", "--data-root", features),
            ):
                out = tmp_path_factory.mktemp("runs")
                flags = ("--method", method, "--shots", 3, "--out", out)
                # As many threads: sums are rounded by their number.
                result = script("train", *flags, *where, *steps(method), "--threads", 1)
                assert result.code == 0, result.err
                kept[method].append((next(out.rglob("results.json")).parent, result.out))
        return kept[method]

    return run


def steps(method: str) -> tuple:
    return ("--epochs", 3) if method in ("tip_adapter_f", "clip_adapter", "coop") else ()


def table(out: str) -> list[str]:
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ["base", "novel"])
    return lines[start : start + 3]


@pytest.mark.parametrize("method", ON_FEATURES)
def test_the_same_is_learned_as_from_pictures(method, both):
    (pictures, said), (features, told) = both(method)
    assert table(told) == table(said)
    ours, theirs = (load_file(run / "adapter.safetensors") for run in (features, pictures))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)
    one, other = (json.loads((run / "config.json").read_text()) for run in (features, pictures))
    assert one["data"] == other["data"]  # by content: the same pictures in the same order
    one, other = (load_file(run / "predictions.safetensors") for run in (features, pictures))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one if name.endswith("labels"))


@pytest.mark.parametrize("method", ["linear_probe", "gda"])
def test_a_run_is_tested_again(method, both, script):
    (_, said), (run, _) = both(method)
    again = script("eval", "--run", run)
    assert again.code == 0, again.err
    assert table(again.out) == table(said)


def test_a_run_is_tested_on_pictures_or_features_wherever_it_learned(both, script, data, features):
    (pictures, _), (run, _) = both("gda")
    where, tables = {"features": features, "folder": data}, []
    for tested, name in ((run, "folder"), (pictures, "features"), (pictures, "folder")):
        other = script("eval", "--run", tested, "--dataset", name, "--data-root", where[name])
        assert other.code == 0, other.err
        tables.append(other.out.splitlines()[-3:])
    assert tables[0] == tables[1] == tables[2]


def test_zero_shot_on_features_and_on_pictures(script, data, features, model):
    one = script("eval", "--method", "zero_shot", "--dataset", "features", "--data-root", features)
    pictures = ("--dataset", "folder", "--data-root", data, "--model", model)
    other = script("eval", "--method", "zero_shot", *pictures)
    assert (one.code, other.code) == (0, 0), one.err + other.err
    assert one.out.splitlines()[-2:] == other.out.splitlines()[-2:]


def test_of_what_is_tested_a_batch_is_in_memory_at_once(script, features, monkeypatch):
    read, sizes = Mapped.read, []
    monkeypatch.setattr(Mapped, "read", lambda rows: sizes.append(len(rows)) or read(rows))
    monkeypatch.setattr(predict_task, "__defaults__", (3,))  # images in a batch
    where = ("--dataset", "features", "--data-root", features, "--classes", "all")
    result = script("eval", "--method", "zero_shot", *where)
    assert result.code == 0, result.err
    assert (sum(sizes), max(sizes)) == (20, 3)  # each once


def test_a_run_on_features_names_pictures_and_has_a_page(both, script, data, tmp_path):
    (pictures, _), (run, _) = both("gda")
    image = next(data.rglob("test/*/*.png"))
    one, other = (script("eval", "--run", r, "--image", image) for r in (run, pictures))
    assert (one.code, one.out) == (0, other.out)
    page = script("report", run, "--out", tmp_path / "page.html")
    assert page.code == 0, page.err
    text = (tmp_path / "page.html").read_text()
    assert "data:image/" in text
    assert "could not be loaded" not in text


def test_what_needs_pictures_is_told_before_any_work(script, features, is_one_line, tmp_path):
    where = ("--dataset", "features", "--data-root", features, "--out", tmp_path / "runs")
    result = script("train", "--method", "lora", *where)
    assert is_one_line(result, "LoRA needs the pictures themselves", "--dataset folder")
    result = script("train", "--method", "gda", "--augment", "crop-flip", *where)
    assert is_one_line(result, "--augment crop-flip changes pictures")
    assert is_one_line(script("train", "--method", "vpt,lora", *where), "each of these methods")
    assert not (tmp_path / "runs").exists()


def test_of_several_methods_those_that_can_are_trained(script, features, tmp_path):
    where = ("--dataset", "features", "--data-root", features, "--out", tmp_path)
    result = script("train", "--method", "gda,vpt,tip_adapter", *where)
    assert result.code == 0, result.err
    assert "left out: VPT needs the pictures themselves" in result.out
    ended = {path.parent.name for path in tmp_path.rglob("results.json")}
    assert ended == {"gda-s10-seed1", "tip_adapter-s10-seed1"}


def test_another_model_is_one_line(script, features, new_model, is_one_line, tmp_path):
    where = ("--dataset", "features", "--data-root", features, "--out", tmp_path)
    result = script("train", "--method", "gda", *where, "--model", new_model(1))
    assert is_one_line(result, "the features were made by", "give the right model with --model")
    assert is_one_line(script("train", "--method", "gda", "--dataset", "features"), "--data-root")
