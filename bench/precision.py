"""Time --precision: LoRA at full size, in fp32, bf16 and (on a GPU) fp16.

python bench/precision.py                        # 200 steps in each; about 10 minutes on 2 cores

ViT-B/16 with random weights and random images and labels; the settings are `--recipe notebook`'s.
The exit code is 1 if a loss or a learned tensor is not finite. On a CPU, fp16 works but is slow, so
it only runs with --precision fp16.
"""

import argparse
import sys
import time

import torch
from side_by_side import hardware

from clip_min import CLIP, CONFIGS
from fewshot.batches import PRECISIONS
from methods import METHODS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B/16", choices=CONFIGS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1, help="images in a step")
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    device = torch.device(given.device)
    chosen = given.precision or ["fp32", "bf16"] + ["fp16"] * (device.type == "cuda")
    print(f"{given.model}, {device}, {given.steps} steps, batch {given.batch}")
    print(hardware(), flush=True)
    finite = [run(precision, given, device) for precision in chosen]
    return 0 if all(finite) else 1


def run(precision: str, given, device: torch.device) -> bool:
    """Train, print a line -> whether all stayed finite."""
    torch.manual_seed(0)
    clip = CLIP(CONFIGS[given.model]).to(device).eval()
    kind = METHODS["lora"]
    names = [f"kind {i}" for i in range(given.classes)]
    lora = kind(clip, names, "a photo of a {}, a type of flower.", kind.Settings())
    learned = list(lora.adapter_state().values())
    optimizer = torch.optim.AdamW(learned, lr=lora.settings.lr, weight_decay=1e-2)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    size = clip.config.image_size
    images = torch.randn(8, 3, size, size).to(device)
    labels = torch.randint(given.classes, (8,)).to(device)
    losses, started = [], 0.0
    for step in range(-1, given.steps):
        if step == 0:  # the step before is not timed: on a GPU it loads libraries
            started = time.perf_counter()
        rows = (torch.arange(given.batch) + step * given.batch) % len(images)
        with torch.autocast(device.type, **PRECISIONS[precision]):
            loss = lora.loss(images[rows], labels[rows])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    seconds = (time.perf_counter() - started) / given.steps
    finite = torch.tensor(losses).isfinite().all() and all(p.isfinite().all() for p in learned)
    tenth = max(1, given.steps // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    said = "all finite" if finite else "NOT FINITE"
    print(f"{precision}  {seconds:6.3f} s/step  loss {first:.3f} -> {last:.3f}  {said}", flush=True)
    return bool(finite)


if __name__ == "__main__":
    sys.exit(main())
