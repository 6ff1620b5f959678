"""report.py on several runs, folders of them, and folders of generated images."""

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest

from gen.books import Manifest
from reports.charts import legend
from reports.several_page import look
from tests.made_up_run import HOSTILE, make
from tests.scripts.test_report_pages import HALVES, sound, told


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two methods, two numbers of shots, two seeds; a run that broke off, and what is no run."""
    here = tmp_path_factory.mktemp("several") / "runs"
    for method, sure in (("lora", 3.0), ("coop", 2.0)):
        for shots in (1, 4):
            for seed in (1, 2):
                path = here / f"noise/tiny/{method}-s{shots}-seed{seed}"
                how = {"method": method, "sure": sure + shots / 4, "shots": shots}
                make(path, HALVES, each=8, seed=seed, **how)
    half = here / "noise/tiny/coop-s1-seed3"
    make(half, HALVES, seed=3, method="coop", shots=1)
    (half / "results.json").unlink()
    broken = here / "noise/tiny/coop-s1-seed4"
    make(broken, HALVES, seed=4, method="coop", shots=1)
    (broken / "config.json").write_text('{"method": 3}')
    aside = here / "noise/tiny/lora-s1-seed1.old1"
    make(aside, HALVES, seed=1)
    return here


def test_seeds_are_one_row_with_mean_and_deviation(script, folder):
    found = told(script, folder)
    (task,) = found["tasks"]
    rows = {(row["method"], row["shots"]): row for row in task["rows"]}
    assert rows.keys() == {("lora", 1), ("lora", 4), ("coop", 1), ("coop", 4)}
    for (method, shots), row in rows.items():
        files = [folder / f"noise/tiny/{method}-s{shots}-seed{seed}" for seed in (1, 2)]
        results = [json.loads((file / "results.json").read_text()) for file in files]
        assert row["folders"] == [str(file) for file in files]
        for key in ("base", "novel", "hm", "val"):
            values = [result[key] for result in results]
            assert row["scores"][key]["mean"] == pytest.approx(statistics.mean(values))
            assert row["scores"][key]["std"] == pytest.approx(statistics.stdev(values))
        joint = [result["joint"]["hm"] for result in results]
        assert row["scores"]["joint_hm"]["mean"] == pytest.approx(statistics.mean(joint))
        assert row["seconds"] == pytest.approx(statistics.mean([4.5, 9.0]))
    assert task["zero_shot"]["base"]["values"] == [
        json.loads((folder / f"noise/tiny/lora-s4-seed{n}/results.json").read_text())["zero_shot"][
            "base"
        ]
        for n in (1, 2)
    ]


def test_what_cannot_be_compared_is_listed_with_its_reason(script, folder):
    result = script("report", folder)
    assert result.code == 0, result.err
    text = sound(folder / "report.html")
    assert "coop-s1-seed3: no results.json: training has not ended" in text
    assert "coop-s1-seed4/config.json" in text
    assert ".old1" not in text
    assert "8 runs on one task" in text


def test_runs_of_one_method_with_other_settings_are_told_apart(script, folder, tmp_path):
    first = folder / "noise/tiny/lora-s4-seed1"
    other = shutil.copytree(first, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["settings"]["lr"] = 0.25
    (other / "config.json").write_text(json.dumps(config))
    out = tmp_path / "two.json"
    (task,) = told(script, first, other, "--out", out)["tasks"]
    assert [row["label"] for row in task["rows"]] == ["lora (lr 0.001)", "lora (lr 0.25)"]


@pytest.fixture
def copied(folder, tmp_path):
    """(name, change(config, results), seed) -> a copy of LoRA's run, changed."""

    def copy(name: str, change=lambda config, results: None, seed: int = 1) -> Path:
        path = shutil.copytree(folder / f"noise/tiny/lora-s4-seed{seed}", tmp_path / name)
        both = [json.loads((path / f"{file}.json").read_text()) for file in ("config", "results")]
        change(*both)
        for file, content in zip(("config", "results"), both, strict=True):
            (path / f"{file}.json").write_text(json.dumps(content))
        return path

    return copy


@pytest.mark.parametrize("lost", [("novel", "hm"), ("base", "novel", "hm", "all", "joint")])
def test_runs_without_zero_shots_scores_are_shown(lost, copied, script, tmp_path):
    def lose(config, results):
        results["zero_shot"] = {
            k: None if k in lost else v for k, v in results["zero_shot"].items()
        }

    runs = [copied(f"run{seed}", lose, seed) for seed in (1, 2)]
    result = script("report", *runs, "--out", tmp_path / "page.html")
    assert result.code == 0, result.err
    assert "lora" in (tmp_path / "page.html").read_text()


def test_jointly_labelled_images_stand_in_a_table_of_their_own(copied, script, tmp_path):
    def jointly(config, results):
        config["method"], config["settings"] = "transclip", {"tasks": 200, "queries": 75}
        results["zero_shot"] = {"base": 1.0, "novel": 2.0, "hm": 1.3, "all": None}
        results["parts"] = {part: {"tasks": 200, "interval95": 1.0} for part in HALVES}

    found = told(script, copied("a"), copied("b", jointly), "--out", tmp_path / "o.json")
    rows = [[row["method"] for row in task["rows"]] for task in found["tasks"]]
    assert rows == [["lora"], ["transclip"]]
    assert found["tasks"][0]["zero_shot"]["base"]["mean"] != 1.0


def test_a_copy_of_a_run_is_no_other_seed(copied, script, tmp_path):
    runs = copied("a"), copied("again"), copied("c", seed=2)
    found = told(script, *runs, "--out", tmp_path / "o.json")
    ((row,),) = [task["rows"] for task in found["tasks"]]
    assert row["seeds"] == [1, 2]
    assert found["left_out"] == {str(runs[1]): f"{runs[1]}: is the run of {runs[0]} once more"}


def test_rows_that_differ_have_different_labels(copied, script, tmp_path):
    def precision(config, results):
        config["experiment"]["precision"] = "bf16"

    def texts(config, results):
        config["settings"]["prompts"] = {"rose": ["a rose in a garden " * 50]}

    runs = copied("a"), copied("b", precision), copied("c", texts)
    (task,) = told(script, *runs, "--out", tmp_path / "o.json")["tasks"]
    labels = [row["label"] for row in task["rows"]]
    assert len(set(labels)) == 3
    assert max(map(len, labels)) < 200


def test_other_classes_are_another_task(copied, script, tmp_path):
    def added(config, results):
        config["classnames"]["novel"].append("a new one")

    found = told(script, copied("a"), copied("b", added), "--out", tmp_path / "o.json")
    assert len(found["tasks"]) == 2


def test_zero_shots_validation_is_given_only_if_it_is_one(copied, script, tmp_path):
    def shots(config, results):
        config["experiment"]["shots"], results["zero_shot"]["val"] = 16, 12.5

    for name, change in (("a", lambda *_: None), ("b", shots)):
        copied(name, change)
    (task,) = told(script, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "o.json")["tasks"]
    assert "val" not in task["zero_shot"]


def test_a_file_of_shots_is_named(copied, script, tmp_path):
    def drawn(config, results):
        config["experiment"] |= {"shots": "all", "shots_file": "draws/four-3.jsonl"}

    (task,) = told(script, copied("a", drawn), copied("b"), "--out", tmp_path / "o.json")["tasks"]
    assert {row["shots"] for row in task["rows"]} == {"four-3", 4}


def test_only_unfinished_runs_are_no_generated_images(folder, script, tmp_path):
    half = shutil.copytree(folder / "noise/tiny/coop-s1-seed3", tmp_path / "runs/a")
    shutil.copytree(half, tmp_path / "runs/b")
    assert script("report", tmp_path / "runs", "--out", tmp_path / "o.html").code == 0
    assert "<title>No finished run" in (tmp_path / "o.html").read_text()


def test_a_folder_with_old_in_its_name_is_read(folder, script, tmp_path):
    for n in (1, 2):
        run = folder / f"noise/tiny/lora-s4-seed{n}"
        shutil.copytree(run, tmp_path / f"photos.old-town/lora-s4-seed{n}")
    (task,) = told(script, tmp_path / "photos.old-town", "--out", tmp_path / "o.json")["tasks"]
    assert task["rows"][0]["seeds"] == [1, 2]


def test_other_tasks_stand_in_other_tables(script, folder, tmp_path):
    other = make(tmp_path / "other", HALVES, dataset="dtd")
    out = tmp_path / "two.json"
    tasks = told(script, folder / "noise/tiny/lora-s1-seed1", other, "--out", out)["tasks"]
    assert [task["dataset"] for task in tasks] == ["folder", "dtd"]
    every = make(tmp_path / "all", {"all": ["a", "b", "c"]}, classes="all")
    out = tmp_path / "three.html"
    assert script("report", other, every, "--out", out).code == 0
    assert "all classes learned" in sound(out)


def test_a_curve_of_shares_is_drawn_and_kept(script, folder, tmp_path):
    copy = shutil.copytree(folder / "noise/tiny/lora-s4-seed1", tmp_path / "a")
    points = [
        {"share": 0.0, "base": 50.0, "novel": 60.0, "hm": 54.5},
        {"share": 0.5, "base": 70.0, "novel": 58.0, "hm": 63.4},
    ]
    (copy / "keep_share.json").write_text(json.dumps({"method": "lora", "points": points}))
    found = told(script, copy, folder / "noise/tiny/coop-s4-seed1", "--out", tmp_path / "o.json")
    (curve,) = [r["keep_share"] for r in found["tasks"][0]["rows"] if r["method"] == "lora"]
    assert curve == [{key: of[key] for key in ("share", "base", "novel")} for of in points]


def test_many_series_are_told_apart_by_colour_and_mark():
    drawn = legend([(f"method {k}", *look(k)) for k in range(40)])
    marks = re.findall(r'd="([^"]+)" fill="([^"]+)"', drawn)
    assert len(marks) == len(set(marks)) == 40


# -------------------------------------------------------------------------------- generated images


@pytest.fixture(scope="module")
def images(script, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generated") / "images"
    small = ["--shots", 2, "--per-class", 2, "--captions", 2, "--reject-limit", 1]
    result = script("generate", *small, "--plan", "f1", "--synthetic", folder)
    assert result.code == 0, result.err
    return folder


def test_the_numbers_of_generated_images_are_the_books(script, images):
    found = told(script, images)
    manifest = Manifest.open(images)
    for state in ("kept", "waived", "rejected"):
        assert found[state] == sum(a.state == state for a in manifest.attempts)
    assert found["used"] == len(manifest.chosen())
    for row in found["classes"]:
        mine = [a for a in manifest.attempts if a.classname == row["name"]]
        kept = sum(a.state == "kept" for a in mine)
        assert row["planned"] == manifest.plan["quotas"][row["name"]]
        assert row["attempts"] == len(mine)
        assert row["accepted"] == (pytest.approx(100 * kept / len(mine)) if mine else None)
        assert row["f1"] == pytest.approx(100 * manifest.plan["f1"][row["name"]])


def test_the_sheet_has_every_image_beside_its_sources(script, images):
    assert script("report", images).code == 0
    text = sound(images / "report.html")
    count = len(Manifest.open(images).attempts)
    assert text.count('class="tile"') == count > 0
    assert text.count("data:image/jpeg") == 3 * count  # captioned, painted over, made
    assert "picture not found" not in text
    assert (images / "report.html").stat().st_size < 8e6
    again = Manifest.open(images)  # the page is no stranger in the folder
    assert len(again.attempts) == count


def test_generated_images_among_runs_are_shown_with_them(script, folder, images, tmp_path):
    out = tmp_path / "both.html"
    result = script("report", folder / "noise/tiny/lora-s1-seed1", images, "--out", out)
    assert result.code == 0, result.err
    text = sound(out)
    assert "Generated images" in text
    assert "1 run on one task" in text


def test_images_whose_sources_are_gone_are_shown_and_it_is_said(script, synthetic, tmp_path):
    copy = shutil.copytree(synthetic(shots=4), tmp_path / "images")
    rows = [json.loads(line) for line in (copy / "manifest.jsonl").read_text().splitlines()]
    for row in rows:
        row["captioned"] = row["repainted"] = "/nowhere/a.png"
        row["caption"] = HOSTILE[0]
    (copy / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = script("report", copy)
    assert result.code == 0, result.err
    text = sound(copy / "report.html")
    assert "1 real pictures are not in their place, such as /nowhere/a.png" in text
    assert "&lt;script&gt;alert(1)" in text
    assert text.count("data:image/jpeg") == len(rows)
