"""train.py, eval.py and export.py with prompts written for each class."""

import json

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import clip_min

NAMES = ["amber lily", "blue bell", "cyan lotus", "dark iris", "egg flower"]


def own(**more) -> dict:
    """One text for the first class, two for the second …"""
    texts = ["a photo of a {}.", "{}, a kind of flower.", "a {} in a garden.", "one {}", "many {}"]
    return {name: texts[: k + 1] for k, name in enumerate(NAMES)} | more


@pytest.fixture
def file(tmp_path):
    def write(content: dict):
        (tmp_path / "own.json").write_text(json.dumps(content))
        return tmp_path / "own.json"

    return write


@pytest.fixture
def call(script, data, model, tmp_path):
    def run(*flags, method="clip_adapter"):
        where = ("--dataset", "folder", "--data-root", data, "--model", model)
        common = ("--shots", 4, "--epochs", 2, "--min-steps", 4, "--out", tmp_path / "runs")
        more = common if method == "clip_adapter" else common[-2:]
        return script("train", "--method", method, *where, *more, *flags)

    return run


def table(printed: str) -> str:
    return "\n".join(
        line for line in printed.splitlines() if line.startswith(("zero-", "clip_adapter  "))
    )


def test_a_run_is_tested_and_exported_without_the_file(call, script, file, tmp_path, model):
    path = file(own(bluebell=["x"]))
    result = call("--prompts", path)
    assert result.code == 0, result.err
    assert (
        "note: --prompts: has texts for names that are not classes: bluebell (near blue bell)"
        in (result.out)
    )
    assert "prompts of 6 classes" in result.out  # not their texts
    path.unlink()
    run = tmp_path / "runs/noise/tiny/clip_adapter-s4-seed1"
    assert json.loads((run / "config.json").read_text())["settings"]["prompts"] == own(
        bluebell=["x"]
    )
    again = script("eval", "--run", run)
    assert again.code == 0, again.err
    assert table(again.out) == table(result.out) != ""

    exported = call("--prompts", file(own()), method="zero_shot")
    assert exported.code == 0, exported.err
    run, out = tmp_path / "runs/noise/tiny/zero_shot-s10-seed1", tmp_path / "rows.safetensors"
    assert script("export", "--run", run, "--format", "classifier", out).code == 0
    clip = clip_min.load(str(model))
    rows = []
    for name in NAMES:
        tokens = clip_min.tokenize([text.replace("{}", name) for text in own()[name]])
        rows.append(F.normalize(F.normalize(clip.encode_text(tokens), dim=-1).mean(0), dim=0))
    torch.testing.assert_close(safetensors.torch.load_file(out)["weight"], torch.stack(rows))
    with safetensors.safe_open(out, "pt") as opened:
        about = json.loads(opened.metadata()["clip_min"])
    assert about["prompts"]["blue bell"] == [
        "a photo of a blue bell.",
        "blue bell, a kind of flower.",
    ]
    assert "template" not in about


def test_resuming_wants_the_same_texts(call, file, is_one_line):
    assert call("--prompts", file(own())).code == 0
    other = own() | {"blue bell": ["another."]}
    assert is_one_line(call("--prompts", file(other), "--resume"), "blue bell [", "another.")
    assert is_one_line(call("--resume"), "was started with prompts {", "not None")


def test_a_run_of_before_there_were_prompts_goes_on(call, tmp_path):
    assert call().code == 0
    config = tmp_path / "runs/noise/tiny/clip_adapter-s4-seed1/config.json"
    old = json.loads(config.read_text())
    del old["settings"]["prompts"]
    config.write_text(json.dumps(old))
    result = call("--resume")
    assert result.code == 0, result.err


def test_zero_shot_is_tested_with_them(script, data, model, file):
    where = ("--method", "zero_shot", "--dataset", "folder", "--data-root", data, "--model", model)
    result = script("eval", *where, "--prompts", file(own()))
    assert result.code == 0, result.err
    assert "zero-shot, prompts" in result.out
    picture = next((data / "test").rglob("*.png"))
    where = ("--method", "zero_shot", "--image", picture, "--model", model)
    result = script("eval", *where, "--classes", "blue bell,dark iris", "--prompts", file(own()))
    assert result.code == 0, result.err
    assert "dark iris" in result.out


@pytest.mark.parametrize(
    ("method", "content", "more", "said"),
    [
        ("coop", own(), (), ("--prompts: coop (", "does not read prompts")),
        ("linear_probe", own(), (), ("--prompts: linear_probe (",)),
        ("lora", {k: v for k, v in own().items() if k != "dark iris"}, (), ("dark iris; every",)),
        ("lora", {"rose": []}, (), ("own.json: rose has no text",)),
        ("zero_shot", own(), ("--templates", "a {}"), ("--templates and --prompts",)),
    ],
)
def test_what_cannot_be_is_one_line(method, content, more, said, call, file, is_one_line, tmp_path):
    assert is_one_line(call("--prompts", file(content), *more, method=method), *said)
    assert not (tmp_path / "runs").exists()
