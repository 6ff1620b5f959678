"""What the README and the pages of docs/ show can be typed, and is there."""

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from clip_min import CLIP, CLIPConfig, tokenize
from methods import METHODS

COMMAND = re.compile(
    r"^python (train|eval|generate|export|report)\.py (.+?)(?: +#.*)?$", re.MULTILINE
)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


@pytest.fixture(scope="module")
def pages(root) -> dict[Path, str]:
    """README, CONTRIBUTING and docs/, with continued lines joined."""
    files = [root / "README.md", root / "CONTRIBUTING.md", *sorted(root.glob("docs/**/*.md"))]
    return {file: file.read_text(encoding="utf-8").replace("\\\n", " ") for file in files}


def blocks_of(text: str) -> list[str]:
    return re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def blocks(pages) -> list[str]:
    return [block for text in pages.values() for block in blocks_of(text)]


def test_the_flags_of_every_command_are_known(blocks, script):
    commands = [match for block in blocks for match in COMMAND.findall(block)]
    assert len(commands) > 30
    helps: dict[tuple, str] = {}
    for name, text in commands:
        words = shlex.split(text)
        method = [words[i + 1] for i, word in enumerate(words) if word == "--method"]
        if (key := (name, *method)) not in helps:
            flags = ["--method", *method] if method else []
            helps[key] = script(name, *flags, "--help").out
        unknown = [w for w in words if w[:2] == "--" and not re.search(rf"{w}\b", helps[key])]
        assert not unknown, f"{name}.py {text}"
        if name == "train" and "folder" in words:  # pictures: the demo's model is of no use
            assert "--model" in words, text


def test_links_lead_to_files(pages):
    for file, text in pages.items():
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        gone = [link for link in LINK.findall(prose) if not (file.parent / link).exists()]
        assert not gone, file


def test_the_readme_can_be_read_to_the_end(pages, root):
    count = len((root / "README.md").read_text().splitlines())
    assert count <= 220, "what is added takes the place of something else"


def test_the_tree_counts_lines_as_they_are(pages, root):
    """To a tenth: `python tools/tree.py` writes them anew."""
    spec = importlib.util.spec_from_file_location("tree", root / "tools/tree.py")
    tree = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tree)
    (shown,) = [
        b for b in blocks_of(pages[root / "README.md"]) if "clip_min/" in b and "tests/" in b
    ]
    lines = list(zip(shown.splitlines(), tree.counted(shown).splitlines(), strict=True))
    assert len(lines) > 15
    for before, now in lines:
        said, counted = (int(tree.LINE.match(line)[4].replace(",", "")) for line in (before, now))
        assert said == pytest.approx(counted, rel=0.1), before


def test_the_python_of_the_readme_runs(pages, root, trained, data, tmp_path, monkeypatch, capsys):
    """In a folder with a picture and the run of the demo's main command."""
    run = tmp_path / "runs/demo/demo/lora-s10-seed1"
    shutil.copytree(trained.path, run)
    shutil.copy(next(data.rglob("*.png")), tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    (code,) = [b for b in blocks_of(pages[root / "README.md"]) if b.startswith("import")]
    exec(code, names)
    shares = names["clip"].logits(names["f"], names["w"]).softmax(dim=-1)
    printed = capsys.readouterr().out
    assert f"{shares[0, 0]:.4f}" in printed
    assert "a.jpg " in printed
    assert [logits.shape for logits in names["logits"]] == [(1, 2), (1, 2)]


@pytest.fixture(scope="module")
def task_residual(blocks) -> type:
    """The class that docs/your-method.md shows."""
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
