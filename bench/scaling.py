"""How cost grows: with classes, shots, images and processes, each with its exponent.

    python bench/scaling.py [--methods coop,lora] [--classes 10,100,1000] [--plot FILE.png]

The demo model on one thread, with generated data. The measurements are:

    classes     a gradient step on 16 images; for methods without steps, what they solve
    shots       what a method solves or stores before its steps, for 20 classes
    images      testing pictures in memory with zero-shot CLIP
    processes   encoding the largest number of --images with 1, 2, … processes under torchrun

Memory is the peak above the memory before. The exponent p is from the best fit of a power law,
cost = a · n^p (least squares of logarithms): 1 is linear, 0 is constant.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from side_by_side import first_step_mb, hardware, markdown, seconds

import clip_min
from fewshot import ranks
from fewshot.batches import Batches
from fewshot.experiment import run_script
from fewshot.pictures import Pictures, Reader
from methods import METHODS

WORDS = ("red", "blue", "tall", "wild", "small", "late", "sweet", "sea", "sun", "rock")
KINDS = ("rose", "lily", "iris", "daisy", "tulip", "orchid", "poppy", "clover", "fern", "moss")
BATCH = 16


def classnames(count: int) -> list[str]:
    """Up to 10,000 names of four words."""
    every = itertools.product(WORDS, WORDS, WORDS, KINDS)
    return [" ".join(words) for words in itertools.islice(every, count)]


def drawn(classes: int, shots: int, embed: int) -> SimpleNamespace:
    """Replaces the features of `shots` pictures of each class."""
    labels = torch.arange(classes).repeat_interleave(shots)
    x = torch.randn(classes, embed)[labels] + torch.randn(len(labels), embed)
    return SimpleNamespace(encoded=lambda method: x, labels=labels, shots=shots)


def exponent(points: dict[int, float]) -> float | None:
    """Size -> cost  =>  the slope of log cost over log size; None for fewer than two."""
    pairs = [(math.log(n), math.log(cost)) for n, cost in points.items() if cost > 0]
    if len(pairs) < 2:
        return None
    x, y = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    across = sum((a - x) ** 2 for a, _ in pairs)
    return sum((a - x) * (b - y) for a, b in pairs) / across


def method_cost(name: str, classes: int, shots: int, rounds: int) -> dict[str, float]:
    """Seconds and MB of a step, and seconds of solving, with the default recipe."""
    torch.manual_seed(0)
    clip, kind = clip_min.load("demo"), METHODS[name]
    recipe = "default" if "default" in kind.recipes else next(iter(kind.recipes))
    settings = kind.Settings(**kind.preset(recipe, "demo"))
    method = kind(clip, classnames(classes), "a photo of a {}.", settings)
    train, val = (drawn(classes, shots, clip.config.embed_dim) for _ in range(2))
    descends = []
    started = time.perf_counter()
    mb = first_step_mb(lambda: method.fit(train, val, lambda *_: descends.append(1)))
    cost = {"fit": time.perf_counter() - started}
    if descends:
        size = clip.config.image_size
        x = method.encode(torch.randn(BATCH, 3, size, size))
        labels = torch.arange(BATCH) % classes

        def step() -> None:
            method.train()
            method.zero_grad()
            method.loss(x, labels).backward()

        mb = first_step_mb(step)
        cost["step"] = seconds({"step": step}, rounds)["step"]
    return {**cost, "MB": mb}


def pictures(count: int) -> Batches:
    """Noise of the demo model's size."""
    size = clip_min.load("demo").config.image_size
    dice = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=dice)
    return Batches(Pictures(pixels, torch.arange(count) % 2), pixels, Reader(size, folder=None))


def encode(count: int) -> None:
    """Print the seconds in which all processes together encode pictures and gather features."""
    clip, batches = clip_min.load("demo"), pictures(count)
    method = METHODS["zero_shot"].plain(clip, classnames(2), "a photo of a {}.")
    ranks.wait()
    started = time.perf_counter()
    batches.encoded(method)
    print(json.dumps({"seconds": time.perf_counter() - started}))


def measure(*flags) -> list[dict]:
    """The output of this file in a fresh process."""
    command = [sys.executable, "-W", "ignore", __file__, *map(str, flags)]
    return json.loads(subprocess.check_output(command, text=True).splitlines()[-1])


def by_processes(count: int, processes: int) -> float:
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *many, "--", __file__, "--encode", str(count)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])["seconds"]


def plot(curves: dict[str, dict[str, dict[int, float]]], path: str) -> None:
    """Plot axis -> row -> size -> seconds, with a panel for each axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.5), squeeze=False)
    for panel, (axis, rows) in zip(panels[0], curves.items(), strict=True):
        for name, points in rows.items():
            panel.plot(points.keys(), points.values(), marker="o", label=name)
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="seconds")
        panel.legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    def several(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", default="coop,kgcoop,lora,gda,tip_adapter,clip_adapter")
    parser.add_argument("--classes", type=several, default=[10, 100, 1000])
    parser.add_argument("--shots", type=several, default=[1, 4, 16])
    parser.add_argument("--images", type=several, default=[500, 2000, 8000])
    parser.add_argument("--processes", type=several, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", metavar="FILE", help="also draw the curves")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--encode", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    if flags.encode:
        encode(flags.encode)
        return
    if flags.measure:
        name, *sizes = flags.measure  # classes and shots of each, as "10x4"
        tasks = [(name, *map(int, size.split("x")), flags.rounds) for size in sizes]
        with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as fresh:
            print(json.dumps(fresh.starmap(method_cost, tasks, chunksize=1)))
        return
    curves: dict[str, dict[str, dict[int, float]]] = {"classes": {}, "shots": {}}
    memory: dict[str, dict[int, float]] = {}
    for name in flags.methods.split(","):
        sizes = [f"{k}x4" for k in flags.classes] + [f"20x{s}" for s in flags.shots]
        found = measure("--rounds", flags.rounds, "--measure", name, *sizes)
        costs = dict(zip(flags.classes, found, strict=False))
        curves["classes"][name] = {k: of.get("step", of["fit"]) for k, of in costs.items()}
        memory[name] = {k: of["MB"] for k, of in costs.items()}
        costs = dict(zip(flags.shots, found[len(flags.classes) :], strict=True))
        curves["shots"][name] = {s: of["fit"] for s, of in costs.items()}
    counts, processes = flags.images, flags.processes
    curves["images"] = {"encode": {n: by_processes(n, 1) for n in counts}}
    curves["processes"] = {"encode": {p: by_processes(max(counts), p) for p in processes}}
    rows = []
    for axis, named in curves.items():
        for name, points in named.items():
            mb = memory.get(name) if axis == "classes" else None
            ends = {"from": min(points), "to": max(points)}
            cost = {"s, first": points[min(points)], "s, last": points[max(points)]}
            fits = {"exponent": exponent(points), "MB's": exponent(mb) if mb else None}
            rows.append({"what": f"{axis}: {name}", **ends, **cost, **fits})
    print(f"demo model, batch {BATCH}\n{hardware()}\n\n{markdown(rows)}")
    print("\n" + json.dumps({"curves": curves, "MB": memory, "hardware": hardware()}))
    if flags.plot:
        plot(curves, flags.plot)
        print(f"plot: {Path(flags.plot)}")


if __name__ == "__main__":
    run_script(main, shared=True)
