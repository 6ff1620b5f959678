"""Seconds that `import clip_min` takes beyond `import torch, torchvision`.

python bench/import_time.py [--rounds 5]
"""

import argparse
import statistics
import subprocess
import sys

from side_by_side import show

CODE = """
import time, torch, torchvision
started = time.perf_counter()
import clip_min
print(time.perf_counter() - started)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    run = [sys.executable, "-c", CODE]
    taken = [float(subprocess.check_output(run, text=True)) for _ in range(rounds + 1)][1:]
    row = {"import": "clip_min", "seconds": statistics.median(taken)}
    show("import clip_min, after torch and torchvision", [row], seconds=row["seconds"])


if __name__ == "__main__":
    main()
