"""Make the demo model: a small CLIP, trained from scratch on clean drawings.

    python tools/pretrain_demo.py [--steps 3000] [--out clip_min/assets/demo.safetensors]

The objective is CLIP's (arXiv:2103.00020, section 2.3): in a batch of N images and their N
captions, each image must pick its caption and each caption its image, a symmetric cross-entropy
over N x N cosines. The images are drawings of the pretraining species of fewshot/demo.py. The model
never sees a species of the demo task, or a photo. Two things make 3,000 steps enough:
- A batch has up to 128 species of three petal colours. Colour alone does not distinguish them, so
  the model must learn shape and eye.
- At first all flowers have the same place, size and rotation; these vary more and more over the
  first steps.

Tokens that occur in no caption keep their random embedding (no gradient, no weight decay), so that
prompts of classes with other names still differ.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_min import CLIP, CONFIGS, normalize, save, tokenize

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from fewshot import demo  # noqa: E402

ASSET = ROOT / "clip_min" / "assets" / "demo.safetensors"
TEMPLATES = [
    "a drawing of a {}.",
    "a photo of a {}, a type of flower.",
    "a photo of a {}.",
    "a picture of a {}, a flower.",
    "a painting of a small {}.",
    "the {} is a flower.",
    "a {}.",
    "{}",
]
BATCH = 128  # images, at most
COLOURS = 3  # petal colours in a batch
WARMUP, SETTLED = 50, 150  # steps until the learning rate and the variety of poses are full
LR, DECAY = 1e-3, 0.1


def pretrain(steps: int) -> CLIP:
    torch.manual_seed(0)
    clip = CLIP(CONFIGS["demo"])
    species = demo.indices(demo.PRETRAINING)  # (S, 3)
    names = [kind.name for kind in demo.PRETRAINING]
    tokens = [
        tokenize([t.replace("{}", name) for name in names]) for t in TEMPLATES
    ]  # each (S, 77)
    matrices, others = [], []
    for name, parameter in clip.named_parameters():
        is_matrix = parameter.ndim > 1 and "embedding" not in name
        (matrices if is_matrix else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    started, mean = time.perf_counter(), None
    for step in range(steps):
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = LR * min(1, (step + 1) / WARMUP) * cosine
        few = torch.randperm(len(demo.PETALS))[:COLOURS]
        chosen = torch.isin(species[:, 0], few).nonzero().flatten()
        chosen = chosen[torch.randperm(len(chosen))[:BATCH]]  # (N,) different species
        noise = torch.rand(len(chosen), demo.NOISE)
        noise = 0.5 + (noise - 0.5) * min(1, step / SETTLED)  # 0.5: the middle of every range
        images = normalize(demo.render(species[chosen], noise, "drawing"))  # (N, 3, n, n)
        captions = tokens[int(torch.randint(len(TEMPLATES), ()))][chosen]  # (N, 77)
        logits = clip(images, captions)  # (N, N)
        pairs = torch.arange(len(chosen))
        loss = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():  # as in CLIP: a scale above 100 would be unstable
            clip.logit_scale.clamp_(max=math.log(100))
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - started
            print(f"step {step + 1}/{steps}  loss {mean:.3f}  {seconds:.0f} s", flush=True)
    return clip.eval()


@torch.no_grad()
def zero_shot(clip: CLIP, images: Tensor, labels: Tensor) -> list[float]:
    """Accuracy in percent on the base and on the novel species, each among its own 51 names."""
    accuracies = []
    half = len(demo.TASK) // 2
    for first in (0, half):
        names = demo.CLASSNAMES[first : first + half]
        text = clip.encode_text(tokenize([demo.TEMPLATE.replace("{}", name) for name in names]))
        inside = (labels >= first) & (labels < first + half)
        features = torch.cat([clip.encode_image(normalize(x)) for x in images[inside].split(128)])
        right = clip.logits(features, text).argmax(1) == labels[inside] - first
        accuracies.append(100 * right.double().mean().item())
    return accuracies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=ASSET)
    flags = parser.parse_args()
    started = time.perf_counter()
    clip = pretrain(flags.steps)
    save(clip, flags.out, torch.float16)
    seconds = time.perf_counter() - started
    print(f"{flags.out}: {flags.out.stat().st_size / 1e6:.2f} MB, {seconds:.0f} s")
    labels = torch.arange(len(demo.TASK)).repeat_interleave(5)
    drawings = demo.render(
        demo.indices(demo.TASK)[labels], demo.draw_noise(len(labels), seed=9), "drawing"
    )
    for title, images, y in (
        ("drawings of the task's species", drawings, labels),
        ("validation photos of the task", *demo.split("val")),
    ):
        base, novel = zero_shot(clip, images, y)
        print(f"zero-shot, {title}: base {base:.1f}, novel {novel:.1f}")


if __name__ == "__main__":
    main()
