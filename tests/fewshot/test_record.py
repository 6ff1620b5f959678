"""A run is tested again on what it was tested on, and never on what it has learned from."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clip_min import UserError
from fewshot import datasets
from fewshot.folder import SPLIT
from fewshot.pictures import Reader
from fewshot.record import kept, summary
from fewshot.task import make_task, make_test


@pytest.fixture
def root(tmp_path, noise) -> Path:
    """One tree: three classes of 20."""
    for k, name in enumerate(["iris", "lily", "rose"]):
        for i in range(20):
            noise(tmp_path / f"flowers/{name}/{i:02d}.png", 100 * k + i, (16, 16))
    return tmp_path / "flowers"


def trained(root: Path, classes: str = "all", seed: int = 1):
    data = datasets.load("folder", root, seed)
    return make_task(data, 4, seed, classes, Reader(16, folder=None))


def retest(root: Path, record, seed: int = 1, again: bool = True, classes: str = "all"):
    data = datasets.load("folder", root, seed)
    return make_test(data, Reader(16, folder=None), classes, None, record, again)


def hashes(files) -> list[str]:
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def files(batches) -> list[Path]:
    return batches.pictures.source


def test_a_record_names_every_picture_its_class_and_its_hash(root):
    task = trained(root)
    record = task.record(str(root))
    parts = {"train": task.train, "val": task.val, "test": task.tests["all"].batches}
    for part, batches in parts.items():
        assert [root / file for file, _, _ in record[part]] == files(batches)
        assert all(Path(file).parts[0] == name for file, name, _ in record[part])
        assert [made for *_, made in record[part]] == hashes(files(batches))
    assert json.loads(json.dumps(record)) == record


def test_a_summary_changes_with_pictures_classes_and_order_and_not_with_places(root, tmp_path):
    record = trained(root).record(str(root))
    first, *others = record["val"]
    for changed in ([*others, first], others, [[first[0], "tulip", first[2]], *others]):
        assert summary(record | {"val": changed})["val"] != summary(record)["val"]
        assert summary(record | {"val": changed})["test"] == summary(record)["test"]
    moved = root.rename(tmp_path / "moved")
    assert summary(trained(moved).record("")) == summary(record)


@pytest.mark.parametrize("removed", [0, 6])
def test_after_pictures_have_come_a_run_is_tested_on_what_it_was_tested_on(root, noise, removed):
    task = trained(root)
    before = files(task.tests["all"].batches)
    record = task.record(str(root))
    for i in range(7):
        noise(root / f"lily/new{i}.png", 500 + i, (16, 16))
    assert set(files(trained(root).tests["all"].batches)) != set(before)  # the split is another
    for file in before[:removed]:
        file.unlink()
    again = retest(root, record)
    assert files(again.tests["all"].batches) == before[removed:]
    assert again.tests["all"].batches.labels.tolist() == [
        ["iris", "lily", "rose"].index(file.parent.name) for file in before[removed:]
    ]
    gone = f"{removed} of the run's 18 test images are gone or changed"
    assert (gone in again.notes) == bool(removed)


@pytest.fixture
def five(root):
    """The same pictures with two classes more, so that each half has two or more."""
    (root / "rose").rename(root / "Rosa")
    for name in ("aster", "zinnia"):
        (root / name).mkdir()
        for file in (root / "iris").iterdir():
            (root / name / file.name).write_bytes(file.read_bytes() + name.encode())
    return root


def test_halves_are_tested_again_too(five):
    task = trained(five, "base-novel")
    again = retest(five, task.record(""), seed=5, classes="base-novel")
    assert again.classnames == task.classnames
    for part, test in task.tests.items():
        assert again.tests[part].classnames == test.classnames
        assert files(again.tests[part].batches) == files(test.batches)
        assert again.tests[part].batches.labels.tolist() == test.batches.labels.tolist()


def test_a_half_without_its_test_images_is_one_line(five):
    task = trained(five, "base-novel")
    for file in files(task.tests["novel"].batches):
        file.write_bytes(file.read_bytes() + b"changed")
    with pytest.raises(UserError, match="no test images of the 2 novel classes .* are left"):
        retest(five, task.record(""), seed=5, classes="base-novel")


def test_a_picture_that_has_changed_its_class_is_not_the_one_it_was(root):
    record = trained(root).record(str(root))
    file = root / record["test"][0][0]
    file.rename(root / "rose/moved.png")
    again = retest(root, record)
    assert len(again.tests["all"].batches) == 17
    assert "1 of the run's 18 test images are gone or changed" in again.notes


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_on_another_split_of_the_same_pictures_those_it_has_seen_are_left_out(root, seed):
    task = trained(root, seed=3)
    seen = {*files(task.train), *files(task.val)}
    there = datasets.load("folder", root, seed).test.source
    again = retest(root, task.record(str(root)), seed, again=False)
    expected = [file for file in there if file not in seen]
    assert files(again.tests["all"].batches) == expected
    out = len(there) - len(expected)
    assert (out > 0) == (seed != 3)
    said = (
        f"{out} of 18 test images are left out: they are training or validation images of the run"
    )
    assert again.notes == [SPLIT, *([said] if out else [])]  # others than its own: says which


def test_where_nothing_else_is_left_it_is_an_error(root):
    task = trained(root)
    record = task.record("")
    record["train"] += record["test"]
    with pytest.raises(UserError, match="all 18 test images are training or validation images"):
        retest(root, record, again=False)


def test_pictures_in_memory_have_a_record_too(numbered):
    labels = [0, 0, 1, 1]
    parts = [numbered(labels, first) for first in (0, 10, 20)]
    data = datasets.Dataset(["a", "b"], "a {}", *parts)
    record = make_task(data, 2, 1, "all", Reader(4, folder=None)).record("")
    assert len({made for part in record.values() for *_, made in part}) == 12
    swapped = replace(data, train=data.test, test=data.train)
    again = make_test(swapped, Reader(4, folder=None), "all", None, record, True)
    assert torch.equal(again.tests["all"].batches.pixels, data.test.source)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: record | {"train": []},
        lambda record: record | {"train": {}},
        lambda record: {"test": record["test"]},
        lambda record: record | {"val": [[1, 2]]},
        lambda record: record | {"val": record["test"]},
        lambda record: [],
        lambda record: "",
    ],
)
def test_a_record_that_is_not_the_runs_own_is_one_line(root, tmp_path, spoil):
    record = trained(root).record(str(root))
    (tmp_path / "data.json").write_text(json.dumps(record))
    config = {"data": summary(record)}
    assert kept(tmp_path, config) == record
    assert kept(tmp_path, {}) is None  # a run of an earlier version
    (tmp_path / "data.json").write_text(json.dumps(spoil(record)))
    with pytest.raises(UserError, match="data.json: "):
        kept(tmp_path, config)
