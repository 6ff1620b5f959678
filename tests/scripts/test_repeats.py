"""The same command gives the same bytes, wherever it runs; and memory does not grow with steps."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = "noise/tiny/lora-s4-seed1"
BYTES = ("adapter.safetensors", "predictions.safetensors", "data.json", "curves.png")
TIMES = {"seconds", "peak_memory_mb"}


def told(run: Path) -> tuple:
    """What a run left that tells neither the time nor where it lies."""
    results = json.loads((run / "results.json").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in of.items() if k not in TIMES} for of in (results, *log)]
    return [(run / name).read_bytes() for name in BYTES], timeless


@pytest.mark.parametrize(
    ("seed", "locale"),
    [
        ("1", "C"),
        pytest.param("2", "tr_TR.UTF-8", marks=pytest.mark.slow),
        pytest.param("3", "tr_TR.ISO-8859-9", marks=pytest.mark.slow),
    ],
)
def test_another_process_hash_seed_locale_and_folder_with_spaces_give_the_same_bytes(
    seed, locale, data, flags, trained, root, tmp_path
):
    there = tmp_path / ("a folder, with spaces" + (locale != "C") * " and ığ")
    shutil.copytree(data, there / "noise")
    given = [there / "noise" if flag == data else flag for flag in flags]
    more = {"PYTHONHASHSEED": seed, "LC_ALL": locale, "LANG": locale, "PYTHONUTF8": "0"}
    more |= {"TZ": "Asia/Kathmandu", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    known = [sys.executable, "-c", "import locale; locale.setlocale(locale.LC_ALL, '')"]
    if subprocess.run(known, env=os.environ | more, capture_output=True).returncode:
        pytest.skip(f"this machine has no locale {locale}; LOCPATH may name a folder of some")
    command = [sys.executable, root / "train.py", *given, "--out", "its runs", "--cache", "none"]
    made = subprocess.run(
        list(map(str, command)), cwd=there, env=os.environ | more, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert told(there / "its runs" / HERE) == told(trained.path)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_more_than_the_last_bits(
    threads, train, trained, tmp_path
):
    before = torch.get_num_threads()
    try:
        run = train(tmp_path, "--threads", threads)
    finally:
        torch.set_num_threads(before)
    for file in ("adapter.safetensors", "predictions.safetensors"):
        one, other = load_file(trained.path / file), load_file(run / file)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert torch.allclose(tensor.double(), other[name].double(), rtol=0, atol=1e-5), name


STEPS = """
import sys, torch
from pathlib import Path
import train
real, held = torch.Tensor.backward, []
def backward(*arguments, **options):
    real(*arguments, **options)
    lines = Path("/proc/self/status").read_text().splitlines()
    held.append(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")))
    if len(held) == 2_000:
        first, last = (sorted(part)[len(part) // 2] for part in (held[200:400], held[-200:]))
        print("held", first, last)
        sys.exit()
torch.Tensor.backward = backward
train.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("augment", ["none", "crop-flip"])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells memory so")
def test_two_thousand_steps_take_no_more_memory_than_four_hundred(augment, root, tmp_path):
    flags = ["--method", "lora", "--epochs", 200, "--patience", 0, "--out", tmp_path]
    command = [sys.executable, "-c", STEPS, *map(str, flags), "--augment", augment]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    first, last = map(int, said.stdout.split("held")[1].split())
    assert last < 1.02 * first
