"""report.py whole: its numbers are results.json's, its pages say what is missing, and no name of a
class becomes part of a page.
"""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, f1_score

from fewshot import predictions
from tests.made_up_run import HOSTILE, make

HALVES = {"base": ["rose", "tulip", "daisy"], "novel": ["iris", "lily"]}
VOID = {"br", "hr", "img", "input", "meta"}


class Nesting(HTMLParser):
    """Checks that elements close in order and that ids are there once."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.scripts = [], [], [], 0

    def handle_starttag(self, name, attributes):
        attributes = dict(attributes)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        self.links += [attributes[key] for key in ("src", "href") if key in attributes]
        self.scripts += name == "script"
        assert not any(key.startswith("on") for key in attributes)
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.handle_starttag(name, attributes)
        if name not in VOID:
            self.open.pop()

    def handle_endtag(self, name):
        assert self.open.pop() == name


def sound(file: Path) -> str:
    """The text of a page that is well-formed and stands alone."""
    text = file.read_text("utf-8")
    page = Nesting()
    page.feed(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith(("data:image/", "#")) for link in page.links), page.links
    assert page.scripts == 1
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttp|innerHTML|eval\(", text)
    return text


def told(script, *flags) -> dict:
    """What --format json writes."""
    result = script("report", *flags, "--format", "json")
    assert result.code == 0, result.err
    return json.loads(Path(result.out.splitlines()[-1].removeprefix("report: ")).read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("runs") / "lora-s2-seed1", HALVES, each=12, sure=1.5)


@pytest.fixture(scope="module")
def real(trained, tmp_path_factory) -> Path:
    """A copy of a run that was trained, for its page to be written into."""
    return shutil.copytree(trained.path, tmp_path_factory.mktemp("real") / "run")


def test_every_score_is_that_of_results_json(script, run):
    found = told(script, run)
    results = json.loads((run / "results.json").read_text())
    for key in ("base", "novel", "hm", "all", "joint"):
        assert found["scores"]["method"][key] == results[key]
        assert found["scores"]["zero_shot"][key] == results["zero_shot"][key]
    for part, of in found["parts"].items():
        assert of.keys() == {"images", "top1", "top5", "macro_accuracy", "macro_f1"}
        assert all(of[key] == results["parts"][part][key] for key in of)
    for row in found["classes"]:
        of = results["parts"][row["part"]]["classes"][row["name"]]
        assert (row["accuracy"], row["f1"]) == (of["accuracy"], of["f1"])
        assert row["weak"] == (of["f1"] < 70)
    assert [row["f1"] for row in found["classes"]] == sorted(row["f1"] for row in found["classes"])
    for key in ("parameters", "seconds", "peak_memory_mb", "steps"):
        assert found["cost"][key] == results[key]
    for part in ("train", "val"):
        assert found["training"][f"{part}_accuracy"] == results[part]


def test_what_results_json_has_not_follows_from_the_answers(script, run):
    """Each scope beside scikit-learn, on the labels and answers of the file."""
    found = told(script, run)
    rows = predictions.read(run / predictions.FILE, HALVES)
    mine, zero = rows["lora"], rows["zero-shot"]
    for part, names in HALVES.items():
        labels, top = mine[part].labels.numpy(), mine[part].top.numpy()
        matrix = np.zeros((len(names), len(names)), int)
        for i, j, times in found["scopes"][part]["confusions"]:
            matrix[i, j] = times
        assert (matrix == confusion_matrix(labels, top[:, 0], labels=range(len(names)))).all()
        before = f1_score(labels, zero[part].top[:, 0], average=None, zero_division=0)
        after = f1_score(labels, top[:, 0], average=None, zero_division=0)
        for row in found["classes"]:
            if row["part"] == part:
                k = names.index(row["name"])
                assert row["f1_change"] == pytest.approx(100 * (after[k] - before[k]))
    joint = found["scopes"]["joint"]
    every = np.concatenate([mine["base"].labels, mine["novel"].labels + 3])
    guess = np.concatenate([mine[part].joint_top[:, 0] for part in HALVES])
    assert joint["top1"] == pytest.approx(100 * (every == guess).mean())
    before = np.concatenate([zero[part].joint_top[:, 0] for part in HALVES])
    changed = joint["zero_shot"]["changed"]
    assert changed["gained"] == ((guess == every) & (before != every)).sum()
    assert changed["lost"] == ((guess != every) & (before == every)).sum()
    assert joint["names"] == HALVES["base"] + HALVES["novel"]


def cells(page: str, table: str) -> list[list[str]]:
    """The text of a table of a page, row by row."""
    rows = re.search(f'<table[^>]*id="{table}".*?</table>', page, re.DOTALL)[0].split("<tr")[1:]
    return [
        [re.sub("<[^>]+>", "", cell).strip() for cell in re.findall(r"<t[dh].*?</t[dh]>", row)]
        for row in rows
    ]


def test_the_page_shows_the_numbers(script, run, tmp_path):
    assert script("report", run, "--out", tmp_path / "page.html", "--quick").code == 0
    page, found = sound(tmp_path / "page.html"), told(script, run)
    results = json.loads((run / "results.json").read_text())
    for key, row in zip(("base", "novel", "hm"), cells(page, "scores")[1:], strict=False):
        before, after = results["zero_shot"][key], results[key]
        assert row[1:4] == [
            f"{before:.2f}",
            f"{after:.2f}",
            f"{after - before:+.2f}".replace("-", "−"),
        ]
        if key != "hm":
            count = results["parts"][key]["images"]
            low, high = proportion(round(after * count / 100), count)
            assert row[4] == f"{100 * low:.1f} to {100 * high:.1f}"
            assert found["intervals"][key] == pytest.approx([100 * low, 100 * high], abs=1e-4)
    changed = found["scopes"]["joint"]["zero_shot"]["changed"]
    assert changed["gained"] != changed["lost"]
    assert (
        f"{changed['gained']} pictures are right that zero-shot had wrong, {changed['lost']} are"
        in page
    )


def proportion(right: int, count: int) -> tuple[float, float]:
    """SciPy's interval of Wilson."""
    interval = binomtest(right, count).proportion_ci(0.95, method="wilson")
    return interval.low, interval.high


def test_a_confused_pair_is_shown_by_its_surest_pictures(script, run):
    answers = predictions.read(run / predictions.FILE, HALVES)["lora"]
    shown = 0
    for part in HALVES:
        of = answers[part]
        labels, top, sure = (t.numpy() for t in (of.labels, of.top, of.probabilities))
        for pair in told(script, run)["scopes"][part]["pairs"]:
            ways = ((pair["a"], pair["b"]), (pair["b"], pair["a"]))
            for (true, taken), i in zip(ways, pair["pictures"], strict=True):
                mine = (labels == true) & (top[:, 0] == taken)
                if mine.any():
                    assert mine[i]
                    assert sure[i, 0] == sure[mine, 0].max()
                    shown += 1
    assert shown > 3


def test_counts_are_those_of_data_json(script, run):
    counts = told(script, run)["counts"]
    assert counts == {
        "train": [2, 2, 2],
        "val": [1, 1, 1],
        "base test": [12, 12, 12],
        "novel test": [12, 12],
    }


@pytest.mark.parametrize(
    ("keep", "kept"), [("latest-best", 30), ("best", 20), ("last", 40), ("mean", None)]
)
def test_the_kept_round_is_the_loops(script, run, tmp_path, keep, kept):
    copy = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    config["settings"]["keep"] = keep
    (copy / "config.json").write_text(json.dumps(config))
    assert told(script, copy)["training"]["kept_step"] == kept


def test_the_kept_round_of_a_real_run_is_where_the_loop_left_its_best(script, real):
    best = json.loads((real / "resume.json").read_text())["best_step"]
    assert told(script, real, "--quick")["training"]["kept_step"] == best


def test_a_page_shows_the_numbers_and_stands_alone(script, run):
    result = script("report", run)
    assert result.code == 0, result.err
    text = sound(run / "report.html")
    results = json.loads((run / "results.json").read_text())
    for value in (results["base"], results["novel"], results["hm"], results["joint"]["hm"]):
        assert f"{value:.2f}" in text
    assert "pictures and features could not be loaded" in text
    assert "1,234" in text


def test_pictures_and_features_of_a_real_run(script, real):
    result = script("report", real)
    assert result.code == 0, result.err
    text = sound(real / "report.html")
    assert "What is missing here" not in text
    found = told(script, real)
    features = found["features"]
    assert len(features["labels"]) == len(features["after"]["images"]) == 20
    assert len(features["before"]["texts"]) == len(features["names"]) == 5
    assert features["before"]["gap"] != features["after"]["gap"]
    wrong = sum(len(s["mistakes"]) for key, s in found["scopes"].items() if key == "joint")
    assert text.count("data:image/jpeg") >= wrong > 0
    assert "picture not found" not in text


def test_thumbnails_are_of_the_pictures_that_are_named(script, real):
    """Each class of the noise has a colour of its own."""
    import base64
    import io

    from PIL import Image

    from tests.scripts.conftest import COLOURS

    script("report", real)
    text = (real / "report.html").read_text()
    images = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)" alt="([^",]+), taken', text)
    assert images
    for data, name in images:
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        seen = np.asarray(image, dtype=float).mean((0, 1))
        near = min(COLOURS, key=lambda c: np.abs(seen - COLOURS[c]).sum())
        assert re.sub("[_-]", " ", near) == name


def test_train_writes_the_page_or_names_the_command(script, flags, trained, real, tmp_path):
    assert trained.out.splitlines()[-1] == f"report: python report.py {trained.path}"
    result = script("train", *flags, "--out", tmp_path, "--report")
    assert result.code == 0, result.err
    file = tmp_path / "noise/tiny/lora-s4-seed1/report.html"
    assert result.out.splitlines()[-1] == f"report: {file}"
    here, text = sound(file), "The shared space"
    assert text in here
    script("report", real)  # the same run, read back
    there = (real / "report.html").read_text()
    gap = re.compile(r"is [\d.]+ for zero-shot CLIP and [\d.]+ after")
    assert gap.findall(here) == gap.findall(there) != []


@pytest.mark.parametrize("method", ["linear_probe", "tip_adapter", "cocoop", "gda", "em_dirichlet"])
def test_every_kind_of_method_has_a_page(script, data, model, tmp_path, method):
    flags = ["--dataset", "folder", "--data-root", data, "--model", model, "--shots", 4]
    more = ["--epochs", 1] if method == "cocoop" else []
    result = script("train", "--method", method, *flags, *more, "--out", tmp_path)
    assert result.code == 0, result.err
    path = next(tmp_path.rglob("results.json")).parent
    assert script("report", path).code == 0
    text = sound(path / "report.html")
    if method == "linear_probe":
        assert "does not compare image features with text features" in text
    if method == "em_dirichlet":
        assert "label test images jointly" in text


# ---------------------------------------------------------------------------------- what is missing


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("results.json", "no results.json: training has not ended"),
        (predictions.FILE, "no predictions.safetensors: runs of earlier versions"),
        ("data.json", "no data.json of this run"),
        ("log.jsonl", None),
    ],
)
def test_a_run_without_one_of_its_files_shows_the_rest(script, run, tmp_path, lost, said):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / lost).unlink()
    result = script("report", copy)
    assert result.code == 0, result.err
    text = sound(copy / "report.html")
    assert said is None or said in text
    assert "learned" not in text or "rose" in text


@pytest.mark.parametrize("file", ["results.json", "predictions.safetensors", "log.jsonl"])
def test_a_half_written_file_is_said_and_the_rest_is_shown(script, run, tmp_path, file):
    copy = shutil.copytree(run, tmp_path / "run")
    whole = (copy / file).read_bytes()
    (copy / file).write_bytes(whole[: len(whole) // 2])
    result = script("report", copy)
    assert result.code == 0, result.err
    assert file in sound(copy / "report.html")


def test_a_log_of_wrong_accuracies_is_said_and_the_rest_is_shown(script, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    line = {"step": 1, "epoch": 1.0, "loss": 1.0, "seconds": 1.0, "val": 50.0, "train": [50.0]}
    (copy / "log.jsonl").write_text(json.dumps(line) + "\n")
    result = script("report", copy)
    assert result.code == 0, result.err
    assert "train is [50.0], expected a finite number" in sound(copy / "report.html")


def test_a_part_that_is_none_of_a_run_is_said_and_the_rest_is_shown(script, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    results = json.loads((copy / "results.json").read_text())
    results["parts"]["oovel"] = results["parts"].pop("novel")
    (copy / "results.json").write_text(json.dumps(results))
    result = script("report", copy)
    assert result.code == 0, result.err
    assert "parts.oovel is unknown, expected base, novel, all" in sound(copy / "report.html")


@pytest.mark.parametrize("images", [None, -5, 0])
def test_a_part_without_a_count_is_said_and_the_rest_is_shown(images, script, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    results = json.loads((copy / "results.json").read_text())
    results["parts"]["base"].pop("images")
    results["parts"]["base"] |= {} if images is None else {"images": images}
    (copy / "results.json").write_text(json.dumps(results))
    result = script("report", copy, "--quick")
    assert result.code == 0, result.err
    assert "parts.base.images is no count, expected 1 or more" in sound(copy / "report.html")


def test_a_run_before_its_first_round_has_a_page(script, run, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(run / "config.json", tmp_path / "run")
    assert script("report", tmp_path / "run").code == 0
    assert "training has not ended" in sound(tmp_path / "run/report.html")


def test_what_is_no_run_is_one_line(script, is_one_line, tmp_path, run):
    (tmp_path / "empty").mkdir()
    many = script(
        "report", run, tmp_path / "none", tmp_path / "empty", "--out", tmp_path / "p.html"
    )
    assert many.code == 0
    assert (
        f"{tmp_path}/empty: contains neither runs" in many.out + (tmp_path / "p.html").read_text()
    )
    assert is_one_line(script("report", tmp_path / "empty"), "contains neither runs (config.json)")
    assert is_one_line(script("report", tmp_path / "none"), "there is no such folder")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    assert is_one_line(script("report", tmp_path / "broken"), "broken/config.json")
    assert is_one_line(script("report", run, "--format", "pdf"), "--format")


# ------------------------------------------------------------------------------------ hostile names


def test_names_of_classes_are_text(script, tmp_path):
    names = {"base": HOSTILE[:4], "novel": HOSTILE[4:6] + [HOSTILE[7]]}
    path = make(tmp_path / "run", names, each=6, sure=1.0)
    assert script("report", path).code == 0
    text = sound(path / "report.html")
    assert "<script>alert" not in text
    assert "onerror=alert" not in text.replace("&lt;img src=x onerror=alert(1)&gt;", "")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert {row["name"] for row in told(script, path)["classes"]} == {*sum(names.values(), [])}


def test_a_page_of_102_classes_is_under_8_mb(script, tmp_path):
    names = [f"species {k} of a flower" for k in range(102)]
    path = make(tmp_path / "run", {"base": names[:51], "novel": names[51:]}, each=20)
    assert script("report", path).code == 0
    assert (path / "report.html").stat().st_size < 8e6
    sound(path / "report.html")
