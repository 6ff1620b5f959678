"""--keep-share of eval.py and export.py: less of what a run has learned."""

import json
import shutil
from pathlib import Path

import byhand
import pytest
import torch
from PIL import Image

import clip_min
from clip_min.model import VisionTower
from fewshot.shares import save_curve

BASE, NOVEL = ["amber_lily", "blue-bell", "cyan lotus"], ["dark-iris", "egg flower"]


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the trained LoRA, in which files may be left."""
    return Path(shutil.copytree(trained.path, tmp_path / "run"))


def table(out: str) -> dict[str, list[str]]:
    """A row's name -> its cells."""
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.split()[:1] in (["base"], ["all"]))
    width = len(lines[first])
    return {
        line[: line.index("  ")]: line[line.index("  ") :].split()
        for line in lines[first + 1 :]
        if len(line) == width and line.split()[-1][:1].isdigit()
    }


def between(path: Path, share: float) -> clip_min.CLIP:
    """The mean of the weights of the run's CLIP and of the merged one."""
    config = json.loads((path / "config.json").read_text())
    clip, merged = clip_min.load(config["model"]), byhand.merged_clip(path)
    with torch.no_grad():
        for mine, theirs in zip(clip.parameters(), merged.parameters(), strict=True):
            mine.lerp_(theirs, share)
    return clip


def test_the_curve_goes_from_zero_shot_to_the_run(run, script, data):
    results = json.loads((run / "results.json").read_text())
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    result = script("eval", "--run", run, "--keep-share", "0,0.5,1")
    assert (result.code, result.err) == (0, "")
    rows = table(result.out)
    assert list(rows) == ["zero-shot", "lora, 0 kept", "lora, 0.5 kept", "lora, 1 kept"]
    assert rows["lora, 0 kept"] == rows["zero-shot"]
    numbers = [*(results[k] for k in ("base", "novel", "hm")), results["joint"]["hm"]]
    assert rows["lora, 1 kept"] == [f"{number:.2f}" for number in numbers]
    assert "these accuracies are on test images: do not report a share" in result.out

    saved = json.loads((run / "keep_share.json").read_text())
    assert (saved["method"], saved["accuracies_of"]) == ("lora", "test images")
    assert [point["share"] for point in saved["points"]] == [0, 0.5, 1]
    first, middle, last = saved["points"]
    kinds = ("base", "novel", "hm", "all", "joint")
    assert {k: first[k] for k in kinds} == {k: results["zero_shot"][k] for k in kinds}
    assert {k: last[k] for k in kinds} == {k: results[k] for k in kinds}
    clip = between(run, 0.5)
    for part, names in (("base", BASE), ("novel", NOVEL)):
        assert middle[part] == pytest.approx(byhand.accuracy(clip, data / "test", names))
    assert f"curve: {run / 'keep_share.png'}" in result.out
    with Image.open(run / "keep_share.png") as picture:
        assert len(picture.getcolors(100_000)) > 10
    assert {name: (run / name).read_bytes() for name in before} == before  # and nothing else


def test_one_share_is_a_row_and_leaves_no_curve(run, script):
    files = sorted(run.iterdir())
    result = script("eval", "--run", run, "--keep-share", "0.5")
    assert (result.code, result.err) == (0, "")
    assert list(table(result.out)) == ["zero-shot", "lora, 0.5 kept"]
    assert sorted(run.iterdir()) == files


def test_a_frozen_tower_sees_test_images_once_for_all_shares(
    script, data, model, tmp_path, monkeypatch
):
    where = ("--dataset", "folder", "--data-root", data, "--model", model, "--out", tmp_path)
    assert script("train", "--method", "prolip", "--epochs", 2, *where).code == 0
    (path,) = tmp_path.glob("*/*/prolip-*")
    monkeypatch.setenv("CLIP_MIN_CACHE", str(tmp_path / "cache"))
    seen, real = [], VisionTower.embed
    monkeypatch.setattr(VisionTower, "embed", lambda t, x: seen.append(len(x)) or real(t, x))
    counts = []
    for shares in ("1", "0,0.2,0.4,0.6,0.8,1"):
        seen.clear()
        result = script("eval", "--run", path, "--keep-share", shares, "--cache", "none")
        assert result.code == 0, result.err
        counts.append(sum(seen))
    assert counts[0] == counts[1] > 0
    assert table(result.out)["prolip, 0 kept"] == table(result.out)["zero-shot"]


def test_on_another_data_set_and_on_pictures(run, script, data, draw, tmp_path):
    draw(tmp_path / "other/test", 3, seed=5)
    draw(tmp_path / "other/train", 2, seed=6)
    other = ("--dataset", "folder", "--data-root", tmp_path / "other")
    result = script("eval", "--run", run, *other, "--keep-share", "0.5")
    assert (result.code, result.err) == (0, "")
    clip = between(run, 0.5)
    accuracy = byhand.accuracy(clip, tmp_path / "other/test", BASE + NOVEL)
    assert table(result.out)["lora, 0.5 kept"] == [f"{accuracy:.2f}"]
    file = data / "test/blue-bell/0.png"
    result = script("eval", "--run", run, "--image", file, "--keep-share", "0.5")
    assert (result.code, result.err) == (0, "")
    names = [name.replace("-", " ").replace("_", " ") for name in BASE + NOVEL]
    likely = byhand.logits(clip, [file], names)[0].softmax(-1).sort(descending=True)
    shown = [line.split(" %  ") for line in result.out.splitlines()[1:]]
    assert [name for _, name in shown] == [names[i] for i in likely.indices]
    percents = [float(percent) for percent, _ in shown]
    assert percents == pytest.approx([100 * p for p in likely.values.tolist()], abs=0.02)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--keep-share", "1.5"], "--keep-share: invalid value: '1.5'; expected a number from 0"),
        (["--keep-share", "-0.1"], "expected a number from 0 to 1"),
        (["--keep-share", "0,nan,1"], "invalid value: '0,nan,1'"),
        (["--keep-share", "inf"], "expected a number from 0 to 1"),
        (["--keep-share", ""], "invalid value: ''"),
        (["--keep-share", "0,,1"], "invalid value: '0,,1'"),
        (["--keep-share", "half"], "invalid value: 'half'"),
        (["--keep-share", "0,1", "--dataset", "demo"], "with --image or --dataset, give one"),
        (["--keep-share", "0,1", "--image", "a.png"], "with --image or --dataset, give one"),
    ],
)
def test_a_share_that_cannot_be_is_one_line(more, said, trained, script, is_one_line, tmp_path):
    assert is_one_line(script("eval", "--run", trained.path, *more), said)
    if len(more) == 2:
        out = ("--format", "peft", tmp_path / "out")
        assert is_one_line(script("export", "--run", trained.path, *more, *out), "--keep-share")
        assert not (tmp_path / "out").exists()


def test_shares_are_of_a_run_and_an_export_has_one(trained, script, is_one_line, tmp_path):
    flags = ("--method", "zero_shot", "--keep-share", "0.5")
    assert is_one_line(script("eval", *flags), "--keep-share: works only with --run DIR")
    out = ("--format", "peft", "--keep-share", "0,1", tmp_path / "out")
    assert is_one_line(script("export", "--run", trained.path, *out), "expected one number")


def test_a_method_that_did_not_start_at_zero_shot_is_refused(
    script, data, model, tmp_path, is_one_line
):
    where = ("--dataset", "folder", "--data-root", data, "--model", model, "--out", tmp_path)
    assert script("train", "--method", "vpt", "--epochs", 1, "--n-tokens", 2, *where).code == 0
    (path,) = tmp_path.glob("*/*/vpt-*")
    said = "VPT did not start at zero-shot CLIP"
    for more in ((), ("--image", data / "test/blue-bell/0.png")):
        assert is_one_line(script("eval", "--run", path, "--keep-share", "0.5", *more), said)
    out = ("--format", "classifier", tmp_path / "out.safetensors")
    assert is_one_line(script("export", "--run", path, "--keep-share", "0.5", *out), said)
    assert sorted(tmp_path.glob("*/*/vpt-*/keep*")) == []


def test_a_method_of_base_names_alone_has_a_curve_too(script, data, model, tmp_path):
    where = ("--dataset", "folder", "--data-root", data, "--model", model, "--out", tmp_path)
    assert script("train", "--method", "cross_modal", "--epochs", 2, *where).code == 0
    (path,) = tmp_path.glob("*/*/cross_modal-*")
    result = script("eval", "--run", path, "--keep-share", "0,1")
    assert (result.code, result.err) == (0, "")
    saved = json.loads((path / "keep_share.json").read_text())
    zero_shot = json.loads((path / "results.json").read_text())["zero_shot"]
    assert saved["points"][0]["base"] == zero_shot["base"]
    assert saved["points"][0]["novel"] is saved["points"][0]["joint"] is None


def test_an_export_is_of_the_share(run, script, tmp_path, data):
    plain = tmp_path / "half.safetensors"
    flags = ("--run", run, "--keep-share", "0.5")
    result = script("export", *flags, "--format", "safetensors", plain)
    assert (result.code, result.err) == (0, "")
    assert "lora, keep-share 0.5, as safetensors" in result.out
    found, expected = clip_min.load(plain), between(run, 0.5)
    for key, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], tensor, rtol=1e-5, atol=1e-6)
    whole = tmp_path / "whole.safetensors"
    assert script("export", "--run", run, "--format", "safetensors", whole).code == 0
    model = json.loads((run / "config.json").read_text())["model"]
    for share, same in (("0", model), ("1", whole)):
        one = tmp_path / f"{share}.safetensors"
        flags = ("--run", run, "--keep-share", share, "--format", "safetensors", one)
        assert script("export", *flags).code == 0
        pairs = (clip_min.load(place).state_dict().values() for place in (one, same))
        assert all(torch.equal(*pair) for pair in zip(*pairs, strict=True))


def test_a_picture_of_the_curve_where_there_are_no_halves(tmp_path):
    scores = {"base": None, "novel": None, "all": 50.0}
    save_curve("lora", {0.0: scores, 1.0: scores | {"all": 60.0}}, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert len(picture.getcolors(100_000)) > 10
