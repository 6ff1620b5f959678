"""The cost of every method at ViT-B/16: a gradient step, and testing 1,000 images.

    python bench/method_costs.py [--methods lora,vpt] [--batch 16] [--classes 51]

Weights are random. Each method runs in a fresh process with the settings of its default recipe. A
step is loss, backward and optimizer on a batch of encoded images: where part of the method is
frozen, its output is stored. Memory is the peak of the first step above the memory before it. `fit`
is anything that a method solves or searches besides such steps, on 10 features for each class.
Testing starts from images for all methods, and is timed on one batch.
"""

import argparse
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import torch
from cocoop_step import classnames
from side_by_side import first_step_mb, seconds, show

from clip_min import CLIP, CONFIGS
from methods import METHODS

SHOTS = 10


def random_set(classes: int, embed: int) -> SimpleNamespace:
    """Replaces the stored features: SHOTS of each class."""
    labels = torch.arange(classes).repeat_interleave(SHOTS)
    centres, noise = torch.randn(classes, embed), torch.randn(len(labels), embed)
    x = centres[labels] + noise
    return SimpleNamespace(encoded=lambda method: x, labels=labels, shots=SHOTS)


def measure(name: str, classes: int, batch: int, rounds: int) -> dict:
    torch.manual_seed(0)
    clip = CLIP(CONFIGS["ViT-B/16"])
    method_class = METHODS[name]
    settings = method_class.Settings(**next(iter(method_class.recipes.values())))
    method = method_class(clip, classnames(classes), "a photo of a {}.", settings)

    started = time.perf_counter()
    train, val = (random_set(classes, clip.config.embed_dim) for _ in range(2))
    method.fit(train, val, lambda *_: None)
    row = {"method": name, "fit s": time.perf_counter() - started}

    images, labels = torch.randn(batch, 3, 224, 224), torch.arange(batch) % classes
    x = method.encode(images)
    row["learns on"] = {2: "features", 3: "tokens", 4: "images"}[x.dim()]
    learned = [p for p in method.parameters() if p.requires_grad]
    row["parameters"] = sum(p.numel() for p in learned)
    row["ms/step"] = row["step MB"] = None
    if learned:
        optimizer = torch.optim.AdamW(learned, lr=1e-5)

        def step() -> None:
            method.train()
            optimizer.zero_grad()
            method.loss(x, labels).backward()
            optimizer.step()

        row["step MB"] = first_step_mb(step)
        row["ms/step"] = 1000 * seconds({"step": step}, rounds)["step"]

    def test() -> None:
        method(images)

    with method.inference():
        row["s/1000 tested"] = 1000 / batch * seconds({"test": test}, rounds)["test"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--classes", type=int, default=51)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure:
        row = measure(flags.measure, flags.classes, flags.batch, flags.rounds)
        print(json.dumps(row))
        return
    rows = []
    for name in flags.methods.split(","):
        command = [sys.executable, "-W", "ignore", __file__, "--measure", name]
        for flag in ("classes", "batch", "rounds"):
            command += [f"--{flag}", str(getattr(flags, flag))]
        rows.append(json.loads(subprocess.check_output(command, text=True).splitlines()[-1]))
    show(f"ViT-B/16, {flags.classes} classes, batch {flags.batch}", rows)


if __name__ == "__main__":
    main()
