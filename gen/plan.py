"""How many images of each class are made, and from what; nothing here depends on what ran before.

    uniform   per_class images of every class
    f1        the same, but only of classes whose validation F1 is below a threshold
    deficit   n_k in proportion to 1 - F1_k, as many in all as uniform

f1 is the improved DISEF's plan, by zero-shot CLIP's F1 (there: 23 of 51 classes).
"""

import hashlib

import torch
from torch import Tensor

from gen.settings import Generation


def plan(options: Generation, classnames: list[str], f1: Tensor | None) -> dict:
    """Images to make of each class. f1 (K,), float64 from 0 to 1, is read by all but uniform."""
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
    """`total` things shared out in proportion to `weights`, by the largest remainders.

    shares(10, [1, 1, 2]) is [3, 2, 5]: 2.5, 2.5 and 5, and the one left over goes to the first.
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
    """A seed, 32 bits, that follows from `parts` alone: seed_of(1, "rose", 7)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def draw(seed: int, pictures: int, captions: int) -> tuple[int, int, int]:
    """-> which picture is captioned, with which of its captions, and which one is repainted.

    Two different pictures of the class, or the same one where there is only one.
    """
    dice = torch.Generator().manual_seed(seed)
    order = torch.randperm(pictures, generator=dice).tolist()
    caption = int(torch.randint(captions, (), generator=dice))
    return order[0], caption, order[1 % pictures]
