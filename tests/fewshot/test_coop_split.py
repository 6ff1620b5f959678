"""CoOp's splits are read as they are, and shots drawn as a second writing of Dassl's rule does."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from clip_min import UserError
from fewshot import coop_split, datasets
from fewshot.pictures import Reader
from fewshot.task import make_task

NAMES = ["rose", "tiger lily", "blue bell", "daisy", "iris"]
WRITTEN = ["rose", "tiger_lily", "blue_bell", "daisy", "iris"]  # in the file


@pytest.fixture
def split() -> dict:
    """Five classes, named first in an order of their own; 12, 12, 12, 12 and 3 train pictures."""
    entries = [[f"img/{k}_{i:02d}.png", k, WRITTEN[k]] for k in range(5) for i in range(20)]
    random.Random(3).shuffle(entries)
    made = {"train": [], "val": [], "test": []}
    for entry in entries:
        number = int(entry[0][-6:-4])
        most = 3 if entry[1] == 4 else 12
        part = "train" if number < most else "val" if number < most + 3 else "test"
        made[part].append(entry)
    return made


@pytest.fixture
def root(tmp_path, split, noise) -> Path:
    """The split, and its pictures in a folder that it does not name."""
    folder = tmp_path / "mine"
    for i, (path, *_) in enumerate(entry for part in split.values() for entry in part):
        noise(folder / "deep/jpg" / path, i, (16, 16))
    (folder / "split_zhou_Mine.json").write_text(json.dumps(split))
    return folder


def load(root, name: str = "folder", file: Path | None = None):
    return datasets.load(name, root, 1, "coop", file)


def test_the_split_is_read_as_it_is(root, split):
    data = load(root)
    assert data.classnames == NAMES
    for part, entries in split.items():
        pictures = getattr(data, part)
        assert pictures.source == [root / "deep/jpg" / path for path, *_ in entries]
        assert pictures.labels.tolist() == [label for _, label, _ in entries]


def test_the_file_may_lie_elsewhere(root, tmp_path):
    file = (root / "split_zhou_Mine.json").rename(tmp_path / "other.json")
    assert load(root, file=file).classnames == NAMES


def test_pictures_behind_a_link_are_found_and_a_link_back_does_no_harm(root, tmp_path, split):
    (root / "deep").rename(tmp_path / "elsewhere")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(root)
    assert load(root).train.source[0] == root / "linked/jpg" / split["train"][0][0]


class Datum:
    def __init__(self, path, label, classname):
        self.path, self.label, self.classname = path, label, classname


def dassl(split: dict, shots: int, seed: int) -> tuple[list[Datum], list[Datum]]:
    """The rule written again, on objects and with the global generator, as Dassl holds them."""
    before = random.getstate()
    random.seed(seed)
    drawn = []
    for part, count in (("train", shots), ("val", min(shots, 4))):
        by_label: dict[int, list[Datum]] = {}
        for entry in split[part]:
            by_label.setdefault(entry[1], []).append(Datum(*entry))
        chosen = []
        for items in by_label.values():
            chosen.extend(items if len(items) < count else random.sample(items, count))
        drawn.append(chosen)
    random.setstate(before)
    return drawn[0], drawn[1]


@pytest.mark.parametrize("classes", ["all", "base-novel"])
@pytest.mark.parametrize(("shots", "seed"), [(1, 1), (2, 1), (2, 3), (8, 2), (12, 1), (16, 1)])
def test_shots_are_those_of_the_rule_written_again(root, split, shots, seed, classes):
    task = make_task(load(root), shots, seed, classes, Reader(4, folder=None))
    keep = range(5 if classes == "all" else 3)
    for batches, drawn in zip((task.train, task.val), dassl(split, shots, seed), strict=True):
        kept = [item for item in drawn if item.label in keep]
        assert [str(f.relative_to(root / "deep/jpg")) for f in batches.pictures.source] == [
            item.path for item in kept
        ]
        assert batches.labels.tolist() == [item.label for item in kept]
    most = [12, 12, 12, 12, 3]
    assert Counter(task.train.labels.tolist()) == {k: min(shots, most[k]) for k in keep}
    assert Counter(task.val.labels.tolist()) == dict.fromkeys(keep, min(shots, 3))  # all there are


def test_a_class_that_is_short_is_taken_once_in_the_files_order_and_a_note_says_so(root, split):
    task = make_task(load(root), 8, 1, "all", Reader(4, folder=None))
    assert task.notes == ["fewer than 8 training images in 1 classes: iris 3"]
    files = [
        file
        for file, k in zip(task.train.pictures.source, task.train.labels, strict=True)
        if k == 4
    ]
    listed = [path for path, label, _ in split["train"] if label == 4]
    assert [str(file.relative_to(root / "deep/jpg")) for file in files] == listed


def test_the_test_pictures_are_all_of_the_split(root, split):
    task = make_task(load(root), 2, 1, "base-novel", Reader(4, folder=None))
    base = [entry for entry in split["test"] if entry[1] < 3]
    assert len(task.tests["base"].batches) == len(base)
    assert len(task.tests["novel"].batches) == len(split["test"]) - len(base)
    assert task.tests["novel"].classnames == ["daisy", "iris"]


def test_flowers102_and_eurosat_have_splits_whose_counts_are_checked(root, monkeypatch):
    (root / "split_zhou_Mine.json").rename(root / "split_zhou_EuroSAT.json")
    with pytest.raises(UserError, match=r"expected \(13500, 5400, 8100\)"):
        load(root, "eurosat")
    entry = datasets.DATASETS["eurosat"]
    small = {"coop_images": (51, 15, 34), "classes": 5}
    monkeypatch.setitem(datasets.DATASETS, "eurosat", type(entry)(**vars(entry) | small))
    data = load(root, "eurosat")
    assert data.template == "a centered satellite photo of {}."
    assert data.classnames == NAMES
    with pytest.raises(UserError, match=r"no split_zhou_OxfordFlowers\.json; .*--split-file"):
        load(root, "flowers102")


@pytest.mark.parametrize("name", ["demo", "cifar100", "hymenoptera"])
def test_a_data_set_without_such_a_split_is_an_error(name, tmp_path):
    with pytest.raises(UserError, match=f"none for {name}; it has for folder, flowers102, eurosat"):
        load(tmp_path, name)


def change(part: str, position: int, value):
    def spoil(split: dict) -> str:
        split[part][0][position] = value
        return json.dumps(split)

    return spoil


def without(part: str):
    return lambda split: json.dumps({key: split[key] for key in split if key != part})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda split: json.dumps(split)[:100], "cannot be read as JSON"),
        (lambda split: "", "cannot be read as JSON"),
        (lambda split: 3_000 * "[", "cannot be read as JSON"),
        (lambda split: "[]", 'expected {"train"'),
        (without("train"), 'expected {"train"'),
        (without("test"), 'expected {"train"'),
        (lambda split: json.dumps(split | {"train": []}), 'expected {"train"'),
        (lambda split: json.dumps(split | {"train": [["a.png", 0]]}), 'expected {"train"'),
        (lambda split: json.dumps(split | {"val": [["a.png", 0]]}), 'expected {"train"'),
        (lambda split: json.dumps(split).replace("rose", "iris"), "two labels have one class name"),
        (change("train", 1, "0"), 'expected {"train"'),
        (change("train", 2, "thistle"), "elsewhere"),
        (change("train", 1, 9), "expected 0 to K - 1, all of them"),
        (change("train", 0, "img/nothing.png"), "was not found below"),
        (change("test", 0, "img/nothing.png"), "nothing.png is not a file"),
        (change("test", 0, "../0.png"), "../0.png: expected paths below a folder of images"),
        (change("test", 0, "/etc/hostname"), "/etc/hostname: expected paths below a folder"),
        (
            lambda split: json.dumps(split | {"test": split["test"] + split["train"][:1]}),
            "list each picture once",
        ),
    ],
)
def test_a_split_that_is_wrong_is_one_line(root, split, spoil, said):
    file = root / "split_zhou_Mine.json"
    file.write_text(spoil(split))
    with pytest.raises(UserError) as error:
        load(root)
    assert said in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_class_name_is_an_error(root, split):
    text = json.dumps(split).replace('"rose"', '" "')
    (root / "split_zhou_Mine.json").write_text(text)
    with pytest.raises(UserError, match=f"{root}: the class name '' is empty for CLIP"):
        load(root)


def test_a_class_that_only_the_test_has_is_named_in_a_note(root, split):
    split["train"] = [entry for entry in split["train"] if entry[1] != 1]
    (root / "split_zhou_Mine.json").write_text(json.dumps(split))
    notes = make_task(load(root), 2, 1, "all", Reader(4, folder=None)).notes
    assert notes[0] == "1 classes have no training image, and are tested on: tiger lily"


def test_all_shots_are_all_of_the_split(root, split):
    task = make_task(load(root), "all", 1, "all", Reader(4, folder=None))
    for batches, part in ((task.train, "train"), (task.val, "val")):
        files = {str(file.relative_to(root / "deep/jpg")) for file in batches.pictures.source}
        assert len(batches) == len(split[part])
        assert files == {path for path, *_ in split[part]}


def test_a_split_without_validation_gives_it_from_its_training_part(root, split):
    (root / "split_zhou_Mine.json").write_text(without("val")(split))
    data = load(root)
    assert data.val is None
    task = make_task(data, 2, 1, "all", Reader(4, folder=None))
    assert [len(task.train), len(task.val)] == [10, 9]  # the last class has 3
    everything = [part.pictures.source for part in (task.train, task.val)]
    assert {*everything[0]}.isdisjoint(everything[1])
    with pytest.raises(UserError, match="none is left for validation; lower --shots"):
        make_task(data, 12, 1, "all", Reader(4, folder=None))


def test_without_validation_pictures_they_are_drawn_from_what_training_leaves(numbered):
    train = numbered([0, 1, 2] * 6)
    for shots in (1, 4):
        chosen, few = coop_split.draw(train, None, shots, 1)
        assert chosen.tolist() == coop_split.draw(train, train, shots, 1)[0].tolist()
        assert train.labels[few].bincount().tolist() == [min(shots, 2)] * 3
        assert {*chosen.tolist()}.isdisjoint(few.tolist())


def test_two_splits_or_none_are_an_error_that_names_the_flag(root):
    (root / "split_zhou_Other.json").write_text("{}")
    with pytest.raises(UserError, match="has 2 files.*--split-file"):
        load(root)
    for file in root.glob("*.json"):
        file.unlink()
    with pytest.raises(UserError, match="has no split_zhou.*--split-file"):
        load(root)


def test_a_split_file_needs_split_coop(root):
    with pytest.raises(UserError, match="works only with --split coop"):
        datasets.load("folder", root, 1, "official", root / "split_zhou_Mine.json")
