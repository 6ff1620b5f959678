"""How cost grows: with classes, shots, images and processes, each with its exponent.

    python bench/scaling.py [--methods coop,lora] [--classes 500,2000,10000] [--plot FILE.svg]
    python bench/scaling.py --model ViT-B/16 --classes 100,1000      random weights, on all cores
    python bench/scaling.py … --methods cocoop --batch 1             images in a step

The demo model on one thread, with generated data. The measurements are:

    classes     a first gradient step on a batch (16 images), without the optimizer; for methods
                without steps, what they solve; and testing a batch, with tokenizing the names and
                computing class features
    shots       what a method solves or stores before its steps, for 20 classes
    images      testing pictures in memory with zero-shot CLIP
    processes   encoding the largest number of --images with 1, 2, … processes under torchrun

Memory is the peak above the memory before. The exponent p is from the best fit of a power law,
cost = a · n^p (least squares of logarithms): 1 is linear, 0 is constant. With --model only classes
are measured.
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
from clip_min import CLIP, CONFIGS
from fewshot import ranks
from fewshot.batches import Batches
from fewshot.experiment import run_script
from fewshot.pictures import Pictures, Reader
from methods import METHODS

WORDS = ("red", "blue", "tall", "wild", "small", "late", "sweet", "sea", "sun", "rock")
KINDS = ("rose", "lily", "iris", "daisy", "tulip", "orchid", "poppy", "clover", "fern", "moss")
NOTHING = 1e-3  # seconds or MB: less counts as no cost
# All methods that use class names, except those below and variants of these.
LINEAR = ("zero_shot", "clip_adapter", "projection", "prolip", "tip_adapter", "gda", "cross_modal")
LINEAR += ("coop", "kgcoop", "cocoop", "promptsrc", "vpt", "two_stage", "lora", "finetune")


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
    """Size -> cost  =>  the slope of log cost over log size; None for fewer than two costs above
    `NOTHING`.
    """
    pairs = [(math.log(n), math.log(cost)) for n, cost in points.items() if cost > NOTHING]
    if len(pairs) < 2:
        return None
    x, y = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    across = sum((a - x) ** 2 for a, _ in pairs)
    return sum((a - x) * (b - y) for a, b in pairs) / across


def loaded(model: str) -> clip_min.CLIP:
    """The demo model, or a model of another size with random weights."""
    torch.manual_seed(0)
    return clip_min.load("demo") if model == "demo" else CLIP(CONFIGS[model]).eval()


def method_cost(
    model: str, name: str, classes: int, shots: int, batch: int, rounds: int
) -> dict[str, float]:
    """Seconds of solving, of a step and of a test, and MB, with the default recipe."""
    clip, kind = loaded(model), METHODS[name]
    recipe = "default" if "default" in kind.recipes else next(iter(kind.recipes))
    settings = kind.Settings(**kind.preset(recipe, model))
    train, val = (drawn(classes, shots, clip.config.embed_dim) for _ in range(2))
    images = torch.randn(batch, 3, clip.config.image_size, clip.config.image_size)
    labels = torch.arange(batch) % classes
    cost, ways = {}, {}

    def once() -> None:
        method, descends = kind(clip, classnames(classes), "a photo of a {}.", settings), []
        began = time.perf_counter()
        method.fit(train, val, lambda *_: descends.append(1))
        cost["fit"] = time.perf_counter() - began
        x = method.encode(images)

        def step() -> None:
            method.train()
            method.zero_grad()
            method.loss(x, labels).backward()

        def test() -> None:
            method.set_classes(method.classnames)  # else class features may be stored
            with method.inference():
                method.classify(x)

        ways.update({"step": step, "test": test} if descends else {"test": test})
        for way in ways.values():
            began = time.perf_counter()
            way()
            cost["once"] = max(cost.get("once", 0), time.perf_counter() - began)

    cost["MB"] = first_step_mb(once)
    return cost | seconds(ways, rounds if cost["once"] < 5 else 1)


def pictures(count: int) -> Batches:
    """Noise of the demo model's size."""
    size = clip_min.load("demo").config.image_size
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=rng)
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


def plot(panels: dict[str, tuple[str, dict[str, dict[int, float]]]], path: str) -> None:
    """Plot title -> (what is measured, row -> size -> cost), with a panel for each title."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = math.ceil(len(panels) / 2)
    figure, axes = plt.subplots(2, columns, figsize=(5.5 * columns, 8), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, (measured, rows)) in zip(axes.flat, panels.items(), strict=False):
        colours = plt.get_cmap("tab20")(range(len(rows)))
        for (name, points), colour in zip(rows.items(), colours, strict=True):
            axis.plot(points.keys(), points.values(), marker="o", label=name, color=colour)
        axis.set(xscale="log", yscale="log", xlabel=title, ylabel=measured)
        sizes = sorted({size for points in rows.values() for size in points})
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.xaxis.minorticks_off()
        axis.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.endswith("svg") else None)


def by_classes(costs: dict[str, dict[int, dict[str, float]]]) -> list[dict]:
    """Method -> classes -> `method_cost`  =>  the rows of a table."""
    rows = []
    for name, points in costs.items():
        step = {k: of.get("step", of["fit"]) for k, of in points.items()}
        test, mb = ({k: of[what] for k, of in points.items()} for what in ("test", "MB"))
        most = max(points)
        row = (
            {"method": name} | {f"s, {k:,}": step[k] for k in points} | {"exponent": exponent(step)}
        )
        row |= {f"MB, {most:,}": mb[most], "MB exponent": exponent(mb)}
        rows.append(row | {f"test s, {most:,}": test[most], "test exponent": exponent(test)})
    return rows


def main() -> None:
    def several(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", default=",".join(LINEAR))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--classes", type=several, default=[500, 2000, 10000])
    parser.add_argument("--shots", type=several, default=[1, 4, 16])
    parser.add_argument("--images", type=several, default=[500, 2000, 8000])
    parser.add_argument("--processes", type=several, default=[1, 2])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", metavar="FILE", help="also draw the curves")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--encode", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    whole = flags.model == "demo"
    if whole:
        torch.set_num_threads(1)
    if flags.encode:
        encode(flags.encode)
        return
    if flags.measure:
        name, *sizes = flags.measure  # classes and shots of each, as "10x4"
        cells = [tuple(map(int, size.split("x"))) for size in sizes]
        tasks = [(flags.model, name, *cell, flags.batch, flags.rounds) for cell in cells]
        with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as fresh:
            print(json.dumps(fresh.starmap(method_cost, tasks, chunksize=1)))
        return
    costs, shots = {}, {}
    for name in flags.methods.split(","):
        sizes = [f"{k}x4" for k in flags.classes]
        sizes += [f"20x{s}" for s in flags.shots] if whole else []
        given = ("--model", flags.model, "--batch", flags.batch, "--rounds", flags.rounds)
        found = measure(*given, "--measure", name, *sizes)
        costs[name] = dict(zip(flags.classes, found, strict=False))
        solved = [cost["fit"] for cost in found[len(flags.classes) :]]
        if solved and max(solved) > NOTHING:
            shots[name] = dict(zip(flags.shots, solved, strict=True))
    rows = by_classes(costs)
    print(f"{flags.model}, batch {flags.batch}\n{hardware()}\n\n{markdown(rows)}", flush=True)
    step = {m: {k: of.get("step", of["fit"]) for k, of in at.items()} for m, at in costs.items()}
    memory = {m: {k: of["MB"] for k, of in at.items()} for m, at in costs.items()}
    panels = {"classes": ("seconds", step), "classes ": ("MB", memory)}
    if whole:
        counts, many = flags.images, flags.processes
        other = {"shots": shots, "images": {"encode": {n: by_processes(n, 1) for n in counts}}}
        other["processes"] = {"encode": {p: by_processes(max(counts), p) for p in many}}
        panels |= {axis: ("seconds", named) for axis, named in other.items()}
        rows = [
            {"what": f"{axis}: {name}", "from": min(points), "to": max(points)}
            | {"s, first": points[min(points)], "s, last": points[max(points)]}
            | {"exponent": exponent(points)}
            for axis, named in other.items()
            for name, points in named.items()
        ]
        print(f"\n{markdown(rows)}")
    print("\n" + json.dumps({"panels": panels, "costs": costs, "hardware": hardware()}))
    if flags.plot:
        plot(panels, flags.plot)
        print(f"plot: {Path(flags.plot)}")


if __name__ == "__main__":
    run_script(main, shared=True)
