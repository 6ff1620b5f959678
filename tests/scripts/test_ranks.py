"""torchrun with two processes: the same results as one, each piece of work done once, and kills."""

import json
import os
import signal
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewshot import ranks
from methods import METHODS, TrainingSettings

TRAININGS = Path(__file__).with_name("several_trainings.py")
DESCEND = {n: () for n, m in METHODS.items() if issubclass(m.Settings, TrainingSettings)}
MORE = {  # losses that are not a mean over images
    "finetune, pairs": ("--objective", "contrastive"),
    "finetune, class share": ("--class-share", 0.5),
    "projection, pairs": ("--objective", "contrastive"),
    "kgcoop, head": ("--depth-head",),
    "coop, balance": ("--balance",),
}
CLOSED = dict.fromkeys(("zero_shot", "linear_probe", "lp_plus_plus", "gda", "tip_adapter"), ())


@pytest.fixture(scope="module")
def many(torchrun, tmp_path_factory):
    """(N, trainings as lists of flags) -> what the N processes printed, after all went well."""

    def run(count: int, trainings: list[list]) -> str:
        file = tmp_path_factory.mktemp("flags") / "flags.json"
        file.write_text(json.dumps([[str(flag) for flag in flags] for flags in trainings]))
        with torchrun(count, TRAININGS, file) as processes:
            out, err = processes.communicate(timeout=500)
        assert processes.returncode == 0, err[:4000]
        return out

    return run


@pytest.fixture(scope="module")
def flags_for(data, model, synthetic):
    """(method, *more) -> flags of a training whose last batch is of one image."""

    def flags(name: str, *more) -> list:
        flags = ["--method", name, "--dataset", "folder", "--data-root", data, "--model", model]
        flags += ["--shots", 2, "--cache", "none"]
        if name in DESCEND:  # SGD: AdamW's first step is the gradient's sign, also of a rounding
            flags += ["--epochs", 3, "--batch-size", 5, "--lr", 0.01, "--optimizer", "sgd"]
        if "dropout" in {field.name for field in fields(METHODS[name].Settings)}:
            flags += ["--dropout", 0]
        if name.startswith("disef"):
            flags += ["--synthetic", synthetic(shots=2), "--per-class", 2]
            flags += ["--plan", "uniform", "--filter", "zero_shot"]
        return [*flags, *more]

    return flags


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(next(out.rglob("adapter.safetensors")))


@pytest.fixture(scope="module")
def both(script, many, flags_for, tmp_path_factory):
    """Row -> the folders of its run by one process, and by two; all in one go."""
    rows = {**DESCEND, **MORE, **CLOSED}
    out = tmp_path_factory.mktemp("both")
    for row, more in rows.items():
        flags = flags_for(row.split(",")[0], *more, "--out", out / "one" / row)
        assert (result := script("train", *flags)).code == 0, result.err
    trainings = [
        flags_for(row.split(",")[0], *more, "--out", out / "two" / row)
        for row, more in rows.items()
    ]
    printed = many(2, trainings)
    assert printed.count("adapter: ") == len(rows)  # rank 0 alone prints
    assert printed.count("note: this loss is not a mean over images: all 2 processes do it") == 4
    return {row: (out / "one" / row, out / "two" / row) for row in rows}


@pytest.mark.parametrize("row", [*DESCEND, *MORE])
def test_two_processes_learn_what_one_does(row, both):
    one, two = map(adapter, both[row])
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=2e-6, msg=lambda m: f"{m}")


@pytest.mark.parametrize("row", CLOSED)
def test_two_processes_test_as_one_to_the_bit(row, both):
    """Batches are dealt out whole, so that nothing is computed otherwise."""
    for name in ("adapter.safetensors", "predictions.safetensors"):
        one, two = (next(out.rglob(name)).read_bytes() for out in both[row])
        assert one == two


def test_a_run_is_tested_again_by_two_processes(both, torchrun, script):
    folder = next(both["lora"][0].rglob("results.json")).parent
    alone = script("eval", "--run", folder, "--cache", "none")
    with torchrun(2, "eval.py", "--run", folder, "--cache", "none") as processes:
        out, err = processes.communicate(timeout=300)
    assert processes.returncode == 0, err[:4000]
    assert out == alone.out


def test_whole_runs_are_spread_and_are_those_of_one_process(script, many, flags_for, tmp_path):
    """Runs of several seeds, and the points of a grid: each by one process, to the bit."""
    each = {
        "seeds": ("coop", "--seeds", "1,2,3"),
        "points": ("coop", "--grid", "weight_decay=0.1,0.2,0.3"),
        "towers": ("two_stage", "--grid", "weight_decay=0.1,0.2"),  # encodes with its own towers
    }
    for name, more in each.items():
        result = script("train", *flags_for(*more, "--out", tmp_path / "one" / name))
        assert result.code == 0, result.err
    two = [flags_for(*more, "--out", tmp_path / "two" / name) for name, more in each.items()]
    assert "2 processes take separate runs" in many(2, two)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("adapter.*")]
    assert len(files) == 3 + (1 + 3) + (1 + 2)  # three seeds; two grids and their points
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    for table in (tmp_path / "one").rglob("*-grid-*.json"):
        other = tmp_path / "two" / table.relative_to(tmp_path / "one")
        assert json.loads(table.read_text()) == json.loads(other.read_text())


def test_images_that_a_training_lacks_are_made_by_both(script, many, tmp_path):
    flags = ["--method", "disef", "--shots", 1, "--epochs", 1, "--per-class", 1, "--cache", "none"]
    assert (result := script("train", *flags, "--out", tmp_path / "one")).code == 0, result.err
    many(2, [[*flags, "--out", tmp_path / "two"]])
    found = []
    for out in (tmp_path / "one", tmp_path / "two"):
        (books,) = out.rglob("manifest.jsonl")
        files = {*books.parent.rglob("0*.png"), books}
        found.append({str(path.relative_to(out)): path.read_bytes() for path in files})
    assert len(found[0]) > 51
    assert found[0] == found[1]


def test_a_process_dies_and_one_alone_goes_on(torchrun, script, flags_for, tmp_path):
    flags = flags_for("lora", "--epochs", 40, "--patience", 0, "--keep", "last")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert script("train", *flags, "--out", whole).code == 0
    with torchrun(2, "train.py", *flags, "--out", killed) as processes:
        deadline = time.monotonic() + 300
        while not (saved := list(killed.rglob("resume.json"))) and time.monotonic() < deadline:
            time.sleep(0.01)
        children = f"/proc/{processes.pid}/task/{processes.pid}/children"
        victim = max(map(int, Path(children).read_text().split()))  # the one that began last
        os.kill(victim, signal.SIGKILL)
        processes.communicate(timeout=300)
    assert processes.returncode != 0
    assert saved
    assert not list(killed.rglob("results.json"))
    assert list(killed.rglob("adapter.safetensors"))
    result = script("train", *flags, "--out", killed, "--resume")
    assert result.code == 0, result.err
    one, two = adapter(whole), adapter(killed)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({}, "WORLD_SIZE is '4' in the environment, as set by torchrun, but RANK"),
        ({"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}, "but MASTER_ADDR is ''"),
        ({"RANK": "first"}, "but RANK is 'first'"),
        ({"WORLD_SIZE": "four", "RANK": "0"}, "but WORLD_SIZE is 'four'"),
    ],
)
def test_an_environment_that_is_half_torchruns_is_one_line(
    told, said, script, is_one_line, monkeypatch
):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "4", **told}.items():
        monkeypatch.setenv(name, value)
    assert is_one_line(script("train"), said, "start with torchrun, or unset WORLD_SIZE")


def test_an_environment_of_one_process_is_no_matter(script, is_one_line, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert is_one_line(script("eval", "--run", "none"), "none")


def test_what_is_sent_is_contiguous_as_nccl_wants_it(monkeypatch):
    """Gloo, which is all that a CPU has, takes any."""
    learned = torch.nn.Parameter(torch.zeros(2, 3).T)
    first = torch.arange(6.0).reshape(3, 2)  # what rank 0 has

    def broadcast(tensor, source):
        assert tensor.is_contiguous()
        assert source == 0
        tensor.copy_(first)

    monkeypatch.setattr(ranks.dist, "broadcast", broadcast)
    ranks.agree([learned])
    assert torch.equal(learned, first)


def test_a_script_for_one_process_says_so(torchrun, tmp_path):
    with torchrun(2, "export.py", "--run", tmp_path, "--format", "openai", tmp_path) as processes:
        _, err = processes.communicate(timeout=300)
    assert processes.returncode != 0
    assert "export.py: error: is for one process; start it without torchrun" in err
