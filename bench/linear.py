"""Linear layers of a ViT-B/16 in PyTorch's two libraries: F.linear (MKL), a convolution (oneDNN).

    python bench/linear.py [--rounds 10]

Each row is a linear layer of CLIP on a typical number of tokens: 3,152 for 16 images, 225 to 421
for the prompts of 51 classes. "step" is forward, and backward to the input, as with a frozen
weight. "chosen": whether clip_min/fast.py uses oneDNN for it on this processor. Both give the same
numbers to float rounding (last column). With one thread, PyTorch uses MKL for both.
"""

import argparse
import unittest.mock

import torch
import torch.nn.functional as F
from side_by_side import relative, seconds, show

from clip_min import fast

LAYERS = {  # name: tokens T, D, O
    "image in_proj": (3152, 768, 2304),
    "image out_proj": (3152, 768, 768),
    "image c_fc": (3152, 768, 3072),
    "image c_proj": (3152, 3072, 768),
    "LoRA's A, image": (3152, 768, 128),
    "text in_proj": (225, 512, 1536),
    "text c_fc": (225, 512, 2048),
    "demo image c_fc": (2080, 128, 512),
    "demo text c_fc": (600, 64, 256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    flags = parser.parse_args()
    torch.manual_seed(0)
    rows = [compare(name, *sizes, flags.rounds) for name, sizes in LAYERS.items()]
    show("Linear layers, float32", rows)


def compare(name: str, tokens: int, width: int, out: int, rounds: int) -> dict:
    x = torch.randn(tokens, width, requires_grad=True)
    weight, bias, upstream = torch.randn(out, width), torch.randn(out), torch.randn(tokens, out)

    def forward(way):
        with torch.no_grad():
            return way(x, weight, bias)

    def step(way):
        return torch.autograd.grad(way(x, weight, bias), x, upstream)[0]

    ways = {
        f"{part}, {library}": lambda run=run, way=way: run(way)
        for part, run in (("forward", forward), ("step", step))
        for library, way in (("MKL", F.linear), ("oneDNN", fast.linear))
    }
    chosen = fast.convolves(x, weight)
    with unittest.mock.patch.object(fast, "convolves", return_value=True):
        taken = seconds(ways, rounds)
        differ = max(relative(run(fast.linear), run(F.linear)) for run in (forward, step))
    return {
        "layer": name,
        "T x D x O": f"{tokens} x {width} x {out}",
        "MKL GFLOP/s": 2e-9 * tokens * width * out / taken["forward, MKL"],
        "oneDNN GFLOP/s": 2e-9 * tokens * width * out / taken["forward, oneDNN"],
        "forward": f"{taken['forward, MKL'] / taken['forward, oneDNN']:.2f}x",
        "step": f"{taken['step, MKL'] / taken['step, oneDNN']:.2f}x",
        "chosen": str(chosen),
        "differ by": differ,
    }


if __name__ == "__main__":
    main()
