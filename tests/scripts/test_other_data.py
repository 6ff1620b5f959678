"""A run on another data set, base classes by name, another place for the cache."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import byhand
import pytest
import torch
from PIL import Image

import clip_min
from fewshot import datasets
from fewshot.catalogue import DATASETS, GROUPS
from fewshot.datasets import Dataset
from fewshot.pictures import Pictures
from fewshot.run import Run
from methods.interop import load

RUN = "noise/tiny/lora-s4-seed1"
OTHERS = {"amber_lily": (200, 150, 60), "night": (10, 10, 30), "moss-green": (70, 120, 40)}


def last_lines(out: str, count: int = 3) -> list[str]:
    return out.splitlines()[-count:]


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A folder of three classes; one is among those of the run."""
    root = tmp_path_factory.mktemp("other") / "plants"
    rng = torch.Generator().manual_seed(5)
    for part, count in (("train", 1), ("test", 7)):
        for name, colour in OTHERS.items():
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(-60, 61, (36, 40, 3), generator=rng)
                pixels = (noise + torch.tensor(colour)).clamp(0, 255).to(torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / part / name / f"{i}.png")
    return root


def test_a_run_on_another_data_set_is_the_merged_model_on_its_names(script, trained, other, model):
    where = ("--dataset", "folder", "--data-root", other)
    result = script("eval", "--run", trained.path, *where)
    assert (result.code, result.err) == (0, "")
    names = sorted(OTHERS)
    clips = {"zero-shot": clip_min.load(model), "lora": byhand.merged_clip(trained.path)}
    expected = [
        [name, f"{byhand.accuracy(clip, other / 'test', names):.2f}"]
        for name, clip in clips.items()
    ]
    lines = last_lines(result.out)
    assert lines[0].split() == ["all"]
    assert [line.split() for line in lines[1:]] == expected
    assert expected[0][1] != expected[1][1]  # else the adapter may not have been used
    assert "folder: 3 classes, 21 test images; 'a photo of a {}.'" in result.out


def test_the_template_is_the_other_data_sets_unless_one_is_given(script, trained, other):
    common = ("eval", "--run", trained.path, "--dataset", "folder", "--data-root", other)
    result = script(*common, "--template", "zebra crossing {} at night in fog")
    assert "'zebra crossing {} at night in fog'" in result.out
    assert last_lines(result.out) != last_lines(script(*common).out)


def test_a_run_needs_its_own_data_no_more(script, trained, other, tmp_path):
    run = Path(shutil.copytree(trained.path, tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    config["experiment"]["data_root"] = "/nowhere"
    (run / "config.json").write_text(json.dumps(config))
    where = ("--dataset", "folder", "--data-root", other)
    assert last_lines(script("eval", "--run", run, *where).out) == last_lines(
        script("eval", "--run", trained.path, *where).out
    )


def test_prompts_without_a_template_name_other_classes_and_classwise_ones_cannot(
    script, data, other, model, tmp_path, is_one_line
):
    common = ("train", "--method", "coop", "--dataset", "folder", "--data-root", data)
    few = ("--model", model, "--epochs", 1, "--shots", 2)
    where = ("--dataset", "folder", "--data-root", other)
    for kind, more in (("shared", ()), ("own", ("--class-specific",))):
        assert script(*common, *few, *more, "--out", tmp_path / kind).code == 0
        run = next((tmp_path / kind).glob("*/*/coop*"))
        result = script("eval", "--run", run, *where)
        if kind == "shared":
            assert result.code == 0, result.err
            assert last_lines(result.out)[-1].startswith("coop")
        else:
            assert is_one_line(result, "cannot name classes it was not trained on")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--dataset", "flower102"), "--dataset flower102: unknown; did you mean flowers102"),
        (("--dataset", "folder"), "give your pictures' folder with --data-root"),
        (("--dataset", "demo", "--shots", "3"), "--shots: a run has its own; leave it out"),
        (("--dataset", "demo", "--image", "a.png"), "--dataset: has no effect with --image"),
        (("--split", "coop"), "--split: a run has its own; leave it out"),
        (("--dataset", "demo", "--template", "flower"), "has no {} for the class name"),
    ],
)
def test_flags_that_do_not_fit_another_data_set_are_one_line(
    more, said, script, trained, is_one_line
):
    assert is_one_line(script("eval", "--run", trained.path, *more), said)


# ------------------------------------------------------------------------------- several data sets


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the trained run, in which files may be left."""
    return Path(shutil.copytree(trained.path, tmp_path / "run"))


def test_a_run_on_several_data_sets_is_the_run_on_each_and_their_mean(script, run, published):
    where = ("--data-root", published)
    result = script("eval", "--run", run, "--dataset", "dtd,food101", *where)
    assert (result.code, result.err) == (0, "")
    alone = []
    for name in ("dtd", "food101"):
        out = script("eval", "--run", run, "--dataset", name, *where).out
        assert out in result.out
        alone.append([float(line.split()[1]) for line in last_lines(out, 2)])
    *lines, last = (line.split() for line in last_lines(result.out, 5))
    assert lines[0] == ["zero-shot", "lora"]
    for name, line, scores in zip(("dtd", "food101"), lines[1:], alone, strict=False):
        assert line == [name, *(f"{score:.2f}" for score in scores)]
    assert lines[3][0] == "mean"
    for shown, values in zip(lines[3][1:], zip(*alone, strict=True), strict=True):
        assert float(shown) == pytest.approx(sum(values) / 2, abs=0.01)

    file = run / "eval-dtd,food101.json"
    assert last == ["data", "sets:", str(file)]
    saved = json.loads(file.read_text())
    for name, scores in zip(("dtd", "food101"), alone, strict=True):
        found = [saved["datasets"][name][row]["all"] for row in ("zero-shot", "lora")]
        assert found == pytest.approx(scores, abs=0.005)
    for row in ("zero-shot", "lora"):
        values = [saved["datasets"][name][row]["all"] for name in saved["datasets"]]
        assert saved["mean"][row]["all"]["mean"] == pytest.approx(sum(values) / 2)

    first = file.read_bytes()
    assert script("eval", "--run", run, "--dataset", "dtd, food101", *where).code == 0
    assert file.read_bytes() == first
    other = script("eval", "--run", run, "--dataset", "dtd,food101", *where, "--template", "my {}")
    old = file.with_name(f"{file.name}.old1")
    assert f"an earlier table is kept as {old}" in other.out
    assert old.read_bytes() == first != file.read_bytes()


def test_zero_shot_on_several_data_sets_leaves_its_table(
    script, published, model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags = ("--dataset", "dtd,food101", "--data-root", published, "--model", model)
    result = script("eval", "--method", "zero_shot", *flags, "--classes", "all")
    assert (result.code, result.err) == (0, "")
    file = Path("runs/dtd,food101-all/tiny/zero_shot-eval.json")
    mean, said = last_lines(result.out, 2)
    assert said == f"data sets: {file}"
    saved = json.loads(file.read_text())
    each = [saved["datasets"][name]["zero-shot"]["all"] for name in ("dtd", "food101")]
    assert mean.split() == ["mean", f"{sum(each) / 2:.2f}"]


def test_a_data_set_that_is_missing_is_told_before_others_are_tested(
    script, run, published, model, is_one_line, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    flags = ("--dataset", "dtd,food101,caltech101", "--data-root", published, "--model", model)
    for of in (("--run", run), ("--method", "zero_shot")):
        result = script("eval", *of, *flags)
        assert is_one_line(result, "published/caltech-101")
        assert result.out == ""
    assert not list(run.glob("eval-*"))
    assert not Path("runs").exists()


def test_coop_11_is_the_11_in_coops_split_without_what_was_learned_from(script, run, monkeypatch):
    asked = []

    def read(name, root, seed, split, file):
        asked.append((name, split))
        picture = Pictures(torch.zeros(3, 3, 40, 40, dtype=torch.uint8), torch.arange(3))
        return Dataset(list(OTHERS), "a {}", picture, None, picture)

    monkeypatch.setattr(datasets, "load", read)
    assert script("eval", "--run", run, "--dataset", "coop-11").code == 0
    each = [(name, "coop") for name in GROUPS["coop-11"]]
    assert asked == each * 2  # first to see that they are there
    asked.clear()
    config = json.loads((run / "config.json").read_text())
    config["experiment"]["dataset"] = "imagenet"
    (run / "config.json").write_text(json.dumps(config))
    for group in ("imagenet,imagenet-variants", "coop-11"):
        assert script("eval", "--run", run, "--dataset", group).code == 0
    assert asked[:8] == 2 * [(name, "official") for name in GROUPS["imagenet-variants"]]
    assert asked[8:] == 2 * each[1:]
    assert (run / "eval-imagenet,imagenet-variants.json").exists()


# ------------------------------------------------------------------------ domain generalisation


WNIDS = ["n01", "n02", "n03", "n04"]
VARIANTS = {  # name -> its folder, its classes' folders
    "imagenetv2": ("imagenetv2/imagenetv2-matched-frequency-format-val", list("0123")),
    "imagenet_sketch": ("imagenet-sketch/images", WNIDS),
    "imagenet_a": ("imagenet-adversarial/imagenet-a", WNIDS[1:3]),
    "imagenet_r": ("imagenet-rendition/imagenet-r", WNIDS[2:]),
}


@pytest.fixture
def imagenet(tmp_path, draw, monkeypatch) -> Path:
    """$DATA with look-alikes of ImageNet and its variants: 4 classes, two of one name."""
    root, made = tmp_path / "imagenets", iter(range(9))
    places = {
        "imagenet/images/train": WNIDS,
        "imagenet/images/val": WNIDS,
        **dict(VARIANTS.values()),
    }
    for folder, names in places.items():
        draw(root / folder, 5, next(made))
        for old, new in zip(sorted((root / folder).iterdir()), [*names, None, None], strict=False):
            shutil.rmtree(old) if new is None else old.rename(root / folder / new)
        for old in [p for p in (root / folder).iterdir() if p.name not in names]:
            shutil.rmtree(old)
    called = ["amber lily", "missile", "cyan lotus", "missile"]
    lines = [f"{wnid} {name}\n" for wnid, name in zip(WNIDS, called, strict=True)]
    (root / "imagenet/classnames.txt").write_text("".join(lines))
    for name, (_, names) in {"imagenet": ("", WNIDS), **VARIANTS}.items():
        counts = (20 if name == "imagenet" else 0, 0, 5 * len(names))
        entry = replace(DATASETS[name], classes=len(names), images=counts, coop_images=counts)
        monkeypatch.setitem(DATASETS, name, entry)
    return root


def test_a_run_on_imagenet_is_tested_on_all_of_its_variants(
    script, imagenet, model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    common = ("--data-root", imagenet, "--model", model)
    known = (
        "--method",
        "linear_probe",
        "--dataset",
        "imagenet",
        "--split",
        "coop",
        "--classes",
        "all",
    )
    result = script("train", *known, *common, "--shots", 3, "--out", tmp_path / "runs")
    assert (result.code, result.err) == (0, "")
    assert "4 classes to learn from 12 images (8 for validation)" in result.out
    assert "'missile' and 'missile' are published as two classes" in result.out
    path = tmp_path / "runs/imagenet-coop-all/tiny/linear_probe-s3-seed1"
    run = Run.open(path)
    scored = json.loads((path / "results.json").read_text())["parts"]["all"]["classes"]
    assert [*scored] == ["amber lily", "missile (1)", "cyan lotus", "missile (3)"]
    shown = script("eval", "--run", path, "--dataset", "imagenet-variants", *common)
    assert (shown.code, shown.err) == (0, "")
    table = [line.split() for line in last_lines(shown.out, 7)[:-1]]
    assert [row[0] for row in table[1:]] == [*VARIANTS, "mean"]

    clip = clip_min.load(model)
    probe = load.trained(run, clip)
    for row, (folder, names) in zip(table[1:], VARIANTS.values(), strict=False):
        ids = [int(name) if name.isdecimal() else WNIDS.index(name) for name in names]
        right = []
        for label, name in enumerate(names):
            files = sorted((imagenet / folder / name).iterdir())
            images = torch.stack([clip_min.crop(Image.open(file), 32) for file in files])
            with torch.no_grad():
                logits = probe(clip_min.normalize(images))[:, ids]
            right += (logits.argmax(dim=1) == label).tolist()
        assert row[2] == f"{100 * sum(right) / len(right):.2f}"

    zero_shot = ("--method", "zero_shot", "--dataset", "imagenet-variants", "--classes", "all")
    alone = script("eval", *zero_shot, *common)
    assert (alone.code, alone.err) == (0, "")
    assert [line.split() for line in last_lines(alone.out, 7)[:-1]] == [
        table[0][:1],
        *(row[:2] for row in table[1:]),
    ]


def test_a_variant_is_not_learned_from(script, imagenet, model, tmp_path, is_one_line):
    where = ("--dataset", "imagenet_a", "--data-root", imagenet, "--model", model)
    result = script(
        "train", "--method", "lora", *where, "--classes", "all", "--out", tmp_path / "runs"
    )
    assert is_one_line(result, "no training images: this data set is only for testing")
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------- draws that others published


def test_a_published_draw_is_what_is_learned_from(script, flags, data, tmp_path, is_one_line):
    file = tmp_path / "theirs.jsonl"
    rows = [("amber_lily", 0), ("amber_lily", 5), ("blue-bell", 3), ("cyan lotus", 7)]
    lines = [json.dumps({"path": f"/x/train/{name}/{i}.png", "label": name}) for name, i in rows]
    file.write_text("\n".join(lines) + "\n")
    assert is_one_line(
        script("train", *flags, "--shots-file", file), "--shots-file", "leave one out"
    )
    k = flags.index("--shots")
    out = ("--shots-file", file, "--out", tmp_path / "runs")
    result = script("train", *flags[:k], *flags[k + 2 :], *out)
    assert (result.code, result.err) == (0, "")
    run = tmp_path / "runs/noise/tiny/lora-theirs-seed1"
    record = json.loads((run / "data.json").read_text())
    learned = [row[0] for row in record["train"]]
    assert sorted(learned) == sorted(f"train/{name}/{i}.png" for name, i in rows)
    assert {row[0] for row in record["val"]}.isdisjoint(learned)
    file.unlink()  # a run knows what it has learned from
    again = script("eval", "--run", run)
    assert last_lines(again.out) == last_lines(result.out, 6)[:3]


# ---------------------------------------------------------------------------- base classes by name


def test_base_classes_by_name_are_learned_and_the_others_are_novel(
    script, train, tmp_path, data, model, is_one_line
):
    file = tmp_path / "mine.txt"
    file.write_text("egg_flower\n\n  blue bell \n")
    run = train(tmp_path / "runs", "--base-classes", file)
    assert run == tmp_path / "runs/noise-mine/tiny/lora-s4-seed1"
    config = json.loads((run / "config.json").read_text())
    base, novel = ["blue bell", "egg flower"], ["amber lily", "cyan lotus", "dark iris"]
    assert config["classnames"] == {"base": base, "novel": novel}
    found = json.loads((run / "results.json").read_text())
    clip = byhand.merged_clip(run)
    folders = {
        "base": ["blue-bell", "egg flower"],
        "novel": ["amber_lily", "cyan lotus", "dark-iris"],
    }
    for part, names in folders.items():
        assert found[part] == pytest.approx(byhand.accuracy(clip, data / "test", names))
    again = script("eval", "--run", run)
    assert again.code == 0, again.err
    assert last_lines(again.out, 1)[0].split()[1] == f"{found['base']:.2f}"
    file.rename(tmp_path / "moved.txt")
    assert is_one_line(script("eval", "--run", run), str(file), "there is no such file")
    moved = script("eval", "--run", run, "--base-classes", tmp_path / "moved.txt")
    assert last_lines(moved.out) == last_lines(again.out)
    other = ("--dataset", "folder", "--data-root", data, "--base-classes", file)
    result = script("eval", "--run", run, *other)  # all classes of another data set are tested
    assert is_one_line(result, "--base-classes: a run has its own; leave it out")


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("blue bel\n", (), "class blue bel: unknown; did you mean blue bell"),
        ("", (), "names 0 of 5 classes"),
        ("amber lily\nblue bell\ncyan lotus\ndark iris\negg flower", (), "names 5 of 5 classes"),
        ("blue bell\n", ("--classes", "all"), "--base-classes needs two halves"),
        (None, (), "there is no such file"),
    ],
)
def test_base_classes_that_cannot_be_are_one_line(
    text, more, said, script, flags, tmp_path, is_one_line
):
    file = tmp_path / "mine.txt"
    if text is not None:
        file.write_text(text)
    result = script("train", *flags, "--base-classes", file, *more, "--out", tmp_path / "runs")
    assert is_one_line(result, said)
    assert not (tmp_path / "runs").exists()


# -------------------------------------------------------------------------------------- the cache


def test_the_cache_lies_where_the_flag_says_or_nowhere(script, flags, tmp_path, monkeypatch):
    def kept(folder: Path) -> list[str]:
        return sorted({path.parent.name for path in folder.rglob("*.safetensors")})

    monkeypatch.setenv("CLIP_MIN_CACHE", str(tmp_path / "env"))
    run = ("train", *flags, "--epochs", 1, "--out")
    assert script(*run, tmp_path / "a", "--cache", tmp_path / "here").code == 0
    assert kept(tmp_path / "here") == ["features", "hashes", "odd", "pixels"]
    assert script(*run, tmp_path / "b", "--cache", "none").code == 0
    assert not (tmp_path / "env").exists()
    assert script(*run, tmp_path / "c").code == 0
    assert kept(tmp_path / "env") == ["features", "hashes", "odd", "pixels"]
    monkeypatch.setenv("CLIP_MIN_CACHE", "none")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    result = script("eval", "--run", tmp_path / "c" / RUN)
    assert result.code == 0, result.err
    assert not (tmp_path / "home").exists()


def test_help_lists_the_data_sets(script):
    for name in ("train", "eval"):
        shown = script(name, "--help").out
        for dataset in ("demo", "folder", "flowers102", "eurosat", "cifar100", "hymenoptera"):
            assert f"\n  {dataset} " in shown
