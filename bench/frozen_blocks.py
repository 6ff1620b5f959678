"""A training step in which only the last blocks learn: from stored tokens, and from images.

    python bench/frozen_blocks.py [--blocks 3] [--images 16] [--classes 51] [--rounds 3]

ViT-B/16 with random weights; loss, backward and AdamW. "kept" starts from the result of `encode`,
computed once for each image: the tokens before the first block that learns. "from images" computes
the frozen blocks in each step. Losses and gradients of both are compared, and multiplications are
counted (torch.utils.flop_counter, two operations each; without the two products inside attention,
which it does not know on a CPU).
"""

import argparse

import torch
from cocoop_step import classnames
from side_by_side import relative, seconds, show
from torch.utils.flop_counter import FlopCounterMode

from clip_min import CLIP, CONFIGS
from methods import METHODS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--classes", type=int, default=51)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    torch.manual_seed(0)
    clip, rows = CLIP(CONFIGS["ViT-B/16"]), []
    images = torch.randn(flags.images, 3, 224, 224)
    labels = torch.arange(flags.images) % flags.classes
    for name, settings in {
        "lora": {"blocks": f"{12 - flags.blocks}-11", "dropout": 0.0},
        "finetune": {"train": f"last-{flags.blocks}"},
    }.items():
        kind = METHODS[name]
        settings = kind.Settings(**settings)
        method = kind(clip, classnames(flags.classes), "a photo of a {}.", settings).train()
        first = method.first_block
        inputs = {"kept": (first, method.encode(images)), "from images": (0, images)}
        learned = [p for p in method.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=1e-6)

        def backward(way: str, method=method, inputs=inputs) -> torch.Tensor:
            method.zero_grad()
            method.first_block, x = inputs[way]
            loss = method.loss(x, labels)
            loss.backward()
            return loss.detach()

        found = {way: (backward(way), [p.grad.clone() for p in learned]) for way in inputs}
        flops = {}
        for way in inputs:
            with FlopCounterMode(display=False) as counter:
                backward(way)
            flops[way] = counter.get_total_flops()

        def step(way: str, backward=backward, optimizer=optimizer) -> None:
            backward(way)
            optimizer.step()

        taken = seconds({way: lambda way=way, step=step: step(way) for way in inputs}, flags.rounds)
        (loss, gradients), (other, others) = found.values()
        pairs = zip(gradients, others, strict=True)
        differ = max(relative(loss, other), *(relative(a, b) for a, b in pairs))
        rows += [
            {
                "method": name,
                "way": way,
                "GFLOP": flops[way] / 1e9,
                "seconds": taken[way],
                "kept is faster by": f"{taken[way] / taken['kept']:.2f}x",
                "differ by": differ,
            }
            for way in inputs
        ]
    show(f"One step, ViT-B/16, last {flags.blocks} blocks of 12, {flags.images} images", rows)


if __name__ == "__main__":
    main()
