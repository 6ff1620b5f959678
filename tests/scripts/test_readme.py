"""What the README shows can be typed."""

import re
import shlex

import pytest
import torch

from clip_min import CLIP, CLIPConfig, tokenize
from methods import METHODS

COMMAND = re.compile(
    r"^python (train|eval|generate|export|report)\.py (.+?)(?: +#.*)?$", re.MULTILINE
)


@pytest.fixture(scope="module")
def blocks(root) -> list[str]:
    """The README's code blocks, with continued lines joined."""
    text = (root / "README.md").read_text(encoding="utf-8")
    return [b.replace("\\\n", " ") for b in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)]


def test_the_flags_of_every_command_are_known(blocks, script):
    commands = [match for block in blocks for match in COMMAND.findall(block)]
    assert len(commands) > 15
    for name, text in commands:
        words = shlex.split(text)
        method = [words[i + 1] for i, word in enumerate(words) if word == "--method"]
        help = script(name, *(["--method", *method] if method else []), "--help").out
        unknown = [w for w in words if w.startswith("--") and not re.search(rf"{w}\b", help)]
        assert not unknown, f"{name}.py {text}"
        if name == "train" and "folder" in words:  # pictures: the demo's model is of no use
            assert "--model" in words, text


@pytest.fixture(scope="module")
def task_residual(blocks) -> type:
    """The class that the README shows."""
    (code,) = [block for block in blocks if "class TaskResidual(" in block]
    names: dict = {"__name__": "task_residual"}
    exec(code, names)
    return names["TaskResidual"]


def test_the_method_of_your_own_is_taskres_as_published(task_residual):
    """α·x is added to text features that are not normalised, and the sum is normalised."""
    torch.manual_seed(0)
    clip, names = CLIP(CLIPConfig(8, 32, 32, 64, 1, 1, 64, 1, 1)).eval(), ["a rose", "a tulip"]
    method = task_residual(clip, names, "{}!", task_residual.Settings(alpha=0.5))
    torch.nn.init.normal_(method.residual)
    f, x = torch.randn(3, 8), method.residual
    with torch.no_grad():
        t = clip.encode_text(tokenize([f"{name}!" for name in names])) + 0.5 * x
        expected = (
            clip.logit_scale.exp() * (f / f.norm(dim=1, keepdim=True)) @ (t.T / t.norm(dim=1))
        )
        torch.testing.assert_close(method.classify(f), expected)


def test_the_method_of_your_own_trains_and_is_tested(
    task_residual, script, data, model, tmp_path, monkeypatch
):
    monkeypatch.setitem(METHODS, "task_residual", task_residual)
    flags = ["--dataset", "folder", "--data-root", data, "--model", model, "--out", tmp_path]
    more = ["--shots", 4, "--alpha", 0.7, "--epochs", 20, "--lr", 0.01]
    trained = script("train", "--method", "task_residual", *flags, *more)
    assert trained.code == 0, trained.err
    assert f"{3 * 32} trained parameters" in trained.out  # K x E
    (run,) = tmp_path.glob("noise/*/task_residual-*")
    tested = script("eval", "--run", run)
    assert tested.code == 0, tested.err
    row = re.compile(r"^task_residual +(\S+) +n/a", re.MULTILINE)
    assert row.findall(tested.out) == row.findall(trained.out) != []
