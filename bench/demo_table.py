"""The demo task's results table: every method, mean and spread over seeds.

    python bench/demo_table.py [--rows "zero_shot,lora,vpt --deep"] [--seeds 1,2,3] [--out DIR]

Runs `python train.py --method ROW --seed S` as a user would, one after another, and reads each
results.json. Seconds are of the whole command, peak memory is that of training and testing.
Transductive methods, which label test images jointly, get a separate table, with zero-shot CLIP on
the same tasks. DISEF's seconds include making its synthetic images, also shown in a column of their
own; those of disef_f1 also include training its LoRA filter. A run that exists in --out is not
trained again; seconds and memory are of the runs trained now.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from side_by_side import markdown, show

from fewshot.grid import spread
from methods import METHODS

ROOT = Path(__file__).parent.parent
# Settings that readers look for, each after its method.
VARIANTS = {
    "zero_shot": ["--templates ensemble"],
    "clip_adapter": ["--depth-head"],
    "coop": ["--depth-head"],
    "kgcoop": ["--depth-head"],
    "vpt": ["--deep"],
    "finetune": ["--objective contrastive", "--train last-2 --class-share 0.5"],
    "em_dirichlet": ["--use-support"],
    "transclip": ["--use-support", "--tasks 200"],
}
ALL = [f"{name} {flags}".strip() for name in METHODS for flags in ["", *VARIANTS.get(name, [])]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default=",".join(ALL), help="methods, optionally with flags")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--out", help="folder to keep the runs in; default: none")
    flags = parser.parse_args()
    seeds = [int(s) for s in flags.seeds.split(",")]
    inductive, transductive = [], []
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(flags.out or temporary).resolve()
        for row in flags.rows.split(","):
            results, walls = run(row, seeds, out)
            if METHODS[row.split()[0]].transductive:
                zero_shot = [result["zero_shot"] for result in results]
                transductive += [
                    {"method": "zero-shot, same tasks", **accuracies(zero_shot)},
                    {"method": row, **accuracies(results)},
                ]
            else:
                made = [
                    result["synthetic"]["images"] for result in results if "synthetic" in result
                ]
                timed = {i: wall for i, wall in enumerate(walls) if wall is not None}
                memory = [results[i]["peak_memory_mb"] for i in timed]
                costs = {
                    "parameters": results[0]["parameters"],
                    "seconds": statistics.mean(timed.values()) if timed else None,
                    "peak MB": max(memory, default=None),
                    "synthetic images": round(statistics.mean(made)) if made else None,
                }
                inductive.append({"method": row, **accuracies(results), **costs})
    if transductive:
        print(f"transductive tasks, {len(seeds)} seeds\n\n{markdown(transductive)}\n")
    if inductive:
        zero = next((row for row in inductive if row["method"] == "zero_shot"), None)
        gains = {
            row["method"]: {
                f"{part}_gain": row[part] - zero[part] for part in ("base", "novel", "hm")
            }
            for row in inductive
            if zero and row is not zero and row["hm"] is not None
        }
        title = f"demo task, {len(seeds)} seeds: mean and standard deviation"
        show(title, inductive, threads=1, transductive=transductive, gains=gains)


def run(row: str, seeds: list[int], out: Path) -> tuple[list[dict], list[float | None]]:
    """Train `row` with every seed -> the runs' results and seconds; None, if a run existed."""
    results, walls = [], []
    for seed in seeds:
        folder = out / row.replace(" ", "_") / str(seed)
        command = [sys.executable, "train.py", "--method", *shlex.split(row)]
        command += ["--seed", str(seed), "--out", str(folder)]
        kept = f"{row.split()[0]}-s*/results.json"  # disef_f1's folder also has its filter's
        started = time.perf_counter()
        if there := list(folder.rglob(kept)):
            walls.append(None)
        else:
            subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
            walls.append(time.perf_counter() - started)
        (path,) = there or folder.rglob(kept)
        results.append(json.loads(path.read_text()))
    return results, walls


def accuracies(results: list[dict]) -> dict:
    """Mean and standard deviation over runs of base, novel, HM and the HM among all names; None
    where a run has none.
    """
    found, cells = spread(results), {}
    for column in ("base", "novel", "hm", "all names"):
        score = found.get("joint_hm" if column == "all names" else column, {})
        cells[column], cells[f"{column} std"] = score.get("mean"), score.get("std")
    return cells


if __name__ == "__main__":
    main()
