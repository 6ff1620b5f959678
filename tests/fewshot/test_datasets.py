"""What is read from disk, under which class names, and what is said of a folder that is wrong."""

import inspect
import os
import shutil
import urllib.error
from collections import Counter
from pathlib import Path

import pytest
import torch
import torchvision.datasets

from clip_min import UserError, tokenize
from fewshot import datasets, demo
from fewshot.pictures import ENDINGS


@pytest.fixture
def tree(tmp_path, noise):
    """{"train/rose": 3, ...} -> a folder with so many pictures in each."""
    made = iter(range(10_000))

    def make(counts: dict[str, int]) -> Path:
        for folder, count in counts.items():
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                noise(tmp_path / "data" / folder / f"{i:03d}.png", next(made), (8, 8))
        return tmp_path / "data"

    return make


def load(root, seed: int = 1) -> datasets.Dataset:
    return datasets.load("folder", root, seed)


def listed(part, root) -> list[tuple[str, int]]:
    """File below root, label."""
    files = [str(file.relative_to(root)) for file in part.source]
    return list(zip(files, part.labels.tolist(), strict=True))


def test_train_and_test_folders_are_the_parts_and_val_is_left_to_the_experiment(tree):
    root = tree({"train/b": 2, "train/a": 1, "test/a": 2, "test/b": 1})
    data = load(root)
    assert data.classnames == ["a", "b"]
    assert listed(data.train, root) == [
        ("train/a/000.png", 0),
        ("train/b/000.png", 1),
        ("train/b/001.png", 1),
    ]
    assert listed(data.test, root) == [
        ("test/a/000.png", 0),
        ("test/a/001.png", 0),
        ("test/b/000.png", 1),
    ]
    assert data.val is None
    assert data.template == "a photo of a {}."


def test_a_val_folder_is_the_validation_part(tree):
    root = tree({f"{part}/{name}": 1 for part in ("train", "val", "test") for name in "ab"})
    assert listed(load(root).val, root) == [("val/a/000.png", 0), ("val/b/000.png", 1)]


def test_one_tree_is_split_by_the_seed_class_by_class(tree):
    counts = {"a": 10, "b": 20, "c": 3, "d": 5}
    root = tree(counts)
    data = load(root)
    everything = Counter(listed(data.train, root))
    everything += Counter(listed(data.val, root)) + Counter(listed(data.test, root))
    assert set(everything.values()) == {1}  # every file in one part
    assert {file for file, _ in everything} == {
        f"{name}/{i:03d}.png" for name, n in counts.items() for i in range(n)
    }
    assert all(data.classnames[label] == Path(file).parts[0] for file, label in everything)
    shares = [Counter(part.labels.tolist()) for part in (data.train, data.val, data.test)]
    assert [[share[k] for share in shares] for k in range(4)] == [
        [5, 2, 3],
        [10, 4, 6],
        [1, 1, 1],
        [2, 1, 2],
    ]
    assert listed(load(root).test, root) == listed(data.test, root)
    assert set(listed(load(root, seed=2).test, root)) != set(listed(data.test, root))


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("blue-tit", "blue tit"),
        ("blue_tit", "blue tit"),
        ("blue__-tit_", "blue tit"),
        ("🌹", "🌹"),
        ("pink-yellow dahlia?", "pink yellow dahlia?"),
        ("a..b", "a..b"),
        ("{}", "{}"),
        ("Ünïcode", "Ünïcode"),
        ("x" * 240, "x" * 240),
    ],
)
def test_a_class_is_named_as_its_folder(tree, folder, name):
    root = tree({f"train/{folder}": 2, "train/zz": 2, f"test/{folder}": 1, "test/zz": 1})
    data = load(root)
    assert sorted(data.classnames) == sorted([name, "zz"])
    label = data.classnames.index(name)
    assert {Path(f).parts[1] for f, k in listed(data.train, root) if k == label} == {folder}


def test_test_folders_are_matched_by_class_name_not_by_order(tree):
    root = tree({"train/a-b": 1, "train/a_c": 1, "test/a_b": 1, "test/a-c": 1})
    data = load(root)
    assert data.classnames == ["a b", "a c"]
    assert listed(data.test, root) == [("test/a_b/000.png", 0), ("test/a-c/000.png", 1)]


def test_pictures_in_subfolders_count_and_other_or_hidden_files_do_not(tree, noise):
    root = tree({"train/a": 1, "train/b": 1, "test/a": 1, "test/b": 1, ".git/objects": 1})
    noise(root / "train/a/more/deep.PNG", 1)
    noise(root / "train/a/._000.png", 2)
    noise(root / "train/a/.ipynb_checkpoints/000-checkpoint.png", 4)
    (root / "train/a/notes.txt").write_text("not a picture")
    (root / "train/empty").mkdir()
    noise(root / "train/.hidden/000.png", 3)
    data = load(root)
    assert data.classnames == ["a", "b"]
    assert listed(data.train, root) == [
        ("train/a/000.png", 0),
        ("train/a/more/deep.PNG", 0),
        ("train/b/000.png", 1),
    ]


@pytest.mark.parametrize("ending", sorted(ENDINGS))
def test_every_ending_is_found_in_either_case(tree, ending):
    root = tree({"train/a": 0, "train/b": 1, "test/a": 1, "test/b": 1})
    for name in (f"x{ending}", f"y{ending.upper()}"):
        (root / "train/a" / name).write_bytes(b"")
    assert len(load(root).train) == 3


BOTH = {"train/a": 1, "train/b": 1, "test/a": 1, "test/b": 1}


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"train/a-b": 1, "train/a_b": 1, "test/a-b": 1}, "two folders are both the class 'a b'"),
        (BOTH | {"train/c": 1}, "test: its classes are not those of train/: c in one only"),
        (BOTH | {"test/c": 1}, "test: its classes are not those of train/: c in one only"),
        (BOTH | {"val/a": 1}, "val: its classes are not those of train/: b in one only"),
        (BOTH | {"train/b": 0}, "train: has only the class 'a'; expected two or more"),
        ({"train/a": 0, "test/a": 0}, "train: has no class folder with images"),
        ({"a": 5}, "has only the class 'a'; expected two or more folders"),
        ({}, "no class folder with images"),
        ({"a": 5, "b": 2}, "b: 2 images; a class needs 3 or more"),
        ({"a": 5, "A": 5, "b": 5}, "'A' and 'a' are one class to CLIP"),
        ({"Train/a": 1, "Train/b": 1}, "has Train/ alone; expected"),
        ({"train/a": 1, "train/b": 1, "holdout/a": 1}, "has train/ alone; expected"),
        ({"test/a": 5, "test/b": 5, "validation/a": 5}, "has test/, validation/ alone; expected"),
        ({"val/a": 1, "Valid/a": 1} | BOTH, "has both Valid/ and val/; keep one"),
    ],
)
def test_a_folder_that_cannot_be_learned_from_is_an_error_that_says_where_and_why(
    tree, tmp_path, counts, said
):
    (tmp_path / "data").mkdir()
    root = tree(counts)
    for folder, count in counts.items():
        if count == 0:
            shutil.rmtree(root / folder)
            (root / folder).mkdir()
    with pytest.raises(UserError) as error:
        load(root)
    assert str(error.value).startswith(str(root))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_one_class_may_be_called_as_a_part_is(tree):
    assert load(tree({"train": 3, "bus": 3, "tram": 3})).classnames == ["bus", "train", "tram"]


@pytest.mark.parametrize("kind", ["missing", "a file", "not given"])
def test_without_a_folder_of_pictures_the_flag_is_named(tmp_path, kind):
    root = None if kind == "not given" else tmp_path / "nowhere"
    if kind == "a file":
        root.write_text("")
    with pytest.raises(UserError, match="--data-root") as error:
        load(root)
    assert root is None or str(root) in str(error.value)


def test_an_unknown_data_set_is_an_error_with_the_nearest_name():
    with pytest.raises(UserError, match="--dataset flower102: unknown; did you mean flowers102"):
        datasets.load("flower102", None, 1)
    with pytest.raises(UserError, match="demo, folder, features, flowers102"):
        datasets.load("zzz", None, 1)


def test_the_demo_set_is_the_drawn_one_and_takes_no_folder(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        demo, "split", lambda name: asked.append(name) or (torch.zeros(1020), torch.zeros(1020))
    )
    data = datasets.load("demo", None, 1)
    assert asked == ["train", "val", "test"]
    assert data.classnames == demo.CLASSNAMES
    assert data.template == demo.TEMPLATE
    with pytest.raises(UserError, match="--data-root.*--dataset folder"):
        datasets.load("demo", tmp_path, 1)


class Flowers:
    """torchvision's Flowers102 without its files."""

    counts = {"train": 1020, "val": 1020, "test": 6149}
    classes = ["pink primrose", "pink-yellow dahlia?"] + [f"flower {k}" for k in range(100)]
    asked: list = []

    def __init__(self, root, split, download=False):
        self.asked.append((root, split, download))
        count = self.counts[split]
        self._image_files = [f"{root}/flowers-102/jpg/{split}_{i}.jpg" for i in range(count)]
        self._labels = [i % 102 for i in range(count)]


@pytest.fixture
def flowers(monkeypatch):
    """A stand-in whose class can be changed."""
    stand_in = type("Flowers102", (Flowers,), {"asked": []})
    monkeypatch.setattr(torchvision.datasets, "Flowers102", stand_in)
    return stand_in


def test_flowers102_is_torchvisions_split(flowers, tmp_path):
    data = datasets.load("flowers102", tmp_path, 1)
    assert flowers.asked == [(tmp_path, split, True) for split in ("train", "val", "test")]
    assert [len(part) for part in (data.train, data.val, data.test)] == [1020, 1020, 6149]
    assert data.train.source[7] == tmp_path / "flowers-102/jpg/train_7.jpg"
    assert data.train.labels[:103].tolist() == [*range(102), 0]
    assert data.classnames[1] == "pink-yellow dahlia?"  # as there, mark and all
    assert data.template == "a photo of a {}, a type of flower."


def test_what_is_read_of_torchvisions_flowers102_is_there():
    real = torchvision.datasets.Flowers102
    assert len(real.classes) == 102
    assert "pink-yellow dahlia?" in real.classes
    assert "_image_files" in inspect.getsource(real)
    assert "_labels" in inspect.getsource(real)


def test_an_incomplete_flowers102_is_an_error_with_its_counts(flowers, tmp_path):
    flowers.counts = Flowers.counts | {"test": 6000}
    with pytest.raises(UserError, match=r"\(1020, 1020, 6000\) images, expected"):
        datasets.load("flowers102", tmp_path, 1)


@pytest.mark.parametrize(
    "reason",
    [
        urllib.error.URLError("Name or service not known"),
        RuntimeError("File not found or corrupted."),
        OSError("No space left on device"),
    ],
)
def test_flowers102_that_cannot_be_had_is_one_line_that_says_what_to_do(
    flowers, tmp_path, monkeypatch, reason
):
    def fail(*arguments, **options):
        raise reason

    monkeypatch.setattr(flowers, "__init__", fail)
    with pytest.raises(UserError, match="--data-root") as error:
        datasets.load("flowers102", tmp_path, 1)
    assert str(reason) in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_real_photographs_are_found_in_all_parts(flowers12):
    data = load(flowers12)
    assert len(data.classnames) == 12
    for part in (data.train, data.test):
        assert set(part.labels.tolist()) == set(range(12))
        assert len(part) == sum(1 for _ in flowers12.glob(f"{part.source[0].parts[-3]}/*/*.jpg"))


def test_a_folder_whose_name_names_nothing_is_refused(tree):
    with pytest.raises(UserError, match="data/_: a folder's name is its class"):
        load(tree({"a": 3, "_": 3}))


@pytest.mark.parametrize("called", ["val", "valid", "Validation", "dev"])
def test_validation_is_called_as_others_call_it(tree, called):
    root = tree({"Train/a": 2, "Train/b": 2, f"{called}/a": 1, f"{called}/b": 1})
    data = load(root)
    assert [Path(file).parts[0] for file, _ in listed(data.test, root)] == [called] * 2
    assert data.val is None
    assert f"there is no test/: {called}/ is tested on, and some of Train/" in data.notes[0]
    data = load(tree({"TEST/a": 1, "TEST/b": 1}))
    assert [Path(file).parts[0] for file, _ in listed(data.test, root)] == ["TEST"] * 2
    assert [Path(file).parts[0] for file, _ in listed(data.val, root)] == [called] * 2
    assert data.notes == []


def test_classes_called_by_numbers_are_noted_with_the_way_to_name_them(tree):
    root = tree({f"{part}/{k}": 1 for part in ("train", "test") for k in range(3)})
    (note,) = load(root).notes
    assert note.startswith("the classes are called 0, 1, 2, but CLIP reads names; give their names")
    (root / "classes.txt").write_text("rose\ntulip\nlily\n")
    assert load(root).notes == []
    (root / "classes.txt").rename(root / "classes.json")
    (root / "classes.json").write_text('{"0": "rose", "1": "tulip", "2": "lily"}')
    assert (load(root).classnames, load(root).notes) == (["rose", "tulip", "lily"], [])


def test_what_is_left_out_is_named(tree, tmp_path, monkeypatch):
    root = tree(BOTH | {"train/c": 2, "test/c": 1, "train/d": 1, "labels": 2, "elsewhere": 2})
    for i, path in enumerate(sorted(root.glob("t*/c/*"))):
        path.rename(path.with_name(f"{i}.xyz"))  # a class of another format
    (root / "elsewhere").rename(tmp_path / "elsewhere")
    (root / "train/a/linked").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(root / "train/a/pipe.jpg")
    real = Path.iterdir

    def iterdir(path):
        if path.name == "d":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    data = load(root)
    assert data.classnames == ["a", "b"]
    assert sorted(data.notes) == [
        "left out 1 beside train/: labels",
        "left out 1 linked folders: train/a/linked",
        "left out 1 pipes and the like: train/a/pipe.jpg",
        "left out 1 unreadable folders (Permission denied): train/d",
        "left out 3 .xyz files: train/c/1.xyz, train/c/2.xyz, test/c/0.xyz",
        "left out 3 folders without a picture: train/c, train/d, test/c",
    ]


def test_phones_pictures_are_told_what_reads_them(tree):
    root = tree({"a": 3, "b": 3})
    (root / "a/IMG_1.HEIC").write_bytes(b"")
    monkey = [note for note in load(root).notes if "HEIC" in note]
    if ".heic" not in ENDINGS:
        assert "pip install pillow-heif" in monkey[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Rose", "rose"),
        ("caf\u00e9", "cafe\u0301"),  # NFC, NFD
        ("black & white", "black &amp; white"),
        ("lady's mantle", "lady\u2019s mantle"),
        ("rose", "\uff52\uff4f\uff53\uff45"),  # full width
        ("rose", "  rose"),
        ("tiger lily", "tiger\u00a0 lily"),
    ],
)
def test_names_that_are_one_to_clip_are_an_error(one, other):
    assert tokenize(f"a photo of a {one}.").equal(tokenize(f"a photo of a {other}."))
    with pytest.raises(UserError, match=r"here: .* are one class to CLIP"):
        datasets.check_names("here", ["tulip", one, other])


@pytest.mark.parametrize("name", ["", " ", "\u00a0 \n"])
def test_a_name_that_is_nothing_to_clip_is_an_error(name):
    with pytest.raises(UserError, match="is empty for CLIP"):
        datasets.check_names("here", ["tulip", name])
