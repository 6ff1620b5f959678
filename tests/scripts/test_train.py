"""Training from the command line: what it leaves, what repeats, and what it says when it cannot."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import byhand
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import clip_min
import train as train_script
from clip_min import UserError
from fewshot import demo
from fewshot.run import Run
from fewshot.schedule import Length
from methods import METHODS, TrainingSettings
from methods.base import Augment
from methods.interop.command import Plan, parse

BASE, NOVEL = ["amber_lily", "blue-bell", "cyan lotus"], ["dark-iris", "egg flower"]
HERE = "noise/tiny/lora-s4-seed1"
FILES = [
    "adapter.safetensors",
    "config.json",
    "curves.png",
    "data.json",
    "log.jsonl",
    "predictions.safetensors",
    "results.json",
    "resume.json",
    "resume.safetensors",
]


def plan_of(argv: list[str]) -> Plan:
    ((plan,), _) = parse(argv, "")
    return plan


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def adapter(run: Path) -> bytes:
    return (run / "adapter.safetensors").read_bytes()


def log(run: Path) -> list[dict]:
    """Epochs, losses and validation accuracies; seconds are never the same."""
    lines = (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").exists() else []
    return [json.loads(line) | {"seconds": 0} for line in lines]


def epochs(run: Path) -> list[int]:
    return [line["epoch"] for line in log(run)]


def hm(base: float, novel: float) -> float:
    return 2 * base * novel / (base + novel) if base + novel else 0


# --------------------------------------------------------------------------------- what it leaves


def test_a_run_leaves_these_files(trained):
    assert sorted(path.name for path in trained.path.iterdir()) == FILES


def test_results_equal_those_computed_from_the_adapter_alone(trained, data):
    found = results(trained.path)
    clip = byhand.merged_clip(trained.path)
    base, novel = (byhand.accuracy(clip, data / "test", names) for names in (BASE, NOVEL))
    assert found["base"] == pytest.approx(base)
    assert found["novel"] == pytest.approx(novel)
    assert found["hm"] == pytest.approx(hm(base, novel))
    assert found["base"] > 60  # it has learned


def test_zero_shot_results_equal_those_of_the_model_alone(trained, data, model):
    found = results(trained.path)["zero_shot"]
    clip = clip_min.load(model)
    base, novel = (byhand.accuracy(clip, data / "test", names) for names in (BASE, NOVEL))
    assert found["base"] == pytest.approx(base)
    assert found["novel"] == pytest.approx(novel)
    assert found["hm"] == pytest.approx(hm(base, novel))


def test_results_have_every_class_and_what_it_cost(trained):
    found = results(trained.path)
    parts = found["parts"]
    assert list(parts["base"]["classes"]) == ["amber lily", "blue bell", "cyan lotus"]
    assert list(parts["novel"]["classes"]) == ["dark iris", "egg flower"]
    for part, count in (("base", 12), ("novel", 8)):
        each = [c["accuracy"] for c in parts[part]["classes"].values()]
        assert parts[part]["images"] == count
        assert sum(each) / len(each) == pytest.approx(found[part])  # as many of each class
    saved = load_file(trained.path / "adapter.safetensors")
    assert found["parameters"] == sum(tensor.numel() for tensor in saved.values())
    assert found["parameters"] == 2 * 2 * (2 * 4 * 64) + 2 * 2 * (2 * 3 * 64)
    seconds = [json.loads(line)["seconds"] for line in (trained.path / "log.jsonl").open()]
    assert found["seconds"] == seconds[-1]
    assert found["peak_memory_mb"] > 100


def test_the_config_has_all_that_made_the_run(trained, data, model):
    config = json.loads((trained.path / "config.json").read_text())
    assert config["method"] == "lora"
    assert config["settings"]["lr"] == 0.01
    assert config["settings"]["dropout"] == 0.1  # not given: the recipe's
    assert config["experiment"]["data_root"] == str(data)
    assert config["experiment"]["template"] == "a photo of a {}."
    assert config["model"] == str(model)
    assert config["classnames"]["novel"] == ["dark iris", "egg flower"]
    assert config["argv"][:3] == ["train.py", "--method", "lora"]
    assert "torch" in config["versions"]


def test_what_is_printed_is_what_is_saved(trained):
    found, lines = results(trained.path), trained.out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line}
    for name, scores in (("lora", found), ("zero-shot", found["zero_shot"])):
        numbers = [scores["base"], scores["novel"], scores["hm"], scores["joint"]["hm"]]
        assert rows[name] == [f"{number:.2f}" for number in numbers]
    assert f"{found['parameters']:,} trained parameters" in trained.out
    assert lines[-2] == f"adapter: {trained.path}/adapter.safetensors"
    assert "3 classes to learn from 12 images (12 for validation)" in trained.out
    assert "test images: 12 base, 8 novel" in trained.out
    assert trained.err == ""


def test_what_is_to_come_is_said_and_what_has_hardly_learned(trained, script, flags, tmp_path):
    """trained: 3 base classes, 4 shots."""
    found = results(trained.path)
    assert f"{found['steps']} gradient steps of 4 images, " in trained.out
    assert f"note: only {found['steps']} gradient steps" in trained.out
    short = ("--epochs", 1, "--lr", 0, "--out", tmp_path)
    result = script("train", *flags, *short)
    found = results(tmp_path / HERE)
    assert f"note: training accuracy is only {found['train']:.1f} %" in result.out


def test_the_demo_set_trains_on_any_model(script, model, tmp_path):
    few = ("--shots", 1, "--epochs", 1, "--image-rank", 2, "--text-rank", 2)
    result = script("train", "--method", "lora", "--model", model, *few, "--out", tmp_path)
    assert result.code == 0, result.err
    found = results(tmp_path / "demo/tiny/lora-s1-seed1")
    assert [found["parts"][part]["images"] for part in ("base", "novel")] == [510, 510]
    names = [list(found["parts"][part]["classes"]) for part in ("base", "novel")]
    assert names == [demo.CLASSNAMES[:51], demo.CLASSNAMES[51:]]
    assert found["hm"] == pytest.approx(hm(found["base"], found["novel"]))
    assert "51 classes to learn from 51 images (510 for validation)" in result.out


def test_on_the_demo_zero_shot_is_fair_and_lora_adds_ten_points(script, tmp_path):
    """With fewer shots and epochs than the default, and still so."""
    short = ("--shots", 4, "--epochs", 2, "--out", tmp_path)
    result = script("train", "--method", "lora", *short)  # the model is the demo's own
    assert result.code == 0, result.err
    assert "recipe demo, with epochs 2\n" in result.out
    found = results(tmp_path / "demo/demo/lora-s4-seed1")
    clip, (images, labels) = clip_min.load("demo"), demo.split("test")
    for part, half in (("base", slice(0, 51)), ("novel", slice(51, 102))):
        names = [demo.TEMPLATE.format(name) for name in demo.CLASSNAMES[half]]
        mine = (labels >= half.start) & (labels < half.stop)
        with torch.no_grad():
            best = clip(clip_min.normalize(images[mine]), clip_min.tokenize(names)).argmax(dim=1)
        by_hand = 100 * (best == labels[mine] - half.start).double().mean().item()
        assert found["zero_shot"][part] == pytest.approx(by_hand, abs=0.2)  # one picture in 510
        assert 40 < by_hand < 80  # chance is 2
    assert found["base"] > found["zero_shot"]["base"] + 10
    assert found["hm"] > found["zero_shot"]["hm"] + 5


def test_real_photographs_train(script, model, flowers12, tmp_path):
    few = ("--shots", 2, "--epochs", 1, "--image-rank", 2, "--text-rank", 2)
    common = ("--dataset", "folder", "--data-root", flowers12, "--model", model, *few)
    result = script("train", "--method", "lora", *common, "--out", tmp_path)
    assert result.code == 0, result.err
    (run,) = tmp_path.glob("*/tiny/lora-s2-seed1")
    names = [p.name.replace("-", " ") for p in sorted((flowers12 / "test").iterdir())]
    for part, expected in (("base", names[:6]), ("novel", names[6:])):
        assert list(results(run)["parts"][part]["classes"]) == expected
    assert "6 classes to learn from 12 images" in result.out


def test_all_classes_are_learned_and_scored_together(train, tmp_path, data, model):
    run = train(tmp_path, "--classes", "all")
    assert run == tmp_path / "noise-all/tiny/lora-s4-seed1"
    found = results(run)
    assert found["base"] is found["novel"] is found["hm"] is None
    clip = byhand.merged_clip(run)
    assert found["all"] == pytest.approx(byhand.accuracy(clip, data / "test", BASE + NOVEL))
    zero_shot = byhand.accuracy(clip_min.load(model), data / "test", BASE + NOVEL)
    assert found["zero_shot"]["all"] == pytest.approx(zero_shot)


def test_zero_shot_is_a_method_that_learns_nothing(script, tmp_path, data, model):
    common = ("--dataset", "folder", "--data-root", data, "--model", model, "--out", tmp_path)
    result = script("train", "--method", "zero_shot", *common)
    assert result.code == 0, result.err
    run = tmp_path / "noise/tiny/zero_shot-s10-seed1"
    found = results(run)
    assert found["parameters"] == 0
    assert {part: found[part] for part in found["zero_shot"]} == found["zero_shot"]
    assert load_file(run / "adapter.safetensors") == {}


# ----------------------------------------------------------------------------------- what repeats


def test_one_seed_gives_one_adapter_to_the_byte_and_another_seed_another(train, trained, tmp_path):
    assert adapter(train(tmp_path / "again")) == adapter(trained.path)
    other = train(tmp_path / "other", "--seed", 2)
    assert other.name == "lora-s4-seed2"
    assert adapter(other) != adapter(trained.path)


def test_test_pictures_never_influence_the_adapter(train, trained, data, draw, tmp_path):
    moved = tmp_path / "noise"
    shutil.copytree(data, moved)
    shutil.rmtree(moved / "test")
    draw(moved / "test", 3, seed=99)  # other noise, and less of it
    for name in BASE:
        Image.new("RGB", (40, 36), "white").save(moved / "test" / name / "0.png")
    run = train(tmp_path / "runs", "--data-root", moved)
    assert adapter(run) == adapter(trained.path)
    assert log(run) == log(trained.path)
    assert results(run)["parts"]["base"]["images"] == 9


def test_augmentation_and_paper_recipe_train(train, trained, tmp_path):
    paper = ("--recipe", "paper", "--steps-per-shot", 2, "--schedule", "step")
    run = train(tmp_path, *paper)
    settings = json.loads((run / "config.json").read_text())["settings"]
    assert (settings["augment"], settings["scaling"]) == ("crop-flip", "sqrt")
    assert (settings["image_rank"], settings["lr"]) == (4, 0.01)  # a flag wins over a recipe
    assert epochs(run) == [1, 2, 2.67]  # 8 steps of 3 in an epoch
    assert adapter(run) != adapter(trained.path)


# ------------------------------------------------------------------------------ killed and resumed


def test_a_process_killed_in_mid_epoch_resumes_to_the_same_bytes(
    script, train, flags, tmp_path, root
):
    long = ("--epochs", 60, "--validations", 0, "--augment", "crop-flip")
    whole = train(tmp_path / "whole", *long)
    killed = tmp_path / "killed" / HERE
    command = [sys.executable, root / "train.py", *flags, "--out", tmp_path / "killed", *long]
    process = subprocess.Popen(
        [str(part) for part in command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not epochs(killed) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 1 <= len(epochs(killed)) < 60
    assert not (killed / "results.json").exists()
    (killed / ".clip_min-resume.json-abcdefgh").mkdir()  # as where the kill came while it wrote

    result = script("train", *flags, "--out", tmp_path / "killed", *long, "--resume")
    assert result.code == 0, result.err
    assert adapter(killed) == adapter(whole)
    assert log(killed) == log(whole)
    assert epochs(killed) == list(range(1, 61))
    same = [results(run) | {"seconds": 0, "peak_memory_mb": 0} for run in (killed, whole)]
    assert same[0] == same[1]
    assert sorted(path.name for path in killed.iterdir()) == FILES  # no temporary file is left


def test_a_disk_that_fills_up_is_one_line_and_the_run_can_be_resumed(
    script, flags, trained, tmp_path, is_one_line, monkeypatch
):
    real, left = clip_min.files.save_file, iter(range(3))

    def save(*arguments, **options):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(clip_min.files, "save_file", save)
    result = script("train", *flags, "--out", tmp_path)
    assert is_one_line(result, "No space left on device", ".safetensors")
    monkeypatch.undo()
    assert script("train", *flags, "--out", tmp_path, "--resume").code == 0
    assert adapter(tmp_path / HERE) == adapter(trained.path)


def test_resuming_a_run_that_was_over_repeats_its_results(script, flags, train, tmp_path):
    run = train(tmp_path)
    before = results(run), adapter(run)
    assert script("train", *flags, "--out", tmp_path, "--resume").code == 0
    same = [found | {"peak_memory_mb": 0} for found in (before[0], results(run))]
    assert same[0] == same[1]
    assert adapter(run) == before[1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--lr", 0.02), "lr 0.01, not 0.02"),
        (("--template", "a {}"), "template a photo of a {}., not a {}"),
        (("--recipe", "paper"), "recipe default, not paper"),
    ],
)
def test_resuming_with_other_flags_is_an_error_that_names_one(
    more, said, script, flags, trained, is_one_line
):
    out = trained.path.parents[2]
    result = script("train", *flags, "--out", out, *more, "--resume")
    assert is_one_line(result, "--resume", said)


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_resuming_on_changed_pictures_is_an_error(
    part, script, flags, train, own_data, tmp_path, is_one_line
):
    path = train(tmp_path / "runs", "--data-root", own_data)
    file, *_ = json.loads((path / "data.json").read_text())[part][0]
    stat = (own_data / file).stat()
    Image.new("RGB", (40, 36), "red").save(own_data / file)
    os.utime(own_data / file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    before = (path / "data.json").read_bytes()
    more = ("--data-root", own_data, "--out", tmp_path / "runs", "--resume")
    assert is_one_line(script("train", *flags, *more), f"was started with {part} ", "pictures (")
    assert (path / "data.json").read_bytes() == before


def test_a_run_of_an_earlier_version_goes_on(script, flags, train, tmp_path):
    path = train(tmp_path)
    config = json.loads((path / "config.json").read_text())
    del config["data"]
    (path / "config.json").write_text(json.dumps(config))
    (path / "data.json").unlink()
    assert script("train", *flags, "--out", tmp_path, "--resume").code == 0
    assert not (path / "data.json").exists()  # nobody knows what it was begun on


def test_all_shots_are_all_pictures_and_the_folder_says_so(script, train, tmp_path):
    path = train(tmp_path, "--shots", "all", "--epochs", 1)
    assert path.name == "lora-sall-seed1"
    record = json.loads((path / "data.json").read_text())
    assert [len(record[part]) for part in ("train", "val", "test")] == [21, 3, 20]
    assert json.loads((path / "config.json").read_text())["experiment"]["shots"] == "all"
    result = script("eval", "--run", path)
    assert (result.code, result.err) == (0, "")


def test_resuming_where_there_is_nothing_is_an_error(script, flags, tmp_path, is_one_line):
    result = script("train", *flags, "--out", tmp_path, "--resume")
    assert is_one_line(result, str(tmp_path / HERE), "there is no such file")
    assert list(tmp_path.iterdir()) == []


def test_resuming_on_another_model_under_the_same_name_is_an_error(
    script, flags, trained, new_model, is_one_line
):
    out = trained.path.parents[2]
    result = script("train", *flags, "--out", out, "--model", new_model(1), "--resume")
    assert is_one_line(result, "--resume", "not")


def test_an_earlier_run_is_kept_under_another_name(train, script, flags, tmp_path):
    first = train(tmp_path)
    before = adapter(first)
    result = script("train", *flags, "--out", tmp_path, "--seed", 1, "--lr", 0.001)
    old = first.with_name(first.name + ".old1")
    assert f"an earlier run is kept as {old}" in result.out
    assert adapter(old) == before
    assert adapter(first) != before
    assert json.loads((first / "config.json").read_text())["earlier_run"] == old.name
    assert script("train", *flags, "--out", tmp_path, "--lr", 0.001, "--resume").code == 0


# ---------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--method", "lorra"], "--method lorra: unknown; did you mean lora"),
        (["--recipe", "papper"], "--recipe papper: unknown; did you mean paper"),
        (["--dataset", "flower102"], "--dataset flower102: unknown; did you mean flowers102"),
        (["--model", "ViT-B/15"], "ViT-B/16"),
        (["--model", "nowhere.safetensors"], "nowhere.safetensors: neither a weights file nor"),
        (["--imagerank", "3"], "unknown argument --imagerank; did you mean --image-rank"),
        (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
        (["--lr", "-1"], "--lr -1.0: expected 0 or more"),
        (["--batch-size", "0"], "--batch-size 0: expected 1 or more"),
        (["--image-rank", "0"], "--image-rank 0: expected 1 or more"),
        (["--dropout", "2"], "--dropout 2.0: expected 0 to 1"),
        (["--shots", "0"], "--shots 0: expected 1 or more"),
        (["--seed", "-1"], "--seed -1: expected 0 to"),
        (["--classes", "some"], "--classes: invalid choice: 'some'"),
        (["--parts", "xyz"], "--parts 'xyz': expected different letters"),
        (["--blocks", "7"], "--blocks '7': expected all, or numbers below 2"),
        (["--template", "a flower"], "--template 'a flower' has no {}"),
        (["--device", "warp"], "--device warp: cannot be used"),
        (["--data-root", "nowhere"], "--data-root nowhere: there is no such folder"),
        (["--dataset", "demo"], "--data-root"),  # given, but the demo reads none
        (["extra"], "unknown argument extra"),
    ],
)
def test_a_mistake_is_one_line_and_costs_no_earlier_run(
    more, said, script, flags, tmp_path, is_one_line, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    earlier = tmp_path / "runs" / HERE
    earlier.mkdir(parents=True)
    (earlier / "config.json").write_text("precious")
    assert is_one_line(script("train", *flags, *more), said)
    found = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert found == [Path("runs") / HERE / "config.json"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--parts", "qz"], "--parts 'qz': expected different letters"),
        (["--blocks", "0,2"], "--blocks '0,2': expected all, or numbers below 2"),
        (["--method", "vpt", "--first-block", "2"], "--first-block 2: expected 0 to 1"),
        (["--method", "finetune", "--train", "last-3"], "--train last-3: expected both"),
        (["--method", "coop", "--n-ctx", "5"], "--n-ctx 5: --ctx-init 'a photo of a' has 4"),
        (["--method", "disef", "--blocks", "7"], "--blocks '7': expected all"),
        (["--init-from", "nowhere"], "--init-from nowhere: there is no such folder"),
    ],
)
def test_a_setting_that_the_model_cannot_have_is_told_before_any_work(
    more, said, script, data, model, tmp_path, is_one_line, monkeypatch
):
    def work(*_):
        raise AssertionError("the mistake was not yet told")

    monkeypatch.setattr(train_script, "evaluate", work)
    monkeypatch.setattr(train_script, "add_synthetic", work)
    where = ("--dataset", "folder", "--data-root", data, "--model", model, "--out", tmp_path)
    assert is_one_line(script("train", "--method", "lora", *where, *more), said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_made_on_a_model_without_weights(method):
    """It is how train.py finds such mistakes."""
    kind = METHODS[method]
    for recipe in kind.recipes.values():
        if recipe.get("train"):  # the last six blocks, and here there are three
            recipe = {**recipe, "train": "last-3"}
        with torch.device("meta"):
            empty = clip_min.CLIP(clip_min.CONFIGS["demo"])
        made = kind(empty, ["rose", "red tulip"], "a {}.", kind.Settings(**recipe))
        assert all(parameter.is_meta for parameter in made.parameters())


def test_without_a_method_all_of_them_are_listed(script, is_one_line):
    assert is_one_line(script("train"), "--method is missing", "zero_shot", "lora")
    assert is_one_line(script("train", "--metod", "lora"), "did you mean --method")


def test_a_process_that_fails_ends_with_code_2_and_one_line(root, tmp_path, is_one_line):
    result = subprocess.run(
        [sys.executable, root / "train.py", "--method", "lorra"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    result.code, result.out, result.err = result.returncode, result.stdout, result.stderr
    assert is_one_line(result, "train.py: error: --method lorra: unknown; did you mean lora")
    assert result.out == ""


@pytest.fixture
def own_data(data, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(data, tmp_path / "mine"))


def test_a_class_name_too_long_for_a_prompt_is_one_line_that_shows_it(
    script, flags, own_data, tmp_path, is_one_line
):
    name = " ".join(["q7"] * 75)  # two tokens each
    for part in ("train", "test"):
        (own_data / part / "amber_lily").rename(own_data / part / name)
    result = script("train", *flags, "--data-root", own_data, "--out", tmp_path / "runs")
    assert is_one_line(result, name, "77")
    assert not (tmp_path / "runs").exists()


def test_long_and_strange_class_names_train(script, flags, own_data, tmp_path):
    names = ["very " * 45 + "long", "🌹 {} a..b"]
    for part in ("train", "test"):
        for old, new in zip(NOVEL, names, strict=True):
            (own_data / part / old).rename(own_data / part / new)
    result = script("train", *flags, "--data-root", own_data, "--out", tmp_path)
    assert result.code == 0, result.err
    found = results(tmp_path / "mine/tiny/lora-s4-seed1")["parts"]
    classes = {name for part in found.values() for name in part["classes"]}
    assert set(names) < classes


def test_an_unreadable_picture_is_one_line_or_left_out_and_listed(
    script, flags, own_data, tmp_path, is_one_line
):
    bad = own_data / "test/blue-bell/2.png"
    bad.write_bytes(b"no picture")
    mine = ("--data-root", own_data, "--out", tmp_path)
    result = script("train", *flags, *mine)
    assert is_one_line(result, str(bad), "--skip-bad-images")
    result = script("train", *flags, *mine, "--skip-bad-images")
    assert result.code == 0, result.err
    assert f"note: skipped 1 unreadable files: {bad}" in result.out
    assert results(tmp_path / "mine/tiny/lora-s4-seed1")["parts"]["base"]["images"] == 11


def test_classes_shorter_than_the_shots_train_and_are_noted(script, flags, own_data, tmp_path):
    for i in range(2, 8):
        (own_data / f"train/blue-bell/{i}.png").unlink()
    result = script("train", *flags, "--data-root", own_data, "--out", tmp_path)
    assert result.code == 0, result.err
    assert "note: fewer than 4 training images in 1 classes: blue bell 1" in result.out


# ------------------------------------------------------------------------------ flags and recipes


def test_help_of_a_method_shows_its_settings_with_its_defaults(script):
    result = script("train", "--method", "lora", "--help")
    shown = " ".join(result.out.split())
    assert result.code == 0
    assert "--image-rank INT R in the image tower [16]" in shown  # the demo's recipe
    heads = ["common settings:", "lora, recipe demo (of default, notebook, paper, demo):"]
    heads = [shown.index(head) for head in (*heads, "training:", "experiment:", "run:")]
    assert heads == sorted(heads)
    first = ("method", "dataset", "data-root", "model", "shots", "seed", "seeds", "epochs", "lr")
    for name in (*first, "batch-size", "image-rank", "text-rank", "out"):
        assert shown.index(f"--{name} ", heads[0]) < heads[1]
    assert "[--" not in shown  # no wall of flags stands before them
    assert shown.index("--image-alpha ") < heads[2] < shown.index("--weight-decay ") < heads[3]
    result = script("train", "--method", "lora", "--recipe", "paper", "--help")
    assert "--image-rank INT R in the image tower [2]" in " ".join(result.out.split())
    assert "--image-rank" not in script("train", "--method", "zero_shot", "--help").out


def test_help_without_a_method_lists_the_methods(script):
    result = script("train", "--help")
    assert result.code == 0
    assert "zero_shot     CLIP as it is" in result.out
    assert "--shots" in result.out


@pytest.mark.parametrize(
    ("argv", "recipe", "lr", "model"),
    [
        ([], "demo", 2e-3, "demo"),
        (["--dataset", "demo"], "demo", 2e-3, "demo"),
        (["--lr", "0.5"], "demo", 0.5, "demo"),
        (["--recipe", "notebook"], "notebook", 2e-4, "demo"),
        (["--model", "ViT-B/16"], "default", 2e-4, "ViT-B/16"),
        (["--dataset", "flowers102"], "notebook", 2e-4, "ViT-B/16"),
        (["--dataset", "flowers102", "--model", "demo"], "default", 2e-3, "demo"),
        (["--dataset", "folder"], "default", 2e-4, "ViT-B/16"),
        (["--dataset", "folder", "--model", "demo"], "default", 2e-3, "demo"),
        (["--dataset", "eurosat"], "default", 2e-4, "ViT-B/16"),
    ],
)
def test_the_recipe_follows_from_the_data_and_flags_win_over_it(argv, recipe, lr, model):
    plan = plan_of(["--method", "lora", *argv])
    (experiment,) = plan.experiments
    assert (plan.method, plan.recipe) == ("lora", recipe)
    assert (plan.settings.lr, experiment.model) == (lr, model)
    assert (plan.out, plan.resume) == (Path("runs"), False)


class Counted(list):
    """As many training images; nothing else of them is asked."""

    shots = 1
    drawn = property(lambda self: [self])

    def __init__(self, count: int):
        super().__init__([None] * count)


def test_epochs_that_are_given_are_all_there_are():
    own = ["--method", "lora", "--dataset", "folder"]
    assert plan_of(own).settings.min_steps == 400
    settings = plan_of([*own, "--epochs", "2"]).settings
    assert (settings.epochs, settings.min_steps) == (2, 0)
    settings = plan_of([*own, "--epochs", "2", "--min-steps", "5"]).settings
    assert (settings.epochs, settings.min_steps) == (2, 5)
    paper = ["--method", "lora", "--recipe", "paper"]
    assert plan_of(paper).settings.steps_per_shot == 500
    assert plan_of([*paper, "--epochs", "2"]).settings.steps_per_shot == 0
    settings = plan_of([*paper, "--epochs", "2", "--steps-per-shot", "3"]).settings
    assert settings.steps_per_shot == 3  # it is "instead of --epochs"


def test_a_flag_wins_over_the_grid_of_a_recipe():
    own = ["--method", "cross_modal", "--recipe", "paper"]
    assert len(plan_of(own).settings.points()) == 12
    settings = plan_of([*own, "--lr", "0.5", "--batch-size", "8"]).settings
    assert (settings.lr, settings.grid) == (0.5, "weight_decay=0,0.01,1e-4")
    settings = plan_of([*own, "--lr", "0.5", "--grid", "batch_size=2"]).settings
    assert settings.points() == [{"batch_size": 2}]
    with pytest.raises(UserError, match="--lr and --grid lr=1,2: give one of them"):
        plan_of([*own, "--lr", "0.5", "--grid", "lr=1,2"])


@pytest.mark.parametrize(
    "method", [m for m in METHODS if issubclass(METHODS[m].Settings, TrainingSettings)]
)
def test_the_default_of_what_learns_by_steps_is_long_enough_for_two_classes(method):
    """And validates a bounded number of times, whatever its length."""
    settings = plan_of(["--method", method, "--dataset", "folder"]).settings
    for images in (2, 8, 2 * 64, 500, 500 * 64):
        length = Length.of(settings, Counted(images))
        assert length.total >= (300 if method == "prolip" else 400)  # of all images at once
        assert length.total >= 10 * images / settings.batch_size
        assert length.chooses == (settings.keep != "mean")  # of which nothing is chosen
        assert length.total / length.round <= (40 if method == "prolip" else 10)


@pytest.mark.parametrize("method", [m for m in METHODS if hasattr(METHODS[m].Settings, "augment")])
def test_whatever_augments_can_do_it_in_every_way(method):
    for augment in get_args(Augment):
        plan = plan_of(["--method", method, "--augment", augment])
        assert plan.settings.augment == augment


def test_the_lora_run_that_filters_is_the_same_experiment(tmp_path, monkeypatch):
    other = ("--seed", "3", "--shots", "2", "--precision", "bf16", "--template", "one {}")
    other += ("--base-classes", str(tmp_path / "base.txt"), "--threads", "1", "--cache", "none")
    plan = plan_of(["--method", "disef_f1", *other, "--out", str(tmp_path)])
    (own,) = plan.experiments
    world = train_script.World(own, None, SimpleNamespace(template="one {}"))
    asked = []
    monkeypatch.setattr(train_script, "train", lambda *run: asked.append(run))
    path = train_script.lora_run(plan, world)
    ((lora, same),) = asked
    assert same is world
    assert lora.experiments == [own]
    assert lora.cache is None
    assert lora.out / own.folder(lora.method) == path
    alone = plan_of(["--method", "lora", *other])
    assert (lora.recipe, lora.settings) == (alone.recipe, alone.settings)


def test_a_recipe_that_a_method_lacks_is_an_error():
    with pytest.raises(UserError, match="--recipe paper: unknown; known are default"):
        plan_of(["--method", "zero_shot", "--recipe", "paper"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--out", "{file}"], "{file}"),
        (["--out", "{file}/deep"], "{file}/deep"),
        (["--out", "n" * 300], "File name too long"),
        (["--model", f"{'n' * 300}.pt"], "File name too long"),
        (["--data-root", "n" * 5000], "File name too long"),
        (["--init-from", "n" * 300], "File name too long"),
        (["--template", "a {} \udcff"], "--template"),
        (["--lr", "inf"], "--lr inf: expected a finite number"),
        (["--image-alpha", "nan"], "--image-alpha nan: expected a finite number"),
        (["--blocks", "0-9999999999"], "numbers below 2"),
    ],
)
def test_what_the_system_does_not_take_is_one_line(
    more, said, script, flags, tmp_path, is_one_line, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.write_text("mine")
    more = [part.format(file=file) if "{file}" in part else part for part in more]
    result = script("train", *flags, *more)
    assert is_one_line(result, said.format(file=file))
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "mine"


def test_a_run_whose_folder_is_removed_ends_with_a_line_and_keeps_what_was_learned(
    script, flags, tmp_path, is_one_line, monkeypatch
):
    real = Run.save_resume

    def remove(run, *arguments):
        real(run, *arguments)
        if run.log[-1]["epoch"] == 2:
            shutil.rmtree(run.path)

    monkeypatch.setattr(Run, "save_resume", remove)
    result = script("train", *flags, "--out", tmp_path)
    beside = tmp_path / f"{HERE}.rescued.safetensors"
    assert is_one_line(result, "was deleted or moved", str(beside))
    assert load_file(beside)
    assert list(beside.parent.iterdir()) == [beside]
