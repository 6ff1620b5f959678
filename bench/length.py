"""Check whether the default recipe trains long enough: compare 3 and 10 times its length.

python bench/length.py DIR                        DIR: pictures, laid out as for --dataset folder
python bench/length.py DIR --methods lora,coop --classes 2,12 --shots 4 --seeds 1,2,3

For every method that learns by gradient steps, a line: test accuracy of the default recipe, and in
brackets the gains on validation and on test images from the best length. Accuracies are means over
seeds, and the best length has the best mean on validation. Its gain there is an upper bound, since
chance favours the best of several. The classes are drawn by the seed; the model is the demo's.
Methods that learn on image features take minutes each, those that learn in the towers (vpt, lora,
finetune) hours; --longer 3 leaves out the longest training. With --out FILE, each training's result
is kept there, a line of JSON, and what it holds already is not trained again.
"""

import argparse
import contextlib
import io
import json
import random
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import torch
from side_by_side import hardware

import clip_min
from fewshot import datasets
from fewshot.loop import descend
from fewshot.metrics import accuracy_on
from fewshot.pictures import Pictures, Reader
from fewshot.task import make_task
from methods import METHODS, TrainingSettings

# Not these: they learn from synthetic images, too, and are LoRA without.
LEARN = [
    name
    for name, method in METHODS.items()
    if issubclass(method.Settings, TrainingSettings) and not name.startswith("disef")
]


def cut(whole: datasets.Dataset, count: int, seed: int) -> datasets.Dataset:
    """`count` classes of a data set, drawn by `seed`."""
    ids = sorted(random.Random(seed).sample(range(len(whole.classnames)), count))
    numbers = torch.full((len(whole.classnames),), -1)  # old label -> new one
    numbers[ids] = torch.arange(count)

    def of(pictures: Pictures | None) -> Pictures | None:
        if pictures is None:
            return None
        some = pictures[(numbers[pictures.labels] >= 0).nonzero().flatten()]
        return replace(some, labels=numbers[some.labels])

    parts = {part: of(getattr(whole, part)) for part in ("train", "val", "test")}
    return replace(whole, classnames=[whole.classnames[i] for i in ids], **parts)


def longer(name: str, times: int) -> TrainingSettings:
    """The default recipe, `times` as long."""
    settings = METHODS[name].Settings(**METHODS[name].preset("default", "demo"))
    length = {"epochs": times * settings.epochs, "min_steps": times * settings.min_steps}
    return replace(settings, **length)


def train(name: str, clip, task, seed: int, settings) -> tuple[float, float]:
    """Train -> accuracy on validation and test images (%)."""
    torch.manual_seed(seed)
    method = METHODS[name](clip, task.classnames, "a photo of a {}.", settings)
    nowhere = SimpleNamespace(
        save_adapter=lambda state: None,
        log_round=lambda entry: None,
        save_resume=lambda tensors, position: None,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        method.fit(task.train, task.val, partial(descend, run=nowhere, seed=seed))
    return accuracy_on(method, task.val), accuracy_on(method, task.tests["all"].batches)


class Kept:
    """Results in a file of JSON lines, each with its key: all that was trained with."""

    def __init__(self, file: Path | None):
        self.file = file
        lines = file.read_text().splitlines(keepends=True) if file and file.exists() else []
        entries = [json.loads(line) for line in lines if line.endswith("\n")]  # else killed there
        if file and len(entries) < len(lines):
            file.write_text("".join(lines[: len(entries)]))
        self.results = {json.dumps(entry["key"]): entry["scores"] for entry in entries}

    def get(self, key: list, compute) -> tuple[float, float]:
        text = json.dumps(key)
        if text not in self.results:
            start = time.perf_counter()
            self.results[text] = compute()
            entry = {"key": key, "scores": self.results[text]}
            entry["seconds"] = round(time.perf_counter() - start, 1)
            if self.file:
                with self.file.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
        return self.results[text]


def main() -> None:
    numbers = lambda text: [int(number) for number in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=LEARN)
    parser.add_argument("--classes", type=numbers, default=[2, 4, 12])
    parser.add_argument("--shots", type=numbers, default=[2, 4, 16])
    parser.add_argument("--seeds", type=numbers, default=[1, 2, 3])
    parser.add_argument("--longer", type=numbers, default=[3, 10])  # multiples of the default
    parser.add_argument("--out", metavar="FILE", type=Path)
    given = parser.parse_args()
    kept = Kept(given.out)
    torch.set_num_threads(1)
    whole, clip = datasets.load("folder", given.folder, 1), clip_min.load("demo")
    if max(given.classes) > (there := len(whole.classnames)):
        parser.error(f"--classes {max(given.classes)}: {given.folder} has {there}; give fewer")
    cells = [(k, s) for k in given.classes for s in given.shots]
    heads = [f"{k} x {s}" for k, s in cells]
    print(f"{hardware()}; {len(given.seeds)} seeds; classes x shots")
    print(f"| method | {' | '.join(heads)} |\n|---|{'---:|' * len(cells)}", flush=True)
    worst = [0.0, 0.0]
    for name in given.methods:
        row = []
        for count, shots in cells:
            scores: dict[int, list] = {n: [] for n in (1, *given.longer)}  # (val, test) by seed
            for seed in given.seeds:
                task = make_task(cut(whole, count, seed), shots, seed, "all", Reader(64))
                for n, of in scores.items():
                    settings = longer(name, n)
                    key = [given.folder.name, name, count, shots, seed, asdict(settings)]
                    of.append(kept.get(key, partial(train, name, clip, task, seed, settings)))
            means = [tuple(map(mean, zip(*of, strict=True))) for of in scores.values()]
            (val, test), best = means[0], max(means, key=lambda pair: pair[0])
            worst = [max(worst[0], best[0] - val), max(worst[1], best[1] - test)]
            row.append(f"{test:.1f} ({best[0] - val:+.1f}, {best[1] - test:+.1f})")
        print(f"| {name} | {' | '.join(row)} |", flush=True)
    print(
        f"largest gains by a longer training: validation {worst[0]:.1f}, test {worst[1]:.1f} points"
    )


if __name__ == "__main__":
    main()
