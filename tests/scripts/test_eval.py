"""A trained run is tested again, used on pictures, and refused when something does not fit."""

import json
import shutil
from pathlib import Path

import byhand
import pytest
import torch
from safetensors.torch import load_file, save_file

import clip_min
from fewshot import datasets
from methods import METHODS
from methods.interop import classify

BASE = ["amber lily", "blue bell", "cyan lotus"]
NOVEL = ["dark iris", "egg flower"]


def table_lines(out: str) -> list[str]:
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.split()[:1] in (["base"], ["all"]))
    return lines[first : first + 3]


def top(out: str) -> dict[str, list[tuple[str, str]]]:
    """Picture -> its likeliest classes, as (percent, name)."""
    found: dict[str, list] = {}
    for line in out.splitlines():
        if line.startswith(" "):
            percent, name = line.split(" %  ")
            found[list(found)[-1]].append((percent.strip(), name))
        else:
            found[line] = []
    return found


def by_hand(clip, file: Path, classnames: list[str]) -> list[tuple[str, str]]:
    probabilities = byhand.logits(clip, [file], classnames)[0].softmax(-1).tolist()
    best = sorted(range(len(classnames)), key=lambda k: -probabilities[k])[:5]
    return [(f"{100 * probabilities[k]:.2f}", classnames[k]) for k in best]


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the trained run, that a test may spoil."""
    return Path(shutil.copytree(trained.path, tmp_path / "run"))


# ---------------------------------------------------------------------------------- tested again


def test_the_table_is_the_one_that_training_printed(script, trained):
    result = script("eval", "--run", trained.path)
    assert (result.code, result.err) == (0, "")
    assert table_lines(result.out) == table_lines(trained.out)
    assert table_lines(result.out)[2].startswith("lora")


@pytest.mark.parametrize("classes", ["base-novel", "all"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_tested_again_with_the_same_numbers(
    method, classes, script, data, model, synthetic, tmp_path
):
    common = ("--dataset", "folder", "--data-root", data, "--model", model, "--out", tmp_path)
    short = ("--epochs", 1) if hasattr(METHODS[method].Settings, "epochs") else ()
    if method.startswith("disef"):
        short += ("--synthetic", synthetic(classes), "--per-class", 2)
        short += ("--plan", "uniform", "--filter", "zero_shot")
    trained = script("train", "--method", method, *common, *short, "--classes", classes)
    assert trained.code == 0, trained.err
    (path,) = tmp_path.glob("*/*/*")
    result = script("eval", "--run", path)
    assert result.code == 0, result.err
    assert table_lines(result.out) == table_lines(trained.out)


def test_a_run_in_16_bits_is_tested_and_used_in_16_bits(script, train, data, tmp_path):
    """The same numbers, and probabilities that are near those of the run's own, but not those."""
    path = train(tmp_path, "--precision", "bf16")
    config = json.loads((path / "config.json").read_text())
    saved = json.loads((path / "results.json").read_text())
    result = script("eval", "--run", path)
    assert result.code == 0, result.err
    cells = [f"{saved[part]:.2f}" for part in ("base", "novel", "hm")]
    cells += [f"{saved['joint']['hm']:.2f}"]
    assert table_lines(result.out)[2].split()[1:] == cells
    files = sorted((data / "test/blue-bell").iterdir())
    found = top(script("eval", "--run", path, "--image", *files).out)
    config["experiment"]["precision"] = "fp32"
    (path / "config.json").write_text(json.dumps(config))
    full = top(script("eval", "--run", path, "--image", *files).out)
    assert found != full
    for name, lines in full.items():
        half = {name: float(percent) for percent, name in found[name]}
        assert all(abs(half[name] - float(percent)) < 2 for percent, name in lines)


def test_the_table_needs_the_adapter_and_config_alone(script, run, trained):
    for file in run.iterdir():
        if file.name not in ("adapter.safetensors", "config.json"):
            file.unlink()
    result = script("eval", "--run", run)
    assert table_lines(result.out) == table_lines(trained.out)


def no_longer_vouched_for(run: Path) -> None:
    """As an adapter of a run that has not ended, or of an old one."""
    config = json.loads((run / "config.json").read_text())
    del config["adapter_sha256"]
    (run / "config.json").write_text(json.dumps(config))


def test_an_adapter_of_zeros_is_zero_shot(script, run):
    adapter = load_file(run / "adapter.safetensors")
    save_file({n: torch.zeros_like(t) for n, t in adapter.items()}, run / "adapter.safetensors")
    no_longer_vouched_for(run)
    _, zero_shot, lora = table_lines(script("eval", "--run", run).out)
    assert lora.split()[1:] == zero_shot.split()[1:]


def test_zero_shot_needs_no_run(script, data, model, trained):
    where = ("--dataset", "folder", "--data-root", data, "--model", model)
    result = script("eval", "--method", "zero_shot", *where)
    assert result.code == 0, result.err
    assert table_lines(result.out)[:2] == table_lines(trained.out)[:2]
    result = script("eval", "--method", "zero_shot", *where, "--classes", "all")
    assert table_lines(result.out)[0].split() == ["all"]


def test_data_and_model_may_have_moved(script, run, trained, data, model, tmp_path):
    config = json.loads((run / "config.json").read_text())
    config["experiment"] |= {"data_root": "/nowhere", "model": "/nowhere.safetensors"}
    (run / "config.json").write_text(json.dumps(config))
    moved = shutil.copytree(data, tmp_path / "moved")
    other_place = shutil.copy(model, tmp_path / "renamed.safetensors")
    result = script("eval", "--run", run, "--data-root", moved, "--model", other_place)
    assert result.code == 0, result.err
    assert table_lines(result.out) == table_lines(trained.out)


# ---------------------------------------------------------------------------- pictures of one's own


def test_probabilities_of_pictures_are_those_of_the_merged_model(script, trained, data):
    files = [data / "test/blue-bell/0.png", data / "test/egg flower/3.png"]
    result = script("eval", "--run", trained.path, "--image", *files)
    assert (result.code, result.err) == (0, "")
    clip = byhand.merged_clip(trained.path)
    found = top(result.out)
    assert list(found) == [str(file) for file in files]
    for file in files:
        assert [name for _, name in found[str(file)]] == [
            name for _, name in by_hand(clip, file, BASE + NOVEL)
        ]
        percents = [float(percent) for percent, _ in found[str(file)]]
        expected = [float(percent) for percent, _ in by_hand(clip, file, BASE + NOVEL)]
        assert percents == pytest.approx(expected, abs=0.02)
        assert percents == sorted(percents, reverse=True)
        assert sum(percents) == pytest.approx(100, abs=0.05)  # five classes in all
    assert found[str(files[0])][0][1] == "blue bell"


def test_classes_given_with_a_picture_replace_the_runs_own(script, trained, data):
    file = data / "test/blue-bell/0.png"
    names = ["blue bell", "a thing with {}", "red", "tree", "🌹", "sea", "stone"]
    result = script("eval", "--run", trained.path, "--image", file, "--classes", ", ".join(names))
    assert result.code == 0, result.err
    found = top(result.out)[str(file)]
    expected = by_hand(byhand.merged_clip(trained.path), file, names)
    assert [name for _, name in found] == [name for _, name in expected]
    percents = [float(percent) for percent, _ in found]
    assert percents == pytest.approx([float(percent) for percent, _ in expected], abs=0.02)
    assert len(found) == 5
    assert sum(percents) < 100  # five of seven
    few = script("eval", "--run", trained.path, "--image", file, "--classes", "red,sea").out
    assert {name for _, name in top(few)[str(file)]} == {"red", "sea"}


def test_pictures_without_a_run_are_classified_by_the_model_as_it_is(script, model, data):
    file = data / "test/blue-bell/0.png"
    common = ("eval", "--method", "zero_shot", "--model", model, "--image", file)
    result = script(*common, "--classes", "red,sea,stone")
    assert result.code == 0, result.err
    expected = by_hand(clip_min.load(model), file, ["red", "sea", "stone"])
    assert [name for _, name in top(result.out)[str(file)]] == [name for _, name in expected]


def test_pictures_need_no_data_set(script, run, data, tmp_path):
    config = json.loads((run / "config.json").read_text())
    config["experiment"]["data_root"] = "/nowhere"
    (run / "config.json").write_text(json.dumps(config))
    result = script("eval", "--run", run, "--image", data / "test/blue-bell/0.png")
    assert result.code == 0, result.err


@pytest.mark.parametrize("kind", ["text", "missing", "folder", "cut short"])
def test_a_picture_that_cannot_be_read_is_one_line(
    kind, script, trained, data, tmp_path, is_one_line
):
    bad = tmp_path / "bad.png"
    if kind == "text":
        bad.write_text("not a picture")
    elif kind == "folder":
        bad.mkdir()
    elif kind == "cut short":
        bad.write_bytes((data / "test/blue-bell/0.png").read_bytes()[:300])
    if kind == "folder":
        said = f"--image {bad}: is a folder without pictures"
        assert is_one_line(script("eval", "--run", trained.path, "--image", bad), said)
        return
    said = f"{bad}: cannot be read as an image"
    assert is_one_line(script("eval", "--run", trained.path, "--image", bad), said)
    result = script("eval", "--run", trained.path, "--image", bad, bad)
    assert is_one_line(result, said, "(and 1 more, which are all)")
    good = data / "test/blue-bell/0.png"  # one picture does not cost the others
    result = script("eval", "--run", trained.path, "--image", bad, good)
    assert (result.code, result.err) == (0, "")
    *answers, note = result.out.splitlines()
    assert note.startswith(f"note: skipped, {said}")
    assert list(top("\n".join(answers))) == [str(good)]


def test_pictures_of_a_folder_are_classified_a_batch_at_a_time(
    script, trained, data, tmp_path, monkeypatch
):
    alone = script("eval", "--run", trained.path, "--image", *sorted(data.rglob("test/*/*.png")))
    monkeypatch.setattr(classify, "BATCH", 3)
    sizes = []
    real = classify.normalize
    monkeypatch.setattr(
        classify, "normalize", lambda x, **how: sizes.append(len(x)) or real(x, **how)
    )
    whole = script("eval", "--run", trained.path, "--image", data / "test")
    assert whole.code == 0, whole.err
    assert sizes == [3] * 6 + [2]
    found, expected = top(whole.out), top(alone.out)
    assert list(found) == list(expected)
    for file, lines in expected.items():
        percents = [float(percent) for percent, _ in lines]
        assert [float(percent) for percent, _ in found[file]] == pytest.approx(percents, abs=0.02)


def test_a_transductive_method_labels_all_pictures_jointly(
    script, data, model, tmp_path, monkeypatch
):
    where = ("--dataset", "folder", "--data-root", data, "--model", model, "--out", tmp_path)
    assert script("train", "--method", "em_dirichlet", *where).code == 0
    (run,) = tmp_path.glob("*/*/*")
    once = script("eval", "--run", run, "--image", data / "test")
    assert "note: em_dirichlet labels these 20 pictures jointly" in once.out
    monkeypatch.setattr(classify, "BATCH", 3)
    assert script("eval", "--run", run, "--image", data / "test").out == once.out


def test_names_to_choose_from_may_be_a_file(script, model, data, tmp_path, is_one_line):
    (tmp_path / "names.txt").write_text("red, or nearly\n\nsea\nstone\n")
    common = ("eval", "--method", "zero_shot", "--model", model)
    common += ("--image", data / "test/blue-bell/0.png", "--classes", tmp_path / "names.txt")
    result = script(*common)
    assert result.code == 0, result.err
    ((_, found),) = top(result.out).items()
    assert {name for _, name in found} == {"red, or nearly", "sea", "stone"}
    (tmp_path / "names.txt").write_text("\n")
    assert is_one_line(script(*common), "names.txt: names 0 classes")


# ------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize("task", [(), ("--image", "x.png")])
def test_a_run_of_another_model_is_refused(task, script, trained, new_model, is_one_line):
    result = script("eval", "--run", trained.path, "--model", new_model(1), *task)
    assert is_one_line(result, str(trained.path), "fingerprint", "--model")


@pytest.fixture
def tree(draw, tmp_path) -> Path:
    """One tree of classes, which the seed splits."""
    draw(tmp_path / "tree", 20, seed=4)
    return tmp_path / "tree"


def test_after_pictures_have_come_the_run_is_tested_on_the_same(
    script, train, tree, draw, tmp_path
):
    path = train(tmp_path / "runs", "--data-root", tree)
    table = table_lines(script("eval", "--run", path).out)
    draw(tmp_path / "more", 3, seed=9)
    for file in sorted((tmp_path / "more").glob("*/*")):
        file.rename(tree / file.parent.name / f"more-{file.name}")
    result = script("eval", "--run", path)
    assert result.code == 0, result.err
    assert table_lines(result.out) == table
    assert "test images are not the run's, and are left out" in result.out
    seen = json.loads((path / "data.json").read_text())
    assert all((tree / file).is_file() for part in seen.values() for file, *_ in part)


def test_as_another_data_set_the_runs_own_pictures_are_left_out(script, train, tree, tmp_path):
    path = train(
        tmp_path / "runs", "--data-root", tree, "--seed", 2
    )  # where --dataset draws by seed 1
    result = script("eval", "--run", path, "--dataset", "folder", "--data-root", tree)
    assert result.code == 0, result.err
    assert "test images are left out: they are training or validation images" in result.out
    learned = {
        file
        for part in ("train", "val")
        for file, *_ in json.loads((path / "data.json").read_text())[part]
    }
    there = datasets.load("folder", tree, 1).test.source
    left = [file for file in there if str(file.relative_to(tree)) not in learned]
    assert f"5 classes, {len(left)} test images" in result.out


def test_without_its_data_json_a_run_is_tested_where_nothing_has_changed(
    script, train, tree, tmp_path, is_one_line
):
    path = train(tmp_path / "runs", "--data-root", tree)
    table = table_lines(script("eval", "--run", path).out)
    (path / "data.json").unlink()
    assert table_lines(script("eval", "--run", path).out) == table
    next(tree.glob("*/0.png")).unlink()
    assert is_one_line(script("eval", "--run", path), str(path), "without its data.json")


def test_a_run_of_an_earlier_version_is_tested_as_it_was(script, run, trained):
    config = json.loads((run / "config.json").read_text())
    del config["data"]
    (run / "config.json").write_text(json.dumps(config))
    (run / "data.json").unlink()
    assert table_lines(script("eval", "--run", run).out) == table_lines(trained.out)


def test_a_data_set_with_other_classes_is_refused(script, trained, data, tmp_path, is_one_line):
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    for part in ("train", "test"):
        (moved / part / "dark-iris").rename(moved / part / "aconite")  # moves every label
    result = script("eval", "--run", trained.path, "--data-root", moved)
    assert is_one_line(result, str(trained.path), "classes are no longer those")


def without(name: str):
    def spoil(config: dict) -> str:
        del config[name]
        return json.dumps(config)

    return spoil


def with_(name: str, value):
    return lambda config: json.dumps(config | {name: value})


EXPERIMENT = {"seed": 1, "shots": 4, "template": "", "model": ""}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda config: None, "there is no such file"),
        (lambda config: json.dumps(config)[:200], "cannot be read as JSON"),
        (lambda config: "", "cannot be read as JSON"),
        (lambda config: "[]", "is [], expected an object"),
        (lambda config: "{}", "is missing"),
        (without("experiment"), "experiment is missing"),
        (without("fingerprint"), "fingerprint is missing"),
        (without("classnames"), "classnames is missing"),
        (with_("experiment", {"planet": "Mars"}), "experiment.seed is missing"),
        (with_("experiment", EXPERIMENT | {"planet": 4}), "planet"),
        (with_("experiment", EXPERIMENT | {"shots": [4]}), "experiment.shots is [4], expected a"),
        (with_("experiment", EXPERIMENT | {"shots": "x"}), "--shots x"),
        (with_("experiment", 3), "experiment is 3, expected an object"),
        (with_("settings", {"prompts": "a\0"}), "embedded null"),
        (with_("settings", {"prompts": "\ud800"}), "surrogates not allowed"),
        (with_("settings", {"lr": 0.1, "colour": "red"}), "colour"),
        (with_("settings", None), "settings is None, expected an object"),
        (with_("settings", {"scaling": "x"}), "settings: --scaling x: expected rank or sqrt"),
        (with_("method", "lorra"), "lorra: unknown; did you mean lora"),
        (with_("method", ["lora"]), "method is ['lora'], expected text"),
        (with_("classnames", BASE), "classnames is ['amber lily'"),
        (with_("classnames", {"novel": NOVEL}), "classnames has novel, expected names of base"),
    ],
)
@pytest.mark.parametrize("task", [(), ("--image", "x.png")])
def test_a_config_that_is_not_whole_is_one_line(task, spoil, said, script, run, is_one_line):
    text = spoil(json.loads((run / "config.json").read_text()))
    (run / "config.json").unlink()
    if text is not None:
        (run / "config.json").write_text(text)
    assert is_one_line(script("eval", "--run", run, *task), said)


def test_a_run_that_has_not_ended_is_tested_and_that_is_said(script, run, trained):
    (run / "results.json").unlink()
    result = script("eval", "--run", run)
    assert (result.code, result.err) == (0, "")
    assert "note: no results.json; an unfinished run is tested" in result.out
    assert table_lines(result.out) == table_lines(trained.out)


def test_where_there_is_no_run_the_folder_is_named(script, tmp_path, is_one_line):
    result = script("eval", "--run", tmp_path / "nowhere")
    assert is_one_line(result, str(tmp_path / "nowhere" / "config.json"), "no such file")


def cut(file: Path):
    file.write_bytes(file.read_bytes()[:-100])


def garble(file: Path):
    file.write_text("this is not safetensors")


def rename(file: Path):
    save_file({n.replace("lora_A", "lora_C"): t for n, t in load_file(file).items()}, file)


def reshape(file: Path):
    save_file({n: t[:1].clone() for n, t in load_file(file).items()}, file)


def not_finite(file: Path):
    save_file({n: t / 0 for n, t in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (Path.unlink, "there is no such file; finish the run: train.py --resume"),
        (cut, "adapter.safetensors: not a complete safetensors file"),
        (garble, "adapter.safetensors: not a complete safetensors file"),
        (rename, "lora_A is missing"),
        (reshape, "has shape (1, 64), expected (8, 64)"),
        (not_finite, "lora_A has NaN or infinity"),
    ],
)
def test_an_adapter_that_is_not_whole_is_one_line(spoil, said, script, run, is_one_line):
    spoil(run / "adapter.safetensors")
    result = script("eval", "--run", run)
    vouched = "is not the adapter that this run saved"
    assert is_one_line(result, vouched if spoil in (rename, reshape, not_finite) else said)
    no_longer_vouched_for(run)
    assert is_one_line(script("eval", "--run", run), said)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "give either --run DIR or --method zero_shot"),
        (["--run", "x", "--method", "zero_shot"], "give either --run DIR or --method zero_shot"),
        (["--run", "x", "--shots", "3"], "--shots: a run has its own; leave it out"),
        (["--run", "x", "--classes", "all"], "--classes: a run has its own; leave it out"),
        (["--run", "x", "--image", "a.png", "--data-root", "."], "--data-root: has no effect with"),
        (["--run", "x", "--image", "a.png", "--precision", "bf16"], "a run has its own"),
        (
            ["--run", "x", "--image", "a.png", "--cache", "none"],
            "--cache: has no effect with --image",
        ),
        (["--method", "zero_shot", "--image", "a.png", "--shots", "3"], "--shots: has no effect"),
        (["--method", "zero_shot", "--image", "a.png", "--seed", "3"], "--seed: has no effect"),
        (["--method", "zero_shot", "--shots", "3"], "--shots 3: has no effect on zero-shot CLIP"),
        (
            ["--method", "zero_shot", "--shots-file", "a"],
            "--shots-file a: has no effect on zero-sh",
        ),
        (
            ["--method", "zero_shot", "--image", "a.png", "--split", "coop"],
            "--split: has no effect",
        ),
        (
            ["--method", "zero_shot", "--image", "a", "--dataset", "demo"],
            "--dataset: has no effect",
        ),
        (["--run", "x", "--imgae", "a.png"], "unknown argument --imgae; did you mean --image"),
        (["--run", "x", "--lr", "3"], "unknown argument --lr"),
        (["--method", "lora"], "--method lora: unknown; known are zero_shot"),
        (["--method", "zero_shot", "--classes", "al"], "--classes al: unknown; did you mean all"),
        (["--method", "zero_shot", "--image", "a.png"], "needs the classes to choose from"),
        (["--method", "zero_shot", "--image", "a.png", "--classes", " , "], "names 0 classes"),
        (["--method", "zero_shot", "--image", "a.png", "--classes", "a,A"], "one class to CLIP"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(argv, said, script, model, is_one_line):
    model = ["--model", model] if "zero_shot" in argv and "--run" not in argv else []
    assert is_one_line(script("eval", *argv, *model), said)


def test_help_says_how_to_use_it(script):
    result = script("eval", "--help")
    assert result.code == 0
    assert "--run DIR" in result.out
    assert "--image FILE" in result.out
