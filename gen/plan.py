"""How many images of each class are made, and from what; nothing here depends on what ran before.

    uniform   per_class images of every class
    f1        the same, but only of classes whose validation F1 is below a threshold
    deficit   n_k in proportion to 1 - F1_k, as many in all as uniform

f1 is the improved DISEF's plan (there: 55 % fewer images); F1 is that of the filter's model.
"""

import hashlib

import torch
from torch import Tensor

PLANS = ("uniform", "f1", "deficit")


def quotas(
    plan: str, per_class: int, classes: int, f1: Tensor | None = None, threshold: float = 0.7
) -> list[int]:
    """Images to make of each class. f1 (K,), from 0 to 1, is read by all plans but uniform."""
    if plan == "uniform":
        return [per_class] * classes
    if plan == "f1":
        return [per_class if value < threshold else 0 for value in f1.tolist()]
    return shares(per_class * classes, (1 - f1.double()).tolist())


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
