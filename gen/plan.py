"""Plan how many images of each class to make, and from what; this depends only on the arguments.

    uniform   per_class images of each class
    f1        the same, but only of classes whose validation F1 is below a threshold
    deficit   n_k proportional to 1 - F1_k, with the same total as uniform

f1 is the plan of the improved DISEF, with zero-shot CLIP's F1 (there: 23 of 51 classes).
"""

import hashlib

import torch
from torch import Tensor

from gen.settings import Generation


def plan(options: Generation, classnames: list[str], f1: Tensor | None) -> dict:
    """Images to make of each class. f1 (K,), float64 from 0 to 1; uniform does not read it."""
    counts = [options.per_class] * len(classnames)
    if options.plan == "f1":
        counts = [
            n * (value < options.f1_threshold) for n, value in zip(counts, f1.tolist(), strict=True)
        ]
    elif options.plan == "deficit":
        counts = shares(sum(counts), (1 - f1.double()).tolist())
    measured = None if f1 is None else dict(zip(classnames, f1.tolist(), strict=True))
    return {"quotas": dict(zip(classnames, counts, strict=True)), "f1": measured}


def shares(total: int, weights: list[float]) -> list[int]:
    """Divide `total` in proportion to `weights`, by the largest remainders.

    shares(10, [1, 1, 2]) is [3, 2, 5]: 2.5, 2.5 and 5, and the remaining one goes to the first.
    """
    if sum(weights) == 0:
        weights = [1.0] * len(weights)
    exact = [total * weight / sum(weights) for weight in weights]
    given = [int(value) for value in exact]
    most_due = sorted(range(len(exact)), key=lambda k: given[k] - exact[k])  # stable: ties in order
    for k in most_due[: total - sum(given)]:
        given[k] += 1
    return given


def seed_of(*parts) -> int:
    """A 32-bit seed computed from `parts`: seed_of(1, "rose", 7)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def draw(seed: int, pictures: int, captions: int) -> tuple[int, int, int]:
    """-> the index of the image that is captioned, of its caption, and of the image to repaint.

    The two images differ, unless the class has only one.
    """
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(pictures, generator=rng).tolist()
    caption = int(torch.randint(captions, (), generator=rng))
    return order[0], caption, order[1 % pictures]
