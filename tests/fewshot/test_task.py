"""The protocol: which classes and pictures are learned from, and which are tested."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from clip_min import UserError
from fewshot import pictures
from fewshot.datasets import Dataset
from fewshot.pictures import Pictures, Reader
from fewshot.task import make_task


@pytest.fixture
def dataset(numbered):
    """(classes, train, val, test) -> so many pictures a class, all numbered differently."""

    def make(classes: int, train: int | list[int] = 10, val: int = 3, test: int = 5) -> Dataset:
        each = [train] * classes if isinstance(train, int) else train
        labels = [k for k, n in enumerate(each) for _ in range(n)]
        return Dataset(
            [f"class {k}" for k in range(classes)],
            "a {}",
            numbered(labels),
            numbered([k for k in range(classes) for _ in range(val)], 10_000) if val else None,
            numbered([k for k in range(classes) for _ in range(test)], 20_000),
        )

    return make


def task_of(dataset, shots=3, seed=1, classes="base-novel"):
    return make_task(dataset, shots, seed, classes, Reader(4))


@pytest.mark.parametrize(("count", "base"), [(4, 2), (5, 3), (6, 3), (7, 4), (102, 51)])
def test_base_is_the_first_half_and_the_larger_one(dataset, numbers, count, base):
    data = dataset(count)
    task = task_of(data)
    names = data.classnames
    assert task.classnames == task.tests["base"].classnames == names[:base]
    assert task.tests["novel"].classnames == names[base:]
    shown = numbers(data.test.source)
    for part, first, last in (("base", 0, base), ("novel", base, count)):
        test = task.tests[part].batches
        belong = [(n, k) for n, k in zip(shown, data.test.labels.tolist(), strict=True)]
        expected = [(n, k - first) for n, k in belong if first <= k < last]  # labels from 0
        assert list(zip(numbers(test.pixels), test.labels.tolist(), strict=True)) == expected


@pytest.mark.parametrize(
    ("count", "base", "said"),
    [
        (2, None, "the base half has a single class, 'class 0'"),
        (3, None, "the novel half has a single class, 'class 2'"),
        (5, [3], "the base half has a single class, 'class 3'"),
        (5, [0, 1, 2, 4], "the novel half has a single class, 'class 3'"),
    ],
)
def test_a_half_of_one_class_is_an_error_since_every_answer_would_be_right(
    dataset, count, base, said
):
    with pytest.raises(UserError, match=said):
        make_task(dataset(count), 3, 1, "base-novel", Reader(4), base)
    assert list(make_task(dataset(count), 3, 1, "all", Reader(4)).tests) == ["all"]


def test_all_classes_are_learned_and_tested_together(dataset, numbers):
    data = dataset(5)
    task = task_of(data, classes="all")
    assert list(task.tests) == ["all"]
    assert task.classnames == task.tests["all"].classnames == data.classnames
    assert numbers(task.tests["all"].batches.pixels) == numbers(data.test.source)
    assert Counter(task.train.labels.tolist()) == dict.fromkeys(range(5), 3)


@pytest.mark.parametrize("shots", [1, 4, 10])
def test_train_has_the_shots_of_each_base_class_under_their_labels(dataset, numbers, shots):
    data = dataset(5)
    task = task_of(data, shots)
    truth = dict(zip(numbers(data.train.source), data.train.labels.tolist(), strict=True))
    chosen = numbers(task.train.pixels)
    assert len(set(chosen)) == len(chosen)
    assert [truth[n] for n in chosen] == task.train.labels.tolist()
    assert Counter(task.train.labels.tolist()) == {0: shots, 1: shots, 2: shots}
    assert task.notes == []


def test_one_seed_draws_the_same_shots_and_another_seed_others(dataset, numbers):
    data = dataset(5)
    first, again, other = (numbers(task_of(data, seed=s).train.pixels) for s in (1, 1, 2))
    assert first == again
    assert set(first) != set(other)


def test_over_seeds_every_picture_is_drawn_about_equally_often(dataset, numbers):
    data = dataset(4)
    count = Counter()
    for seed in range(300):
        count.update(numbers(task_of(data, seed=seed).train.pixels))
    assert len(count) == 20  # all pictures of the two base classes
    assert all(abs(n - 90) < 5 * (300 * 0.3 * 0.7) ** 0.5 for n in count.values())


def test_a_validation_part_is_used_whole_for_the_base_classes(dataset, numbers):
    data = dataset(5, val=3)
    task = task_of(data, shots=1)
    assert numbers(task.val.pixels) == numbers(data.val.source)[: 3 * 3]
    assert task.val.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("have", "shots", "val", "train"),
    [
        (20, 1, 1, 1),  # min(shots, 4)
        (20, 3, 3, 3),
        (20, 16, 4, 16),
        (18, 16, 4, 14),
        (6, 16, 3, 3),  # never more than half
        (3, 16, 1, 2),
        (2, 16, 1, 1),
    ],
)
def test_without_a_validation_part_a_few_training_pictures_are_set_aside(
    dataset, numbers, have, shots, val, train
):
    data = dataset(5, train=have, val=0)
    task = task_of(data, shots)
    assert Counter(task.val.labels.tolist()) == {0: val, 1: val, 2: val}
    assert Counter(task.train.labels.tolist()) == {0: train, 1: train, 2: train}
    chosen, aside = set(numbers(task.train.pixels)), set(numbers(task.val.pixels))
    assert not chosen & aside
    truth = dict(zip(numbers(data.train.source), data.train.labels.tolist(), strict=True))
    assert [truth[n] for n in numbers(task.val.pixels)] == task.val.labels.tolist()


@pytest.mark.parametrize(
    ("have", "shots", "val", "train"),
    [
        (124, 200, 24, 100),  # all that there is: a fifth
        (124, "all", 24, 100),
        (10, "all", 2, 8),
        (3, "all", 1, 2),
        (2, "all", 1, 1),
    ],
)
def test_where_training_takes_all_a_fifth_is_for_validation(dataset, have, shots, val, train):
    task = task_of(dataset(5, train=have, val=0), shots)
    assert Counter(task.val.labels.tolist()) == dict.fromkeys(range(3), val)
    assert Counter(task.train.labels.tolist()) == dict.fromkeys(range(3), train)
    assert [note for note in task.notes if shots == "all"] == []


@pytest.mark.parametrize(
    ("classes", "have", "shots", "val"),
    [
        (2, 150, 16, 100),  # 200 in all
        (2, 150, 1, 100),
        (2, 60, 16, 44),  # all that training leaves
        (2, 18, 16, 4),  # training comes first
        (2, 900, 400, 400),  # as many as it learns from
        (2, 900, "all", 180),
        (2, 3000, "all", 500),  # 1,000 in all
        (10, 100, 4, 20),
        (60, 100, 4, 4),  # as many as it learns from: 240, and 4 of each class at least
    ],
)
def test_ones_own_pictures_validate_on_what_training_leaves_within_bounds(
    dataset, numbers, classes, have, shots, val
):
    data = replace(dataset(classes, train=have, val=0), own=True)
    task = task_of(data, shots, classes="all")
    assert Counter(task.val.labels.tolist()) == dict.fromkeys(range(classes), val)
    assert not set(numbers(task.train.pixels)) & set(numbers(task.val.pixels))
    truth = dict(zip(numbers(data.train.source), data.train.labels.tolist(), strict=True))
    assert [truth[n] for n in numbers(task.val.pixels)] == task.val.labels.tolist()
    few = task_of(replace(data, own=False), shots, classes="all")
    assert torch.equal(few.train.pixels, task.train.pixels)  # the shots are the same


def test_of_ones_own_large_validation_part_some_are_drawn_and_that_is_noted(dataset, numbers):
    data = dataset(2, train=16, val=300)
    assert len(task_of(data, 16, classes="all").val) == 600  # a published part is used whole
    data = replace(data, own=True)
    task, other = (task_of(data, 16, seed, "all") for seed in (1, 2))
    assert Counter(task.val.labels.tolist()) == {0: 100, 1: 100}
    assert task.notes == ["200 of 600 validation images are used, 100 per class"]
    truth = dict(zip(numbers(data.val.source), data.val.labels.tolist(), strict=True))
    drawn = numbers(task.val.pixels)
    assert drawn == sorted(set(drawn))
    assert [truth[n] for n in drawn] == task.val.labels.tolist()
    assert drawn != numbers(other.val.pixels)
    assert len(task_of(replace(data, val=data.val[torch.arange(290, 310)]), 16, 1, "all").val) == 20


def test_pictures_that_do_not_fit_in_memory_are_told_before_any_is_read(dataset, monkeypatch):
    monkeypatch.setattr(pictures, "free_memory", lambda: 1000.0)
    monkeypatch.setattr(Reader, "read", lambda *a: pytest.fail("it was read"))
    with pytest.raises(UserError, match="^24 pictures of 8 x 8 pixels take"):  # 3 x (3 + 5)
        make_task(dataset(3, train=5, test=5, val=5), 3, 1, "all", Reader(8))


def test_test_pictures_are_never_in_train_or_val(dataset, numbers):
    for val in (0, 3):
        task = task_of(dataset(4, train=3, val=val), shots=16)
        seen = set(numbers(task.train.pixels)) | set(numbers(task.val.pixels))
        tested = {n for test in task.tests.values() for n in numbers(test.batches.pixels)}
        assert not seen & tested


def test_classes_with_fewer_pictures_than_shots_give_all_and_are_named_in_a_note(dataset):
    task = task_of(dataset(5, train=[10, 2, 7, 1, 1]), shots=8)
    assert Counter(task.train.labels.tolist()) == {0: 8, 1: 2, 2: 7}
    assert task.notes == ["fewer than 8 training images in 2 classes: class 1 2, class 2 7"]


def test_a_note_of_many_short_classes_names_five(dataset):
    (note,) = task_of(dataset(20, train=1), shots=2).notes
    assert note.startswith("fewer than 2 training images in 10 classes: class 0 1, ")
    assert "class 4 1, …" in note
    assert "class 5" not in note


def test_classes_too_small_for_any_validation_are_an_error(dataset):
    with pytest.raises(UserError, match="validation"):
        task_of(dataset(4, train=1, val=0))
    assert len(task_of(dataset(4, train=[1, 2, 1, 1], val=0)).val) == 1  # one class is enough


def test_unreadable_files_are_skipped_in_every_part_and_noted(noise, tmp_path):
    def part(name: str) -> Pictures:
        files = [noise(tmp_path / f"{name}{i}.png", 9 * len(name) + i) for i in range(4)]
        files[1].write_bytes(b"not a picture")
        return Pictures(files, torch.tensor([0, 0, 1, 1]))

    data = Dataset(["a", "b"], "a {}", part("train"), part("val"), part("test"))
    with pytest.raises(UserError, match="train1.png"):
        make_task(data, 2, 1, "all", Reader(4, folder=None))
    task = make_task(data, 2, 1, "all", Reader(4, skip_bad=True, folder=None))
    for split in (task.train, task.val, task.tests["all"].batches):
        assert sorted(split.labels.tolist()) == [0, 1, 1]
        assert len(split) == len(split.hashes) == 3
    assert len(task.notes) == 3
    for name, note in zip(("train", "val", "test"), task.notes, strict=True):
        assert note == f"skipped 1 unreadable files: {tmp_path / name}1.png"


def test_a_test_picture_that_is_learned_from_is_noted_whatever_its_name(noise, tmp_path):
    def part(name: str, seeds: list[int]) -> Pictures:
        files = [noise(tmp_path / f"{name}{i}.png", seed) for i, seed in enumerate(seeds)]
        return Pictures(files, torch.tensor([0, 0, 1, 1]))

    def notes(test_seeds: list[int]) -> list[str]:
        train, val = part("train", [1, 2, 3, 4]), part("val", [5, 6, 7, 8])
        data = Dataset(["a", "b"], "a {}", train, val, part("test", test_seeds))
        return make_task(data, 2, 1, "all", Reader(4, folder=None)).notes

    assert notes([9, 10, 11, 12]) == []
    assert notes([9, 10, 4, 5]) == [
        "2 test images are also training or validation images, pixel for pixel"
    ]


def test_copies_among_the_pictures_are_noted(noise, tmp_path):
    def part(name: str, seeds: list[int]) -> Pictures:
        files = [noise(tmp_path / f"{name}{i}.png", seed) for i, seed in enumerate(seeds)]
        return Pictures(files, torch.tensor([0, 0, 1, 1]))

    parts = part("train", [1, 2, 3, 1]), part("val", [5, 6, 7, 3]), part("test", [8, 9, 9, 9])
    data = Dataset(["a", "b"], "a {}", *parts)
    notes = make_task(data, 2, 1, "all", Reader(4, folder=None)).notes
    said = "images that are copies of others, byte for byte: 2 ("
    assert [note[: len(said)] for note in notes] == [said, said]
    assert f"{tmp_path}/test2.png of {tmp_path}/test1.png" in notes[1]


def test_pictures_are_the_same_if_all_pixels_are(tmp_path):
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 4, 3, 16, 16), dtype=torch.uint8, generator=rng)
    pixels[2, :2] = pixels[0, :2]  # two of the test images are training ones
    pixels[2, 1, 2, 5, 5] ^= 1  # but for one bit of one value of the second
    files = [[tmp_path / f"{part}{i}.png" for i in range(4)] for part in range(3)]
    for file, image in zip(sum(files, []), pixels.flatten(0, 1), strict=True):
        to_pil_image(image).save(file)
    for source in (pixels, files):  # in memory, or in files
        parts = (Pictures(part, torch.tensor([0, 0, 1, 1])) for part in source)
        task = make_task(Dataset(["a", "b"], "{}", *parts), 2, 1, "all", Reader(16, folder=None))
        assert task.notes == [
            "1 test images are also training or validation images, pixel for pixel"
        ]


@pytest.mark.parametrize("base", [[4, 1], [0, 3], [0, 2, 4]])
def test_named_base_classes_are_learned_in_the_data_sets_order(dataset, numbers, base):
    data = dataset(5)
    task = make_task(data, 3, 1, "base-novel", Reader(4), base)
    truth = dict(zip(numbers(data.train.source), data.train.labels.tolist(), strict=True))
    novel = [k for k in range(5) if k not in base]
    assert task.classnames == [f"class {k}" for k in sorted(base)]
    assert task.tests["novel"].classnames == [f"class {k}" for k in novel]
    learned = [sorted(base)[k] for k in task.train.labels.tolist()]
    assert [truth[n] for n in numbers(task.train.pixels)] == learned
    tested = dict(zip(numbers(data.test.source), data.test.labels.tolist(), strict=True))
    for part, classes in (("base", sorted(base)), ("novel", novel)):
        batches = task.tests[part].batches
        assert [tested[n] for n in numbers(batches.pixels)] == [
            classes[k] for k in batches.labels.tolist()
        ]
        assert len(batches) == 5 * len(classes)
