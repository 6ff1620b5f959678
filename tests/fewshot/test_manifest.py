"""CSV manifests and files of class names, read as the csv and json modules read them."""

import csv
import json
import random
from pathlib import Path

import pytest

from clip_min import UserError
from fewshot import datasets

LABELS = ["tiger-lily", "rose", "blue_bell"]


@pytest.fixture
def root(tmp_path, noise) -> Path:
    """photos/0.png … 17.png: three of each label in train, one in val, two in test."""
    folder = tmp_path / "mine"
    for i in range(18):
        noise(folder / f"photos/{i}.png", i, (8, 8))
    rows = [(f"photos/{i}.png", LABELS[i % 3]) for i in range(18)]
    random.Random(0).shuffle(rows)  # the order of rows must mean nothing
    parts = {
        "train": [row for row in rows if number(row[0]) < 9],
        "val": [row for row in rows if 9 <= number(row[0]) < 12],
        "test": [row for row in rows if number(row[0]) >= 12],
    }
    for part, mine in parts.items():
        write(folder / f"{part}.csv", ["path", "label"], mine)
    return folder


def number(path: str) -> int:
    return int(Path(path).stem)


def write(file: Path, header: list[str], rows) -> None:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])


def by_hand(file: Path) -> set[tuple[str, str]]:
    """(file, label) of a manifest, by the csv module alone."""
    with file.open(newline="") as stream:
        return {(row["path"], row["label"]) for row in csv.DictReader(stream)}


def load(root: Path, seed: int = 1) -> datasets.Dataset:
    return datasets.load("folder", root, seed)


def test_without_a_test_part_val_is_tested_on(root):
    whole = load(root)
    (root / "test.csv").unlink()
    data = load(root)
    assert listed(data, data.test, root) == listed(whole, whole.val, root)
    assert data.val is None
    assert any("there is no test" in note for note in data.notes)


def listed(data, part, root) -> list[tuple[str, str]]:
    """(file, class name) in the order they were read."""
    names = [data.classnames[k] for k in part.labels.tolist()]
    return [(str(f.relative_to(root)), n) for f, n in zip(part.source, names, strict=True)]


def spoken(label: str) -> str:
    return label.replace("-", " ").replace("_", " ")


def test_every_part_has_the_rows_of_its_file(root):
    data = load(root)
    assert data.classnames == ["blue bell", "rose", "tiger lily"]
    for part in ("train", "val", "test"):
        expected = {(path, spoken(label)) for path, label in by_hand(root / f"{part}.csv")}
        found = listed(data, getattr(data, part), root)
        assert set(found) == expected
        assert len(found) == len(expected)
        assert found == sorted(found, key=lambda row: (data.classnames.index(row[1]), row[0]))


def test_val_may_be_left_out(root):
    (root / "val.csv").unlink()
    assert load(root).val is None


def test_one_file_with_a_split_column_says_the_same(root):
    separate = load(root)
    rows = [
        (label, "ignored", part, path)
        for part in ("test", "train", "val")
        for path, label in by_hand(root / f"{part}.csv")
    ]
    for part in ("train", "val", "test"):
        (root / f"{part}.csv").unlink()
    write(root / "data.csv", ["label", "photographer", "split", "path"], rows)
    whole = load(root)
    assert whole.classnames == separate.classnames
    for part in ("train", "val", "test"):
        assert getattr(whole, part).source == getattr(separate, part).source
        assert getattr(whole, part).labels.tolist() == getattr(separate, part).labels.tolist()


def test_a_manifest_as_a_spreadsheet_saves_it(root):
    """A byte-order mark, line ends of Windows, quotes, spaces after commas, a comma in a name."""
    (root / "photos/0.png").rename(root / "photos/0, the first.png")
    text = (root / "train.csv").read_text().replace("photos/0.png", '"photos/0, the first.png"')
    text = "\ufeff" + "\r\n".join(line.replace(",rose", ", rose") for line in text.splitlines())
    (root / "train.csv").write_bytes(text.encode())
    found = dict(listed(load(root), load(root).train, root))
    assert found["photos/0, the first.png"] == "tiger lily"
    assert sorted(found.values()) == ["blue bell"] * 3 + ["rose"] * 3 + ["tiger lily"] * 3


# ------------------------------------------------------------------------ how the classes are named


@pytest.fixture
def numbered_root(root):
    """The same, with numbers for labels."""
    for part in ("train", "val", "test"):
        rows = [(path, LABELS.index(label)) for path, label in by_hand(root / f"{part}.csv")]
        write(root / f"{part}.csv", ["path", "label"], rows)
    return root


def test_numbers_are_lines_of_classes_txt_from_0(numbered_root):
    (numbered_root / "classes.txt").write_text("Tiger lily\n\nrose?\n  bluebell \n")
    data = load(numbered_root)
    assert data.classnames == ["Tiger lily", "rose?", "bluebell"]  # as written, in this order
    for file, name in listed(data, data.train, numbered_root):
        assert name == data.classnames[number(file) % 3]


def test_numbers_are_keys_of_classes_json_in_the_order_of_numbers(root):
    for part in ("train", "val", "test"):
        rows = [(path, 8 + LABELS.index(label)) for path, label in by_hand(root / f"{part}.csv")]
        write(root / f"{part}.csv", ["path", "label"], rows)
    mapping = {"10": "bluebell", "8": "tiger lily", "9": "rose"}
    (root / "classes.json").write_text(json.dumps(mapping))
    data = load(root)
    assert data.classnames == ["tiger lily", "rose", "bluebell"]
    for file, name in listed(data, data.test, root):
        assert name == mapping[str(8 + number(file) % 3)]


def test_labels_are_names_in_classes_txt_or_keys_in_classes_json(root):
    (root / "classes.txt").write_text("rose\ntiger lily\nblue_bell\n")
    assert load(root).classnames == ["rose", "tiger lily", "blue bell"]  # "_" is a space
    (root / "classes.txt").write_text("rose\ntiger-lily\nblue bell\n")
    assert load(root).classnames == ["rose", "tiger-lily", "blue bell"]  # and "-" stays
    (root / "classes.txt").unlink()
    names = {"tiger-lily": "a_lily 🌹", "blue_bell": "Hyacinthoides", "rose": "rose"}
    (root / "classes.json").write_text(json.dumps(names), encoding="utf-8")
    data = load(root)
    names["tiger-lily"] = "a lily 🌹"
    assert data.classnames == list(names.values())
    for file, name in listed(data, data.val, root):
        assert name == names[LABELS[number(file) % 3]]


def test_folders_take_their_names_from_the_same_files(tmp_path, noise):
    for i, part in enumerate(["train/n01", "train/n02", "test/n01", "test/n02"]):
        noise(tmp_path / part / "0.png", i, (8, 8))
    assert load(tmp_path).classnames == ["n01", "n02"]
    (tmp_path / "classes.json").write_text('{"n02": "tench", "n01": "goldfish"}')
    data = load(tmp_path)
    assert data.classnames == ["tench", "goldfish"]
    files = [str(file.relative_to(tmp_path)) for file in data.train.source]
    assert files == ["train/n02/0.png", "train/n01/0.png"]
    assert data.test.labels.tolist() == [0, 1]


# ---------------------------------------------------------------------------------- what is wrong


def replace(file: str, old: str, new: str):
    def spoil(root: Path) -> None:
        text = (root / file).read_text()
        assert old in text
        (root / file).write_text(text.replace(old, new, 1))

    return spoil


def text(file: str, content: str):
    return lambda root: (root / file).write_text(content)


def move_a_test_row_to_train(root: Path) -> None:
    row = (root / "test.csv").read_text().splitlines()[1]
    (root / "train.csv").open("a").write(row + "\n")


def repeat_a_row(root: Path) -> None:
    row = (root / "train.csv").read_text().splitlines()[1]
    (root / "train.csv").open("a").write(row + "\n")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (replace("train.csv", "path,label", "image,label"), "train.csv: has no column 'path'"),
        (replace("train.csv", "path,label", "path,class"), "train.csv: has no column 'label'"),
        (text("train.csv", ""), "should name path, label, but names none"),
        (text("train.csv", "path,label\n"), "train.csv: lists no pictures"),
        (
            lambda root: [(root / f"{p}.csv").unlink() for p in ("val", "test")],
            "test.csv: there is",
        ),
        (replace("test.csv", ",rose", ","), "test.csv, line "),
        (replace("test.csv", ",rose", ""), "its label is empty"),
        (replace("test.csv", ",rose", ",roze"), "test.csv (test): its classes are not those of"),
        (replace("train.csv", "photos/4.png", "photos/99.png"), "photos/99.png is not a file"),
        (replace("train.csv", ",rose", ",rose, red"), "has more cells than the 2 columns"),
        (replace("train.csv", "path,label", "path,label,label"), "has two columns 'label'"),
        (repeat_a_row, "list each picture once"),
        (move_a_test_row_to_train, "list each picture once"),
        (replace("train.csv", "rose", "blue-bell"), "are both the class 'blue bell'"),
        (text("data.csv", "path,label,split\n"), "both data.csv and train.csv"),
        (lambda root: (root / "train.csv").rename(root / "data.csv"), "both data.csv and val.csv"),
        (
            text("classes.json", '{"rose": "Lily", "tiger-lily": "lily", "blue_bell": "b"}'),
            "'Lily' and 'lily' are one class to CLIP",
        ),
        (replace("train.csv", "path", '"path'), "cannot be read as CSV"),
        (lambda root: (root / "train.csv").write_bytes(b"path,label\n\xff"), "as UTF-8 text"),
        (text("classes.txt", "rose\ntiger lily\n"), "'blue_bell' is not in classes.txt"),
        (text("classes.txt", "rose\nrose\ntiger lily\nblue bell\n"), "'rose' occurs twice"),
        (text("classes.txt", "a_b\nrose\na b\n"), "'a b' occurs twice"),
        (text("classes.txt", "rose\ntiger lily\nblue bell\nfern\n"), "fern in one only"),
        (text("classes.json", '{"rose": "a"'), "classes.json: cannot be read as JSON"),
        (text("classes.json", "[" * 3000), "nested too deeply"),
        (text("classes.json", '["rose"]'), "expected an object"),
        (text("classes.json", '{"rose": 1}'), "rose is 1, expected text"),
        (text("classes.json", '{"rose": "_"}'), "the name of 'rose' is empty"),
        (text("classes.json", '{"rose": "a", "rose": "b"}'), "'rose' occurs twice"),
        (text("classes.json", '{"roses": "r", "b": "b"}'), "is not in classes.txt or classes.json"),
        (text("classes.txt", "rose\n"), "names 1 classes; expected two or more"),
    ],
)
def test_what_is_wrong_is_one_line_that_says_where(root, spoil, said):
    spoil(root)
    with pytest.raises(UserError) as error:
        load(root)
    assert said in str(error.value)
    assert str(error.value).startswith(str(root))
    assert "\n" not in str(error.value)


def test_a_misspelled_label_is_told_the_nearest(root):
    (root / "classes.txt").write_text("rose\ntiger lily\nblue bell\n")
    replace("test.csv", ",rose", ",roze")(root)
    with pytest.raises(UserError, match="'roze' is not in classes.txt.*did you mean rose"):
        load(root)


def test_numbers_alone_are_no_names(numbered_root):
    with pytest.raises(UserError, match=r"CLIP reads names; list the names in .*classes\.txt"):
        load(numbered_root)


def test_several_missing_pictures_are_counted(root):
    for i in (2, 5, 14):
        (root / f"photos/{i}.png").unlink()
    with pytest.raises(UserError, match=r"is not a file \(and 2 more\)"):
        load(root)


def test_a_split_column_with_another_word_is_an_error(root):
    rows = [(path, label, "validation") for path, label in by_hand(root / "val.csv")]
    for part in ("train", "val", "test"):
        (root / f"{part}.csv").unlink()
    write(root / "data.csv", ["path", "label", "split"], rows)
    with pytest.raises(UserError, match="line 2: split is 'validation'; expected train, val or"):
        load(root)


def test_pictures_may_lie_anywhere_and_empty_cells_are_no_cells(root, tmp_path):
    (root / "photos/4.png").rename(tmp_path / "4.png")
    (root / "photos/7.png").rename(tmp_path / "7.png")
    replace("train.csv", "photos/4.png", "../4.png")(root)
    replace("train.csv", "photos/7.png", str(tmp_path / "7.png"))(root)
    replace("train.csv", ",rose", ",rose,,")(root)
    found = load(root).train.source
    assert {tmp_path / "4.png", tmp_path / "7.png"} < set(found)
    assert len(found) == 9


@pytest.mark.parametrize("parts", [["train"], ["val", "test"], ["test"]])
def test_train_without_test_is_no_tree_of_classes(tmp_path, noise, parts):
    for part in parts:
        for name in "ab":
            noise(tmp_path / part / name / "0.png", 1, (8, 8))
    with pytest.raises(UserError, match="alone; expected train/ and test/"):
        load(tmp_path)
