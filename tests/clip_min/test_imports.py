"""Imports run downward only, and none that is slow or optional runs before it is needed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# scripts -> methods, gen -> fewshot -> clip_min: what each package may import of this project.
# (gen reads pictures as the experiment does, and paints the demo's; methods need no experiment.)
# Above them all stand the scripts at the root, bench, tools and tests, which may import anything.
BELOW = {
    "clip_min": set(),
    "fewshot": {"clip_min"},
    "gen": {"clip_min", "fewshot"},
    "methods": {"clip_min"},
}
FOLDERS = {*BELOW, "bench", "tools", "tests"}

# Slow to import or not wanted by everyone: these belong inside the function that needs them.
HEAVY = {"transformers", "diffusers", "bitsandbytes", "accelerate", "matplotlib"}
HEAVY |= {"huggingface_hub", "open_clip", "clip", "peft", "loralib"}


def imports(node: ast.AST, at_top: bool = True) -> Iterator[tuple[str, bool, int]]:
    """What a file imports from outside its package: first part of the name, at_top, line."""
    for child in ast.iter_child_nodes(node):
        names = []
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom) and child.level == 0:
            names = [child.module]
        elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith(
            ("import_module", "__import__")
        ):  # by a name of which at least the beginning is written down
            names = [n.value for n in ast.walk(child.args[0]) if isinstance(n, ast.Constant)][:1]
        yield from ((name.split(".")[0], at_top, child.lineno) for name in names)
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(child, at_top and not function)


def upward(root: Path) -> list[str]:
    """The imports of packages that go up, as "fewshot/task.py:7 imports methods"."""
    scripts = {path.stem for path in root.glob("*.py")}
    found = []
    for package, below in BELOW.items():
        for path in sorted((root / package).rglob("*.py")):
            for name, _, line in imports(ast.parse(path.read_text(encoding="utf-8"))):
                if name in (FOLDERS | scripts) - below - {package}:
                    found.append(f"{path.relative_to(root)}:{line} imports {name}")
    return found


def heavy(root: Path) -> list[str]:
    """The heavy libraries that packages and scripts import at top level."""
    found = []
    for path in sorted([*root.glob("*.py"), *(p for b in BELOW for p in (root / b).rglob("*.py"))]):
        unwanted = HEAVY | ({"tqdm"} if path.is_relative_to(root / "clip_min") else set())
        for name, at_top, line in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if at_top and name in unwanted:
                found.append(f"{path.relative_to(root)}:{line} imports {name}")
    return found


def test_no_import_goes_up(root):
    assert list((root / "clip_min").glob("*.py"))  # this is the place
    assert not upward(root)


def test_no_heavy_library_is_imported_at_top_level(root):
    assert not heavy(root)


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("clip_min/a.py", "import fewshot.task", "fewshot"),
        ("clip_min/a.py", "def f():\n    from methods import lora", "methods"),
        ("clip_min/deep/a.py", "from train import main", "train"),
        ("fewshot/a.py", "import clip_min, methods.lora as lora", "methods"),
        ("fewshot/a.py", "importlib.import_module(f'methods.{name}')", "methods"),
        ("methods/a.py", "try:\n    from fewshot import loop\nfinally:\n    pass", "fewshot"),
        ("gen/a.py", "from tools.make import x", "tools"),
        ("gen/a.py", "import fewshot.demo, methods.disef", "methods"),
        ("fewshot/a.py", "from gen.plan import draw", "gen"),
        ("methods/a.py", "import gen", "gen"),
        ("methods/a.py", "from tests.conftest import x", "tests"),
    ],
)
def test_an_upward_import_is_found(tmp_path, file, source, complaint):
    """The search itself, on one bad file among good ones."""
    for path, text in {
        "train.py": "import methods, fewshot",
        "clip_min/model.py": "import torch",
        "methods/lora.py": "from . import base\nfrom clip_min import CLIP\nimport methods.base",
        file: source,
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (found,) = upward(tmp_path)
    assert found.startswith(f"{file}:")
    assert found.endswith(f" imports {complaint}")


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("clip_min/a.py", "import tqdm", True),
        ("fewshot/a.py", "import tqdm", False),
        ("fewshot/a.py", "import matplotlib.pyplot as plt", True),
        ("fewshot/a.py", "def plot():\n    import matplotlib.pyplot as plt", False),
        ("methods/a.py", "class A:\n    from peft import LoraConfig", True),
        ("train.py", "if True:\n    import diffusers", True),
        ("gen/a.py", "async def f():\n    import diffusers", False),
        ("bench/a.py", "import transformers", False),
    ],
)
def test_a_heavy_import_is_found_where_it_runs_at_once(tmp_path, file, source, found):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(source)
    assert bool(heavy(tmp_path)) == found


def test_importing_clip_min_loads_no_heavy_library(root):
    """In a process of its own, and with what others import counted too."""
    code = "import sys, clip_min; clip_min.CLIP, clip_min.load; print(*sys.modules)"
    run = [sys.executable, "-c", code]
    said = subprocess.run(run, cwd=root, capture_output=True, text=True, check=True, timeout=120)
    loaded = {name.split(".")[0] for name in said.stdout.split()}
    assert {"clip_min", "torch"} < loaded
    assert not loaded & (HEAVY | {"fewshot", "methods", "gen"})
