"""The course's notebooks run, and what is kept of their pictures is small.

Each lesson compares what it computes by hand with ours, in assertions of its own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

COURSE = Path(__file__).parents[2] / "docs" / "course"
NOTEBOOKS = sorted(COURSE.glob("*.ipynb"))
QUICK = ("1_", "2_")  # the others, which train, take up to a minute each

lessons = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def run(path: Path, root: Path) -> str:
    """Run a notebook as tools/notebooks.py does -> what went wrong, "" if nothing did."""
    command = [sys.executable, "tools/notebooks.py", "--check", path]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def marks(path: Path) -> tuple:
    return () if path.name.startswith(QUICK) else (pytest.mark.slow,)


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=marks(path)) for path in NOTEBOOKS]
)
def test_no_cell_raises(path, root):
    before = path.read_bytes()
    assert not run(path, root)
    assert path.read_bytes() == before  # a check writes nothing


def test_a_cell_that_raises_is_told(tmp_path, root):
    cell = {"cell_type": "code", "source": ["x = 1\n", "assert x == 2\n"]}
    (tmp_path / "wrong.ipynb").write_text(json.dumps({"cells": [cell]}))
    assert "wrong, cell 1" in run(tmp_path / "wrong.ipynb", root)


def test_there_are_eight_lessons():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{n}_" for n in range(8)]


@lessons
def test_a_lesson_has_its_parts(path):
    """A question, a check, pictures, two exercises, and answers to both."""
    cells = read(path)
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    code = [c for c in cells if c["cell_type"] == "code"]
    assert re.match(r"# \d · .+\n\n\*\*.+[?].*\*\*\n", text), "a title, then the question in bold"
    assert re.search(r"\bassert\b|assert_close", "".join(s for c in code for s in c["source"]))
    exercises, answers = text.split("## Exercises")[1].split("### Answers")
    for part in (exercises, answers):
        assert re.findall(r"^\*\*(\d)\.\*\*", part, re.MULTILINE) == ["1", "2"]


@lessons
def test_outputs_are_kept_in_order_and_small(path):
    code = [cell for cell in read(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    shown = [o for cell in code for o in cell["outputs"] if o["output_type"] == "display_data"]
    drawn = sum("".join(cell["source"]).count("plt.show()") for cell in code)
    assert len(shown) == drawn >= 2
    assert path.stat().st_size < 400_000
