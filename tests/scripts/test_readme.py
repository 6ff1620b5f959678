"""What the README shows can be typed."""

import re
import shlex

import pytest

from methods import METHODS

COMMAND = re.compile(r"^python (train|eval|generate|export)\.py (.+?)(?: +#.*)?$", re.MULTILINE)


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


def test_the_method_of_your_own_trains_and_is_tested(
    blocks, script, data, model, tmp_path, monkeypatch
):
    (code,) = [block for block in blocks if "class TaskResidual(" in block]
    names: dict = {"__name__": "task_residual"}
    exec(code, names)
    monkeypatch.setitem(METHODS, "task_residual", names["TaskResidual"])
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
