"""The demo task's results table: every method, mean and spread over seeds.

    python bench/demo_table.py [--methods zero_shot,lora] [--seeds 1,2,3] [--out DIR]

Runs `python train.py --method NAME --seed S` as a user would, one after another, and reads the
results.json of each. Seconds are of the whole command, memory its peak. For DISEF they include the
making of its synthetic images, whose number and seconds have columns of their own; disef_f1 finds
its filter among the runs of lora, if these came first.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from side_by_side import show

from methods import METHODS

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--out", help="keep the runs here; default: nowhere")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(flags.out or temporary).resolve()
        methods, seeds = flags.methods.split(","), [int(s) for s in flags.seeds.split(",")]
        rows = [measure(method, seeds, out) for method in methods]
    zero = rows[0] if rows[0]["method"] == "zero_shot" else None
    gains = {
        row["method"]: {f"{part}_gain": row[part] - zero[part] for part in ("base", "novel", "hm")}
        for row in rows
        if zero and row is not zero and row["hm"] is not None
    }
    show(f"demo task, {len(seeds)} seeds: mean (and standard deviation)", rows, gains=gains)


def measure(method: str, seeds: list[int], out: Path) -> dict:
    results, walls = [], []
    for seed in seeds:
        command = [sys.executable, "train.py", "--method", method, "--seed", str(seed)]
        started = time.perf_counter()
        subprocess.run([*command, "--out", str(out)], cwd=ROOT, check=True, stdout=sys.stderr)
        walls.append(time.perf_counter() - started)
        path = out / "demo" / "demo" / f"{method}-s10-seed{seed}" / "results.json"
        results.append(json.loads(path.read_text()))
    row = {"method": method}
    for part in ("base", "novel", "hm"):
        values = [result[part] for result in results]
        known = None not in values
        row[part] = statistics.mean(values) if known else None
        row[f"{part} std"] = statistics.stdev(values) if known and len(values) > 1 else None
    made = [result["synthetic"] for result in results if "synthetic" in result]
    for column, key in (("synthetic images", "images"), ("making them s", "seconds")):
        row[column] = statistics.mean(float(one[key]) for one in made) if made else None
    row["parameters"] = results[0]["parameters"]
    row["seconds"] = statistics.mean(walls)
    row["peak MB"] = max(result["peak_memory_mb"] for result in results)
    return row


if __name__ == "__main__":
    main()
