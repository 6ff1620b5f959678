"""Pictures of one's own, named by a run: one by one, as a table, in Python."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import clip_min
from clip_min import UserError, crop, normalize
from fewshot.run import Run
from methods.interop import classify
from methods.interop.classify import Answer, open_run
from methods.interop.load import trained as method_of


@pytest.fixture(scope="module")
def pictures(draw, tmp_path_factory) -> Path:
    """75 pictures, more than one batch, among them one that is cut short and a text."""
    folder = tmp_path_factory.mktemp("pictures")
    draw(folder, 15, seed=5)
    broken = folder / "amber_lily/0.png"
    broken.write_bytes(broken.read_bytes()[:200])
    (folder / "readme.txt").write_text("not a picture")
    return folder


@pytest.fixture(scope="module")
def expected(trained, pictures) -> dict[str, list[tuple[str, float]]]:
    """path -> (name, probability), the likeliest first, each picture on its own."""
    run = Run.open(trained.path)
    names = [name for part in run.config["classnames"].values() for name in part]
    clip = clip_min.load(run.config["model"])
    method = method_of(run, clip).for_classes(names)
    found = {}
    for path in pictures.rglob("*.png"):
        if path != pictures / "amber_lily/0.png":
            with Image.open(path) as image, torch.no_grad(), method.inference():
                pixels = normalize(crop(image, clip.config), config=clip.config)
                shares = method(pixels[None])[0].softmax(0).tolist()
            found[str(path)] = sorted(zip(names, shares, strict=True), key=lambda pair: -pair[1])
    return found


def is_close(row: dict, expected: list[tuple[str, float]]) -> bool:
    for i, (name, share) in enumerate(expected[:5], 1):
        assert row[f"name{i}"] == name
        assert float(row[f"probability{i}"]) == pytest.approx(share, abs=2e-6)
    return float(row["margin"]) == pytest.approx(expected[0][1] - expected[1][1], abs=4e-6)


def test_between_answers_gradients_and_autocast_are_the_callers(trained, pictures):
    one, other = (open_run(trained.path) for _ in range(2))
    for _ in zip(one.classify([pictures]), other.classify([pictures]), strict=True):
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
    both = zip(one.classify([pictures]), one.classify([pictures]), strict=True)  # of one model
    assert all(a == b for a, b in both)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_a_folder_becomes_a_table(ending, script, trained, pictures, expected, tmp_path):
    file = tmp_path / f"out.{ending}"
    result = script("eval", "--run", trained.path, "--image", pictures, "--csv", file)
    assert result.code == 0, result.err
    text = file.read_text()
    rows = json.loads(text) if ending == "json" else list(csv.DictReader(text.splitlines()))
    assert len(rows) == 75
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    broken = [row for row in rows if row["error"]]
    assert [Path(row["path"]).parent.name for row in broken] == ["amber_lily"]
    assert broken[0]["answer"] == broken[0]["name1"] == ""
    for row in rows:
        if not row["error"]:
            assert is_close(row, expected[row["path"]])
            assert row["answer"] == row["name1"]
    assert result.out.splitlines()[-1] == f"75 pictures, 1 could not be read: {file}"
    assert "amber" not in result.out


def test_below_the_threshold_a_picture_is_none_of_the_classes(
    script, trained, pictures, expected, tmp_path
):
    shares = sorted(rows[0][1] for rows in expected.values())
    threshold = (shares[30] + shares[31]) / 2
    file, flags = tmp_path / "out.csv", ("--run", trained.path, "--threshold", threshold)
    result = script("eval", *flags, "--image", pictures, "--csv", file)
    assert result.code == 0, result.err
    assert "75 pictures, 31 none of the classes, 1 could not be read: " in result.out
    for row in csv.DictReader(file.read_text().splitlines()):
        if not row["error"]:
            known = expected[row["path"]][0][1] >= threshold
            assert row["answer"] == (row["name1"] if known else "")
    unsure = next(path for path, rows in expected.items() if rows[0][1] < threshold)
    shown = script("eval", *flags, "--image", unsure).out.splitlines()
    assert shown[:2] == [unsure, f"  none of the classes (below {100 * threshold:.2f} %)"]
    assert len(shown) == 7


def test_in_python(trained, pictures, expected):
    run = open_run(trained.path)
    answers = list(run.classify([pictures]))
    assert len(answers) == 75
    for answer in answers:
        if answer.error:
            assert answer.names == []
            continue
        pairs = expected[str(answer.path)]
        assert answer.names == [name for name, _ in pairs[:5]]
        assert answer.margin == pytest.approx(pairs[0][1] - pairs[1][1], abs=2e-6)
    two = open_run(trained.path, ["amber lily", "a new one"])
    (answer,) = two.classify([answers[-1].path])
    assert sorted(answer.names) == ["a new one", "amber lily"]
    assert sum(answer.probabilities) == pytest.approx(1)


def test_in_python_a_config_with_a_strange_key_is_the_users_error(trained, tmp_path):
    run = Path(shutil.copytree(trained.path, tmp_path / "run"))
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace('"skip_bad_images"', '"skip_images"'))
    with pytest.raises(UserError, match="config.json: not a config of a run .*'skip_images'"):
        open_run(run)


def test_few_pictures_are_in_memory_at_once(trained, pictures, monkeypatch):
    """Decoded ahead are AHEAD at most, whatever there is to come."""
    opened = []
    real = classify.open_image
    monkeypatch.setattr(classify, "open_image", lambda path: opened.append(path) or real(path))
    good = next(path for path in pictures.rglob("*.png") if path.stem != "0")
    answers = open_run(trained.path).classify([good] * 2000)
    next(answers)
    assert len(opened) < 2 * 128 + 64


def test_a_table_is_whole_or_not_there(trained, pictures, tmp_path):
    def killed():
        yield Answer(pictures / "a.png", ["rose"], [1.0])
        raise KeyboardInterrupt

    file = tmp_path / "out.csv"
    with pytest.raises(KeyboardInterrupt):
        classify.write(killed(), file)
    assert list(tmp_path.iterdir()) == []
    assert classify.write([], tmp_path / "none.json") == (0, 0, 0)
    assert json.loads((tmp_path / "none.json").read_text()) == []


def test_names_of_files_that_are_no_text_are_written(trained, pictures, tmp_path):
    odd = tmp_path / "pic\udcff.png"
    shutil.copy(next(p for p in pictures.rglob("*.png") if p.stem != "0"), odd)
    classify.write(open_run(trained.path).classify([odd]), tmp_path / "out.csv")
    assert "pic\\udcff.png" in (tmp_path / "out.csv").read_text()


def test_one_name_has_no_second(tmp_path):
    answer = Answer(Path("a.png"), ["rose"], [1.0])
    assert answer.margin == 1
    assert answer.row(1.0)["answer"] == "rose"
    assert answer.row()["name2"] == ""


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--csv", "out.txt"), "--csv out.txt: expected a file name with .csv or .json"),
        (("--threshold", "1.5"), "--threshold 1.5: expected 0 to 1"),
        (("--threshold", "nan"), "--threshold nan: expected 0 to 1"),
        (("--image", ""), "--image: a name is empty"),
        (("--classes", "rose"), "--classes rose: names 1 classes, expected two or more"),
        (("--classes", "no/such.txt"), "--classes no/such.txt: names 1 classes, expected two"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(more, said, script, trained, pictures, is_one_line):
    assert is_one_line(script("eval", "--run", trained.path, "--image", pictures, *more), said)
    assert is_one_line(script("eval", "--run", trained.path, "--csv", "a.csv"), "--csv", "--image")


def test_no_picture_that_can_be_read_is_an_error(script, trained, pictures, is_one_line, tmp_path):
    broken, file = pictures / "amber_lily/0.png", tmp_path / "out.csv"
    flags = ("--run", trained.path, "--image", broken)
    assert is_one_line(script("eval", *flags), str(broken), "cannot be read")
    assert is_one_line(script("eval", *flags, "--csv", file), str(broken), "cannot be read")
    assert not file.exists()
    with pytest.raises(UserError, match="no such file"):
        open_run(tmp_path)
