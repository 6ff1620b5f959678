"""Imports run downward only, none that is slow or optional runs early, and names are told apart."""

import ast
import configparser
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# scripts -> methods/interop, gen -> methods, fewshot -> clip_min: what the files of each folder may
# import of this project beside their own folder. Methods need no experiment, and the experiment
# knows none by name; gen reads pictures as the experiment does, interop its run folders, and
# reports what both leave. Above them all stand the scripts at the root, bench, tools and tests,
# which may import anything.
BELOW = {
    "clip_min": set(),
    "fewshot": {"clip_min"},
    "methods": {"clip_min"},
    "methods/interop": {"clip_min", "fewshot", "methods"},
    "gen": {"clip_min", "fewshot", "methods"},
    "reports": {"clip_min", "fewshot", "gen"},
}
FOLDERS = {*BELOW, "bench", "tools", "tests"}

# Slow to import or not wanted by everyone: these belong inside the function that needs them.
HEAVY = {"transformers", "diffusers", "bitsandbytes", "accelerate", "matplotlib"}
HEAVY |= {"huggingface_hub", "open_clip", "clip", "peft", "loralib"}


def folder(name: str) -> str:
    """The folder of `BELOW` that a dotted name lies in; of others, the name's first part."""
    two = "/".join(name.split(".")[:2])
    return two if two in BELOW else name.split(".")[0]


def imports(node: ast.AST, at_top: bool = True) -> Iterator[tuple[str, bool, int]]:
    """What a file imports from elsewhere: its folder or first part, at_top, line."""
    for child in ast.iter_child_nodes(node):
        names = []
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom) and child.level == 0:
            names = [f"{child.module}.{alias.name}" for alias in child.names]
        elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith(
            ("import_module", "__import__")
        ):  # by a name of which at least the beginning is written down
            names = [n.value for n in ast.walk(child.args[0]) if isinstance(n, ast.Constant)][:1]
        yield from ((name, at_top, child.lineno) for name in {folder(n) for n in names})
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(child, at_top and not function)


def sources(root: Path) -> list[Path]:
    """The files of the packages."""
    return sorted({path for package in BELOW for path in (root / package).rglob("*.py")})


def upward(root: Path) -> list[str]:
    """The imports of packages that go up, as "fewshot/task.py:7 imports methods"."""
    scripts = {path.stem for path in root.glob("*.py")}
    found = []
    for path in sources(root):
        here = folder(".".join(path.relative_to(root).parts))
        for name, _, line in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if name in (FOLDERS | scripts) - BELOW[here] - {here}:
                found.append(f"{path.relative_to(root)}:{line} imports {name}")
    return found


def heavy(root: Path) -> list[str]:
    """The heavy libraries that packages and scripts import at top level."""
    found = []
    for path in [*root.glob("*.py"), *sources(root)]:
        unwanted = HEAVY | ({"tqdm"} if path.is_relative_to(root / "clip_min") else set())
        for name, at_top, line in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if at_top and name in unwanted:
                found.append(f"{path.relative_to(root)}:{line} imports {name}")
    return found


def test_no_import_goes_up(root):
    assert list((root / "clip_min").glob("*.py"))  # this is the place
    assert not upward(root)


def test_no_two_files_share_a_name(root):
    """And none has a package's, so that a name in a sentence or an import says which."""
    files = {*root.glob("*.py"), *(path for f in FOLDERS for path in (root / f).rglob("*.py"))}
    names = [path.stem for path in files if path.name not in ("__init__.py", "conftest.py")]
    names += [Path(folder).name for folder in FOLDERS]
    assert {name for name in names if names.count(name) > 1} == set()


@pytest.mark.parametrize("place", ["bench", "tools"])
def test_benches_and_tools_find_the_clone_before_they_import_what_is_not_installed(root, place):
    for path in (root / place).glob("*.py"):
        found = False
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            found |= ast.unparse(node).startswith(("from side_by_side", "sys.path.insert"))
            wanted = {name for name, at_top, _ in imports(ast.Module([node], [])) if at_top}
            assert found or not wanted & {*FOLDERS, "train"} - {"clip_min"}, path


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
        ("gen/a.py", "import fewshot.demo, methods.disef, train", "train"),
        ("fewshot/a.py", "from gen.plan import draw", "gen"),
        ("methods/a.py", "import gen", "gen"),
        ("methods/a.py", "from tests.conftest import x", "tests"),
        ("methods/a.py", "from methods import interop", "methods/interop"),
        ("methods/interop/a.py", "from gen import plan", "gen"),
        ("gen/a.py", "import methods.interop.load", "methods/interop"),
    ],
)
def test_an_upward_import_is_found(tmp_path, file, source, complaint):
    """The search itself, on one bad file among good ones."""
    for path, text in {
        "train.py": "import methods, fewshot",
        "clip_min/model.py": "import torch",
        "methods/lora.py": "from . import base\nfrom clip_min import CLIP\nimport methods.base",
        "methods/interop/load.py": "import fewshot.run, methods.interop.a\nfrom methods import x",
        "gen/filter.py": "from methods import BaseSettings",
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


WITHOUT = """
import importlib, sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in blocked else super().find_spec(name, path, target)

blocked = set(sys.argv[2:])
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
for file in sys.argv[1].split(","):
    importlib.import_module(file)
print("all", *blocked & set(sys.modules))
"""


def test_every_module_is_imported_without_the_optional_packages(root):
    """As after `pip install -e .`, where the extras' packages are not there."""
    optional = (HEAVY | {"pillow_heif", "sklearn", "selenium", "hypothesis", "pytest"}) - {
        "matplotlib",
        "huggingface_hub",
    }
    files = [*root.glob("*.py"), *sources(root)]
    names = [".".join(file.relative_to(root).with_suffix("").parts) for file in files]
    names = [name.removesuffix(".__init__") for name in names]
    command = [sys.executable, "-c", WITHOUT, ",".join(names), *optional]
    said = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert said.stdout == "all\n", said.stderr


def test_what_ci_tries_as_oldest_is_what_the_metadata_promises(root):
    metadata = configparser.ConfigParser()
    metadata.read(root / "setup.cfg")
    promised = metadata["options"]["install_requires"]
    promised += metadata["options.extras_require"]["test"]
    promised = {line for line in promised.splitlines() if ">=" in line and "#" not in line}
    tried = (root / ".ci/oldest.txt").read_text().splitlines()
    tried = {line.replace("==", ">=") for line in tried if not line.startswith("#")}
    assert {"torch", "torchvision", "transformers", "pillow"} <= {n.split(">")[0] for n in tried}
    assert tried <= promised
