"""The table that a run prints, and its curves."""

import pytest
import torch
from PIL import Image

from fewshot.tables import save_curves, table, uneven

BOTH = {"base": 71.333, "novel": 78.236, "hm": 74.624, "all": None}
BOTH["joint"] = {"base": 60.0, "novel": 70.0, "hm": 64.6149}
BASE_ONLY = {"base": 90.0, "novel": None, "hm": None, "all": None, "joint": None}
ALL = {"base": None, "novel": None, "hm": None, "all": 100.0, "joint": None}


def test_a_table_has_a_line_for_each_name_and_two_decimals():
    cells = [line.split() for line in table({"zero-shot": BOTH, "lora": BOTH}).splitlines()]
    assert cells == [
        ["base", "novel", "HM", "all", "names"],
        ["zero-shot", "71.33", "78.24", "74.62", "64.61"],
        ["lora", "71.33", "78.24", "74.62", "64.61"],
    ]


def test_a_number_that_does_not_exist_reads_na():
    cells = [line.split() for line in table({"zero-shot": BOTH, "probe": BASE_ONLY}).splitlines()]
    assert cells[2] == ["probe", "90.00", "n/a", "n/a", "n/a"]


def test_all_classes_are_one_column():
    cells = [line.split() for line in table({"zero-shot": ALL, "lora": ALL}).splitlines()]
    assert cells == [["all"], ["zero-shot", "100.00"], ["lora", "100.00"]]


@pytest.mark.parametrize("rows", [{"a": BOTH, "a long name": BASE_ONLY}, {"a": ALL}])
def test_columns_end_where_their_headings_end(rows):
    first, *lines = table(rows).splitlines()
    assert {len(line) for line in lines} == {len(first)}
    assert not any(line.endswith(" ") for line in lines)


def test_curves_are_a_picture_of_every_round(tmp_path):
    log = [{"step": n, "loss": 1 / n, "val": 10.0 * n, "seconds": n} for n in range(1, 6)]
    blank, full = tmp_path / "blank.png", tmp_path / "full.png"
    save_curves(log[:1], blank)
    save_curves(log, full)
    with Image.open(blank) as few, Image.open(full) as many:
        assert few.format == many.format == "PNG"
        assert few.tobytes() != many.tobytes()
    assert sorted(tmp_path.iterdir()) == [blank, full]  # no temporary file is left


def part(least: int, most: int, accuracy: float, f1: float) -> dict:
    return {"images_a_class": [least, most], "macro_accuracy": accuracy, "macro_f1": f1}


def test_classes_of_uneven_size_have_means_over_classes_too():
    scores = {"base": 90.0, "novel": 80.0, "hm": 84.7, "all": None, "joint": None}
    rows = {
        "zero-shot": {**scores, "parts": {"base": part(2, 9, 50, 40), "novel": part(4, 4, 30, 20)}},
        "probe": {**scores, "novel": None, "parts": {"base": part(2, 9, 60, 55)}},
    }
    lines = table(rows).splitlines()
    assert lines[3] == "test images per class: 2 to 9; means over classes, accuracy and F1:"
    assert lines[4].split() == ["base", "F1", "novel", "F1"]
    assert lines[5].split() == ["zero-shot", "50.00", "40.00", "30.00", "20.00"]
    assert lines[6].split() == ["probe", "60.00", "55.00", "n/a", "n/a"]
    even = {"lora": {**scores, "parts": {"base": part(4, 5, 60, 55), "novel": part(4, 4, 1, 1)}}}
    assert len(table(even).splitlines()) == 2


def test_training_images_of_uneven_classes_are_told():
    names = ["rose", "tulip", "lily"]
    line = uneven(torch.tensor([7, 3, 20]), names)
    assert line.startswith("training images per class: 3 (tulip) to 20 (lily); ")
    assert "--balance" in line
    line = uneven(torch.tensor([0, 3, 0]), names)
    assert line == "note: no training image of 2 classes: rose, lily"
