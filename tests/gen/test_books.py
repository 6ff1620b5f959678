"""The books survive strange names and damage is named."""

import json

import pytest
from PIL import Image

from clip_min import UserError
from fewshot import ranks
from gen.books import Attempt, Caption, Manifest

NAMES = ["rose\u2028/ red?", "rose red", "ROSE  red"]
SETTINGS, PLAN = {"classnames": NAMES, "seed": 1}, {"quotas": dict.fromkeys(NAMES, 1), "f1": None}


def attempt(name: str, number: int, state: str) -> Attempt:
    return Attempt(name, number, "", state, NAMES[1], 0.5, "a", "b", "c", "d", 1, 2, *"efgh")


def picture(value: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (value, 0, 0))


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    manifest = Manifest.start(tmp_path / "images", SETTINGS, PLAN)
    manifest.add_captions([Caption(NAMES[0], 0, "x.png", 0, 5, 'two\nlines\u2028"', "e", "f")])
    rows = [attempt(NAMES[2], 0, "kept"), attempt(NAMES[0], 1, "rejected")]
    rows += [attempt(NAMES[0], 0, "undecided")]
    manifest.add(rows, [picture(value) for value in (1, 2, 3)])
    return manifest


def test_what_was_written_is_read_in_order_of_class_and_attempt(manifest):
    again = Manifest.open(manifest.folder)
    assert again.attempts == manifest.attempts
    assert again.captions == manifest.captions
    assert [(a.classname, a.attempt) for a in again.attempts] == [
        (NAMES[0], 0),
        (NAMES[0], 1),
        (NAMES[2], 0),
    ]
    assert again.missing() == 2
    assert again.count("rejected", "undecided") == {NAMES[0]: 2}


@pytest.fixture
def as_process(monkeypatch):
    """(number, work) -> does the work as that one of two processes."""

    def call(number: int, work) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(ranks, "size", 2)
            patch.setattr(ranks, "rank", number)
            work()

    return call


@pytest.mark.parametrize("f1", [5, dict.fromkeys(NAMES), dict.fromkeys(NAMES, "x"), [1], "x"])
def test_f1_in_the_plan_is_numbers_of_classes_or_null(manifest, f1):
    assert Manifest.open(manifest.folder).plan["f1"] is None
    (manifest.folder / "plan.json").write_text(json.dumps({**PLAN, "f1": f1}))
    with pytest.raises(UserError, match=r"plan\.json: f1.* is .*, expected a"):
        Manifest.open(manifest.folder)


def test_what_processes_wrote_is_read_and_in_the_end_is_in_one_book(manifest, as_process):
    folder, before = manifest.folder, [a.image for a in manifest.attempts]
    views = [Manifest(folder, SETTINGS, PLAN) for _ in range(2)]
    decided = [a for a in views[0].attempts if a.state == "undecided"]
    decided[0].state = "kept"
    caption = Caption(NAMES[1], 0, "y.png", 0, 5, "new", "e", "f")
    new = [attempt(NAMES[1], 0, "rejected"), attempt(NAMES[1], 1, "kept")]
    as_process(0, lambda: views[0].file(decided, [picture(3)]))
    as_process(0, lambda: views[0].spent("diffuse", 2))
    as_process(1, lambda: views[1].add_captions([caption]))
    as_process(1, lambda: views[1].add(new, [picture(4), picture(5)]))
    as_process(1, lambda: views[1].spent("diffuse", 3))
    (folder / "processes/1/mine.txt").write_text("mine")
    assert [a.image for a in manifest.attempts] == before  # the book of all is as it was
    seen = Manifest.open(folder)
    for again in (seen, Manifest.start(folder, SETTINGS, PLAN), Manifest.open(folder)):
        assert [(a.classname, a.attempt, a.state) for a in again.attempts] == [
            (NAMES[0], 0, "kept"),
            (NAMES[0], 1, "rejected"),
            (NAMES[1], 0, "rejected"),
            (NAMES[1], 1, "kept"),
            (NAMES[2], 0, "kept"),
        ]
        assert [c.classname for c in again.captions] == NAMES[:2]
        assert again.seconds == {"diffuse": 5}
        assert all((folder / a.image).exists() for a in again.attempts)
    left = [path.name for path in (folder / "processes").rglob("*")]
    assert sorted(left) == ["1", "mine.txt"]


def test_a_line_that_is_there_twice_is_named(manifest):
    with open(manifest.folder / "captions.jsonl", "a") as file:
        file.write((manifest.folder / "captions.jsonl").read_text())
    with pytest.raises(UserError, match=r"captions.jsonl, line 2: repeats an earlier line"):
        Manifest.open(manifest.folder)


def test_a_decided_image_moves(manifest):
    row = manifest.attempts[0]
    row.state = "waived"
    before = manifest.folder / row.image
    manifest.file([row], [Image.open(before)])
    assert not before.exists()
    assert Image.open(manifest.folder / row.image).getpixel((0, 0)) == (3, 0, 0)
    assert row.image.startswith("kept/")
    assert Manifest.open(manifest.folder).attempts == manifest.attempts


def test_to_train_on_are_the_first_that_were_kept_as_many_as_planned(manifest):
    more = [attempt(NAMES[2], n, state) for n, state in ((1, "rejected"), (2, "waived"))]
    manifest.add(more, [picture(9)] * 2)
    assert [a.attempt for a in manifest.chosen()] == [0]
    manifest.plan = {"quotas": dict.fromkeys(NAMES, 2)}
    assert [a.attempt for a in manifest.chosen()] == [0, 2]


def test_a_line_that_is_not_ours_is_named(manifest):
    with open(manifest.folder / "manifest.jsonl", "a") as file:
        file.write('{"classname": "rose"}\n')
    with pytest.raises(UserError, match=r"manifest.jsonl, line 4: attempt is missing"):
        Manifest.open(manifest.folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"image": "../victim.png"},
            "image is '../victim.png', expected 'undecided/rose-red-0/0000",
        ),
        ({"image": "/etc/victim.png"}, "image is '/etc/victim.png', expected"),
        ({"image": "kept/rose-red-0/00000.png"}, "expected 'undecided/rose-red-0/00000.png'"),
        (
            {"attempt": 7, "image": "undecided/rose-red-0/00007.png"},
            "expected 'undecided/rose-red-0",
        ),
        ({"state": "lost"}, "state is 'lost', expected kept or rejected or waived or undecided"),
        ({"classname": "tulip"}, "'tulip' is not a class of settings.json"),
        ({"predicted": "tulip"}, "'tulip' is not a class of settings.json"),
        ({"predicted": "", "state": "rejected"}, "'' is not a class of settings.json"),
        ({"predicted": None, "state": "rejected"}, "predicted is null"),
        ({"margin": "0.5"}, "margin is '0.5', expected a finite number or null"),
        ({"stranger": 1}, "stranger is not a key"),
    ],
)
def test_a_line_that_says_what_none_of_ours_says_is_named(manifest, change, said):
    """Above all where an image lies: it may be moved or removed."""
    victim = manifest.folder.parent / "victim.png"
    victim.write_text("mine")
    file = manifest.folder / "manifest.jsonl"
    first, *others = file.read_text(encoding="utf-8").split("\n")
    file.write_text("\n".join([json.dumps(json.loads(first) | change), *others]), encoding="utf-8")
    with pytest.raises(UserError, match=f"manifest.jsonl.*{said}"):
        Manifest.start(manifest.folder, SETTINGS, PLAN)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("quotas", [{"tulip": 1}, {NAMES[1]: -1}])
def test_a_plan_for_other_classes_is_named(manifest, quotas):
    (manifest.folder / "plan.json").write_text(json.dumps({"quotas": quotas}))
    with pytest.raises(UserError, match=r"plan.json: quotas\."):
        Manifest.open(manifest.folder)


def test_the_books_hold_one_line_an_attempt_with_all_that_it_follows_from(manifest):
    line = (manifest.folder / "manifest.jsonl").read_text(encoding="utf-8").split("\n")[2]
    for part in ("image", "captioned", "repainted", "caption_seed", "painter_revision", "margin"):
        assert f'"{part}": ' in line
