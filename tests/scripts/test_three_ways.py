"""Real photographs as folders, as a CSV and as a CoOp split: tables that agree where they must."""

import csv
import json
from pathlib import Path

import pytest

from fewshot import datasets
from fewshot.pictures import Reader
from fewshot.task import make_task

SHOTS = 4


@pytest.fixture(scope="module")
def roots(flowers12, tmp_path_factory) -> dict[str, Path]:
    """Three data roots of the same files, linked to and not copied."""
    made = {way: tmp_path_factory.mktemp(way) / "flowers" for way in ("folder", "csv", "coop")}
    classes = sorted(folder.name for folder in (flowers12 / "train").iterdir())
    for way, root in made.items():
        root.mkdir()
        if way == "folder":
            for part in ("train", "test"):
                (root / part).symlink_to(flowers12 / part)
        else:
            (root / "photos").symlink_to(flowers12)

    for part in ("train", "test"):
        with (made["csv"] / f"{part}.csv").open("w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(["label", "path"])
            for file in sorted(flowers12.glob(f"{part}/*/*.jpg"), key=lambda file: file.name):
                rows.writerow([file.parent.name, f"photos/{file.relative_to(flowers12)}"])

    # In CoOp's split, train and val are the very pictures that the others draw: so all are drawn.
    data = datasets.load("folder", made["folder"], 1)
    task = make_task(data, SHOTS, 1, "all", Reader(64, folder=None))
    parts = {"train": task.train.pictures, "val": task.val.pictures, "test": data.test}
    split = {
        part: [
            ["/".join(file.parts[-3:]), label, classes[label].replace("-", " ")]
            for file, label in zip(pictures.source, pictures.labels.tolist(), strict=True)
        ]
        for part, pictures in parts.items()
    }
    (made["coop"] / "split_zhou_Flowers12.json").write_text(json.dumps(split))
    return made


@pytest.fixture(scope="module")
def tables(script, roots, tmp_path_factory) -> dict[str, tuple[Path, list[str]]]:
    """Way -> the run's folder, and the table it printed."""
    found = {}
    for way, root in roots.items():
        out = tmp_path_factory.mktemp("runs")
        which = ("--dataset", "folder", "--data-root", root, "--model", "demo", "--out", out)
        short = ("--method", "lora", "--epochs", 15, "--patience", 0, "--lr", 0.005)
        short += ("--shots", SHOTS)
        short += ("--keep", "last")  # the folders validate on more pictures than CoOp's rule draws
        whole = ("--batch-size", 1000, "--dropout", 0)  # one batch: order does not matter
        split = ("--split", "coop") if way == "coop" else ()
        result = script("train", *which, *short, *whole, *split, "--classes", "all")
        assert result.code == 0, result.err
        val = 48 if way == "coop" else 192
        assert f"12 classes to learn from 48 images ({val} for validation)" in result.out
        (run,) = out.glob("*/demo/lora-s4-seed1")
        found[way] = run, result.out.splitlines()[-6:-3]
    return found


def test_three_ways_give_one_table(tables):
    table = tables["folder"][1]
    assert table[0].split() == ["all"]
    assert [line.split()[0] for line in table[1:]] == ["zero-shot", "lora"]
    assert float(table[2].split()[1]) > float(table[1].split()[1]) + 5  # it has learned
    assert tables["csv"][1] == table
    assert tables["coop"][1] == table


def test_a_csv_is_the_folder_to_the_byte(tables):
    runs = [tables[way][0] / "adapter.safetensors" for way in ("folder", "csv")]
    assert runs[0].read_bytes() == runs[1].read_bytes()


def test_a_coop_split_is_named_in_the_runs_folder(tables):
    assert tables["folder"][0].parts[-3:] == ("flowers-all", "demo", "lora-s4-seed1")
    assert tables["coop"][0].parts[-3:] == ("flowers-coop-all", "demo", "lora-s4-seed1")


@pytest.mark.parametrize("way", ["csv", "coop"])
def test_eval_prints_the_table_again(way, script, tables):
    run, table = tables[way]
    result = script("eval", "--run", run)
    assert result.code == 0, result.err
    assert result.out.splitlines()[-3:] == table
