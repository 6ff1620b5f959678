"""Each bench runs, at its smallest: what it times may change under it without any other test."""

import os
import subprocess
import sys

import pytest

SMALLEST = {
    "busy_core.py": "--rounds 1",
    "cocoop_step.py": "--classes 10 --batch 1 --rounds 1",
    "demo_table.py": "--rows zero_shot,gda --seeds 1",
    "embedding.py": "--model demo --images 8 --rounds 1",
    "encode_image.py": "--batch 1 --rounds 1",
    "frozen_blocks.py": "--images 1 --classes 2 --rounds 1",
    "generation.py": "--images 8 --batch 2 --rounds 1",
    "import_time.py": "--rounds 1",
    "length.py": "FLOWERS --methods prolip --classes 2 --shots 2 --seeds 1",
    "linear.py": "--rounds 1",
    "loading.py": "--images 8 --rounds 1",
    "lora_step.py": "--images 1 --classes 2 --rounds 1",
    "method_costs.py": "--methods coop,lora --classes 2 --batch 1 --rounds 1",
    "parity.py": "",
    "precision.py": "--model demo --steps 2",
    "scaling.py": "--methods coop,gda --classes 2,8 --shots 1,2 --images 8,70 --rounds 1",
}
PARTS = {"side_by_side.py"}  # what the benches share


def test_every_bench_is_run_here(root):
    assert {path.name for path in (root / "bench").glob("*.py")} == {*SMALLEST, *PARTS}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_runs(name, root, flowers12):
    flags = [str(flowers12) if f == "FLOWERS" else f for f in SMALLEST[name].split()]
    found = subprocess.run(
        [sys.executable, root / "bench" / name, *flags],
        cwd=root,
        env={**os.environ, "CLIP_MIN_CACHE": "none"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert any(character.isdigit() for character in found.stdout)
