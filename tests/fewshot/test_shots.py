"""A published draw is found by the ends of its paths, and is exactly what is learned from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clip_min import UserError
from fewshot import datasets, shots
from fewshot.task import draw


@pytest.fixture
def data(tmp_path, noise):
    """Three classes of 6 training pictures, whose files are called alike, and a test picture."""
    for k, name in enumerate(("rose", "tiger_lily", "iris")):
        for i in range(7):
            part = "train" if i < 6 else "test"
            noise(tmp_path / f"data/{part}/{name}/{i}.png", 7 * k + i, (8, 8))
    return datasets.load("folder", tmp_path / "data", 1)


@pytest.fixture
def write(tmp_path):
    def lines(*rows: tuple) -> Path:
        file = tmp_path / "draw.jsonl"
        file.write_text("".join(json.dumps({"path": p, "label": k}) + "\n" for p, k in rows))
        return file

    return lines


DRAW = [("/elsewhere/train/rose/4.png", "rose"), ("rose/1.png", 1), ("x/iris/0.png", 0)]
DRAW += [("iris/5.png", "iris"), ("train/tiger_lily/2.png", "tiger_lily")]
FILES = ["rose/4.png", "rose/1.png", "iris/0.png", "iris/5.png", "tiger_lily/2.png"]


def below(part) -> list[str]:
    return [str(Path(*file.parts[-2:])) for file in part.source]


def test_pictures_are_those_of_the_file_in_its_order(data, write):
    assert data.classnames == ["iris", "rose", "tiger lily"]
    fixed = shots.fix(data, write(*DRAW), 1)
    assert below(fixed.train) == FILES
    assert fixed.train.labels.tolist() == [1, 1, 0, 0, 2]
    train, val, notes = draw(fixed, [0, 1, 2], "all", 1)
    assert (sorted(below(train)), notes) == (sorted(FILES), [])
    assert below(val) == below(fixed.val)
    # S is 2, the most that a class has: 2 of each class, of those that the file leaves
    assert fixed.val.labels.bincount().tolist() == [2, 2, 2]
    assert {*below(fixed.val)}.isdisjoint(FILES)
    assert below(shots.fix(data, write(*DRAW), 2).val) != below(fixed.val)


def test_validation_is_the_data_sets_or_drawn_from_it_by_coops_rule(data, write):
    data = replace(data, val=data.train)
    assert shots.fix(data, write(*DRAW), 1).val is data.val
    few = shots.fix(replace(data, split="coop"), write(*DRAW), 1).val
    assert few.labels.bincount().tolist() == [2, 2, 2]


def test_a_file_of_all_pictures_leaves_none_for_validation(data, write):
    every = [(f"{p.parent.name}/{p.name}", p.parent.name) for p in data.train.source]
    fixed = shots.fix(data, write(*every), 1)
    with pytest.raises(UserError, match="no image is left for validation"):
        draw(fixed, [0, 1, 2], "all", 1)


def test_base_classes_alone_may_be_listed(data, write):
    fixed = shots.fix(data, write(*DRAW[:4]), 1)
    train, _, _ = draw(fixed, [0, 1], "all", 1)
    assert sorted(below(train)) == sorted(FILES[:4])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "is not a file, or is empty"),
        ([("rose/9.png", 1)], "line 1: no training picture is rose/9.png"),
        ([("rose/6.png", 1)], "no training picture is"),  # it is a test picture
        ([("1.png", 1)], "line 1: 3 training pictures end like 1.png"),
        ([("rose/1.png", 2)], r"is of class 2, but the data set says 1 \(rose\)"),
        ([("rose/1.png", "irsi")], "class irsi: unknown; did you mean iris"),
        ([DRAW[1], DRAW[2], ("train/rose/1.png", 1)], "line 3: .* listed already, in line 1"),
        ([("rose/1.png", 1.5)], "label is 1.5"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(data, write, rows, said):
    with pytest.raises(UserError, match=said) as error:
        shots.fix(data, write(*rows), 1)
    assert "\n" not in str(error.value)


def test_pictures_that_are_no_files_cannot_be_listed(numbered, write):
    made = numbered([0, 1])
    data = datasets.Dataset(["a", "b"], "a {}", made, made, made)
    with pytest.raises(UserError, match="no training picture is 0.png"):
        shots.fix(data, write(("0.png", 0)), 1)
    assert torch.is_tensor(data.train.source)
